"""Stage 3: the whole backbone fine-tuned, so that its own tokens are the denoised ones; at no cost when it is used.

The teacher is a denoiser behind the frozen backbone (Denoising ViT, arXiv 2401.02957), or the mean of the frozen
backbone's tokens over shifted and mirrored views (Post Hoc Registers, arXiv 2505.21501;
:mod:`dvt.denoiser.distill.shifted`), then usually with register tokens added to the student.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dvt.backbones import Backbone, families, weights_sha256
from dvt.backbones.weights import save_state
from dvt.denoiser.distill.shifted import Canvas, view_mean
from dvt.denoiser.distill.student import Student, layer_groups
from dvt.denoiser.model import Denoiser
from dvt.denoiser.train import Batch, reconstruction, split
from dvt.errors import BackboneError, ConfigError, ImageError, WeightsError
from dvt.images import file_sha256
from dvt.progress import Progress
from dvt.tokens import Tokens
from dvt.training import Batches, Trained, TrainingConfig, epoch_indices, train

SCHEMA = "dvt-backbone/1"
#: The key of the safetensors metadata under which the card is stored as JSON.
METADATA = "dvt"

#: (canvases, shifts) to the patch tokens to learn (B, h, w, C), and the frozen backbone's own tokens of the window.
Teacher = Callable[[Tensor, Tensor], tuple[Tensor, Tokens]]

_MOST_VALIDATED = 64  # images; each takes as many forward passes as there are views
_TRAINING, _SHIFTS, _VALIDATION = range(3)  # streams of random numbers


@dataclass(frozen=True)
class BackboneTraining:
    """How a backbone is fine-tuned. Its input size is the one that it was loaded with.

    Args:
        teacher: "denoiser", the frozen backbone with a denoiser behind it, or "views", the mean of the frozen
            backbone's tokens over shifted and mirrored views.
        views: shifted views an image, for the teacher "views"; every other one is mirrored.
        shift: largest shift of a view, as a share of the input's side, in (0, 1]. Artifacts finer than this are
            averaged away; at 1 a patch is seen at all positions alike, and no artifact of position remains, but only a
            quarter of the views show it. Images are seen at least (1 + 2 shift) times enlarged.
        registers: register tokens to add behind the prefix tokens.
        prefix_weight: weight of the second half of the loss, which keeps class token and old registers what they were.
        layer_decay: factor on the learning rate from a block to the one before it, in (0, 1]; 1 for none.
        grad_checkpointing: compute activations twice to hold fewer of them.
        scale: smallest and largest share of an image's area that an example shows, of what its aspect ratio allows.
        steps: optimizer steps.
        batch_size: images a step, over all processes together.
        learning_rate: the highest, of the last layer and of added registers.
        min_learning_rate: at the last step.
        warmup: share of the steps during which the learning rate rises.
        weight_decay: of the matrices (AdamW), not of what timm says should have none.
        clip: largest L2 norm of the gradient; 0 for no limit.
        ema: decay of the averaged weights, which are the result; 0 for the last weights.
        precision: "no" for float32, or "bf16" or "fp16".
        validation: share of the images that is held out, in (0, 1); at least one image. At most 64 are used.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        log_every: steps between rows of the log.
        seed: of added registers, the order of the images, their crops and shifts, and the choice of those held out.
        trackers: "tensorboard" and "wandb", beside log.csv.

    Raises:
        ConfigError: a value is outside its range.
    """

    teacher: Literal["denoiser", "views"] = "denoiser"
    views: int = 10
    shift: float = 0.5
    registers: int = 0
    prefix_weight: float = 1.0
    layer_decay: float = 0.9
    grad_checkpointing: bool = False
    scale: tuple[float, float] = (0.3, 1.0)
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.99
    precision: Literal["no", "bf16", "fp16"] = "no"
    validation: float = 0.1
    validate_every: int = 200
    checkpoint_every: int = 500
    log_every: int = 10
    seed: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if self.teacher not in ("denoiser", "views"):
            raise ConfigError(f"there is no teacher {self.teacher!r}; it must be 'denoiser' or 'views'")
        if self.views < 1:
            raise ConfigError(f"views must be at least 1, got {self.views}")
        if self.registers < 0:
            raise ConfigError(f"registers is the number of tokens to add, at least 0, got {self.registers}")
        if not self.prefix_weight >= 0:
            raise ConfigError(f"prefix_weight must be at least 0, got {self.prefix_weight}")
        for name in ("shift", "layer_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"scale must satisfy 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation is a share of the images in (0, 1), got {self.validation}")
        self.training()

    def training(self) -> TrainingConfig:
        """What the training loop is told."""
        return TrainingConfig.of(self)


# -- examples and loss -----------------------------------------------------------------------------------------------


def batches_of(
    paths: Sequence[Path], canvas: Canvas, config: BackboneTraining, threads: Executor | None = None
) -> Batches:
    """The batches of a run: "canvas" (B, 3, H', W') and "shifts" (views, 3), the same shifts for all images of a step.

    Returns:
        A pure function (step, rank, world) for :func:`dvt.training.train`.
    """
    apply: Any = map if threads is None else threads.map

    def batches(step: int, rank: int, world: int) -> Batch:
        part = config.batch_size // world
        places = range(rank * part, (rank + 1) * part)
        indices = epoch_indices(step, config.batch_size, len(paths), config.seed)
        generators = [_generator(config.seed, _TRAINING, step, place) for place in places]
        images = apply(lambda i, g: canvas.read(paths[i], config.scale, g), [indices[p] for p in places], generators)
        shifts = canvas.draw_shifts(config.views, _generator(config.seed, _SHIFTS, step))
        return {"canvas": torch.stack(list(images)), "shifts": shifts}

    return batches


def _generator(*entropy: int) -> torch.Generator:
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def distillation_loss(
    model: nn.Module, batch: Batch, teacher: Teacher, canvas: Canvas, prefix_weight: float
) -> dict[str, Tensor]:
    """The loss of a batch of :func:`batches_of`, for :func:`dvt.training.train`: see :func:`compare`."""
    target, own = teacher(batch["canvas"], batch["shifts"])
    return compare(model(canvas.middle(batch["canvas"])), target, own, prefix_weight)


def compare(found: Tokens, target: Tensor, own: Tokens, prefix_weight: float = 0.0) -> dict[str, Tensor]:
    """MSE + (1 - cosine) to the teacher's patch tokens, and `prefix_weight` times the same to the original prefix.

    Args:
        found: the student's tokens; registers that were added to it are free.
        target: (B, h, w, C).
        own: the original backbone's tokens.
        prefix_weight: at least 0.

    Returns:
        "loss", "mse", "cosine", and "prefix_cosine" where the original has prefix tokens.
    """
    terms = reconstruction(found.patches.float(), target.float())
    if count := own.prefix.shape[1]:
        kept = reconstruction(found.prefix[:, :count].float(), own.prefix.float())
        terms |= {"loss": terms["loss"] + prefix_weight * kept["loss"], "prefix_cosine": kept["cosine"]}
    return terms


@torch.no_grad()
def evaluate(
    student: nn.Module, teacher: Teacher, canvas: Canvas, batches: Iterable[Batch]
) -> dict[str, dict[str, float]]:
    """Means over batches of :func:`compare`, without the prefix's part of the loss.

    Returns:
        "student", and "no_op", the original backbone.
    """
    totals: dict[str, Counter[str]] = {"student": Counter(), "no_op": Counter()}
    device, count = next(student.parameters()).device, 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        images = batch["canvas"].to(device)
        target, own = teacher(images, batch["shifts"])
        for name, found in (("student", student(canvas.middle(images))), ("no_op", own)):
            totals[name].update({key: float(value) for key, value in compare(found, target, own).items()})
    return {name: {key: value / count for key, value in total.items()} for name, total in totals.items()}


# -- the job ----------------------------------------------------------------------------------------------------------


def distill_backbone(
    backbone: Backbone,
    images: Sequence[str | Path],
    out: str | Path,
    config: BackboneTraining | None = None,
    denoiser: Denoiser | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tunes a copy of a backbone to its teacher's tokens, or continues a run that was interrupted.

    The result is a .safetensors file with timm's names, for ``dvt.load_backbone(name, weights=out)`` and, with the
    options in its card's "create_model", for ``timm.create_model(name, **options).load_state_dict(...)``; its card is
    read by :func:`read_card`. Checkpoints and log.csv are in the folder `out` with ".run" in place of
    ".safetensors". Started by ``accelerate launch`` or ``torchrun`` it uses all of their processes.

    Args:
        backbone: of :func:`dvt.load_backbone`, with the input size to train at, on the device to train on; it is
            not changed. An earlier layer than the last leaves the blocks after it as they are.
        images: files.
        out: the .safetensors file to write, whole or not at all.
        config: how.
        denoiser: of this backbone and layer, for the teacher "denoiser".
        progress: called with (what, done, total).

    Returns:
        A report ready for JSON: counts, steps, seconds, "validation" (loss, MSE, cosine, and the prefix tokens'
        cosine to the original ones, on the held-out images) and "baselines" (the same of the original backbone).

    Raises:
        BackboneError: the backbone is not a timm model, or the denoiser was made for another one.
        ImageError: fewer than two different images, or an unreadable one.
        ConfigError: teacher and denoiser contradict each other, the family has no registers, `out` is not a
            .safetensors file, or its run has other settings.
        NonFiniteError: the loss is not finite.
    """
    config, out, started = config or BackboneTraining(), Path(out), time.perf_counter()
    _check(backbone, out, config, denoiser)
    paths = [Path(path) for path in images]
    sha256s = [file_sha256(path) for path in paths]
    if len(set(sha256s)) < 2:
        raise ImageError(
            f"{len(paths)} files hold {len(set(sha256s))} different image; distillation needs at least 2, one of them "
            "held out for validation, and many more to be of use"
        )
    chosen, held = split(sha256s, config.validation, config.seed)
    student = Student(backbone, config.registers, _generator(config.seed))
    canvas = Canvas.of(backbone, config.shift if config.teacher == "views" else 0.0)
    teacher = _teacher(backbone, canvas, denoiser)
    settings = _settings(backbone, config, denoiser, [sha256s[i] for i in chosen], [sha256s[i] for i in held])

    def validate(model: nn.Module) -> dict[str, dict[str, float]]:
        return evaluate(model, teacher, canvas, _held_out([paths[i] for i in held], canvas, config))

    done = _train(student, teacher, [paths[i] for i in chosen], canvas, config, out, validate, settings, progress)
    scores = validate(student)
    report: dict[str, Any] = {
        "teacher": config.teacher,
        "registers": config.registers,
        "images": len(paths),
        "training": len(chosen),
        "held_out": len(held),
        "parameters": sum(p.numel() for p in student.parameters()),
        "steps": done.step,
        "checkpoint": str(done.checkpoint),
        "validation": scores["student"],
        "baselines": {"no_op": scores["no_op"]},
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _save(student.backbone, out, _card(backbone, student.backbone, config, denoiser, report))
    return report


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a backbone that :func:`distill_backbone` wrote: what it was made of, and how good it became.

    Raises:
        WeightsError: the file is missing, damaged, or not such a backbone.
    """
    try:
        with safe_open(path, "pt", device="cpu") as file:
            card = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"cannot read a distilled backbone from {str(path)!r}: {error}") from error
    if not isinstance(card, dict) or card.get("schema") != SCHEMA:
        raise WeightsError(f"{str(path)!r} has no card of schema {SCHEMA!r}; `dvt distill` writes files that have")
    return card


def _check(backbone: Backbone, out: Path, config: BackboneTraining, denoiser: Denoiser | None) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError(f"a backbone is written to a .safetensors file, got {str(out)!r}")
    if backbone.num_layers is None or not hasattr(families.core(backbone.model), "blocks"):
        raise BackboneError(
            f"{backbone.name} is a wrapped model: its parameters have no names and layers that timm knows. Distil a "
            "backbone of dvt.load_backbone"
        )
    if (denoiser is None) != (config.teacher == "views"):
        needs = "needs a denoiser" if denoiser is None else "uses no denoiser, but one was given"
        raise ConfigError(f"the teacher {config.teacher!r} {needs}; choose the teacher 'denoiser' with one, or 'views'")
    if denoiser is not None:
        denoiser.check_fits(backbone)


def _teacher(backbone: Backbone, canvas: Canvas, denoiser: Denoiser | None) -> Teacher:
    """The denoiser behind the frozen backbone, or without one the mean over views."""

    def teach(canvases: Tensor, shifts: Tensor) -> tuple[Tensor, Tokens]:
        backbone.to(canvases.device)  # which accelerate chooses where there are several processes
        if denoiser is None:
            return view_mean(backbone, canvas, canvases, shifts)
        with torch.no_grad():
            own = backbone(canvas.middle(canvases))
            return denoiser.to(canvases.device)(own.patches, own.prefix), own

    return teach


def _held_out(paths: Sequence[Path], canvas: Canvas, config: BackboneTraining) -> Iterator[Batch]:
    """One batch an image, always the same ones."""
    for i, path in enumerate(paths[:_MOST_VALIDATED]):
        generator = _generator(config.seed, _VALIDATION, i)
        image = canvas.read(path, config.scale, generator)
        yield {"canvas": image[None], "shifts": canvas.draw_shifts(config.views, generator)}


def _train(
    student: Student,
    teacher: Teacher,
    paths: Sequence[Path],
    canvas: Canvas,
    config: BackboneTraining,
    out: Path,
    validate: Callable[[nn.Module], Mapping[str, Mapping[str, float]]],
    settings: Mapping[str, Any],
    progress: Progress | None,
) -> Trained:
    model: Any = student.backbone.model
    if config.grad_checkpointing:
        _save_memory(model)
    loss = partial(distillation_loss, teacher=teacher, canvas=canvas, prefix_weight=config.prefix_weight)

    def row(model: nn.Module) -> dict[str, float]:
        scores = validate(model)
        beside = {f"no_op_{name}": scores["no_op"][name] for name in ("loss", "cosine")}
        return {**{f"validation_{name}": value for name, value in scores["student"].items()}, **beside}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images") as threads:
        return train(
            student,
            loss,
            batches_of(paths, canvas, config, threads),
            config.training(),
            out.with_suffix(".run"),
            groups=layer_groups(
                model, config.layer_decay, config.weight_decay, config.registers > 0, student.backbone.layer
            ),
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


# What changes the numbers of a run beside the settings of its loop.
_SETTINGS = ("teacher", "views", "shift", "registers", "prefix_weight", "layer_decay", "scale")


def _settings(
    backbone: Backbone, config: BackboneTraining, denoiser: Denoiser | None, chosen: list[str], held: list[str]
) -> dict[str, Any]:
    images = hashlib.sha256("/".join(",".join(side) for side in (chosen, held)).encode()).hexdigest()
    return {
        **{name: getattr(config, name) for name in _SETTINGS},
        "backbone": backbone.weights_sha256,
        "layer": backbone.layer,
        "stride": backbone.stride,
        "size": backbone.image_size,
        "denoiser": None if denoiser is None else f"{weights_sha256(denoiser)} at strength {denoiser.strength}",
        "images": images,
    }


def _card(
    original: Backbone,
    result: Backbone,
    config: BackboneTraining,
    denoiser: Denoiser | None,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    model: Any = result.model
    options: dict[str, Any] = {"num_classes": 0}
    if config.registers:
        options[families.REGISTERS[type(model).__name__]] = model.reg_token.shape[1]
    if families.sizing(model) in ("loaded", "square"):
        options["img_size"] = list(result.image_size)
    return {
        "schema": SCHEMA,
        **{name: getattr(original, name) for name in ("name", "layer", "stride", "feature_dim")},
        "size": original.image_size,
        "create_model": options,
        "original_weights_sha256": original.weights_sha256,
        "weights_sha256": result.weights_sha256,
        "denoiser": None if denoiser is None else {"sha256": weights_sha256(denoiser), **denoiser.card},
        "data": {name: report[name] for name in ("images", "training", "held_out")},
        "training": asdict(config),
        "steps": report["steps"],
        "metrics": {name: report[name] for name in ("validation", "baselines")},
    }


def _save(backbone: Backbone, path: Path, card: Mapping[str, Any]) -> None:
    """Under its name only when it is whole."""
    save_state(path, backbone.model.state_dict(), {"format": "pt", METADATA: json.dumps(card)})
