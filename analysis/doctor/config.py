"""Set what counts as an artifact."""

from __future__ import annotations

from dataclasses import dataclass

from dvt.errors import ConfigError


@dataclass(frozen=True)
class DoctorConfig:
    """Set what counts as an artifact, and how many images are measured.

    Args:
        images: number of images at most, evenly spread over those given.
        windows: torus windows of each, an even number.
        share: least share of the variance that stays at the position for a position artifact. Two patches of equal
            content at different positions then have a cosine of .95 instead of 1, about the size of what
            quantising or resizing does; a random ViT has .01, trained ones with the artifact .2 and more.
        outliers: least share of tokens for a norm artifact, a tenth of the 2.37 % that Darcet et al. count in
            DINOv2-g.
        ratio: how many times the median norm an outlier has at least.
        layout: R^2 of position read from photographs without the artifact, from which position counts as a cue
            that the content has too.
        draws: of the nulls.
        seed: of windows and nulls.
    """

    images: int = 16
    windows: int = 16
    share: float = 0.05
    outliers: float = 0.0025
    ratio: float = 2.0
    layout: float = 0.2
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1 or self.windows < 2 or self.windows % 2 or self.draws < 2:
            raise ConfigError(
                "images must be 1 or more, windows even and draws at least 2, got "
                f"{self.images}, {self.windows} and {self.draws}"
            )
        if not (0 < self.share < 1 and 0 < self.outliers < 1 and self.ratio > 1):
            raise ConfigError(f"share and outliers must lie in (0, 1) and ratio above 1, got {self}")
