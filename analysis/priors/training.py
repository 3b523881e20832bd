"""Train a prior on tokens that are in memory, by settings that a run keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.sampling import held_out_loss
from dvt.analysis.priors.targets import PriorTarget, TargetKind
from dvt.analysis.priors.token_set import CONDITIONS, Condition
from dvt.errors import ConfigError
from dvt.progress import Progress
from dvt.training import Trained, TrainingConfig, epoch_indices, train

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
        condition: tokens of the frozen backbone that it is given: "cls" (a picture's kind, no layout), "patch" (the
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
        loop: the optimizer's steps, learning rate, averaging and checkpoints. Its seed is also that of the initial
            weights, the order of the images, the noise and the choice of those held out; each checkpoint comes with
            a picture of samples.

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
    loop: TrainingConfig = _LOOP

    def __post_init__(self) -> None:
        if self.condition is not None and self.condition not in CONDITIONS:
            raise ConfigError(f"there is no condition {self.condition!r}; it is one of {', '.join(CONDITIONS)} or None")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is a share of the images in (0, 1), got {self.held_out}")
        if self.side < 1 or self.patch < 1 or (self.target == "pixels" and self.side % self.patch):
            raise ConfigError(f"side must be a multiple of the patch {self.patch}, got {self.side} pixels")
        PriorTarget(self.target, self.patch, self.vae)
        self.prior((1, 1), 1, None, None)

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
        names = ("head", "order", "width", "depth", "heads", "drop")
        return PriorConfig(
            grid, token_dim, condition_dim, condition_grid, **{name: getattr(self, name) for name in names}
        )


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
    """Train a prior in place on maps and conditions that are in memory; also the second stage, after a swap.

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
