"""Batches of views as every closed form reads them: (tokens (V, h, w, C), coords (V, h, w, 2)), once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor

from dvt.errors import ShapeError

ViewBatch = tuple[Tensor, Tensor]


def check_batch(tokens: Tensor, coords: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Check that a batch has the form of one, and the shape of those before it.

    Args:
        tokens, coords: of the batch.
        shape: (h, w, C) of the batches before it, () for the first.

    Returns:
        (h, w, C) of this batch.

    Raises:
        ShapeError: it is no pair of tensors, they do not belong together, or the shape is another one.
    """
    if not (isinstance(tokens, Tensor) and isinstance(coords, Tensor)):
        raise ShapeError(f"views are batches of two tensors, (tokens, coords), got {type(tokens)} and {type(coords)}")
    if tokens.ndim != 4 or tuple(coords.shape) != (*tokens.shape[:3], 2):
        raise ShapeError(
            f"a batch of views has tokens {tuple(tokens.shape)} and coords {tuple(coords.shape)}; "
            "they must be (V, h, w, C) and (V, h, w, 2)"
        )
    found = tuple(tokens.shape[1:])
    if shape and found != shape:
        raise ShapeError(f"a view has shape {found}; it must be {shape}, as before")
    return found


def take_views(stream: Iterator[ViewBatch], views: int) -> tuple[list[ViewBatch], Iterator[ViewBatch]]:
    """Read that many views, and keep the stream of the others; batches are split: their size changes no choice."""
    head: list[ViewBatch] = []
    missing = views
    while missing > 0 and (batch := next(stream, None)) is not None:
        tokens, coords = batch
        head.append((tokens[:missing], coords[:missing]))
        if len(tokens) > missing:
            stream = chain([(tokens[missing:], coords[missing:])], stream)
        missing -= len(tokens)
    return head, stream
