"""One transformer trunk with two heads: a whole-image diffusion prior (Lumos) and a token by token one (MAR, Fluid).

Both generate standardised maps of target tokens (B, h, w, D): patches of pixels or of latents, or features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn import functional

from dvt import grids
from dvt.analysis.priors.condition import drop
from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.diffusion import (
    Preconditioned,
    Sampled,
    X0Model,
    denoising_loss,
    draw_sigmas,
    guided,
    heun,
    karras_sigmas,
)
from dvt.analysis.priors.masking import draw_mask_ratios, unmasking
from dvt.backbones.weights import State, check_state, load_state, save_state
from dvt.errors import ConfigError, ShapeError, WeightsError
from dvt.grids import Size

SCHEMA = "dvt-prior/1"
_KEY = "dvt"
_CENTRE = math.log(2) - 1.2  # EDM's ln(sigma) = -1.2 is for data of standard deviation 1/2; ours is 1
_BLOCKS_OF_HEAD = 3


class Sampler(Protocol):
    """:func:`~dvt.analysis.priors.diffusion.heun`, ``ddim``, or ``restart`` with its intervals bound."""

    def __call__(
        self, x0_model: X0Model, x_init: Tensor, sigmas: Tensor, condition: Any, generator: torch.Generator
    ) -> Sampled: ...


def sampling_sigmas(steps: int = 18) -> Tensor:
    """(steps + 1,) noise levels for data of standard deviation 1."""
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    return karras_sigmas(steps, low=0.004)


# --- parts


def fourier(values: Tensor, width: int) -> Tensor:
    """(..., width) sines and cosines of (..., n) values of about unit range, in frequencies from 1 to 128."""
    frequencies = torch.logspace(0, 7, width // (2 * values.shape[-1]), base=2, device=values.device)
    angles = (values[..., None] * frequencies).flatten(-2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def places(grid: Size, width: int, device: torch.device) -> Tensor:
    """(h w, width) embeddings of the cells' centres; two grids of one picture agree where they lie over each other."""
    return fourier(grids.grid_centres(grid, device).flatten(0, 1), width)


class Block(nn.Module):
    """Self-attention, cross-attention to the condition, MLP; each shifted, scaled and gated by the time (adaLN-zero).

    The gates start at zero, so an untrained block hands its input on.

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

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        ways = (
            partial(self.attention, attn_mask=mask),
            None if context is None else lambda x: self.cross(x, context, context, need_weights=False)[0],
            self.mlp,
        )
        signals = self.modulation(functional.silu(time))[:, None].chunk(9, dim=-1)
        for way, shift, scale, gate in zip(ways, signals[:3], signals[3:6], signals[6:], strict=True):
            if way is not None:
                x = x + gate * way(self.norm(x) * (1 + scale) + shift)
        return x


class Trunk(nn.Module):
    """The transformer of both heads: embedded tokens (B, L, W) -> (B, L, W).

    Args:
        config: of the prior.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.grid, self.causal = config.grid, config.head == "token" and config.order == "raster"
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """time is (B, W); context (B, M, W) or None."""
        _, length, width = x.shape
        x = x + places(self.grid, width, x.device).to(x)
        mask = None
        if self.causal:
            mask = x.new_full((length, length), -torch.inf).triu(1)
        for block in self.blocks:
            x = block(x, time, context, mask)
        return self.norm(x)


class ConditionEmbedder(nn.Module):
    """Condition tokens (B, M, C), L2-normalised, through an MLP of two layers to (B, M, W).

    Source:
        Lumos, 2024, section 3; the length after normalising is sqrt(C), so that channels have unit size.
    """

    def __init__(self, dim: int, width: int, grid: Size | None) -> None:
        super().__init__()
        self.dim, self.grid = dim, grid
        self.mlp = Mlp(dim, width, width)
        self.null = nn.Parameter(torch.empty(1, 1, width))

    def forward(self, condition: Tensor) -> Tensor:
        if condition.ndim != 3 or condition.shape[-1] != self.dim:
            raise ShapeError(f"conditions must be (B, M, {self.dim}), got {tuple(condition.shape)}")
        x = self.mlp(functional.normalize(condition.float(), dim=-1) * self.dim**0.5)
        if self.grid is None:
            return x
        where = places(self.grid, x.shape[-1], x.device).to(x)
        if len(where) > x.shape[1]:
            raise ShapeError(f"there are {x.shape[1]} condition tokens, fewer than the grid {self.grid} has")
        return x + functional.pad(where, (0, 0, x.shape[1] - len(where), 0))


