"""How stage one is done: which product, from which views, by which solver."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from dvt.errors import ConfigError
from dvt.fields.linear import LinearConfig, LinearSolver
from dvt.fields.neural import NeuralConfig, NeuralSolver
from dvt.fields.shifts import ShiftConfig, ShiftSolver
from dvt.views import ViewConfig

Product = Literal["removed", "ensembled", "blend"]

#: The views that each product is best made of, at equal forward passes (benchmarks/products.py).
PRODUCT_VIEWS: dict[str, ViewConfig] = {
    "removed": ViewConfig(count=16, kind="shifts"),
    "ensembled": ViewConfig(count=48, scale=(0.05, 0.3)),
    "blend": ViewConfig(count=48),
}

#: Smoothness of the field over scales: labels like it smoother than held-out tokens do (benchmarks/products.py).
ENSEMBLED_SMOOTHNESS = 1.0


@dataclass(frozen=True)
class DenoiseConfig:
    """How stage one is done. `views.batch`, `solve_images` and `overlap` change speed and memory, not the job.

    Args:
        views: how many views an image besides the whole one, or how they are drawn; None takes those that suit the
            product. Afterwards always a :class:`~dvt.views.ViewConfig`.
        product: "removed" (this image's own tokens without the artifact: faithful; from shifted windows), "ensembled"
            (the field over scales: what labels like; from crops) or "blend" (between the two, from crops; the first
            release's). None takes "removed", or what `views` or the neural solver can make. Afterwards always a name.
        solver: "linear" (closed form, the default) or "neural" (gradient fitting, as in the paper).
        linear: settings of the linear solver.
        neural: settings of the neural solver.
        shifts: settings of the closed-form solver of shifted windows.
        shared_artifact: fit one artifact for all images of a grid shape, instead of one each.
        shared_images: images that the shared artifact is fitted on, the first ones in order of their paths.
        dtype: of the backbone's forward pass; fitting is always done in float32 or better.
        solve_images: images of one grid shape that are solved together; their tokens are held in memory at once. None
            takes 8 for a closed form on a GPU, else 1.
        overlap: let the backbone go on with the next images while some are solved; None does so on a GPU.

    Raises:
        ConfigError: a setting is out of its range, or the product cannot be made of these views or by this solver.

    >>> config = DenoiseConfig()
    >>> config.product, config.views.kind, config.views.count
    ('removed', 'shifts', 16)
    >>> DenoiseConfig(product="ensembled", views=96).views.count
    96
    """

    # The annotations say what the fields are once made: __post_init__ fills in None and numbers.
    views: ViewConfig = None  # type: ignore[assignment]
    product: Product = None  # type: ignore[assignment]
    solver: Literal["linear", "neural"] = "linear"
    linear: LinearConfig = field(default_factory=LinearConfig)
    neural: NeuralConfig = field(default_factory=NeuralConfig)
    shifts: ShiftConfig = field(default_factory=ShiftConfig)
    shared_artifact: bool = False
    shared_images: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    solve_images: int | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("linear", "neural"):
            raise ConfigError(f"solver is {self.solver!r}; it must be 'linear' or 'neural'")
        self._fill_in()
        self._check_product()
        if self.shared_artifact and self.solver != "linear":
            raise ConfigError("a shared artifact is fitted by the linear solver only; leave --solver at linear")
        if self.shared_images < 1:
            raise ConfigError(f"shared_images is {self.shared_images}; it must be 1 or more")
        if self.solve_images is not None and self.solve_images < 1:
            raise ConfigError(f"solve_images is {self.solve_images}; it must be 1 or more, or left out to be chosen")

    def _fill_in(self) -> None:
        """Choose the product from the views and the solver, or the views from the product."""
        given: Any = self.views
        if self.product is None:
            drawn = given.kind if isinstance(given, ViewConfig) else None
            made_of_crops = "ensembled" if self.solver == "neural" else "blend" if drawn == "crops" else "removed"
            object.__setattr__(self, "product", "removed" if drawn == "shifts" else made_of_crops)
        if self.product not in get_args(Product):
            raise ConfigError(f"product is {self.product!r}; it must be one of {', '.join(get_args(Product))}")
        if isinstance(given, ViewConfig):
            return
        views = ViewConfig() if self.solver == "neural" else PRODUCT_VIEWS[self.product]
        object.__setattr__(self, "views", views if given is None else replace(views, count=given))

    def _check_product(self) -> None:
        if self.product == "removed" and self.solver != "linear":
            raise ConfigError(
                "the product 'removed' has a closed form only; leave --solver at linear, or take --product ensembled"
            )
        if (self.views.kind == "shifts") != (self.product == "removed"):
            kind = "shifts" if self.product == "removed" else "crops"
            raise ConfigError(
                f"the product {self.product!r} is made of {kind}, and the views are {self.views.kind}; draw them with "
                f"ViewConfig(kind={kind!r}), or give their number alone"
            )

    def job_settings(self) -> dict[str, Any]:
        """List the settings that the tokens depend on, for the job's hash: not those of the other solvers.

        A blend's are those of the first release, whose stores are continued.
        """
        settings = asdict(self)
        taken = "shifts" if self.product == "removed" else self.solver
        for name in {"linear", "neural", "shifts"} - {taken}:
            settings.pop(name)
        settings["views"].pop("batch")
        for name in ("solve_images", "overlap"):
            settings.pop(name)
        if not self.shared_artifact:
            settings.pop("shared_images")
        if self.product == "blend":
            settings.pop("product")
        for name in ("kind", "reach") if self.product != "removed" else ("scale", "ratio", "flip"):
            settings["views"].pop(name)
        return settings

    def make_solver(self) -> LinearSolver | NeuralSolver | ShiftSolver:
        """Make the solver that these settings describe."""
        if self.solver == "neural":
            return NeuralSolver(self.neural)
        return self.closed_form()

    def closed_form(self) -> LinearSolver | ShiftSolver:
        """Make the closed-form solver of the product's views, which also finds shared artifacts."""
        if self.product == "removed":
            return ShiftSolver(self.shifts)
        if self.product == "ensembled":
            smoothness = ENSEMBLED_SMOOTHNESS if self.linear.smoothness is None else self.linear.smoothness
            return LinearSolver(replace(self.linear, blend=False, smoothness=smoothness))
        return LinearSolver(self.linear)
