"""Run closed loops: fit a generator to its own corrected samples, or two generators that translate in a cycle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.priors.codebook import Codebook
from dvt.errors import ConfigError, NonFiniteError, ShapeError

Generate = Callable[[int, torch.Generator], Tensor]
"""A function of (count, generator) that returns samples (count, ...)."""

Transform = Callable[[Tensor, torch.Generator], Tensor]
"""A function of (samples (n, ...), generator) that returns as many other samples, such as corrected ones."""


# --- self-correcting loops


def closed_loop(
    fit: Callable[[Tensor], Generate],
    real: Tensor,
    generator: torch.Generator,
    *,
    rounds: int,
    share: float = 1.0,
    transform: Transform | None = None,
    start: Generate | None = None,
) -> Iterator[Generate]:
    """Generate samples, transform them, and refit on the real and the transformed samples, round after round.

    Args:
        fit: fits a generator to samples (n, ...).
        real: (n, ...) real samples.
        generator: draws everything.
        rounds: number of refits.
        share: lambda, the number of synthetic samples per real one; infinity refits on n synthetic samples alone.
        transform: corrects the samples, such as :func:`mixing`; None does not change them.
        start: the first generator; None means ``fit(real)``.

    Yields:
        The generator after each refit.

    Raises:
        ConfigError: rounds or share are out of range.
        NonFiniteError: a round's samples hold NaN or infinity.

    Source:
        Gillman et al., Self-Correcting Self-Consuming Loops for Generative Model Training, 2024, algorithm 1.
    """
    if rounds < 0 or not share >= 0:
        raise ConfigError(f"rounds and share must be at least 0, got {rounds} and {share}")
    count = len(real) if math.isinf(share) else round(share * len(real))
    model = fit(real) if start is None else start
    for number in range(1, rounds + 1):
        synthetic = model(count, generator)
        if transform is not None:
            synthetic = transform(synthetic, generator)
        if not bool(synthetic.isfinite().all()):
            raise NonFiniteError(f"samples of round {number} hold NaN or infinity: the loop has diverged")
        model = fit(synthetic if math.isinf(share) else torch.cat((real, synthetic)))
        yield model


def mixing(target: Transform, gamma: float) -> Transform:
    """Make the correction pi_gamma p = (p + gamma p*) / (1 + gamma).

    It replaces each sample with probability gamma / (1 + gamma).

    Args:
        target: draws samples of p*, as :func:`redraw`, or corrects each sample, as :func:`nearest_centre`.
        gamma: strength, at least 0; infinity replaces every sample.
    """
    if not gamma >= 0:
        raise ConfigError(f"gamma must be at least 0, got {gamma}")
    chance = 1.0 if math.isinf(gamma) else gamma / (1 + gamma)

    def correct(samples: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(len(samples), generator=generator, device=generator.device) < chance
        chosen = chosen.to(samples.device).view(-1, *[1] * (samples.ndim - 1))
        return torch.where(chosen, target(samples, generator), samples)

    return correct


def redraw(real: Tensor) -> Transform:
    """Make the correction that replaces each sample by a random real one: the ideal one, if ``real`` are from p*."""

    def draw(samples: Tensor, generator: torch.Generator) -> Tensor:
        return real[torch.randint(len(real), (len(samples),), generator=generator, device=generator.device)]

    return draw


def nearest_centre(codebook: Codebook) -> Transform:
    """Make the correction that replaces each sample by the nearest centre; fit the codebook to real features.

    Use it only for data that form clusters. For other data it reduces the variance within cells, round after round; use
    :func:`nearest_cluster` for them.
    """
    return lambda samples, _: codebook.decode(codebook.encode(samples)).to(samples)


def nearest_cluster(codebook: Codebook, real: Tensor) -> Transform:
    """Make the correction that replaces each sample by a random real member of its nearest centre's cluster.

    It keeps the variance within clusters, so data without clusters do not shrink.

    Args:
        codebook: a codebook fitted to real features.
        real: (n, C) these features.

    Source:
        Ours.
    """
    ids = codebook.encode(real)
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=len(codebook.centres))
    starts = counts.cumsum(0) - counts
    filled = torch.nonzero(counts).flatten()  # a centre without members is never chosen
    inhabited = Codebook(codebook.centres[filled])

    def draw(samples: Tensor, generator: torch.Generator) -> Tensor:
        nearest = filled[inhabited.encode(samples).to(filled.device)]
        share = torch.rand(len(samples), generator=generator, device=generator.device).to(counts.device)
        member = (share * counts[nearest]).long().clamp(max=counts[nearest] - 1)
        return real[order[starts[nearest] + member]].to(samples)

    return draw


_HEAVIEST = 20.0  # largest weight of a sample, as a multiple of the mean weight
_FLATTENED = 1e-3  # added to the variances of whitened features, of which each is 1


def likelihood(real: Tensor, components: int = 8, channels: int = 8, seed: int = 0) -> Transform:
    """Make the correction that draws again among the samples with weights p*(x) / p(x), thinning what is too frequent.

    p* and p are mixtures of normal distributions, fitted to the real features once and to the samples each time, both
    in the leading principal components of the real ones, scaled to unit variance. Where the samples are distributed as
    the real ones, all weights are about 1, so data without clusters keep their variance. What no sample shows cannot
    come back.

    Args:
        real: (n, C) real features.
        components: number of normal distributions in each mixture; fewer where there are fewer than 20 rows for each.
        channels: largest number of principal components.
        seed: seed of the fits.

    Source:
        Ours; sampling importance resampling is Rubin's, 1987.
    """
    from sklearn.mixture import GaussianMixture

    def fitted(rows: Tensor) -> Any:
        count = max(1, min(components, len(rows) // 20))
        return GaussianMixture(count, reg_covar=_FLATTENED, random_state=seed).fit(rows.numpy())

    values = real.double()
    mean = values.mean(0)
    _, sizes, directions = torch.linalg.svd(values - mean, full_matrices=False)
    kept = min(channels, int((sizes > 1e-6 * sizes[0]).sum()))
    basis = directions[:kept].T * (len(values) ** 0.5 / sizes[:kept])
    truth = fitted((values - mean) @ basis)

    def draw(samples: Tensor, generator: torch.Generator) -> Tensor:
        rows = (samples.double().cpu() - mean) @ basis
        ratio = torch.from_numpy(truth.score_samples(rows.numpy()) - fitted(rows).score_samples(rows.numpy()))
        weights = ratio.softmax(0) * len(rows)
        weights = weights.clamp(max=_HEAVIEST).to(generator.device)
        return samples[torch.multinomial(weights, len(samples), replacement=True, generator=generator)]

    return draw


# --- ITIT: two token generators in a cycle

TokenModel = Callable[[Tensor], Tensor]
"""A function from one-hot tokens (B, L, V) to logits (B, L', V') of the other kind."""


def straight_through(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one-hot samples (..., V) of softmax(logits); their gradient is that of the probabilities.

    Source:
        Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
    """
    chances = logits.softmax(-1)
    rows = chances.detach().flatten(0, -2).to(generator.device)
    ids = torch.multinomial(rows, 1, generator=generator).view(logits.shape[:-1])
    hard = functional.one_hot(ids, logits.shape[-1]).to(chances)
    return hard + (chances - chances.detach())


