"""Measure the seconds of each stage of a job over many images, and find the stage that bounds the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from dvt.devices import Event, record

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

#: Stages in the order in which an image passes through them; in those of `WAITS`, a thread waits.
STAGES = (
    "look",
    "artifact",
    "read",
    "views",
    "backbone",
    "wait_images",
    "wait_solver",
    "solve",
    "wait_backbone",
    "fetch",
    "pictures",
    "write",
)
WAITS = ("wait_images", "wait_solver", "wait_backbone")

# Fused attention that some versions of torch dispatch to without a formula for it: 2.14 counts none on the CPU.
_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")


@dataclass
class Profile:
    """Hold the seconds of each stage, and the numbers of images, views, operations and bytes.

    Stages: look (hashes and headers), artifact (the one that images share), read (decoding, in several threads), views
    (cutting), backbone, solve (the solver), fetch (maps to the host), pictures, write; and what waited: wait_images and
    wait_solver (the backbone for either), wait_backbone (the solver for tokens). Stages overlap, so their sum may
    exceed `wall`. On a GPU, views, backbone and extraction's fetch are its own seconds, by events.

    Args:
        seconds: seconds by stage; a stage that never ran is missing.
        wall: wall-clock seconds of the whole run, summed over processes.
        images: images computed; copies of the same bytes count once.
        views: views that passed through the backbone, including whole images.
        flops: floating-point operations of the backbone, multiplication and addition counted apart; 0 if not counted.
        read_bytes: bytes of the image files that were decoded.
        written_bytes: bytes of the shards written.
        readers: number of threads that share the stage "read".

    >>> profile = Profile(seconds={"views": 1.0, "backbone": 7.0, "solve": 3.0, "wait_solver": 1.0}, wall=10.0)
    >>> profile.rows()[1]
    ('backbone', 7.0, 0.7, 0.7)
    >>> print(profile.bound())
    backbone bounds this run: busy 70% of 10.0 s; the backbone was idle for 2.0 s (20%), 1.0 s of it for the solver and
    what follows
    """

    seconds: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    images: int = 0
    views: int = 0
    flops: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    readers: int = 1

    def spend(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a with block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spend(stage, time.perf_counter() - start)

    def add(self, other: Profile) -> None:
        """Add the profile of another part of the work or of another process."""
        for stage, seconds in other.seconds.items():
            self.spend(stage, seconds)
        for name in ("wall", "images", "views", "flops", "read_bytes", "written_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.readers = max(self.readers, other.readers)

    def of(self, *stages: str) -> float:
        """Sum the seconds of these stages."""
        return sum(self.seconds.get(stage, 0.0) for stage in stages)

    def busy(self, stage: str) -> float:
        """Compute the share of wall in which the threads of a stage work at it; 0 for waiting."""
        threads = self.readers if stage == "read" else 1
        return 0.0 if stage in WAITS or not self.wall else self.of(stage) / (threads * self.wall)

    def rows(self) -> list[tuple[str, float, float, float]]:
        """List stage, seconds, share of wall (above 1 if several threads add up) and the busy share of its threads."""
        return [
            (stage.replace("_", " "), self.of(stage), self.of(stage) / (self.wall or 1.0), self.busy(stage))
            for stage in STAGES
            if stage in self.seconds
        ]

    def bound(self) -> str:
        """Name, in a sentence, the stage that takes longest, and how long the backbone was idle."""
        slowest = max(STAGES, key=self.busy)
        idle = max(0.0, self.wall - self.of("views", "backbone"))
        share = idle / (self.wall or 1.0)
        waits = {"images": "wait_images", "the solver and what follows": "wait_solver"}
        parts = [f"{self.of(wait):.1f} s of it for {what}" for what, wait in waits.items() if self.of(wait) >= 0.05]
        return (
            f"{slowest} bounds this run: busy {self.busy(slowest):.0%} of {self.wall:.1f} s; the backbone was idle for "
            f"{idle:.1f} s ({share:.0%}){''.join(f', {part}' for part in parts)}"
        )


def flop_counter() -> FlopCounterMode:
    """Make torch's counter of floating-point operations, which knows attention on every device and version.

    >>> with flop_counter() as counter:
    ...     _ = torch.nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 2, 10, 16))
    >>> counter.get_total_flops() == 2 * (2 * 10 * 10 * 16) * 2
    True
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    operators = (getattr(torch.ops.aten, name, None) for name in _ATTENTION)
    missing = {operator: _attention_flops for operator in operators if operator and operator not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=missing)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Count scores and their weighted sum, two operations a product; (B, heads, tokens, channels) each."""
    batch, heads, tokens, channels = query
    return 2 * batch * heads * tokens * key[2] * (channels + value[3])


class StageTimer:
    """Measure seconds between marks in a device's work: by the clock on the CPU, by events in the stream on a GPU.

    Marking waits for nothing; asking for the seconds waits for the last mark.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str | None, float | Event]] = []

    def mark(self, stage: str | None = None) -> None:
        """End a stage, which began at the previous mark; None leaves the time since that mark uncounted."""
        event = record(self.device, timed=True)
        self._marks.append((stage, time.perf_counter() if event is None else event))

    def seconds(self) -> dict[str, float]:
        """Sum the seconds of each stage; on a GPU this waits for its marks."""
        marks, found = list(self._marks), dict[str, float]()
        if marks and not isinstance(marks[-1][1], float):
            marks[-1][1].synchronize()  # the marks before it are in the same stream
        for (_, start), (stage, end) in pairwise(marks):
            if stage is not None:
                found[stage] = found.get(stage, 0.0) + _between(start, end)
        return found


def _between(start: float | Event, end: float | Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)
    return start.elapsed_time(end) / 1000
