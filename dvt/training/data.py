"""Choose the examples of a step, and the images held out: pure functions of seeds and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np


def epoch_indices(step: int, batch_size: int, count: int, seed: int = 0) -> list[int]:
    """List the examples of a step: permutations of all of them one after the other, a pure function of its arguments.

    Args:
        step: counted from 0.
        batch_size: of the global batch; it may be larger than `count`, and batches run over the ends of epochs.
        count: of the examples.
        seed: of the permutations.

    >>> sorted(epoch_indices(0, 3, 6, seed=1) + epoch_indices(1, 3, 6, seed=1))
    [0, 1, 2, 3, 4, 5]
    """
    start = step * batch_size
    return [int(_permutation(count, seed, i // count)[i % count]) for i in range(start, start + batch_size)]


def hold_out(sha256s: Sequence[str], count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Divide images, by their numbers, into those to train on and those held out; equal files are on one side.

    Args:
        sha256s: of each image's file.
        count: of different files to hold out.
        seed: another seed holds out others.

    >>> hold_out(["a", "b", "c", "b"], 1, seed=0)
    ([0, 1, 3], [2])
    """
    distinct = sorted(set(sha256s))
    held = {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for i, sha256 in enumerate(sha256s):
        sides[sha256 in held].append(i)
    return sides


def sides_digest(*sides: Iterable[str]) -> str:
    """Hash which images a run learns from and holds out, from the hashes of each side: with others it is another run.

    >>> sides_digest(["a", "b"], ["c"])[:8]
    'fb1f0295'
    """
    return hashlib.sha256("/".join(",".join(side) for side in sides).encode()).hexdigest()


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
