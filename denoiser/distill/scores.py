"""Measure the distance of a student's tokens from its teacher's, for the training loss and validation scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.backbones import Backbone
from dvt.denoiser.distill.shifted import Canvas, view_mean
from dvt.denoiser.model import Denoiser
from dvt.denoiser.pairs import TrainingBatch
from dvt.denoiser.scores import mean_scores, reconstruction
from dvt.tokens import Tokens

#: Maps (canvases, shifts) to the patch tokens to learn (B, h, w, C) and the frozen backbone's own tokens of the window.
Teacher = Callable[[Tensor, Tensor], tuple[Tensor, Tokens]]


def make_teacher(backbone: Backbone, canvas: Canvas, denoiser: Denoiser | None = None, raw: bool = False) -> Teacher:
    """Make a teacher: the denoiser after the frozen backbone, or without a denoiser the mean over views.

    `raw` takes the backbone's tokens as they are.
    """

    def teach(canvases: Tensor, shifts: Tensor) -> tuple[Tensor, Tokens]:
        backbone.to(canvases.device)  # in a run of several processes, accelerate chooses each one's device
        if raw:
            own = backbone(canvas.middle(canvases))
            return own.patches, own
        if denoiser is None:
            return view_mean(backbone, canvas, canvases, shifts)
        with torch.no_grad():
            own = backbone(canvas.middle(canvases))
            return denoiser.to(canvases.device)(own.patches, own.prefix), own

    return teach


def distillation_loss(
    model: nn.Module, batch: TrainingBatch, teacher: Teacher, canvas: Canvas, prefix_weight: float = 1.0
) -> dict[str, Tensor]:
    """Compute :func:`compare` for a batch of :func:`~dvt.denoiser.distill.examples.canvas_batches`."""
    target, own = teacher(batch["canvas"], batch["shifts"])
    return compare(model(canvas.middle(batch["canvas"])), target, own, prefix_weight)


def compare(found: Tokens, target: Tensor, own: Tokens, prefix_weight: float = 0.0) -> dict[str, Tensor]:
    """Compute MSE + (1 - cosine) to the teacher's patch tokens, plus `prefix_weight` times that of the prefix tokens.

    Args:
        found: the student's tokens; registers that were added to the student are not compared, and a student of
            another model has no prefix tokens here.
        target: (B, h, w, C), resampled to the student's grid.
        own: the original backbone's tokens.
        prefix_weight: at least 0.

    Returns:
        "loss", "mse", "cosine", and "prefix_cosine" if the original has prefix tokens.
    """
    terms = reconstruction(found.patches.float(), grids.resample(target.float(), found.grid))
    count = own.prefix.shape[1]
    if count and found.prefix.shape[1]:
        kept = reconstruction(found.prefix[:, :count].float(), own.prefix.float())
        terms |= {"loss": terms["loss"] + prefix_weight * kept["loss"], "prefix_cosine": kept["cosine"]}
    return terms


@torch.no_grad()
def evaluate_student(
    student: nn.Module, teacher: Teacher, canvas: Canvas, batches: Iterable[TrainingBatch]
) -> dict[str, dict[str, float]]:
    """Average :func:`compare` over batches, without the prefix tokens' part of the loss.

    Returns:
        The scores of "student", and of "no_op", the original backbone, if the student is its copy.
    """
    device = next(student.parameters()).device

    def scored(batch: TrainingBatch) -> dict[str, dict[str, Tensor]]:
        images = batch["canvas"].to(device)
        target, own = teacher(images, batch["shifts"])
        found = {"student": student(canvas.middle(images))}
        if own.grid == found["student"].grid and found["student"].prefix.shape[1] >= own.prefix.shape[1]:
            found["no_op"] = own
        return {name: compare(tokens, target, own) for name, tokens in found.items()}

    return mean_scores(scored(batch) for batch in batches)
