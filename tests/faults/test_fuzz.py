"""Hostile input: thousands of damaged and made-up files of every kind that a user can hand in.

The cases run in a process of their own, this file as a script, because libraries in C answer some bytes with a crash.
Each kind ends as a line of JSON: how many cases were read, refused, or whatever the kind counts. The seed is printed;
``DVT_FUZZ_SEED=seed`` makes the same cases again, and the last case's files stay in pytest's folder.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import io
import json
import math
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

import dvt.images
from dvt.backbones.weights import load_state, read_state
from dvt.errors import DvtError, ImageError
from dvt.images import file_sha256, find_images, image_size, load_image
from dvt.store import FeatureStore, Job, Record, StoreWriter, damaged_shards
from dvt.store.tools import export_store, merge_stores

SECONDS_A_CASE = 30  # then the process is ended with a traceback
MEMORY = 16 << 30  # address space of the process; torch alone maps several GB of libraries

# -- damage ----------------------------------------------------------------------------------------------------------

PLACES = st.one_of(st.integers(0, 200), st.integers(-200, -1), st.integers(0, 1 << 20))
EXTREMES = (0, 1, 2, 1 << 24, 1 << 40, *((1 << n) + d for n in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, 0)))


def flip(data: bytearray, at: int, size: int, other: bytes) -> None:
    data[at] ^= 1 << (size % 8)


def overwrite(data: bytearray, at: int, size: int, other: bytes) -> None:
    data[at] = size % 256


def extreme(data: bytearray, at: int, size: int, other: bytes) -> None:
    width, value = (1, 2, 4, 8)[size % 4], EXTREMES[size // 4 % len(EXTREMES)]
    order = ("little", "big")[size // 64 % 2]
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def cut(data: bytearray, at: int, size: int, other: bytes) -> None:
    del data[at:]


def drop(data: bytearray, at: int, size: int, other: bytes) -> None:
    del data[at : at + size]


def double(data: bytearray, at: int, size: int, other: bytes) -> None:
    data[at:at] = data[at : at + size]


def zeros(data: bytearray, at: int, size: int, other: bytes) -> None:
    data[at : at + size] = bytes(size)


def splice(data: bytearray, at: int, size: int, other: bytes) -> None:
    data[at : at + size] = other[at % max(1, len(other)) :][:size]


EDITS = (flip, overwrite, extreme, cut, drop, double, zeros, splice)


class Files(dict[str, bytes]):
    """Good files by name; a failure does not print their bytes."""

    def __repr__(self) -> str:
        return f"files {', '.join(self)}"


def damaged(files: dict[str, bytes]) -> Any:
    return _damaged(Files(files))


def described(files: dict[str, bytes]) -> Any:
    return _described(Files(files))


@st.composite
def _damaged(draw: Any, files: Files) -> tuple[str, bytes]:
    """One of the files, and its bytes after a few edits."""
    names = sorted(files)
    name = draw(st.sampled_from(names))
    data = bytearray(files[name])
    edits = st.tuples(st.sampled_from(EDITS), PLACES, st.integers(0, 300), st.sampled_from(names))
    for edit, place, size, other in draw(st.lists(edits, min_size=1, max_size=5)):
        if data:
            edit(data, place % len(data), size, files[other])
    return name, bytes(data)


def cases(
    count: int, strategy: Any, check: Callable[..., str], number: int, tmp: Path, first: Sequence[Any] = ()
) -> dict[str, Any]:
    """Runs a check on the first cases and that many drawn ones; what it returns is counted."""
    counts = Counter(check(tmp, case) for case in first)

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(case: Any) -> None:
        faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
        counts[check(tmp, case)] += 1
        faulthandler.cancel_dump_traceback_later()

    run()
    return dict(counts)


# -- images ----------------------------------------------------------------------------------------------------------


def fuzz_images(count: int, number: int, tmp: Path) -> dict[str, Any]:
    dvt.images.read.MAX_PIXELS = 1 << 22  # so that the bound on memory, which grows with it, shows
    Image.new("L", (1 << 11, (1 << 11) + 1)).save(tmp / "larger.png")
    with pytest.raises(ImageError, match="at most 4194304 are decoded"):  # or the bound above binds nobody
        load_image(tmp / "larger.png")
    return cases(count, damaged(image_files()) | pngs_with_right_checksums(), check_image, number, tmp)


@functools.cache
def image_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (19, 23, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(rng.integers(0, 1 << 16, (9, 11), dtype=np.uint16))
    floats = Image.fromarray(rng.random((7, 5), dtype=np.float32))
    pages = {"save_all": True, "append_images": [rgb.rotate(90), rgb]}
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "jpeg": (rgb, {"exif": exif}),
        "progressive.jpeg": (rgb, {"progressive": True, "quality": 50}),
        "cmyk.jpeg": (rgb.convert("CMYK"), {}),
        "png": (rgb, {"exif": exif}),
        "grey16.png": (grey16, {}),
        "palette.png": (rgb.convert("P"), {"transparency": 3}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "animated.png": (rgb, pages),
        "tiff": (rgb, {"exif": exif}),
        "float.tiff": (floats, {}),
        "grey16.tiff": (grey16, {}),
        "pages.tiff": (rgb, pages),
        **{f"{name}.tiff": (rgb, {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")},
        "packbits.tiff": (rgb.convert("L"), {"compression": "packbits"}),
        "group4.tiff": (rgb.convert("1"), {"compression": "group4"}),
        "gif": (rgb.convert("P"), {}),
        "animated.gif": (rgb.convert("P"), {"save_all": True, "append_images": [rgb.convert("P").rotate(90)]}),
        "webp": (rgb, {"exif": exif}),
        "alpha.webp": (rgb.convert("RGBA"), {"lossless": True}),
        "animated.webp": (rgb, pages),
        "bmp": (rgb, {}),
        "ppm": (rgb, {}),
        "grey16.ppm": (grey16, {}),
        "jpeg2000": (rgb, {}),
        "avif": (rgb, {}),
        "tga": (rgb.convert("RGBA"), {"compression": "tga_rle"}),
        "mpo": (rgb, pages),
    }
    known = {name.lower() for name in dvt.images.read._formats()}
    return {n: encoded(*m, n.rsplit(".")[-1]) for n, m in made.items() if n.rsplit(".")[-1] in known}


def encoded(image: Image.Image, options: dict[str, Any], form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@st.composite
def pngs_with_right_checksums(draw: Any) -> tuple[str, bytes]:
    """PNG chunks with odd contents and the CRC that belongs to them: the decoder is reached."""
    name = draw(st.sampled_from(["png", "palette.png", "grey16.png", "alpha.png", "animated.png"]))
    data, chunks, at = image_files()[name], [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for place, edit in draw(st.lists(st.tuples(st.integers(0, 9), damaged({"": b"\0" * 13})), max_size=2)):
        kind, content = chunks[place % len(chunks)]
        content = bytearray(content or b"\0")
        content[: len(edit[1]) or 1] = edit[1]
        chunks[place % len(chunks)] = (kind, bytes(content))
    if draw(st.booleans()):  # the size, within what is decoded or far beyond it
        width, height = draw(st.tuples(*[st.integers(0, 3000) | st.sampled_from(EXTREMES)] * 2))
        chunks[0] = (b"IHDR", struct.pack(">II", width % (1 << 32), height % (1 << 32)) + chunks[0][1][8:])
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return name, data[:8] + b"".join(parts)


def check_image(tmp: Path, case: tuple[str, bytes]) -> str:
    path = tmp / "case.image"
    path.write_bytes(case[1])
    assert file_sha256(path) == hashlib.sha256(case[1]).hexdigest()
    try:
        image = load_image(path)
    except ImageError as error:
        assert str(path) in str(error)
        with suppress(ImageError):
            image_size(path)
        return "refused"
    assert image.dtype == torch.float32 and image.shape == (3, *image_size(path)) and image.is_contiguous()
    assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    return "read"


# -- stores ----------------------------------------------------------------------------------------------------------

JOB = Job("vit_tiny", "ab" * 32, size=224, config={"verb": "denoise", "seed": 0})
SECRET = 7.0  # in the files beside the stores; no token has this value


def fuzz_stores(count: int, number: int, tmp: Path) -> dict[str, Any]:
    good = good_shard(tmp / "good")
    wanted = contents(FeatureStore(tmp / "good"))
    other = earliest(tmp, good)
    with h5py.File(tmp / "secret.hdf", "w") as file:
        file.create_dataset("x", data=np.full((28, 6), SECRET, "<f2"), chunks=(28, 6), fletcher32=True)
    (tmp / "secret.raw").write_bytes(np.full(4096, SECRET, "<f2").tobytes())

    def check(tmp: Path, case: tuple[str, Any]) -> str:
        name, content = case
        if name == "made":
            content = made(tmp, good, content)
        return f"{name} {check_store(tmp, content, wanted if name == 'own' else None)}"

    # A store as dvt writes it; one whose metadata has no checksums, so that damage gets far; and ones made on purpose.
    ways = damaged({"own": good}) | damaged({"earliest": other}) | st.tuples(st.just("made"), MADE)
    return cases(count, ways, check, number, tmp, [("made", [(a, "tokens/raw", v)]) for a in ACTIONS for v in (0, 1)])


def good_shard(folder: Path) -> bytes:
    rng, records = np.random.default_rng(0), []
    for i, (h, w) in enumerate([(2, 3), (4, 4), (3, 2)]):
        terms = {term: rng.random((h, w, 6), dtype=np.float32) for term in ("raw", "semantic")}
        records.append(Record(f"../{i}.jpg", hashlib.sha256(bytes([i])).hexdigest(), (9, 8), terms, rng.random((1, 6))))
    with StoreWriter(folder, JOB) as writer:
        return writer.write("one", records).read_bytes()


def earliest(tmp: Path, shard: bytes) -> bytes:
    """The same shard in HDF5's oldest format."""
    with h5py.File(io.BytesIO(shard)) as source, h5py.File(tmp / "earliest.hdf", "w", libver="earliest") as target:
        for name in source:
            source.copy(name, target)
        for name, text in source.attrs.items():
            target.attrs.create(name, text.decode(), dtype=h5py.string_dtype())
    return (tmp / "earliest.hdf").read_bytes()


