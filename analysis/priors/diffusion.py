"""Train and sample diffusion models, with x = x0 + sigma * noise and a model that predicts x0(x, sigma, condition).

:class:`Preconditioned` (EDM) makes such a model from a network, :func:`x0_from_noise` from a noise-predicting DDPM
network. All samplers have one signature: ``sampler(x0_model, x_init, sigmas, condition, generator)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dvt.errors import ConfigError, NonFiniteError

X0Model = Callable[[Tensor, Tensor, Any], Tensor]
"""A function of (x (B, ...), sigma (B,), condition) that predicts the expected clean sample (B, ...)."""

Sampled = tuple[Tensor, int]
"""The sample (B, ...) and the number of calls of the model."""


def _beside(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x).view(-1, *[1] * (x.ndim - 1))


class Preconditioned(nn.Module):
    """Turn a network into an x0 model, so that its inputs and targets have unit variance at every noise level.

    x0 = c_skip x + c_out F(c_in x, ln(sigma) / 4, condition); if the network F gives 0, x is shrunk linearly.

    Args:
        network: maps (x (B, ...), noise label (B,), condition) to (B, ...).
        sigma_data: standard deviation of the clean data.

    Source:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, table 1.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 1.0) -> None:
        super().__init__()
        if sigma_data <= 0:
            raise ConfigError(f"sigma_data is the data's standard deviation and must be positive, got {sigma_data}")
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
        wide, data = _beside(sigma, x), self.sigma_data
        total = wide.square() + data**2
        answer = self.network(x * total.rsqrt(), sigma.log() / 4, condition)
        return x * data**2 / total + answer * wide * data * total.rsqrt()


def denoising_loss(
    x0_model: X0Model, clean: Tensor, sigma: Tensor, noise: Tensor, condition: Any = None, sigma_data: float = 1.0
) -> Tensor:
    """Compute the weighted squared error of x0, averaged over dimensions, (B,); an untrained model scores 1.

    Args:
        x0_model: a :class:`Preconditioned` network, or any other x0 model.
        clean: (B, ...) data of standard deviation ``sigma_data``.
        sigma: (B,) noise levels, for example from :func:`draw_sigmas`.
        noise: standard normal, of the shape of ``clean``.

    Source:
        EDM, equation 8 with the weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """
    error = (x0_model(clean + _beside(sigma, clean) * noise, sigma, condition) - clean).square()
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return weight * error.flatten(1).mean(1)


