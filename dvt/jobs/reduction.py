"""Sum over many images before a job's shards start, such as for an artifact that images of one grid shape share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dvt.grids import Size
from dvt.jobs.profile import Profile
from dvt.store import FeatureStore, ImageEntry, Shard

Part = TypeVar("Part")


class Reduction(ABC):
    """Compute an array (h, w, C) for each grid shape by adding parts of its first images.

    Any process may compute a part. Parts are added in a fixed order of pairs (:func:`tree_sum`), so one process and a
    cluster get the same bits.

    Args:
        images: how many images of each grid shape take part: the first in order of their paths.
    """

    def __init__(self, images: int):
        self.images = images

    @abstractmethod
    def part(self, image: ImageEntry) -> Any | None:
        """Compute an image's part, with tensors on the CPU; None if the image cannot be used."""

    @staticmethod
    @abstractmethod
    def add(first: Any, second: Any) -> Any:
        """Add two parts."""

    @abstractmethod
    def finish(self, total: Any) -> Tensor:
        """Compute the array (h, w, C) from the sum of all parts."""

    def of(self, images: Sequence[ImageEntry]) -> Tensor | None:
        """Compute the array from these images in this process; None if none of them can be used."""
        total = tree_sum((self.part(image) for image in images), self.add_known)
        return None if total is None else self.finished(total)

    def finished(self, total: Any) -> Tensor:
        """Compute the array as the store will hold it."""
        return as_stored(self.finish(total))

    @classmethod
    def add_known(cls, first: Any | None, second: Any | None) -> Any | None:
        """Add two parts; None, from an image that could not be used, adds nothing."""
        if first is None or second is None:
            return second if first is None else first
        return cls.add(first, second)


class Reduced:
    """Keep the shared array of each grid shape: read from the store of a resumed job, else computed when first needed.

    Args:
        reduction: None for a job whose images share nothing.
        images: all images of the job.
        resumed: the store that already holds some of the job's shards, if any.
        profile: records the time spent.
    """

    def __init__(
        self,
        reduction: Reduction | None,
        images: Sequence[ImageEntry],
        resumed: str | Path | None,
        profile: Profile,
    ):
        self.reduction, self.images, self.profile = reduction, images, profile
        stored = stored_artifacts(FeatureStore(resumed)) if reduction is not None and resumed is not None else {}
        self.found: dict[Size, Tensor | None] = {**stored}

    def of(self, shard: Shard) -> Tensor | None:
        """Find the array that a shard's images share, if any."""
        grid = shard.images[0].grid
        if self.reduction is not None and grid not in self.found:
            with self.profile.timed("artifact"):
                self.found[grid] = self.reduction.of(first_images(self.images, grid, self.reduction.images))
        return self.found.get(grid)


def first_images(images: Sequence[ImageEntry], grid: Size, count: int) -> list[ImageEntry]:
    """Choose the first images of a grid shape, in order of their paths, without files of equal content."""
    first: dict[str, ImageEntry] = {}
    for image in sorted(image for image in images if image.grid == grid):
        first.setdefault(image.sha256, image)
    return list(first.values())[:count]


def stored_artifacts(store: FeatureStore) -> dict[Size, Tensor]:
    """Read the shared artifacts (h, w, C) that a store holds, by grid shape."""
    found: dict[Size, Tensor] = {}
    for index, grid in enumerate(store.grids):
        if grid not in found and (artifact := store.artifact(index)) is not None:
            found[grid] = torch.from_numpy(artifact).float()
    return found


def as_stored(artifact: Tensor) -> Tensor:
    """Round as the store does, so that a run that is resumed from the store subtracts the same numbers."""
    half = artifact.half().float()
    return half if half.isfinite().all() else artifact


def tree_sum(parts: Iterable[Part], add: Callable[[Part, Part], Part]) -> Part | None:
    """Add parts in pairs, the sums in pairs, and so on; return None if there are no parts.

    Floating-point sums depend on the order. Here the order depends only on the number of parts, not on the process
    that adds them. About log2 of the number of parts are held at a time.

    >>> tree_sum("abcdefg", lambda first, second: f"({first}{second})")
    '(((ab)(cd))((ef)g))'
    """
    held: list[tuple[int, Part]] = []  # sums and the numbers of their parts, all powers of two, falling
    for part in parts:
        size = 1
        while held and held[-1][0] == size:
            part, size = add(held.pop()[1], part), 2 * size
        held.append((size, part))
    while len(held) > 1:
        (size, last), (before, previous) = held.pop(), held.pop()
        held.append((before + size, add(previous, last)))
    return held[0][1] if held else None
