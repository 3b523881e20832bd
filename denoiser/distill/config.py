"""Hold the settings for fine-tuning a backbone to its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dvt.errors import ConfigError
from dvt.training.config import TrainingConfig

_BACKBONE_LOOP = TrainingConfig(
    steps=2000, batch_size=16, learning_rate=1e-4, warmup=0.1, ema=0.99, validate_every=200, checkpoint_every=500
)


@dataclass(frozen=True)
class BackboneTraining:
    """Hold the settings for fine-tuning a backbone; its input size is the one that it was loaded with.

    Args:
        teacher: "denoiser", the frozen backbone followed by a denoiser, or "views", the mean of the frozen backbone's
            tokens over shifted and mirrored views; for a student of another model also "raw", its tokens as they are.
        views: number of shifted views per image, for the teacher "views"; every other one is mirrored.
        shift: largest shift of a view, as a share of the input's side, in (0, 1]. Artifacts finer than this are
            averaged out; at 1 every patch is seen equally often at all positions, so no artifact of position remains,
            but only a quarter of the views show each patch. Images are enlarged at least (1 + 2 shift) times.
        registers: number of register tokens to add after the prefix tokens.
        prefix_weight: weight of the part of the loss that keeps class token and existing registers unchanged.
        layer_decay: factor of the learning rate from each block to the previous one, in (0, 1]; 1 for no decay.
        grad_checkpointing: compute activations twice to hold fewer of them in memory.
        scale: smallest and largest share of an image's area that an example shows, relative to the largest share that
            its aspect ratio allows.
        validation: share of the images to hold out, in (0, 1); at least one image is held out, at most 64 are used.
        loop: steps, batch size, learning rate (of the last layer and of added registers) and the rest of the training
            loop; its averaged weights are the result. Weights in timm's ``no_weight_decay()`` have no weight decay.

    Raises:
        ConfigError: a value is outside its range.
    """

    teacher: Literal["denoiser", "views", "raw"] = "denoiser"
    views: int = 10
    shift: float = 0.5
    registers: int = 0
    prefix_weight: float = 1.0
    layer_decay: float = 0.9
    grad_checkpointing: bool = False
    scale: tuple[float, float] = (0.3, 1.0)
    validation: float = 0.1
    loop: TrainingConfig = _BACKBONE_LOOP

    def __post_init__(self) -> None:
        if self.teacher not in ("denoiser", "views", "raw"):
            raise ConfigError(f"there is no teacher {self.teacher!r}; it must be 'denoiser', 'views' or 'raw'")
        if self.views < 1:
            raise ConfigError(f"views must be at least 1, got {self.views}")
        if self.registers < 0:
            raise ConfigError(f"registers is the number of tokens to add, at least 0, got {self.registers}")
        if not self.prefix_weight >= 0:
            raise ConfigError(f"prefix_weight must be at least 0, got {self.prefix_weight}")
        for name in ("shift", "layer_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"scale must satisfy 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation is a share of the images in (0, 1), got {self.validation}")
