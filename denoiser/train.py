"""Stage 2: one denoiser for all images, distilled from the raw and the decomposed tokens of a feature store."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt.denoiser.config import KINDS, DenoiserConfig
from dvt.denoiser.model import Denoiser
from dvt.denoiser.variants import fit_linear, fit_subtract
from dvt.errors import ConfigError, NonFiniteError, StoreError
from dvt.grids import Size
from dvt.progress import Progress
from dvt.store import FeatureStore
from dvt.training import Batches, TrainingConfig, epoch_indices, hold_out, train

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]

#: Kinds that are not trained: their values follow from the tokens in closed form.
FITTED = ("linear", "subtract")

_MOST_VALIDATED = 256  # images; a validation must stay short beside the training
_MOST_FITTED = 1024  # images from which means and closed forms are computed
_REFERENCE_BATCH = 256


@dataclass(frozen=True)
class DenoiserTraining:
    """How a denoiser is made from a store of `dvt denoise`.

    Args:
        kind: "block", "conv1x1" or "conv3x3", which are trained; "linear" or "subtract", which are fitted in
            closed form and use only `validation` and `target` of what follows.
        depth: transformer blocks.
        heads: attention heads of a block; None for C / 64.
        position: whether a block has a position embedding.
        use_prefix: whether a block attends to the class token and the registers.
        target: the term of the store to give back from "raw".
        steps: optimizer steps.
        batch_size: images a step, over all processes together.
        learning_rate: the highest; None for 2e-4 sqrt(batch_size / 256) of Denoising ViT (arXiv 2401.02957), which is
            for ten thousands of images and long runs.
        min_learning_rate: at the last step.
        warmup: share of the steps during which the learning rate rises.
        weight_decay: of the matrices (AdamW).
        clip: largest L2 norm of the gradient; 0 for no limit.
        ema: decay of the averaged weights, which are the result; 0 for the last weights.
        precision: "no" for float32, or "bf16" or "fp16".
        validation: share of the images that is held out, in (0, 1); at least one image, and at most 256.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        log_every: steps between rows of the log.
        seed: of the initial weights, the order of the images and the choice of those held out.
        trackers: "tensorboard" and "wandb", beside log.csv.

    Raises:
        ConfigError: a value is outside its range.
    """

    kind: Literal["block", "conv1x1", "conv3x3", "linear", "subtract"] = "block"
    depth: int = 1
    heads: int | None = None
    position: bool = True
    use_prefix: bool = False
    target: str = "semantic"
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float | None = 1e-3
    min_learning_rate: float = 1e-6
    warmup: float = 0.15
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
        if self.kind not in KINDS:
            raise ConfigError(f"there is no denoiser of kind {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation is a share of the images in (0, 1), got {self.validation}")
        self.training()

    def training(self) -> TrainingConfig:
        """What the training loop is told."""
        rate = self.learning_rate
        if rate is None:
            rate = 2e-4 * math.sqrt(max(self.batch_size, 1) / _REFERENCE_BATCH)
        return TrainingConfig.of(self, learning_rate=rate)

    def denoiser(self, feature_dim: int, grid: Size) -> DenoiserConfig:
        """The denoiser for tokens of this size."""
        return DenoiserConfig(
            self.kind,
            feature_dim,
            grid,
            num_heads=self.heads,
            depth=self.depth,
            position=self.position,
            use_prefix=self.use_prefix,
        )


# -- data -------------------------------------------------------------------------------------------------------------


class Pairs:
    """Raw and target tokens of the images of a store, read when asked for.

    Args:
        store: with the terms "raw" and `target`.
        target: the term to learn.
        prefix: read the prefix tokens too.

    Raises:
        StoreError: the store lacks a term or prefix tokens.
    """

    def __init__(self, store: FeatureStore, target: str = "semantic", prefix: bool = False) -> None:
        if target == "raw":
            raise ConfigError("the target is 'raw' itself, so there is nothing to learn; choose 'semantic'")
        if missing := [term for term in ("raw", target) if term not in store.terms]:
            raise StoreError(
                f"{str(store.path)!r} holds the terms {', '.join(store.terms)} but not {' and '.join(missing)}; a "
                f"denoiser learns {target!r} from 'raw', and `dvt denoise` writes both"
            )
        if prefix and not store.summary()["prefix_tokens"]:
            raise StoreError(f"{str(store.path)!r} holds no prefix tokens; train without use_prefix")
        self.store, self.target, self.prefix = store, target, prefix
        self.grids, self.sha256s = store.grids, store.sha256s
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, i: int) -> Batch:
        """ "raw" and "target" (h, w, C), and "prefix" (P, C) if asked for, of image i; float16 or float32.

        Raises:
            StoreError: the shard is damaged.
            NonFiniteError: the store holds NaN or infinity.
        """
        item = {"target": torch.from_numpy(self.store.read(i, self.target))}
        if self.prefix:
            tokens = self.store[i]
            item |= {"raw": tokens.patches[0], "prefix": tokens.prefix[0]}
        else:
            item["raw"] = torch.from_numpy(self.store.read(i, "raw"))
        if i not in self._checked:
            self._check(i, item)
        return item

    def _check(self, i: int, item: Batch) -> None:
        bad = [name for name, values in item.items() if not values.isfinite().all()]
        if bad:
            raise NonFiniteError(
                f"the {' and '.join(bad)} tokens of {self.store.images[i]!r} hold NaN or infinity; run `dvt inspect` "
                f"on {str(self.store.path)!r}, delete the damaged shards and run `dvt denoise` again"
            )
        self._checked.add(i)

    def in_memory(self) -> InMemory:
        """The same, read once: to compare speeds, or for many short runs."""
        return InMemory([self[i] for i in range(len(self))], self.grids, self.sha256s)


@dataclass(frozen=True)
class InMemory:
    """:class:`Pairs` as a list of tensors."""

    items: list[Batch]
    grids: list[Size]
    sha256s: list[str]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Batch:
        return self.items[i]


def split(sha256s: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Images for training and for validation; the same file under several paths is on one side.

    Args:
        sha256s: of each image's file.
        share: to hold out; at least one file, and at most 256.
        seed: another seed holds out others.

    Raises:
        StoreError: there are fewer than two different images.

    >>> split(["a", "b", "c", "b"], 0.3, seed=0)
    ([0, 1, 3], [2])
    """
    distinct = len(set(sha256s))
    if distinct < 2:
        raise StoreError(
            f"the store holds {distinct} different image; training needs at least 2, one of them held out for "
            "validation. Run `dvt denoise` on more"
        )
    return hold_out(sha256s, min(max(1, round(share * distinct)), distinct - 1, _MOST_VALIDATED), seed)


