"""Apply a denoiser, whether it is a function of tokens or another backbone."""

from __future__ import annotations

import torch
from torch import Tensor

from dvt.analysis.measure.types import DenoiserLike
from dvt.tokens import Tokens


def treated(denoise: DenoiserLike, images: Tensor, raw: Tokens) -> Tokens:
    """Denoise the raw tokens of images (B, 3, H, W), or compute them anew where the denoiser is a backbone."""
    from dvt.backbones import Backbone  # with timm, which nothing else here needs

    if not isinstance(denoise, Backbone):
        return denoise(raw)
    with torch.no_grad():
        return denoise(images)
