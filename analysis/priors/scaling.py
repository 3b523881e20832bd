"""Fit the dependence of a loss on the number of images: a power law, or one with a floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvt.errors import ConfigError


@dataclass(frozen=True)
class PowerLaw:
    """Hold a power law log L = -k log D + b.

    Args:
        k: the exponent; positive if more data helps.
        low: lower end of the exponent's 95 % interval.
        high: upper end of that interval.
        b: the intercept, in natural logarithms.
        residual: standard deviation of log L around the line.
    """

    k: float
    low: float
    high: float
    b: float
    residual: float

    def __call__(self, size: float) -> float:
        """Predict the loss at a data size."""
        return float(torch.tensor(self.b, dtype=torch.float64).exp()) * size**-self.k


def fit_power_law(sizes: Sequence[float], losses: Sequence[float] | Sequence[Sequence[float]]) -> PowerLaw:
    """Fit a power law by least squares on logarithms, with Student's interval for the exponent.

    With 6 or 8 points, a bootstrap interval contains the truth in only 89 % of cases, Student's interval in 95 %.

    Args:
        sizes: at least 4 different positive data sizes.
        losses: for each size one positive loss, or the losses of several seeds. The logarithms of seeds are averaged
            first, because seeds of one size do not show how well a line fits.

    Raises:
        ConfigError: there are too few sizes, or a value is not positive and finite.

    Source:
        Fan et al., Scaling Laws of Synthetic Images for Model Training, 2024; the interval is ours.
    """
    from scipy.stats import linregress
    from scipy.stats import t as student

    if len(sizes) != len(losses) or len(set(sizes)) != len(sizes) or len(sizes) < 4:
        raise ConfigError(f"a power law needs losses at 4 or more different sizes, got {len(losses)} at {list(sizes)}")
    means = [torch.as_tensor(each, dtype=torch.float64).log().mean() for each in losses]
    x, y = torch.as_tensor(sizes, dtype=torch.float64).log(), torch.stack(means)
    if not bool(torch.stack((x, y)).isfinite().all()):
        raise ConfigError("sizes and losses must be positive and finite")
    line = linregress(x.numpy(), y.numpy())
    half = float(student.ppf(0.975, len(sizes) - 2)) * float(line.stderr)
    left = y - (line.slope * x + line.intercept)
    residual = float((left.square().sum() / (len(sizes) - 2)).sqrt())
    k = -float(line.slope)
    return PowerLaw(k, k - half, k + half, float(line.intercept), residual)


@dataclass(frozen=True)
class FlooredLaw:
    """Hold a power law with a floor, L = floor + a D^-k.

    Args:
        k: the exponent; `k_low` and `k_high` are its 95 % interval.
        floor: the loss with infinite data; `floor_low` and `floor_high` are its 95 % interval.
        a: scale of the part of the loss that data reduce.
        residual: standard deviation of log L around the law.
    """

    k: float
    k_low: float
    k_high: float
    floor: float
    floor_low: float
    floor_high: float
    a: float
    residual: float

    def __call__(self, size: float) -> float:
        """Predict the loss at a size."""
        return self.floor + self.a * size**-self.k


def fit_floored_law(sizes: Sequence[float], losses: Sequence[float | Sequence[float]]) -> FlooredLaw:
    """Fit L = floor + a D^-k by least squares on log L, with intervals from the profile likelihood.

    A value is inside an interval if the sum of squares, minimised over the two other parameters, is below
    S (1 + F / (n - 3)), where S is its minimum and F the 95 % point of F(1, n - 3). If an interval ends at 0, or at the
    largest k tried, 5, the data do not bound it there.

    Args:
        sizes: numbers of training images D, at least 5 different ones.
        losses: for each size a loss, or the losses of several seeds, whose logarithms are averaged.

    Raises:
        ConfigError: there are too few sizes, or a value is not positive and finite.

    Source:
        Ours; the form is that of Hoffmann et al., 2022.
    """
    from scipy.stats import f as snedecor

    if len(sizes) != len(losses) or len(set(sizes)) != len(sizes) or len(sizes) < 5:
        raise ConfigError(
            f"a law with a floor needs losses at 5 or more different sizes, got {len(losses)} at {list(sizes)}"
        )
    d = torch.as_tensor(sizes, dtype=torch.float64)
    y = torch.stack([torch.as_tensor(each, dtype=torch.float64).log().mean() for each in losses])
    if not bool(torch.stack((d.log(), y)).isfinite().all()):
        raise ConfigError("sizes and losses must be positive and finite")
    d = d / d.log().mean().exp()
    # Because of noise the smallest loss may lie below the floor, so floors above it are tried, too.
    tried = (torch.linspace(0.02, 5, 80).double(), torch.linspace(0, 1.4, 100).double() * float(y.min().exp()))
    # First over all values, then over those inside wider intervals and their neighbours: k and floor go together, and a
    # coarse grid has no point on the ends of the narrow ridge that they form.
    for wider in (4, 4, 1):
        ks, floors = tried
        squares, scales = _law_squares(d, y, ks, floors)
        left = max(float(squares.min()), 1e-18)
        within = squares <= left * (1 + wider * float(snedecor.ppf(0.95, 1, len(d) - 3)) / (len(d) - 3))
        tried = (_finer(ks, within.any(1)), _finer(floors, within.any(0)))
    row, column = divmod(int(squares.argmin()), len(floors))
    some_k, some_floor = ks[within.any(1)], floors[within.any(0)]
    unit = float(torch.as_tensor(sizes, dtype=torch.float64).log().mean().exp())
    return FlooredLaw(
        float(ks[row]),
        float(some_k.min()),
        float(some_k.max()),
        float(floors[column]),
        float(some_floor.min()),
        float(some_floor.max()),
        float(scales[row, column]) * unit ** float(ks[row]),
        math.sqrt(left / (len(d) - 3)),
    )


def _finer(values: Tensor, inside: Tensor) -> Tensor:
    """Put as many values evenly over those inside and one neighbour on each side."""
    found = inside.nonzero()[:, 0]
    low, high = values[(found[0] - 1).clamp(min=0)], values[(found[-1] + 1).clamp(max=len(values) - 1)]
    return low + (high - low) * torch.linspace(0, 1, len(values), dtype=values.dtype)


def _law_squares(d: Tensor, y: Tensor, ks: Tensor, floors: Tensor) -> tuple[Tensor, Tensor]:
    """Compute, for a grid of exponents and floors, the sum of squares of log L at the best scale a, and that a.

    Both results are (k, floors).
    """
    powers = d[None] ** -ks[:, None]  # (k, n)
    # A first guess from the points above the floor, the farther the more; then Newton steps in log a. Noise may put
    # points below the true floor, and these say nothing about the scale.
    above = (y.exp()[None, None] - floors[None, :, None]).clamp(min=1e-12)
    weights = (above / y.exp()).square()
    log_a = (weights * (above.log() - powers.log()[:, None])).sum(-1) / weights.sum(-1)
    for _ in range(8):
        part = log_a.exp()[..., None] * powers[:, None]
        total = floors[None, :, None] + part
        share, error = part / total, total.log() - y
        log_a = log_a - ((share * error).sum(-1) / share.square().sum(-1).clamp(min=1e-12)).clamp(-1, 1)
    total = floors[None, :, None] + log_a.exp()[..., None] * powers[:, None]
    return (total.log() - y).square().sum(-1), log_a.exp()
