"""Choose the precision of a backbone's forward pass by a trial on a photograph."""

from __future__ import annotations

import logging
from copy import copy
from pathlib import Path
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import nn

import dvt
from dvt.backbones.backbone import Backbone
from dvt.devices import autocast, fast_bfloat16, has_tf32
from dvt.errors import ConfigError
from dvt.images import load_image
from dvt.views import resize

log = logging.getLogger(__name__)

MOST_DIFFERENCE = 0.005
"""The largest relative change of a photograph's tokens, in norm, at which "auto" leaves float32."""

_PHOTO = "astronaut.jpg"


Precision = Literal["float32", "tf32", "bfloat16", "float16"]

# What faster precisions change in the tokens of a model, kept so that a loop over images measures it once.
_DIFFERENCES: WeakKeyDictionary[nn.Module, dict[Any, float]] = WeakKeyDictionary()


def choose_precision(backbone: Backbone, dtype: str = "auto") -> Precision:
    """Resolve "auto" to a precision; return any other value unchanged.

    bfloat16 is chosen if the device is fast in it and the tokens of a bundled photograph change by at most
    :data:`MOST_DIFFERENCE`; else tf32, the shortened products of CUDA, by the same trial; else float32. The photograph
    is always the same, so a repeated job makes the same choice.

    Args:
        backbone: the backbone, on the device where it will run; for weights that are not float32, "auto" is "float32",
            that is, no autocast.
        dtype: "auto", "float32", "tf32", "bfloat16" or "float16".

    Returns:
        "float32", "tf32", "bfloat16" or "float16".

    Raises:
        ConfigError: the name is unknown, or it is tf32 and the device does not have it.
    """
    if dtype == "tf32" and not has_tf32(backbone.device):
        raise ConfigError(
            f"dtype is 'tf32', which {backbone.device} does not have (GPUs of CUDA since the A100 do); take 'auto' or "
            "'float32'"
        )
    if dtype in get_args(Precision):
        return cast(Precision, dtype)
    if dtype != "auto":
        raise ConfigError(f"dtype is {dtype!r}; it must be 'auto', 'float32', 'tf32', 'bfloat16' or 'float16'")
    kinds = {value.dtype for value in backbone.model.parameters() if value.is_floating_point()}
    if kinds - {torch.float32}:
        return "float32"
    if fast_bfloat16(backbone.device) and _close(backbone, "bfloat16"):
        return "bfloat16"
    return "tf32" if has_tf32(backbone.device) and _close(backbone, "tf32") else "float32"


def _close(backbone: Backbone, precision: Precision) -> bool:
    """Tell whether a precision changes the photograph's tokens by little enough; each is measured once."""
    measured = _DIFFERENCES.setdefault(backbone.model, {})
    about = (precision, backbone.device, backbone.layer, backbone.stride, backbone.image_size)
    if about not in measured:
        measured[about] = precision_difference(backbone, precision)
        log.info("%s changes a photograph's tokens by %.2f %%", precision, 100 * measured[about])
    return measured[about] <= MOST_DIFFERENCE


def in_precision(backbone: Backbone, dtype: str = "auto") -> Backbone:
    """Return a backbone with the same weights whose forward passes run in another precision; tokens are float32.

    Args:
        backbone: the backbone, which is not changed.
        dtype: as :func:`choose_precision` takes it.

    Raises:
        ConfigError: as :func:`choose_precision`.
    """
    chosen = copy(backbone)
    chosen.precision = choose_precision(backbone, dtype)
    return chosen


@torch.no_grad()
def precision_difference(backbone: Backbone, precision: str) -> float:
    """Measure the relative change of a photograph's tokens in a precision, in norm; infinity for NaN tokens."""
    photo = load_image(Path(dvt.__file__).parent / "data" / "photos" / _PHOTO)
    images = resize(photo, backbone.input_size((photo.shape[1], photo.shape[2])))[None].to(backbone.device)
    exact = backbone(images).patches.float()
    with autocast(backbone.device, precision):
        rough = backbone(images).patches.float()
    difference = float((rough - exact).norm() / exact.norm().clamp(min=1e-12))
    return difference if difference == difference else float("inf")
