"""Read the index of one shard. A shard may come from an untrusted source, so all of it is checked before use."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from dvt.errors import DvtError, StoreError
from dvt.grids import Size
from dvt.store.format import ordered_terms
from dvt.store.job import ATTRIBUTE_BYTES, JSON_SETTINGS, SCHEMA, Job, canonical, sha256_of

_TEXT = ("schema", "backbone", "weights_sha256", *JSON_SETTINGS, "version")

_REMEDY = "delete it and run the same command again; only its images are made again"


def shard_files(path: Path) -> list[Path]:
    """List a store's shards; an empty list for a file that is no shard, which then is not reported as damaged."""
    try:
        return sorted(path.glob("*.h5")) if path.is_dir() else [path] if path.exists() and path.suffix == ".h5" else []
    except OSError as error:
        raise StoreError(f"cannot read the store {str(path)!r}: {error.strerror or error}") from error


# Errors of reading at impossible offsets, which damaged bytes cause.
_OF_DAMAGE = (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW)


@contextmanager
def damage(path: str | Path) -> Iterator[None]:
    """Turn any error of h5py on a damaged file into a StoreError that names the file and says what to do."""
    try:
        yield
    except DvtError:
        raise
    except Exception as error:  # h5py raises nearly anything on damaged bytes
        if reason := _system_reason(error):
            raise StoreError(
                f"cannot read the shard {str(path)!r}: {reason}; the shard may be whole: keep it, check the disk or "
                "the network, and run the same command again"
            ) from error
        if "already open" in str(error):  # HDF5's mark in the file of a writer that has not closed it
            raise StoreError(
                f"the shard {str(path)!r} is open for writing in another program, or was when that one was killed; "
                "close it there and try again. If none has it open, `h5clear -s` of HDF5's tools removes the mark"
            ) from error
        raise StoreError(f"the shard {str(path)!r} is damaged ({error}); {_REMEDY}") from error


def _system_reason(error: Exception) -> str:
    """Return the operating system's reason, or "" if the bytes are at fault; HDF5 gives its number only in the text."""
    number = getattr(error, "errno", None)
    said = re.search(r"errno = ([1-9]\d*)", str(error))
    if number is None and said:
        number = int(said[1])
    return "" if number in (None, *_OF_DAMAGE) else os.strerror(number)


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise StoreError(f"{str(path)!r} is not a feature store: it is not a regular file")
    with damage(path), h5py.File(path, "r", locking=False) as file:
        yield file


@dataclass(frozen=True)
class StoredShard:
    """Hold the checked index of one shard."""

    file: Path
    attributes: dict[str, str]
    job: Job
    path: np.ndarray
    sha256: np.ndarray
    size: np.ndarray
    grid: np.ndarray
    offset: np.ndarray
    terms: tuple[str, ...]
    channels: int
    prefix: int
    shared: bool
    dtype: str

    def images(self) -> list[tuple[str, str]]:
        """List the path and hash of each image."""
        return [
            (os.fsdecode(bytes(path)), sha256.decode()) for path, sha256 in zip(self.path, self.sha256, strict=True)
        ]


def read_shard(path: Path) -> StoredShard:
    """Read the index of a shard, and refuse anything that the writer would not have written.

    A file from an untrusted source can point into other files, or declare arrays that would fill the memory. Links,
    layout, filters and stored sizes are checked before any array is read.
    """
    with opened(path) as file, open(path, "rb") as source:
        return _checked(file, path, source)


