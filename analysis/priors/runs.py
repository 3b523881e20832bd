"""Generative priors as jobs: train one on images and a backbone, sample from its folder, measure what it holds.

A run's folder holds

    prior.safetensors      weights, config, and where it comes from
    held_out.safetensors   a few held-out images: conditions, small pictures, targets; and features of all images
    samples/step-*.png     samples beside the images that they were conditioned on, one file a checkpoint
    log.csv, step-*/       as :mod:`dvt.training` writes them
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.sampling import (
    PriorRun,
    evaluate_prior,
    held_out_loss,
    keep,
    open_run,
    sample_prior,
    summaries,
)
from dvt.analysis.priors.targets import PriorTarget, TargetKind
from dvt.analysis.priors.token_set import (
    BATCH,
    CONDITIONS,
    Clean,
    Condition,
    TokenSet,
    read_tokens,
    split,
    token_identity,
)
from dvt.backbones import Backbone
from dvt.errors import ConfigError, NonFiniteError
from dvt.images import file_sha256, find_images
from dvt.progress import Progress
from dvt.training import Trained, TrainingConfig, epoch_indices, train

__all__ = ["PriorRun", "PriorTraining", "evaluate_prior", "fit_prior", "open_run", "sample_prior", "train_prior"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PriorTraining:
    """How a prior is trained.

    Args:
        condition: tokens of the frozen backbone that it is told: "cls" (a picture's kind, no layout), "patch" (the
            layout), "both", or None for an unconditional prior.
        target: what it generates: "pixels", "latents" of a VAE, or the backbone's "features".
        head: "image" denoises all target tokens at once (Lumos), "token" one after the other (MAR, Fluid).
        order: of a token head: "random" (MAR) or "raster" (causal).
        side: of the square pictures generated, in pixels; of features, of the pictures shown.
        patch: pixels, or cells of the latent, along the side of a target token.
        vae: folder of a diffusers AutoencoderKL, for latents.
        width: channels of the transformer.
        depth: its blocks.
        heads: attention heads.
        drop: share of conditions dropped in training, for guidance.
        held_out: share of the images that is held out; at least 2 images, and at most 64.
        steps: optimizer steps.
        batch_size: images a step, over all processes together.
        learning_rate: the highest.
        min_learning_rate: at the last step.
        warmup: share of the steps during which the learning rate rises.
        weight_decay: of the matrices (AdamW).
        clip: largest L2 norm of the gradient; 0 for no limit.
        ema: decay of the averaged weights, which are the result; 0 for the last weights.
        precision: "no" for float32, or "bf16" or "fp16".
        validate_every: steps between measurements of the held-out loss.
        checkpoint_every: steps between checkpoints, each with a picture of samples.
        log_every: steps between rows of the log.
        seed: of the initial weights, the order of the images, the noise and the choice of those held out.
        trackers: "tensorboard" and "wandb", beside log.csv.

    Raises:
        ConfigError: a value is outside its range.
    """

    condition: Condition | None = "patch"
    target: TargetKind = "pixels"
    head: Literal["image", "token"] = "image"
    order: Literal["random", "raster"] = "random"
    side: int = 64
    patch: int = 4
    vae: str | None = None
    width: int = 256
    depth: int = 6
    heads: int = 4
    drop: float = 0.1
    held_out: float = 0.1
    steps: int = 20_000
    batch_size: int = 64
    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    precision: Literal["no", "bf16", "fp16"] = "no"
    validate_every: int = 500
    checkpoint_every: int = 2000
    log_every: int = 20
    seed: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if self.condition is not None and self.condition not in CONDITIONS:
            raise ConfigError(f"there is no condition {self.condition!r}; it is one of {', '.join(CONDITIONS)} or None")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is a share of the images in (0, 1), got {self.held_out}")
        if self.side < 1 or self.patch < 1 or (self.target == "pixels" and self.side % self.patch):
            raise ConfigError(f"side must be a multiple of the patch {self.patch}, got {self.side} pixels")
        PriorTarget(self.target, self.patch, self.vae)
        self.training()
        self.prior((1, 1), 1, None, None)

    def training(self) -> TrainingConfig:
        """What the training loop is told."""
        return TrainingConfig.of(self)

    def prior(
        self,
        grid: tuple[int, int],
        token_dim: int,
        condition_dim: int | None,
        condition_grid: tuple[int, int] | None,
    ) -> PriorConfig:
        """What the prior is made of, for these tokens."""
        names = ("head", "order", "width", "depth", "heads", "drop")
        return PriorConfig(
            grid, token_dim, condition_dim, condition_grid, **{name: getattr(self, name) for name in names}
        )


# --- training


def fit_prior(
    prior: Prior,
    data: tuple[Tensor, Tensor | None],
    held_out: tuple[Tensor, Tensor | None],
    config: TrainingConfig,
    folder: str | Path,
    *,
    on_checkpoint: Callable[[Path], bool | None] | None = None,
    progress: Progress | None = None,
    settings: dict[str, Any] | None = None,
) -> Trained:
    """Trains a prior in place on maps and conditions that are in memory; also the second stage, after a swap.

    Args:
        prior: on the device to train on.
        data: (N, h, w, D) standardised target tokens and their conditions (N, M, C), None for none.
        held_out: the same of images that are not trained on, for "held_out_loss" in the log.
        config: how; the same settings continue the run that the folder holds.
        folder: of the run.
        on_checkpoint, progress, settings: of :func:`dvt.training.train`.
    """
    maps, conditions = data

    def batches(step: int, rank: int, world: int) -> dict[str, Tensor]:
        chosen, part = epoch_indices(step, config.batch_size, len(maps), config.seed), config.batch_size // world
        rows = chosen[rank * part : (rank + 1) * part]
        seed = np.random.SeedSequence((config.seed, step, rank)).generate_state(1)[0]
        batch = {"maps": maps[rows], "seed": torch.tensor(int(seed))}
        return batch if conditions is None else {**batch, "conditions": conditions[rows]}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator(batch["maps"].device).manual_seed(int(batch["seed"]))
        return {"loss": prior.loss(batch["maps"].float(), batch.get("conditions"), generator)}

    def validate(model: nn.Module) -> dict[str, float]:
        return {"held_out_loss": held_out_loss(prior, *held_out)}

    return train(
        prior,
        loss,
        batches,
        config,
        folder,
        validate=validate,
        on_checkpoint=on_checkpoint,
        progress=progress,
        settings=settings,
    )


def train_prior(
    images: str | Path | Sequence[str | Path],
    backbone: Backbone,
    out: str | Path,
    config: PriorTraining | None = None,
    denoiser: Clean | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Trains a prior on images and the tokens that a backbone sees in them, or continues a run.

    Images are cut to their middle square. The tokens of all images stay in memory, two bytes a value. Started by
    ``accelerate launch`` or ``torchrun`` it uses all of their processes.

    Args:
        images: files, folders, globs or lists, as :func:`dvt.images.find_images` takes them.
        backbone: whose tokens are the condition.
        out: the run's folder.
        config: how.
        denoiser: makes Tokens of Tokens; None for raw ones.
        progress: called with (what, done, total), what being "look", "features" or "train".
        device: where to train; None for a GPU if there is one.

    Returns:
        A report ready for JSON: counts, "loss" at the end, "held_out_loss", seconds, paths.

    Raises:
        ConfigError: too few images, a condition that the backbone does not have, or a folder of another run.
        NonFiniteError: tokens or the loss are not finite; the latter names the last checkpoint.
    """
    config, out, started = config or PriorTraining(), Path(out), time.perf_counter()
    progress = progress or (lambda what, done, total: None)
    paths = find_images([images] if isinstance(images, (str, Path)) else images)
    sha256s = [file_sha256(path) for path in paths]
    chosen, held = split(sha256s, config.held_out, config.seed)
    wants = config.target == "features"
    seen = read_tokens(paths, backbone, config.condition, wants, config.side, denoiser, progress)
    target, maps = _standardised(config, seen, chosen)
    prior = _untrained(config, maps, seen, backbone)
    prior.card = {
        **token_identity(backbone, denoiser),
        "condition": config.condition,
        "target": asdict(target),
        "training": asdict(config),
        "data": {"images": len(paths), "held_out": len(held), "sha256": _digest(sha256s, chosen, held)},
    }
    prior.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def on_checkpoint(path: Path) -> None:
        # Not before: a run of other settings is refused by then, and its folder must stay as it is.
        if not (kept := out / "held_out.safetensors").exists():
            real = summaries(seen, backbone, denoiser, progress)
            keep(kept, seen[held], maps[held], real[chosen], real[held], [paths[i] for i in held])
        _show_progress(prior, path, config.ema > 0, out)

    names = ("backbone", "weights_sha256", "layer", "denoised", "condition", "target", "data")
    done = fit_prior(
        prior,
        (maps[chosen], seen[chosen].conditions),
        (maps[held], seen[held].conditions),
        config.training(),
        out,
        on_checkpoint=on_checkpoint,
        progress=progress,
        settings={**{name: prior.card[name] for name in names}, "prior": asdict(prior.config)},
    )
    last = done.history[-1]
    report = {
        "images": len(paths),
        "training": len(chosen),
        "held_out": len(held),
        "parameters": sum(p.numel() for p in prior.parameters()),
        "steps": done.step,
        "loss": last["loss"],
        "held_out_loss": last["held_out_loss"],
        "seconds": time.perf_counter() - started,
        "out": str(out / "prior.safetensors"),
        "samples": str(out / "samples" / f"{done.checkpoint.name}.png"),
    }
    prior.card["metrics"] = {name: report[name] for name in ("steps", "loss", "held_out_loss")}
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first
        prior.save(out / "prior.safetensors")
    return report


