"""Generate with one of two heads: the whole image at once (Lumos), or token after token (MAR, Fluid)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional

from dvt.analysis.priors.codebook import Codebook
from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.diffusion import (
    Preconditioned,
    Sampled,
    X0Model,
    denoising_loss,
    draw_sigmas,
    guided,
)
from dvt.analysis.priors.masking import draw_mask_ratios, unmasking
from dvt.analysis.priors.trunk import Memory, Trunk, fourier

_CENTRE = math.log(2) - 1.2  # EDM's ln(sigma) = -1.2 is for data of standard deviation 1/2; ours is 1
_BLOCKS_OF_HEAD = 3


class Sampler(Protocol):
    """Sample as :func:`~dvt.analysis.priors.diffusion.heun` or ``ddim``, or ``restart`` with its intervals bound."""

    def __call__(
        self, x0_model: X0Model, x_init: Tensor, sigmas: Tensor, condition: Any, generator: torch.Generator
    ) -> Sampled: ...


@dataclass(frozen=True)
class SampleRequest:
    """Hold the settings and inputs of sampling; all tensors lie on the generator's device.

    Args:
        count: B, maps to draw.
        context: (B, M, W) embedded conditions, None for none.
        null: (B, M, W) embedding of no condition, for guidance.
        generator: draws all random numbers.
        sampler: a sampler of :mod:`dvt.analysis.priors.diffusion`.
        sigmas: noise levels of the sampler.
        scale: guidance scale; 1 for no guidance.
        steps: number of calls of the trunk by a token head in random order.
        temperature: the starting noise is scaled by it, and logits of codes are divided by it.
        rising: whether the guidance rises evenly from 1 to its scale: along the logarithm of the noise level, or, with
            a token head, along the share of tokens that are known (MAR).
    """

    count: int
    context: Tensor | None
    null: Tensor | None
    generator: torch.Generator
    sampler: Sampler
    sigmas: Tensor
    scale: float
    steps: int
    temperature: float = 1.0
    rising: bool = False

    def denoise(self, model: X0Model, shape: tuple[int, ...], condition: Tensor | None) -> Sampled:
        """Draw noise of a shape at the first level and denoise it with a model."""
        start = float(self.sigmas[0]) * self.temperature * _normal(shape, self.generator)
        return self.sampler(model, start, self.sigmas, condition, self.generator)

    def scale_at(self, done: float) -> float:
        """Compute the guidance scale when a share of the work is done."""
        return 1 + (self.scale - 1) * done if self.rising else self.scale

    def scale_of_noise(self) -> float | Callable[[float], float]:
        """Compute the guidance scale by noise level: 1 at the first level, the full scale at the last nonzero one."""
        if not self.rising or self.scale == 1:
            return self.scale
        levels = self.sigmas[self.sigmas > 0].double().log()
        high, low = float(levels[0]), float(levels[-1])
        return lambda sigma: self.scale_at(min(max((high - math.log(sigma)) / max(high - low, 1e-9), 0.0), 1.0))


class ImageHead(nn.Module):
    """Use the trunk as a diffusion model of all target tokens together."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.shape = (*config.grid, config.token_dim)
        self.enter = nn.Linear(config.token_dim, config.width)
        self.time = Mlp(config.width, config.width, config.width, act_layer=nn.SiLU)
        self.trunk = Trunk(config)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.leave = nn.Linear(config.width, config.token_dim)

    def forward(self, x: Tensor, label: Tensor, context: Tensor | None) -> Tensor:
        """Run the network inside :class:`Preconditioned`: x (B, h, w, D), label (B,), context (B, M, W)."""
        width = self.enter.out_features
        time = self.time(fourier(label[:, None], width))
        answer = self.trunk(self.enter(x.flatten(1, 2)), time, context)
        shift, scale = self.modulation(functional.silu(time))[:, None].chunk(2, dim=-1)
        return self.leave(answer * (1 + scale) + shift).view_as(x)

    def loss(self, clean: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Compute the training loss, a mean over dimensions and images."""
        sigma = draw_sigmas(len(clean), generator, mean=_CENTRE)
        return denoising_loss(Preconditioned(self), clean, sigma, _normal(clean.shape, generator), context).mean()

    def sample(self, request: SampleRequest) -> Sampled:
        """Draw all tokens of each map together: (B, h, w, D), and the number of calls of this network."""
        model = guided(Preconditioned(self), request.scale_of_noise(), request.null)
        return request.denoise(model, (request.count, *self.shape), request.context)


# --- the head for single tokens


class DenoisingMLP(nn.Module):
    """Denoise one token: residual MLPs shifted, scaled and gated by time and z; untrained, the output is 0.

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
        """Run the network inside :class:`Preconditioned`: x (N, D), label (N,), z (N, W)."""
        signal = functional.silu(self.time(fourier(label[:, None], z.shape[-1])) + self.given(z))
        x = self.enter(x)
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            shift, scale, gate = modulation(signal).chunk(3, dim=-1)
            x = x + gate * block(self.norm(x) * (1 + scale) + shift)
        return self.leave(self.norm(x))


class TokenHead(nn.Module):
    """Read the known tokens with the trunk, whose outputs are z; each token is drawn by itself given its z.

    Continuous tokens are denoised by a small MLP (MAR); of a codebook, logits of z choose the entry (Fluid's discrete
    tokens). Outside, both are maps of tokens.

    Attributes:
        centres: (K, D) the codebook, in the scale of the maps; set it before training.
    """

    centres: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.shape, self.raster, self.levels = (*config.grid, config.token_dim), config.order == "raster", config.levels
        self.codes = config.codes
        self.enter = nn.Linear(config.token_dim, config.width)
        self.hole = nn.Parameter(torch.empty(config.width))
        self.trunk = Trunk(config)
        if self.codes:
            self.register_buffer("centres", torch.zeros(config.codes, config.token_dim))
            self.leave = nn.Linear(config.width, config.codes)
        else:
            self.mlp = DenoisingMLP(config.token_dim, config.width)

    def z(self, tokens: Tensor, hidden: Tensor, context: Tensor | None) -> Tensor:
        """Compute the trunk's outputs z (B, L, W).

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

    def logits(self, z: Tensor) -> Tensor:
        """Compute the logits (..., K) of the codebook's entries."""
        return self.leave(z)

    def ids(self, tokens: Tensor) -> Tensor:
        """Find the codebook's nearest entry (...) to each of (..., D) tokens."""
        return Codebook(self.centres).encode(tokens)

    def loss(self, clean: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Average the loss over dimensions, noise levels and hidden tokens of all images (in raster order, all).

        For codes, the loss is the cross-entropy over log K, so that an untrained head scores 1 as well.
        """
        tokens = clean.flatten(1, 2)
        hidden = self.draw_hidden(len(tokens), generator).to(tokens.device)
        if self.codes:
            ids = self.ids(tokens)
            logits = self.logits(self.z(self.centres[ids], hidden, context)[hidden])
            return functional.cross_entropy(logits, ids[hidden]) / math.log(self.codes)
        z, target = (x[hidden].repeat(self.levels, 1) for x in (self.z(tokens, hidden, context), tokens))
        sigma = draw_sigmas(len(target), generator, mean=_CENTRE)
        return denoising_loss(Preconditioned(self.mlp), target, sigma, _normal(target.shape, generator), z).mean()

    def draw_hidden(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw which tokens a training step hides: (count, L) booleans."""
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

    def sample(self, request: SampleRequest) -> Sampled:
        """Draw some tokens at a time, given those before: (B, h, w, D), and the number of calls of the small MLP.

        For codes, it is the number of calls of the trunk. In raster order, keys and values of earlier tokens are kept.
        """
        height, width, channels = self.shape
        count, length = request.count, height * width
        orders = self._orders(count, request.generator)
        tokens = torch.zeros(count, length, channels, device=request.generator.device)
        hidden = torch.ones_like(orders, dtype=torch.bool)
        filled, calls = 0, 0
        memories: tuple[Memory, Memory] = ({}, {})
        for number in [1] * length if self.raster else unmasking(length, request.steps):
            now, scale = orders[:, filled : filled + number], request.scale_at(filled / length)
            z = self._asked(tokens, hidden, now, request.context, memories[0])
            # Kept up to date at scale 1, too, where the guidance rises from there.
            unguided = request.scale == 1
            without = z if unguided else self._asked(tokens, hidden, now, request.null, memories[1])
            fresh, more = self._drawn(z, without, scale, request)
            tokens.scatter_(1, _wide(now, channels), fresh.view(count, number, channels))
            hidden.scatter_(1, now, False)
            filled, calls = filled + number, calls + more
        return tokens.view(count, height, width, channels), calls

    def _asked(self, tokens: Tensor, hidden: Tensor, now: Tensor, context: Tensor | None, memory: Memory) -> Tensor:
        """Ask the trunk for the places `now` (B, n): z (B n, W)."""
        if not self.raster:
            return _picked(self.z(tokens, hidden, context), now).flatten(0, 1)
        place = int(now[0, 0])
        before = tokens[:, place - 1 : place]
        x = self.enter(before) if place else self.hole.to(tokens).expand(len(tokens), 1, -1)
        return self.trunk(x, x.new_zeros(len(x), x.shape[-1]), context, memory, place)[:, 0]

    def _drawn(self, z: Tensor, without: Tensor, scale: float, request: SampleRequest) -> Sampled:
        """Draw one token (N, D) for each z (N, W), guided away from `without`."""
        if not self.codes:
            model = guided(Preconditioned(self.mlp), scale, without)
            return request.denoise(model, (len(z), self.shape[2]), z)
        logits = self.logits(z)
        if scale != 1:
            plain = self.logits(without)
            logits = plain + scale * (logits - plain)
        chances = (logits / request.temperature).softmax(-1)
        return self.centres[torch.multinomial(chances, 1, generator=request.generator)[:, 0]], 1


def _wide(index: Tensor, channels: int) -> Tensor:
    return index[..., None].expand(-1, -1, channels)


def _picked(values: Tensor, index: Tensor) -> Tensor:
    """Pick (B, n, W) of (B, L, W) at (B, n)."""
    return values.gather(1, _wide(index, values.shape[-1]))


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
