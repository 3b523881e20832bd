"""Closed loops: a generator that is fitted to its own corrected samples, and two that translate in a cycle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.priors.condition import Codebook
from dvt.errors import ConfigError, NonFiniteError, ShapeError

Generate = Callable[[int, torch.Generator], Tensor]
"""(count, generator) -> samples (count, ...)."""

Transform = Callable[[Tensor, torch.Generator], Tensor]
"""Samples (n, ...) -> the same number of others, such as corrected ones."""


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
    """Generate, transform, and refit on the real and the transformed samples, round after round.

    Args:
        fit: makes a generator of more samples from samples (n, ...).
        real: (n, ...) real samples.
        generator: draws everything.
        rounds: how many refits.
        share: lambda, synthetic samples for each real one; infinity refits on n synthetic samples alone.
        transform: what corrects the samples: :func:`mixing`, or any other; None leaves them.
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
    """Correct by pi_gamma p = (p + gamma p*) / (1 + gamma): replace each sample with chance gamma / (1 + gamma).

    Args:
        target: gives samples of p*: :func:`redraw`, or for each sample its own correction: :func:`nearest_centre`.
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
    """Replace each sample by a random real one: the ideal correction, if ``real`` (n, ...) stands for p* itself."""

    def draw(samples: Tensor, generator: torch.Generator) -> Tensor:
        return real[torch.randint(len(real), (len(samples),), generator=generator, device=generator.device)]

    return draw


def nearest_centre(codebook: Codebook) -> Transform:
    """Put the nearest centre in feature space in place of each sample; fit the codebook to real features.

    It is for data that are clusters: of others it takes away the variance within the cells, round after round. See
    :func:`nearest_cluster`.
    """
    return lambda samples, _: codebook.decode(codebook.encode(samples)).to(samples)


def nearest_cluster(codebook: Codebook, real: Tensor) -> Transform:
    """Put a random real member of the nearest centre's cluster in place of each sample.

    What varies within a cluster is kept, so that data without clusters do not shrink.

    Args:
        codebook: fitted to real features.
        real: (n, C) those features.

    Source:
        Ours.
    """
    ids = codebook.encode(real)
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=len(codebook.centres))
    starts = counts.cumsum(0) - counts
    filled = torch.nonzero(counts).flatten()  # a centre without a member is never the answer
    inhabited = Codebook(codebook.centres[filled])

    def draw(samples: Tensor, generator: torch.Generator) -> Tensor:
        nearest = filled[inhabited.encode(samples).to(filled.device)]
        share = torch.rand(len(samples), generator=generator, device=generator.device).to(counts.device)
        member = (share * counts[nearest]).long().clamp(max=counts[nearest] - 1)
        return real[order[starts[nearest] + member]].to(samples)

    return draw


# --- ITIT: two token generators in a cycle

TokenModel = Callable[[Tensor], Tensor]
"""One-hot tokens (B, L, V) -> logits (B, L', V') of the other kind."""


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
    """Compute the cross-entropy of target ids (B, L') given one-hot source tokens (B, L, V), in nats a token."""
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
    """Compute the loss of finding tokens again: tokens -> first -> straight-through sample -> second -> tokens.

    Args:
        first: tokens of this kind to logits of the other.
        second: the way back.
        tokens: (B, L) ids.
        vocabulary: V, how many ids there are.
        generator: draws the sample in the middle.
        through: whether the gradient reaches ``first``; without, the sample is only training data for ``second``.

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
    """Compute both directions' losses on a few pairs and both cycles' on unpaired tokens; "loss" is their sum.

    Args:
        pairs: image ids (B, L) and text ids (B, M) that belong together.
        images: (N, L) image ids without texts.
        texts: (K, M) text ids without images.
        vocabularies: how many image and text ids there are.
        generator: draws the samples in the middle of the cycles.
        weight: of the cycles.
    """
    picture, words = (functional.one_hot(ids, size).float() for ids, size in zip(pairs, vocabularies, strict=True))
    losses = {
        "image_to_text": token_loss(image_to_text, picture, pairs[1]),
        "text_to_image": token_loss(text_to_image, words, pairs[0]),
        "image_cycle": weight * cycle_loss(image_to_text, text_to_image, images, vocabularies[0], generator),
        "text_cycle": weight * cycle_loss(text_to_image, image_to_text, texts, vocabularies[1], generator),
    }
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}
