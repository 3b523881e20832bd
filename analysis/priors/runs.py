"""Train generative priors on images and a backbone, in a folder that can be continued and sampled from.

A run's folder holds

    prior.safetensors      weights, config and card
    tokens/                tokens and pictures of all images, computed once (for a store, only the pictures)
    tower.safetensors      for the conditions "text" and "pseudo-text", the tower that encodes texts
    held_out.safetensors   held-out images: conditions, small pictures, targets; for features a decoder to pixels
    samples/step-*.png     samples beside the images that condition them, one file per checkpoint
    log.csv, step-*/       as :mod:`dvt.training` writes them
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt.analysis.priors.conditions import keep_tower, make_conditions
from dvt.analysis.priors.config import PriorTraining, Sampling
from dvt.analysis.priors.decoder import PixelDecoder
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.reading import Wanted, kept_store, kept_tokens
from dvt.analysis.priors.run_folder import PriorRun, keep_run, open_run
from dvt.analysis.priors.sampling import sample_prior, write_samples
from dvt.analysis.priors.stored import store_identity
from dvt.analysis.priors.targets import PriorTarget
from dvt.analysis.priors.token_set import (
    BATCH,
    Chosen,
    Clean,
    Computed,
    Rows,
    TokenSet,
    split,
    token_identity,
)
from dvt.analysis.priors.tower import JointSpace, load_tower
from dvt.analysis.priors.training import fit_prior
from dvt.backbones import Backbone, weights_sha256
from dvt.devices import default_device
from dvt.errors import ConfigError, NonFiniteError
from dvt.files import remove_dead
from dvt.images import find_images
from dvt.progress import Progress, is_first_process, silent
from dvt.training import Trained
from dvt.training.checkpoint import read_tensors

__all__ = [
    "PriorRun",
    "PriorTraining",
    "Sampling",
    "StoreTerm",
    "fit_prior",
    "open_run",
    "sample_prior",
    "train_prior",
    "write_samples",
]

log = logging.getLogger(__name__)

# The entries of a prior's card that must be equal for a run to be continued.
_IDENTITY = (
    *("backbone", "weights_sha256", "layer", "stride", "size", "precision", "denoiser"),
    *("condition", "target", "data", "start", "tower"),
)


@dataclass(frozen=True)
class StoreTerm:
    """Name a term of a feature store.

    Args:
        path: path of the store.
        term: one of its terms.
    """

    path: str | Path
    term: str = "raw"


def train_prior(
    images: str | Path | Sequence[str | Path] | StoreTerm,
    backbone: Backbone | None,
    out: str | Path,
    config: PriorTraining | None = None,
    denoiser: Clean | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    start: str | Path | None = None,
) -> dict[str, Any]:
    """Train a prior on images and their tokens from a backbone, or continue a run.

    Images are cut to their middle square; those that cannot be read are left out. Each goes through the backbone once:
    its tokens are kept in the run's folder as float16, and read from there batch by batch. With ``accelerate launch``
    or ``torchrun``, all of their processes take part.

    Args:
        images: files, folders, globs or lists, as :func:`dvt.images.find_images` takes them, or a store's tokens.
        backbone: computes the tokens that are the condition or the target; None with a store, or if neither needs it.
        out: the run's folder.
        config: settings of the training.
        denoiser: a function of Tokens, applied to raw tokens; None for raw tokens. Its attribute `identity` describes
            it.
        progress: called with (what, done, total), where what is "look" or "train".
        device: where to train; None takes a GPU if there is one.
        start: folder of another run whose weights this run starts from, to train a finished run longer or, with another
            condition, for the second stage of Lumos.

    Returns:
        A report ready for JSON: counts, "loss" at the end, "held_out_loss", seconds, paths.

    Raises:
        ConfigError: there are too few images, the backbone lacks the condition, or the folder holds another run.
        NonFiniteError: tokens or the loss are not finite; the latter names the last checkpoint.
    """
    config, out, started = config or PriorTraining(), Path(out), time.perf_counter()
    remove_dead(out / "samples")
    tokens, identity = _tokens(images, backbone, out / "tokens", config, denoiser, progress or silent)
    chosen, held = _sides(tokens, config)
    target, maps = _standardised(config, tokens, chosen)
    space = None if config.tower is None else load_tower(config.tower)
    conditions, labels = make_conditions(config, tokens, space)
    given = [None if conditions is None else Chosen(conditions, side) for side in (chosen, held)]
    prior = _initial(config, maps, conditions, tokens, start).to(device or default_device())
    split_of = {"images": len(tokens), "held_out": len(held), "sha256": _digest(tokens.sha256s, chosen, held)}
    prior.card = _card(config, identity, target, space) | {"data": split_of, "labels": labels}
    prior.card["start"] = None if start is None else weights_sha256(prior)

    def on_checkpoint(path: Path) -> None:
        # Only here, where a run with other settings has been refused: its folder must not change.
        if not (out / "held_out.safetensors").exists():
            decoder = _decoder(maps, tokens.pictures, chosen) if config.target == "features" else None
            names = [tokens.names[i] for i in held]
            keep_run(out, prior, (Chosen(maps, held), given[1]), tokens.pictures[held], names, decoder)
            keep_tower(space, out)
        _show_progress(prior, path, config.loop.ema > 0, out)

    data = ((Chosen(maps, chosen), given[0]), (Chosen(maps, held), given[1]))
    done = fit_prior(
        prior,
        *data,
        config.loop,
        out,
        on_checkpoint=on_checkpoint,
        progress=progress,
        settings={**_identity(prior), "prior": asdict(prior.config)},
    )
    if is_first_process() and not _picture(out, done.checkpoint).exists():
        on_checkpoint(done.checkpoint)  # a process was killed between the last checkpoint and what belongs to it
    report = _summary(done, prior, out, len(chosen), len(held), time.perf_counter() - started, len(tokens.skipped))
    prior.card["metrics"] = {name: report[name] for name in ("steps", "loss", "held_out_loss")}
    if is_first_process():
        prior.save(out / "prior.safetensors")
    return report


def _decoder(maps: Rows, pictures: Rows, rows: list[int]) -> PixelDecoder:
    return PixelDecoder.fit(Chosen(maps, rows), Chosen(pictures, rows))


def _tokens(
    images: Any, backbone: Backbone | None, folder: Path, config: PriorTraining, denoiser: Clean | None, say: Progress
) -> tuple[TokenSet, dict[str, Any]]:
    """Read the tokens of images or of a store, and a description of their origin."""
    wanted = Wanted(config.token_condition, config.target == "features", config.side, config.flips)
    if isinstance(images, StoreTerm):
        if denoiser is not None or backbone is not None:
            raise ConfigError("a store already holds tokens: give neither a backbone nor a denoiser with it")
        seen = kept_store(folder, images.path, images.term, wanted, say)
        return seen, store_identity(images.path, images.term)
    if backbone is None and config.needs_backbone:
        raise ConfigError("images need a backbone; or give a feature store")
    paths = find_images([images] if isinstance(images, (str, Path)) else images)
    return kept_tokens(folder, paths, backbone, wanted, denoiser, say), token_identity(backbone, denoiser)


def _sides(tokens: TokenSet, config: PriorTraining) -> tuple[list[int], list[int]]:
    """Split the rows into training rows, of which a share may be used, and held-out rows, which are never mirrored."""
    chosen, held = split(tokens.sha256s, config.held_out, config.loop.seed)
    plain = len(tokens) - tokens.mirrored
    if config.pairs < 1:
        draws = torch.Generator().manual_seed(config.loop.seed)
        some = torch.randperm(len(chosen), generator=draws)[: max(2, round(config.pairs * len(chosen)))]
        chosen = [chosen[i] for i in sorted(some.tolist())]
    return chosen, [row for row in held if row < plain]


def _card(
    config: PriorTraining, identity: dict[str, Any], target: PriorTarget, space: JointSpace | None
) -> dict[str, Any]:
    """Describe what a prior generates, from what, and how it is trained."""
    card = {**identity, "condition": config.condition, "target": asdict(target), "training": config.to_json()}
    return card if space is None else card | {"tower": space.identity}


def _summary(
    done: Trained, prior: Prior, out: Path, training: int, held_out: int, seconds: float, left_out: int
) -> dict[str, Any]:
    """Make the report of `train_prior`."""
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
        "samples": str(_picture(out, done.checkpoint)),
        "left_out": left_out,
    }


def _identity(prior: Prior) -> dict[str, Any]:
    """List the entries of a prior's card that a continued run must agree with."""
    return {name: prior.card[name] for name in _IDENTITY if name in prior.card}


