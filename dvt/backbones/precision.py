"""Choose the precision of a backbone's forward pass by a trial on a photograph."""

from __future__ import annotations

import logging
from copy import copy
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

import dvt
from dvt.backbones.backbone import Backbone
from dvt.devices import autocast, fast_bfloat16
from dvt.errors import ConfigError
from dvt.images import load_image
from dvt.views import resize

log = logging.getLogger(__name__)

MOST_DIFFERENCE = 0.005
"""The largest relative change of a photograph's tokens, in norm, at which "auto" takes bfloat16."""

_PHOTO = "astronaut.jpg"


Precision = Literal["float32", "bfloat16", "float16"]

# What bfloat16 changes in the tokens of a model, kept so that a loop over images measures it once.
_DIFFERENCES: WeakKeyDictionary[nn.Module, dict[Any, float]] = WeakKeyDictionary()


def choose_precision(backbone: Backbone, dtype: str = "auto") -> Precision:
    """Resolve "auto" to a precision; return any other value unchanged.

    bfloat16 is chosen if the device is fast in it and the tokens of a bundled photograph change by at most
    :data:`MOST_DIFFERENCE`. The photograph is always the same, so a repeated job makes the same choice.

    Args:
        backbone: the backbone, on the device where it will run; for weights that are not float32, "auto" is "float32",
            that is, no autocast.
        dtype: "auto", "float32", "bfloat16" or "float16".

    Returns:
        "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: the name is unknown.
    """
    if dtype in ("float32", "bfloat16", "float16"):
        return cast(Precision, dtype)
    if dtype != "auto":
        raise ConfigError(f"dtype is {dtype!r}; it must be 'auto', 'float32', 'bfloat16' or 'float16'")
    kinds = {value.dtype for value in backbone.model.parameters() if value.is_floating_point()}
    if kinds - {torch.float32} or not fast_bfloat16(backbone.device):
        return "float32"
    measured = _DIFFERENCES.setdefault(backbone.model, {})
    about = (backbone.device, backbone.layer, backbone.stride, backbone.image_size)
    if about not in measured:
        measured[about] = precision_difference(backbone, torch.bfloat16)
    difference = measured[about]
    chosen: Precision = "bfloat16" if difference <= MOST_DIFFERENCE else "float32"
    log.info("bfloat16 changes a photograph's tokens by %.2f %%: %s is taken", 100 * difference, chosen)
    return chosen


def in_precision(backbone: Backbone, dtype: str = "auto") -> Backbone:
    """Return a backbone with the same weights whose forward passes run in another precision; tokens are float32.

    Args:
        backbone: the backbone, which is not changed.
        dtype: as :func:`choose_precision` takes it.

    Raises:
        ConfigError: the name is unknown.
    """
    chosen = copy(backbone)
    chosen.precision = getattr(torch, choose_precision(backbone, dtype))
    return chosen


@torch.no_grad()
def precision_difference(backbone: Backbone, dtype: torch.dtype) -> float:
    """Measure the relative change of a photograph's tokens in a precision, in norm; infinity for NaN tokens."""
    photo = load_image(Path(dvt.__file__).parent / "data" / "photos" / _PHOTO)
    images = resize(photo, backbone.input_size((photo.shape[1], photo.shape[2])))[None].to(backbone.device)
    exact = backbone(images).patches.float()
    with autocast(backbone.device, dtype):
        rough = backbone(images).patches.float()
    difference = float((rough - exact).norm() / exact.norm().clamp(min=1e-12))
    return difference if difference == difference else float("inf")
