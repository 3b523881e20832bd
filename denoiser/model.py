"""The online denoiser: one transformer block with a position embedding, or one of the simpler kinds."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar, overload

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dvt.backbones import Backbone, weights_sha256
from dvt.denoiser.attach import attach
from dvt.denoiser.bodies import BODIES
from dvt.denoiser.config import INSIDE, DenoiserConfig
from dvt.denoiser.sharing import PretrainedDenoiser
from dvt.errors import ShapeError

__all__ = ["Blocks", "Denoiser", "DenoiserConfig"]

M = TypeVar("M", bound=nn.Module)

LAYER_NORM_EPS = 1e-6
INITIAL_STD = 0.02


class Denoiser(PretrainedDenoiser):
    """Remove artifacts from token maps, in one forward pass.

    The kind "block" is stage 2 of Denoising Vision Transformers (arXiv 2401.02957); the others are its baselines.
    :class:`~dvt.denoiser.sharing.PretrainedDenoiser` saves, loads and publishes it.

    Args:
        config: its architecture.
        generator: draws the initial weights; None is torch's global generator.

    Attributes:
        config: as given.
        card: the denoiser's origin, saved with it: backbone, layer, stride, weights_sha256, feature_dim, data, metrics.

    >>> denoiser = Denoiser(DenoiserConfig("block", 64, grid=(14, 14)))
    >>> denoiser(torch.rand(2, 9, 12, 64)).shape
    torch.Size([2, 9, 12, 64])
    """

    def __init__(self, config: DenoiserConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        # Built without values, so that only `reset` draws numbers, and from the generator given.
        body: Any = self._plan(config)["body"]
        self.body = body
        self.to_empty(device="cpu")
        with torch.no_grad():
            body.reset(generator)

    @staticmethod
    def _plan(config: DenoiserConfig) -> nn.ModuleDict:
        with torch.device("meta"):
            return nn.ModuleDict({"body": ({"block": Blocks} | BODIES)[config.kind](config)})

    @property
    def identity(self) -> dict[str, Any]:
        """All that the output depends on, as plain JSON values: hash of the weights, settings and strength."""
        return {"weights_sha256": weights_sha256(self), **asdict(replace(self.config, strength=self.strength))}

    def forward(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Denoise patch tokens: compute raw + strength (denoised - raw).

        Args:
            patches: (B, h, w, C) raw tokens of any grid and floating point dtype.
            prefix: (B, P, C) class and register tokens. Only a denoiser with `use_prefix` reads them: its block
                attends to them. No denoiser changes them.

        Returns:
            (B, h, w, C) in the dtype of `patches`.

        Raises:
            ShapeError: the tokens have another feature size, or the prefix is missing.
        """
        if patches.ndim != 4 or patches.shape[-1] != self.feature_dim:
            raise ShapeError(
                f"patches have shape {tuple(patches.shape)}; this denoiser takes (B, h, w, {self.feature_dim}), "
                "the patch tokens of the backbone that it was made for"
            )
        if self.strength == 0:
            return patches
        if self.config.kind in INSIDE:
            return self.body(patches)  # raises an error that says how to install it
        dtype = next(t.dtype for t in (*self.parameters(), *self.buffers()))
        denoised = self.body(patches.to(dtype), self._prefix(patches, prefix)).to(patches.dtype)
        return denoised if self.strength == 1 else patches + self.strength * (denoised - patches)

    @overload
    def attach(self, model: Backbone, layer: int = -1, force: bool = False) -> nn.Module: ...

    @overload
    def attach(self, model: M, layer: int = -1, force: bool = False) -> M: ...

    def attach(self, model: nn.Module, layer: int = -1, force: bool = False) -> nn.Module:
        """Put this denoiser inside a timm model or a backbone's model; see :func:`dvt.denoiser.attach.attach`."""
        return attach(self, model, layer, force)

    def _prefix(self, patches: Tensor, prefix: Tensor | None) -> Tensor | None:
        if not self.config.use_prefix:
            return None
        batch = patches.shape[0]
        if prefix is None or prefix.ndim != 3 or (prefix.shape[0], prefix.shape[2]) != (batch, self.feature_dim):
            raise ShapeError(
                f"this denoiser attends to prefix tokens: they must be ({batch}, P, {self.feature_dim}) "
                f"beside these patches, got {None if prefix is None else tuple(prefix.shape)}"
            )
        return prefix


class Blocks(nn.Module):
    """Run transformer blocks, with a learned position embedding at their input (Denoising ViT, stage 2).

    For a grid other than `config.grid`, the embedding is resampled (bicubic, as timm does for its models).
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.grid = config.grid
        channels, tokens = config.feature_dim, config.grid[0] * config.grid[1]
        norm: Any = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, channels)) if config.position else None
        self.blocks = nn.ModuleList(
            Block(channels, config.heads, config.mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(config.depth)
        )

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw small random matrices, so that the blocks add little to their input at first."""
        for name, value in self.named_parameters():
            if value.ndim > 1:
                nn.init.trunc_normal_(value, std=INITIAL_STD, generator=generator)
            else:
                nn.init.constant_(value, float("norm" in name and name.endswith("weight")))

    def forward(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        batch, height, width, channels = patches.shape
        x = patches.reshape(batch, height * width, channels)
        if self.pos_embed is not None:
            x = x + resample_abs_pos_embed(self.pos_embed, [height, width], list(self.grid), num_prefix_tokens=0)
        if prefix is not None:
            x = torch.cat((prefix.to(x.dtype), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, x.shape[1] - height * width :].reshape(batch, height, width, channels)
