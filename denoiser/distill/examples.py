"""Make training examples for fine-tuning a backbone: random parts of images, and the places of their shifted views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvt.denoiser.distill.config import BackboneTraining
from dvt.denoiser.distill.shifted import Canvas
from dvt.denoiser.pairs import TrainingBatch
from dvt.training import Batches, epoch_indices

_MOST_VALIDATED = 64  # images; each takes as many forward passes as there are views
_TRAINING, _SHIFTS, _VALIDATION = range(3)  # streams of random numbers


def canvas_batches(
    paths: Sequence[Path], canvas: Canvas, config: BackboneTraining, threads: Executor | None = None
) -> Batches:
    """Plan the batches of a run: "canvas" (B, 3, H', W'), and "shifts" (views, 3) that all images of a step share.

    Returns:
        A pure function (step, rank, world) for :func:`dvt.training.train`.
    """
    apply: Any = map if threads is None else threads.map  # both keep the order, and each place has its own generator
    loop = config.loop

    def batches(step: int, rank: int, world: int) -> TrainingBatch:
        part = loop.batch_size // world
        places = range(rank * part, (rank + 1) * part)
        indices = epoch_indices(step, loop.batch_size, len(paths), loop.seed)
        generators = [seeded(loop.seed, _TRAINING, step, place) for place in places]
        images = apply(lambda i, g: canvas.read(paths[i], config.scale, g), [indices[p] for p in places], generators)
        shifts = canvas.draw_shifts(config.views, seeded(loop.seed, _SHIFTS, step))
        return {"canvas": torch.stack(list(images)), "shifts": shifts}

    return batches


def seeded(*entropy: int) -> torch.Generator:
    """Make a generator from several integers; different integers give independent random numbers."""
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def held_out_batches(paths: Sequence[Path], canvas: Canvas, config: BackboneTraining) -> Iterator[TrainingBatch]:
    """Yield one batch per held-out image, the same batches every time."""
    for i, path in enumerate(paths[:_MOST_VALIDATED]):
        generator = seeded(config.loop.seed, _VALIDATION, i)
        image = canvas.read(path, config.scale, generator)
        yield {"canvas": image[None], "shifts": canvas.draw_shifts(config.views, generator)}