def batches_of(pairs: Pairs | InMemory, images: Sequence[int], batch_size: int, steps: int, seed: int) -> Batches:
    """The batches of a run, each of one grid; a grid is drawn in proportion to its images.

    The images of a grid come in permutations, one after the other; where they are fewer than a batch, they come more
    than once in it.

    Args:
        pairs: what to read from.
        images: which of them.
        batch_size: of the global batch.
        steps: of the run.
        seed: of the order.

    Returns:
        A pure function (step, rank, world) for :func:`dvt.training.train`.
    """
    buckets: dict[Size, list[int]] = {}
    for i in images:
        buckets.setdefault(pairs.grids[i], []).append(i)
    members = [buckets[grid] for grid in sorted(buckets)]
    share = np.array([len(group) for group in members]) / len(images)
    drawn = np.random.default_rng(seed).choice(len(members), size=steps, p=share)
    turns = np.zeros(steps, dtype=np.int64)  # how often the grid was drawn before
    for bucket in range(len(members)):
        turns[drawn == bucket] = np.arange((drawn == bucket).sum())

    def batches(step: int, rank: int, world: int) -> Batch:
        group = members[drawn[step]]
        chosen = [group[i] for i in epoch_indices(int(turns[step]), batch_size, len(group), seed)]
        part = batch_size // world
        return _stack([pairs[i] for i in chosen[rank * part : (rank + 1) * part]])

    return batches


