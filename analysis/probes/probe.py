"""Define the interface of labelled probes, and train those that are a small head on frozen tokens."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt import grids
from dvt.analysis.config import HeadConfig
from dvt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from dvt.grids import Size
from dvt.text import counted

Maps = Sequence[Tensor] | Tensor
"""Token maps (h, w, C), one per image: a list, an object that reads them when indexed, or a tensor (B, h, w, C)."""

Centres = Callable[[Size], Tensor]
"""A function that maps a grid (h, w) to its patch centres (h, w, 2), such as :meth:`Backbone.grid_centres`."""

SomeProbe = TypeVar("SomeProbe", bound="Probe")


class Probe(ABC):
    """Measure what frozen tokens hold about a target: fit on some images, predict and score on others.

    Scores are computed from *statistics*: numbers of each image that can be added over images (counts of pixels, sums
    of errors). So a bootstrap over images needs no second prediction.

    Attributes:
        centres: maps the grid of a token map to its patch centres; by default patches tile the image.
        metric: name of the headline score.
        lower_is_better: True if it is an error.
        seeded: True if fitting or the scored data use random numbers.
    """

    metric: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    centres: Centres = staticmethod(grids.grid_centres)

    def at(self: SomeProbe, centres: Centres) -> SomeProbe:
        """Copy the probe for maps of other patch centres; what was fitted is shared."""
        other = copy.copy(self)
        other.centres = centres
        return other

    @abstractmethod
    def fit(self: SomeProbe, tokens: Maps, targets: Sequence[Tensor]) -> SomeProbe:
        """Learn from the token maps of images and their targets, as :meth:`LabelledData.read` gives them.

        Raises:
            DataError: no target holds anything to learn from, or one is out of range.
            ShapeError: counts or feature sizes differ.
            NonFiniteError: a token is NaN or infinite.
        """

    @abstractmethod
    def predict(self, tokens: Maps, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Predict the target of each image, at (H, W) of `sizes`, or one value per token if `sizes` is None."""

    @abstractmethod
    def sufficient_statistics(self, tokens: Maps, targets: Sequence[Tensor]) -> Tensor:
        """Compute the statistics of each image, (N, ...) float64; zeros for an image whose targets are all left out."""

    @staticmethod
    @abstractmethod
    def summarise(statistics: Tensor) -> dict[str, Tensor]:
        """Compute the scores from added statistics; leading dimensions are kept; NaN for undefined scores."""

    def score(self, tokens: Maps, targets: Sequence[Tensor]) -> dict[str, float]:
        """Score the predictions; shares and errors, not per cent.

        Raises:
            DataError: no image has anything to score.
        """
        statistics = self.sufficient_statistics(tokens, targets).sum(0)
        if not bool(statistics.any()):
            raise DataError(
                f"nothing to score: all targets of {counted(len(targets), 'image')} are left out (ignored or 0)"
            )
        return {name: float(value) for name, value in self.summarise(statistics).items()}


HeadLoss = Callable[[Tensor, Tensor], Tensor]