def _digest(sha256s: Sequence[str], chosen: Sequence[int], held: Sequence[int]) -> str:
    """Names the images of a run: with others it is another run."""
    text = "/".join(",".join(sorted(sha256s[i] for i in side)) for side in (chosen, held))
    return hashlib.sha256(text.encode()).hexdigest()


def _untrained(config: PriorTraining, maps: Tensor, seen: TokenSet, backbone: Backbone) -> Prior:
    dim = None if seen.conditions is None else seen.conditions.shape[-1]
    grid = backbone.grid(backbone.image_size) if config.condition in ("patch", "both") else None
    about = config.prior((maps.shape[1], maps.shape[2]), maps.shape[3], dim, grid)
    return Prior(about, torch.Generator().manual_seed(config.seed))


def _standardised(config: PriorTraining, seen: TokenSet, chosen: list[int]) -> tuple[PriorTarget, Tensor]:
    """The target with the statistics of the training images, and (N, h, w, D) maps of all images."""
    target, parts = PriorTarget(config.target, config.patch, config.vae), []
    for start in range(0, len(seen.pictures), BATCH):
        some = seen[list(range(start, min(start + BATCH, len(seen.pictures))))]
        parts.append(target.encode(some.pictures.float(), some.pictures if some.patches is None else some.patches))
    raw = torch.cat(parts)
    target = target.fitted(raw[chosen])
    return target, target.standardise(raw)


def _show_progress(prior: Prior, checkpoint: Path, averaged: bool, out: Path) -> None:
    """The checkpoint as a prior that `sample_prior` reads, and a picture of what it makes."""
    copy = Prior(prior.config, torch.Generator().manual_seed(0)).to(next(prior.parameters()).device)
    copy.load_state_dict(load_file(checkpoint / f"{'ema' if averaged else 'model'}.safetensors"))
    copy.card = prior.card
    copy.save(out / "prior.safetensors")
    try:
        sample_prior(out, out / "samples" / f"{checkpoint.name}.png", device=next(prior.parameters()).device)
    except NonFiniteError as error:
        log.warning("no picture of samples at %s: %s", checkpoint.name, error)  # the loss decides whether to stop
