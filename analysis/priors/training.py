"""Train a prior on tokens that are in memory, by settings that a run keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dvt.analysis.priors.condition import Codebook
from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.run_folder import keep_run
from dvt.analysis.priors.sampling import held_out_loss
from dvt.analysis.priors.targets import PriorTarget, TargetKind
from dvt.analysis.priors.token_set import CONDITIONS, Condition, Rows
from dvt.errors import ConfigError
from dvt.progress import Progress
from dvt.training import Trained, TrainingConfig, epoch_indices, train

_CODED = 2000  # maps that a codebook is fitted to

_LOOP = TrainingConfig(
    steps=20_000,
    batch_size=64,
    learning_rate=5e-4,
    warmup=0.05,
    ema=0.999,
    checkpoint_every=2000,
    log_every=20,
)


@dataclass(frozen=True)
class PriorTraining:
    """Say what a prior generates, from which tokens, and how it is trained.

    Args:
        condition: tokens of the frozen backbone that it is given: "cls" (a picture's kind, no layout), "mean" (the mean
            patch), "patch" (the layout), "both"; "label" for the name of each image's folder; or None for an
            unconditional prior.
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
        codes: of a token head: 0 for continuous tokens, else the entries of a k-means codebook (Fluid).
        centred: whether the prior learns what it takes off each condition token's place.
        pseudo: noise that makes image features pass for a text's, "fixed" or "trained"; with the condition "mean" or
            "cls" (LAFITE).
        flips: whether each training image is also seen mirrored.
        pairs: share of the training images that are used, as of pairs in a second stage.
        held_out: share of the images that is held out; at least 2 images, and at most 64.
        loop: the optimizer's steps, learning rate, averaging and checkpoints. Its seed is also that of the initial
            weights, the order of the images, the noise and the choice of those held out; each checkpoint comes with
            a picture of samples.

    Raises:
        ConfigError: a value is outside its range.
    """

    condition: Condition | Literal["label"] | None = "patch"
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
    codes: int = 0
    centred: bool = False
    pseudo: Literal["fixed", "trained"] | None = None
    flips: bool = False
    pairs: float = 1.0
    held_out: float = 0.1
    loop: TrainingConfig = _LOOP

    def __post_init__(self) -> None:
        if self.condition not in (None, "label", *CONDITIONS):
            known = ", ".join((*CONDITIONS, "label"))
            raise ConfigError(f"there is no condition {self.condition!r}; it is one of {known} or None")
        if self.pseudo and self.condition not in ("cls", "mean"):
            raise ConfigError(
                f"pseudo-text needs one feature an image: the condition 'cls' or 'mean', got {self.condition!r}"
            )
        if not 0 < self.pairs <= 1:
            raise ConfigError(f"pairs is a share of the images in (0, 1], got {self.pairs}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is a share of the images in (0, 1), got {self.held_out}")
        if self.side < 1 or self.patch < 1 or (self.target == "pixels" and self.side % self.patch):
            raise ConfigError(f"side must be a multiple of the patch {self.patch}, got {self.side} pixels")
        PriorTarget(self.target, self.patch, self.vae)
        self.prior((1, 1), 1, 1, (1, 1) if self.condition in ("patch", "both") else None)

    def to_json(self) -> dict[str, Any]:
        """List all settings as a prior's card holds them: those of the loop beside the others, not inside."""
        flat = asdict(self)
        return flat | flat.pop("loop")

    def prior(
        self,
        grid: tuple[int, int],
        token_dim: int,
        condition_dim: int | None,
        condition_grid: tuple[int, int] | None,
    ) -> PriorConfig:
        """Describe the prior for tokens of this size."""
        names = ("head", "order", "width", "depth", "heads", "drop", "codes", "centred", "pseudo")
        return PriorConfig(
            grid, token_dim, condition_dim, condition_grid, **{name: getattr(self, name) for name in names}
        )


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
    """Train a prior in place on maps and conditions; also the second stage, after a swap.

    The folder then holds what :func:`dvt.analysis.priors.runs.sample_prior` needs; a prior whose card names no target
    is sampled as features.

    Args:
        prior: on the device to train on.
        data: (N, h, w, D) standardised target tokens and their conditions (N, M, C), None for none; tensors, or what
            reads rows when they are asked for.
        held_out: the same of images that are not trained on, for "held_out_loss" in the log.
        config: how; the same settings continue the run that the folder holds.
        folder: of the run.
        validate: numbers for the log beside "held_out_loss".
        on_checkpoint, progress, settings: of :func:`dvt.training.train`.
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
    if os.environ.get("RANK", "0") == "0" and not (Path(folder) / "held_out.safetensors").exists():
        keep_run(Path(folder), prior, held_out)
    return done