def _stack(items: Sequence[Batch]) -> Batch:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


# -- loss and scores --------------------------------------------------------------------------------------------------


def reconstruction(denoised: Tensor, target: Tensor) -> dict[str, Tensor]:
    """MSE + (1 - cosine), means over all tokens (Denoising ViT, stage 2).

    Args:
        denoised, target: (B, h, w, C).

    Returns:
        "loss", "mse" and "cosine", scalars.
    """
    mse = nnf.mse_loss(denoised, target)
    cosine = nnf.cosine_similarity(denoised, target, dim=-1).mean()
    return {"loss": mse + 1 - cosine, "mse": mse, "cosine": cosine}


def denoiser_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss of a batch of :func:`batches_of`, for :func:`dvt.training.train`."""
    prefix = batch["prefix"].float() if "prefix" in batch else None
    return reconstruction(model(batch["raw"].float(), prefix).float(), batch["target"].float())


def evaluate(ways: Mapping[str, Callable[[Batch], Tensor]], items: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Means over images of :func:`reconstruction`, for several ways to denoise.

    Args:
        ways: by name, a batch of one image, in float32, to its denoised tokens (1, h, w, C).
        items: images of :class:`Pairs`, read once.
    """
    totals: dict[str, Counter[str]] = {name: Counter() for name in ways}
    count = 0
    with torch.no_grad():
        for count, item in enumerate(items, 1):  # noqa: B007
            batch = {name: values[None].float() for name, values in item.items()}
            for name, way in ways.items():
                scores = reconstruction(way(batch), batch["target"])
                totals[name].update({key: float(value) for key, value in scores.items()})
    return {name: {key: value / count for key, value in total.items()} for name, total in totals.items()}


# -- the job ----------------------------------------------------------------------------------------------------------


