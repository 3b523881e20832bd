"""Compute a contrastive loss, the cross-entropy between an assignment of positives and softmaxed cosines."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dvt.errors import ConfigError, ShapeError


def contrast(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    positives: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Average H(p, q) = -sum_j p_j log q_j over queries, with q = softmax(cosine(query, key_j) / temperature).

    ======================  ========================================================================
    InfoNCE                 contrast(a, b)
    CLIP                    contrast(images, texts, temperature=exp(-logit_scale), symmetric=True)
    StableRep, SynCLR       contrast(z, positives=same(labels), temperature=.1 or .08)
    LAFITE                  .5 * contrast(pseudo_text, features_of_generated, temperature=.5)
    ======================  ========================================================================

    Args:
        queries: (N, C); the function L2-normalises them.
        keys: (M, C); None takes the queries themselves, without the pair of a query with itself.
        temperature: positive; a float, or a tensor if it is learned.
        positives: (N, M) weights >= 0 or booleans, which are scaled so that each row sums to 1; None means that key i
            is the positive of query i. A query without a positive has no loss.
        symmetric: average with the loss of the keys against the queries.

    Raises:
        ShapeError: shapes disagree.
        ConfigError: the temperature is not positive, or no query has a positive.

    Source:
        Tian et al., StableRep, 2023, section 3; Radford et al., CLIP, 2021; Zhou et al., LAFITE, 2022, section 3.

    >>> pairs = torch.eye(4)
    >>> round(float(contrast(pairs, pairs, temperature=1.0)), 4)  # log(e + 3) - 1
    0.7437
    """
    if not bool(temperature > 0):
        raise ConfigError(f"the temperature must be positive, got {temperature}")
    itself = keys is None
    keys = queries if keys is None else keys
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ShapeError(f"queries and keys must be (N, C) and (M, C), got {tuple(queries.shape)}, {tuple(keys.shape)}")
    logits = functional.normalize(queries, dim=-1) @ functional.normalize(keys, dim=-1).T / temperature
    weights = _weights(positives, logits, itself)
    if itself:
        logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), -torch.inf)
    loss = _cross_entropy(logits, weights)
    return (loss + _cross_entropy(logits.T, weights.T)) / 2 if symmetric else loss


def same(labels: Tensor, others: Tensor | None = None) -> Tensor:
    """Mark which samples share a label, such as the images made from one caption: (N, M) booleans.

    Args:
        labels: (N,) labels of the queries.
        others: (M,) labels of the keys; None takes `labels`.
    """
    return labels[:, None] == (labels if others is None else others)[None]


def _weights(positives: Tensor | None, logits: Tensor, itself: bool) -> Tensor:
    if positives is None:
        if itself:
            raise ConfigError("queries that are their own keys need positives: same(labels) makes them")
        positives = torch.eye(len(logits), device=logits.device)
        if logits.shape[0] != logits.shape[1]:
            raise ShapeError(f"{logits.shape[0]} queries and {logits.shape[1]} keys are not pairs; give positives")
    if positives.shape != logits.shape:
        raise ShapeError(f"positives must be (queries, keys) = {tuple(logits.shape)}, got {tuple(positives.shape)}")
    weights = positives.to(logits)
    if itself:
        weights = weights * (1 - torch.eye(len(weights), device=weights.device, dtype=weights.dtype))
    if not bool((weights >= 0).all()) or not bool(weights.any()):
        raise ConfigError("positives must be weights of at least 0, and some query needs a positive (not itself)")
    return weights


def _cross_entropy(logits: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum(1)
    terms = torch.where(weights > 0, weights * logits.log_softmax(1), 0.0)  # not 0 * -inf, where a key is masked
    return -(terms.sum(1) / total.clamp(min=torch.finfo(total.dtype).tiny))[total > 0].mean()