def _digest(sha256s: Sequence[str], chosen: Sequence[int], held: Sequence[int]) -> str:
    """Hash the images of a run; with other images it is another run."""
    text = "/".join(",".join(sorted(sha256s[i] for i in side)) for side in (chosen, held))
    return hashlib.sha256(text.encode()).hexdigest()


def _initial(
    config: PriorTraining, maps: Rows, conditions: Rows | None, tokens: TokenSet, start: str | Path | None
) -> Prior:
    """Make an untrained prior, or load another run's, with a new condition embedder if the condition differs."""
    dim = None if conditions is None else int(conditions.shape[-1])
    grid = tokens.grid if config.condition in ("patch", "both") else None
    about = config.prior((int(maps.shape[1]), int(maps.shape[2])), int(maps.shape[3]), dim, grid)
    draws = torch.Generator().manual_seed(config.loop.seed)
    if start is None:
        return Prior(about, draws)
    prior = Prior.load(Path(start) / "prior.safetensors").train()
    own = ("condition_dim", "condition_grid", "drop", "levels", "centred", "pseudo")
    differ = [name for name, value in asdict(about).items() if name not in own and asdict(prior.config)[name] != value]
    if differ:
        said = ", ".join(f"{name} {getattr(prior.config, name)} there, {getattr(about, name)} here" for name in differ)
        raise ConfigError(f"{str(start)!r} holds a prior of another kind ({said}); give its settings")
    there, here = prior.config, about
    same = (there.condition_dim, there.condition_grid, there.centred, there.pseudo)
    if (here.condition_dim, here.condition_grid, here.centred, here.pseudo) != same or (
        prior.card.get("condition") != config.condition
    ):
        if dim is None:
            raise ConfigError("a second stage needs a condition, such as label")
        prior.swap_condition(dim, draws, grid)
    return prior


