"""Choose the examples of each step and the held-out images, as pure functions of seeds and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np


def epoch_indices(step: int, batch_size: int, count: int, seed: int = 0) -> list[int]:
    """List the indices of a step's examples; each epoch is a new permutation of all examples.

    Args:
        step: counted from 0.
        batch_size: size of the global batch; it may exceed `count`, and a batch may span two epochs.
        count: number of examples.
        seed: seed of the permutations.

    >>> sorted(epoch_indices(0, 3, 6, seed=1) + epoch_indices(1, 3, 6, seed=1))
    [0, 1, 2, 3, 4, 5]
    """
    start = step * batch_size
    return [int(_permutation(count, seed, i // count)[i % count]) for i in range(start, start + batch_size)]


def hold_out(sha256s: Sequence[str], count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split the indices of images into those to train on and those held out; equal files stay together.

    Args:
        sha256s: the hash of each image's file.
        count: number of different files to hold out.
        seed: seed of the choice.

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
    """Hash the sets of training and held-out images, from the images' hashes; a run with other sets is another run.

    >>> sides_digest(["a", "b"], ["c"])[:8]
    'fb1f0295'
    """
    return hashlib.sha256("/".join(",".join(side) for side in sides).encode()).hexdigest()


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
