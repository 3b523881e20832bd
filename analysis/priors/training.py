"""Train a prior on tokens, in a run that can be continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvt.analysis.priors.codebook import Codebook
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.run_folder import keep_run
from dvt.analysis.priors.sampling import held_out_loss
from dvt.analysis.priors.token_set import Rows
from dvt.progress import Progress, is_first_process
from dvt.training import Trained, TrainingConfig, epoch_indices, train

_CODED = 2000  # number of maps to which a codebook is fitted


def fit_prior(
    prior: Prior,
    data: tuple[Rows, Rows | None],
    held_out: tuple[Rows, Rows | None],
    config: TrainingConfig,
    folder: str | Path,
    *,
    on_checkpoint: Callable[[Path], bool | None] | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    progress: Progress | None = None,
    settings: dict[str, Any] | None = None,
) -> Trained:
    """Train a prior in place on maps and conditions; also used for a second stage, after `swap_condition`.

    The folder then holds all that :func:`dvt.analysis.priors.runs.sample_prior` needs; a prior whose card has no target
    is sampled as features.

    Args:
        prior: the prior, on the device to train on.
        data: (N, h, w, D) standardised target tokens, and their conditions (N, M, C) or None; tensors, or objects that
            read rows when they are indexed.
        held_out: the same for images not trained on, for "held_out_loss" in the log.
        config: settings of the training; equal settings continue the run that the folder holds.
        folder: the run's folder.
        validate: computes further numbers for the log.
        on_checkpoint, progress, settings: arguments of :func:`dvt.training.train`.
    """
    maps, conditions = data
    if prior.config.codes and not bool(prior.head.centres.any()):
        rows = torch.randperm(len(maps), generator=torch.Generator().manual_seed(config.seed))[:_CODED]
        known = maps[rows.sort().values.tolist()].float().flatten(0, 2)
        prior.head.centres.copy_(Codebook.fit(known, prior.config.codes, config.seed).centres)

    def batches(step: int, rank: int, world: int) -> dict[str, Tensor]:
        chosen, part = epoch_indices(step, config.batch_size, len(maps), config.seed), config.batch_size // world
        rows = chosen[rank * part : (rank + 1) * part]
        seed = np.random.SeedSequence((config.seed, step, rank)).generate_state(1)[0]
        batch = {"maps": maps[rows], "seed": torch.tensor(int(seed))}
        return batch if conditions is None else {**batch, "conditions": conditions[rows]}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator(batch["maps"].device).manual_seed(int(batch["seed"]))
        return {"loss": prior.loss(batch["maps"].float(), batch.get("conditions"), generator)}

    def measured(model: nn.Module) -> dict[str, float]:
        return {"held_out_loss": held_out_loss(prior, *held_out), **(validate() if validate else {})}

    done = train(
        prior,
        loss,
        batches,
        config,
        folder,
        validate=measured,
        on_checkpoint=on_checkpoint,
        progress=progress,
        settings=settings,
    )
    if is_first_process() and not (Path(folder) / "held_out.safetensors").exists():
        keep_run(Path(folder), prior, held_out)
    return done