def _standardised(config: PriorTraining, tokens: TokenSet, chosen: list[int]) -> tuple[PriorTarget, Rows]:
    """Fit the target to the training images; return it, and the standardised maps of all images."""
    target = PriorTarget(config.target, config.patch, config.vae)
    source = tokens.pictures if tokens.patches is None else tokens.patches
    if config.target == "latents":  # encode once, because a VAE is slow
        batches = range(0, len(tokens), BATCH)
        parts = [target.encode(x := source[list(range(i, min(i + BATCH, len(tokens))))].float(), x) for i in batches]
        source = torch.cat(parts).half()

    def encode(some: Tensor) -> Tensor:
        return some.float() if config.target == "latents" else target.encode(some.float(), some)

    learnt = (encode(source[chosen[i : i + BATCH]]) for i in range(0, len(chosen), BATCH))
    target = target.fitted(learnt)
    first = encode(source[[0]])
    return target, Computed(source, partial(_standard, target, encode), (len(tokens), *first.shape[1:]))


def _standard(target: PriorTarget, encode: Any, some: Tensor) -> Tensor:
    return target.standardise(encode(some))


def _picture(out: Path, checkpoint: Path) -> Path:
    return out / "samples" / f"{checkpoint.name}.png"


def _show_progress(prior: Prior, checkpoint: Path, averaged: bool, out: Path) -> None:
    """Write the checkpoint as a prior that `sample_prior` reads, and a picture of its samples."""
    copy = Prior(prior.config, torch.Generator().manual_seed(0)).to(next(prior.parameters()).device)
    copy.load_state_dict(read_tensors(checkpoint, "ema" if averaged else "model"))
    copy.card = prior.card
    copy.save(out / "prior.safetensors")
    try:
        sample_prior(out, _picture(out, checkpoint), device=next(prior.parameters()).device)
    except NonFiniteError as error:
        log.warning("no picture of samples at %s: %s", checkpoint.name, error)  # the loss decides whether to stop
