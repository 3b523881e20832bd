"""Read a store: a torch Dataset of tokens, safe in threads and DataLoader workers."""

from __future__ import annotations

import difflib
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dvt.errors import StoreError
from dvt.files import similar
from dvt.grids import Size
from dvt.showing import page_part, pca_colours, picture
from dvt.store.batches import GridBatches, Ragged, StoredTokens, collate_labels, collate_tokens
from dvt.store.chunks import ChunkReader, Request, empty_batch
from dvt.store.format import Record, ordered_terms
from dvt.store.index import StoredShard, damaged_shards, opened, read_shard, shard_files
from dvt.store.job import SCHEMA, Job
from dvt.text import counted

if TYPE_CHECKING:
    from PIL.Image import Image

_GRIDS = 3  # grids listed in a line

#: Labels of images, by path, file name or SHA-256; or a function of the path that is called when an image is read.
Labels: TypeAlias = Mapping[str, Any] | Callable[[str], Any]


class FeatureStore(Dataset[StoredTokens]):
    """Read a store; a torch Dataset whose items are :class:`StoredTokens`, safe in DataLoader workers and threads.

    Images are sorted by path, whatever shard they are in. ``store[i]`` is a batch of one image;
    ``store[2:5]`` and ``store[[7, 3]]`` are batches of several, and ``store["photos/a.jpg"]`` finds an image by its
    path or the end of it. ``DataLoader(store, batch_size=8)`` and :meth:`loader` give batches. If a batch has maps of
    several grids, smaller ones are filled up with zeros and ``mask`` marks the patches; by default :meth:`loader`
    groups images by grid instead.

    Args:
        path: a folder of shards, or one shard.
        term: which of :attr:`terms` to read; if several are given, `patches` is the first and `terms` has all.
        prefix: read the prefix tokens, too.
        dtype: the dtype of the tokens read; None keeps float16 or float32 as stored.
        labels: labels to give out with the tokens, by path, file name or SHA-256, or a function of the path.

    Raises:
        StoreError: the path is not a store, has another schema or shards of several jobs, lacks the term, has images
            without labels, or is damaged. Each read checks the checksums of the tokens.
    """

    def __init__(
        self,
        path: str | Path,
        term: str | Sequence[str] = "raw",
        *,
        prefix: bool = True,
        dtype: torch.dtype | None = torch.float32,
        labels: Labels | None = None,
    ) -> None:
        self.path, self.dtype = Path(path), dtype
        self.chosen = (term,) if isinstance(term, str) else tuple(term)
        if not (files := shard_files(self.path)):
            there = "it is not a shard, nor a folder with *.h5 shards, as `dvt denoise` makes of photographs"
            reason = there if self.path.exists() else f"there is no such folder{similar(self.path)}"
            raise StoreError(f"{str(path)!r} is not a feature store: {reason}")
        self._shards = [read_shard(file) for file in files]
        first = self._shards[0]
        for shard in self._shards:
            if shard.job.digest != first.job.digest:
                raise StoreError(
                    f"{first.file.name} and {shard.file.name} in {str(path)!r} come from different jobs "
                    f"({first.job.differences(shard.job, 'another has')}); a store holds one job"
                )
            if (shard.channels, shard.prefix) != (first.channels, first.prefix):
                raise StoreError(
                    f"{first.file.name} and {shard.file.name} in {str(path)!r} differ in channels or prefix"
                )
        #: Terms that every shard holds.
        self.terms = ordered_terms(set.intersection(*(set(shard.terms) for shard in self._shards)))
        for each in self.chosen or ("",):
            self._check_term(each)
        self.term = self.chosen[0]
        paths = np.concatenate([shard.path for shard in self._shards])
        order = np.lexsort((np.concatenate([shard.sha256 for shard in self._shards]), paths))
        counts = [len(shard.path) for shard in self._shards]
        rows = np.concatenate([np.arange(count) for count in counts])
        where = np.stack((np.repeat(np.arange(len(counts)), counts), rows), axis=1)[order]
        self._where: list[tuple[int, int]] = [(shard, row) for shard, row in where.tolist()]
        self._prefix = self._shards[0].prefix if prefix else 0
        grids = np.concatenate([shard.grid for shard in self._shards])[order]
        self._grids: list[Size] = [(h, w) for h, w in grids.tolist()]
        self._numbers = torch.arange(len(self._grids))
        self._chunks = ChunkReader()
        self._named: dict[tuple[str, ...], list[int]] | None = None
        self._labels = self._joined(labels)

    def __repr__(self) -> str:
        known = Counter(self._grids).most_common()
        grids = ", ".join(f"{h} x {w} ({count})" for (h, w), count in known[:_GRIDS]) + ", ..." * (len(known) > _GRIDS)
        return (
            f"FeatureStore({str(self.path)!r}: {counted(len(self), 'image')} of {self.job.backbone}, layer "
            f"{self.job.layer}; grids {grids}; {self._shards[0].channels} channels; terms {', '.join(self.terms)}; "
            f"reads {', '.join(self.chosen)})"
        )

    def show(self, count: int = 6) -> Image:
        """Draw the maps of images, evenly spaced, in PCA colours, the same in all; a notebook shows the picture."""
        return picture(self._panels(count))

    def _repr_html_(self) -> str:
        facts = self.summary()
        names = ("images", "grids", "channels", "prefix_tokens", "terms", "dtypes", "shards", "bytes")
        shown = {name.replace("_", " "): facts[name] for name in names}
        shown = {"backbone": f"{self.job.backbone}, layer {self.job.layer}", **shown}
        return page_part(f"FeatureStore({str(self.path)!r})", shown, lambda: self._panels(4))

    def _panels(self, count: int) -> dict[str, Tensor]:
        count = min(max(1, count), len(self))
        numbers = [k * len(self) // count for k in range(count)]
        colours = pca_colours([self[i].patches[0].float() for i in numbers])
        return {f"{i}: {PurePath(self._origin(i)[0]).name}": each for i, each in zip(numbers, colours, strict=True)}

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
        return list(self._grids)

    @property
    def sizes(self) -> list[Size]:
        """The size (H, W) of each image in pixels."""
        return [(int(shard.size[row, 0]), int(shard.size[row, 1])) for shard, row in self._rows()]

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index: int | slice | str | Path | Sequence[int] | np.ndarray | Tensor) -> StoredTokens:
        """Read patches (B, h, w, C), prefix (B, P, C) and origin of one image (B = 1), or of several."""
        if isinstance(index, (str, os.PathLike)):
            index = self.index_of(index)
        if isinstance(index, slice):
            return self._batch(range(*index.indices(len(self))))
        if hasattr(index, "__index__") and getattr(index, "ndim", 0) == 0:
            return self._batch([operator.index(index)])
        return self._batch(_numbers(index, len(self)))

    def __getitems__(self, indices: Sequence[int]) -> StoredTokens | list[StoredTokens]:
        """Read images for a DataLoader: as one batch if all have one grid, otherwise one by one."""
        one = len({self._grids[i] for i in indices}) == 1
        return self._batch(indices) if one else [self._batch([i]) for i in indices]

    def __iter__(self) -> Iterator[StoredTokens]:
        return (self[i] for i in range(len(self)))

    def loader(
        self,
        batch_size: int = 32,
        *,
        shuffle: bool = False,
        ragged: Ragged = "group",
        drop_last: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> DataLoader[StoredTokens]:
        """Make a DataLoader of batches, by default of one grid each.

        Args:
            batch_size: images per batch; the last batch of each grid may be smaller.
            shuffle: permute images and batches, anew in each epoch.
            ragged: "group" puts images of one grid into a batch; "pad" images of any grid, with smaller maps filled up
                with zeros and a `mask`.
            drop_last: leave out batches that are smaller.
            seed: seed of the permutations.
            options: further options of torch's DataLoader, such as num_workers and pin_memory.
        """
        batches = GridBatches(self.grids, batch_size, shuffle, ragged, drop_last, seed)
        options.setdefault("collate_fn", collate_tokens)
        return DataLoader(self, batch_sampler=batches, **options)

    def index_of(self, path: str | Path) -> int:
        """Find an image by its path, or by the last parts of it.

        Raises:
            StoreError: there is no such image, or more than one.
        """
        if self._named is None:
            self._named = {}
            for i, name in enumerate(self.images):
                parts = PurePath(name).parts
                for first in range(len(parts)):
                    self._named.setdefault(parts[first:], []).append(i)
        found = self._named.get(PurePath(path).parts, [])
        exact = [i for i in found if self._origin(i)[0] == os.fspath(path)]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if found:
            some = ", ".join(repr(self._origin(i)[0]) for i in found[:5])
            raise StoreError(
                f"{str(path)!r} stands for {len(found)} images of {str(self.path)!r} ({some}); give more of the path"
            )
        near = difflib.get_close_matches(PurePath(path).name, [parts[-1] for parts in self._named], 3)
        hint = f"; close names are {', '.join(near)}" if near else ""
        raise StoreError(f"{str(self.path)!r} holds no image {str(path)!r} among its {len(self)}{hint}")

    def read(self, i: int, term: str | None = None) -> np.ndarray:
        """Read one term (h, w, C) of image i as it is stored, float16 or float32."""
        term = self.term if term is None else term
        self._check_term(term)
        shard, row = self._at(i)
        out = torch.empty(*shard.grid[row].tolist(), shard.channels, dtype=getattr(torch, shard.dtype))
        self._chunks.read(str(shard.file), f"tokens/{term}", int(shard.offset[row]), out.view(-1, shard.channels))
        return out.numpy()

    def record(self, i: int) -> Record:
        """Read all that the store holds of image i."""
        shard, row = self._at(i)
        path, sha256 = self._origin(i)
        size = (int(shard.size[row, 0]), int(shard.size[row, 1]))
        return Record(path, sha256, size, {term: self.read(i, term) for term in self.terms}, self.prefix(i))

    def prefix(self, i: int) -> np.ndarray | None:
        """Read the prefix tokens (P, C) of image i as they are stored, or None."""
        shard, row = self._at(i)
        if not shard.prefix:
            return None
        out = torch.empty(1, shard.prefix, shard.channels, dtype=getattr(torch, shard.dtype))
        self._chunks.read(str(shard.file), "tokens/prefix", row, out)
        return out[0].numpy()

    def artifact(self, i: int) -> np.ndarray | None:
        """Read the artifact (h, w, C) that image i shares with its shard, or None."""
        shard, _ = self._at(i)
        if not shard.shared:
            return None
        with opened(shard.file) as file:
            return file["artifact"][:]

    def verify(self) -> list[Path]:
        """Check every checksum and list the damaged shards; see :func:`damaged_shards`."""
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
        # Open files cannot be pickled: each DataLoader worker opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "_chunks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._chunks = ChunkReader()

    def _rows(self) -> Iterator[tuple[StoredShard, int]]:
        return ((self._shards[shard], row) for shard, row in self._where)

    def _at(self, i: int) -> tuple[StoredShard, int]:
        shard, row = self._where[self._checked(i)]
        return self._shards[shard], row

    def _check_term(self, term: str) -> None:
        if term not in self.terms:
            raise StoreError(f"{str(self.path)!r} holds the terms {', '.join(self.terms)}, not {term!r}")

    def _one(self, i: int) -> StoredTokens:
        """Read one image; shorter than :meth:`_batch`, whose steps would take as long as reading it."""
        number, row = self._where[i]
        shard, start = self._shards[number], int(self._shards[number].offset[row])
        grid, channels, dtype = self._grids[i], shard.channels, self.dtype or getattr(torch, shard.dtype)
        terms = {}
        for term in self.chosen:
            values = torch.empty(grid[0] * grid[1], channels, dtype=dtype)
            self._chunks.read(str(shard.file), f"tokens/{term}", start, values)
            terms[term] = values.view(1, *grid, channels)
        prefix = torch.empty(1, self._prefix, channels, dtype=dtype)
        if self._prefix:
            self._chunks.read(str(shard.file), "tokens/prefix", row, prefix)
        path, sha256 = self._origin(i)
        labels = None if self._labels is None else collate_labels([self._label(i)])
        return StoredTokens(
            terms[self.term], prefix, (path,), (sha256,), self._numbers[i : i + 1], terms, labels=labels
        )

    def _batch(self, indices: Sequence[int]) -> StoredTokens:
        """Read several images, in their order on the disk, into one tensor per term if all have one grid."""
        indices = [self._checked(i) for i in indices]
        if len(indices) == 1:
            return self._one(indices[0])
        if not indices:
            raise StoreError(f"no image of {str(self.path)!r} was asked for; give at least one number or path")
        grid = self._grids[indices[0]]
        if any(self._grids[i] != grid for i in indices[1:]):
            return collate_tokens([self._batch([i]) for i in indices])
        channels, dtype = self._shards[0].channels, self.dtype
        places = [self._where[i] for i in indices]
        if dtype is None:
            dtype = getattr(torch, max({self._shards[shard].dtype for shard, _ in places}))
        terms = {term: empty_batch(len(indices), *grid, channels, dtype=dtype) for term in self.chosen}
        prefix = torch.empty(len(indices), self._prefix, channels, dtype=dtype)
        outs = [(f"tokens/{term}", values.flatten(1, 2).unbind()) for term, values in terms.items()]
        wanted: list[Request] = []
        for (number, row), slot in sorted(zip(places, range(len(places)), strict=True)):
            shard = self._shards[number]
            wanted += [(str(shard.file), name, int(shard.offset[row]), slots[slot]) for name, slots in outs]
            if self._prefix:
                wanted.append((str(shard.file), "tokens/prefix", row, prefix[slot : slot + 1]))
        self._chunks.read_all(wanted)
        paths, sha256s = zip(*map(self._origin, indices), strict=True)
        labels = None if self._labels is None else collate_labels([self._label(i) for i in indices])
        numbers = torch.tensor(indices)
        return StoredTokens(terms[self.term], prefix, paths, sha256s, numbers, terms, labels=labels)

    def _origin(self, i: int) -> tuple[str, str]:
        number, row = self._where[i]
        shard = self._shards[number]
        return os.fsdecode(bytes(shard.path[row])), shard.sha256[row].decode()

    def _joined(self, labels: Labels | None) -> Callable[[str], Any] | list[Any] | None:
        """Return the label of each image, or the function that makes labels from paths."""
        if labels is None or callable(labels):
            return labels
        found, missing = [], []
        for i in range(len(self)):
            path, sha256 = self._origin(i)
            key = next((key for key in (path, PurePath(path).name, sha256) if key in labels), None)
            found.append(None if key is None else labels[key])
            missing += [path] if key is None else []
        if missing:
            raise StoreError(
                f"no label for {len(missing)} of {counted(len(self), 'image')} of {str(self.path)!r}, such as "
                f"{missing[0]!r}; labels are looked up by path, file name or SHA-256"
            )
        return found

    def _label(self, i: int) -> Any:
        return self._labels(self._origin(i)[0]) if callable(self._labels) else self._labels[i]  # type: ignore[index]

    def _checked(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of a store of {len(self)}")
        return i % len(self)


def _numbers(index: Any, count: int) -> list[int]:
    """Convert a list, array or tensor of indices, or of one boolean per image, to a list of indices."""
    values = np.asarray(index)
    if values.dtype == bool and values.shape == (count,):
        return np.flatnonzero(values).tolist()
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise StoreError(
            f"images of a store are chosen by numbers, a slice or a path, not by {type(index).__name__} of "
            f"{values.dtype} with shape {values.shape}"
        )
    return values.tolist()
