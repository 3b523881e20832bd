"""The feature store: a folder of immutable HDF5 shards, schema ``dvt-features/1``. The only file that knows h5py.

A shard holds, each dataset chunked and with HDF5's fletcher32 checksum,

    attributes (text): schema, backbone, weights_sha256, version, checksum, and as JSON: layer, stride, size, config
    /index/path (N,) utf-8   /index/sha256 (N,)   /index/size (N, 2)   /index/grid (N, 2)   /index/offset (N + 1,)
    /tokens/TERM (T, C) float16 or float32, TERM of :data:`TERMS`    [/tokens/prefix (N, P, C)]    [/artifact (h, w, C)]

The rows of image i are ``offset[i]:offset[i + 1]``, its (h, w) patches row by row. All text has a fixed length, because
no checksum reaches variable-length data, and HDF5 walks in circles where that is damaged. ``checksum`` is the SHA-256
of the other attributes.

A shard appears under its name only when it is whole: it is written as ``NAME.h5.part``, synced and renamed. Images
are known by the SHA-256 of their bytes: :class:`StoreWriter` tells which are done, :func:`plan` cuts the others into
shards. A shard is a run of a fixed number of distinct files in the order of their paths, so leaving out the shards
already done does not move the cuts between the others: a job that was killed ends with the shards it would have had.
Images that are added later go to new shards, and the old ones stay as they are. A file whose bytes are done is skipped
under any path; the paths in a store are those of the run that computed it. Files of equal bytes in one run lie in one
shard, each path with its own copy of the rows.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import dvt
from dvt.errors import ConfigError, DvtError, NonFiniteError, ShapeError, StoreError
from dvt.grids import Size
from dvt.tokens import Tokens

log = logging.getLogger(__name__)

SCHEMA = "dvt-features/1"
TERMS = ("raw", "semantic", "artifact", "residual", "denoised")

_CHUNK_BYTES = 4 << 20  # a ViT-B's 37 x 37 tokens in half precision take 2 MB: most images are one chunk
_ATTRIBUTE_BYTES = 1 << 16
_OPEN_FILES = 8
_FLOAT16_LIMIT = 65520.0  # the smallest number that rounds to infinity
_JSON = ("layer", "stride", "size", "config")
_TEXT = ("schema", "backbone", "weights_sha256", *_JSON, "version")
_REMEDY = "delete it and run the same command again; only its images are made again"


# -- the job and its plan ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything that changes the numbers in a store, and nothing else: no paths, device or worker count.

    Args:
        backbone: name of the model.
        weights_sha256: hash over its weights.
        layer: the block that the tokens come from; -1 is the last one, after the final norm.
        stride: pixels between patches, None for the patch size.
        size: the shorter side of the model's input in pixels, or (height, width), or None for the model's own.
        config: the other settings that change numbers (verb, solver, seed, ...); anything JSON can write.

    Raises:
        ConfigError: the settings cannot be written as JSON, or take 64 KB or more.

    >>> Job("vit", "ab", config={"seed": 0}).digest == Job("vit", "ab", config={"seed": 1}).digest
    False
    """

    backbone: str
    weights_sha256: str
    layer: int = -1
    stride: int | Sequence[int] | None = None
    size: int | Sequence[int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            plain = json.loads(_canonical(asdict(self)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the settings of a job must be plain JSON values: {error}") from error
        for name, value in plain.items():  # what comes back from a file is equal to what went in
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        _check_attributes(self.attributes())

    @property
    def digest(self) -> str:
        """SHA-256 over the schema and all fields, as canonical JSON."""
        return _sha256(_canonical({"schema": SCHEMA, **asdict(self)}))

    def attributes(self) -> dict[str, str]:
        """The job as the text attributes of a shard."""
        values = asdict(self)
        text = {name: _canonical(values[name]) if name in _JSON else values[name] for name in values}
        return {"schema": SCHEMA, **text}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, str]) -> Job:
        """The inverse of :meth:`attributes`."""
        values: dict[str, Any] = {name: json.loads(attributes[name]) for name in _JSON}
        return cls(attributes["backbone"], attributes["weights_sha256"], **values)

    def differences(self, other: Job) -> str:
        """What differs between two jobs, for people; empty when they are equal."""
        mine, theirs = ({**asdict(job), **asdict(job)["config"]} for job in (self, other))
        names = sorted((mine.keys() | theirs.keys()) - {"config"})
        pairs = ((name, mine.get(name, "unset"), theirs.get(name, "unset")) for name in names)
        return ", ".join(f"{name} {theirs!r} there, {mine!r} here" for name, mine, theirs in pairs if mine != theirs)


@dataclass
class Record:
    """One image in a store.

    Args:
        path: as it was given.
        sha256: of the file's bytes, 64 hexadecimal digits.
        size: (H, W) of the original image in pixels.
        terms: names of :data:`TERMS` to (h, w, C) maps, all of one shape.
        prefix: (P, C) class token and registers, or None.
    """

    path: str
    sha256: str
    size: Size
    terms: Mapping[str, np.ndarray | Tensor]
    prefix: np.ndarray | Tensor | None = None


@dataclass(frozen=True)
class Shard:
    """A unit of work: the images (path, sha256, grid) of one shard, equal bytes next to each other."""

    name: str
    images: tuple[tuple[str, str, Size], ...]


def plan(images: Sequence[tuple[str, str, Size]], shard_images: int, job: Job, by_grid: bool = False) -> list[Shard]:
    """Cuts images into shards, whatever their order: a pure function of the set of images and the job.

    Args:
        images: (path, sha256, grid) of each image that is not done yet.
        shard_images: distinct files in a shard; copies of equal bytes come on top.
        job: its digest goes into the shards' names, with paths and hashes.
        by_grid: each shard holds images of one grid only, as a shared artifact needs it.

    Raises:
        ConfigError: shard_images is below 1.
    """
    if shard_images < 1:
        raise ConfigError(f"a shard holds at least 1 image, got {shard_images}")
    copies: dict[str, list[tuple[str, str, Size]]] = {}
    for path, sha256, grid in sorted(set(images)):
        copies.setdefault(sha256, []).append((path, sha256, grid))
    groups: dict[Size, list[list[tuple[str, str, Size]]]] = {}
    for same in copies.values():
        groups.setdefault(same[0][2] if by_grid else (0, 0), []).append(same)
    runs = (
        groups[grid][i : i + shard_images] for grid in sorted(groups) for i in range(0, len(groups[grid]), shard_images)
    )
    return [_shard([image for same in run for image in same], job) for run in runs]


def _shard(images: list[tuple[str, str, Size]], job: Job) -> Shard:
    listing = [(path, sha256) for path, sha256, _ in images]
    return Shard(f"shard-{_sha256(_canonical([job.digest, listing]))[:20]}", tuple(images))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_attributes(attributes: Mapping[str, str]) -> None:
    for name, text in attributes.items():
        if len(text.encode()) >= _ATTRIBUTE_BYTES:
            raise ConfigError(f"{name} takes {len(text.encode())} bytes as text; a store's attribute holds under 64 KB")


# -- writing ----------------------------------------------------------------------------------------------------------


class StoreWriter:
    """The one writer of a store, as a context manager; the lock dies with the process.

    Args:
        folder: made if it is missing.
        job: what the tokens are; a folder that holds another job's shards is refused.
        wait: wait for another writer to finish, instead of refusing.

    Attributes:
        done: SHA-256 of each image whose shard is committed.

    Raises:
        StoreError: on entry when the folder cannot be written, is locked, or holds something else or damaged shards.
    """

    def __init__(self, folder: str | Path, job: Job, wait: bool = True) -> None:
        self.folder, self.job, self.wait = Path(folder), job, wait
        self.done: set[str] = set()
        self._lock: _Lock | None = None

    def __enter__(self) -> StoreWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _Lock(self.folder, self.wait)
        except OSError as error:
            reason = "it is a file, not a folder" if self.folder.is_file() else error.strerror or error
            raise StoreError(f"cannot write to the store {str(self.folder)!r}: {reason}") from error
        try:
            for part in self.folder.glob("*.h5.part"):  # under the lock: whoever was writing it is dead
                part.unlink()
            self.done = {sha256 for shard in self._shards() for sha256 in shard.sha256s()}
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write(
        self,
        name: str,
        records: Sequence[Record],
        artifact: np.ndarray | Tensor | None = None,
        dtype: str = "float16",
    ) -> Path:
        """Commits a shard: afterwards it survives a crash. Writing the same name again replaces it whole.

        Args:
            name: of the shard, as :func:`plan` gives it.
            records: its images, in order.
            artifact: (h, w, C) that all of them share, if any.
            dtype: "float16", which becomes float32 when a value of this shard would overflow, or "float32".

        Raises:
            StoreError: used outside its ``with`` block, a bad name, a hash or size that is none, or a full disk.
            ShapeError: shapes or terms that do not fit together.
            NonFiniteError: a value is NaN or infinite.
        """
        if self._lock is None:
            raise StoreError("a StoreWriter writes inside its with block: `with StoreWriter(folder, job) as writer:`")
        image = shard_file(name, self.job, records, artifact, dtype)
        target = commit_shard(self.folder, name, image, allowed=self._lock.check)
        self.done.update(record.sha256 for record in records)
        return target

    def _shards(self) -> Iterator[_Shard]:
        for file in _shard_files(self.folder):
            shard = _read_shard(file)
            if shard.job.digest != self.job.digest:
                raise StoreError(
                    f"the folder {str(self.folder)!r} holds another job's tokens ({self.job.differences(shard.job)}); "
                    "choose another output folder"
                )
            yield shard


def shard_file(
    name: str,
    job: Job,
    records: Sequence[Record],
    artifact: np.ndarray | Tensor | None = None,
    dtype: str = "float16",
) -> bytes:
    """The bytes of a shard's file, the same wherever they are made; see :meth:`StoreWriter.write`."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}", name):
        raise StoreError(f"{name!r} is no shard name; use letters, digits, '.', '_' and '-' only")
    return _shard_image(job, records, artifact, dtype)


def commit_shard(
    folder: Path, name: str, image: bytes, part: str = "", allowed: Callable[[], None] = lambda: None
) -> Path:
    """Puts a shard's bytes into a folder whole or not at all; the caller holds the store's lock, or is its helper.

    Args:
        folder: of the store.
        name: of the shard.
        image: from :func:`shard_file`.
        part: goes into the name of the unfinished file, where several processes may write the same shard.
        allowed: called before the shard takes its name; an OSError leaves it out.

    Raises:
        StoreError: the folder cannot be written, or the disk is full.
    """
    target, unfinished = folder / f"{name}.h5", folder / f"{name}{part}.h5.part"
    try:
        with open(unfinished, "wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        allowed()
        os.replace(unfinished, target)
        _sync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write {str(target)!r} ({len(image)} bytes): {error.strerror or error}. The shards "
            "before it are safe; make room and run the same command again"
        ) from error
    return target


class _Lock:
    """An advisory lock on a file of the folder. POSIX locks die with their process, but do not keep it from itself."""

    _held: dict[str, int] = {}  # noqa: RUF012  folder to the process that holds it: a forked child holds nothing

    def __init__(self, folder: Path, wait: bool) -> None:
        self.key = os.path.realpath(folder)
        if self._held.get(self.key) == os.getpid():
            # Opening the file again and closing it would even release the lock that is held.
            raise StoreError(f"this process is already writing to the store {str(folder)!r}; use that writer")
        self.fd = os.open(folder / "writer.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take(folder, wait)
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(self.fd)
            raise
        self._held[self.key] = os.getpid()

    def _take(self, folder: Path, wait: bool) -> None:
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # the two that POSIX names for "another holds it"
            holder = os.pread(self.fd, 20, 0).decode(errors="replace").strip() or "unknown"
            if not wait:
                raise StoreError(
                    f"process {holder} is writing to the store {str(folder)!r}; wait for it or choose another folder"
                ) from error
            log.info("waiting for process %s, which is writing to %s", holder, folder)
            fcntl.lockf(self.fd, fcntl.LOCK_EX)

    def check(self) -> None:
        """That it is still the folder's: one that was moved or made anew may have another writer by now."""
        if not os.path.samestat(os.fstat(self.fd), os.stat(os.path.join(self.key, "writer.lock"))):
            raise OSError(errno.ESTALE, "the folder was moved or made anew while it was written to")

    def release(self) -> None:
        del self._held[self.key]
        os.close(self.fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _array(values: np.ndarray | Tensor, dtype: str = "float32") -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if dtype == "float16" and values.dtype == torch.float16:
            return values.numpy()  # as they are: the two conversions would take a quarter of the writer's time
        values = values.float().numpy()
    # Not left to HDF5, whose conversion to half precision makes infinity of values that round to 65504.
    return np.asarray(values, dtype=np.float32).astype(dtype, copy=False)


def _peak(values: np.ndarray, what: str) -> float:
    """The largest magnitude."""
    peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if not np.isfinite(peak):
        raise NonFiniteError(
            f"{what} holds NaN or infinity and was not stored; leave this image out or check the weights"
        )
    return peak


def _check_records(records: Sequence[Record], artifact: np.ndarray | Tensor | None) -> tuple[list[str], int]:
    """Names of the terms and C, when everything fits together."""
    if not records:
        raise ShapeError("a shard holds at least one image, got none")
    terms, first = list(records[0].terms), records[0]
    if not terms or not set(terms) <= set(TERMS):
        raise ShapeError(f"an image's terms are some of {TERMS}, got {terms}")
    shape = tuple(first.terms[terms[0]].shape)
    channels = shape[-1] if len(shape) == 3 else 0
    for record in records:
        shapes = {tuple(values.shape) for values in record.terms.values()}
        shape = shapes.pop()
        if list(record.terms) != terms or shapes or len(shape) != 3 or min(shape) < 1 or shape[-1] != channels:
            found = {term: tuple(values.shape) for term, values in record.terms.items()}
            raise ShapeError(f"{record.path!r} has terms {found}; all must be (h, w, {channels}) and be {terms}")
        prefixes = [None if r.prefix is None else tuple(r.prefix.shape) for r in (first, record)]
        if prefixes[0] != prefixes[1] or (prefixes[1] and (len(prefixes[1]) != 2 or prefixes[1][1] != channels)):
            raise ShapeError(
                f"{record.path!r} has a prefix of shape {prefixes[1]}; all must be (P, {channels}) or None"
            )
        if artifact is not None and tuple(artifact.shape) != shape:
            raise ShapeError(f"the artifact {tuple(artifact.shape)} is shared by a map {shape}; they must be equal")
        if not re.fullmatch("[0-9a-f]{64}", record.sha256) or "\0" in record.path or not record.path:
            raise StoreError(f"{record.path!r} with hash {record.sha256!r}: need a path and 64 hexadecimal digits")
        if len(record.size) != 2 or min(record.size) < 1:
            raise StoreError(f"{record.path!r} has size {record.size}; it must be (height, width) in pixels")
    return sorted(terms), channels


def _shard_image(job: Job, records: Sequence[Record], artifact: np.ndarray | Tensor | None, dtype: str) -> bytes:
    """The bytes of a shard's file.

    They are made in memory and written by the caller, because HDF5 leaves a broken handle behind when a disk is full.
    """
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"tokens are stored as float16 or float32, got {dtype!r}")
    terms, channels = _check_records(records, artifact)
    grids = np.array([record.terms[terms[0]].shape[:2] for record in records], dtype=np.int64)
    offset = np.concatenate(([0], np.cumsum(grids.prod(1))))
    shared = None if artifact is None else _array(artifact)
    if _largest(records, shared) >= _FLOAT16_LIMIT:
        dtype = "float32"
    content = io.BytesIO()
    with _new_file(content) as file:
        _write_attributes(file, job)
        _write_index(_new_group(file, "index"), records, grids, offset)
        tokens = _new_group(file, "tokens")
        for term in terms:
            rows = _dataset(tokens, term, (int(offset[-1]), channels), dtype, int(grids.prod(1).max()))
            for record, start, stop in zip(records, offset, offset[1:], strict=False):
                rows[start:stop] = _array(record.terms[term], dtype).reshape(-1, channels)
        if records[0].prefix is not None and len(records[0].prefix):
            prefix = _dataset(tokens, "prefix", (len(records), *records[0].prefix.shape), dtype, len(records))
            for i, record in enumerate(records):
                if record.prefix is not None:
                    prefix[i] = _array(record.prefix, dtype)
        if shared is not None:
            _dataset(file, "artifact", shared.shape, dtype, len(shared))[:] = _array(shared, dtype)
    return content.getvalue()


def _new_file(content: io.BytesIO) -> h5py.File:
    """Open an empty HDF5 file in memory, whose bytes depend on what is written and not on the time.

    Version 1.10's format has checksums on its metadata too, and older libraries can read it. The bytes are complete
    once the file is closed: HDF5 1.14's image of an open one (H5Fget_file_image) has a wrong checksum.
    """
    access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_cache(0, 521, 4 * _CHUNK_BYTES, 0.75)  # h5py's numbers, except for the size
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, content)
    creation.set_obj_track_times(False)  # h5py's own File has this from 3.15 on
    return h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, creation, access))


