"""Keep the exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average a model's weights exponentially over the steps; with decay 0, do nothing."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Include the weights after a step, counted from 0; integers are copied."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict() if self.values else {}
        for name, value in self.values.items():
            if value.is_floating_point():
                value.lerp_(state[name], weight)
            else:
                value.copy_(state[name])

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averaged weights into a model."""
        copy_values(self.values, model.state_dict())

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Give a model the averaged weights inside the block, and restore its own afterwards."""
        kept = {name: value.clone() for name, value in model.state_dict().items()} if self.values else {}
        try:
            self.copy_to(model)
            yield
        finally:
            copy_values(kept, model.state_dict())


@torch.no_grad()
def copy_values(values: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    """Copy tensors by name into others, in place."""
    for name, value in values.items():
        to[name].copy_(value)
