"""Read raw and target tokens of a feature store, split them into training and validation, and make batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dvt.errors import ConfigError, NonFiniteError, StoreError
from dvt.grids import Size
from dvt.store import FeatureStore
from dvt.training import Batches, epoch_indices, hold_out

#: Tensors of one image or of a batch of them, by name.
TrainingBatch = dict[str, Tensor]

MOST_VALIDATED = 256  # images; a validation must stay short beside the training


class Pairs:
    """Read raw and target tokens of a store's images, one image when it is indexed.

    Args:
        store: with the terms "raw" and `target`.
        target: the term to learn.
        prefix: read the prefix tokens, too.

    Raises:
        StoreError: the store lacks a term or prefix tokens.
    """

    def __init__(self, store: FeatureStore, target: str = "semantic", prefix: bool = False) -> None:
        if target == "raw":
            raise ConfigError("the target is 'raw' itself, so there is nothing to learn; choose 'semantic'")
        if missing := [term for term in ("raw", target) if term not in store.terms]:
            raise StoreError(
                f"{str(store.path)!r} holds the terms {', '.join(store.terms)} but not {' and '.join(missing)}; a "
                f"denoiser learns {target!r} from 'raw', and `dvt denoise` writes both"
            )
        if prefix and not store.summary()["prefix_tokens"]:
            raise StoreError(f"{str(store.path)!r} holds no prefix tokens; train without use_prefix")
        self.store, self.target, self.prefix = store, target, prefix
        self.grids, self.sha256s = store.grids, store.sha256s
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, i: int) -> TrainingBatch:
        """Read image i: "raw" and "target" (h, w, C), and "prefix" (P, C) if asked for; float16 or float32.

        Raises:
            StoreError: the shard is damaged.
            NonFiniteError: the store holds NaN or infinity.
        """
        item = {"target": torch.from_numpy(self.store.read(i, self.target))}
        if self.prefix:
            tokens = self.store[i]
            item |= {"raw": tokens.patches[0], "prefix": tokens.prefix[0]}
        else:
            item["raw"] = torch.from_numpy(self.store.read(i, "raw"))
        if i not in self._checked:
            self._check(i, item)
        return item

    def _check(self, i: int, item: TrainingBatch) -> None:
        bad = [name for name, values in item.items() if not values.isfinite().all()]
        if bad:
            raise NonFiniteError(
                f"the {' and '.join(bad)} tokens of {self.store.images[i]!r} hold NaN or infinity; run `dvt inspect` "
                f"on {str(self.store.path)!r}, delete the damaged shards and run `dvt denoise` again"
            )
        self._checked.add(i)

    def in_memory(self) -> InMemory:
        """Read all pairs into memory, to compare speeds or for many short runs."""
        return InMemory([self[i] for i in range(len(self))], self.grids, self.sha256s)


@dataclass(frozen=True)
class InMemory:
    """Hold what :class:`Pairs` reads as a list of tensors."""

    items: list[TrainingBatch]
    grids: list[Size]
    sha256s: list[str]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> TrainingBatch:
        return self.items[i]


def split(sha256s: Sequence[str], share: float = 0.1, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split images into training and validation; copies of one file are in the same part.

    Args:
        sha256s: the hash of each image's file.
        share: the share of different files to hold out; at least one file and at most 256 are held out.
        seed: seed of the choice.

    Raises:
        StoreError: there are fewer than two different images.

    >>> split(["a", "b", "c", "b"], 0.3, seed=0)
    ([0, 1, 3], [2])
    """
    distinct = len(set(sha256s))
    if distinct < 2:
        raise StoreError(
            f"the store holds {distinct} different image; training needs at least 2, one of them held out for "
            "validation. Run `dvt denoise` on more"
        )
    return hold_out(sha256s, min(max(1, round(share * distinct)), distinct - 1, MOST_VALIDATED), seed)


def pair_batches(pairs: Pairs | InMemory, images: Sequence[int], batch_size: int, steps: int, seed: int = 0) -> Batches:
    """Plan the batches of a run, each of one grid shape, drawn in proportion to its number of images.

    The images of a grid shape are permuted anew in each epoch; if they are fewer than a batch, a batch repeats them.

    Args:
        pairs: the tokens to read.
        images: indices of the images to use.
        batch_size: size of the global batch.
        steps: number of steps of the run.
        seed: seed of the order.

    Returns:
        A pure function (step, rank, world) for :func:`dvt.training.train`.
    """
    buckets: dict[Size, list[int]] = {}
    for i in images:
        buckets.setdefault(pairs.grids[i], []).append(i)
    members = [buckets[grid] for grid in sorted(buckets)]
    share = np.array([len(group) for group in members]) / len(images)
    drawn = np.random.default_rng(seed).choice(len(members), size=steps, p=share)
    turns = np.zeros(steps, dtype=np.int64)  # how often the grid was drawn before
    for bucket in range(len(members)):
        turns[drawn == bucket] = np.arange((drawn == bucket).sum())

    def batches(step: int, rank: int, world: int) -> TrainingBatch:
        group = members[drawn[step]]
        chosen = [group[i] for i in epoch_indices(int(turns[step]), batch_size, len(group), seed)]
        part = batch_size // world
        return _stack([pairs[i] for i in chosen[rank * part : (rank + 1) * part]])

    return batches


def _stack(items: Sequence[TrainingBatch]) -> TrainingBatch:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
