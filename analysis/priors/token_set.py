"""Compute the tokens of images that condition a prior, or that it is trained to generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dvt.backbones import Backbone
from dvt.errors import ConfigError, NonFiniteError
from dvt.images import load_image
from dvt.progress import Progress
from dvt.tokens import Tokens
from dvt.training import hold_out
from dvt.views import resize

Condition = Literal["cls", "patch", "both"]
CONDITIONS = ("cls", "patch", "both")
Clean = Callable[[Tokens], Tokens]

BATCH = 32  # images at a time where nothing is trained
_FEWEST = 8  # images
_MOST_HELD_OUT = 64


@dataclass(frozen=True)
class TokenSet:
    """Hold the tokens and pictures of N square images.

    Args:
        conditions: (N, M, C) float16 condition tokens; None for none.
        patches: (N, h, w, C) float16 patch tokens, where they are the target; else None.
        pictures: (N, 3, S, S) float16 in [0, 1].
    """

    conditions: Tensor | None
    patches: Tensor | None
    pictures: Tensor

    def __getitem__(self, rows: list[int]) -> TokenSet:
        conditions, patches = (each if each is None else each[rows] for each in (self.conditions, self.patches))
        return TokenSet(conditions, patches, self.pictures[rows])


def read_conditions(tokens: Tokens, kind: Condition) -> Tensor:
    """Select condition tokens (B, M, C): the class token, the patches in raster order, or one before the others.

    Raises:
        ConfigError: an unknown kind, or the backbone has no class token.
    """
    if kind not in CONDITIONS:
        raise ConfigError(f"there is no condition {kind!r}; it is one of {', '.join(CONDITIONS)}")
    if kind != "patch" and not tokens.prefix.shape[1]:
        raise ConfigError(f"this backbone has no class token for the condition {kind!r}; take 'patch'")
    parts = [] if kind == "patch" else [tokens.prefix[:, :1]]
    if kind != "cls":
        parts.append(tokens.patches.flatten(1, 2))
    return torch.cat(parts, dim=1)


def square(image: Tensor) -> Tensor:
    """Cut the middle of an image (3, H, W): (3, S, S) with S its shorter side."""
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side]


@torch.no_grad()
def read_tokens(
    paths: Sequence[Path],
    backbone: Backbone,
    kind: Condition | None,
    features: bool,
    side: int,
    denoiser: Clean | None,
    progress: Progress,
) -> TokenSet:
    """Run the middle square of each image through the backbone; the tokens stay in memory.

    Args:
        paths: of the images.
        backbone: sees them at its own size.
        kind: of the condition.
        features: whether the patch tokens are kept as a target, too.
        side: pixels of the pictures kept.
        denoiser: of the tokens.
        progress: called with ("look", images done, images).

    Raises:
        NonFiniteError: a token is NaN or infinite.
    """
    conditions: list[Tensor] = []
    patches: list[Tensor] = []
    pictures: list[Tensor] = []
    for start in range(0, len(paths), BATCH):
        images = [square(load_image(path)) for path in paths[start : start + BATCH]]
        tokens = backbone(torch.stack([resize(image, backbone.image_size) for image in images]).to(backbone.mean))
        tokens = tokens if denoiser is None else denoiser(tokens)
        if not bool(tokens.patches.isfinite().all() and tokens.prefix.isfinite().all()):
            raise NonFiniteError(f"{backbone.name} gave tokens with NaN or infinity; check its weights and precision")
        if kind is not None:
            conditions.append(_half(read_conditions(tokens, kind)))
        if features:
            patches.append(_half(tokens.patches))
        pictures.append(_half(torch.stack([resize(image, (side, side)) for image in images])))
        progress("look", start + len(images), len(paths))
    return TokenSet(_joined(conditions), _joined(patches), torch.cat(pictures))


def _half(values: Tensor) -> Tensor:
    return values.float().clamp(-65504, 65504).half().cpu()


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None


def split(sha256s: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into those to train on and those held out; equal files are on one side.

    Raises:
        ConfigError: there are too few different images.

    >>> split(list("abcdefgha"), 0.2, seed=0)
    ([0, 1, 3, 5, 6, 7, 8], [2, 4])
    """
    distinct = len(set(sha256s))
    if distinct < _FEWEST:
        raise ConfigError(
            f"a prior needs at least {_FEWEST} different images, 2 of them held out, got {distinct}; give more"
        )
    return hold_out(sha256s, min(max(2, round(share * distinct)), _MOST_HELD_OUT, distinct - 2), seed)


def token_identity(backbone: Backbone, denoiser: Clean | None) -> dict[str, Any]:
    """List what the tokens of a prior come from; of a denoiser, only that there was one."""
    spec = backbone.identity
    return {
        "backbone": spec.name,
        "weights_sha256": spec.weights_sha256,
        "layer": spec.layer,
        "stride": list(spec.stride),
        "size": list(spec.image_size),
        "denoised": denoiser is not None,
    }
