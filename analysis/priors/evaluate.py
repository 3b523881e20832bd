"""Measure generated samples in the features of any backbone: distance, faithfulness, scaling, memorisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

# --- features


@torch.no_grad()
def features(
    backbone: Callable[[Tensor], Tokens],
    images: Tensor,
    read: Literal["cls", "mean", "patch"] = "mean",
    clean: Callable[[Tokens], Tokens] | None = None,
    size: Size | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Compute features of images, real or generated, for the functions below.

    Args:
        backbone: maps (B, 3, H, W) images in [0, 1] to tokens.
        images: (N, 3, H, W); values beyond [0, 1] are clipped, as they would be in a file.
        read: "cls" for the first prefix token (N, C), "mean" for the mean patch (N, C), "patch" for all (N, h, w, C).
        clean: a denoiser of the tokens.
        size: (H, W) that the backbone takes; None does not resize the images.
        batch_size: images at a time.

    Raises:
        ShapeError: there are no images, or no prefix token to read.
    """
    if read not in ("cls", "mean", "patch"):
        raise ConfigError(f"unknown features {read!r}; read 'cls', 'mean' or 'patch'")
    if images.ndim != 4 or not len(images):
        raise ShapeError(f"images must be (N, 3, H, W) and at least one, got {tuple(images.shape)}")
    parts = []
    for batch in images.clamp(0, 1).split(batch_size):
        if size is not None and tuple(batch.shape[2:]) != tuple(size):
            batch = functional.interpolate(batch, size, mode="bilinear", antialias=True)
        tokens = backbone(batch)
        tokens = tokens if clean is None else clean(tokens)
        parts.append(_read(tokens, read).float())
    return torch.cat(parts)


def _read(tokens: Tokens, read: str) -> Tensor:
    if read == "cls":
        if not tokens.prefix.shape[1]:
            raise ShapeError("this backbone has no class token to read; read 'mean' or 'patch'")
        return tokens.prefix[:, 0]
    return tokens.patches.mean((1, 2)) if read == "mean" else tokens.patches