def linear_head(channels: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """Make BatchNorm and a 1x1 convolution; BatchNorm averages all batches equally, because the tokens are frozen."""
    head = nn.Sequential(nn.BatchNorm2d(channels, momentum=None), nn.Conv2d(channels, outputs, 1))
    weights: Any = head[1]
    nn.init.normal_(weights.weight, std=0.01, generator=generator)
    nn.init.zeros_(weights.bias)
    return head


def train_head(
    head: nn.Module,
    loss: HeadLoss,
    tokens: Maps,
    targets: Sequence[Tensor],
    config: HeadConfig,
    generator: torch.Generator,
    centres: Centres = grids.grid_centres,
) -> nn.Module:
    """Train a head (B, C, h, w) -> (B, K, h, w) to minimise `loss` of its bilinearly enlarged output.

    Everything runs on the device of the tokens.

    Args:
        loss: a function of outputs (B, K, H, W) and targets (B, H, W); it must be finite if all targets are left out.
        tokens: maps of any grid; a batch holds one grid.
        targets: (H, W) each, of the image's size or any other.
        centres: of the patches of a grid.
    """
    small = [reduced(target, _target_size(target, grid_of(tokens[i]), config)) for i, target in enumerate(targets)]
    batches = _HeadBatches([(*grid_of(tokens[i]), *small[i].shape) for i in range(len(small))], config.batch)
    head.to(tokens[0].device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = max(2, config.epochs * len(batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
    for _ in range(config.epochs):
        for part in batches.shuffled(generator):
            x = torch.stack([tokens[i].float() for i in part]).permute(0, 3, 1, 2)
            y = torch.stack([small[i] for i in part]).to(x.device)
            value = loss(enlarged(head(x), (y.shape[1], y.shape[2]), centres), y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    if not all(bool(parameter.isfinite().all()) for parameter in head.parameters()):
        raise NonFiniteError("the head's weights became NaN or infinite; lower the learning rate")
    return head.eval()


class _HeadBatches:
    """List indices in batches of equal shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], batch: int) -> None:
        self.groups = [
            torch.tensor([i for i, shape in enumerate(shapes) if shape == wanted]) for wanted in sorted(set(shapes))
        ]
        self.batch = batch

    def __len__(self) -> int:
        return sum(-(-len(group) // self.batch) for group in self.groups)

    def shuffled(self, generator: torch.Generator) -> Iterator[list[int]]:
        parts = [
            part.tolist()
            for group in self.groups
            for part in group[torch.randperm(len(group), generator=generator)].tensor_split(
                -(-len(group) // self.batch)
            )
        ]
        yield from (parts[i] for i in torch.randperm(len(parts), generator=generator).tolist())


def _target_size(target: Tensor, grid: Size, config: HeadConfig) -> Size:
    size = (target.shape[0], target.shape[1])
    wanted = (config.labels_per_patch * grid[0], config.labels_per_patch * grid[1])
    fits = config.labels_per_patch and wanted[0] <= size[0] and wanted[1] <= size[1]
    return wanted if fits else size


def reduced(target: Tensor, size: Size) -> Tensor:
    """Resize a target (H, W) by nearest neighbours, so that classes and holes stay exact."""
    if tuple(target.shape) == tuple(size):
        return target
    return nnf.interpolate(target[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(target.dtype)


def enlarged(maps: Tensor, size: Size, centres: Centres = grids.grid_centres) -> Tensor:
    """Sample maps (B, K, h, w) at the pixels of an image, bilinear, by their patch centres."""
    tiling = centres is grids.grid_centres
    return grids.enlarge(maps, size, None if tiling else centres((maps.shape[2], maps.shape[3])))


def grid_of(tokens: Tensor) -> Size:
    """Return (h, w) of a map (h, w, C)."""
    return tokens.shape[0], tokens.shape[1]


def check_maps(tokens: Maps, targets: Sequence[Tensor], channels: int | None = None, rank: int = 2) -> int:
    """Check that maps and targets fit together, and return C of the maps.

    Raises:
        ShapeError: counts, ranks or feature sizes differ.
        NonFiniteError: a token is NaN or infinite.
    """
    if not len(tokens) or len(tokens) != len(targets):
        given = f"{counted(len(tokens), 'token map')} and {counted(len(targets), 'target')}"
        raise ShapeError(f"{given} were given; give one of each per image")
    for i in range(len(tokens)):
        one = tokens[i]
        channels = one.shape[-1] if channels is None else channels
        if one.ndim != 3 or one.shape[-1] != channels:
            raise ShapeError(f"map {i} has shape {tuple(one.shape)}; it must be (h, w, {channels})")
        if targets[i].ndim != rank:
            raise ShapeError(f"target {i} has shape {tuple(targets[i].shape)}; it must have {rank} dimensions")
        if not bool(one.isfinite().all()):
            raise NonFiniteError(f"tokens of image {i} hold NaN or infinity; compute them again")
    return int(channels or 0)


def fitted(value: Any, probe: Probe) -> Any:
    """Return a value that fit() sets.

    Raises:
        ConfigError: the value is None, because fit() was not called.
    """
    if value is None:
        raise ConfigError(f"this {type(probe).__name__} has not been fitted; call fit(tokens, targets) first")
    return value
