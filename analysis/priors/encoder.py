"""Encode pictures by the trunk of the priors, and train the encoder by the one contrastive loss of the package."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt import grids
from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.contrast import contrast, same
from dvt.analysis.priors.job_config import EncoderConfig
from dvt.analysis.priors.targets import patchify
from dvt.analysis.priors.token_set import BATCH, Rows
from dvt.analysis.priors.trunk import Trunk, reset_weights
from dvt.errors import ConfigError
from dvt.training import TrainingConfig, train
from dvt.views import ViewConfig, draw_boxes

_DECAY = 0.99  # of the teacher
_SHARPNESS = (0.1, 0.05)  # temperatures of student and teacher
_MASKED = (0.1, 0.5)  # least and greatest share of hidden patches


class PictureEncoder(nn.Module):
    """Encode pictures (B, 3, S, S) in [0, 1] as features (B, W), the mean of the trunk's tokens.

    Args:
        side: S in pixels, a multiple of `config.patch`.
        config: architecture.
        generator: draws the initial weights, on the CPU.

    >>> encoder = PictureEncoder(8, EncoderConfig(patch=4, width=16, depth=1), torch.Generator().manual_seed(0))
    >>> encoder(torch.rand(3, 3, 8, 8)).shape
    torch.Size([3, 16])
    """

    def __init__(self, side: int, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        if side % config.patch:
            raise ConfigError(f"pictures of {side} pixels cannot be cut into patches of {config.patch}; choose another")
        self.side, self.config = side, config
        cells, channels = side // config.patch, 3 * config.patch**2
        self.enter = nn.Linear(channels, config.width)
        self.hole = nn.Parameter(torch.empty(config.width))
        self.trunk = Trunk(PriorConfig((cells, cells), channels, None, None, width=config.width, depth=config.depth))
        reset_weights(self, generator)

    def tokens(self, pictures: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Encode each patch (B, L, W); hidden (B, L) booleans mark patches that the trunk must not see."""
        x = self.enter(2 * patchify(pictures, self.config.patch).flatten(1, 2) - 1)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.hole.to(x), x)
        return self.trunk(x, x.new_zeros(len(x), x.shape[-1]), None)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.tokens(pictures).mean(1)


@torch.no_grad()
def encode(encoder: nn.Module, pictures: Rows) -> Tensor:
    """Encode N pictures as features (N, C), batch by batch."""
    parts = (list(range(start, min(start + BATCH, len(pictures)))) for start in range(0, len(pictures), BATCH))
    return torch.cat([encoder(pictures[rows].float()) for rows in parts])


def augment(pictures: Tensor, config: EncoderConfig, generator: torch.Generator) -> Tensor:
    """Change each picture (B, 3, S, S) at random: crop, mirror and recolour it; the size stays."""
    count, size = len(pictures), (pictures.shape[2], pictures.shape[3])
    views = ViewConfig(count=count, scale=(config.crop, 1.0), flip=config.flip)
    boxes, flips = (drawn[1:] for drawn in draw_boxes(views, generator))
    coords = grids.view_to_image(grids.grid_centres(size), boxes, flips)
    cut = grids.sample_pixels(pictures, coords.to(pictures.device))
    gains, shifts = torch.randn(2, count, 3, 1, 1, generator=generator).to(cut)
    return ((cut - 0.5) * (config.colour * gains).exp() + 0.5 + 0.5 * config.colour * shifts).clamp(0, 1)


# --- training


