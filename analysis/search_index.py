"""Keep the mean tokens of a store's images in a faiss index, so that a search reads few images (extra `search`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvt import grids
from dvt.errors import ConfigError, StoreError
from dvt.files import check_regular, whole_file
from dvt.progress import Progress, silent
from dvt.schema import checked, read_json

if TYPE_CHECKING:
    from dvt.store import FeatureStore

_CELLS = 4  # an image is kept as its mean token and those of 4 x 4 cells, of which a region resembles some
_LINKS = 32  # of each vector in the graph (HNSW)
_SEARCHED = 256  # vectors looked at in a search, at least


class SearchIndex:
    """Find the images of a store whose mean tokens, or those of parts of them, are most similar to a vector.

    The search is approximate: a graph of neighbours (HNSW) over unit vectors, after the store's mean token is
    subtracted. :func:`dvt.analysis.search.search` compares the images found exactly.

    Args:
        index: a faiss index.
        centre: (C,) the store's mean token.
    """

    def __init__(self, index: Any, centre: Tensor) -> None:
        self.index, self.centre = index, centre

    @classmethod
    def opened(cls, folder: str | Path, store: FeatureStore, progress: Progress = silent) -> SearchIndex:
        """Open the index that a folder keeps of this store and term; make it if there is none, or of other images.

        Raises:
            ConfigError: faiss is not installed, or the folder cannot be written.
            StoreError: the index is damaged.
        """
        faiss, folder = _faiss(), Path(folder)
        about, index = folder / f"{store.term}.json", folder / f"{store.term}.faiss"
        identity = _identity(store)
        try:
            found = read_json(about) if about.exists() else {}
            if found.get("identity") == identity:
                check_regular(index)
                centre = torch.tensor(checked(found["centre"], list[float], "the centre"))
                kept = cls(faiss.read_index(str(index)), centre)
                if kept.index.ntotal == len(store) * (1 + _CELLS**2) and kept.index.d == len(centre):
                    return kept
        except (OSError, RuntimeError, KeyError, ConfigError) as error:
            raise StoreError(f"the search index {str(index)!r} is damaged ({error}); delete {str(folder)!r}") from error
        made = cls.of(store, progress)
        with whole_file(index) as part:
            faiss.write_index(made.index, str(part))
        with whole_file(about) as part:
            part.write_text(json.dumps({"identity": identity, "centre": made.centre.tolist()}))
        return made

    @classmethod
    def of(cls, store: FeatureStore, progress: Progress = silent) -> SearchIndex:
        """Make the index of a store; every image is read once."""
        faiss, rows = _faiss(), []
        for i in range(len(store)):
            tokens = store[i].patches[0].float()
            cells = grids.resample(tokens, (min(_CELLS, tokens.shape[0]), min(_CELLS, tokens.shape[1]))).flatten(0, 1)
            cells = cells[torch.arange(_CELLS**2) % len(cells)]  # of a small grid, again from the first
            rows.append(torch.cat((tokens.mean((0, 1))[None], cells)))
            progress("index", i + 1, len(store))
        centre = torch.stack([each[0] for each in rows]).mean(0)
        index = faiss.IndexHNSWFlat(len(centre), _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 2 * _SEARCHED
        index.add(_units(torch.cat(rows) - centre))
        return cls(index, centre)

    def candidates(self, wanted: Tensor, count: int) -> list[int]:
        """List about `count` images, by number, that hold what is most similar to a vector (C,), the best first."""
        each = 1 + _CELLS**2
        number = min(self.index.ntotal, max(count * each, _SEARCHED))
        self.index.hnsw.efSearch = 2 * number
        _, found = self.index.search(_units((wanted - self.centre)[None]), number)
        return list(dict.fromkeys(int(row) // each for row in found[0] if row >= 0))[:count]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "a search index needs faiss: pip install 'denoising-vit[search]', or leave --index out for the exact search"
        ) from error
    return faiss


def _units(rows: Tensor) -> np.ndarray:
    return np.ascontiguousarray(torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy())


def _identity(store: FeatureStore) -> str:
    """Hash what an index depends on: the job, the term, and the images with their places in the store."""
    text = json.dumps([store.job.digest, store.term, list(store.sha256s)])
    return hashlib.sha256(text.encode()).hexdigest()
