"""Train one denoiser for all images, from the raw and the decomposed tokens of a feature store (stage two)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvt.denoiser.config import DenoiserTraining
from dvt.denoiser.model import Denoiser
from dvt.denoiser.pairs import InMemory, Pairs, TrainingBatch, pair_batches, split
from dvt.denoiser.scores import denoiser_loss, evaluate
from dvt.denoiser.variants import fit_linear, fit_subtract
from dvt.devices import default_device
from dvt.errors import ConfigError
from dvt.progress import Progress, is_first_process
from dvt.store import FeatureStore
from dvt.training import flat_settings, sides_digest, train

log = logging.getLogger(__name__)

#: Kinds that are not trained: their values are computed from the tokens in closed form.
FITTED = ("linear", "subtract")

_MOST_FITTED = 1024  # images from which means and closed forms are computed


def train_denoiser(
    store: str | Path,
    out: str | Path,
    config: DenoiserTraining | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> tuple[Denoiser, dict[str, Any]]:
    """Train or fit a denoiser on a store, or continue an interrupted run.

    Checkpoints and log.csv are in a folder named like `out`, with ".run" in place of ".safetensors". With ``accelerate
    launch`` or ``torchrun``, all of their processes take part.

    Args:
        store: a store of `dvt denoise`, with the terms "raw" and "semantic".
        out: the .safetensors file to write; it is whole or absent.
        config: the training's settings.
        progress: called with (what, done, total).
        device: where to train; None takes a GPU if there is one. With several processes, accelerate chooses.

    Returns:
        The denoiser, and a report ready for JSON: counts, seconds, "validation" (loss, MSE and cosine of the denoiser
        on the held-out images), "baselines" (the same scores for the raw tokens, for subtracting one mean shift, and
        for subtracting the mean artifact of each position), and if it was trained: steps, checkpoint.

    Raises:
        StoreError: there is no store, it is empty, damaged or of several jobs, or it lacks images or a term.
        NonFiniteError: a token in the store or the loss is not finite.
        ConfigError: `out` is not a .safetensors file, or its run has other settings.
    """
    config, out, started = config or DenoiserTraining(), Path(out), time.perf_counter()
    if out.suffix != ".safetensors":
        raise ConfigError(f"a denoiser is written to a .safetensors file, got {str(out)!r}")
    opened = FeatureStore(store)
    if out.is_file() and (there := Denoiser.from_pretrained(out).config.kind) != config.kind:
        raise ConfigError(f"{str(out)!r} holds a denoiser of kind {there!r}; choose another file, or delete it first")
    pairs = Pairs(opened, config.target, config.use_prefix)
    _say_if_faithful(opened)
    chosen, held = split(pairs.sha256s, config.validation, config.loop.seed)
    subtract = _fitted("subtract", pairs, chosen)
    baselines = _baselines(pairs, held, subtract)
    report: dict[str, Any] = {"kind": config.kind, "images": len(pairs), "training": len(chosen), "held_out": len(held)}
    if config.kind in FITTED:
        denoiser = subtract if config.kind == "subtract" else _fitted("linear", pairs, chosen)
    else:
        denoiser = _untrained(pairs, chosen, subtract, config)
        denoiser.to(device or default_device())
        report |= _train(denoiser, pairs, chosen, held, baselines, config, out.with_suffix(".run"), progress)
    denoiser = denoiser.cpu().eval()
    report |= {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "validation": evaluate({"denoiser": partial(_denoised, denoiser)}, (pairs[i] for i in held))["denoiser"],
        "baselines": baselines,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    denoiser.card, denoiser.strength = _card(opened, config, report), config.strength
    if is_first_process():
        denoiser.save_pretrained(out)
    return denoiser, report


def _say_if_faithful(store: FeatureStore) -> None:
    """Warn if the store's product is not the best one to learn for labelled tasks (benchmarks/README.md)."""
    if store.job.config.get("product") == "removed" and is_first_process():
        log.warning(
            "%s holds the product 'removed': a denoiser learnt from it stays closest to the backbone's own tokens; for "
            "segmentation, grouping and matching, a denoiser learnt from `dvt denoise --product ensembled` was better",
            store.path,
        )