def contents(store: FeatureStore) -> list[Any]:
    """All that a store tells, as plain values that can be compared; arrays by their bytes."""
    told: list[Any] = [store.job.digest, len(store), store.terms, store.summary()["tokens"]]
    told += [store.images, store.sha256s, store.grids, store.sizes]
    for i in range(len(store)):
        record, tokens, artifact = store.record(i), store[i], store.artifact(i)
        arrays = [*record.terms.values(), store.prefix(i), tokens.patches.numpy(), artifact]
        held = [array for array in arrays if array is not None]
        assert all(array.dtype.kind == "f" and not (array == SECRET).any() for array in held), "a secret came out"
        told.append([array.tobytes() for array in held])
    return told


def check_store(tmp: Path, content: bytes, wanted: list[Any] | None) -> str:
    folder, out = tmp / "store", tmp / "out"
    folder.mkdir(exist_ok=True)
    (folder / "one.h5").write_bytes(content)
    with faults_only():
        damaged = damaged_shards(folder)
    with faults_only():
        told = contents(FeatureStore(folder))
        assert wanted is None or damaged or told == wanted, "other tokens than were written"
        before = snapshot(tmp, out)
        with faults_only():
            export_store(folder, out)
            assert {p.relative_to(out).parts[0] for p in out.rglob("*.npy")} <= {*dvt.store.TERMS, "prefix"}
        remove(out)
        with faults_only():
            merge_stores([folder], out)
        remove(out)
        assert snapshot(tmp, out) == before
        return "read" if not damaged else "read, damage found"
    return "refused"