def train_denoiser(
    store: str | Path,
    out: str | Path,
    config: DenoiserTraining | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> tuple[Denoiser, dict[str, Any]]:
    """Makes a denoiser from a store, or continues a run that was interrupted.

    Checkpoints and log.csv are in the folder `out` with ".run" in place of ".safetensors". Started by ``accelerate
    launch`` or ``torchrun`` it uses all of their processes.

    Args:
        store: a store of `dvt denoise`, with the terms "raw" and "semantic".
        out: the .safetensors file to write, whole or not at all.
        config: how.
        progress: called with (what, done, total).
        device: where to train; None for a GPU if there is one. Several processes have theirs from accelerate.

    Returns:
        The denoiser, and a report ready for JSON: counts, seconds, "validation" (loss, MSE and cosine of the denoiser
        on the held-out images), "baselines" (the same of doing nothing, of adding the mean shift, and of
        subtracting the mean artifact of each position), and what a run has: steps, checkpoint.

    Raises:
        StoreError: no store, an empty, damaged or mixed one, too few images, or a term that is missing.
        NonFiniteError: the store or the loss is not finite.
        ConfigError: `out` is not a .safetensors file, or its run has other settings.
    """
    config, out, started = config or DenoiserTraining(), Path(out), time.perf_counter()
    if out.suffix != ".safetensors":
        raise ConfigError(f"a denoiser is written to a .safetensors file, got {str(out)!r}")
    opened = FeatureStore(store)
    if out.is_file() and (there := Denoiser.from_pretrained(out).config.kind) != config.kind:
        raise ConfigError(f"{str(out)!r} holds a denoiser of kind {there!r}; choose another file, or delete it first")
    pairs = Pairs(opened, config.target, config.use_prefix)
    chosen, held = split(pairs.sha256s, config.validation, config.seed)
    subtract = _fitted("subtract", pairs, chosen)
    baselines = _baselines(pairs, chosen, held, subtract)
    report: dict[str, Any] = {"kind": config.kind, "images": len(pairs), "training": len(chosen), "held_out": len(held)}
    if config.kind in FITTED:
        denoiser = subtract if config.kind == "subtract" else _fitted("linear", pairs, chosen)
    else:
        denoiser = _untrained(pairs, chosen, subtract, config)
        denoiser.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        report |= _train(denoiser, pairs, chosen, held, baselines, config, out.with_suffix(".run"), progress)
    denoiser = denoiser.cpu().eval()
    report |= {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "validation": evaluate({"denoiser": partial(_denoised, denoiser)}, (pairs[i] for i in held))["denoiser"],
        "baselines": baselines,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    denoiser.card = _card(opened, config, report)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        denoiser.save_pretrained(out)
    return denoiser, report


def _untrained(
    pairs: Pairs | InMemory, chosen: Sequence[int], subtract: Denoiser, config: DenoiserTraining
) -> Denoiser:
    """A denoiser as training starts: a block does what `subtract` does, by its position embedding [ours].

    From there 200 steps of 8 images reach a held-out loss of .028 instead of .030 at a learning rate of 1e-3, and .031
    instead of .050 at 3e-4 (ViT-Ti, 60 photographs; subtraction has .085).
    """
    channels = pairs[chosen[0]]["raw"].shape[-1]
    denoiser = Denoiser(config.denoiser(channels, subtract.config.grid), torch.Generator().manual_seed(config.seed))
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

    training = config.training()
    batches = batches_of(pairs, chosen, training.batch_size, training.steps, config.seed)
    settings = {"denoiser": asdict(denoiser.config), "target": config.target, "images": _digest(pairs, chosen, held)}
    done = train(
        denoiser, denoiser_loss, batches, training, folder, validate=validate, progress=progress, settings=settings
    )
    return {"steps": done.step, "checkpoint": str(done.checkpoint), "learning_rate": training.learning_rate}


def _denoised(denoiser: nn.Module, batch: Batch) -> Tensor:
    device = next(t.device for t in (*denoiser.parameters(), *denoiser.buffers()))
    prefix = batch["prefix"].to(device) if "prefix" in batch else None
    return denoiser(batch["raw"].to(device), prefix).float().cpu()


def _fitted(kind: str, pairs: Pairs | InMemory, chosen: Sequence[int]) -> Denoiser:
    items = (pairs[i] for i in chosen[:_MOST_FITTED])
    if kind == "linear":
        return fit_linear(item["raw"].float() for item in items)
    grid = Counter(pairs.grids[i] for i in chosen).most_common(1)[0][0]
    return fit_subtract((item["raw"].float() - item["target"].float() for item in items), grid)


def _baselines(
    pairs: Pairs | InMemory, chosen: Sequence[int], held: Sequence[int], subtract: Denoiser
) -> dict[str, dict[str, float]]:
    """What is reached on the held-out images without training, from means over the others."""
    shift = subtract.body.artifact.mean((0, 1))
    ways: dict[str, Callable[[Batch], Tensor]] = {
        "no_op": lambda batch: batch["raw"],
        "mean_shift": lambda batch: batch["raw"] - shift,
        "subtract": partial(_denoised, subtract),
    }
    return evaluate(ways, (pairs[i] for i in held))


def _digest(pairs: Pairs | InMemory, chosen: Sequence[int], held: Sequence[int]) -> str:
    """Names the images of a run: with others it is another run."""
    text = "/".join(",".join(sorted(pairs.sha256s[i] for i in side)) for side in (chosen, held))
    return hashlib.sha256(text.encode()).hexdigest()


def _card(store: FeatureStore, config: DenoiserTraining, report: Mapping[str, Any]) -> dict[str, Any]:
    job = asdict(store.job)
    return {
        **{name: job[name] for name in ("backbone", "weights_sha256", "layer", "stride", "size")},
        "feature_dim": store.summary()["channels"],
        "data": {"images": len(store), "held_out": report["held_out"], "store_job_sha256": store.job.digest},
        "training": asdict(config),
        "metrics": {"validation": report["validation"], "baselines": report["baselines"]},
    }
