"""Copies of timm modules that share their weights and do something more, under the class that they had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from dvt import grids
from dvt.backbones import families
from dvt.grids import Size

_METHODS = ("forward", "forward_features", "forward_intermediates")


@cache
def derived(mixin: Any, base: Any) -> type[nn.Module]:
    """`base` with a mixin before it, under its own name, because families go by that."""

    def method(name: str) -> Callable[..., Any]:
        own = getattr(mixin, name)

        @wraps(getattr(base, name))  # its signature says which options the family has
        def call(self: Any, *args: Any, **options: Any) -> Any:
            return own(self, *args, **options)

        return call

    methods = {name: method(name) for name in _METHODS if name in vars(mixin)}
    about = {"__module__": base.__module__, "__doc__": base.__doc__, "_parts": (*_parts(base), mixin)}
    return type(base.__name__, (mixin, base), about | methods)


def reduced(module: nn.Module) -> tuple[Any, ...]:
    """What ``__reduce_ex__`` of a mixin returns: a derived class has no name to be found by, its parts have."""
    return blank, _parts(type(module)), module.__dict__.copy()


def blank(root: Any, *mixins: Any) -> nn.Module:
    """A module without content, which unpickling fills."""
    kind = root
    for mixin in mixins:
        kind = derived(mixin, kind)
    return kind.__new__(kind)


def shared_copy(model: nn.Module, kind: type[nn.Module] | None = None) -> Any:
    """A module, of another class if wanted, with the same submodules and parameters; its own changes stay its own."""
    kind = kind or type(model)
    result = kind.__new__(kind)
    containers = (dict, list, set)
    result.__dict__.update({k: copy.copy(v) if isinstance(v, containers) else v for k, v in model.__dict__.items()})
    return result


def stride_of(model: families.Model) -> Size:
    """Pixels between patches: fewer than the patch where a backbone was loaded with a stride."""
    patch = families.patch_size(model)
    embed = families.embedding(model)
    layer = embed[0] if isinstance(embed, nn.Sequential) else getattr(embed, "proj", None)
    if isinstance(layer, nn.Conv2d) and layer.padding == (0, 0) and layer.kernel_size == patch:
        return layer.stride[0], layer.stride[1]
    return patch


def grid_of(model: families.Model, images: Tensor) -> Size:
    """(h, w) of images (B, 3, H, W)."""
    patch = families.patch_size(model)
    size = images.shape[2], images.shape[3]
    if getattr(families.embedding(model), "dynamic_img_pad", False):
        size = -(-size[0] // patch[0]) * patch[0], -(-size[1] // patch[1]) * patch[1]
    return grids.grid_shape(size, patch, stride_of(model))


def _parts(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "_parts", (kind,))
