"""Merge feature stores, and export them to the formats of other tools."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from dvt.errors import ConfigError, StoreError
from dvt.files import MOST_BYTES, open_lock, remove, replaced, take_lock
from dvt.progress import Progress
from dvt.schema import parsed_json, read_json
from dvt.store.format import CHUNK_BYTES
from dvt.store.job import ImageEntry, Job, plan
from dvt.store.reader import FeatureStore
from dvt.store.writer import StoreWriter
from dvt.text import differing

INDEX = "index.json"


# -- merging ----------------------------------------------------------------------------------------------------------


def merge_stores(
    stores: Sequence[str | Path], out: str | Path, *, wait: bool = True, progress: Progress | None = None
) -> dict[str, int]:
    """Merge stores that the same job made, for example on several machines, into one.

    Shards are copied with their shared artifacts. If several stores hold an image under one path, the first store's
    tokens are taken. Repeating the call continues an interrupted merge.

    Args:
        stores: folders or shards.
        out: the new store's folder; it may be one of `stores`, or hold some of the images already.
        wait: wait for another writer of `out`, instead of raising.
        progress: called with (what, done, total) after every shard.

    Returns:
        The numbers of images and shards written, and of images that were already there.

    Raises:
        ConfigError: there is nothing to merge.
        StoreError: the stores come from different jobs (the message says what differs), one is damaged, or `out`
            cannot be written.
    """
    if not stores:
        raise ConfigError("no store was given; give the folders of the stores to merge")
    job = _common_job(stores)
    files = [file for store in stores for file in _shards_of(Path(store))]
    counts = {"images": 0, "shards": 0, "present": 0}
    with StoreWriter(out, job, wait=wait) as writer:
        present = set(writer.images)
        for number, file in enumerate(files):
            written, known = _copy(file, writer, present)
            counts["images"] += written
            counts["shards"] += bool(written)
            counts["present"] += known
            if progress:
                progress("merge", number + 1, len(files))
    return counts


def _common_job(stores: Sequence[str | Path]) -> Job:
    first = FeatureStore(stores[0]).job
    for store in stores[1:]:
        if differences := first.differences(FeatureStore(store).job, "the first has"):
            raise StoreError(
                f"{str(stores[0])!r} and {str(store)!r} come from different jobs (the second has {differences}); only "
                "stores of one job can be merged"
            )
    return first


def _shards_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.h5")) if path.is_dir() else [path]


def _copy(file: Path, writer: StoreWriter, present: set[tuple[str, str]]) -> tuple[int, int]:
    """Write the images of a shard that are not in `present`, and add them; return how many were written and known."""
    shard = FeatureStore(file)
    listed = [ImageEntry(*each) for each in zip(shard.images, shard.sha256s, shard.grids, strict=True)]
    new = [i for i, (path, sha256, _) in enumerate(listed) if (path, sha256) not in present]
    if new:
        # One new shard per shard, named by its content, so that a repeated merge writes the same names.
        name = plan([listed[i] for i in new], len(new), writer.job)[0].name
        records = [shard.record(i) for i in new]
        writer.write(name, records, shard.artifact(new[0]), dtype=shard.summary()["dtypes"][0])
        present.update((record.path, record.sha256) for record in records)
    return len(new), len(listed) - len(new)


# -- exporting --------------------------------------------------------------------------------------------------------


def export_store(
    store: str | Path,
    out: str | Path,
    form: Literal["npy", "zarr", "safetensors"] = "npy",
    terms: Sequence[str] = (),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a store in a format that can be read without dvt.

    - "npy": a folder with TERM/NUMBER.npy, (h, w, C) of each image, prefix/NUMBER.npy, (P, C), and index.json: the job
      and, for each image in order, its path, sha256, size and grid.
    - "zarr": one group with the arrays of a shard: tokens/TERM (T, C), tokens/prefix (N, P, C), index/path,
      index/sha256, index/size, index/grid and index/offset; the rows of image i are offset[i]:offset[i + 1].

    - "safetensors": a folder with files of about 256 MB, whose tensors are TERM/NUMBER, (h, w, C), and prefix/NUMBER,
      (P, C), and the same index.json, which names the file of each image.

    Values keep their type, float16 or float32. The checksum of every token is checked.

    Args:
        store: a folder or a shard.
        out: a new folder, or the folder of an interrupted export.
        form: "npy", "zarr" or "safetensors".
        terms: which terms; all by default.
        overwrite: remove what an earlier export wrote to `out`, and nothing else, first.
        progress: called with (what, done, total) after every image.

    Returns:
        The number of images.

    Raises:
        ConfigError: the form is unknown, or is "zarr" and zarr is not installed.
        StoreError: `store` is not a store, lacks a term or is damaged, or `out` holds other files or cannot be written.
    """
    writers: dict[str, Callable[..., None]] = {
        "npy": _export_npy,
        "zarr": _export_zarr,
        "safetensors": _export_safetensors,
    }
    if form not in writers:
        raise ConfigError(f"a store is exported as {' or '.join(writers)}, got {form!r}")
    zarr = [_import_zarr()] if form == "zarr" else []
    source, out = FeatureStore(store), Path(out)
    if unknown := [term for term in terms if term not in source.terms]:
        raise StoreError(f"{str(store)!r} holds the terms {', '.join(source.terms)}, not {', '.join(unknown)}")
    try:
        wanted = {**asdict(source.job), "format": form, "terms": terms or source.terms}
        with _started(out, wanted, overwrite) as marker:
            writers[form](source, out, terms or source.terms, progress or (lambda what, done, total: None), *zarr)
            marker.unlink()
    except OSError as error:
        raise StoreError(f"cannot write to {str(out)!r}: {error.strerror or error}") from error
    return len(source)


