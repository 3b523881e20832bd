"""Settings of an analysis, and the types of what may be handed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import Tensor

from dvt.errors import ConfigError
from dvt.tokens import Tokens

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.store import FeatureStore

#: A function of the raw tokens, or another backbone of the same images.
DenoiserLike: TypeAlias = "Callable[[Tokens], Tokens] | Backbone"
Decompose = Callable[[Tensor], Mapping[str, Tensor]]
TermSource: TypeAlias = "FeatureStore | Decompose | None"


@dataclass(frozen=True)
class AnalyzeConfig:
    """Choose what an analysis computes.

    Args:
        images: size of the sample at most, evenly spread over the images given.
        layers: "all", or block indices with -1 for the final one, beside the backbone's own layer, which is always
            measured. All layers come from one forward pass.
        layer_images: images of the sample that other layers are measured on; their position share and shift
            stability come from half of the images below.
        share_images: images that the position share and the map of the artifact come from.
        windows: torus windows of each of them, an even number.
        shift_images: images that shift stability comes from, six windows each.
        mic_images: images that MIC is computed on (a quarter of them for other layers).
        mic_channels: channels that MIC scores for each axis, those with most information on fixed cuts; None all.
        draws: of the nulls of position R2, position share, grid peak and blank correlation, at least 2; the others
            have one an image.
        shown: images whose token maps are kept for pictures.
        batch: images per forward pass.
        seed: of windows, nulls and bootstraps.
    """

    images: int = 120
    layers: Literal["all"] | tuple[int, ...] = ()
    layer_images: int = 12
    share_images: int = 24
    windows: int = 16
    shift_images: int = 16
    mic_images: int = 8
    mic_channels: int | None = 4
    draws: int = 5
    shown: int = 12
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "layer_images", "share_images", "shift_images", "mic_images", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.windows < 2 or self.windows % 2 or self.draws < 2 or self.shown < 0:
            raise ConfigError(
                f"windows must be even, draws at least 2 and shown not negative, got {self.windows}, {self.draws} and "
                f"{self.shown}"
            )
        if self.mic_channels is not None and self.mic_channels < 1:
            raise ConfigError(f"mic_channels must be 1 or more, or None for all, got {self.mic_channels}")
        if isinstance(self.layers, str) and self.layers != "all":
            raise ConfigError(f"layers must be 'all' or block indices, got {self.layers!r}")
