"""Batch tokens, with the images that they come from, for training loops."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

log = logging.getLogger(__name__)

#: How to batch images of several grids: "group" puts one grid in a batch, "pad" fills smaller maps up with zeros.
Ragged: TypeAlias = Literal["group", "pad"]


@dataclass(frozen=True, repr=False)
class StoredTokens(Tokens):
    """Hold the tokens of images of a store, and which images they are; one image is a batch of one.

    Args:
        patches: (B, h, w, C) of the first term that the store was opened with.
        prefix: (B, P, C).
        paths: the paths of the images, as in the store.
        sha256s: the hashes of the images' files.
        indices: the (B,) indices of the images in the store, int64.
        terms: the (B, h, w, C) tokens of each term that the store was opened with, by name.
        mask: (B, h, w), True where there is a patch, if smaller maps were filled up with zeros; otherwise None.
        labels: the (B, ...) labels of the images, or a list if they are not numbers of one shape; None without labels.
    """

    paths: tuple[str, ...] = ()
    sha256s: tuple[str, ...] = ()
    indices: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    labels: Any = None

    def __getitem__(self, index: int | slice) -> StoredTokens:
        part = self.part(index)
        return replace(
            self,
            patches=self.patches[part],
            prefix=self.prefix[part],
            paths=self.paths[part],
            sha256s=self.sha256s[part],
            indices=self.indices[part],
            terms={name: values[part] for name, values in self.terms.items()},
            mask=None if self.mask is None else self.mask[part],
            labels=None if self.labels is None else self.labels[part],
        )

    def with_patches(self, patches: Tensor) -> StoredTokens:
        """Replace the patch tokens; keep prefix tokens and images."""
        return replace(self, patches=patches)

    def to(self, *args, **kwargs) -> StoredTokens:
        """Convert all tokens as :meth:`torch.Tensor.to` does; indices, mask and labels change the device only."""
        patches = self.patches.to(*args, **kwargs)
        there = lambda values: values.to(patches.device) if isinstance(values, Tensor) else values  # noqa: E731
        return replace(
            self,
            patches=patches,
            prefix=self.prefix.to(*args, **kwargs),
            indices=there(self.indices),
            terms={name: values.to(*args, **kwargs) for name, values in self.terms.items()},
            mask=there(self.mask),
            labels=there(self.labels),
        )

    def pin_memory(self) -> StoredTokens:
        """Copy all tensors to page-locked memory; a DataLoader with ``pin_memory=True`` calls this."""
        pinned = lambda values: values.pin_memory() if isinstance(values, Tensor) else values  # noqa: E731
        terms = {name: values.pin_memory() for name, values in self.terms.items()}
        parts: dict[str, Any] = {
            name: pinned(getattr(self, name)) for name in ("patches", "prefix", "indices", "mask", "labels")
        }
        return replace(self, **parts, terms=terms)


def collate_tokens(items: Sequence[StoredTokens]) -> StoredTokens:
    """Join images into one batch; a DataLoader of a :class:`FeatureStore` calls this by itself.

    Maps of one grid are stacked. Maps of several grids are filled up with zeros at their lower right to the largest
    height and width, and ``mask`` marks the patches; ``FeatureStore.loader`` groups images by grid instead.

    Raises:
        ShapeError: there are no images, or they differ in channels, prefix tokens or terms.
    """
    if isinstance(items, StoredTokens):  # a store has already joined it
        return items
    if not items:
        raise ShapeError("a batch of no images; give one or more")
    if len({(item.feature_dim, item.prefix.shape[1], *item.terms) for item in items}) > 1:
        raise ShapeError("the images differ in channels, prefix tokens or terms; batch images of one store")
    height, width = (max(item.grid[side] for item in items) for side in (0, 1))
    padded = any(item.grid != (height, width) or item.mask is not None for item in items)
    labels = [label for item in items for label in ([None] * len(item) if item.labels is None else item.labels)]
    return StoredTokens(
        torch.cat([_filled(item.patches, (height, width)) for item in items]),
        torch.cat([item.prefix for item in items]),
        tuple(path for item in items for path in item.paths),
        tuple(sha256 for item in items for sha256 in item.sha256s),
        torch.cat([item.indices for item in items]),
        {name: torch.cat([_filled(i.terms[name], (height, width)) for i in items]) for name in items[0].terms},
        torch.cat([_filled(_mask(item), (height, width)) for item in items]) if padded else None,
        collate_labels(labels),
    )


def _collate(items: Sequence[StoredTokens], *, collate_fn_map: Any = None) -> StoredTokens:
    batch = collate_tokens(items)
    if batch.mask is not None:
        _warn_of_padding()
    return batch


# PyTorch's documented way to teach default_collate a type.
default_collate_fn_map[StoredTokens] = _collate


@lru_cache(maxsize=1)
def _warn_of_padding() -> None:
    log.warning(
        "one batch holds images of several grids: smaller maps were filled up with zeros, and `mask` marks the real "
        "patches. `store.loader(...)` makes batches of one grid each; with ragged='pad' it makes batches like this one"
    )


def collate_labels(labels: Sequence[Any]) -> Any:
    """Join labels into one tensor, or into a list if they are not numbers of one shape; None if there are none."""
    if all(label is None for label in labels):
        return None
    try:
        return torch.stack([torch.as_tensor(label) for label in labels])
    except (RuntimeError, TypeError, ValueError):
        return list(labels)


def _filled(values: Tensor, grid: Size) -> Tensor:
    if values.shape[1:3] == grid:
        return values
    filled = values.new_zeros(len(values), *grid, *values.shape[3:])
    filled[:, : values.shape[1], : values.shape[2]] = values
    return filled


def _mask(item: StoredTokens) -> Tensor:
    return torch.ones(item.patches.shape[:3], dtype=torch.bool) if item.mask is None else item.mask


class GridBatches:
    """Yield batches of image indices for a DataLoader, drawn anew in each epoch.

    Args:
        grids: the grid of each image.
        batch_size: images per batch.
        shuffle: permute the images, and the batches.
        ragged: "group" puts images of one grid into a batch; "pad" images of any grid.
        drop_last: leave out batches that are not full.
        seed: seed of the permutations.
    """

    def __init__(
        self, grids: Sequence[Size], batch_size: int, shuffle: bool, ragged: Ragged, drop_last: bool, seed: int
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"a batch of {batch_size} images; it must be at least 1")
        if ragged not in ("group", "pad"):
            raise ConfigError(f"ragged is 'group' or 'pad', got {ragged!r}")
        groups: dict[Size, list[int]] = {}
        for i, grid in enumerate(grids):
            groups.setdefault(grid if ragged == "group" else (0, 0), []).append(i)
        self.groups = [torch.tensor(group) for group in groups.values()]
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        count = (lambda n: n // self.batch_size) if self.drop_last else (lambda n: -(-n // self.batch_size))
        return sum(count(len(group)) for group in self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for group in self.groups:
            order = torch.randperm(len(group), generator=self.generator) if self.shuffle else torch.arange(len(group))
            batches += [batch.tolist() for batch in group[order].split(self.batch_size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=self.generator).tolist()]
        yield from batches
