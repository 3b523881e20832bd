"""The multi-resolution grid encoding of image coordinates, in plain torch or by tinycudann, with the same numbers.

Layout and scales follow tiny-cuda-nn's `Grid` encoding of type `Hash` with linear interpolation (Instant neural
graphics primitives, arXiv 2201.05989, section 3 and appendix A), so one table serves both:
    scale[l]      = base * 2^(l log2 growth) - 1                cells along a side, not always whole
    resolution[l] = ceil(scale[l]) + 1                          nodes along a side
    entries[l]    = min(resolution[l]^2 rounded up to a multiple of 8, hash_entries)
    position      = coordinate * scale[l] + 0.5                 the half staggers the levels against each other
    node (i, j)   = i + j resolution[l], x fastest, or i xor (j * 2654435761) if that needs more than entries[l];
                    both modulo entries[l]
Parameters are stored level after level, entry after entry, channels last.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt.devices import has_kernels_of_cuda
from dvt.errors import ConfigError, ShapeError
from dvt.fields.config import EncodingKind, NeuralConfig, check_grid

_PRIME = 2654435761
_INITIAL_RANGE = 1e-4


@dataclass(frozen=True)
class GridLayout:
    """Sizes of a multi-resolution grid over [0, 1]^2.

    Args:
        levels: number of grids, at least 1.
        base: nodes along a side of the coarsest grid, at least 2.
        finest: nodes along a side of the finest grid, at least base; those between grow geometrically.
        channels: values per node; 1, 2, 4 or 8 (those that tinycudann supports).
        hash_entries: most nodes that a level stores, a power of two; finer levels share entries through a hash.

    Raises:
        ConfigError: a number is outside its range.

    >>> layout = GridLayout(levels=3, base=4, finest=16, channels=2, hash_entries=128)
    >>> layout.resolutions.tolist(), layout.entries.tolist()
    ([4, 8, 16], [16, 64, 128])
    """

    levels: int = 16
    base: int = 16
    finest: int = 1024
    channels: int = 8
    hash_entries: int = 2**20

    def __post_init__(self) -> None:
        check_grid(self.levels, self.base, self.finest, self.channels, self.hash_entries)

    @classmethod
    def of(cls, config: NeuralConfig) -> GridLayout:
        """Take the sizes of a solver's settings."""
        return cls(config.levels, config.base, config.finest, config.channels, config.hash_entries)

    @cached_property
    def growth(self) -> float:
        """The factor between neighbouring levels, a hair under the exact one.

        The exact factor ends at a whole number of cells, which float32 may round up: tinycudann on the GPU and torch
        would then disagree about the finest resolution. The hair is 0.015 cells at the default finest level.
        """
        return (self.finest / self.base) ** (1 / max(self.levels - 1, 1)) * (1 - 1e-6)

    @cached_property
    def scales(self) -> np.ndarray:
        """The cells along a side, (levels,) float32."""
        exponent = np.arange(self.levels, dtype=np.float32) * np.log2(np.float32(self.growth))
        return np.exp2(exponent) * np.float32(self.base) - np.float32(1)

    @cached_property
    def resolutions(self) -> np.ndarray:
        """The nodes along a side, (levels,) int64."""
        return np.ceil(self.scales).astype(np.int64) + 1

    @cached_property
    def entries(self) -> np.ndarray:
        """The stored nodes, (levels,) int64."""
        return np.minimum(-(-(self.resolutions**2) // 8) * 8, self.hash_entries)

    @property
    def features(self) -> int:
        """The length of the encoding of one point."""
        return self.levels * self.channels

    @property
    def shrink(self) -> float:
        """The factor on coordinates that keeps the half-cell stagger of every level inside its grid.

        Without it the outermost half cell of a dense level would mix in the opposite border.
        """
        return 1 - 0.5 / (self.base - 1)

    def initial_table(self, generator: torch.Generator) -> Tensor:
        """Draw the table (sum of entries, channels), uniform in +-1e-4 (arXiv 2201.05989), where the generator is."""
        shape = (int(self.entries.sum()), self.channels)
        return torch.empty(shape, device=generator.device).uniform_(
            -_INITIAL_RANGE, _INITIAL_RANGE, generator=generator
        )


class TorchGrid(nn.Module):
    """The encoding in plain torch, on any device; all levels are looked up in one call.

    Args:
        layout: the grid's sizes.
        table: (sum of entries, channels) initial values.
    """

    def __init__(self, layout: GridLayout, table: Tensor) -> None:
        super().__init__()
        _check_table(layout, table)
        self.layout = layout
        self.table = nn.Parameter(table)
        entries = torch.from_numpy(layout.entries)
        self.scales: Tensor
        self.resolutions: Tensor
        self.entries: Tensor
        self.offsets: Tensor
        self.register_buffer("scales", torch.from_numpy(layout.scales).to(table), persistent=False)
        self.register_buffer("resolutions", torch.from_numpy(layout.resolutions).to(table.device), persistent=False)
        self.register_buffer("entries", entries.to(table.device), persistent=False)
        self.register_buffer("offsets", (entries.cumsum(0) - entries).to(table.device), persistent=False)

    def forward(self, coords: Tensor) -> Tensor:
        """Encode coordinates (N, 2), clamped to [0, 1]^2, as (N, features); the coarsest level comes first."""
        index, weight = self.corners(coords.to(self.table))
        values = nnf.embedding_bag(index.flatten(0, 1), self.table, per_sample_weights=weight.flatten(0, 1), mode="sum")
        return values.view(len(coords), -1)

    @torch.no_grad()
    def corners(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Find the table rows (N, levels, 4) of the four nodes around each point, and their bilinear weights."""
        position = (coords.clamp(0, 1) * self.layout.shrink)[:, None] * self.scales[:, None] + 0.5
        first = position.floor()
        right, down = (position - first).unbind(-1)
        i, j = first.long()[..., None, :].unbind(-1)
        i, j = i + i.new_tensor([0, 1, 0, 1]), j + j.new_tensor([0, 0, 1, 1])
        weight = torch.stack(((1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down), dim=-1)
        return self.rows(i, j), weight

    def rows(self, i: Tensor, j: Tensor) -> Tensor:
        """Find the table rows of nodes in column i and row j, both (N, levels, 4)."""
        resolution, entries = self.resolutions[:, None], self.entries[:, None]
        row = i + j * resolution
        if bool((self.layout.resolutions**2 > self.layout.entries).any()):
            # The 32-bit wrap-around of the original drops out: entries is a power of two.
            hashed = i ^ (j * _PRIME)
            row = torch.where(resolution**2 > entries, hashed, row)
        return row % entries + self.offsets[:, None]


class TinyCudaGrid(nn.Module):
    """The same encoding by tinycudann in float32, on a CUDA device.

    Args:
        layout: the grid's sizes.
        table: (sum of entries, channels) initial values, on the CUDA device.
    """

    def __init__(self, layout: GridLayout, table: Tensor) -> None:
        super().__init__()
        _check_table(layout, table)
        self.layout = layout
        settings = {
            "otype": "Grid",
            "type": "Hash",
            "n_levels": layout.levels,
            "n_features_per_level": layout.channels,
            "log2_hashmap_size": layout.hash_entries.bit_length() - 1,
            "base_resolution": layout.base,
            "per_level_scale": layout.growth,
            "interpolation": "Linear",
        }
        self.grid = _tinycudann().Encoding(2, settings, dtype=torch.float32)
        with torch.no_grad():
            self.grid.params.copy_(table.flatten())

    @property
    def table(self) -> Tensor:
        """The table as a view of the parameters, (sum of entries, channels)."""
        return self.grid.params.view(-1, self.layout.channels)

    def forward(self, coords: Tensor) -> Tensor:
        """Encode coordinates (N, 2), clamped to [0, 1]^2, as (N, features); the coarsest level comes first."""
        return self.grid((coords.clamp(0, 1) * self.layout.shrink).float()).float()


def make_encoding(kind: EncodingKind, layout: GridLayout, table: Tensor) -> TorchGrid | TinyCudaGrid:
    """Make the encoding by the implementation asked for.

    Args:
        kind: "torch"; "tinycudann"; or "auto": tinycudann where it can be imported and the table is on a CUDA device.
        layout: the grid's sizes.
        table: (sum of entries, channels) initial values; their device is the encoding's.

    Raises:
        ConfigError: kind is none of these, or tinycudann was asked for where it cannot run.
    """
    if kind not in ("auto", "torch", "tinycudann"):
        raise ConfigError(f"encoding is {kind!r}; it must be 'auto', 'torch' or 'tinycudann'")
    usable = has_kernels_of_cuda(table.device) and _tinycudann() is not None
    if kind == "tinycudann" and not usable:
        raise ConfigError(
            f"encoding 'tinycudann' needs that package and a CUDA device, got {table.device}; use 'auto' or 'torch'"
        )
    return TorchGrid(layout, table) if kind == "torch" or not usable else TinyCudaGrid(layout, table)


def _tinycudann() -> Any:
    """Import the package; None where it is missing or was not built for this GPU (it then raises an OSError)."""
    try:
        return importlib.import_module("tinycudann")
    except (ImportError, OSError):
        return None


def _check_table(layout: GridLayout, table: Tensor) -> None:
    expected = (int(layout.entries.sum()), layout.channels)
    if tuple(table.shape) != expected:
        raise ShapeError(
            f"table has shape {tuple(table.shape)}; this layout needs {expected}: use layout.initial_table"
        )
