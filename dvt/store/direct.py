"""Write a shard's large arrays past HDF5's filters, which run one after the other under the library's only lock.

The rows of a dataset are cut into its chunks and checksummed in threads, and each chunk goes to the file as it is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import h5py
import numpy as np

THREADS = min(4, os.cpu_count() or 1)
"""Threads that put chunks together: two keep up with most disks."""

_ROW = 512  # words: sums over rows and columns of words give both of fletcher32's sums


class Target:
    """Hand HDF5's writes to a file; an error is kept until :meth:`check`, because HDF5 would end in a broken handle."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell, self.readinto = file.seek, file.tell, file.readinto  # type: ignore[attr-defined]
        self.error: OSError | None = None

    def write(self, content: memoryview) -> int:
        """Write all bytes; once there was an error, none."""
        rest = memoryview(content).cast("B")
        length = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.error = error
        return length

    def truncate(self, size: int) -> None:
        """Set the file's size."""
        try:
            self.file.truncate(size)
        except OSError as error:
            self.error = self.error or error

    def flush(self) -> None:
        """Do nothing: the caller syncs the file."""

    def check(self) -> None:
        """Raise the first error.

        Raises:
            OSError: something could not be written.
        """
        if self.error is not None:
            raise self.error


def write_rows(dataset: h5py.Dataset, parts: Sequence[np.ndarray]) -> None:
    """Fill an empty dataset, with fletcher32 as its only filter, by parts (n, ...) that follow one another."""
    rows = dataset.chunks[0]
    ends = np.cumsum([len(part) for part in parts])
    spare = [bytearray(rows * parts[0][0].nbytes + 4) for _ in range(THREADS + 1)]  # fresh memory for each is slow
    waiting: deque[tuple[int, Future[bytearray]]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        for start in [*range(0, len(dataset), rows), None]:
            while waiting and (start is None or not spare):
                at, chunk = waiting.popleft()
                dataset.id.write_direct_chunk((at, *(0 for _ in dataset.shape[1:])), chunk.result())
                spare.append(chunk.result())
            if start is not None:
                waiting.append((start, threads.submit(_fill, spare.pop(), parts, ends, start, rows)))


def _fill(chunk: bytearray, parts: Sequence[np.ndarray], ends: np.ndarray, start: int, rows: int) -> bytearray:
    """Put the rows of one chunk into it, zeros behind the last, and their checksum."""
    first = parts[0]
    row_bytes = first.itemsize * int(np.prod(first.shape[1:]))
    target = np.frombuffer(chunk, first.dtype, rows * row_bytes // first.itemsize).reshape(rows, *first.shape[1:])
    number, place = int(np.searchsorted(ends, start, side="right")), 0
    while place < rows and number < len(parts):
        begin = start + place - (int(ends[number]) - len(parts[number]))
        piece = parts[number][begin : begin + rows - place]
        target[place : place + len(piece)] = piece
        place, number = place + len(piece), number + 1
    target[place:] = 0
    chunk[-4:] = fletcher32(np.frombuffer(chunk, np.uint16, rows * row_bytes // 2)).to_bytes(4, "little")
    return chunk


def fletcher32(words: np.ndarray) -> int:
    """Compute HDF5's checksum of 16-bit words, which takes the first byte of each for the higher one.

    Both sums, of the words and of the words times their distance from the end, follow from sums over rows and columns;
    modulo 65535, the bytes of a word change places when it is multiplied by 256.

    >>> hex(fletcher32(np.array([1, 2, 3], np.uint16)))
    '0xa000600'
    """
    count, whole = len(words), len(words) // _ROW * _ROW
    table = words[:whole].reshape(-1, _ROW)
    rows, columns = table.sum(1, dtype=np.uint32).astype(np.uint64), table.sum(0, dtype=np.uint32).astype(np.uint64)
    rest = words[whole:].astype(np.uint64)
    total = int(rows.sum()) + int(rest.sum())
    places = _ROW * int((rows * np.arange(len(rows), dtype=np.uint64)).sum())
    places += int((columns * np.arange(_ROW, dtype=np.uint64)).sum())
    places += int((rest * np.arange(whole, count, dtype=np.uint64)).sum())
    return _folded(256 * (count * total - places)) << 16 | _folded(256 * total)


def _folded(value: int) -> int:
    """Take a value modulo 65535 as ones' complement does: only zero gives zero."""
    return (value - 1) % 65535 + 1 if value else 0