# --- the head for whole images


class ImageHead(nn.Module):
    """The trunk as a diffusion model of all target tokens together."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.shape = (*config.grid, config.token_dim)
        self.enter = nn.Linear(config.token_dim, config.width)
        self.time = Mlp(config.width, config.width, config.width, act_layer=nn.SiLU)
        self.trunk = Trunk(config)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.leave = nn.Linear(config.width, config.token_dim)

    def forward(self, x: Tensor, label: Tensor, context: Tensor | None) -> Tensor:
        """The network inside :class:`Preconditioned`: x (B, h, w, D), label (B,), context (B, M, W)."""
        width = self.enter.out_features
        time = self.time(fourier(label[:, None], width))
        answer = self.trunk(self.enter(x.flatten(1, 2)), time, context)
        shift, scale = self.modulation(functional.silu(time))[:, None].chunk(2, dim=-1)
        return self.leave(answer * (1 + scale) + shift).view_as(x)

    def loss(self, clean: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """A mean over dimensions and images."""
        sigma = draw_sigmas(len(clean), generator, mean=_CENTRE)
        return denoising_loss(Preconditioned(self), clean, sigma, _normal(clean.shape, generator), context).mean()

    def sample(
        self,
        count: int,
        context: Tensor | None,
        null: Tensor | None,
        generator: torch.Generator,
        sampler: Sampler,
        sigmas: Tensor,
        scale: float,
        steps: int,
    ) -> Sampled:
        start = float(sigmas[0]) * _normal((count, *self.shape), generator)
        return sampler(guided(Preconditioned(self), scale, null), start, sigmas, context, generator)


# --- the head for single tokens


class DenoisingMLP(nn.Module):
    """One token's diffusion network: residual MLPs shifted, scaled and gated by time and z; it answers 0 at first.

    Args:
        token_dim: D.
        width: channels of z and of the network.

    Source:
        MAR, 2024, section 4.2 and appendix.
    """

    def __init__(self, token_dim: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(token_dim, width)
        self.time = Mlp(width, width, width, act_layer=nn.SiLU)
        self.given = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.blocks = nn.ModuleList(Mlp(width, width, act_layer=nn.SiLU) for _ in range(_BLOCKS_OF_HEAD))
        self.modulation = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(_BLOCKS_OF_HEAD))
        self.leave = nn.Linear(width, token_dim)

    def forward(self, x: Tensor, label: Tensor, z: Tensor) -> Tensor:
        """The network inside :class:`Preconditioned`: x (N, D), label (N,), z (N, W)."""
        signal = functional.silu(self.time(fourier(label[:, None], z.shape[-1])) + self.given(z))
        x = self.enter(x)
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            shift, scale, gate = modulation(signal).chunk(3, dim=-1)
            x = x + gate * block(self.norm(x) * (1 + scale) + shift)
        return self.leave(self.norm(x))


class TokenHead(nn.Module):
    """The trunk reads the tokens that are known and answers z; a small MLP denoises each token given its z."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.shape, self.raster, self.levels = (*config.grid, config.token_dim), config.order == "raster", config.levels
        self.enter = nn.Linear(config.token_dim, config.width)
        self.hole = nn.Parameter(torch.empty(config.width))
        self.trunk = Trunk(config)
        self.mlp = DenoisingMLP(config.token_dim, config.width)

    def z(self, tokens: Tensor, hidden: Tensor, context: Tensor | None) -> Tensor:
        """(B, L, W) answers of the trunk.

        Args:
            tokens: (B, L, D).
            hidden: (B, L) booleans, the tokens that the trunk must not see; in raster order z_i sees those before i.
            context: (B, M, W) or None.
        """
        x = self.enter(tokens)
        if self.raster:
            x = torch.cat((self.hole.to(x).expand(len(x), 1, -1), x[:, :-1]), dim=1)
        else:
            x = torch.where(hidden[..., None], self.hole.to(x), x)
        return self.trunk(x, x.new_zeros(len(x), x.shape[-1]), context)

    def loss(self, clean: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """A mean over dimensions, noise levels and the hidden tokens of all images (in raster order, all tokens)."""
        tokens = clean.flatten(1, 2)
        hidden = self.draw_hidden(len(tokens), generator).to(tokens.device)
        z, target = (x[hidden].repeat(self.levels, 1) for x in (self.z(tokens, hidden, context), tokens))
        sigma = draw_sigmas(len(target), generator, mean=_CENTRE)
        return denoising_loss(Preconditioned(self.mlp), target, sigma, _normal(target.shape, generator), z).mean()

    def draw_hidden(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, L) booleans: which tokens a training step hides."""
        length = self.shape[0] * self.shape[1]
        if self.raster:
            return torch.ones(count, length, dtype=torch.bool, device=generator.device)
        hide = (draw_mask_ratios(count, generator) * length).ceil()
        return self._orders(count, generator).argsort(1) < hide[:, None]

    def _orders(self, count: int, generator: torch.Generator) -> Tensor:
        length = self.shape[0] * self.shape[1]
        if self.raster:
            return torch.arange(length, device=generator.device).expand(count, length)
        return torch.rand(count, length, generator=generator, device=generator.device).argsort(1)

    def sample(
        self,
        count: int,
        context: Tensor | None,
        null: Tensor | None,
        generator: torch.Generator,
        sampler: Sampler,
        sigmas: Tensor,
        scale: float,
        steps: int,
    ) -> Sampled:
        height, width, channels = self.shape
        orders = self._orders(count, generator)
        tokens = torch.zeros(count, height * width, channels, device=generator.device)
        hidden = torch.ones_like(orders, dtype=torch.bool)
        filled, calls = 0, 0
        for number in [1] * (height * width) if self.raster else unmasking(height * width, steps):
            now = orders[:, filled : filled + number]
            z = _picked(self.z(tokens, hidden, context), now).flatten(0, 1)
            without = z if scale == 1 else _picked(self.z(tokens, hidden, null), now).flatten(0, 1)
            start = float(sigmas[0]) * _normal((len(z), channels), generator)
            fresh, more = sampler(guided(Preconditioned(self.mlp), scale, without), start, sigmas, z, generator)
            tokens.scatter_(1, _wide(now, channels), fresh.view(count, number, channels))
            hidden.scatter_(1, now, False)
            filled, calls = filled + number, calls + more
        return tokens.view(count, height, width, channels), calls


# --- the prior


class Prior(nn.Module):
    """A generative prior over maps of target tokens (B, h, w, D) that have mean 0 and standard deviation 1.

    Args:
        config: what it is made of.
        generator: of the initial weights, on the CPU.

    Attributes:
        config: as given; :meth:`swap_condition` changes it.
        card: where it comes from, plain JSON values; saved with it.

    >>> prior = Prior(PriorConfig((4, 4), 3, condition_dim=8, width=32, depth=1), torch.Generator().manual_seed(0))
    >>> maps, calls = prior.sample(torch.rand(2, 5, 8), torch.Generator().manual_seed(1))
    >>> maps.shape, calls
    (torch.Size([2, 4, 4, 3]), 35)
    """

    def __init__(self, config: PriorConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.card = config, dict[str, Any]()
        # Built without values, so that only _reset draws numbers, and from the generator given.
        self.head = _planned_head(config).to_empty(device="cpu")
        _reset(self.head, generator)
        self.embed = _embedder(config, generator)

    def loss(self, clean: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """The training loss, a mean over dimensions that starts near 1.

        Args:
            clean: (B, h, w, D) standardised target tokens.
            condition: (B, M, C); None only where the prior has no condition.
            generator: draws noise, masks and dropped conditions; on the device of the prior.
        """
        context = self.context(condition)
        if self.embed is not None and context is not None and self.training:
            context = drop(context, self.embed.null.to(context), self.config.drop, generator)
        return self.head.loss(clean, context, generator)

    def context(self, condition: Tensor | None) -> Tensor | None:
        """(B, M, W) embedded condition tokens."""
        if (condition is None) != (self.embed is None):
            raise ConfigError(
                f"this prior has {'no' if self.embed is None else 'a'} condition, and was given "
                f"{'none' if condition is None else 'one'}"
            )
        return None if self.embed is None else self.embed(condition)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | None,
        generator: torch.Generator,
        count: int | None = None,
        sampler: Sampler = heun,
        sigmas: Tensor | None = None,
        guidance: float = 1.0,
        steps: int = 16,
    ) -> Sampled:
        """New maps of target tokens.

        Args:
            condition: (B, M, C), one map each; None for a prior without a condition.
            generator: draws everything; on the device of the prior.
            count: B where there is no condition.
            sampler: of :mod:`dvt.analysis.priors.diffusion`.
            sigmas: its noise levels; None for 18 steps of :func:`sampling_sigmas`.
            guidance: 1 for none; larger values follow the condition more closely and vary less.
            steps: how often a token head in random order asks its trunk; in raster order that is once a token.

        Returns:
            (B, h, w, D), and the number of calls of the denoising network.
        """
        context = self.context(condition)
        null = None
        if self.embed is not None and context is not None:
            null, count = self.embed.null.expand_as(context), len(context)
        if count is None or count < 1 or steps < 1:
            raise ConfigError(f"sampling needs a condition or a count, and a step, got count {count}, steps {steps}")
        if guidance != 1 and context is None:
            raise ConfigError("guidance needs a prior with a condition; leave it at 1")
        sigmas = sampling_sigmas() if sigmas is None else sigmas
        return self.head.sample(count, context, null, generator, sampler, sigmas, guidance, steps)

    def swap_condition(self, dim: int, generator: torch.Generator) -> None:
        """A fresh embedder for conditions (B, M, dim), such as labels (one-hot) or texts; all else stays as trained.

        Source:
            Lumos, 2024: the second stage, fine-tuned on a tenth of the pairs.
        """
        device = next(self.parameters()).device
        self.config = replace(self.config, condition_dim=dim, condition_grid=None)
        fresh = _embedder(self.config, generator)
        assert fresh is not None  # dim is a number
        self.embed = fresh.to(device)

    def save(self, path: str | Path) -> None:
        """Write weights, config and card to one .safetensors file, whole or not at all."""
        metadata = {_KEY: json.dumps({"schema": SCHEMA, "config": asdict(self.config), "card": self.card})}
        save_state(Path(path), self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Prior:
        """A prior that :meth:`save` wrote, in evaluation mode.

        Raises:
            WeightsError: the file is missing, damaged or something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        except Exception as error:  # of the header's JSON, of types that torch lacks, ...
            raise WeightsError(f"cannot read a prior from {str(path)!r}: {error}") from error
        about = about if isinstance(about, dict) else {}
        settings, card = about.get("config"), about.get("card")
        known = {field.name for field in fields(PriorConfig)}
        if about.get("schema") != SCHEMA or not isinstance(settings, dict) or not set(settings) <= known:
            raise WeightsError(f"{str(path)!r} holds no prior of {SCHEMA}; train one with this version")
        if not isinstance(card, dict):
            raise WeightsError(f"{str(path)!r} does not tell where its prior comes from; train one with this version")
        prior = cls(_checked(settings, state, str(path)), torch.Generator().manual_seed(0))
        load_state(prior, state, str(path))
        prior.card = card
        return prior.eval()


def _checked(settings: Mapping[str, Any], state: State, source: str) -> PriorConfig:
    """The config of a file, which the file's tensors fit: nothing larger than the file is built."""
    try:
        config = PriorConfig(**settings)
        if max(config.depth, config.width, config.heads) > sum(value.nbytes for value in state.values()):
            raise ConfigError("the file is too small for it")  # even the plan could take for ever
        planned = nn.ModuleDict({"head": _planned_head(config)})
        if (embedder := _planned_embedder(config)) is not None:
            planned["embed"] = embedder
        check_state(planned, state, source)
    except WeightsError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise WeightsError(f"{source} describes a prior that cannot be made: {error}; train one again") from error
    return config


def _planned_head(config: PriorConfig) -> Any:
    """The trunk and its head on the device "meta"."""
    with torch.device("meta"):
        return ImageHead(config) if config.head == "image" else TokenHead(config)


def _planned_embedder(config: PriorConfig) -> ConditionEmbedder | None:
    if config.condition_dim is None:
        return None
    with torch.device("meta"):
        return ConditionEmbedder(config.condition_dim, config.width, config.condition_grid)


def _embedder(config: PriorConfig, generator: torch.Generator) -> ConditionEmbedder | None:
    if (embedder := _planned_embedder(config)) is None:
        return None
    embedder.to_empty(device="cpu")
    _reset(embedder, generator)
    return embedder


@torch.no_grad()
def _reset(module: nn.Module, generator: torch.Generator) -> None:
    """Gates and outputs zero; matrices Glorot, as in DiT; tokens that stand for nothing small."""
    for name, value in module.named_parameters():
        if name.endswith(("hole", "null")):
            nn.init.normal_(value, std=0.02, generator=generator)
        elif value.ndim == 1 or "modulation" in name or "leave" in name:
            nn.init.zeros_(value)
        else:
            nn.init.xavier_uniform_(value, generator=generator)


def _wide(index: Tensor, channels: int) -> Tensor:
    return index[..., None].expand(-1, -1, channels)


def _picked(values: Tensor, index: Tensor) -> Tensor:
    """(B, n, W) of (B, L, W) at (B, n)."""
    return values.gather(1, _wide(index, values.shape[-1]))


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