def _new_group(file: h5py.File, name: str) -> h5py.Group:
    creation = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    creation.set_obj_track_times(False)
    return h5py.Group(h5py.h5g.create(file.id, name.encode(), gcpl=creation))


def _largest(records: Sequence[Record], artifact: np.ndarray | None) -> float:
    peaks = [0.0 if artifact is None else _peak(artifact, "the shared artifact")]
    for record in records:
        peaks += [_peak(_array(values), f"{term} of {record.path!r}") for term, values in record.terms.items()]
        if record.prefix is not None:
            peaks.append(_peak(_array(record.prefix), f"prefix of {record.path!r}"))
    return max(peaks)


def _write_attributes(file: h5py.File, job: Job) -> None:
    attributes = {**job.attributes(), "version": dvt.__version__}
    attributes["checksum"] = _sha256(_canonical(attributes))
    for name, text in attributes.items():
        value = text.encode()
        file.attrs.create(name, value, dtype=h5py.string_dtype("utf-8", max(1, len(value))))


def _write_index(group: h5py.Group, records: Sequence[Record], grids: np.ndarray, offset: np.ndarray) -> None:
    paths = [record.path.encode("utf-8", "surrogateescape") for record in records]  # file names are bytes on Linux
    columns: dict[str, tuple[Any, Any]] = {
        "path": (paths, h5py.string_dtype("utf-8", max(map(len, paths)))),
        "sha256": ([record.sha256.encode() for record in records], h5py.string_dtype("ascii", 64)),
        "size": ([record.size for record in records], np.dtype(np.int64)),
        "grid": (grids, np.dtype(np.int64)),
        "offset": (offset, np.dtype(np.int64)),
    }
    for name, (values, kind) in columns.items():
        array = np.array(values, dtype=kind)
        _dataset(group, name, array.shape, kind, len(array))[:] = array


