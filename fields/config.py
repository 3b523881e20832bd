"""How stage one is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dvt.errors import ConfigError
from dvt.fields.linear import LinearConfig, LinearSolver
from dvt.fields.neural import NeuralConfig, NeuralSolver
from dvt.views import ViewConfig


@dataclass(frozen=True)
class DenoiseConfig:
    """How stage one is done. `views.batch`, `solve_images` and `overlap` change speed and memory, not the job.

    Args:
        views: how views are drawn.
        solver: "linear" (closed form, the default) or "neural" (gradient fitting, as in the paper).
        linear: settings of the linear solver.
        neural: settings of the neural solver.
        shared_artifact: fit one artifact for all images of a grid shape, instead of one each.
        shared_images: images that the shared artifact is fitted on, the first ones in order of their paths.
        dtype: of the backbone's forward pass; fitting is always done in float32 or better.
        solve_images: images of one grid shape that are solved together; their tokens are held in memory at once. None
            takes 8 for the linear solver on a GPU, else 1.
        overlap: let the backbone go on with the next images while some are solved; None does so on a GPU.
    """

    views: ViewConfig = field(default_factory=ViewConfig)
    solver: Literal["linear", "neural"] = "linear"
    linear: LinearConfig = field(default_factory=LinearConfig)
    neural: NeuralConfig = field(default_factory=NeuralConfig)
    shared_artifact: bool = False
    shared_images: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    solve_images: int | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("linear", "neural"):
            raise ConfigError(f"solver is {self.solver!r}; it must be 'linear' or 'neural'")
        if self.shared_artifact and self.solver != "linear":
            raise ConfigError("a shared artifact is fitted by the linear solver only; leave --solver at linear")
        if self.shared_images < 1:
            raise ConfigError(f"shared_images is {self.shared_images}; it must be 1 or more")
        if self.solve_images is not None and self.solve_images < 1:
            raise ConfigError(f"solve_images is {self.solve_images}; it must be 1 or more, or left out to be chosen")

    def job_settings(self) -> dict[str, Any]:
        """List the settings that the tokens depend on, for the job's hash: not the other solver's."""
        settings = asdict(self)
        settings.pop("neural" if self.solver == "linear" else "linear")
        settings["views"].pop("batch")
        for name in ("solve_images", "overlap"):
            settings.pop(name)
        if not self.shared_artifact:
            settings.pop("shared_images")
        return settings

    def make_solver(self) -> LinearSolver | NeuralSolver:
        """Make the solver that these settings describe."""
        return LinearSolver(self.linear) if self.solver == "linear" else NeuralSolver(self.neural)