def draw_sigmas(count: int, generator: torch.Generator, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Draw training noise levels (count,), log-normal: ln(sigma) ~ N(mean, std^2) (EDM)."""
    return (mean + std * torch.randn(count, generator=generator, device=generator.device)).exp()


def guided(x0_model: X0Model, scale: float | Callable[[float], float], null: Any) -> X0Model:
    """Guide a model without a classifier: x0(null) + scale [x0(condition) - x0(null)]; each call runs it twice.

    With scale 1 the model itself is returned. Source: Ho and Salimans, 2022, equation 6, where w = scale - 1.

    Args:
        x0_model: the model.
        scale: one number, or a function of the noise level.
        null: the condition that means no condition.
    """
    if scale == 1:
        return x0_model

    def model(x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        without = x0_model(x, sigma, null)
        here = scale(float(sigma[0])) if callable(scale) else scale
        return without + here * (x0_model(x, sigma, condition) - without)

    return model


# --- schedules


def karras_sigmas(count: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """List noise levels (count + 1,) from high to low, evenly spaced in sigma^(1/rho), then 0.

    >>> karras_sigmas(3, low=1.0, high=16.0, rho=2.0).tolist()
    [16.0, 6.25, 1.0, 0.0]

    Source:
        EDM, equation 5.
    """
    if count < 1 or not 0 < low < high:
        raise ConfigError(f"a grid needs count >= 1 and 0 < low < high, got count {count}, low {low}, high {high}")
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    nodes = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat((nodes, nodes.new_zeros(1)))


def alpha_bars(kind: Literal["cosine", "linear"], steps: int = 1000) -> Tensor:
    """Compute alpha_bar, the product of 1 - beta, of a DDPM schedule: (steps,), falling.

    The noise level of a step is sigma = sqrt(1 / alpha_bar - 1).

    Source:
        linear: Ho et al., DDPM, 2020 (beta from 1e-4 to .02 at 1,000 steps); cosine: Nichol and Dhariwal, 2021, eq. 17.
    """
    if steps < 2:
        raise ConfigError(f"a schedule needs at least 2 steps, got {steps}")
    if kind == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    elif kind == "cosine":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = ((time + 0.008) / 1.008 * torch.pi / 2).cos().square()
        betas = 1 - curve[1:] / curve[:-1]
    else:
        raise ConfigError(f"unknown schedule {kind!r}; it is 'cosine' or 'linear'")
    return (1 - betas.clamp(max=0.999)).cumprod(0)


def ddpm_sigmas(kind: Literal["cosine", "linear"], count: int, steps: int = 1000) -> Tensor:
    """List falling noise levels at evenly spaced steps of a DDPM schedule, then 0: (count + 1,)."""
    if not 1 <= count <= steps:
        raise ConfigError(f"count must lie in 1 ... {steps}, the steps of the schedule, got {count}")
    times = torch.linspace(steps - 1, 0, count, dtype=torch.float64).round().long()
    levels = (1 / alpha_bars(kind, steps)[times] - 1).sqrt()
    return torch.cat((levels, levels.new_zeros(1)))


def x0_from_noise(noise_model: Callable[[Tensor, Tensor, Any], Tensor], schedule: Tensor) -> X0Model:
    """Turn a DDPM network into an x0 model: x0 = x - sigma eps(x / sqrt(1 + sigma^2), step).

    Args:
        noise_model: maps (x of variance 1 (B, ...), step (B,) integers, condition) to the noise in x (B, ...).
        schedule: the :func:`alpha_bars` that it was trained with; a sigma becomes the step of the nearest noise level.
    """
    levels = (1 / schedule - 1).log() / 2
    edges = (levels[1:] + levels[:-1]) / 2

    def model(x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        step = torch.bucketize(sigma.double().log().cpu(), edges).to(x.device)
        wide = _beside(sigma, x)
        return x - wide * noise_model(x * (1 + wide.square()).rsqrt(), step, condition)

    return model


# --- samplers


def heun(
    x0_model: X0Model,
    x_init: Tensor,
    sigmas: Tensor,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> Sampled:
    """Sample by Heun's method on dx/dsigma = (x - x0(x, sigma)) / sigma; N steps to 0 call the model 2N - 1 times.

    Args:
        x0_model: the model; wrap it in :func:`guided` for guidance.
        x_init: (B, ...) at the first noise level, sigmas[0] * normal noise; float32 or better.
        sigmas: (N + 1,) falling noise levels, such as :func:`karras_sigmas`.
        condition: passed to the model unchanged.
        generator: not used; all samplers have this argument.

    Returns:
        (B, ...) at the last noise level, and the number of calls of the model.

    Raises:
        ConfigError: the noise levels do not fall.
        NonFiniteError: the result holds NaN or infinity.

    Source:
        EDM, algorithm 1.
    """
    return restart(x0_model, x_init, sigmas, condition, generator)


@dataclass(frozen=True)
class Restart:
    """Hold an interval of noise levels in which sampling restarts.

    Args:
        low: noise level to restart from; the nearest inner level of the sampler's grid is taken.
        high: noise level to return to.
        points: grid points from high to low, at least 2.
        repeats: number of restarts.
    """

    low: float
    high: float
    points: int
    repeats: int

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high or self.points < 2 or self.repeats < 1:
            raise ConfigError(f"a restart needs 0 < low < high, points >= 2 and repeats >= 1, got {self}")


@torch.no_grad()
def restart(
    x0_model: X0Model,
    x_init: Tensor,
    sigmas: Tensor,
    condition: Any = None,
    generator: torch.Generator | None = None,
    intervals: Sequence[Restart] = (),
) -> Sampled:
    """Sample by Heun's method with restarts: at the low end of an interval, return to its high end and descend again.

    Returning adds noise. Interval i is repeated K_i times, so the model is called 2N - 1 + sum 2 K_i (points_i - 1)
    times. Restarts reduce errors made above the interval; with an exact model they are no better than :func:`heun`.
    The other arguments are those of :func:`heun`.

    Args:
        generator: draws the noise; needed with intervals.
        intervals: where to restart; empty for :func:`heun` itself.

    Source:
        Xu et al., Restart Sampling for Improving Generative Processes, 2023.
    """
    grid = _checked(sigmas)
    at: dict[int, list[Restart]] = {}
    for interval in intervals:
        at.setdefault(_node(interval, grid), []).append(interval)

    x, calls = x_init, 0
    for index in range(1, len(grid)):
        x, more = _heun_steps(x0_model, x, grid[index - 1 : index + 1], condition)
        calls += more
        for interval in at.get(index, []):
            low = grid[index]
            inner = [*karras_sigmas(interval.points, low, interval.high)[:-2].tolist(), low]
            for _ in range(interval.repeats):
                x = x + (interval.high**2 - low**2) ** 0.5 * _noise(x, generator)
                x, more = _heun_steps(x0_model, x, inner, condition)
                calls += more
    return _finite(x), calls


@torch.no_grad()
def ddim(
    x0_model: X0Model,
    x_init: Tensor,
    sigmas: Tensor,
    condition: Any = None,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
) -> Sampled:
    """Sample by DDIM: Euler steps of one call each; eta = 1 is DDPM's ancestral sampling.

    The other arguments are those of :func:`heun`.

    Args:
        generator: draws the noise; needed with eta > 0.
        eta: share of the ancestral noise, in [0, 1].

    Source:
        Song et al., DDIM, 2021, equations 12 and 16, written in sigma.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta must lie in [0, 1], got {eta}")
    grid, x = _checked(sigmas), x_init
    for sigma, following in pairwise(grid):
        clean = x0_model(x, x.new_full((len(x),), sigma), condition)
        fresh = eta * following * (1 - (following / sigma) ** 2) ** 0.5
        x = clean + (following**2 - fresh**2) ** 0.5 / sigma * (x - clean)
        if fresh:
            x = x + fresh * _noise(x, generator)
    return _finite(x), len(grid) - 1


def _heun_steps(x0_model: X0Model, x: Tensor, grid: Sequence[float], condition: Any) -> Sampled:
    calls = 0
    for sigma, following in pairwise(grid):
        slope = (x - x0_model(x, x.new_full((len(x),), sigma), condition)) / sigma
        calls += 1
        ahead = x + (following - sigma) * slope
        if following > 0:
            other = (ahead - x0_model(ahead, x.new_full((len(x),), following), condition)) / following
            calls += 1
            ahead = x + (following - sigma) * (slope + other) / 2
        x = ahead
    return x, calls


def _checked(sigmas: Tensor) -> list[float]:
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()) or float(sigmas[-1]) < 0:
        raise ConfigError(
            f"sigmas must be two or more falling noise levels, the last at least 0 (karras_sigmas makes them), "
            f"got {sigmas.tolist() if sigmas.numel() < 10 else tuple(sigmas.shape)}"
        )
    return sigmas.double().tolist()


def _node(interval: Restart, grid: list[float]) -> int:
    """Find the grid's inner level nearest to an interval's low end."""
    inner = range(1, len(grid) - 1 if grid[-1] == 0 else len(grid))
    nearest = min(inner, key=lambda index: abs(grid[index] - interval.low), default=0)
    if not 0 < grid[nearest] < interval.high or nearest == 0:
        raise ConfigError(
            f"no inner noise level of the grid is near {interval.low} and below {interval.high}; add noise levels there"
        )
    return nearest


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        raise ConfigError("this sampler draws noise: give it a torch.Generator")
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


def _finite(x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise NonFiniteError(
            "the samples hold NaN or infinity: the model is not trained for these noise levels, or has diverged"
        )
    return x
