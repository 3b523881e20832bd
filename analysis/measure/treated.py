"""Apply a denoiser, which is a function of tokens or a changed backbone."""

from __future__ import annotations

import torch
from torch import Tensor

from dvt.analysis.measure.types import DenoiserLike
from dvt.tokens import Tokens


def treated(denoise: DenoiserLike, images: Tensor, raw: Tokens) -> Tokens:
    """Denoise the raw tokens of images (B, 3, H, W), or compute new tokens if the denoiser is a backbone."""
    from dvt.backbones import Backbone  # imported late, because it loads timm

    if not isinstance(denoise, Backbone):
        return denoise(raw)
    with torch.no_grad():
        return denoise(images)