class ContrastiveLearner(nn.Module):
    """Compute the training loss of an encoder: many positives and, if asked for, hidden patches as well.

    The second part lets the encoder predict, at hidden patches, to which of K prototypes a slowly following copy of it
    assigns the patches that it sees.

    Source:
        Tian et al., StableRep, 2023; for hidden patches Tian et al., SynCLR, 2024, after Zhou et al., iBOT, 2022.
    """

    def __init__(self, encoder: PictureEncoder, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        width = config.width
        self.encoder, self.config = encoder, config
        self.project = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, config.project))
        reset_weights(self.project, generator)
        if config.masked:
            self.prototypes = nn.Linear(width, config.prototypes, bias=False)
            reset_weights(self.prototypes, generator)
            self.teacher = deepcopy(encoder).requires_grad_(False)
            self.teacher_prototypes = deepcopy(self.prototypes).requires_grad_(False)

    def loss(self, pictures: Tensor, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute the loss of pictures (B, 3, S, S), of which those with equal ids (B,) are positives of each other."""
        views = augment(pictures, self.config, generator)
        if not self.config.masked:
            return {"loss": contrast(self.project(self.encoder(views)), **self._given(ids))}
        if self.training:
            self._follow()
        hidden = _draw_hidden(len(views), self.encoder.trunk.grid, generator).to(views.device)
        tokens = self.encoder.tokens(views, hidden)
        alike = contrast(self.project(tokens.mean(1)), **self._given(ids))
        student, teacher = _SHARPNESS
        with torch.no_grad():
            seen = _likeness(self.teacher.tokens(views)[hidden], self.teacher_prototypes.weight)
            target = sinkhorn(seen / teacher)
        guess = _likeness(tokens[hidden], self.prototypes.weight) / student
        masked = -(target * guess.log_softmax(-1)).sum(-1).mean()
        return {"loss": alike + self.config.masked * masked, "contrast": alike, "masked": masked}

    def _given(self, ids: Tensor) -> dict[str, Any]:
        return {"positives": same(ids), "temperature": self.config.temperature}

    @torch.no_grad()
    def _follow(self) -> None:
        mine = (*self.encoder.parameters(), *self.prototypes.parameters())
        theirs = (*self.teacher.parameters(), *self.teacher_prototypes.parameters())
        for slow, fast in zip(theirs, mine, strict=True):
            slow.lerp_(fast, 1 - _DECAY)


def _likeness(tokens: Tensor, prototypes: Tensor) -> Tensor:
    return functional.normalize(tokens, dim=-1) @ functional.normalize(prototypes, dim=-1).T


def _draw_hidden(count: int, grid: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw which patches to hide, at least one of each picture: (count, L) booleans."""
    length = grid[0] * grid[1]
    low, high = _MASKED
    shares = low + (high - low) * torch.rand(count, 1, generator=generator)
    return torch.rand(count, length, generator=generator).argsort(1).argsort(1) < (shares * length).ceil()


def sinkhorn(scores: Tensor, rounds: int = 3) -> Tensor:
    """Turn scores (N, K) into assignments whose rows sum to 1 and whose columns all have about the same weight.

    Source:
        Caron et al., SwAV, 2020; SynCLR takes three rounds.

    >>> sinkhorn(torch.tensor([[0.0, 5.0], [0.0, 5.0]])).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    log_p = scores.double()
    for _ in range(rounds):
        log_p = log_p - log_p.logsumexp(0)
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
    return log_p.exp().to(scores)


def draw_groups(ids: Tensor, batch: int, members: int, generator: torch.Generator) -> list[int]:
    """Draw rows for a batch: random ids, and of each `members` rows, repeated where the id has fewer.

    Args:
        ids: (N,) group of each row.
        batch: number of rows, a multiple of `members`.
        members: rows of one group.
    """
    order, counts = ids.argsort(stable=True), torch.unique(ids, return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    groups = torch.randperm(len(counts), generator=generator)
    groups = groups.repeat(-(-batch // members // len(groups)) or 1)[: batch // members]
    rows = []
    for start, count in zip(starts[groups].tolist(), counts[groups].tolist(), strict=True):
        some = torch.randperm(count, generator=generator)
        rows += order[start + some.repeat(-(-members // count))[:members]].tolist()
    return rows


def train_encoder(
    pictures: Rows, ids: Tensor, config: EncoderConfig, loop: TrainingConfig, folder: str | Path
) -> PictureEncoder:
    """Train an encoder on pictures whose ids say which are positives of each other, in a run that can be continued.

    Args:
        pictures: N pictures (3, S, S) in [0, 1].
        ids: (N,) numbers; those of one condition for StableRep, of one class for supervised contrast. With a different
            id for each picture the positives are views of one picture (SimCLR).
        config: the encoder and its loss.
        loop: the optimizer; its batch must be a multiple of `config.members`.
        folder: of the run.
    """
    if loop.batch_size % config.members:
        raise ConfigError(f"the batch must be a multiple of the {config.members} members, got {loop.batch_size}")
    draws = torch.Generator().manual_seed(loop.seed)
    encoder = PictureEncoder(int(pictures.shape[2]), config, draws)
    learner = ContrastiveLearner(encoder, config, draws)

    def batches(step: int, rank: int, world: int) -> dict[str, Tensor]:
        seed = int(np.random.SeedSequence((loop.seed, step)).generate_state(1)[0])
        rows = draw_groups(ids, loop.batch_size, config.members, torch.Generator().manual_seed(seed))
        part = loop.batch_size // world
        rows = rows[rank * part : (rank + 1) * part]
        return {"pictures": pictures[rows].float(), "ids": ids[rows], "seed": torch.tensor(seed + rank)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(batch["seed"]))
        return learner.loss(batch["pictures"], batch["ids"], generator)

    about = {"encoder": vars(config), "pictures": len(pictures), "groups": len(ids.unique())}
    train(learner, loss, batches, loop, folder, settings=about)
    return encoder.eval()
