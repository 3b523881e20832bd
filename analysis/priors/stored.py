"""Read the tokens of a feature store in the form that a prior takes, when they are indexed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.priors.token_set import Condition, Rows, read_conditions
from dvt.errors import StoreError
from dvt.store import FeatureStore
from dvt.text import counted
from dvt.tokens import Tokens


class StoreRows:
    """Read the middle square of each image's tokens from a store when they are indexed.

    Args:
        store: the store, opened with the term to read.
        kind: the kind of condition tokens; None for the patch tokens as a map.
        rows: indices of the images in the store.
        side: the square's side in patches.
    """

    def __init__(self, store: FeatureStore, kind: Condition | None, rows: Sequence[int], side: int) -> None:
        self.store, self.kind, self.rows, self.side = store, kind, list(rows), side
        self.shape = (len(self.rows), *self._one(0).shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Tensor:
        wanted = range(len(self.rows))[rows] if isinstance(rows, slice) else rows
        return torch.stack([self._one(int(row)) for row in wanted])

    def _one(self, row: int) -> Tensor:
        tokens = self.store[self.rows[row]]
        top, left, _ = grids.middle_square(tokens.grid)
        patches = tokens.patches[:, top : top + self.side, left : left + self.side]
        if not bool(patches.isfinite().all()):
            raise StoreError(f"tokens of {self.store.images[self.rows[row]]!r} hold NaN or infinity; make them again")
        cut = Tokens(patches, tokens.prefix)
        return (patches if self.kind is None else read_conditions(cut, self.kind))[0].half()


def store_rows(
    store: FeatureStore, condition: Condition | None, features: bool, names: Sequence[str]
) -> dict[str, Rows]:
    """Make the conditions and the patches of the images with these names, each if it is wanted.

    Raises:
        StoreError: an image is no longer there.
    """
    place = {name: row for row, name in enumerate(store.images)}
    if lost := [name for name in names if name not in place]:
        raise StoreError(
            f"{str(store.path)!r} no longer holds {counted(len(lost), 'image')} of the run, such as {lost[0]!r}"
        )
    rows = [place[name] for name in names]
    side = min(store.grids[rows[0]])
    found: dict[str, Rows] = {}
    if condition is not None:
        found["conditions"] = StoreRows(store, condition, rows, side)
    if features:
        found["patches"] = StoreRows(store, None, rows, side)
    return found


def store_identity(path: str | Path, term: str) -> dict[str, Any]:
    """Describe the backbone and the job that a store's tokens come from, for a prior's card."""
    job = FeatureStore(path, term).job
    names = ("backbone", "weights_sha256", "layer", "stride", "size")
    return {**{name: getattr(job, name) for name in names}, "denoiser": {"store": job.digest, "term": term}}
