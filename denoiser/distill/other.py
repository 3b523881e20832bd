"""Distill a teacher's tokens into another timm model, through a linear projection to the teacher's space."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.backbones import Backbone, families
from dvt.backbones.weights import read_described, save_state
from dvt.denoiser.distill.card import make_card, save_with_card
from dvt.denoiser.distill.config import BackboneTraining
from dvt.denoiser.distill.examples import held_out_batches
from dvt.denoiser.distill.job import check_distilled, image_sides, run_settings, train_student
from dvt.denoiser.distill.scores import Teacher, evaluate_student, make_teacher
from dvt.denoiser.distill.shifted import Canvas
from dvt.denoiser.distill.student import Student, layer_groups
from dvt.denoiser.model import Denoiser
from dvt.denoiser.pairs import TrainingBatch
from dvt.errors import BackboneError, ConfigError, WeightsError
from dvt.progress import Progress, is_first_process
from dvt.tokens import Tokens
from dvt.views import resize

_FITTED = 32  # images to which the first projection is fitted
_RIDGE = 1e-3  # of the first projection, relative to the mean variance of the student's channels


class OtherStudent(Student):
    """Copy a model so that it can be trained; it maps images (B, 3, H, W) in [0, 1] to Tokens in the teacher's space.

    Images are resized to the student's own input size. Its patch tokens (B, h', w', C') keep its own grid; the
    projection, linear with an offset, maps them to the teacher's C channels.
    """

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__(backbone)
        self.projection = nn.utils.skip_init(nn.Linear, backbone.feature_dim, channels).to(backbone.device)

    def forward(self, images: Tensor) -> Tokens:
        return Tokens.of(self.projection(self.seen(images).patches))

    def seen(self, images: Tensor) -> Tokens:
        """Compute the student's own tokens."""
        return self.backbone(resize(images, self.backbone.image_size))

    @torch.no_grad()
    def fit(self, teacher: Teacher, canvas: Canvas, batches: Iterable[TrainingBatch]) -> Tensor:
        """Fit the projection to the teacher's tokens in closed form (ridge); return the teacher's mean token (C,)."""
        wide, count = self.backbone.feature_dim + 1, 0
        squares = torch.zeros(wide, wide, dtype=torch.float64)
        products = torch.zeros(wide, self.projection.out_features, dtype=torch.float64)
        for batch in batches:
            images = batch["canvas"].to(self.backbone.device)
            own = self.seen(canvas.middle(images)).patches
            target = grids.resample(teacher(images, batch["shifts"])[0].float(), (own.shape[1], own.shape[2]))
            rows = nn.functional.pad(own.flatten(0, 2), (0, 1), value=1.0).double().cpu()
            squares += rows.T @ rows
            products += rows.T @ target.flatten(0, 2).double().cpu()
            count += len(rows)
        mean, spread = squares[-1, :-1] / count, squares.diagonal()[:-1] / count
        ridge = _RIDGE * count * float((spread - mean.square()).mean().clamp_min(1e-12))
        squares.diagonal()[:-1] += ridge
        solved = torch.linalg.solve(squares, products)
        self.projection.weight.copy_(solved[:-1].T)
        self.projection.bias.copy_(solved[-1])
        return (products[-1] / count).float()


