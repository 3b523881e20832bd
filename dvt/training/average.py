"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _Average:
    """The exponential moving average of everything in a model's state dict, or nothing at decay 0."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict() if self.values else {}
        for name, value in self.values.items():
            if value.is_floating_point():
                value.lerp_(state[name], weight)
            else:
                value.copy_(state[name])

    def copy_to(self, model: nn.Module) -> None:
        _copy(self.values, model.state_dict())

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside the block, and its own again after it."""
        kept = {name: value.clone() for name, value in model.state_dict().items()} if self.values else {}
        try:
            self.copy_to(model)
            yield
        finally:
            _copy(kept, model.state_dict())


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        to[name].copy_(value)
