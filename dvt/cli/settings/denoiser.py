"""Hold the settings of `dvt train`, `dvt distill` and `dvt export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dvt.cli.settings.common import BackboneOptions, DenoiserOptions, Options, Remade
from dvt.denoiser.config import DenoiserTraining
from dvt.denoiser.distill.config import BackboneTraining
from dvt.errors import ConfigError
from dvt.training.config import TrainingConfig

if TYPE_CHECKING:
    from dvt.backbones import Backbone


@dataclass(frozen=True)
class DenoiserFlags(DenoiserTraining):
    """Name the flags of the training loop without a prefix: --steps, not --training.loop.steps."""

    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = DenoiserTraining.loop
    """Settings of the training loop."""


@dataclass(frozen=True)
class BackboneFlags(BackboneTraining):
    """Name the flags of the training loop without a prefix, as :class:`DenoiserFlags` does."""

    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = BackboneTraining.loop
    """Settings of the training loop."""


@dataclass(frozen=True)
class Train(Options, Remade):
    """Train one small denoiser, which runs online, from a store of `dvt denoise`.

    Run the same command again to continue an interrupted run. `accelerate launch --module dvt.cli train ...` uses
    several GPUs.
    """

    store: tyro.conf.Positional[Path]
    """A store with raw and semantic tokens."""
    out: Path
    """The .safetensors file to write; checkpoints and log.csv go beside it, to NAME.run."""
    training: Annotated[DenoiserFlags, tyro.conf.arg(name="")] = field(default_factory=DenoiserFlags)
    """Settings of the denoiser and its training."""


@dataclass(frozen=True)
class Distill(DenoiserOptions, Remade):
    """Fine-tune a whole backbone to its denoiser's output (or --teacher views), so that its own tokens are clean; or,
    with --student, another model to its clean or raw tokens.

    Run the same command again to continue an interrupted run. `accelerate launch --module dvt.cli distill ...` uses
    several GPUs.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths; no labels are needed."""
    out: Path
    """The .safetensors file to write; checkpoints and log.csv go beside it, to NAME.run."""
    student: str | None = None
    """Name of another timm model that learns the tokens, through a projection; by default a copy of the backbone."""
    student_weights: str | None = None
    """The student's weights to start from: a file, "random", or by default the hub's."""
    student_size: int | None = None
    """Shorter side of the student's input in pixels; by default the model's own."""
    training: Annotated[BackboneFlags, tyro.conf.arg(name="")] = field(default_factory=BackboneFlags)
    """Settings of the training."""

    def load_student(self) -> Backbone | None:
        """Load the student onto the device; None without --student."""
        if self.student is None:
            if self.student_weights is not None or self.student_size is not None:
                raise ConfigError("--student-weights and --student-size describe a --student, which is missing")
            return None
        options = {"backbone": self.student, "weights": self.student_weights, "size": self.student_size}
        return BackboneOptions(**options, device=self.device).load_exact()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Export(DenoiserOptions):
    """Write a backbone, with or without a denoiser, to one file that runs without dvt and timm."""

    out: Path
    """The file to write: .onnx, or .pt2 for torch.export.load."""
    grid: Literal["auto", "dynamic", "fixed"] = "auto"
    """"dynamic" takes every size in whole patches, "fixed" one size, "auto" is dynamic if the model can be."""
    opset: int | None = None
    """ONNX operator set; by default the one recommended for this version of torch."""
    dtype: tyro.conf.Suppress[Literal["float32"]] = field(default="float32", kw_only=True)
    """The file holds the weights as they are."""
