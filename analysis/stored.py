"""Read a report's files, which are not trusted: check types, sizes and ranges before allocating memory."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.lib import format as npy

from dvt.errors import ConfigError
from dvt.files import read_plain

MAX_BYTES = 512 << 20
"""The largest size in bytes of a report's arrays that is read; `dvt analyze` writes about 10 MB."""


class ReportAboutLater(TypedDict, total=False):
    """Type what reports of earlier versions lack."""

    precision: str
    stride: list[int]


class ReportAbout(ReportAboutLater):
    label: str
    name: str
    weights_sha256: str | None
    layer: int
    patch_size: list[int]
    image_size: list[int]
    feature_dim: int


class ReportSeconds(TypedDict):
    forward: float
    fields: float
    denoisers: float
    metrics: float
    total: float


class ReportJpeg(TypedDict):
    array: str
    image: int


class ReportPositions(TypedDict):
    array: str
    backbone: str
    layer: int
    variant: str


class ReportMaps(ReportPositions):
    image: int
    scale: float


class ReportNorms(ReportPositions):
    edges: list[float]


class ReportIndex(TypedDict):
    jpegs: list[ReportJpeg]
    maps: list[ReportMaps]
    positions: list[ReportPositions]
    norms: list[ReportNorms]


class ReportLater(TypedDict, total=False):
    data_sha256: str


class ReportContent(ReportLater):
    """Type report.json."""

    schema: str
    version: str
    config: dict[str, Any]
    backbones: list[ReportAbout]
    images: list[str]
    seconds: ReportSeconds
    rows: list[dict[str, Any]]
    index: ReportIndex


def read_arrays(path: Path, names: set[str], sha256: str | None) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file that a report names.

    Args:
        path: path of the file.
        names: names of the arrays to read.
        sha256: hash of the file, if the report has it.

    Raises:
        ConfigError: an array is missing, declares more bytes than it holds, all are larger than :data:`MAX_BYTES`, or
            the file belongs to another report.
    """
    content = read_plain(path, MAX_BYTES)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{path.name} and report.json come from two runs, of which one was interrupted")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {each.filename: each for each in archive.infolist()}
        if missing := sorted(name for name in names if f"{name}.npy" not in members):
            raise ConfigError(f"{path.name} misses {missing[:3]}")
        chosen = {name: members[f"{name}.npy"] for name in sorted(names)}
        if (total := sum(each.file_size for each in chosen.values())) > MAX_BYTES:
            raise ConfigError(f"{path.name} declares {total} bytes of arrays; at most {MAX_BYTES} are read")
        return {name: _array(archive, member) for name, member in chosen.items()}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        room = member.file_size - file.tell()
        wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject or fortran or wanted != room:
            raise ConfigError(f"the array {member.filename!r} declares {wanted} bytes of {dtype} and holds {room}")
        return np.frombuffer(file.read(), dtype).reshape(shape)
