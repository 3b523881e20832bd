"""Read whole chunks of a shard's datasets without HDF5, and check them against the checksums that it wrote.

HDF5 is asked once for the places of a shard's chunks. Then each chunk is one read of the file, and its Fletcher-32 sum
takes two matrix products, a third of the time of HDF5's own loop, and a few small steps that a batch takes once for all
its chunks. No chunk is returned unchecked.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
import torch
from torch import Tensor

from dvt.store.index import damage, opened

_THREADS, _LEAST = 4, 8  # most threads that read a batch, and fewest reads for each
_OPEN_FILES = 64  # per thread; on some systems a process may open only 256
_KEPT_BYTES = 16 << 20  # per thread, of chunks that hold several images
_WORDS = 256  # per row: the sum of 256 numbers below 2^16 is exact in single precision
_WORD = np.dtype("<u2")
_SUMS = 32  # most chunks whose sums are finished at once


#: File, dataset, first row, and the tensor to fill. Files are text, because a Path takes longer to look up.
Request: TypeAlias = tuple[str, str, int, Tensor]
#: File and checksum of a chunk.
Mark: TypeAlias = tuple[str, int]


def empty_batch(*shape: int, dtype: torch.dtype) -> Tensor:
    """Make an unfilled tensor in NumPy's memory, for which it asks for huge pages: a batch is full of new ones."""
    content = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(content).view(dtype).view(shape)


