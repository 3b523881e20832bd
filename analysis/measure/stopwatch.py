"""Measure the time of each part of an analysis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dvt.devices import finish_all

if TYPE_CHECKING:
    from dvt.backbones import Backbone


class Stopwatch:
    """Count the seconds spent in the backbone, in solvers and in denoisers.

    The time of a part that runs inside another part counts for the inner one only.
    """

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "fields": 0.0, "denoisers": 0.0}

    @contextmanager
    def measuring(self, what: str, device: torch.device) -> Iterator[None]:
        inner = sum(self.seconds.values())
        start = time.perf_counter()
        try:
            yield
        finally:
            finish_all(device)
            self.seconds[what] += time.perf_counter() - start - (sum(self.seconds.values()) - inner)

    def split(self, total: float) -> dict[str, float]:
        """Divide the total into the seconds of each part; "metrics" is the rest of the total."""
        return {**self.seconds, "total": total, "metrics": total - sum(self.seconds.values())}

    @contextmanager
    def watching(self, backbone: Backbone) -> Iterator[None]:
        """Count the forward passes that run inside another part, such as a user's function, as the backbone's time."""
        entered: list[Any] = []

        def before(*_: object) -> None:
            entered.append(self.measuring("forward", backbone.device))
            entered[-1].__enter__()

        def after(*_: object) -> None:
            entered.pop().__exit__(None, None, None)

        hooks = [backbone.register_forward_pre_hook(before), backbone.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
