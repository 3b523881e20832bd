"""Make the conditions of a trained prior from images, or from names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.priors.reading import Wanted, read_tokens
from dvt.analysis.priors.token_set import CONDITIONS, Clean, token_identity
from dvt.backbones import Backbone
from dvt.errors import BackboneError, ConfigError
from dvt.progress import silent


def conditions_of_images(
    card: dict[str, Any], paths: Sequence[Path], backbone: Backbone, denoiser: Clean | None = None
) -> Tensor:
    """Make conditions (n, M, C) from images.

    Args:
        card: the prior's card.
        paths: paths of the images.
        backbone: the backbone of the training.
        denoiser: the denoiser of the training, if any.

    Raises:
        ConfigError: the prior is not conditioned on images.
        BackboneError: the prior was trained on tokens of another backbone or denoiser.
        ImageError: an image cannot be read.
    """
    if card.get("condition") not in CONDITIONS:
        given = card.get("condition")
        raise ConfigError(f"this prior is conditioned on {given!r}, not on images; leave --condition out")
    usual = {"precision": "float32"}
    here, there = usual | token_identity(backbone, denoiser), usual | card
    changed = [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]
    if changed:
        raise BackboneError(
            f"the prior was trained on other tokens ({'; '.join(changed)}); give the same backbone, size and denoiser"
        )
    seen = read_tokens(list(paths), backbone, Wanted(card["condition"], False, 8), denoiser, silent)
    assert seen.conditions is not None
    return seen.conditions[list(range(len(seen)))]


def conditions_of_labels(card: dict[str, Any], labels: Sequence[str]) -> Tensor:
    """Make conditions (n, 1, K) from names of classes.

    Raises:
        ConfigError: the prior was trained without labels, or without one of these.
    """
    known = card.get("labels")
    if not known:
        given = card.get("condition")
        raise ConfigError(f"this prior is conditioned on {given!r} and knows no labels; train with --condition label")
    if unknown := [name for name in labels if name not in known]:
        raise ConfigError(f"there is no label {unknown[0]!r}; this prior knows {', '.join(known)}")
    return functional.one_hot(torch.tensor([known.index(name) for name in labels]), len(known)).half()[:, None]