def _rows(values: Tensor, name: str, least: int) -> Tensor:
    if values.ndim != 2 or len(values) < least:
        raise ShapeError(f"{name} must be (N, C) features of at least {least} images, got {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise NonFiniteError(f"{name} features hold NaN or infinity; compute them again")
    return values.detach().double()


# --- distance of distributions


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Compute the squared Frechet distance of the normal distributions with the features' means and covariances.

    With few samples its bias upwards is much larger than its noise: compare only distances of equal sample counts, and
    compare them with ``frechet_distance(real, held_out)`` of as many held-out real images as generated ones. Features
    are not rescaled, so the distance depends on their scale.

    Args:
        real: (N, C) features, N at least 2.
        generated: (M, C), M at least 2.

    Source:
        Heusel et al., 2017 (there with Inception features); torchmetrics computes it, in float64.
    """
    real, generated = _rows(real, "real", 2), _rows(generated, "generated", 2)
    if real.shape[1] != generated.shape[1]:
        raise ShapeError(f"real features have {real.shape[1]} channels, generated ones {generated.shape[1]}")
    from torchmetrics.image.fid import FrechetInceptionDistance

    through = _AsTheyAre()
    through.num_features = real.shape[1]
    # This process holds all features, so it must not wait for the others of a distributed run.
    metric = FrechetInceptionDistance(through, normalize=True, sync_on_compute=False).to(real.device)
    # The distance does not depend on the origin, but far from it sums of squares lose digits.
    centre = real.mean(0)
    metric.update(real - centre, real=True)
    metric.update(generated - centre, real=False)
    return max(float(metric.compute()), 0.0)


class _AsTheyAre(nn.Identity):
    """Replace the network that torchmetrics expects by the identity, since the rows are already features."""

    num_features: int


@dataclass(frozen=True)
class KernelDistance:
    """Hold a kernel distance with its 95 % interval.

    Args:
        value: the unbiased squared distance; its expectation is 0 for samples of one distribution.
        low, high: the interval, by a jackknife over 20 blocks of the samples of both sides.
    """

    value: float
    low: float
    high: float


_BLOCKS = 20


def kernel_distance(real: Tensor, generated: Tensor) -> KernelDistance:
    """Compute the unbiased kernel distance (KID) with the kernel (x.y / C + 1)^3 of features scaled to unit variance.

    Args:
        real: (N, C) features, N at least 20; their mean and mean variance are the scale for both.
        generated: (M, C), M at least 20.

    Source:
        Binkowski et al., Demystifying MMD GANs, 2018; scale and interval are ours.
    """
    from scipy.stats import t as student

    real, generated = _rows(real, "real", _BLOCKS), _rows(generated, "generated", _BLOCKS)
    if real.shape[1] != generated.shape[1]:
        raise ShapeError(f"real features have {real.shape[1]} channels, generated ones {generated.shape[1]}")
    mean, scale = real.mean(0), real.var(0).mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    real, generated = (real - mean) / scale, (generated - mean) / scale

    def sums(a: Tensor, b: Tensor, itself: bool) -> Tensor:
        """Sum the kernel over all pairs of blocks: (20, 20)."""
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        if itself:
            kernel.fill_diagonal_(0)
        rows = torch.stack([part.sum(0) for part in kernel.tensor_split(_BLOCKS)])
        return torch.stack([part.sum(1) for part in rows.tensor_split(_BLOCKS, 1)], 1)

    tables = [sums(real, real, True), sums(generated, generated, True), sums(real, generated, False)]
    sizes = [torch.tensor([len(p) for p in each.tensor_split(_BLOCKS)]).double() for each in (real, generated)]

    def distance(kept: Tensor) -> float:
        own, other, cross = (float(kept @ table @ kept) for table in tables)
        n, m = (float(size @ kept) for size in sizes)
        return own / (n * (n - 1)) + other / (m * (m - 1)) - 2 * cross / (n * m)

    ones = torch.ones(_BLOCKS, dtype=torch.float64)
    left = torch.tensor(
        [distance(ones - ones.new_zeros(_BLOCKS).index_fill(0, torch.tensor([i]), 1.0)) for i in range(_BLOCKS)]
    )
    value = distance(ones)
    half = float(student.ppf(0.975, _BLOCKS - 1)) * float(((_BLOCKS - 1) * left.var(correction=0)).sqrt())
    return KernelDistance(value, value - half, value + half)


def enough_for_frechet(count: int, channels: int) -> bool:
    """Tell whether there are enough samples for a Frechet distance: ten per channel.

    For two sets from one normal distribution of 192 channels, the distance is 210 with 64 samples and 9 with 2,000.
    """
    return count >= 10 * channels


# --- faithfulness to the condition


@dataclass(frozen=True)
class RoundTrip:
    """Hold cosines between the features of generated images and conditions.

    Args:
        matched: mean cosine with the image's own condition.
        shuffled: mean cosine with all other conditions, as a prior that ignores its condition would reach.
        error: standard error of matched - shuffled, over samples.
    """

    matched: float
    shuffled: float
    error: float

    @property
    def sigmas(self) -> float:
        """The difference matched - shuffled in standard errors."""
        return (self.matched - self.shuffled) / max(self.error, torch.finfo(torch.float64).tiny)


def round_trip_cosine(generated: Tensor, conditions: Tensor) -> RoundTrip:
    """Measure how close a generated image's features are to its condition.

    Args:
        generated: (N, ..., C) features of generated images, N at least 3; maps (N, h, w, C) are compared by token.
        conditions: (N, ..., C) the features from which each image was generated.
    """
    if generated.shape != conditions.shape or generated.ndim < 2 or len(generated) < 3:
        raise ShapeError(
            f"generated and conditions must both be (N, ..., C) with N >= 3, got {tuple(generated.shape)} and "
            f"{tuple(conditions.shape)}"
        )
    first, second = (functional.normalize(each.double(), dim=-1).flatten(1) for each in (generated, conditions))
    cosines = first @ second.T / (generated[0].numel() // generated.shape[-1])
    own = cosines.diagonal()
    others = (cosines.sum(1) - own) / (len(own) - 1)
    error = float((own - others).std()) / len(own) ** 0.5
    return RoundTrip(float(own.mean()), float(others.mean()), error)


# --- memorisation


@dataclass(frozen=True)
class Memorisation:
    """Hold distances from generated images to their nearest training images, beside those of real held-out images.

    Args:
        distances: (N,) 1 - cosine from each generated image to its nearest training image.
        neighbours: (N,) index of that training image.
        threshold: the 5 % quantile of the distances from held-out images to their nearest training images.
        share: share of generated images with a distance under the threshold; .05 without memorisation.
        p_value: for the null that generated images are not nearer than held-out ones (one-sided Mann-Whitney).
    """

    distances: Tensor
    neighbours: Tensor
    threshold: float
    share: float
    p_value: float


def memorisation(generated: Tensor, training: Tensor, held_out: Tensor) -> Memorisation:
    """Test whether generated images lie nearer to training images than other real images do.

    Args:
        generated: (N, C) features.
        training: (M, C) features of the images that the prior was trained on.
        held_out: (K, C) features of real images that it was not trained on, at least 20: the null.
    """
    from scipy.stats import mannwhitneyu

    generated, training = _rows(generated, "generated", 1), _rows(training, "training", 1)
    held_out = _rows(held_out, "held-out", 20)
    distances, neighbours = _nearest(generated, training)
    null, _ = _nearest(held_out, training)
    threshold = float(null.quantile(0.05))
    p_value = float(mannwhitneyu(distances.cpu().numpy(), null.cpu().numpy(), alternative="less").pvalue)
    return Memorisation(distances, neighbours, threshold, float((distances < threshold).double().mean()), p_value)


def _nearest(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    unit = functional.normalize(keys, dim=-1)
    parts = [(functional.normalize(part, dim=-1) @ unit.T).max(1) for part in queries.split(4096)]
    return 1 - torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
