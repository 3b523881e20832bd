"""Settings of the views of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dvt.errors import ConfigError


@dataclass(frozen=True)
class ViewConfig:
    """Hold the settings for drawing views of an image (Denoising Vision Transformers, section 4.1, with 768 views).

    Two kinds: crops show parts of the image, enlarged; shifts are windows at its own scale, moved by whole patches
    over the image mirrored at its borders (ours). The whole image always comes first, in addition.

    Args:
        count: number of views per image, beside the whole image.
        kind: "crops", which use `scale`, `ratio` and `flip`, or "shifts", which use `reach`.
        reach: the largest shift of a window, as a share of the image's sides. At 1 all content is equally likely at
            every position, so that effects of the content are not mistaken for an artifact.
        scale: smallest and largest share of the image's area that a view shows.
        ratio: smallest and largest aspect ratio of a view, relative to the whole image's.
        flip: probability that a view is mirrored left to right.
        seed: seed of the generator; the same seed draws the same boxes.
        batch: views per forward pass of the backbone.
    """

    count: int = 48
    kind: Literal["crops", "shifts"] = "crops"
    reach: float = 1.0
    scale: tuple[float, float] = (0.1, 0.5)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        if self.kind not in ("crops", "shifts"):
            raise ConfigError(f"kind is {self.kind!r}; views are 'crops' or 'shifts', all of one kind")
        if self.count < 0:
            raise ConfigError(f"views is {self.count}; it must be 0 or more")
        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}; it must be 1 or more")
        if not 0 < self.reach <= 1:
            raise ConfigError(f"reach is {self.reach}; windows are shifted by a share in (0, 1] of the image's sides")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"scale must satisfy 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"ratio must satisfy 0 < smallest <= largest, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip is a probability between 0 and 1, got {self.flip}")
