"""Extend copies of modules: they share weights with the original, and their class has its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from dvt import grids
from dvt.backbones import families
from dvt.backbones.outside import shared_copy
from dvt.grids import Size

_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers", "_pool")


@cache
def derived(mixin: Any, base: Any) -> type[nn.Module]:
    """Derive a class from a mixin and `base` with the name of `base`, by which families are recognised."""

    def method(name: str) -> Callable[..., Any]:
        own = getattr(mixin, name)

        @wraps(getattr(base, name))  # keep the signature, which shows the options that the family has
        def call(self: Any, *args: Any, **options: Any) -> Any:
            return own(self, *args, **options)

        return call

    methods = {name: method(name) for name in _METHODS if name in vars(mixin)}
    about = {"__module__": base.__module__, "__doc__": base.__doc__, "_parts": (*_parts(base), mixin)}
    return type(base.__name__, (mixin, base), about | methods)


def reduce_derived(module: nn.Module) -> tuple[Any, ...]:
    """Implement ``__reduce_ex__`` of a mixin: pickle the class by its parts, because it cannot be imported by name."""
    return blank, _parts(type(module)), module.__dict__.copy()


def blank(root: Any, *mixins: Any) -> nn.Module:
    """Make a module without content, which unpickling fills."""
    kind = root
    for mixin in mixins:
        kind = derived(mixin, kind)
    return kind.__new__(kind)


def around(model: nn.Module, inner: nn.Module) -> nn.Module:
    """Replace a model's encoder by a changed one, inside a copy of timm's wrapper if there is one."""
    if families.core(model) is model:
        return inner
    outer = shared_copy(model)
    outer.encoder = inner
    return outer


def patch_grid(model: families.Model, images: Tensor) -> Size:
    """Compute the grid (h, w) of images (B, 3, H, W)."""
    patch = families.patch_size(model)
    size = images.shape[2], images.shape[3]
    if getattr(families.embedding(model), "dynamic_img_pad", False):
        size = -(-size[0] // patch[0]) * patch[0], -(-size[1] // patch[1]) * patch[1]
    return grids.grid_shape(size, patch, families.stride_of(model))


def taken_blocks(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """List the blocks for timm's `indices`: None means all, n the last n, negative indices count from the end."""
    if indices is None or isinstance(indices, int):
        return list(range(count))[-indices if indices else 0 :]
    return sorted({i % count for i in indices})


def _parts(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "_parts", (kind,))