def distill_student(
    backbone: Backbone,
    student: Backbone,
    images: Sequence[str | Path],
    out: str | Path,
    config: BackboneTraining | None = None,
    denoiser: Denoiser | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train another timm model to give, through a projection, a backbone's raw or clean tokens; or continue a run.

    Args:
        backbone: the teacher, as :func:`~dvt.denoiser.distill.job.distill_backbone` takes it.
        student: a backbone from :func:`dvt.load_backbone`, pretrained or random, at its own input size; not changed.
        images: paths of image files.
        out: the student's .safetensors file, for ``dvt.load_backbone(student.name, weights=out)``. The projection is
            written beside it, to NAME.projection.safetensors, for :func:`read_projection`.
        config: the training's settings; teacher "raw", "denoiser" or "views".
        denoiser: a denoiser for the backbone, if the teacher is "denoiser".
        progress: called with (what, done, total).

    Returns:
        A report ready for JSON, as that of :func:`~dvt.denoiser.distill.job.distill_backbone`. Its "baselines" are
        "mean", the teacher's mean token everywhere, and "start", the student as given with its best projection.

    Raises:
        As :func:`~dvt.denoiser.distill.job.distill_backbone`.
    """
    config, out, started = config or BackboneTraining(), Path(out), time.perf_counter()
    _check(backbone, student, out, config, denoiser)
    learnt, held, digest = image_sides(images, config)
    canvas = Canvas.of(backbone, config.shift if config.teacher == "views" else 0.0)
    teacher = make_teacher(backbone, canvas, denoiser, raw=config.teacher == "raw")
    model = OtherStudent(student, backbone.feature_dim)
    mean = model.fit(teacher, canvas, held_out_batches(learnt[:_FITTED], canvas, config))
    about = {"student": student.name, "student_weights": student.weights_sha256, "student_size": student.image_size}
    settings = run_settings(backbone, config, denoiser, digest) | about

    def validate(network: nn.Module) -> dict[str, dict[str, float]]:
        return evaluate_student(network, teacher, canvas, held_out_batches(held, canvas, config))

    baselines = {"mean": validate(_Constant(model, mean))["student"], "start": validate(model)["student"]}
    groups = layer_groups(model.backbone.model, config.layer_decay, config.loop.weight_decay, False, student.layer)
    groups.append({"params": list(model.projection.parameters()), "lr_scale": 1.0})
    done = train_student(model, groups, teacher, learnt, canvas, config, out, validate, settings, progress)
    report = {
        "teacher": config.teacher, "student": student.name, "grid": student.grid(student.image_size),
        "images": len(learnt) + len(held), "training": len(learnt), "held_out": len(held),
        "parameters": sum(p.numel() for p in model.parameters()), "steps": done.step,
        "checkpoint": str(done.checkpoint), "validation": validate(model)["student"], "baselines": baselines,
        "seconds": time.perf_counter() - started, "out": str(out), "projection": str(projection_file(out)),
    }  # fmt: skip
    if is_first_process():
        _save(model, out, make_card(student, model.backbone, config, denoiser, report), backbone)
    return report


def _check(
    backbone: Backbone, student: Backbone, out: Path, config: BackboneTraining, denoiser: Denoiser | None
) -> None:
    check_distilled(backbone, out, config, denoiser, other=True)
    if student.num_layers is None or not hasattr(families.core(student.model), "blocks"):
        raise BackboneError(f"the student {student.name} is no timm model with blocks; take one from dvt.load_backbone")
    if config.registers:
        raise ConfigError("registers are added to a copy of the backbone; choose a student that has them")


def _save(model: OtherStudent, out: Path, card: dict[str, Any], teacher: Backbone) -> None:
    """Write the projection, then the student."""
    identity = {name: getattr(teacher, name) for name in ("name", "weights_sha256", "layer")}
    about = {"student": json.dumps(model.backbone.weights_sha256)}
    save_state(projection_file(out), model.projection.state_dict(), about)
    save_with_card(model.backbone, out, {**card, "teacher": identity})


class _Constant(nn.Module):
    """Give the same token everywhere, on a student's grid."""

    def __init__(self, student: OtherStudent, token: Tensor) -> None:
        super().__init__()
        self.student, self.token = student, token

    def forward(self, images: Tensor) -> Tokens:
        grid = self.student.backbone.grid(self.student.backbone.image_size)
        return Tokens.of(self.token.to(images).expand(len(images), *grid, -1))


def projection_file(out: Path) -> Path:
    """Name the file of the projection that belongs to a student's file."""
    return out.with_suffix(".projection.safetensors")


def read_projection(path: str | Path) -> nn.Linear:
    """Read the projection from a student's tokens (..., C') to its teacher's (..., C).

    Raises:
        WeightsError: the file is missing, damaged, or holds something else.
    """
    _, tensors = read_described(path, "student", "a projection")
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["bias"] != shapes["weight"][:1]:
        raise WeightsError(f"{str(path)!r} holds {shapes}, not a projection written by `dvt distill --student`")
    layer = nn.Linear(*shapes["weight"][::-1])
    layer.load_state_dict(tensors)
    return layer
