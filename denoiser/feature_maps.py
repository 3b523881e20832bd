"""Compute feature maps of a timm model, with or without a denoiser, in the form of segmentation and detection heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.backbones import families
from dvt.denoiser.derived import taken_blocks
from dvt.errors import BackboneError, ConfigError
from dvt.upsampling import upsample


class FeatureMaps(nn.Module):
    """Compute a list of feature maps (B, C, h, w), like timm's ``features_only`` models.

    Args:
        model: a module made by :meth:`dvt.denoiser.Denoiser.attach`, or a timm model.
        indices: blocks, as ``forward_intermediates`` takes them.
        norm: apply the final norm to the maps, as a denoiser at layer -1 needs.
        upsample: upsampling factor per side; the finer maps' edges follow those of the images (:func:`dvt.upsample`).

    Attributes:
        feature_info: a list with ``channels()``, ``reduction()`` and ``module_name()``, one value per map.
    """

    def __init__(
        self, model: nn.Module, indices: int | Sequence[int] = (-1,), norm: bool = True, upsample: int = 1
    ) -> None:
        super().__init__()
        if upsample < 1:
            raise ConfigError(f"upsample is {upsample}; it must be a whole number, 1 or more")
        self.model, self.norm = model, norm
        inner = families.core(model)
        self.indices = taken_blocks(len(inner.blocks), indices)
        infos = [dict(families.core(model).feature_info[i]) for i in self.indices]
        for info in infos:
            info["num_chs"] = info.get("num_chs_norm", info["num_chs"]) if norm else info["num_chs"]
            pixels = families.stride_of(model)[0]
            info["reduction"] = pixels / upsample if pixels % upsample else pixels // upsample
        self.feature_info, self.upsample = FeatureInfo(infos), upsample
        if upsample > 1:
            taken = getattr(model, "pretrained_cfg", None) or {}
            for name in ("mean", "std"):
                if name not in taken:
                    raise BackboneError(
                        f"{type(model).__name__} does not say how its images are normalised (pretrained_cfg), so they "
                        "cannot guide its maps; upsample them by dvt.upsample with the images in [0, 1]"
                    )
                self.register_buffer(name, torch.tensor(taken[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute maps (B, C, h, w) of images (B, 3, H, W), normalised as the timm model takes them."""
        take = cast(Any, self.model).forward_intermediates
        maps = take(images, indices=list(self.indices), norm=self.norm, intermediates_only=True)
        return maps if self.upsample == 1 else [self._finer(each, images) for each in maps]

    def _finer(self, maps: Tensor, images: Tensor) -> Tensor:
        pixels = (images * cast(Tensor, self.std) + cast(Tensor, self.mean)).clamp(0, 1)
        size, inner = (images.shape[2], images.shape[3]), families.core(self.model)
        centres = grids.patch_centres(size, families.patch_size(inner), families.stride_of(inner), maps.device)
        return upsample(maps.movedim(1, -1), pixels, self.upsample, centres=centres).movedim(-1, 1)


class FeatureInfo(list):
    """Describe the maps of a backbone for segmentation and detection heads, with the interface of timm's class."""

    def channels(self) -> list[int]:
        """List C, the channels of each map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """List the pixels between neighbouring cells of each map."""
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        """Name the block that each map is read after."""
        return [info["module"] for info in self]