def _dataset(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any, rows: int) -> h5py.Dataset:
    """An empty dataset in chunks of whole rows, as many as asked for unless that makes more than 4 MB."""
    row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape[1:]))
    chunks = (max(1, min(rows, shape[0], _CHUNK_BYTES // row_bytes)), *shape[1:])
    return group.create_dataset(name, shape, dtype, chunks=chunks, fletcher32=True)


# -- reading ----------------------------------------------------------------------------------------------------------


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
        files = _shard_files(self.path)
        if not files:
            raise StoreError(f"{str(path)!r} is not a feature store: it is not a shard, nor a folder with *.h5 shards")
        self._shards = [_read_shard(file) for file in files]
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
        """What made the tokens."""
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
        """(h, w) of each image's tokens."""
        return [(int(shard.grid[row, 0]), int(shard.grid[row, 1])) for shard, row in self._rows()]

    @property
    def sizes(self) -> list[Size]:
        """(H, W) of each image in pixels."""
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
        """One term (h, w, C) of image i as it is stored, float16 or float32."""
        term = self.term if term is None else term
        self._check_term(term)
        shard, row = self._at(i)
        with self._local.open(shard.file) as file:
            rows = file[f"tokens/{term}"][shard.offset[row] : shard.offset[row + 1]]
        return rows.reshape(*shard.grid[row], shard.channels)

    def record(self, i: int) -> Record:
        """Everything about image i."""
        shard, row = self._at(i)
        path, sha256 = os.fsdecode(bytes(shard.path[row])), shard.sha256[row].decode()
        size = (int(shard.size[row, 0]), int(shard.size[row, 1]))
        return Record(path, sha256, size, {term: self.read(i, term) for term in self.terms}, self._read_prefix(i))

    def prefix(self, i: int) -> np.ndarray | None:
        """Prefix tokens (P, C) of image i as they are stored, or None."""
        return self._read_prefix(i)

    def artifact(self, i: int) -> np.ndarray | None:
        """The (h, w, C) artifact that image i shares with its shard, or None."""
        shard, _ = self._at(i)
        if not shard.shared:
            return None
        with self._local.open(shard.file) as file:
            return file["artifact"][:]

    def verify(self) -> list[Path]:
        """The damaged shards, found by reading everything through its checksum. See :func:`damaged_shards`."""
        return list(damaged_shards(self.path))

    def summary(self) -> dict[str, Any]:
        """What the store holds, ready for JSON: counts, bytes on disk, grids, terms, type, job."""
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

    def _rows(self) -> Iterator[tuple[_Shard, int]]:
        return ((self._shards[shard], row) for shard, row in self._where)

    def _at(self, i: int) -> tuple[_Shard, int]:
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
    """The damaged shards of a store and what is wrong with each; every byte of tokens goes through its checksum.

    Unlike :class:`FeatureStore` it does not stop at the first one.
    """
    damaged: dict[Path, str] = {}
    for file in _shard_files(Path(path)):
        try:
            shard = _read_shard(file)
            names = [f"tokens/{term}" for term in shard.terms]
            names += ["tokens/prefix"] * bool(shard.prefix) + ["artifact"] * shard.shared
            with _opened(file) as handle:
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
        with _damage(path):
            if self.process != os.getpid():  # a fork inherits handles that it must not use
                self.process, self.files = os.getpid(), OrderedDict()
            if path not in self.files:
                self.files[path] = h5py.File(path, "r", locking=False, rdcc_nbytes=2 * _CHUNK_BYTES)
            self.files.move_to_end(path)
            while len(self.files) > _OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            yield self.files[path]


def _shard_files(path: Path) -> list[Path]:
    """A store's shards; nothing for any other file, which must not be called a damaged shard."""
    try:
        return sorted(path.glob("*.h5")) if path.is_dir() else [path] if path.exists() and path.suffix == ".h5" else []
    except OSError as error:
        raise StoreError(f"cannot read the store {str(path)!r}: {error.strerror or error}") from error


@contextmanager
def _damage(path: str | Path) -> Iterator[None]:
    """Whatever h5py raises on a damaged file becomes a StoreError that names it and says what to do."""
    try:
        yield
    except DvtError:
        raise
    except PermissionError as error:
        raise StoreError(f"cannot read the shard {str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # h5py raises nearly anything on damaged bytes
        raise StoreError(f"the shard {str(path)!r} is damaged ({error}); {_REMEDY}") from error


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise StoreError(f"{str(path)!r} is not a feature store: it is not a regular file")
    with _damage(path), h5py.File(path, "r", locking=False) as file:
        yield file


# -- a shard's index, read with suspicion -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """The index of one shard, checked."""

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

    def sha256s(self) -> list[str]:
        return [value.decode() for value in self.sha256]


def _read_shard(path: Path) -> _Shard:
    """The index of a shard, refusing whatever the writer would not have written.

    A file from elsewhere can point into other files, or announce arrays that fill the memory; nothing is read before
    its links, layout, filters and stored size have been looked at.
    """
    with _opened(path) as file, open(path, "rb") as source:
        return _checked(file, path, source)


@dataclass(frozen=True)
class ShardIndex:
    """What a job needs to know of a shard to go on.

    Args:
        job: that made it.
        sha256s: of its images' files.
        grid: of the artifact that its images share, if any.
        artifact: (h, w, C) that its images share, if there is one and it was asked for.
    """

    job: Job
    sha256s: list[str]
    grid: Size | None
    artifact: np.ndarray | None


def read_index(source: BinaryIO, name: str, artifact: bool = False) -> ShardIndex:
    """The index of a shard that lies elsewhere, read with the same suspicion; little more than that is fetched.

    Args:
        source: its file, seekable.
        name: for messages.
        artifact: read the one that its images share too.

    Raises:
        StoreError: it is damaged, or of another schema.
    """
    with _damage(name), h5py.File(source, "r") as file:
        shard = _checked(file, Path(name), source)
        values = file["artifact"][:] if shard.shared and artifact else None
        return ShardIndex(shard.job, shard.sha256s(), file["artifact"].shape[:2] if shard.shared else None, values)


def _checked(file: h5py.File, path: Path, source: BinaryIO) -> _Shard:
    """The index of the file that `source` reads too."""
    attributes = _read_attributes(file, path, source)
    _check_links(file)
    trusted = partial(_trusted, file, source.seek(0, os.SEEK_END))
    index = {name: trusted(f"index/{name}", rank) for name, rank in _INDEX_RANKS.items()}
    columns = {name: dataset[:] for name, dataset in index.items()}
    _check_index(columns, index["path"].dtype)
    terms = tuple(name for name in TERMS if name in file["tokens"])
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
    return _Shard(
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
        raise ValueError(otherwise)  # _damage names the shard


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
    _require(_text(file, "checksum") == _sha256(_canonical(attributes)), "the attributes do not match their checksum")
    return attributes


def _text(file: h5py.File, name: str) -> str:
    attribute = file.attrs.get_id(name)
    kind = h5py.check_string_dtype(attribute.dtype)
    _require(attribute.shape == () and kind is not None, f"{name} is not text")
    _require((kind.length or 0) < _ATTRIBUTE_BYTES, f"{name} is not text under 64 KB")
    text = file.attrs[name]
    text = text if isinstance(text, str) else bytes(text).decode()
    _require(len(text) < _ATTRIBUTE_BYTES, f"{name} is not text under 64 KB")
    return text


def _check_heaps(source: BinaryIO) -> None:
    """That the variable-length text of a shard from before attributes had a fixed length can be read.

    HDF5 never comes back from a heap with an object of size 0, such as zeros leave it.
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
    for place in ("/", "index", "tokens"):  # the root first: afterwards its children are known to be its own
        group = file[place]
        _require(isinstance(group, h5py.Group), f"{place!r} is not a group")
        for name in group:
            _require(isinstance(group.get(name, getlink=True), h5py.HardLink), f"{name!r} links out of its place")


def _trusted(file: h5py.File, size: int, name: str, rank: int) -> h5py.Dataset:
    """A dataset that lies in this very file, whole, in plain checksummed chunks: what it announces is what it holds."""
    dataset = file[name]
    _require(isinstance(dataset, h5py.Dataset), f"/{name} is not a dataset")
    layout = dataset.id.get_create_plist()
    # Neither a virtual dataset nor one with external storage is chunked.
    _require(layout.get_layout() == h5py.h5d.CHUNKED, f"/{name} may hold data from outside the shard: no chunks")
    checksum_only = layout.get_nfilters() == 1 and layout.get_filter(0)[0] == h5py.h5z.FILTER_FLETCHER32
    _require(checksum_only, f"/{name} has other filters than the checksum")
    _require(dataset.dtype.kind in "iSf", f"/{name} is of type {dataset.dtype}")  # variable lengths can be any length
    _require(dataset.ndim == rank and dataset.size > 0, f"/{name} has the shape {dataset.shape}")
    pieces = [-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    stored = int(np.prod(pieces, dtype=object) * (np.prod(dataset.chunks, dtype=object) * dataset.dtype.itemsize + 4))
    _require(dataset.id.get_storage_size() == stored, f"/{name} is not stored whole")
    _require(stored <= size, f"/{name} announces more than the file holds")
    return dataset


def _check_index(columns: dict[str, np.ndarray], path_type: np.dtype) -> None:
    """That the columns agree with each other; values are still hostile here."""
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
