"""Reading a store: a torch Dataset of tokens, safe in threads and DataLoader workers."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from dvt.errors import StoreError
from dvt.grids import Size
from dvt.store.format import CHUNK_BYTES, TERMS, Record
from dvt.store.index import StoredShard, damage, opened, read_shard, shard_files
from dvt.store.job import SCHEMA, Job
from dvt.tokens import Tokens

_OPEN_FILES = 8


class FeatureStore(Dataset[Tokens]):
    """Reads a store; a torch Dataset of one image's :class:`Tokens` each, safe in DataLoader workers and threads.

    Images are in the order of their paths, however they are spread over shards.

    Args:
        path: a folder of shards, or one shard.
        term: which of :data:`TERMS` ``store[i]`` returns.

    Raises:
        StoreError: not a store, another schema, shards of several jobs, a term that is not there, or damage; the
            checksums of tokens are checked when they are read.
    """

    def __init__(self, path: str | Path, term: str = "raw") -> None:
        self.path, self.term = Path(path), term
        files = shard_files(self.path)
        if not files:
            raise StoreError(f"{str(path)!r} is not a feature store: it is not a shard, nor a folder with *.h5 shards")
        self._shards = [read_shard(file) for file in files]
        first = self._shards[0]
        for shard in self._shards:
            if shard.job.digest != first.job.digest:
                raise StoreError(
                    f"{first.file.name} and {shard.file.name} in {str(path)!r} come from different jobs "
                    f"({first.job.differences(shard.job)}); a store holds one job"
                )
            if (shard.channels, shard.prefix) != (first.channels, first.prefix):
                raise StoreError(
                    f"{first.file.name} and {shard.file.name} in {str(path)!r} differ in channels or prefix"
                )
        #: Terms that every shard holds.
        self.terms = tuple(name for name in TERMS if all(name in shard.terms for shard in self._shards))
        self._check_term(term)
        paths = np.concatenate([shard.path for shard in self._shards])
        order = np.lexsort((np.concatenate([shard.sha256 for shard in self._shards]), paths))
        counts = [len(shard.path) for shard in self._shards]
        rows = np.concatenate([np.arange(count) for count in counts])
        self._where = np.stack((np.repeat(np.arange(len(counts)), counts), rows), axis=1)[order]
        self._local = _OpenFiles()

    @property
    def job(self) -> Job:
        """The job that made the tokens."""
        return self._shards[0].job

    @property
    def attrs(self) -> dict[str, str]:
        """The text attributes of the first shard."""
        return dict(self._shards[0].attributes)

    @property
    def images(self) -> list[str]:
        """The path of each image."""
        return [os.fsdecode(bytes(shard.path[row])) for shard, row in self._rows()]

    @property
    def sha256s(self) -> list[str]:
        """The SHA-256 of each image's file."""
        return [shard.sha256[row].decode() for shard, row in self._rows()]

    @property
    def grids(self) -> list[Size]:
        """The grid (h, w) of each image's tokens."""
        return [(int(shard.grid[row, 0]), int(shard.grid[row, 1])) for shard, row in self._rows()]

    @property
    def sizes(self) -> list[Size]:
        """The size (H, W) of each image in pixels."""
        return [(int(shard.size[row, 0]), int(shard.size[row, 1])) for shard, row in self._rows()]

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, i: int) -> Tokens:
        """Patches (1, h, w, C) and prefix (1, P, C) in float32."""
        prefix = self._read_prefix(i)
        patches = torch.from_numpy(self.read(i, self.term).astype(np.float32))[None]
        if prefix is None:
            return Tokens.of(patches)
        return Tokens(patches, torch.from_numpy(prefix.astype(np.float32))[None])

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))

    def read(self, i: int, term: str | None = None) -> np.ndarray:
        """Read one term (h, w, C) of image i as it is stored, float16 or float32."""
        term = self.term if term is None else term
        self._check_term(term)
        shard, row = self._at(i)
        with self._local.open(shard.file) as file:
            rows = file[f"tokens/{term}"][shard.offset[row] : shard.offset[row + 1]]
        return rows.reshape(*shard.grid[row], shard.channels)

    def record(self, i: int) -> Record:
        """Collect everything about image i."""
        shard, row = self._at(i)
        path, sha256 = os.fsdecode(bytes(shard.path[row])), shard.sha256[row].decode()
        size = (int(shard.size[row, 0]), int(shard.size[row, 1]))
        return Record(path, sha256, size, {term: self.read(i, term) for term in self.terms}, self._read_prefix(i))

    def prefix(self, i: int) -> np.ndarray | None:
        """Read the prefix tokens (P, C) of image i as they are stored, or None."""
        return self._read_prefix(i)

    def artifact(self, i: int) -> np.ndarray | None:
        """Read the artifact (h, w, C) that image i shares with its shard, or None."""
        shard, _ = self._at(i)
        if not shard.shared:
            return None
        with self._local.open(shard.file) as file:
            return file["artifact"][:]

    def verify(self) -> list[Path]:
        """Read everything through its checksum and list the damaged shards. See :func:`damaged_shards`."""
        return list(damaged_shards(self.path))

    def summary(self) -> dict[str, Any]:
        """Summarise the store, ready for JSON: counts, bytes on disk, grids, terms, type, job."""
        grids = Counter(f"{h}x{w}" for h, w in self.grids)
        contents = np.unique(np.concatenate([shard.sha256 for shard in self._shards]))
        return {
            "schema": SCHEMA,
            "shards": len(self._shards),
            "images": len(self),
            "distinct_images": len(contents),
            "tokens": sum(int(shard.offset[-1]) for shard in self._shards),
            "channels": self._shards[0].channels,
            "prefix_tokens": self._shards[0].prefix,
            "bytes": sum(shard.file.stat().st_size for shard in self._shards),
            "grids": dict(sorted(grids.items())),
            "terms": list(self.terms),
            "dtypes": sorted({shard.dtype for shard in self._shards}),
            "shared_artifact": any(shard.shared for shard in self._shards),
            "job": asdict(self.job),
            "job_sha256": self.job.digest,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}  # workers open their own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = _OpenFiles()

    def _rows(self) -> Iterator[tuple[StoredShard, int]]:
        return ((self._shards[shard], row) for shard, row in self._where)

    def _at(self, i: int) -> tuple[StoredShard, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of a store of {len(self)}")
        shard, row = self._where[i]
        return self._shards[shard], int(row)

    def _check_term(self, term: str) -> None:
        if term not in self.terms:
            raise StoreError(f"{str(self.path)!r} holds the terms {', '.join(self.terms)}, not {term!r}")

    def _read_prefix(self, i: int) -> np.ndarray | None:
        shard, row = self._at(i)
        if not shard.prefix:
            return None
        with self._local.open(shard.file) as file:
            return file["tokens/prefix"][row]


def damaged_shards(path: str | Path) -> dict[Path, str]:
    """List the damaged shards of a store and what is wrong with each; every byte goes through its checksum.

    Unlike :class:`FeatureStore` it does not stop at the first one.
    """
    damaged: dict[Path, str] = {}
    for file in shard_files(Path(path)):
        try:
            shard = read_shard(file)
            names = [f"tokens/{term}" for term in shard.terms]
            names += ["tokens/prefix"] * bool(shard.prefix) + ["artifact"] * shard.shared
            with opened(file) as handle:
                for name in names:
                    for piece in handle[name].iter_chunks():
                        if not np.isfinite(handle[name][piece]).all():
                            raise StoreError(f"/{name} holds NaN or infinity")
        except StoreError as error:
            damaged[file] = str(error)
    return damaged


class _OpenFiles(threading.local):
    """The last few shards that this thread of this process has read from."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.files: OrderedDict[Path, h5py.File] = OrderedDict()

    @contextmanager
    def open(self, path: Path) -> Iterator[h5py.File]:
        with damage(path):
            if self.process != os.getpid():  # a fork inherits handles that it must not use
                self.process, self.files = os.getpid(), OrderedDict()
            if path not in self.files:
                self.files[path] = h5py.File(path, "r", locking=False, rdcc_nbytes=2 * CHUNK_BYTES)
            self.files.move_to_end(path)
            while len(self.files) > _OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            yield self.files[path]
