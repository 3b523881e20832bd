"""Feature maps of a timm model, with or without a denoiser inside, as segmentation and detection heads take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from dvt.backbones import families
from dvt.denoiser.derived import stride_of, taken_blocks


class FeatureMaps(nn.Module):
    """Give a list of feature maps (B, C, h, w), like timm's ``features_only`` models.

    Args:
        model: a module made by :meth:`dvt.denoiser.Denoiser.attach`, or a timm model.
        indices: blocks, as ``forward_intermediates`` takes them.
        norm: whether the maps go through the final norm; what a denoiser at layer -1 denoises does.

    Attributes:
        feature_info: with ``channels()``, ``reduction()`` and ``module_name()``, one value a map.
    """

    def __init__(self, model: nn.Module, indices: int | Sequence[int] = (-1,), norm: bool = True) -> None:
        super().__init__()
        self.model, self.norm = model, norm
        inner = families.core(model)
        self.indices = taken_blocks(len(inner.blocks), indices)
        infos = [dict(families.core(model).feature_info[i]) for i in self.indices]
        for info in infos:
            info["num_chs"] = info.get("num_chs_norm", info["num_chs"]) if norm else info["num_chs"]
            info["reduction"] = stride_of(model)[0]
        self.feature_info = FeatureInfo(infos)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute maps (B, C, h, w) of images (B, 3, H, W), normalised as the timm model takes them."""
        take = cast(Any, self.model).forward_intermediates
        return take(images, indices=list(self.indices), norm=self.norm, intermediates_only=True)


class FeatureInfo(list):
    """Answer what segmentation and detection heads ask about the maps of a backbone, in timm's words."""

    def channels(self) -> list[int]:
        """List C, the channels of each map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """List the pixels between neighbouring cells of each map."""
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        """Name the block that each map is read after."""
        return [info["module"] for info in self]