def _untrained(
    pairs: Pairs | InMemory, chosen: Sequence[int], subtract: Denoiser, config: DenoiserTraining
) -> Denoiser:
    """Make the initial denoiser; a block starts as `subtract`, through its position embedding [ours].

    Compared with a start at zero, 200 steps of 8 images reach a held-out loss of .028 instead of .030 at a learning
    rate of 1e-3, and .031 instead of .050 at 3e-4 (ViT-Ti, 60 photographs; subtraction alone has .085).
    """
    channels = pairs[chosen[0]]["raw"].shape[-1]
    denoiser = Denoiser(
        config.denoiser(channels, subtract.config.grid), torch.Generator().manual_seed(config.loop.seed)
    )
    if config.kind == "block" and config.position:
        with torch.no_grad():
            denoiser.body.pos_embed.copy_(-subtract.body.artifact.reshape(1, -1, channels))
    return denoiser


def _train(
    denoiser: Denoiser,
    pairs: Pairs | InMemory,
    chosen: Sequence[int],
    held: Sequence[int],
    baselines: Mapping[str, Mapping[str, float]],
    config: DenoiserTraining,
    folder: Path,
    progress: Progress | None,
) -> dict[str, Any]:
    beside = {f"{name}_loss": scores["loss"] for name, scores in baselines.items()}

    def validate(model: nn.Module) -> dict[str, float]:
        scores = evaluate({"model": partial(_denoised, model)}, (pairs[i] for i in held))["model"]
        return {**{f"validation_{name}": value for name, value in scores.items()}, **beside}

    loop = config.loop
    batches = pair_batches(pairs, chosen, loop.batch_size, loop.steps, loop.seed)
    images = sides_digest(*(sorted(pairs.sha256s[i] for i in side) for side in (chosen, held)))
    settings = {"denoiser": asdict(denoiser.config), "target": config.target, "images": images}
    done = train(
        denoiser, denoiser_loss, batches, loop, folder, validate=validate, progress=progress, settings=settings
    )
    return {"steps": done.step, "checkpoint": str(done.checkpoint), "learning_rate": loop.peak_rate}


def _denoised(denoiser: nn.Module, batch: TrainingBatch) -> Tensor:
    device = next(t.device for t in (*denoiser.parameters(), *denoiser.buffers()))
    prefix = batch["prefix"].to(device) if "prefix" in batch else None
    return denoiser(batch["raw"].to(device), prefix).float().cpu()


def _fitted(kind: str, pairs: Pairs | InMemory, chosen: Sequence[int]) -> Denoiser:
    items = (pairs[i] for i in chosen[:_MOST_FITTED])
    if kind == "linear":
        return fit_linear(item["raw"].float() for item in items)
    grid = Counter(pairs.grids[i] for i in chosen).most_common(1)[0][0]
    return fit_subtract((item["raw"].float() - item["target"].float() for item in items), grid)


def _baselines(pairs: Pairs | InMemory, held: Sequence[int], subtract: Denoiser) -> dict[str, dict[str, float]]:
    """Score the baselines without training on the held-out images: the raw tokens, and two subtractions."""
    shift = subtract.body.artifact.mean((0, 1))
    ways: dict[str, Callable[[TrainingBatch], Tensor]] = {
        "no_op": lambda batch: batch["raw"],
        "mean_shift": lambda batch: batch["raw"] - shift,
        "subtract": partial(_denoised, subtract),
    }
    return evaluate(ways, (pairs[i] for i in held))


def _card(store: FeatureStore, config: DenoiserTraining, report: Mapping[str, Any]) -> dict[str, Any]:
    job = asdict(store.job)
    return {
        **{name: job[name] for name in ("backbone", "weights_sha256", "layer", "stride", "size")},
        "feature_dim": store.summary()["channels"],
        "data": {"images": len(store), "held_out": report["held_out"], "store_job_sha256": store.job.digest},
        "training": flat_settings(config),
        "metrics": {"validation": report["validation"], "baselines": report["baselines"]},
    }