class faults_only(suppress):
    """Lets nothing through but dvt's own errors, which end the block."""

    def __init__(self) -> None:
        super().__init__(DvtError)


def snapshot(folder: Path, without: Path) -> dict[str, Any]:
    """Every file under a folder with what it holds, but those at one place."""
    found: dict[str, Any] = {}
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(here, name) != without]
        for name in (*folders, *files):
            path = Path(here, name)
            plain = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else None
    found.pop(str(without), None)
    return found


def remove(path: Path) -> None:
    """A file or a folder that holds no links, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def made(tmp: Path, good: bytes, plan: list[tuple[str, str, int]]) -> bytes:
    """A shard changed by HDF5 itself, with right checksums."""
    path = tmp / "made.hdf"
    path.write_bytes(good)
    for action, name, value in plan:
        # Whatever is not possible after the action before it is left out.
        with suppress(Exception), h5py.File(path, "r+") as file:
            ACTIONS[action](file, tmp, name, value)
    return path.read_bytes()


def _again(file: h5py.File, name: str, **options: Any) -> None:
    values = file[name][()] if file[name].size < 1 << 20 else np.zeros(1)
    del file[name]
    file.create_dataset(name, **{"data": values, "chunks": values.shape, "fletcher32": True, **options})


def _virtual(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    layout = h5py.VirtualLayout(file[name].shape, file[name].dtype)
    layout[...] = h5py.VirtualSource(str(tmp / "secret.hdf"), "x", layout.shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def _external_storage(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, kind, external=[(str(tmp / "secret.raw"), value % 64, h5py.h5f.UNLIMITED)])


def _link(make: Callable[[Path], Any]) -> Callable[..., None]:
    def action(file: h5py.File, tmp: Path, name: str, value: int) -> None:
        place = name if value % 2 else name.split("/")[0]
        del file[place]
        file[place] = make(tmp)

    return action


def _hard_link(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    """A cycle, or one dataset in the place of another."""
    source = file[("/", "tokens", "index", "tokens/raw", "index/grid")[value % 5]]
    del file[name]
    file[name] = source


def _typed(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    """The same shape in a type that no shard has; variable-length ones can announce any length."""
    kinds: list[Any] = [h5py.vlen_dtype(np.dtype("<i4")), h5py.string_dtype(), h5py.ref_dtype, np.dtype("V8")]
    kinds += [np.dtype([("a", "<i8"), ("b", "<f2")]), h5py.enum_dtype({"A": 1}, "i8"), np.dtype(">i8"), np.dtype("<f8")]
    kinds += [np.dtype("<f2"), np.dtype("S64"), np.dtype("S1"), np.dtype("<c8"), np.dtype(("<i8", (2,))), np.dtype("?")]
    shape, kind = file[name].shape, kinds[value % len(kinds)]
    del file[name]
    file.create_dataset(name, shape, kind, chunks=shape, fletcher32=kind.kind != "O")


def _shaped(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    """A huge announced shape, of which nothing is stored."""
    shape, kind = list(file[name].shape), file[name].dtype
    shape[value % len(shape)] = EXTREMES[value % len(EXTREMES)]
    chunks = tuple(min(max(length, 1), 64) for length in shape)
    del file[name]
    file.create_dataset(name, tuple(shape), kind, chunks=chunks, fletcher32=True)


def _filtered(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    options: list[dict[str, Any]] = [
        {"compression": "gzip"},
        {"compression": "lzf"},
        {"shuffle": True},
        {"chunks": None},
    ]
    options += [{"scaleoffset": 2}, {"compression": "szip"}, {"fletcher32": False}, {"maxshape": file[name].shape}]
    chosen = options[value % len(options)]
    _again(file, name, **(chosen if chosen.get("chunks", 0) is not None else {"chunks": None, "fletcher32": False}))


def _valued(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    """An extreme number, or text that leads elsewhere, in one element."""
    if file[name].size > 1 << 20:  # announced by an action before: HDF5 would look for the place for ever
        return
    data, texts = file[name], (b"../../etc/passwd", b"/etc/passwd", b"a\0b", b"\xff\xfe", b"", b"\x1b[2J", b"0" * 64)
    at = tuple(value // 7 % length for length in data.shape)
    number = (EXTREMES[value % len(EXTREMES)] + (1 << 63)) % (1 << 64) - (1 << 63)
    if data.dtype.kind == "S":
        data[at] = texts[value % len(texts)]
    elif data.dtype.kind == "f":
        data[at] = (math.nan, math.inf, -1.0)[value % 3]
    else:
        data[at] = (number, -number % (1 << 63), -1)[value % 3]


def _attribute(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    texts: list[Any] = ["[]", "{}", "null", "NaN", "1e999", "[" * 5000, '"x"', "9" * 5000, "x" * 60_000]
    texts += ["x" * (10 << 20), 1, b"\xff", np.zeros(3), "dvt-features/2", '{"config":' * 900, "\udcff"]
    keys = [key for key in file.attrs if key != "checksum"]
    file.attrs[keys[value % len(keys)]] = texts[value // 8 % len(texts)]
    if value % 3:  # someone who forges a shard forges its checksum
        told = {key: bytes(v).decode() if isinstance(v := file.attrs[key], bytes) else str(v) for key in keys}
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        file.attrs["checksum"] = hashlib.sha256(text.encode()).hexdigest()


def _odd_name(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    names = ("..", "tokens/..", "tokens/residual", "tokens/denoised", "x" * 5000, "\udcff", "artifact", "index/more")
    file.copy(file[name], file, name=names[value % len(names)])


def _user_block(file: h5py.File, tmp: Path, name: str, value: int) -> None:
    """Everything again, behind 512 bytes of something else."""
    path = tmp / "block.hdf"
    with h5py.File(path, "w", userblock_size=512) as target:
        for child in file:
            file.copy(child, target)
        for key, text in file.attrs.items():
            target.attrs.create(key, text, dtype=file.attrs.get_id(key).dtype)
    for child in list(file):
        del file[child]
    file.close()
    (tmp / "made.hdf").write_bytes(path.read_bytes())


ACTIONS: dict[str, Callable[[h5py.File, Path, str, int], None]] = {
    "virtual": _virtual,
    "external storage": _external_storage,
    "external link": _link(lambda tmp: h5py.ExternalLink(str(tmp / "secret.hdf"), "x")),
    "link to itself": _link(lambda tmp: h5py.ExternalLink("made.hdf", "/tokens/raw")),
    "soft link": _link(lambda tmp: h5py.SoftLink("/tokens/semantic")),
    "hard link": _hard_link,
    "type": _typed,
    "shape": _shaped,
    "filter": _filtered,
    "value": _valued,
    "attribute": _attribute,
    "name": _odd_name,
    "user block": _user_block,
}
DATASETS = (
    "tokens/raw",
    "tokens/semantic",
    "tokens/prefix",
    *(f"index/{name}" for name in dvt.store.index._INDEX_RANKS),
)
MADE = st.lists(
    st.tuples(st.sampled_from(sorted(ACTIONS)), st.sampled_from(DATASETS), st.integers(0, 255)), min_size=1, max_size=3
)


# -- weights ---------------------------------------------------------------------------------------------------------


def fuzz_weights(count: int, number: int, tmp: Path) -> dict[str, Any]:
    files = weights_files(tmp)
    canary = tmp / "canary"
    ways = damaged(files) | described({k: v for k, v in files.items() if k.endswith("safetensors")}) | pickled(canary)

    def check(tmp: Path, case: tuple[str, bytes]) -> str:
        outcome = check_weights(tmp, case)
        assert not canary.exists(), "code in a file was run"
        return f"{Path(case[0]).suffix[1:]} {outcome}"

    return cases(count, ways, check, number, tmp)


def weights_files(tmp: Path) -> dict[str, bytes]:
    from dvt.denoiser import Denoiser, DenoiserConfig

    files, generator = {}, torch.Generator().manual_seed(0)
    for kind in ("block", "conv1x1", "conv3x3", "linear", "subtract"):
        denoiser = Denoiser(DenoiserConfig(kind, 8, (2, 3), rank=2), generator)
        denoiser.card = {"backbone": "test_vit", "layer": -1}
        denoiser.save_pretrained(tmp / "x.safetensors")
        files[f"{kind}.safetensors"] = (tmp / "x.safetensors").read_bytes()
    block = Denoiser(DenoiserConfig("block", 8, (2, 2)), generator).state_dict()
    published = {k.replace("body.", "").replace("blocks.0.", "denoiser."): v for k, v in block.items()}
    content = {"denoiser": published, "epoch": 3}
    plain = {"module.weight": torch.ones(3, 2), "module.bias": torch.zeros(3)}
    files["plain.safetensors"] = save(plain)
    for name, new in (("published", True), ("old", False)):
        files[f"{name}.pth"] = saved(content, new)
        files[f"{name}-plain.pth"] = saved({"state_dict": plain, "optimizer": [1, {"a": 0.5}]}, new)
    return files


def saved(content: Any, new: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def check_weights(tmp: Path, case: tuple[str, bytes]) -> str:
    from dvt.denoiser import Denoiser, published_backbone_state

    path, outcome = tmp / case[0], "refused"
    path.write_bytes(case[1])
    with faults_only():
        state = read_state(path)
        assert state and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
        linear = torch.nn.Linear(2, 3)
        with faults_only():
            load_state(linear, state, "it")
            assert all(value.isfinite().all() for value in linear.parameters())
        outcome = "read"
    with faults_only():
        published_backbone_state(path)
    with faults_only():
        denoiser = Denoiser.from_pretrained(path)
        assert all(value.isfinite().all() for value in denoiser.state_dict().values())
        assert not denoiser.training and 0 <= denoiser.strength <= 1
        maps = denoiser(torch.ones(1, 2, 2, denoiser.feature_dim), torch.ones(1, 1, denoiser.feature_dim))
        assert maps.shape == (1, 2, 2, denoiser.feature_dim)
        outcome = "read as a denoiser"
    path.unlink()
    return outcome


NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 10**5, 10**9, 1 << 31, 1 << 63, 0.5, 2.0, 1e308, math.inf, math.nan]
TYPES = ["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64"]
OTHERS = [None, True, "", "x", "[" * 100_000, "{", "null", "[]", [], {}, [0], {"a": 1}]
ODD = st.sampled_from([*NUMBERS, *TYPES, *OTHERS])


@st.composite
def rewritten(draw: Any, value: Any) -> Any:
    """A JSON value with one part replaced, left out or added."""
    if not isinstance(value, (dict, list)) or not value or not draw(st.integers(0, 7)):
        return draw(ODD)
    copy, keys = value.copy(), list(value) if isinstance(value, dict) else range(len(value))
    key, action = draw(st.sampled_from(keys)), draw(st.sampled_from(("within", "within", "within", "drop", "add")))
    if action == "within":
        copy[key] = draw(rewritten(copy[key]))
    elif action == "drop":
        del copy[key]
    elif isinstance(copy, dict):
        copy["more"] = copy[key]
    else:
        copy.append(copy[key])
    return copy


@st.composite
def _described(draw: Any, files: Files) -> tuple[str, bytes]:
    """A .safetensors file with another header: tensors elsewhere, of other types and shapes; other settings."""
    name = draw(st.sampled_from(sorted(files)))
    data = files[name]
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    about = {key: json.loads(text) for key, text in header.pop("__metadata__", {}).items()}
    for _ in range(draw(st.integers(1, 3))):
        if about and draw(st.integers(0, 3)):
            about = draw(rewritten(about))
        elif isinstance(header, dict):
            header = draw(rewritten(header))
        if not isinstance(about, dict):
            break
    if draw(st.booleans()):  # numbers like these pass wherever they are not looked for
        value = struct.pack("<f", draw(st.sampled_from([math.nan, math.inf, 1e38])))
        body = value + body[4:]
    told = (
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()} if isinstance(about, dict) else about
    )
    text = json.dumps({"__metadata__": told, **header} if isinstance(header, dict) else header)
    if draw(st.integers(0, 9)) == 0:  # a key twice
        text = text[:-1] + "," + text[1:]
    size = draw(st.sampled_from([len(text)] * 12 + list(EXTREMES)))
    return name, struct.pack("<Q", size % (1 << 64)) + text.encode() + body


class Evil:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@st.composite
def pickled(draw: Any, canary: Path) -> tuple[str, bytes]:
    """A .pth of torch.save's making, of contents that dvt does not expect, some of them calls."""
    calls = [Evil(os.system, f"touch {canary}"), Evil(eval, f"open({str(canary)!r}, 'w')"), Evil(Path.touch, canary)]
    calls += [Evil(exec, f"open({str(canary)!r}, 'w')"), Evil(open, str(canary), "w"), Evil(os.mkdir, str(canary))]
    calls += [
        Evil(subprocess.getoutput, f"touch {canary}"),
        Evil(torch.load, str(canary)),
        Evil(torch.FloatStorage, 1 << 40),
    ]
    calls += [Evil(torch.Tensor, 1 << 40), Evil(torch.jit.load, str(canary)), Evil(torch.tensor, 1)]
    tensors = [
        torch.ones(3, 2),
        torch.ones(1, 4, 8),
        torch.ones(1).expand(1 << 40),
        torch.ones(1).expand(1 << 20, 1 << 20),
    ]
    tensors += [torch.full((3,), math.nan), torch.ones(3, 2, dtype=torch.complex64), torch.ones(3, 2).to_sparse()]
    tensors += [torch.ones(3, 2, dtype=torch.int8), torch.tensor(1.0), torch.ones(0, 8)]
    tensors += [torch.ones(3, 2, device="meta")]
    leaves = st.sampled_from([*calls[: draw(st.integers(0, len(calls)))], *tensors, None, 1, "x", b"x", 1.5, {}, []])
    names: list[Any] = ["state_dict", "model", "denoiser", "pos_embed", "module.weight", "module.bias", "weight", ""]
    names += [3, ("a",), None]
    names += [f"denoiser.{i}{part}" for i in ("", "7.", "99999999.") for part in ("mlp.fc1.weight", "norm1.bias")]
    keys = st.sampled_from(names)
    content = draw(st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=12))
    if isinstance(content, dict) and draw(st.integers(0, 5)) == 0:
        content[draw(keys)] = content  # it holds itself
    form = draw(st.sampled_from(["zip", "zip", "old", "raw", "tar", "squeezed", "script"]))
    suffix = draw(st.sampled_from([".pth", ".pt", ".bin"]))
    return f"case{suffix}", PACKED[form](content)