def token_loss(model: TokenModel, source: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy of target ids (B, L') given one-hot source tokens (B, L, V), in nats per token."""
    logits = model(source)
    if logits.shape[:2] != target.shape:
        raise ShapeError(f"the model gives logits {tuple(logits.shape)} for target tokens {tuple(target.shape)}")
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def cycle_loss(
    first: TokenModel,
    second: TokenModel,
    tokens: Tensor,
    vocabulary: int,
    generator: torch.Generator,
    through: bool = True,
) -> Tensor:
    """Compute the cycle loss of tokens -> first -> straight-through sample -> second -> the same tokens.

    Args:
        first: maps tokens of this kind to logits of the other.
        second: maps tokens of the other kind back.
        tokens: (B, L) ids.
        vocabulary: V, the number of ids.
        generator: draws the intermediate sample.
        through: let the gradient reach ``first``; otherwise the sample is only training data for ``second``.

    Source:
        Li et al., Leveraging Unpaired Data for Vision-Language Generative Models via Cycle Consistency (ITIT), 2023.
    """
    middle = straight_through(first(functional.one_hot(tokens, vocabulary).float()), generator)
    return token_loss(second, middle if through else middle.detach(), tokens)


def itit_losses(
    image_to_text: TokenModel,
    text_to_image: TokenModel,
    pairs: tuple[Tensor, Tensor],
    images: Tensor,
    texts: Tensor,
    vocabularies: tuple[int, int],
    generator: torch.Generator,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """Compute the losses of both directions on pairs and of both cycles on unpaired tokens; "loss" is their sum.

    Args:
        pairs: image ids (B, L) and the text ids (B, M) of the same pairs.
        images: (N, L) image ids without texts.
        texts: (K, M) text ids without images.
        vocabularies: the numbers of image and of text ids.
        generator: draws the intermediate samples of the cycles.
        weight: weight of the cycles' losses.
    """
    picture, words = (functional.one_hot(ids, size).float() for ids, size in zip(pairs, vocabularies, strict=True))
    losses = {
        "image_to_text": token_loss(image_to_text, picture, pairs[1]),
        "text_to_image": token_loss(text_to_image, words, pairs[0]),
        "image_cycle": weight * cycle_loss(image_to_text, text_to_image, images, vocabularies[0], generator),
        "text_cycle": weight * cycle_loss(text_to_image, image_to_text, texts, vocabularies[1], generator),
    }
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}