def damaged_shards(path: str | Path) -> dict[Path, str]:
    """List the damaged shards of a store, each with the fault found; check every checksum.

    Unlike :class:`~dvt.store.reader.FeatureStore`, this does not stop at the first damaged shard.
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


@dataclass(frozen=True)
class ShardIndex:
    """Hold the parts of a shard's index that a job needs to continue.

    Args:
        job: the job that made the shard.
        images: path and hash of each image.
        grid: the grid of the artifact that its images share, if any.
        artifact: (h, w, C) the artifact that its images share, if there is one and it was asked for.
    """

    job: Job
    images: list[tuple[str, str]]
    grid: Size | None
    artifact: np.ndarray | None


def read_index(source: BinaryIO, name: str, artifact: bool = False) -> ShardIndex:
    """Read the index of a shard behind a URL, with the same checks; hardly more than the index is downloaded.

    Args:
        source: the shard's file, seekable.
        name: the name for messages.
        artifact: also read the artifact that its images share.

    Raises:
        StoreError: the shard is damaged, or of another schema.
    """
    with damage(name), h5py.File(source, "r") as file:
        shard = _checked(file, Path(name), source)
        values = file["artifact"][:] if shard.shared and artifact else None
        return ShardIndex(shard.job, shard.images(), file["artifact"].shape[:2] if shard.shared else None, values)


def _checked(file: h5py.File, path: Path, source: BinaryIO) -> StoredShard:
    """Read and check the index; `source` is the same file as bytes, for its size and for heaps of text."""
    attributes = _read_attributes(file, path, source)
    _check_links(file)
    trusted = partial(_trusted, file, source.seek(0, os.SEEK_END))
    index = {name: trusted(f"index/{name}", rank) for name, rank in _INDEX_RANKS.items()}
    columns = {name: dataset[:] for name, dataset in index.items()}
    _check_index(columns, index["path"].dtype)
    terms = ordered_terms(list(file["tokens"]))
    tokens = [trusted(f"tokens/{term}", 2) for term in terms]
    channels = tokens[0].shape[1] if tokens else 0
    count, rows = len(columns["path"]), int(columns["offset"][-1])
    _require(channels > 0 and all(d.shape == (rows, channels) for d in tokens), "the tokens do not fit the index")
    prefix = trusted("tokens/prefix", 3) if "prefix" in file["tokens"] else None
    fits = prefix is None or (prefix.shape[0], prefix.shape[2]) == (count, channels)
    _require(fits, "the prefix does not fit the index")
    shared = trusted("artifact", 3) if "artifact" in file else None
    one_grid = shared is None or bool((columns["grid"] == shared.shape[:2]).all() and shared.shape[2] == channels)
    _require(one_grid, "the shared artifact does not fit the grids")
    kinds = {d.dtype for d in (*tokens, prefix, shared) if d is not None}
    _require(len(kinds) == 1 and kinds <= {np.dtype("<f2"), np.dtype("<f4")}, f"the tokens are of type {kinds}")
    return StoredShard(
        path,
        attributes,
        Job.from_attributes(attributes),
        **columns,
        terms=terms,
        channels=channels,
        prefix=0 if prefix is None else prefix.shape[1],
        shared=shared is not None,
        dtype=kinds.pop().name,
    )


_INDEX_RANKS = {"path": 1, "sha256": 1, "size": 2, "grid": 2, "offset": 1}


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)  # :func:`damage` adds the shard's name


def _read_attributes(file: h5py.File, path: Path, source: BinaryIO) -> dict[str, str]:
    if "schema" not in file.attrs:
        raise StoreError(f"{str(path)!r} is not a feature store: it has no attribute 'schema'")
    if any(file.attrs.get_id(name).dtype == object for name in file.attrs):
        _check_heaps(source)
    schema = _text(file, "schema")
    if schema != SCHEMA:
        raise StoreError(
            f"{str(path)!r} is of schema {schema[:80]!r}; this version of dvt reads {SCHEMA!r}. "
            f"Update dvt; or if this one wrote it, {_REMEDY}"
        )
    attributes = {name: _text(file, name) for name in _TEXT}
    _require(_text(file, "checksum") == sha256_of(canonical(attributes)), "the attributes do not match their checksum")
    return attributes


def _text(file: h5py.File, name: str) -> str:
    attribute = file.attrs.get_id(name)
    kind = h5py.check_string_dtype(attribute.dtype)
    _require(attribute.shape == () and kind is not None, f"{name} is not text")
    _require((kind.length or 0) < ATTRIBUTE_BYTES, f"{name} is not text under 64 KB")
    text = file.attrs[name]
    text = text if isinstance(text, str) else bytes(text).decode()
    _require(len(text) < ATTRIBUTE_BYTES, f"{name} is not text under 64 KB")
    return text


def _check_heaps(source: BinaryIO) -> None:
    """Check the heaps of variable-length text, which old shards have, before HDF5 reads them.

    HDF5 loops forever on a heap that holds an object of size 0, as one overwritten with zeros does.
    """
    source.seek(0)
    content = source.read()
    for heap in re.finditer(rb"GCOL\x01", content):
        at, end = heap.start() + 16, heap.start() + int.from_bytes(content[heap.start() + 8 :][:8], "little")
        _require(at < end <= len(content), "its heap of text has another size")
        while end - at >= 16:
            number, size = (int.from_bytes(content[at + i : at + i + n], "little") for i, n in ((0, 2), (8, 8)))
            step = 16 + -(-size // 8) * 8 if number else size  # the free space's size includes its own header
            _require(16 <= step <= end - at, "its heap of text is not whole")
            at += step


def _check_links(file: h5py.File) -> None:
    for place in ("/", "index", "tokens"):  # the root first, so that its children are known to lie in this file
        group = file[place]
        _require(isinstance(group, h5py.Group), f"{place!r} is not a group")
        for name in group:
            _require(isinstance(group.get(name, getlink=True), h5py.HardLink), f"{name!r} links out of its place")


def _trusted(file: h5py.File, size: int, name: str, rank: int) -> h5py.Dataset:
    """Open a dataset after checking that all of it lies in this file, in chunks with a checksum and no other filter."""
    dataset = file[name]
    _require(isinstance(dataset, h5py.Dataset), f"/{name} is not a dataset")
    layout = dataset.id.get_create_plist()
    # This excludes virtual datasets and those with external storage, which are not chunked.
    _require(layout.get_layout() == h5py.h5d.CHUNKED, f"/{name} may hold data from outside the shard: no chunks")
    checksum_only = layout.get_nfilters() == 1 and layout.get_filter(0)[0] == h5py.h5z.FILTER_FLETCHER32
    _require(checksum_only, f"/{name} has other filters than the checksum")
    _require(dataset.dtype.kind in "iSf", f"/{name} is of type {dataset.dtype}")  # variable lengths can be any length
    _require(dataset.ndim == rank and dataset.size > 0, f"/{name} has the shape {dataset.shape}")
    pieces = [-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    stored = int(np.prod(pieces, dtype=object) * (np.prod(dataset.chunks, dtype=object) * dataset.dtype.itemsize + 4))
    _require(dataset.id.get_storage_size() == stored, f"/{name} is not stored whole")
    _require(stored <= size, f"/{name} declares more than the file holds")
    return dataset


def _check_index(columns: dict[str, np.ndarray], path_type: np.dtype) -> None:
    """Check that the columns agree with each other; their values are not trusted yet."""
    for name in ("size", "grid", "offset"):
        _require(columns[name].dtype == np.dtype("<i8"), f"/index/{name} is of type {columns[name].dtype}")
    _require(path_type.kind == "S" and columns["sha256"].dtype == np.dtype("S64"), "/index text has another type")
    count = len(columns["path"])
    shapes = {name: columns[name].shape for name in ("sha256", "size", "grid", "offset")}
    wanted = {"sha256": (count,), "size": (count, 2), "grid": (count, 2), "offset": (count + 1,)}
    _require(shapes == wanted, f"the index has the shapes {shapes}")
    grid, size = columns["grid"], columns["size"]
    _require(bool(((grid >= 1) & (grid < 1 << 24)).all() and (size >= 1).all()), "the index holds impossible sizes")
    steps = np.diff(columns["offset"])
    _require(bool(columns["offset"][0] == 0 and (steps == grid.prod(1)).all()), "the offsets do not fit the grids")
    _require(all(re.fullmatch(b"[0-9a-f]{64}", value) for value in columns["sha256"]), "the index holds a bad hash")
    _require(all(value and b"\0" not in value for value in columns["path"]), "the index holds a bad path")
