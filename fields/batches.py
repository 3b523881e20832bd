"""Check and split the batches of views that solvers read: (tokens (V, h, w, C), coords (V, h, w, 2))."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor

from dvt.errors import ShapeError

ViewBatch = tuple[Tensor, Tensor]


def check_batch(tokens: Tensor, coords: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Check that a batch is well formed and has the shape of the previous batches.

    Args:
        tokens, coords: the two tensors of the batch.
        shape: (h, w, C) of the previous batches, () for the first batch.

    Returns:
        (h, w, C) of this batch.

    Raises:
        ShapeError: the two are not tensors, do not fit together, or have another shape.
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
    """Read the first views of a stream, and return the stream of the others.

    A batch is split if necessary, so that the batch size does not change which views are first.
    """
    head: list[ViewBatch] = []
    missing = views
    while missing > 0 and (batch := next(stream, None)) is not None:
        tokens, coords = batch
        head.append((tokens[:missing], coords[:missing]))
        if len(tokens) > missing:
            stream = chain([(tokens[missing:], coords[missing:])], stream)
        missing -= len(tokens)
    return head, stream
