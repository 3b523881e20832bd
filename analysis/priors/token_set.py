"""Hold the tokens of images that condition a prior or are its target, and split the images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dvt.analysis.priors.config import CONDITIONS, Condition
from dvt.backbones import Backbone
from dvt.errors import ConfigError
from dvt.grids import Size
from dvt.tokens import Tokens
from dvt.training import hold_out

Clean = Callable[[Tokens], Tokens]

BATCH = 32  # images at a time, without training
_FEWEST = 8  # images
_MOST_HELD_OUT = 64


class Rows(Protocol):
    """Index N arrays of one shape: a tensor, or an object that reads them from a disk when they are indexed."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape of all arrays together, N first."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, rows: Any) -> Tensor:
        """Read the arrays with these indices."""


@dataclass(frozen=True)
class TokenSet:
    """Hold the tokens and pictures of N square images.

    Args:
        conditions: (N, M, C) float16 condition tokens, or None.
        patches: (N, h, w, C) float16 patch tokens, if they are the target; else None.
        pictures: (N, 3, S, S) float16 in [0, 1].
        names: the images' files.
        sha256s: the hash of each file; a mirrored copy has that of its image.
        grid: (h, w) of the backbone's patches; None if no tokens were computed.
        mirrored: the number of mirrored copies; they are at the end, in the order of the first images.
        skipped: files that could not be read, with the reason.
    """

    conditions: Rows | None
    patches: Rows | None
    pictures: Rows
    names: tuple[str, ...] = ()
    sha256s: tuple[str, ...] = ()
    grid: Size | None = None
    mirrored: int = 0
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True)
class Chosen:
    """Select some rows of an array, in a given order.

    >>> Chosen(torch.arange(5), [4, 2, 0])[[0, 1]].tolist()
    [4, 2]
    """

    of: Rows
    rows: Sequence[int]

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.rows), *self.of.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Tensor:
        wanted = range(len(self.rows))[rows] if isinstance(rows, slice) else rows
        return self.of[[self.rows[row] for row in wanted]]


@dataclass(frozen=True)
class Computed:
    """Compute rows from those of another array by a function of a batch, when they are indexed.

    >>> Computed(torch.arange(3.0), torch.square, (3,))[[2]].tolist()
    [4.0]
    """

    of: Rows
    function: Callable[[Tensor], Tensor]
    shape: Sequence[int]

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.function(self.of[rows])


def read_conditions(tokens: Tokens, kind: Condition) -> Tensor:
    """Select condition tokens (B, M, C).

    Args:
        tokens: a backbone's tokens.
        kind: "cls" the class token, "mean" the mean patch, "patch" the patches in raster order, "both" the class token
            before the patches.

    Raises:
        ConfigError: the kind is unknown, or the backbone has no class token.
    """
    if kind not in CONDITIONS:
        raise ConfigError(f"there is no condition {kind!r}; it is one of {', '.join(CONDITIONS)}")
    if kind == "mean":
        return tokens.patches.mean((1, 2))[:, None]
    if kind != "patch" and not tokens.prefix.shape[1]:
        raise ConfigError(f"this backbone has no class token for the condition {kind!r}; take 'patch' or 'mean'")
    parts = [] if kind == "patch" else [tokens.prefix[:, :1]]
    if kind != "cls":
        parts.append(tokens.patches.flatten(1, 2))
    return torch.cat(parts, dim=1)


def square(image: Tensor) -> Tensor:
    """Cut the middle square (3, S, S) out of an image (3, H, W); S is its shorter side."""
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side]


def split(sha256s: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into training and held-out ones; equal files stay together.

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


def token_identity(backbone: Backbone | None, denoiser: Clean | None) -> dict[str, Any]:
    """Describe the backbone and denoiser that a prior's tokens come from, as plain JSON values.

    Without a backbone, for a prior that needs no tokens, it is named None.

    A denoiser is described by its attribute `identity` (:class:`dvt.tokens.TokenMap`), a function without one by its
    name.
    """
    if backbone is None:
        return {"backbone": None}
    spec = backbone.identity
    named = f"{getattr(denoiser, '__module__', '')}.{getattr(denoiser, '__qualname__', type(denoiser).__qualname__)}"
    return {
        "backbone": spec.name,
        "weights_sha256": spec.weights_sha256,
        "layer": spec.layer,
        "stride": list(spec.stride),
        "size": list(spec.image_size),
        "denoiser": None if denoiser is None else json.loads(json.dumps(getattr(denoiser, "identity", named))),
        **backbone.precision_setting,
    }
