"""Run generative priors as jobs: train one on images and a backbone, sample from its folder, measure it.

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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.sampling import (
    PriorRun,
    evaluate_prior,
    keep,
    open_run,
    sample_prior,
    summaries,
)
from dvt.analysis.priors.targets import PriorTarget
from dvt.analysis.priors.token_set import (
    BATCH,
    Clean,
    TokenSet,
    read_tokens,
    split,
    token_identity,
)
from dvt.analysis.priors.training import PriorTraining, fit_prior
from dvt.backbones import Backbone
from dvt.errors import NonFiniteError
from dvt.images import find_images, readable, size_and_sha256
from dvt.progress import Progress, silent
from dvt.training import Trained

__all__ = ["PriorRun", "PriorTraining", "evaluate_prior", "fit_prior", "open_run", "sample_prior", "train_prior"]

log = logging.getLogger(__name__)

# The entries of a prior's card that a run's folder must agree with to be continued.
_IDENTITY = ("backbone", "weights_sha256", "layer", "denoised", "condition", "target", "data")


def train_prior(
    images: str | Path | Sequence[str | Path],
    backbone: Backbone,
    out: str | Path,
    config: PriorTraining | None = None,
    denoiser: Clean | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Train a prior on images and the tokens that a backbone makes of them, or continue a run.

    Images are cut to their middle square. The tokens of all images stay in memory, two bytes a value. Started by
    ``accelerate launch`` or ``torchrun`` it uses all of their processes.

    Args:
        images: files, folders, globs or lists, as :func:`dvt.images.find_images` takes them.
        backbone: whose tokens are the condition.
        out: the run's folder.
        config: the training's settings.
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
    progress = progress or silent
    paths, sha256s = _hashed(find_images([images] if isinstance(images, (str, Path)) else images))
    chosen, held = split(sha256s, config.held_out, config.loop.seed)
    wants = config.target == "features"
    tokens = read_tokens(paths, backbone, config.condition, wants, config.side, denoiser, progress)
    target, maps = _standardised(config, tokens, chosen)
    prior = _untrained(config, maps, tokens, backbone)
    prior.card = {
        **token_identity(backbone, denoiser),
        "condition": config.condition,
        "target": asdict(target),
        "training": config.to_json(),
        "data": {"images": len(paths), "held_out": len(held), "sha256": _digest(sha256s, chosen, held)},
    }
    prior.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def on_checkpoint(path: Path) -> None:
        # Not before: a run of other settings is refused by then, and its folder must stay as it is.
        if not (kept := out / "held_out.safetensors").exists():
            real = summaries(tokens, backbone, denoiser, progress)
            keep(kept, tokens[held], maps[held], real[chosen], real[held], [paths[i] for i in held])
        _show_progress(prior, path, config.loop.ema > 0, out)

    done = fit_prior(
        prior,
        (maps[chosen], tokens[chosen].conditions),
        (maps[held], tokens[held].conditions),
        config.loop,
        out,
        on_checkpoint=on_checkpoint,
        progress=progress,
        settings={**{name: prior.card[name] for name in _IDENTITY}, "prior": asdict(prior.config)},
    )
    report = _summary(done, prior, out, len(chosen), len(held), time.perf_counter() - started)
    prior.card["metrics"] = {name: report[name] for name in ("steps", "loss", "held_out_loss")}
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first
        prior.save(out / "prior.safetensors")
    return report


def _hashed(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Find the hashes of the images that can be read, and their paths."""
    found = readable(paths, size_and_sha256)
    return [paths[i] for i in found], [sha256 for _, sha256 in found.values()]


def _summary(done: Trained, prior: Prior, out: Path, training: int, held_out: int, seconds: float) -> dict[str, Any]:
    """List what `train_prior` reports."""
    last = done.history[-1]
    return {
        "images": training + held_out,
        "training": training,
        "held_out": held_out,
        "parameters": sum(p.numel() for p in prior.parameters()),
        "steps": done.step,
        "loss": last["loss"],
        "held_out_loss": last["held_out_loss"],
        "seconds": seconds,
        "out": str(out / "prior.safetensors"),
        "samples": str(out / "samples" / f"{done.checkpoint.name}.png"),
    }


def _digest(sha256s: Sequence[str], chosen: Sequence[int], held: Sequence[int]) -> str:
    """Hash the images of a run: with others it is another run."""
    text = "/".join(",".join(sorted(sha256s[i] for i in side)) for side in (chosen, held))
    return hashlib.sha256(text.encode()).hexdigest()


def _untrained(config: PriorTraining, maps: Tensor, tokens: TokenSet, backbone: Backbone) -> Prior:
    dim = None if tokens.conditions is None else tokens.conditions.shape[-1]
    grid = backbone.grid(backbone.image_size) if config.condition in ("patch", "both") else None
    about = config.prior((maps.shape[1], maps.shape[2]), maps.shape[3], dim, grid)
    return Prior(about, torch.Generator().manual_seed(config.loop.seed))


def _standardised(config: PriorTraining, tokens: TokenSet, chosen: list[int]) -> tuple[PriorTarget, Tensor]:
    """Fit the target to the training images, and make (N, h, w, D) maps of all images."""
    target, parts = PriorTarget(config.target, config.patch, config.vae), []
    for start in range(0, len(tokens.pictures), BATCH):
        some = tokens[list(range(start, min(start + BATCH, len(tokens.pictures))))]
        parts.append(target.encode(some.pictures.float(), some.pictures if some.patches is None else some.patches))
    raw = torch.cat(parts)
    target = target.fitted(raw[chosen])
    return target, target.standardise(raw)


def _show_progress(prior: Prior, checkpoint: Path, averaged: bool, out: Path) -> None:
    """Write the checkpoint as a prior that `sample_prior` reads, and a picture of what it makes."""
    copy = Prior(prior.config, torch.Generator().manual_seed(0)).to(next(prior.parameters()).device)
    copy.load_state_dict(load_file(checkpoint / f"{'ema' if averaged else 'model'}.safetensors"))
    copy.card = prior.card
    copy.save(out / "prior.safetensors")
    try:
        sample_prior(out, out / "samples" / f"{checkpoint.name}.png", device=next(prior.parameters()).device)
    except NonFiniteError as error:
        log.warning("no picture of samples at %s: %s", checkpoint.name, error)  # the loss decides whether to stop
