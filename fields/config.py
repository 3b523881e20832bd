"""Hold the settings of stage one: the product, the views, the solver, and the settings of each solver."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from dvt.errors import ConfigError
from dvt.schema import check_ranges
from dvt.views.config import ViewConfig

Product = Literal["removed", "ensembled", "blend"]
EncodingKind = Literal["auto", "torch", "tinycudann"]

#: The views that give each product the best scores, at an equal number of forward passes (benchmarks/products.py).
PRODUCT_VIEWS: dict[str, ViewConfig] = {
    "removed": ViewConfig(count=16, kind="shifts"),
    "ensembled": ViewConfig(count=48, scale=(0.05, 0.5)),
    "blend": ViewConfig(count=48),
}

#: Raised with each change of the estimators' numbers, so that no store mixes two versions; 4: the smoothness of
#: ensembled's field grows with the number of views.
ESTIMATOR = 4


def check_grid(levels: int, base: int, finest: int, channels: int, hash_entries: int) -> None:
    """Check the sizes of a multi-resolution grid; raise ConfigError if they are out of range."""
    if levels < 1 or base < 2 or finest < base:
        raise ConfigError(
            f"a grid needs levels >= 1 and finest >= base >= 2, got levels {levels}, base {base}, finest {finest}"
        )
    if channels not in (1, 2, 4, 8):
        raise ConfigError(f"a grid has 1, 2, 4 or 8 channels per level, got {channels}")
    if hash_entries < 8 or hash_entries & (hash_entries - 1):
        raise ConfigError(f"hash_entries must be a power of two of at least 8, got {hash_entries}")


@dataclass(frozen=True)
class LinearConfig:
    """Hold the settings of the linear solver.

    Args:
        resolution: nodes of the field along the grid's shorter side; None chooses from the data, or takes two a patch
            where smoothness is given and 1 or more.
        smoothness: lambda on the squared differences of neighbouring nodes, in tokens; None chooses from the data.
        ridge: gamma on the artifact, relative to the number of tokens per position.
        robust: give outlier tokens less weight (Geman-McClure weights of their residual in a pilot fit).
        cutoff: residual norm at which a token's weight is a quarter, in medians.
        residual: fit h, a ridge regression that predicts raw - F - G of outlier tokens from the raw token.
        residual_ridge: the ridge of h, relative to the mean variance of a channel.
        blend: combine F and raw - G - h in the semantic estimate, weighted by their variances; off takes F alone.
        pilot_views: number of views that the pilot fit uses; they are held in memory until it is done.
        seed: seed of the pilot's random projection.
    """

    resolution: int | None = None
    smoothness: float | None = None
    ridge: float = 1e-4
    robust: bool = True
    cutoff: float = 5.0
    residual: bool = True
    residual_ridge: float = 1e-2
    blend: bool = True
    pilot_views: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resolution is not None and not 2 <= self.resolution <= 1024:
            raise ConfigError(f"resolution is {self.resolution}; it must lie in 2..1024, or be None to be chosen")
        if self.smoothness is not None and not self.smoothness > 0:
            raise ConfigError(f"smoothness is {self.smoothness}; it must be positive, or None to be chosen")
        check_ranges(
            self,
            {
                "ridge": (self.ridge >= 0, "0 or more"),
                "residual_ridge": (self.residual_ridge >= 0, "0 or more"),
                "cutoff": (self.cutoff > 0, "above 0"),
                "pilot_views": (self.pilot_views >= 2, "2 or more"),
            },
        )


@dataclass(frozen=True)
class NeuralConfig:
    """Hold the settings of the neural solver; the defaults are the paper's.

    Args:
        levels: number of grids in the field's encoding.
        base: nodes along a side of the coarsest grid.
        finest: nodes along a side of the finest grid.
        channels: values per node and level; 1, 2, 4 or 8.
        hash_entries: the largest number of nodes that a level stores, a power of two.
        steps: gradient steps; the artifact is frozen and the residual starts after half of them.
        tokens_per_step: tokens drawn for each step, with replacement.
        lr: Adam's learning rate after the warm-up, per standard deviation of the tokens.
        final_lr: learning rate of the last step, reached along a cosine.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        weight_decay: factor of each parameter that is added to its gradient (Adam's L2, not AdamW), as in the paper's
            code.
        warmup: share of the steps over which the learning rate rises linearly from 0.
        residual_weight: weight of the residual predictor's squared error.
        sparsity: weight of the residual's mean absolute value.
        residual: fit a residual term.
        seed: seed of the initial values and of the drawn tokens.
        encoding: "torch", "tinycudann", or "auto", which takes tinycudann if it is installed and there is a GPU.

    Raises:
        ConfigError: a value is outside its range.
    """

    levels: int = 16
    base: int = 16
    finest: int = 1024
    channels: int = 8
    hash_entries: int = 2**20
    steps: int = 25_000
    tokens_per_step: int = 2048
    lr: float = 0.01
    final_lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-15
    weight_decay: float = 1e-5
    warmup: float = 0.1
    residual_weight: float = 0.1
    sparsity: float = 0.02
    residual: bool = True
    seed: int = 0
    encoding: EncodingKind = "auto"

    def __post_init__(self) -> None:
        check_grid(self.levels, self.base, self.finest, self.channels, self.hash_entries)
        checks = {
            "steps": (self.steps >= 2, "2 or more"),
            "tokens_per_step": (self.tokens_per_step >= 1, "1 or more"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "final_lr": (0 <= self.final_lr <= self.lr, f"from 0 to lr, which is {self.lr}"),
            "betas": (
                len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                "two numbers from 0, below 1",
            ),
            "eps": (0 < self.eps < math.inf, "above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup": (0 <= self.warmup < 1, "from 0, below 1"),
            "residual_weight": (0 <= self.residual_weight < math.inf, "0 or more"),
            "sparsity": (0 <= self.sparsity < math.inf, "0 or more"),
            "encoding": (self.encoding in ("auto", "torch", "tinycudann"), "auto, torch or tinycudann"),
        }
        check_ranges(self, checks)

    def learning_rate(self, step: int) -> float:
        """Compute the learning rate of a step in 0 ... steps - 1: linear warm-up, then a cosine down to final_lr.

        >>> config = NeuralConfig(steps=101, warmup=0.0)
        >>> round(config.learning_rate(0), 4), round(config.learning_rate(50), 4), round(config.learning_rate(100), 4)
        (0.01, 0.0055, 0.001)
        """
        warm = int(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        share = (step - warm) / max(self.steps - 1 - warm, 1)
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class ShiftConfig:
    """Hold the settings of the two-way solver.

    Args:
        ridge: ridge of the artifact, relative to the mean diagonal of its equations.
        alarm: the false alarm rate of the test for an artifact: the share of images without an artifact that are
            changed nevertheless. 1 skips the test.
        groups: number of groups of content that the test compares; its smallest p-value is 2^(1 - groups).
        average: the share of F, the average over windows, in the estimate; the rest is raw - G.
        robust: give outlier tokens less weight; the estimate replaces them by F if other windows show their content.
        sigmas: a token gets no weight if the logarithm of its norm is more than this many robust standard deviations
            from the median.
        cutoff: norm of raw - F - G at which a token's weight is a quarter, in medians.
    """

    ridge: float = 1e-6
    alarm: float = 0.01
    groups: int = 8
    average: float = 0.5
    robust: bool = True
    sigmas: float = 2.5
    cutoff: float = 5.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "ridge": (self.ridge > 0, "above 0"),
                "average": (0 <= self.average <= 1, "from 0 to 1"),
                "sigmas": (self.sigmas > 0, "above 0"),
                "cutoff": (self.cutoff > 0, "above 0"),
            },
        )
        if not 2 <= self.groups <= 16:
            raise ConfigError(f"groups is {self.groups}; the test takes 2 to 16 of them")
        if not 2.0 ** (1 - self.groups) <= self.alarm <= 1:
            raise ConfigError(
                f"alarm is {self.alarm}; with {self.groups} groups it must lie between {2.0 ** (1 - self.groups):.2g} "
                "and 1: raise it, or the number of groups"
            )


@dataclass(frozen=True)
class DenoiseConfig:
    """Hold the settings of stage one. `views.batch`, `solve_images` and `overlap` change speed and memory, not the job.

    Args:
        views: the number of views per image besides the whole image, or a :class:`~dvt.views.ViewConfig`; None takes
            the views that suit the product. After construction it is always a ViewConfig.
        product: "removed" (this image's own tokens without the artifact, closest to them; from shifted windows),
            "ensembled" (the field over scales, best for labelled tasks; from crops) or "blend" (between the two, from
            crops; that of the first release). None takes "removed", unless `views` or the neural solver cannot make
            it. After construction it is always a name.
        strength: share of the change to apply, in [0, 1]: semantic is raw + strength (product - raw), and artifact and
            residual are scaled alike.
        solver: "linear" (closed form, the default) or "neural" (gradient fitting, as in the paper).
        linear: settings of the linear solver.
        neural: settings of the neural solver.
        shifts: settings of the closed-form solver of shifted windows.
        shared_artifact: fit one artifact to all images of a grid shape, instead of one to each image.
        shared_images: number of images that the shared artifact is fitted to, the first in order of their paths.
        dtype: dtype of the backbone's forward pass; "auto" calls :func:`dvt.backbones.choose_precision`. Fitting always
            uses float32 or better.
        solve_images: number of images of one grid shape that are solved together, with their tokens in memory. None
            takes 8 for a closed form on a GPU, else 1.
        overlap: run the backbone on the next images while others are solved; None does so on a GPU. Never in tf32, a
            setting of the whole process, which would reach the solver.

    Raises:
        ConfigError: a setting is out of its range, or the product cannot be made of these views or by this solver.

    >>> config = DenoiseConfig()
    >>> config.product, config.views.kind, config.views.count
    ('removed', 'shifts', 16)
    >>> DenoiseConfig(product="ensembled", views=96).views.count
    96
    """

    # The annotations are the types after construction: __post_init__ replaces None and numbers.
    views: ViewConfig = None  # type: ignore[assignment]
    product: Product = None  # type: ignore[assignment]
    strength: float = 1.0
    solver: Literal["linear", "neural"] = "linear"
    linear: LinearConfig = field(default_factory=LinearConfig)
    neural: NeuralConfig = field(default_factory=NeuralConfig)
    shifts: ShiftConfig = field(default_factory=ShiftConfig)
    shared_artifact: bool = False
    shared_images: int = 32
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "float32"
    solve_images: int | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("linear", "neural"):
            raise ConfigError(f"solver is {self.solver!r}; it must be 'linear' or 'neural'")
        if self.dtype not in ("auto", "float32", "tf32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be 'auto', 'float32', 'tf32', 'bfloat16' or 'float16'")
        self._fill_in()
        self._check_product()
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"strength is {self.strength}; it must lie in [0, 1]: 0 is raw, 1 the whole change")
        if self.shared_artifact and self.solver != "linear":
            raise ConfigError("a shared artifact is fitted by the linear solver only; leave --solver at linear")
        if self.shared_images < 1:
            raise ConfigError(f"shared_images is {self.shared_images}; it must be 1 or more")
        if self.solve_images is not None and self.solve_images < 1:
            raise ConfigError(f"solve_images is {self.solve_images}; it must be 1 or more, or None to be chosen")

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
        if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
            raise ConfigError(f"views is {given!r}; give their number, a dvt.views.ViewConfig, or None to be chosen")
        views = ViewConfig() if self.solver == "neural" else PRODUCT_VIEWS[self.product]
        object.__setattr__(self, "views", views if given is None else replace(views, count=given))

    def _check_product(self) -> None:
        if self.product == "removed" and self.solver != "linear":
            raise ConfigError(
                "only the linear solver makes the product 'removed'; leave --solver at linear, or choose --product "
                "ensembled"
            )
        if (self.views.kind == "shifts") != (self.product == "removed"):
            kind = "shifts" if self.product == "removed" else "crops"
            raise ConfigError(
                f"the product {self.product!r} is made of {kind}, and the views are {self.views.kind}; draw them with "
                f"ViewConfig(kind={kind!r}), or give their number alone"
            )

    def job_settings(self) -> dict[str, Any]:
        """List the settings that the tokens depend on, for the job's hash, without those of unused solvers."""
        settings = {**asdict(self), "estimator": ESTIMATOR}
        taken = "shifts" if self.product == "removed" else self.solver
        for name in {"linear", "neural", "shifts"} - {taken}:
            settings.pop(name)
        settings["views"].pop("batch")
        for name in ("solve_images", "overlap"):
            settings.pop(name)
        if not self.shared_artifact:
            settings.pop("shared_images")
        if self.strength == 1:  # as in stores of before there was a strength
            settings.pop("strength")
        for name in ("kind", "reach") if self.product != "removed" else ("scale", "ratio", "flip"):
            settings["views"].pop(name)
        return settings
