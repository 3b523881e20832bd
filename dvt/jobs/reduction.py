"""A sum over many images that a job needs before its shards, such as an artifact that all of one grid shape share."""

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
    """An array (h, w, C) for each grid shape, from parts of its first images that add up.

    Parts are made wherever an image is at hand, added in pairs (:func:`tree_sum`), and finished once; so one process
    and a cluster get the same bits.

    Args:
        images: how many images of each grid shape take part, the first ones in order of their paths.
    """

    def __init__(self, images: int):
        self.images = images

    @abstractmethod
    def part(self, image: ImageEntry) -> Any | None:
        """Make an image's part, with tensors on the CPU; None where the image cannot be used."""

    @staticmethod
    @abstractmethod
    def add(first: Any, second: Any) -> Any:
        """Add two parts."""

    @abstractmethod
    def finish(self, total: Any) -> Tensor:
        """Make the array (h, w, C) of the sum of all parts."""

    def of(self, images: Sequence[ImageEntry]) -> Tensor | None:
        """Make the array of these images in this process; None where none of them can be used."""
        total = tree_sum((self.part(image) for image in images), self.add_known)
        return None if total is None else as_stored(self.finish(total))

    @classmethod
    def add_known(cls, first: Any | None, second: Any | None) -> Any | None:
        """Add two parts; None, of an image that could not be used, adds nothing."""
        if first is None or second is None:
            return second if first is None else first
        return cls.add(first, second)


class Reduced:
    """The shared array of each grid shape: from the store of a job that goes on, else made when first needed.

    Args:
        reduction: None for a job whose images share nothing.
        images: all of the job.
        resumed: the store that holds some of its shards already, if any.
        profile: where the time goes.
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
    """Choose the first images of a grid shape, in order of their paths, each content once."""
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
    """Add parts in pairs, the pairs in pairs, and so on; None without any.

    Floating-point sums depend on the order: here it follows from the number of parts alone, wherever each sum is made.
    At most log2 of the number of parts are held at a time.

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
