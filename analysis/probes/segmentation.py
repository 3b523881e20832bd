"""Segment from frozen tokens: a linear head, and nearest class centroids without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt import grids
from dvt.analysis.probes.layouts import IGNORE
from dvt.analysis.probes.probe import (
    HeadConfig,
    Maps,
    Probe,
    check_maps,
    enlarged,
    fitted,
    grid_of,
    linear_head,
    train_head,
)
from dvt.errors import ConfigError, DataError, ShapeError
from dvt.grids import Size
from dvt.text import counted

_LABELS_A_PATCH = 4
_TOKENS_AT_ONCE = 256
NEAR = 3
"""bAcc counts the pixels within this distance of a boundary."""


class SegmentationProbe(Probe):
    """Hold what both segmentation probes share: predict the class of the best score, and count pixels for statistics.

    Args:
        num_classes: K; labels are 0 ... K - 1, or :data:`~dvt.analysis.probes.layouts.IGNORE` where they do not count.
    """

    metric = "mIoU"

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ConfigError(f"the number of classes is {num_classes}; it must be 1 or more")
        self.num_classes = num_classes

    def class_scores(self, tokens: Tensor) -> Tensor:
        """Score the classes at each token of a map (h, w, C): (1, K, h, w)."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, tokens: Maps, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Predict the classes of each image, (H, W) int64; class scores are enlarged before the best is taken."""
        return list(self._predictions(tokens, sizes))

    def _predictions(self, tokens: Maps, sizes: Sequence[Size] | None = None) -> Iterator[Tensor]:
        for i in range(len(tokens)):
            size = grid_of(tokens[i]) if sizes is None else sizes[i]
            yield enlarged(self.class_scores(tokens[i].float()), size, self.centres)[0].argmax(0)

    @torch.no_grad()
    def sufficient_statistics(self, tokens: Maps, targets: Sequence[Tensor]) -> Tensor:
        """Count pixels by image and class, (N, K, 5): right, true, predicted; then right and true near boundaries."""
        check_maps(tokens, targets)
        sizes = [(target.shape[0], target.shape[1]) for target in targets]
        found = self._predictions(tokens, sizes)
        return torch.stack([self._counts(p.cpu(), t) for p, t in zip(found, targets, strict=True)])

    def _counts(self, predicted: Tensor, labels: Tensor) -> Tensor:
        near = torch.where(near_boundaries(labels), labels, IGNORE)
        edges = class_counts(predicted, near, self.num_classes)
        return torch.cat((class_counts(predicted, labels, self.num_classes), edges[:, :2]), dim=1)

    @staticmethod
    def summarise(statistics: Tensor) -> dict[str, Tensor]:
        """Compute mIoU, mAcc, aAcc and bAcc, in [0, 1].

        mIoU and mAcc are means over the classes in the truth; aAcc is the share of right pixels; bAcc is that share
        among the pixels within 3 pixels of a boundary between classes.
        """
        right, true = statistics[..., 3].sum(-1), statistics[..., 4].sum(-1)
        return {**count_scores(statistics[..., :3]), "bAcc": right / true}


