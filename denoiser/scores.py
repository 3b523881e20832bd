"""Measure the distance of denoised tokens from their target, for the training loss and validation scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt.denoiser.pairs import TrainingBatch


def reconstruction(denoised: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compute MSE + (1 - cosine), means over all tokens (Denoising ViT, stage 2).

    Args:
        denoised, target: (B, h, w, C).

    Returns:
        "loss", "mse" and "cosine", scalars.
    """
    mse = nnf.mse_loss(denoised, target)
    cosine = nnf.cosine_similarity(denoised, target, dim=-1).mean()
    return {"loss": mse + 1 - cosine, "mse": mse, "cosine": cosine}


def denoiser_loss(model: nn.Module, batch: TrainingBatch) -> dict[str, Tensor]:
    """Compute the loss of a batch of :func:`pair_batches`, for :func:`dvt.training.train`."""
    prefix = batch["prefix"].float() if "prefix" in batch else None
    return reconstruction(model(batch["raw"].float(), prefix).float(), batch["target"].float())


def evaluate(
    ways: Mapping[str, Callable[[TrainingBatch], Tensor]], items: Iterable[TrainingBatch]
) -> dict[str, dict[str, float]]:
    """Average :func:`reconstruction` over images, for several ways to denoise.

    Args:
        ways: by name, functions from a batch of one image, in float32, to denoised tokens (1, h, w, C).
        items: images of :class:`Pairs`, read once.
    """

    def scored(item: TrainingBatch) -> dict[str, dict[str, Tensor]]:
        batch = {name: values[None].float() for name, values in item.items()}
        return {name: reconstruction(way(batch), batch["target"]) for name, way in ways.items()}

    with torch.no_grad():
        return mean_scores(scored(item) for item in items)


def mean_scores(found: Iterable[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, dict[str, float]]:
    """Average scores, given by variant and score for each image or batch; each counts the same."""
    totals: dict[str, Counter[str]] = {}
    count = 0
    for count, scores in enumerate(found, 1):  # noqa: B007
        for name, values in scores.items():
            totals.setdefault(name, Counter()).update({key: float(value) for key, value in values.items()})
    return {name: {key: value / count for key, value in total.items()} for name, total in totals.items()}