_UNFINISHED = "unfinished-export"
_TENSOR_FILE_BYTES = 256 << 20  # tensors are held in memory until their file is written


@contextmanager
def _started(out: Path, wanted: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Make the folder and a marker file in it, which shows until the end that the export is unfinished, and which.

    One process at a time can lock the marker. After locking it, check that it is still the folder's: a process that
    finished meanwhile removed it, and the lock on a removed file excludes nobody.
    """
    marker = out / _UNFINISHED
    if not _may_export(out, marker) and not (overwrite and _own(out)):
        done = "holds an export that is done: begin anew in its place (--overwrite), or"
        raise StoreError(f"{str(out)!r} {done if _own(out) else 'exists and is no export:'} choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    fd = open_lock(marker)
    try:
        mine = take_lock(fd)
        if not mine or not marker.exists() or not os.path.samestat(os.fstat(fd), marker.stat()):
            raise StoreError(f"another process exports to {str(out)!r}; wait for it, or choose another folder")
        if linked := next((path for path in out.rglob("*") if _linked(path)), None):
            raise StoreError(f"{str(linked)!r} is a link, which an export never makes; choose a new folder")
        if overwrite:
            _remove_export(out)
        elif changed := _changed(fd, wanted):
            raise StoreError(
                f"{str(out)!r} holds an unfinished export with other settings: {changed}. Finish it with its own "
                "(--resume), begin anew in its place (--overwrite), or choose a new folder"
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(wanted).encode(), 0)
        yield marker
    finally:
        os.close(fd)


def _may_export(out: Path, marker: Path) -> bool:
    """Tell whether a place is free for an export, or holds an unfinished one."""
    return not os.path.lexists(out) or (out.is_dir() and (os.path.lexists(marker) or not any(out.iterdir())))


def _changed(marker: int, wanted: dict[str, Any]) -> str:
    """Say in what an unfinished export differs; one that a killed process had only begun is of any settings."""
    try:
        kept = parsed_json(os.pread(marker, MOST_BYTES, 0))
    except ConfigError:
        return ""
    return differing(kept, json.loads(json.dumps(wanted))) if isinstance(kept, dict) else ""


def _own(out: Path) -> bool:
    """Tell whether a folder holds an export, whole or not."""
    if (out / _UNFINISHED).exists():
        return True
    try:
        kept = read_json(out / INDEX) if (out / INDEX).exists() else read_json(out / "zarr.json")
    except (OSError, ConfigError):
        return False
    kept = kept.get("attributes", kept) if isinstance(kept, dict) else {}
    return {"terms", "images"} <= kept.keys() or str(kept.get("schema", "")).startswith("dvt-features/")


def _remove_export(out: Path) -> None:
    """Remove what exports of any format write; other files stay."""
    zarr = [out / name for name in ("zarr.json", "tokens", "index")] if (out / "zarr.json").exists() else []
    files = [*out.glob("[0-9]" * 5 + ".safetensors"), *out.glob("*/" + "[0-9]" * 8 + ".npy")]
    for each in (*files, *zarr, out / INDEX, out / "config.json"):
        remove(each)
    for folder in {each.parent for each in files} - {out}:
        if not any(folder.iterdir()):
            folder.rmdir()


def _linked(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1)


def _export_npy(store: FeatureStore, out: Path, terms: Sequence[str], progress: Progress) -> None:
    prefixed = bool(store.summary()["prefix_tokens"])
    for name in (*terms, *["prefix"] * prefixed):
        (out / name).mkdir(exist_ok=True)
    images = []
    for i, entry in enumerate(_entries(store)):
        file = f"{i:08d}.npy"  # not the image's own name, which could lead out of the folder
        for term in terms:
            np.save(out / term / file, store.read(i, term))
        if prefixed:
            np.save(out / "prefix" / file, np.asarray(store.prefix(i)))
        images.append({"file": file, **entry})
        progress("export", i + 1, len(store))
    _write_index(out, store, terms, images)


def _write_index(out: Path, store: FeatureStore, terms: Sequence[str], images: list[dict[str, Any]]) -> None:
    with replaced(out / INDEX) as part:
        part.write_text(json.dumps({"job": asdict(store.job), "terms": list(terms), "images": images}, indent=1))


def _export_safetensors(store: FeatureStore, out: Path, terms: Sequence[str], progress: Progress) -> None:
    images: list[dict[str, Any]] = []
    held: dict[str, np.ndarray] = {}
    files = 0
    for i, entry in enumerate(_entries(store)):
        held |= {f"{term}/{i:08d}": store.read(i, term) for term in terms}
        prefix = store.prefix(i)
        if prefix is not None:
            held[f"prefix/{i:08d}"] = prefix
        images.append({"file": f"{files:05d}.safetensors", "tensor": f"{i:08d}", **entry})
        if sum(values.nbytes for values in held.values()) >= _TENSOR_FILE_BYTES or i + 1 == len(store):
            with replaced(out / images[-1]["file"]) as part:
                save_file(held, part)
            held, files = {}, files + 1
        progress("export", i + 1, len(store))
    _write_index(out, store, terms, images)


def _entries(store: FeatureStore) -> Iterator[dict[str, Any]]:
    for path, sha256, size, grid in zip(store.images, store.sha256s, store.sizes, store.grids, strict=True):
        yield {"path": path, "sha256": sha256, "size": size, "grid": grid}


def _import_zarr() -> ModuleType:
    try:
        import zarr
    except ImportError as error:
        raise ConfigError("zarr is not installed; `pip install 'zarr>=3.1'`, or export to npy") from error
    if int(zarr.__version__.split(".")[0]) < 3:
        raise ConfigError(f"zarr {zarr.__version__} is too old; `pip install 'zarr>=3.1'`, or export to npy")
    return zarr


def _export_zarr(store: FeatureStore, out: Path, terms: Sequence[str], progress: Progress, zarr: ModuleType) -> None:
    grids, summary = np.array(store.grids, dtype=np.int64), store.summary()
    rows = grids.prod(1)
    offset = np.concatenate(([0], np.cumsum(rows)))
    kind, channels, prefix = max(summary["dtypes"]), summary["channels"], summary["prefix_tokens"]
    root = zarr.open_group(str(out), mode="a")
    root.attrs.update({**store.job.attributes(), "terms": list(terms)})
    shapes: dict[str, tuple[int, ...]] = {f"tokens/{term}": (int(offset[-1]), channels) for term in terms}
    if prefix:
        shapes["tokens/prefix"] = (len(store), prefix, channels)
    tokens = {}
    for name, shape in shapes.items():
        most = max(1, CHUNK_BYTES // (np.dtype(kind).itemsize * int(np.prod(shape[1:]))))
        # Chunks of whole images if they fit, so that writing images one by one rewrites few chunks.
        chunks = (min(shape[0], int(rows.max()) if len(shape) == 2 else most, most), *shape[1:])
        tokens[name] = root.create_array(name, shape=shape, dtype=kind, chunks=chunks, overwrite=True)
    for i in range(len(store)):
        for term in terms:
            tokens[f"tokens/{term}"][offset[i] : offset[i + 1]] = store.read(i, term).reshape(-1, channels)
        if prefix:
            tokens["tokens/prefix"][i] = store.prefix(i)
        progress("export", i + 1, len(store))
    _zarr_index(root, store, offset)


def _zarr_index(root: Any, store: FeatureStore, offset: np.ndarray) -> None:
    # File names are bytes on Linux; those that are not text are written with escapes.
    paths = [os.fsencode(path).decode(errors="backslashreplace") for path in store.images]
    numbers = {"size": store.sizes, "grid": store.grids, "offset": offset}
    for name, values in numbers.items():
        root.create_array(f"index/{name}", data=np.array(values, dtype=np.int64), overwrite=True)
    for name, text in {"path": paths, "sha256": store.sha256s}.items():
        array = root.create_array(f"index/{name}", shape=(len(text),), dtype=str, overwrite=True)
        array[:] = np.array(text, dtype=object)
