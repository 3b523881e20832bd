"""List the remedies, and hold their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dvt.schema import check_ranges

Remedy = Literal["registers", "defect", "noise", "insid3", "rasa"]
REMEDIES: tuple[Remedy, ...] = get_args(Remedy)
#: Remedies that use only noise images.
WITHOUT_IMAGES = ("noise", "insid3")


@dataclass(frozen=True)
class RemedyConfig:
    """Hold the settings of the remedies.

    Args:
        noise_images: number of noise images, for noise and insid3.
        rank: the largest number of directions that insid3 removes.
        rounds: the largest number of rounds of rasa, each of two directions.
        neurons: the largest number of neurons for registers.
        predicted: predict the direction of the defect from the weights, and use images only for its limit.
        seed: seed of the noise images.
    """

    noise_images: int = 16
    rank: int = 8
    rounds: int = 8
    neurons: int = 64
    predicted: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: (getattr(self, name) >= 1, "1 or more") for name in ("rank", "rounds", "neurons")}
        check_ranges(self, {**counts, "noise_images": (self.noise_images >= 2, "2 or more")})