def _squeezed(content: Any, more: str = "") -> bytes:
    """The zip again, compressed, as torch.save never writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(content))) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
        if more:
            new.writestr(f"{old.namelist()[0].split('/')[0]}/{more}", pickle.dumps(()))
    return file.getvalue()


def _tar(content: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in (("storages", pickle.dumps(content, 2)), ("tensors", pickle.dumps(0, 2))):
            archive.addfile(_member(name, data), io.BytesIO(data))
        data = pickle.dumps(content, 2)
        archive.addfile(_member("pickle", data), io.BytesIO(data))
    return file.getvalue()


def _member(name: str, data: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member


PACKED: dict[str, Callable[[Any], bytes]] = {
    "zip": saved,
    "old": lambda content: saved(content, new=False),
    "raw": lambda content: pickle.dumps(content, 2),
    "tar": _tar,
    "squeezed": _squeezed,
    "script": lambda content: _squeezed(content, "constants.pkl"),
}


# -- folders of runs -------------------------------------------------------------------------------------------------


def fuzz_runs(count: int, number: int, tmp: Path) -> dict[str, Any]:
    """Training that goes on from a damaged folder, and priors read from one."""
    trained(tmp / "training", steps=2)
    prior_run(tmp / "prior")
    files = {str(path.relative_to(tmp)): path.read_bytes() for path in sorted(tmp.rglob("*.*")) if path.is_file()}
    tensors = {name: data for name, data in files.items() if name.endswith(".safetensors")}
    ways = damaged(files) | described(tensors) | states({n: d for n, d in files.items() if n.endswith("state.json")})

    def check(tmp: Path, case: tuple[str, bytes]) -> str:
        kind = case[0].split("/")[0]
        remove(tmp / kind)
        for name, data in {**files, case[0]: case[1]}.items():
            if name.startswith(kind):
                (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp / name).write_bytes(data)
        with faults_only():
            RUNS[kind](tmp / kind)
            return f"{kind} read"
        return f"{kind} refused"

    return cases(count, ways, check, number, tmp)


@st.composite
def states(draw: Any, files: dict[str, bytes]) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(files)))
    return name, json.dumps(draw(rewritten(json.loads(files[name])))).encode()


def trained(folder: Path, steps: int = 3) -> None:
    """A run of three steps, ended after some; an equal call goes on."""
    from dvt.training import TrainingConfig, train

    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.zero_()

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (model(batch) - 1).square().mean()}

    config = TrainingConfig(steps=3, batch_size=2, learning_rate=0.1, ema=0.5, checkpoint_every=1, log_every=1, keep=1)
    done = train(
        model,
        loss,
        lambda step, rank, world: torch.ones(2, 3) + step,
        config,
        folder,
        on_checkpoint=lambda path: path.name == f"step-{steps:08}",
    )
    assert done.step == steps and all(value.isfinite().all() for value in model.parameters())
    assert [row["step"] for row in done.history][-1] == steps


def prior_run(folder: Path) -> None:
    from dvt.analysis.priors.config import PriorConfig
    from dvt.analysis.priors.prior import Prior

    prior = Prior(PriorConfig((2, 2), 12, 5, (2, 3), width=8, depth=1, heads=2), torch.Generator().manual_seed(0))
    target = {"kind": "pixels", "patch": 2, "vae": None, "mean": [0.5], "std": [0.2]}
    prior.card = {"backbone": "test_vit", "condition": "patch", "target": target}
    prior.save(folder / "prior.safetensors")
    kept = {"pictures": torch.rand(2, 3, 4, 4), "maps": torch.rand(2, 2, 2, 12), "conditions": torch.rand(2, 6, 5)}
    kept |= {"training_features": torch.rand(4, 5), "held_out_features": torch.rand(2, 5)}
    save_file(kept, folder / "held_out.safetensors", {"images": json.dumps(["a.png", "b.png"])})


def sampled(folder: Path) -> None:
    from dvt.analysis.priors.runs import Sampling, open_run, sample_prior

    run = open_run(folder, "cpu")
    assert all(value.isfinite().all() for value in (*run.prior.parameters(), *run.held.values()))
    if len(run.names) == 2:
        sample_prior(folder, folder / "s.png", images=1, samples=1, sampling=Sampling(steps=2), device="cpu")


RUNS: dict[str, Callable[[Path], None]] = {"training": trained, "prior": sampled}


# -- lists and names -------------------------------------------------------------------------------------------------

WORDS = [
    b"a.png",
    b"deep/b.jpg",
    b"deep",
    b"loop",
    b"..",
    b"../a.png",
    b"/dev/zero",
    b"pipe",
    b"list.txt",
    b"other.txt",
]
WORDS += [
    b"*",
    b"**",
    b"**/*",
    b"*.png",
    b"[",
    b"[]",
    b"[z-a]",
    b"[!a-",
    b"#",
    b"/",
    b"//",
    b".",
    b"~",
    b"$HOME",
    b"{a,b}",
]
WORDS += [b"**/" * 3, b"?" * 300, b"a*" * 30 + b"b", b"x" * 300, b"x/" * 3000, b"y" * 70_000, b"file:///dev/zero"]
WORDS += [
    b" ",
    b"\0",
    b"\n",
    b"\r\n",
    b"\r",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\x1b[2J",
    b"file:///etc/passwd",
]


def fuzz_lists(count: int, number: int, tmp: Path) -> dict[str, Any]:
    tree(tmp / "tree")
    lines = st.lists(st.sampled_from(WORDS) | st.binary(max_size=5), max_size=4).map(b"".join)
    ways = st.tuples(st.booleans(), st.lists(lines, max_size=5), st.sampled_from([b"\n", b"\r\n", b"\0", b""]))
    return cases(count, ways, check_list, number, tmp)


def tree(folder: Path) -> None:
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(image_files()["png"])
    (folder / "deep" / "b.jpg").write_bytes(image_files()["jpeg"])
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "deep" / "self.png").symlink_to(folder / "deep" / "self.png")
    os.mkfifo(folder / "pipe")
    (folder / "other.txt").write_text("a.png\n")


def check_list(tmp: Path, case: tuple[bool, list[bytes], bytes]) -> str:
    as_list, lines, ending = case
    folder = tmp / "tree"
    (folder / "list.txt").write_bytes(ending.join(lines))
    specs = [os.path.join(os.fsencode(folder), line) for line in lines if not line.startswith(b"/")]
    given = [str(folder / "list.txt")] if as_list else [os.fsdecode(spec) for spec in specs]
    with faults_only():
        found = find_images(given)
        assert found and len(set(map(os.path.realpath, found))) == len(found)
        for path in found[:20]:  # devices and pipes are refused, and nothing waits for them
            with suppress(ImageError):
                assert len(load_image(path)) == 3
        return "found"
    return "refused"


# -- the command line ------------------------------------------------------------------------------------------------


def fuzz_commands(count: int, number: int, tmp: Path) -> dict[str, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    tmp = tmp / "work"
    tree(tmp / "tree")
    good_shard(tmp / "store")
    (tmp / "bad").mkdir()
    (tmp / "bad" / "one.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (tmp / "bad" / "a.safetensors").write_bytes(b"\xff" * 40)
    (tmp / "bad" / "a.pth").write_bytes(pickle.dumps(Evil(os.system, f"touch {tmp}/canary")))
    model = dvt.load_backbone("test_vit", pretrained=False).model
    save_file(model.state_dict(), tmp / "good.safetensors")
    (tmp / "bad" / "a.png").write_bytes(image_files()["png"][:200])
    (tmp / "list.txt").write_bytes(b"tree\n\0\n")
    os.chdir(tmp)  # relative defaults, such as doctor's, would be written here
    return cases(count, COMMANDS, check_command, number, tmp)


OUT = "out"
GIVEN = [
    "store",
    "store/one.h5",
    "bad",
    "bad/one.h5",
    "bad/a.pth",
    "bad/a.safetensors",
    "bad/a.png",
    "good.safetensors",
]
GIVEN += ["tree", "tree/a.png", "tree/loop", "tree/*", "tree/pipe", "list.txt", "/dev/zero", "missing", ".", ".."]
GIVEN += ["", "[", "[/red]", "\udcff", "a\nb", "x" * 300, "x/" * 3000]
PATHS = st.sampled_from(GIVEN)
TO = ("--out", OUT)


def _command(*parts: Any) -> Any:
    """Arguments of which some are drawn."""
    return st.tuples(*(part if isinstance(part, st.SearchStrategy) else st.just(part) for part in parts))


COMPUTE = (st.sampled_from(["extract", "denoise"]), PATHS, *TO, "--backbone", "test_vit", "--weights")
WEIGHTS = st.sampled_from(["good.safetensors"] * 4 + ["bad/a.pth", "bad/a.safetensors", "", "/dev/zero", "tree"])
COMMANDS = st.one_of(
    _command("inspect", PATHS, st.sampled_from(["--verify", "--json"])),
    _command("store", "merge", PATHS, PATHS, *TO),
    _command("store", "export", PATHS, *TO, "--format", st.sampled_from(["npy", "zarr"])),
    _command(*COMPUTE, WEIGHTS, "--size", st.sampled_from(["32", "32", "0", "-1", "1e9"])),
    _command(*COMPUTE, WEIGHTS, "--dry-run"),
    _command("prior", "sample", PATHS, "--out", f"{OUT}/s.png"),
    _command("report", PATHS, "--out", f"{OUT}/r.html"),
    st.lists(PATHS | st.sampled_from(["--out", "inspect", "store", "--help", "-1"]), max_size=4).map(tuple),
)


def check_command(tmp: Path, arguments: tuple[str, ...]) -> str:
    from dvt.cli import main

    before, shown = snapshot(tmp, tmp / OUT), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with redirect_stdout(shown), redirect_stderr(shown):
        try:
            code = main(list(arguments))
        except SystemExit as end:  # tyro's: the arguments themselves
            code = end.code or 0
    assert code in (0, 2), shown.buffer.getvalue()
    assert snapshot(tmp, tmp / OUT) == before
    remove(tmp / OUT)
    return f"exit {code}"


# -- running ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[int, int, Path], dict[str, Any]]] = {
    "images": fuzz_images,
    "lists": fuzz_lists,
    "stores": fuzz_stores,
    "weights": fuzz_weights,
    "runs": fuzz_runs,
    "commands": fuzz_commands,
}

# Growth of the process beyond its libraries: an image takes at most 40 bytes a pixel, of 4 million pixels here; files
# of the other kinds hold some KB, but libraries come in while they are read.
MOST_GROWTH = 600 << 20


def work(counts: dict[str, int], number: int, folder: Path) -> None:
    """Runs some cases of each kind; a line of JSON each, with what went wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # no power fails here, and merging thousands of stores waits for it
    for kind, count in counts.items():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        (folder / kind).mkdir()
        line: dict[str, Any] = {"kind": kind}
        print("started", kind, file=sys.stderr, flush=True)  # a crash is told from its last line
        try:
            line["counts"] = KINDS[kind](count, number, folder / kind)
        except BaseException:  # also a group of failures; the other kinds go on
            line["failure"] = traceback.format_exc()[-6000:]
        line["growth"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - peak
        print(json.dumps(line), file=sys.__stdout__, flush=True)


def fuzzed(counts: dict[str, int], folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of a process of its own; one that crashed has a last line that says so."""
    number = int(os.environ.get("DVT_FUZZ_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"DVT_FUZZ_SEED={number}, files in {folder}")
    command = [sys.executable, __file__, json.dumps(counts), str(number), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
    lines = {line["kind"]: line for line in map(json.loads, done.stdout.splitlines())}
    if done.returncode:
        started = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("started ")]
        lines[started[-1]] = {"failure": f"the process ended with {done.returncode}\n{done.stderr[-6000:]}"}
    for line in lines.values():
        print(json.dumps(line)[:1000])
        line["seed"] = number
    return lines


def check_line(line: dict[str, Any], wanted: set[str]) -> None:
    assert "failure" not in line, f"DVT_FUZZ_SEED={line.get('seed')}\n{line['failure']}"
    assert line["growth"] < MOST_GROWTH
    assert wanted <= line["counts"].keys(), line["counts"]  # both ways were gone: the cases are worth something


OUTCOMES = {
    "images": {"read", "refused"},
    "lists": {"found", "refused"},
    "stores": {"own refused", "earliest refused", "made refused", "made read"},
    "weights": {"safetensors refused", "safetensors read as a denoiser", "pth refused"},
    "runs": {"training read", "training refused", "prior refused"},
    "commands": {"exit 2"},
}
FEW = {"images": 250, "lists": 60, "stores": 200, "weights": 250, "runs": 60, "commands": 16}
MANY = {"images": 4000, "lists": 2000, "stores": 4000, "weights": 4000, "runs": 2000, "commands": 150}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return fuzzed(FEW, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_some_hostile_files_of_each_kind(few: dict[str, dict[str, Any]], kind: str, attacks: Counter[str]) -> None:
    check_line(few[kind], OUTCOMES[kind])
    attacks[kind] += sum(few[kind]["counts"].values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_hostile_files(tmp_path: Path, kind: str, attacks: Counter[str]) -> None:
    line = fuzzed({kind: MANY[kind]}, tmp_path)[kind]
    check_line(line, OUTCOMES[kind])
    attacks[kind] += sum(line["counts"].values())


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
