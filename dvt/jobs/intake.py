"""Read a shard's images: each distinct file once, from the first of its copies that can be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

from torch import Tensor

from dvt.errors import ImageError
from dvt.grids import Size
from dvt.images import is_url, load_image, load_pixels
from dvt.jobs.profile import Profile
from dvt.store import ImageEntry, Shard


def distinct(shard: Shard) -> list[list[ImageEntry]]:
    """Group a shard's images into copies of equal bytes, which are next to each other."""
    return [list(copies) for _, copies in groupby(shard.images, key=attrgetter("sha256"))]


@dataclass
class Intake:
    """Hold an image that was read, or the reasons why none of its copies could be read.

    Args:
        copies: the entries whose files have equal bytes.
        pixels: (3, H, W) RGB in [0, 1], or the result of `prepare`; None if no copy could be read. Of large images
            those of :func:`dvt.images.load_pixels`.
        size: (H, W) of the image in pixels.
        used: index of the copy that was read, -1 for none.
        errors: by index, the reasons why earlier copies could not be read.
        profile: seconds and bytes of reading.
    """

    copies: Sequence[ImageEntry]
    pixels: Tensor | None = None
    size: Size = (0, 0)
    used: int = -1
    errors: dict[int, ImageError] = field(default_factory=dict)
    profile: Profile = field(default_factory=Profile)

    def outcomes(self, error: Exception | None = None) -> Iterator[tuple[ImageEntry, Exception | None]]:
        """Yield each copy with the error to report: its own, otherwise the common one."""
        for number, entry in enumerate(self.copies):
            yield entry, self.errors.get(number, error)


def read_copies(
    copies: Sequence[ImageEntry],
    prepare: Callable[[Tensor, ImageEntry], Tensor] = lambda pixels, entry: pixels,
    large: bool = False,
) -> Intake:
    """Read the first copy that can be read.

    A copy that vanished, or whose bytes changed since it was listed, is reported under its own path, and the image is
    taken from the next one.

    Args:
        copies: entries of equal bytes.
        prepare: converts (3, H, W) pixels to the kept form; an ImageError that it raises is the copy's error.
        large: keep 8 bits of pixels that have no more, a quarter of the memory.
    """
    found = Intake(copies, profile=Profile(images=1))
    with found.profile.timed("read"):
        for number, entry in enumerate(copies):
            try:
                pixels = (load_pixels if large else load_image)(entry.path, entry.sha256)
                found.pixels = prepare(pixels, entry)
            except ImageError as error:
                found.errors[number] = error
                continue
            found.used, found.size = number, (pixels.shape[1], pixels.shape[2])
            with suppress(OSError):  # gone since it was read
                found.profile.read_bytes = 0 if is_url(entry.path) else os.path.getsize(entry.path)
            break
    return found
