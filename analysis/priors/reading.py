"""Read the tokens and pictures of images: compute them once and keep them in a folder, or take a feature store's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.priors.stored import store_rows
from dvt.analysis.priors.token_set import (
    BATCH,
    CONDITIONS,
    Clean,
    Condition,
    Rows,
    TokenSet,
    read_conditions,
    square,
    token_identity,
)
from dvt.backbones import Backbone
from dvt.errors import ConfigError, ImageError, NonFiniteError, StoreError
from dvt.files import check_regular, open_lock, replaced_folder, take_lock
from dvt.images import ImageLike, file_sha256, load_image, none_usable, read_image
from dvt.progress import Progress
from dvt.schema import checked, read_json, typed
from dvt.store import FeatureStore
from dvt.text import differing
from dvt.views import resize

log = logging.getLogger(__name__)

_ARRAYS = {"conditions": 3, "patches": 4, "pictures": 4}  # with their axes
_MOST_BYTES = 1 << 30  # of the names of all images
_KeptAbout = TypedDict(
    "_KeptAbout",
    {
        "from": dict[str, Any],
        "names": list[str],
        "sha256s": list[str],
        "grid": tuple[int, int] | None,
        "mirrored": int,
        "skipped": list[str],
    },
)


@dataclass(frozen=True)
class Wanted:
    """Say what to read from each image.

    Args:
        condition: which tokens condition the prior; None for no condition.
        features: also keep the patch tokens, as a target.
        side: side of the pictures in pixels.
        flips: also read each image mirrored.
    """

    condition: Condition | None
    features: bool
    side: int
    flips: bool = False


@torch.no_grad()
def read_tokens(
    given: Sequence[ImageLike],
    backbone: Backbone | None,
    wanted: Wanted,
    denoiser: Clean | None,
    progress: Progress,
    folder: Path | None = None,
) -> TokenSet:
    """Run the middle square of each image through the backbone and keep the values as float16.

    An image that cannot be read is left out, with a warning.

    Args:
        given: paths of the images, or pixels.
        backbone: gets the images at its own input size; None if no tokens are wanted.
        wanted: what to keep of each image.
        denoiser: applied to the tokens, if given.
        progress: called with ("look", images done, images).
        folder: keeps the values in files, which are read when needed; None keeps them in memory.

    Raises:
        NonFiniteError: a token is NaN or infinite.
        ImageError: no image can be read.
    """
    kept = _Kept(folder, 2 * len(given) if wanted.flips else len(given))
    names: list[str] = []
    sha256s: list[str] = []
    skipped: list[str] = []
    grid = None
    for mirror in (False, True) if wanted.flips else (False,):
        for start in range(0, len(given), BATCH):
            images = []
            for number, each in enumerate(given[start : start + BATCH], start + 1):
                try:
                    image = square(read_image(each))
                    name, sha256 = _identity(each, number)
                except ImageError as error:
                    if not mirror:
                        log.warning("left out: %s", error)
                        skipped.append(str(error))
                    continue
                images.append(image.flip(2) if mirror else image)
                names.append(name)
                sha256s.append(sha256)
            if images:
                grid = _look(images, backbone, wanted, denoiser, kept) or grid
            progress("look", min(start + BATCH, len(given)), len(given))
    if not names:
        raise none_usable(len(given), skipped[-1])
    mirrored = len(names) // 2 if wanted.flips else 0
    arrays = kept.done(len(names))
    return TokenSet(
        arrays.get("conditions"),
        arrays.get("patches"),
        arrays["pictures"],
        tuple(names),
        tuple(sha256s),
        grid,
        mirrored,
        tuple(skipped),
    )


def _identity(image: ImageLike, number: int) -> tuple[str, str]:
    """Return the name of an image and the hash of its file; of pixels their number and their own hash."""
    if isinstance(image, (str, Path)):
        return str(image), file_sha256(image)
    return f"image {number}", hashlib.sha256(read_image(image).contiguous().cpu().numpy().tobytes()).hexdigest()


def _look(
    images: list[Tensor], backbone: Backbone | None, wanted: Wanted, denoiser: Clean | None, kept: _Kept
) -> grids.Size | None:
    """Keep what is wanted of one batch; return its grid of patches, or None if no tokens were computed."""
    kept.add("pictures", torch.stack([resize(image, (wanted.side, wanted.side)) for image in images]))
    if backbone is None or (wanted.condition is None and not wanted.features):
        return None
    tokens = backbone(torch.stack([resize(image, backbone.image_size) for image in images]).to(backbone.mean))
    tokens = tokens if denoiser is None else denoiser(tokens)
    if not bool(tokens.patches.isfinite().all() and tokens.prefix.isfinite().all()):
        raise NonFiniteError(f"{backbone.name} gave tokens with NaN or infinity; check its weights and precision")
    if wanted.condition is not None:
        kept.add("conditions", read_conditions(tokens, wanted.condition))
    if wanted.features:
        kept.add("patches", tokens.patches)
    return tokens.grid


class _Kept:
    """Collect arrays batch by batch, in memory or in files of a folder."""

    def __init__(self, folder: Path | None, most: int) -> None:
        self.folder, self.most = folder, most
        self.parts: dict[str, list[Tensor]] = {}
        self.files: dict[str, Any] = {}
        self.filled: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        half = values.float().clamp(-65504, 65504).half().cpu()
        if self.folder is None:
            self.parts.setdefault(name, []).append(half)
            return
        if name not in self.files:
            path, shape = self.folder / f"{name}.npy", (self.most, *half.shape[1:])
            self.files[name] = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            with open(path, "r+b") as file:  # all of it now: a disk that fills under a map ends the process
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            self.filled[name] = 0
        start = self.filled[name]
        self.files[name][start : start + len(half)] = half.numpy()
        self.filled[name] += len(half)

    def done(self, count: int) -> dict[str, Rows]:
        if self.folder is None:
            return {name: torch.cat(parts) for name, parts in self.parts.items()}
        for file in self.files.values():
            file.flush()
        return {name: MappedRows(self.folder / f"{name}.npy", count, _ARRAYS[name]) for name in self.files}


class MappedRows:
    """Read rows of an array from its file when they are indexed.

    Args:
        path: a .npy file.
        count: how many of its rows are used.
        axes: how many it has.

    Raises:
        ConfigError: the file is missing, damaged, or has fewer rows.
    """

    def __init__(self, path: Path, count: int, axes: int) -> None:
        try:
            check_regular(path)
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
            if self.array.ndim != axes or len(self.array) < count or self.array.dtype != np.float16:
                raise ValueError(f"it holds {self.array.shape} {self.array.dtype}")
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise ConfigError(
                f"cannot read {str(path)!r}: {error}; delete the folder {str(path.parent)!r} and run again"
            ) from error
        self.shape = (count, *self.array.shape[1:])

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.array[: len(self)][rows]))


# --- kept in a folder, so that no image is read twice


def kept_tokens(
    folder: Path,
    paths: Sequence[Path],
    backbone: Backbone | None,
    wanted: Wanted,
    denoiser: Clean | None,
    progress: Progress,
) -> TokenSet:
    """Open the tokens that a folder keeps, or read them as :func:`read_tokens` does and keep them there.

    When several processes call this at once, one reads and the others wait for it.

    Raises:
        ConfigError: the folder keeps tokens of something else, or an image is not given by its path.
    """
    if pixels := [each for each in paths if not isinstance(each, (str, Path))]:
        raise ConfigError(
            f"a folder keeps the tokens of images by their paths, and one was given as {type(pixels[0]).__name__}; "
            "save the images to files and give their paths"
        )
    about = {**token_identity(backbone, denoiser), "wanted": vars(wanted), "images": [str(path) for path in paths]}
    with _lock(folder):
        if (folder / "about.json").exists():
            return opened_tokens(folder, about)
        with replaced_folder(folder) as part:
            seen = read_tokens(paths, backbone, wanted, denoiser, progress, part)
            _describe(part, seen, about)
    return opened_tokens(folder)


def _describe(folder: Path, seen: TokenSet, about: dict[str, Any]) -> None:
    plain = {name: getattr(seen, name) for name in ("names", "sha256s", "grid", "mirrored", "skipped")}
    (folder / "about.json").write_text(json.dumps({"from": about, **plain}, default=str))


def opened_tokens(folder: Path, about: dict[str, Any] | None = None) -> TokenSet:
    """Open the tokens that a folder keeps.

    Args:
        folder: written by :func:`kept_tokens` or :func:`kept_store`.
        about: the backbone, settings and images that they must come from; None accepts any.

    Raises:
        ConfigError: the folder has none, they are damaged, or they come from something else.
    """
    if not folder.exists():  # comparisons and loops train priors, too, and keep their tokens elsewhere
        raise ConfigError(
            f"{str(folder.parent)!r} keeps no tokens; give a folder that `dvt prior train` wrote (its --out)"
        )
    try:
        found = typed(_KeptAbout, read_json(folder / "about.json", _MOST_BYTES))
        source, names, wanted = found["from"], found["names"], typed(Wanted, found["from"].get("wanted"))
        if len(found["sha256s"]) != len(names) or not 0 <= found["mirrored"] < len(names):
            raise ConfigError("its lists do not go together")
    except (OSError, ConfigError) as error:
        raise ConfigError(
            f"{str(folder)!r} keeps no readable tokens of a run ({error}); delete it and train again"
        ) from error
    if about is not None:
        _check_source(folder, source, json.loads(json.dumps(about, default=str)))
    files = {name: folder / f"{name}.npy" for name in _ARRAYS}
    there = [name for name, path in files.items() if name == "pictures" or path.exists()]
    arrays: dict[str, Rows] = {name: MappedRows(files[name], len(names), _ARRAYS[name]) for name in there}
    if "store" in source:
        store = FeatureStore(checked(source["store"], str, "the store"), checked(source.get("term"), str, "its term"))
        arrays |= store_rows(store, wanted.condition, wanted.features, names)
    given = (arrays.get("conditions"), arrays.get("patches"), arrays["pictures"])
    return TokenSet(
        *given, tuple(names), tuple(found["sha256s"]), found["grid"], found["mirrored"], tuple(found["skipped"])
    )


def _check_source(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if changed := differing(there, here):
        raise ConfigError(
            f"{str(folder.parent)!r} holds a run with other settings: {changed}. Continue it with its own (--resume), "
            "begin anew in its place (--overwrite), or choose another folder"
        )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time read tokens into a folder.

    The lock comes before the look for about.json: a process that waited then finds the finished folder and opens it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fd = open_lock(folder.with_name(f"{folder.name}.lock"))
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder.parent)!r}: {error.strerror or error}") from error
    try:
        take_lock(fd, wait=True)
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot keep the tokens in {str(folder)!r}: {error.strerror or error}; make room, and run again"
        ) from error
    finally:
        os.close(fd)


# --- feature stores


def kept_store(folder: Path, path: str | Path, term: str, wanted: Wanted, progress: Progress) -> TokenSet:
    """Use the tokens of a feature store where they are, and keep the images' pictures in a folder.

    Args:
        folder: keeps the pictures.
        path: path of the store; the image files that it names must still be there.
        term: which of the store's terms to use.
        wanted: what to read of each image; a store has no flips.
        progress: called with ("look", images done, images).

    Raises:
        StoreError: there is no store, it lacks the term, or its grids differ in their shorter side.
        ConfigError: the folder keeps something else, or flips are wanted.
        ImageError: no picture can be read.
    """
    store = FeatureStore(path, term)
    if wanted.flips:
        raise ConfigError("a store holds no mirrored images: leave --flips out, or give the images")
    if wanted.condition is not None and wanted.condition not in CONDITIONS:
        raise ConfigError(f"there is no condition {wanted.condition!r}; it is one of {', '.join(CONDITIONS)}")
    if not len(store):
        raise StoreError(f"{str(path)!r} holds no image")
    sides = sorted({min(grid) for grid in store.grids})
    if len(sides) > 1:
        raise StoreError(
            f"{str(path)!r} has grids with shorter sides of {sides}; a prior needs one: extract at one size"
        )
    about = {"store": str(path), "job": store.job.digest, "term": term, "wanted": vars(wanted), "images": store.images}
    with _lock(folder):
        if (folder / "about.json").exists():
            return opened_tokens(folder, about)
        with replaced_folder(folder) as part:
            _describe(part, _pictures(store, wanted.side, part, progress), about)
    return opened_tokens(folder)


def _pictures(store: FeatureStore, side: int, folder: Path, progress: Progress) -> TokenSet:
    """Keep the part of each picture that lies under the middle square of its tokens."""
    kept, names, sha256s, skipped = _Kept(folder, len(store)), [], [], []
    for row, (name, sha256, grid) in enumerate(zip(store.images, store.sha256s, store.grids, strict=True)):
        try:
            image = load_image(name, sha256)
        except ImageError as error:
            log.warning("left out: %s", error)
            skipped.append(str(error))
            continue
        top, left, bottom, right = grids.cells_to_pixels(
            grids.middle_square(grid), grid, (image.shape[1], image.shape[2])
        )
        kept.add("pictures", resize(image[:, top:bottom, left:right], (side, side))[None])
        names.append(name)
        sha256s.append(sha256)
        progress("look", row + 1, len(store))
    if not names:
        raise none_usable(len(store), skipped[-1])
    cells = min(store.grids[0])
    pictures = kept.done(len(names))["pictures"]
    return TokenSet(None, None, pictures, tuple(names), tuple(sha256s), (cells, cells), 0, tuple(skipped))