class LinearSegmentation(SegmentationProbe):
    """Segment by BatchNorm and a 1x1 convolution on frozen tokens, bilinear enlargement, cross-entropy.

    Args:
        num_classes: K.
        config: settings of the training.

    Source:
        The linear protocol of DINOv2 (Oquab et al., 2023, section 7.4) and DVT (Yang et al., 2024, section 5.1).

    >>> tokens = torch.eye(2)[torch.tensor([[0, 1], [1, 0]])].repeat(8, 1, 1, 1)   # (8, 2, 2, 2), the class itself
    >>> labels = [torch.tensor([[0, 1], [1, 0]])] * 8
    >>> LinearSegmentation(2).fit(tokens, labels).score(tokens, labels)["mIoU"]
    1.0
    """

    seeded = True

    def __init__(self, num_classes: int, config: HeadConfig | None = None) -> None:
        super().__init__(num_classes)
        self.config = config or HeadConfig()
        self.head: nn.Module | None = None

    def fit(self, tokens: Maps, targets: Sequence[Tensor]) -> LinearSegmentation:
        channels = check_maps(tokens, targets)
        check_labels(targets, self.num_classes)
        generator = torch.Generator().manual_seed(self.config.seed)
        head = self.empty_head(channels, self.num_classes, generator)
        self.head = train_head(head, _cross_entropy, tokens, targets, self.config, generator, self.centres)
        return self

    def empty_head(self, channels: int, outputs: int, generator: torch.Generator | None = None) -> nn.Module:
        """Make an untrained head for maps of C channels."""
        return linear_head(channels, outputs, generator or torch.Generator())

    def class_scores(self, tokens: Tensor) -> Tensor:
        head = fitted(self.head, self)
        _check_channels(tokens, head[0].num_features)
        return head(tokens.permute(2, 0, 1)[None])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Average over labelled pixels; 0, not NaN, when there is none."""
    total = nnf.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


class KnnSegmentation(SegmentationProbe):
    """Give each token the vote of the nearest class centroids of the training images; nothing is trained.

    A centroid is the mean token of one class in one image, each token weighted by the share that the class covers of
    the pixels nearest to it (its patch, where patches tile the image). Similarity is the cosine; it decides between
    classes with equal votes.

    Args:
        num_classes: K.
        neighbours: number of centroids that vote; all centroids vote if there are fewer.

    Source:
        Denoising Vision Transformers, ECCV 2024, the evaluation without training.
    """

    def __init__(self, num_classes: int, neighbours: int = 20) -> None:
        super().__init__(num_classes)
        if neighbours < 1:
            raise ConfigError(f"neighbours is {neighbours}; it must be 1 or more")
        self.neighbours = neighbours
        self.centroids: Tensor | None = None
        self.classes: Tensor | None = None

    def fit(self, tokens: Maps, targets: Sequence[Tensor]) -> KnnSegmentation:
        check_maps(tokens, targets)
        check_labels(targets, self.num_classes)
        parts = [self._centroids(tokens[i].float(), target) for i, target in enumerate(targets)]
        self.centroids = nnf.normalize(torch.cat([centroid for centroid, _ in parts]), dim=-1)
        self.classes = torch.cat([classes for _, classes in parts])
        return self

    def _centroids(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Average the tokens of each of the m classes in an image: (m, C), and their classes (m,)."""
        share = class_shares(labels, self.num_classes, self.centres(grid_of(tokens))).flatten(0, 1).to(tokens.device)
        present = share.sum(0).nonzero()[:, 0]
        weight = share[:, present] / share[:, present].sum(0)
        return weight.T @ tokens.flatten(0, 1), present

    def class_scores(self, tokens: Tensor) -> Tensor:
        centroids, classes = fitted(self.centroids, self), fitted(self.classes, self)
        _check_channels(tokens, centroids.shape[1])
        flat = nnf.normalize(tokens.flatten(0, 1), dim=-1)
        votes = torch.cat([self._vote(part @ centroids.T, classes) for part in flat.split(_TOKENS_AT_ONCE)])
        return votes.view(*grid_of(tokens), self.num_classes).permute(2, 0, 1)[None]

    def _vote(self, likeness: Tensor, classes: Tensor) -> Tensor:
        """Compute the share of votes of each class, (n, K), from (n, m) likeness to the centroids."""
        best = likeness.topk(min(self.neighbours, likeness.shape[1]), dim=1)
        # The bonuses add up to less than half a vote: similarity decides between equal votes and never outweighs one.
        worth = (1 + 0.2 / self.neighbours * best.values) / best.values.shape[1]
        return likeness.new_zeros(len(likeness), self.num_classes).scatter_add_(1, classes[best.indices], worth)


