"""The remedies that there are, and the settings to find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dvt.errors import ConfigError

Remedy = Literal["registers", "defect", "noise", "insid3", "rasa"]
REMEDIES: tuple[Remedy, ...] = get_args(Remedy)
#: Those that look at noise images alone.
WITHOUT_IMAGES = ("noise", "insid3")


@dataclass(frozen=True)
class RemedyConfig:
    """Say how the remedies are found.

    Args:
        noise_images: images of noise, for noise and insid3.
        rank: directions that insid3 removes at most.
        rounds: of rasa at most, each of two directions.
        neurons: that registers take over at most.
        predicted: take the direction of the defect from the weights and only its limit from the images.
        seed: of the noise images.
    """

    noise_images: int = 16
    rank: int = 8
    rounds: int = 8
    neurons: int = 64
    predicted: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        low = {name: getattr(self, name) for name in ("rank", "rounds", "neurons") if getattr(self, name) < 1}
        if low or self.noise_images < 2:
            raise ConfigError(
                "rank, rounds and neurons must be at least 1 and noise_images at least 2, got "
                f"{low or self.noise_images}"
            )
