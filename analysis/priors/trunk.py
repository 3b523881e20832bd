"""Build the transformer of the priors: blocks modulated by the noise level, the trunk, the embedder of conditions."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn import functional

from dvt import grids
from dvt.analysis.priors.config import PriorConfig
from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size


def fourier(values: Tensor, width: int) -> Tensor:
    """Embed (..., n) values of about unit range as (..., width) sines and cosines, in frequencies from 1 to 128."""
    frequencies = torch.logspace(0, 7, width // (2 * values.shape[-1]), base=2, device=values.device)
    angles = (values[..., None] * frequencies).flatten(-2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def places(grid: Size, width: int, device: torch.device) -> Tensor:
    """Embed the cells' centres: (h w, width); cells of two grids at one place of a picture get equal embeddings."""
    return fourier(grids.grid_centres(grid, device).flatten(0, 1), width)


Memory = dict[nn.Module, tuple[Tensor, Tensor]]
"""For each block, keys and values (B, heads, n, W / heads) of the n tokens that it has processed."""


class Block(nn.Module):
    """Apply self-attention, cross-attention and an MLP, each shifted, scaled and gated by the time (adaLN-zero).

    The gates start at zero, so an untrained block returns its input.

    Source:
        Peebles and Xie, DiT, 2023, section 3.2; the cross-attention as in Lumos, 2024.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads, qkv_bias=True)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = Mlp(width, 4 * width)
        self.modulation = nn.Linear(width, 9 * width)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None, memory: Memory | None = None
    ) -> Tensor:
        ways = (
            partial(self.attention, attn_mask=mask) if memory is None else partial(self._remember, memory),
            None if context is None else lambda x: self.cross(x, context, context, need_weights=False)[0],
            self.mlp,
        )
        signals = self.modulation(functional.silu(time))[:, None].chunk(9, dim=-1)
        for way, shift, scale, gate in zip(ways, signals[:3], signals[3:6], signals[6:], strict=True):
            if way is not None:
                x = x + gate * way(self.norm(x) * (1 + scale) + shift)
        return x

    def _remember(self, memory: Memory, x: Tensor) -> Tensor:
        """Let one new token (B, 1, W) attend to all earlier tokens and to itself, and remember it."""
        attention = self.attention
        qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        before = memory.get(self)
        if before is not None:
            key, value = torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)
        memory[self] = (key, value)
        answer = functional.scaled_dot_product_attention(query, key, value)
        return attention.proj(answer.transpose(1, 2).flatten(2))


class Trunk(nn.Module):
    """Transform embedded tokens (B, L, W) -> (B, L, W), for both heads.

    Args:
        config: the prior's architecture.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.grid, self.causal = config.grid, config.head == "token" and config.order == "raster"
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None, memory: Memory | None = None, start: int = 0
    ) -> Tensor:
        """Run all blocks; time is (B, W), context (B, M, W) or None.

        Args:
            memory: keys and values of earlier tokens, if x is the one token (B, 1, W) that follows them; None if x
                holds all tokens.
            start: index of the first token of x.
        """
        _, length, width = x.shape
        x = x + places(self.grid, width, x.device).to(x)[start : start + length]
        mask = None
        if self.causal and memory is None:
            mask = x.new_full((length, length), -torch.inf).triu(1)
        for block in self.blocks:
            x = block(x, time, context, mask, memory)
        return self.norm(x)


class ConditionEmbedder(nn.Module):
    """Embed condition tokens (B, M, C), L2-normalised, by an MLP of two layers as (B, M, W).

    Source:
        Lumos, 2024, section 3; here the norm is scaled to sqrt(C), so that channels have unit size, and the learned
        centring is ours.
    """

    def __init__(self, dim: int, width: int, grid: Size | None, centred: bool = False) -> None:
        super().__init__()
        self.dim, self.grid = dim, grid
        self.centre = nn.Parameter(torch.empty(grid[0] * grid[1], dim)) if centred and grid else None
        self.mlp = Mlp(dim, width, width)
        self.null = nn.Parameter(torch.empty(1, 1, width))

    def forward(self, condition: Tensor) -> Tensor:
        if condition.ndim != 3 or condition.shape[-1] != self.dim:
            raise ShapeError(f"conditions must be (B, M, {self.dim}), got {tuple(condition.shape)}")
        cells = 0 if self.grid is None else self.grid[0] * self.grid[1]
        if cells > condition.shape[1]:
            raise ShapeError(f"there are {condition.shape[1]} condition tokens, fewer than the grid {self.grid} has")
        condition = condition.float()
        if self.centre is not None:
            condition = condition - functional.pad(self.centre, (0, 0, condition.shape[1] - cells, 0))
        x = self.mlp(functional.normalize(condition, dim=-1) * self.dim**0.5)
        if self.grid is None:
            return x
        where = places(self.grid, x.shape[-1], x.device).to(x)
        return x + functional.pad(where, (0, 0, x.shape[1] - len(where), 0))


@torch.no_grad()
def reset_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw initial weights: zero for gates and outputs, Glorot for matrices (as in DiT), small placeholder tokens."""
    for name, value in module.named_parameters():
        if name.endswith(("hole", "null")):
            nn.init.normal_(value, std=0.02, generator=generator)
        elif value.ndim == 1 or "modulation" in name or "leave" in name or name.endswith("centre"):
            nn.init.zeros_(value)
        else:
            nn.init.xavier_uniform_(value, generator=generator)
    for codebook in module.buffers():
        codebook.zero_()  # a codebook that is not set yet


def drop(condition: Tensor, null: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a random share of conditions (B, ...) by ``null``, for classifier-free guidance.

    Args:
        condition: (B, ...).
        null: the replacement, learned or zero, broadcastable to one condition.
        share: probability of replacement in [0, 1]; Lumos takes .1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of dropped conditions must lie in [0, 1], got {share}")
    dropped = torch.rand(len(condition), generator=generator, device=generator.device) < share
    return torch.where(dropped.to(condition.device).view(-1, *[1] * (condition.ndim - 1)), null, condition)