def class_shares(labels: Tensor, num_classes: int, centres: Tensor) -> Tensor:
    """Compute the share of each class in each cell of patch centres (h, w, 2), ignored labels counted in the whole.

    Returns:
        (h, w, K), from 4 x 4 labels per cell.
    """
    height, width = centres.shape[:2]
    step = _LABELS_A_PATCH
    rows, columns = grids.cell_pixels(centres, (labels.shape[0], labels.shape[1]), step)
    small = labels[rows[:, None], columns].long()
    one_hot = nnf.one_hot(torch.where(small == IGNORE, num_classes, small), num_classes + 1)[..., :-1].float()
    return one_hot.view(height, step, width, step, num_classes).mean((1, 3))


def class_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count pixels of each class: right ones, those of the truth, and those predicted; (K, 3) float64."""
    _check_range(labels, num_classes)
    if predicted.shape != labels.shape:
        raise ShapeError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} differ in shape")
    pairs = (labels.long() - IGNORE) * num_classes + predicted  # ignored ones come first
    confusion = torch.bincount(pairs.flatten(), minlength=(num_classes + 1) * num_classes).view(-1, num_classes)[1:]
    return torch.stack((confusion.diagonal(), confusion.sum(1), confusion.sum(0)), dim=1).double()


def near_boundaries(labels: Tensor, distance: int = NEAR) -> Tensor:
    """Mark the pixels (H, W) within a distance of a boundary between classes; ignored pixels make no boundary.

    >>> near_boundaries(torch.tensor([[0, 0, 0, 1, 1, 1]]), distance=1).int().tolist()
    [[0, 1, 1, 1, 1, 0]]
    """
    near = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (0, 1):
        one, other = labels.narrow(axis, 0, labels.shape[axis] - 1), labels.narrow(axis, 1, labels.shape[axis] - 1)
        apart = (one != other) & (one != IGNORE) & (other != IGNORE)
        for start in (0, 1):
            near.narrow(axis, start, labels.shape[axis] - 1).logical_or_(apart)
    for axis in (0, 1):  # rows first, then columns: a square, many times faster
        edges = near.clone()
        for step in range(1, min(distance, labels.shape[axis] - 1) + 1):
            count = labels.shape[axis] - step
            near.narrow(axis, step, count).logical_or_(edges.narrow(axis, 0, count))
            near.narrow(axis, 0, count).logical_or_(edges.narrow(axis, step, count))
    return near


def count_scores(counts: Tensor) -> dict[str, Tensor]:
    """Compute mIoU, mAcc and aAcc from counts (..., K, 3); the means leave out classes that the truth lacks.

    Predicting a class that the truth lacks still costs: those pixels are missing from the right ones.
    """
    right, true, found = counts.unbind(-1)
    present = true > 0
    number = present.sum(-1)
    iou = torch.where(present, right / (true + found - right).clamp(min=1), 0).sum(-1) / number
    accuracy = torch.where(present, right / true.clamp(min=1), 0).sum(-1) / number
    return {"mIoU": iou, "mAcc": accuracy, "aAcc": right.sum(-1) / true.sum(-1)}


def check_labels(targets: Sequence[Tensor], num_classes: int) -> None:
    """Raise a DataError where a label is out of range or all pixels of all images are ignored."""
    labelled = False
    for target in targets:
        _check_range(target, num_classes)
        labelled = labelled or bool((target != IGNORE).any())
    if not labelled:
        raise DataError(
            f"every pixel of {counted(len(targets), 'training image')} is ignored; there is nothing to learn"
        )


def _check_range(labels: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < IGNORE or high >= num_classes:
        raise DataError(
            f"labels lie in {low} ... {high}; they must lie in 0 ... {num_classes - 1}, or be {IGNORE} where ignored"
        )


def _check_channels(tokens: Tensor, channels: int) -> None:
    if tokens.shape[-1] != channels:
        raise ShapeError(f"tokens have {tokens.shape[-1]} channels; this probe was fitted on {channels}")
