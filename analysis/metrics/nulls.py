"""Make nulls, which are tokens without the effect that a metric measures, and compare scores with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.tokens import Tokens

TokenSets = Tokens | Sequence[Tokens]


@dataclass(frozen=True)
class Score:
    """Hold a metric's value beside its null.

    Args:
        value: the metric of the tokens.
        null: mean of the metric over random draws without the effect that it measures.
        low: lower end of the 95 % prediction interval for one more draw of the null.
        high: upper end of that interval.
    """

    value: float
    null: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """True if the value lies outside the interval of the null."""
        return not self.low <= self.value <= self.high


def with_null(
    metric: Callable[[TokenSets], float],
    tokens: TokenSets,
    generator: torch.Generator,
    draws: int = 5,
    null: Callable[[TokenSets, torch.Generator], TokenSets] | None = None,
) -> Score:
    """Compute a metric and its null; the interval is Student's prediction interval for one more draw.

    Args:
        metric: a function of tokens alone, such as :func:`position_mic`.
        tokens: the tokens of one or more images.
        generator: draws the null.
        draws: number of draws of the null, at least 2.
        null: makes tokens without the effect; :func:`shuffled` (the default), :func:`torus_shifted` or
            :func:`matched_noise`.
    """
    from scipy.stats import t as student

    if draws < 2:
        raise ConfigError(f"an interval needs at least 2 draws of the null, got {draws}")
    null = null or shuffled
    values = torch.tensor([metric(null(tokens, generator)) for _ in range(draws)], dtype=torch.float64)
    half = float(student.ppf(0.975, draws - 1)) * float(values.std()) * (1 + 1 / draws) ** 0.5
    mean = float(values.mean())
    return Score(float(metric(tokens)), mean, mean - half, mean + half)


def shuffled(tokens: TokenSets, generator: torch.Generator) -> TokenSets:
    """Permute the positions of each image's tokens, as a null for any position metric."""
    if not isinstance(tokens, Tokens):
        return [_shuffle(each, generator) for each in tokens]
    return _shuffle(tokens, generator)


def _shuffle(tokens: Tokens, generator: torch.Generator) -> Tokens:
    flat = tokens.patches.flatten(1, 2)
    order = torch.rand(flat.shape[:2], generator=generator, device=generator.device).argsort(1).to(flat.device)
    moved = flat.gather(1, order[..., None].expand_as(flat))
    return tokens.with_patches(moved.view_as(tokens.patches))


def torus_shifted(tokens: TokenSets, generator: torch.Generator) -> TokenSets:
    """Roll each image's map by a random number of patches, which keeps it smooth but moves it.

    It is the null of position metrics over several images with smooth maps. Smoothness alone reveals position within an
    image (neighbours resemble each other). :func:`shuffled` destroys smoothness, so with it every smooth map would
    appear to be beyond chance. A code of position that images share is moved differently in each, so pooled metrics
    (:func:`dvt.analysis.metrics.pooled_position_mic`, :func:`dvt.analysis.metrics.position_decodability`) lose it. A
    metric within single images does not: a rolled coordinate is still a function of position.
    """
    if not isinstance(tokens, Tokens):
        return [_roll(each, generator) for each in tokens]
    return _roll(tokens, generator)


def _roll(tokens: Tokens, generator: torch.Generator) -> Tokens:
    size = torch.tensor(tokens.patches.shape[1:3])
    steps = (torch.rand(len(tokens), 2, generator=generator, device=generator.device).cpu() * size).long()
    moved = [each.roll(step, (0, 1)) for each, step in zip(tokens.patches, steps.tolist(), strict=True)]
    return tokens.with_patches(torch.stack(moved))


def matched_noise(tokens: TokenSets, generator: torch.Generator) -> TokenSets:
    """Draw normal noise with the mean and channel covariance of all tokens, as a null for :func:`norm_outliers`."""
    sets = [tokens] if isinstance(tokens, Tokens) else list(tokens)
    pooled = torch.cat([each.flatten(0, 1) for each in token_maps(sets)]).double()
    mean = pooled.mean(0)
    variances, directions = torch.linalg.eigh((pooled - mean).T @ (pooled - mean) / len(pooled))
    root = directions * variances.clamp(min=0).sqrt()
    noisy = []
    for each in sets:
        noise = torch.randn(each.patches.shape, generator=generator, device=generator.device, dtype=torch.float64)
        noisy.append(each.with_patches((noise.to(root) @ root.T + mean).float()))
    return noisy[0] if isinstance(tokens, Tokens) else noisy


def token_maps(tokens: TokenSets) -> list[Tensor]:
    """List the (h, w, C) float32 maps of all images.

    Raises:
        ShapeError: there is no image, or feature sizes differ.
        NonFiniteError: a token is NaN or infinite.
    """
    sets = [tokens] if isinstance(tokens, Tokens) else list(tokens)
    maps = [each for tokens_ in sets for each in tokens_.patches.detach().float()]
    if not maps:
        raise ShapeError("no image was given; a metric needs the tokens of at least one")
    if len({each.shape[-1] for each in maps}) > 1:
        raise ShapeError(f"images have different feature sizes {sorted({each.shape[-1] for each in maps})}")
    for index, each in enumerate(maps):
        if not bool(each.isfinite().all()):
            raise NonFiniteError(f"tokens of image {index} of {len(maps)} hold NaN or infinity; compute them again")
    return maps
