"""Fine-tune a whole backbone so that its own tokens are denoised, at no cost when it is used (stage three).

The teacher is a denoiser after the frozen backbone (Denoising ViT, arXiv 2401.02957), or the mean of the frozen
backbone's tokens over shifted and mirrored views (Post Hoc Registers, arXiv 2505.21501;
:mod:`dvt.denoiser.distill.shifted`). With the latter, register tokens are usually added to the student.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dvt.backbones import Backbone, families, weights_sha256
from dvt.denoiser.distill.card import make_card, read_card, save_with_card
from dvt.denoiser.distill.config import BackboneTraining
from dvt.denoiser.distill.examples import canvas_batches, held_out_batches, seeded
from dvt.denoiser.distill.scores import Teacher, distillation_loss, evaluate_student, make_teacher
from dvt.denoiser.distill.shifted import Canvas
from dvt.denoiser.distill.student import Student, layer_groups
from dvt.denoiser.model import Denoiser
from dvt.denoiser.pairs import split
from dvt.errors import BackboneError, ConfigError, ImageError
from dvt.images import readable, size_and_sha256
from dvt.progress import Progress, is_first_process
from dvt.text import counted
from dvt.training import Trained, sides_digest, train

__all__ = ["BackboneTraining", "distill_backbone", "read_card"]


def distill_backbone(
    backbone: Backbone,
    images: Sequence[str | Path],
    out: str | Path,
    config: BackboneTraining | None = None,
    denoiser: Denoiser | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune a copy of a backbone to its teacher's tokens, or continue an interrupted run.

    The result is a .safetensors file with timm's names, for ``dvt.load_backbone(name, weights=out)`` and, with the
    options in its card's "create_model", for ``timm.create_model(name, **options).load_state_dict(...)``;
    :func:`read_card` reads its card. Checkpoints and log.csv are in a folder named like `out`, with ".run" in place of
    ".safetensors". With ``accelerate launch`` or ``torchrun``, all of their processes take part.

    Args:
        backbone: a backbone from :func:`dvt.load_backbone`, with the input size to train at, on the device to train on;
            it is not changed. If it reads an earlier layer than the last, the blocks after that layer are not trained.
        images: paths of image files.
        out: the .safetensors file to write; it is whole or absent.
        config: the training's settings.
        denoiser: a denoiser for this backbone and layer, if the teacher is "denoiser".
        progress: called with (what, done, total).

    Returns:
        A report ready for JSON: counts, steps, seconds, "validation" (loss, MSE, cosine, and the prefix tokens'
        cosine to the original ones, on the held-out images) and "baselines" (the same scores of the original backbone).

    Raises:
        BackboneError: the backbone is not a timm model, or the denoiser was made for another one.
        ImageError: there are fewer than two different images; an unreadable image is left out and logged.
        ConfigError: teacher and denoiser contradict each other, the family has no registers, `out` is not a
            .safetensors file, or its run has other settings.
        NonFiniteError: the loss is not finite.
    """
    config, out, started = config or BackboneTraining(), Path(out), time.perf_counter()
    check_distilled(backbone, out, config, denoiser)
    learnt, held, digest = image_sides(images, config)
    student = Student(backbone, config.registers, seeded(config.loop.seed))
    canvas = Canvas.of(backbone, config.shift if config.teacher == "views" else 0.0)
    teacher = make_teacher(backbone, canvas, denoiser)
    settings = run_settings(backbone, config, denoiser, digest)

    def validate(model: nn.Module) -> dict[str, dict[str, float]]:
        return evaluate_student(model, teacher, canvas, held_out_batches(held, canvas, config))

    groups = layer_groups(
        student.backbone.model, config.layer_decay, config.loop.weight_decay, config.registers > 0, backbone.layer
    )
    done = train_student(student, groups, teacher, learnt, canvas, config, out, validate, settings, progress)
    scores = validate(student)
    report: dict[str, Any] = {
        "teacher": config.teacher,
        "registers": config.registers,
        "images": len(learnt) + len(held),
        "training": len(learnt),
        "held_out": len(held),
        "parameters": sum(p.numel() for p in student.parameters()),
        "steps": done.step,
        "checkpoint": str(done.checkpoint),
        "validation": scores["student"],
        "baselines": {"no_op": scores["no_op"]},
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    if is_first_process():
        save_with_card(student.backbone, out, make_card(backbone, student.backbone, config, denoiser, report))
    return report


def image_sides(images: Sequence[str | Path], config: BackboneTraining) -> tuple[list[Path], list[Path], str]:
    """Split images into those to learn from and those held out; the third value identifies both.

    Raises:
        ImageError: there are fewer than two different images; an unreadable image is left out and logged.
    """
    found = readable(images, size_and_sha256)
    paths, sha256s = [Path(images[i]) for i in found], [sha256 for _, sha256 in found.values()]
    if len(set(sha256s)) < 2:
        raise ImageError(
            f"{counted(len(paths), 'file')} given, of {counted(len(set(sha256s)), 'different image')}; distillation "
            "needs at least 2, one of them held out for validation, and many more to be of use"
        )
    sides = split(sha256s, config.validation, config.loop.seed)
    learnt, held = ([paths[i] for i in side] for side in sides)
    return learnt, held, sides_digest(*([sha256s[i] for i in side] for side in sides))


def check_distilled(
    backbone: Backbone, out: Path, config: BackboneTraining, denoiser: Denoiser | None, other: bool = False
) -> None:
    """Check the arguments of a distillation before anything is computed; `other`: the student is another model."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"a backbone is written to a .safetensors file, got {str(out)!r}")
    if backbone.num_layers is None or not hasattr(families.core(backbone.model), "blocks"):
        raise BackboneError(
            f"{backbone.name} is a wrapped model, whose parameters and layers are not timm's. Distill a backbone from "
            "dvt.load_backbone"
        )
    if config.teacher == "raw" and not other:
        raise ConfigError("the teacher 'raw' is for a student of another model; a backbone has its own tokens already")
    if (denoiser is None) != (config.teacher != "denoiser"):
        needs = "needs a denoiser" if denoiser is None else "uses no denoiser, but one was given"
        others = "'views' or 'raw'" if other else "'views'"
        raise ConfigError(
            f"the teacher {config.teacher!r} {needs}; choose the teacher 'denoiser' with one, or {others} "
            "(on the command line: --denoiser FILE, or --teacher)"
        )
    if denoiser is not None:
        denoiser.check_fits(backbone)


def train_student(
    student: Student,
    groups: list[dict[str, Any]],
    teacher: Teacher,
    paths: Sequence[Path],
    canvas: Canvas,
    config: BackboneTraining,
    out: Path,
    validate: Callable[[nn.Module], Mapping[str, Mapping[str, float]]],
    settings: Mapping[str, Any],
    progress: Progress | None,
) -> Trained:
    """Train a student, in the run's folder beside `out`; `groups` are its parameters with their learning rates."""
    if config.grad_checkpointing:
        _save_memory(student.backbone.model)
    loss = partial(distillation_loss, teacher=teacher, canvas=canvas, prefix_weight=config.prefix_weight)

    def row(model: nn.Module) -> dict[str, float]:
        scores = validate(model)
        found = {f"validation_{name}": value for name, value in scores["student"].items()}
        return found | {f"no_op_{name}": scores["no_op"][name] for name in ("loss", "cosine") if "no_op" in scores}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images") as threads:
        return train(
            student,
            loss,
            canvas_batches(paths, canvas, config, threads),
            config.loop,
            out.with_suffix(".run"),
            groups=groups,
            validate=row,
            progress=progress,
            settings=settings,
        )


def _save_memory(model: nn.Module) -> None:
    try:
        families.core(model).set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise ConfigError(
            f"timm's {type(model).__name__} has no gradient checkpointing; train with grad_checkpointing=False"
        ) from error


# Settings that change the numbers of a run, besides those of its loop.
_SETTINGS = ("teacher", "views", "shift", "registers", "prefix_weight", "layer_decay", "scale")


def run_settings(
    backbone: Backbone, config: BackboneTraining, denoiser: Denoiser | None, images: str
) -> dict[str, Any]:
    """List what a run that is continued must agree in; `images` is the digest of :func:`image_sides`."""
    return {
        **{name: getattr(config, name) for name in _SETTINGS},
        "backbone": backbone.weights_sha256,
        "layer": backbone.layer,
        "stride": backbone.stride,
        "size": backbone.image_size,
        **backbone.precision_setting,
        "denoiser": None if denoiser is None else f"{weights_sha256(denoiser)} at strength {denoiser.strength}",
        "images": images,
    }
