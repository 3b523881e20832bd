"""Make the bytes of one shard: check records, and write them to an HDF5 file."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
from torch import Tensor

import dvt
from dvt.errors import ConfigError, NonFiniteError, ShapeError, StoreError
from dvt.grids import Size
from dvt.store.direct import Target, write_rows
from dvt.store.job import Job, canonical, sha256_of

TERMS = ("raw", "semantic", "artifact", "residual", "denoised")
_LAYER = re.compile(r"layer(\d{1,3})")  # the raw tokens of another layer, by the number of its block

CHUNK_BYTES = 4 << 20  # a ViT-B's 37 x 37 tokens in half precision take 2 MB: most images are one chunk

_FLOAT16_LIMIT = 65520.0  # the smallest number that rounds to infinity


@dataclass
class Record:
    """Hold one image of a store.

    Args:
        path: the path as given.
        sha256: hash of the file's bytes, 64 hexadecimal digits.
        size: (H, W) of the original image in pixels.
        terms: (h, w, C) maps by their names in :data:`TERMS`, or "layer5" for those of block 5; all of one shape.
        prefix: (P, C) class token and registers, or None.
    """

    path: str
    sha256: str
    size: Size
    terms: Mapping[str, np.ndarray | Tensor]
    prefix: np.ndarray | Tensor | None = None


def ordered_terms(names: Collection[str]) -> tuple[str, ...]:
    """List the names that are terms: those of :data:`TERMS`, then further layers by number.

    >>> ordered_terms({"layer11", "prefix", "layer5", "denoised", "raw"})
    ('raw', 'denoised', 'layer5', 'layer11')
    """
    layers = {name: int(found[1]) for name in names if (found := _LAYER.fullmatch(name))}
    return (*(name for name in TERMS if name in names), *sorted(layers, key=lambda name: layers[name]))


def shard_file(
    name: str,
    job: Job,
    records: Sequence[Record],
    artifact: np.ndarray | Tensor | None = None,
    dtype: str = "float16",
) -> bytes:
    """Make the bytes of a shard's file, the same on every machine; see :meth:`StoreWriter.write`."""
    content = io.BytesIO()
    write_shard(content, name, job, records, artifact, dtype)
    return content.getvalue()


def write_shard(
    file: BinaryIO,
    name: str,
    job: Job,
    records: Sequence[Record],
    artifact: np.ndarray | Tensor | None = None,
    dtype: str = "float16",
) -> None:
    """Write the bytes of a shard to an empty file, after all checks; see :meth:`StoreWriter.write`.

    Raises:
        OSError: the disk is full, or something else keeps the file from being written.
    """
    check_name(name)
    target = Target(file)
    try:
        _write_content(target, job, records, artifact, dtype)
    finally:
        target.check()  # what else went wrong then followed from it