@cache
def _readers(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; those of its parent do not come with a fork."""
    return ThreadPoolExecutor(_THREADS, "dvt-store")


class ChunkReader(threading.local):
    """Read rows of datasets; each thread has its own open files and buffers, so no lock is needed.

    Reads give their offset (``preadv``) instead of moving a shared file position, so a forked process may use the files
    that it inherits.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._places: dict[tuple[str, str], _Places] = {}
        self._kept: OrderedDict[tuple[str, str, int], Tensor] = OrderedDict()
        self._buffer, self._tail = np.empty(0, np.uint8), np.empty(4, np.uint8)
        self._sums = Fletcher32()

    def read(self, file: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out` (rows, ...) with the rows of a dataset from `start`, converted to the type of `out`.

        Raises:
            StoreError: the shard is damaged, or cannot be read.
        """
        self._read_each([(file, name, start, out)])

    def read_all(self, requests: Sequence[Request]) -> None:
        """Do several :meth:`read`, in as many threads as PyTorch computes with, which is one in a DataLoader's worker.

        Raises as :meth:`read`.
        """
        count = min(torch.get_num_threads(), _THREADS, len(requests) // _LEAST)
        if count < 2:
            self._read_each(requests)
            return
        bounds = [k * len(requests) // count for k in range(count + 1)]
        parts = [requests[low:high] for low, high in pairwise(bounds)]
        list(_readers(os.getpid()).map(self._read_each, parts))

    def _read_each(self, requests: Sequence[Request]) -> None:
        try:
            for file, name, start, out in requests:
                self._fill(file, name, start, out)
        finally:
            self._compare()

    def _fill(self, file: str, name: str, start: int, out: Tensor) -> None:
        """Do a :meth:`read`, but for the comparison of checksums."""
        try:
            places = self._places.get((file, name)) or self._located(file, name)
            if start % places.shape[0] == 0 and out.shape[0] == places.shape[0] and out.dtype == places.kind:
                self._straight(file, places, start // places.shape[0], out)
            else:
                self._by_rows(file, name, places, start, out)
        except Exception:  # entering `damage` takes as long as the sum of a small chunk
            with damage(file):
                raise

    def _by_rows(self, file: str, name: str, places: _Places, start: int, out: Tensor) -> None:
        step = places.shape[0]
        stop = start + len(out)
        if not 0 <= start <= stop <= places.rows:
            raise ValueError(f"/{name} has no rows {start} to {stop}")
        for number in range(start // step, -(-stop // step)):
            first = number * step
            low, high = max(start, first), min(stop, first + step)
            whole = high - low == min(step, places.rows - first)
            chunk = self._fresh(file, places, number) if whole else self._held(file, name, places, number)
            out[low - start : high - start].copy_(chunk[low - first : high - first])

    def _straight(self, file: str, places: _Places, number: int, out: Tensor) -> None:
        """Read a chunk into the memory of a contiguous tensor of its type and shape."""
        if not 0 <= number < len(places.starts):
            raise ValueError(f"a dataset of {len(places.starts)} chunks has none of number {number}")
        values, tail = out.numpy().reshape(-1), self._tail
        found = os.preadv(self._opened(file), [values, tail], places.starts[number])  # type: ignore[list-item]
        self._add(file, found, places, values, tail)

    def _held(self, file: str, name: str, places: _Places, number: int) -> Tensor:
        """Read a chunk and keep it, because it also holds rows of other images."""
        key = (file, name, number)
        if key not in self._kept:
            chunk = self._fresh(file, places, number).clone()
            self._compare()  # a chunk that is kept is not checked again
            self._kept[key] = chunk
            while len(self._kept) > 1 and sum(chunk.nbytes for chunk in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _fresh(self, file: str, places: _Places, number: int) -> Tensor:
        """Read a chunk into this thread's buffer, which the next chunk overwrites."""
        size = places.bytes + 4
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        content = self._buffer[:size]
        found = os.preadv(self._opened(file), [content], places.starts[number])  # type: ignore[list-item]
        self._add(file, found, places, content[:-4], content[-4:])
        return torch.from_numpy(content[:-4].view(places.dtype)).view(places.shape)

    def _add(self, file: str, found: int, places: _Places, values: np.ndarray, tail: np.ndarray) -> None:
        """Check that a chunk was read whole, and take in its numbers for the comparison with its checksum."""
        if found != places.bytes + 4:
            raise ValueError("a chunk of tokens lies beyond its end")
        words = values.view(_WORD)
        if not self._sums.takes(len(words)):
            self._compare()
        self._sums.add(words, (file, int.from_bytes(tail, "little")))

    def _compare(self) -> None:
        """Compare the sums of the chunks read since the last call with their checksums."""
        for (file, expected), found in self._sums.finished():
            if found != expected:
                with damage(file):
                    raise ValueError("a chunk of tokens does not match its checksum")

    def _opened(self, file: str) -> int:
        if (known := self._files.get(file)) is not None:
            self._files.move_to_end(file)
            return known.descriptor
        self._files[file] = _OpenFile(file)
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return self._files[file].descriptor

    def _located(self, file: str, name: str) -> _Places:
        if (file, name) not in self._places:
            with opened(Path(file)) as handle:
                self._places[file, name] = _Places.of(handle[name])
        return self._places[file, name]


@dataclass(frozen=True)
class _Places:
    """Hold the places of a dataset's chunks in its file.

    Args:
        starts: offset of each chunk in bytes.
        shape: shape of a chunk, (rows, ...); the last chunk is stored at full length.
        rows: number of rows of the dataset.
        dtype: type of the values.
        kind: the same as torch's type.
        bytes: size of a chunk without its checksum.
    """

    starts: list[int]
    shape: tuple[int, ...]
    rows: int
    dtype: np.dtype
    kind: torch.dtype
    bytes: int

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> _Places:
        shape, starts = dataset.chunks, []
        size = int(np.prod(shape)) * dataset.dtype.itemsize
        for row in range(0, len(dataset), shape[0]):
            info = dataset.id.get_chunk_info_by_coord((row, *[0] * (len(shape) - 1)))
            if info.byte_offset is None or info.filter_mask or info.size != size + 4 or shape[1:] != dataset.shape[1:]:
                raise ValueError(f"/{dataset.name} is not in whole chunks with checksums")
            starts.append(info.byte_offset)
        kind = getattr(torch, dataset.dtype.newbyteorder("=").name)
        return cls(starts, shape, len(dataset), dataset.dtype, kind, size)


class _OpenFile:
    """Hold a file descriptor, and close it when the object is deleted, as h5py does."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Fletcher32:
    """Compute HDF5's Fletcher-32 (H5_checksum_fletcher32) of little-endian 16-bit words w.

    It joins two sums modulo 65535: that of the words, and that of their running sums.

    The sum of the running sums is that of (n - i) w[i]. With i = 256 r + c, both follow from the sums over rows and
    over columns of words, which are exact in single precision if at most 256 words are added. HDF5 reads words with
    the high byte first; a word with swapped bytes is 256 times the word, modulo 65535.
    """

    def __init__(self) -> None:
        self._count = 0
        self._marks: list[Mark] = []
        self._ones = np.ones(_WORDS, np.float32)

    def takes(self, count: int) -> bool:
        """Tell whether a chunk of `count` words can be added before the sums of the others are finished."""
        return not self._marks or (count == self._count and len(self._marks) < _SUMS)

    def add(self, words: np.ndarray, mark: Mark) -> None:
        """Add up the words of a chunk over rows and over columns; `mark` comes back with its sum."""
        if len(words) != self._count:
            self._resize(len(words))
        self._words[: self._count] = words
        rows, columns = self._outs[len(self._marks)]
        np.matmul(self._table, self._ones, out=rows)
        np.matmul(self._ones[: self._table.shape[1]], self._table, out=columns)
        self._marks.append(mark)

    def finished(self) -> list[tuple[Mark, int]]:
        """Return the sums of the chunks added since the last call."""
        marks, self._marks = self._marks, []
        if not marks:
            return []
        found = (self._sums[: len(marks)].astype(np.float64) @ self._weights).tolist()  # exact: below 2^53
        return [
            (mark, _folded(self._count * int(total) - _WORDS * int(row) - int(column)) << 16 | _folded(int(total)))
            for mark, (total, row, column) in zip(marks, found, strict=True)
        ]

    def _resize(self, count: int) -> None:
        """Make room for chunks of `count` words, in blocks of equally many rows, at most 256."""
        blocks = -(-count // _WORDS**2)
        height = -(-count // (blocks * _WORDS))
        rows, columns = blocks * height, blocks * _WORDS
        self._words = np.zeros(rows * _WORDS, np.float32)
        self._table = self._words.reshape(blocks, height, _WORDS)
        self._sums = np.zeros((_SUMS, rows + columns), np.float32)
        self._outs = [(each[:rows].reshape(blocks, height), each[rows:].reshape(blocks, _WORDS)) for each in self._sums]
        self._weights = np.zeros((rows + columns, 3))  # of the words, of the row's number, of the column's
        self._weights[:rows, 0], self._weights[:rows, 1] = 1, np.arange(rows)
        self._weights[rows:, 2] = np.tile(np.arange(_WORDS), blocks)
        self._count = count


def _folded(total: int) -> int:
    """Swap the bytes of a sum modulo 65535; like HDF5's added carries, give 65535 instead of 0 unless the sum is 0."""
    return (total * 256 - 1) % 65535 + 1 if total else 0