def check_name(name: str) -> None:
    """Refuse a shard's name that is no plain file name.

    Raises:
        StoreError: the name is too long or has other signs.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}", name):
        raise StoreError(f"{name!r} is not a valid shard name; use letters, digits, '.', '_' and '-' only")


def _array(values: np.ndarray | Tensor, dtype: str = "float32") -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if dtype == "float16" and values.dtype == torch.float16:
            return values.numpy()  # without the two conversions, which would take a quarter of the writer's time
        values = values.float().numpy()
    # NumPy converts, because HDF5's conversion to half precision turns values that round to 65504 into infinity.
    return np.asarray(values, dtype=np.float32).astype(dtype, copy=False)


def _plain(values: np.ndarray | Tensor) -> np.ndarray:
    """Return half precision as it is, and all else in float32."""
    return _array(values, "float16" if values.dtype in (torch.float16, np.float16) else "float32")


def _peak(values: np.ndarray, what: str) -> float:
    """Find the largest magnitude."""
    if values.dtype == np.float16:  # NumPy compares their bits many times faster than the numbers, in the same order
        positive, any_sign = (int(values.view(kind).max(initial=0)) for kind in (np.int16, np.uint16))
        peak = float(np.uint16(max(positive, any_sign - 0x8000)).view(np.float16))
    else:
        peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if not np.isfinite(peak):
        raise NonFiniteError(
            f"{what} holds NaN or infinity and was not stored; leave this image out or check the weights"
        )
    return peak


def _check_records(records: Sequence[Record], artifact: np.ndarray | Tensor | None) -> tuple[list[str], int]:
    """Check that all records fit together; return the names of the terms, and C."""
    if not records:
        raise ShapeError("a shard holds at least one image, got none")
    terms, first = list(records[0].terms), records[0]
    if not terms or len(ordered_terms(terms)) < len(terms):
        raise ShapeError(f"an image's terms are some of {TERMS}, and layer0, layer1, ...; got {terms}")
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


def _write_content(
    target: Target, job: Job, records: Sequence[Record], artifact: np.ndarray | Tensor | None, dtype: str
) -> None:
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"tokens are stored as float16 or float32, got {dtype!r}")
    terms, channels = _check_records(records, artifact)
    grids = np.array([record.terms[terms[0]].shape[:2] for record in records], dtype=np.int64)
    offset = np.concatenate(([0], np.cumsum(grids.prod(1))))
    shared = None if artifact is None else _array(artifact)
    if _largest(records, shared) >= _FLOAT16_LIMIT:
        dtype = "float32"
    with _new_file(target) as file:
        _write_attributes(file, job)
        _write_index(_new_group(file, "index"), records, grids, offset)
        tokens = _new_group(file, "tokens")
        for term in terms:
            rows = _dataset(tokens, term, (int(offset[-1]), channels), dtype, int(grids.prod(1).max()))
            write_rows(rows, [_array(record.terms[term], dtype).reshape(-1, channels) for record in records])
        if records[0].prefix is not None and len(records[0].prefix):
            prefix = _dataset(tokens, "prefix", (len(records), *records[0].prefix.shape), dtype, len(records))
            for i, record in enumerate(records):
                if record.prefix is not None:
                    prefix[i] = _array(record.prefix, dtype)
        if shared is not None:
            _dataset(file, "artifact", shared.shape, dtype, len(shared))[:] = _array(shared, dtype)


def _new_file(target: Target) -> h5py.File:
    """Open an empty HDF5 file, whose bytes depend only on its content, not on the time.

    The format of version 1.10 has checksums also for metadata, and older libraries can read it. The bytes are complete
    only after the file is closed: the image of an open file (H5Fget_file_image) has a wrong checksum in HDF5 1.14.
    """
    access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_cache(0, 521, 4 * CHUNK_BYTES, 0.75)  # h5py's defaults, except for the size
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, target)
    creation.set_obj_track_times(False)  # h5py.File has this option only from version 3.15
    return h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, creation, access))


def _new_group(file: h5py.File, name: str) -> h5py.Group:
    creation = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    creation.set_obj_track_times(False)
    return h5py.Group(h5py.h5g.create(file.id, name.encode(), gcpl=creation))


def _largest(records: Sequence[Record], artifact: np.ndarray | None) -> float:
    peaks = [0.0 if artifact is None else _peak(artifact, "the shared artifact")]
    for record in records:
        peaks += [_peak(_plain(values), f"{term} of {record.path!r}") for term, values in record.terms.items()]
        if record.prefix is not None:
            peaks.append(_peak(_plain(record.prefix), f"prefix of {record.path!r}"))
    return max(peaks)


def _write_attributes(file: h5py.File, job: Job) -> None:
    attributes = {**job.attributes(), "version": dvt.__version__}
    attributes["checksum"] = sha256_of(canonical(attributes))
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
    """Create an empty dataset in chunks of `rows` whole rows, or of fewer if a chunk would exceed 4 MB."""
    row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape[1:]))
    chunks = (max(1, min(rows, shape[0], CHUNK_BYTES // row_bytes)), *shape[1:])
    return group.create_dataset(name, shape, dtype, chunks=chunks, fletcher32=True)
