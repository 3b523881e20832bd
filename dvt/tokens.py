"""Define Tokens, which every backbone returns and everything else takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from dvt.errors import ShapeError
from dvt.showing import page_part, pca_colours, picture, read_tensors, save_tensors

if TYPE_CHECKING:
    from PIL.Image import Image


_SCHEMA = "dvt-tokens/1"
_SHOWN = 6  # maps in a picture


@dataclass(frozen=True, repr=False)
class Tokens:
    """Hold the patch and prefix tokens of a batch of equally large images.

    Args:
        patches: (B, h, w, C) patch tokens, channels last.
        prefix: (B, P, C) class token and registers, in the model's order; P may be 0.

    Raises:
        ShapeError: the two disagree in batch or feature size, or have other ranks.

    >>> import torch
    >>> tokens = Tokens(torch.zeros(2, 14, 21, 192), torch.zeros(2, 1, 192))
    >>> tokens.grid, tokens.feature_dim, len(tokens)
    ((14, 21), 192, 2)
    """

    patches: Tensor
    prefix: Tensor

    def __post_init__(self) -> None:
        if self.patches.ndim != 4:
            raise ShapeError(f"patches has shape {tuple(self.patches.shape)}; it must be (B, h, w, C)")
        batch, _, _, channels = self.patches.shape
        if self.prefix.ndim != 3 or self.prefix.shape[0] != batch or self.prefix.shape[2] != channels:
            raise ShapeError(
                f"prefix has shape {tuple(self.prefix.shape)}; beside patches {tuple(self.patches.shape)} "
                f"it must be ({batch}, P, {channels})"
            )

    def __repr__(self) -> str:
        kind = str(self.patches.dtype).removeprefix("torch.")
        shapes = f"patches {tuple(self.patches.shape)}, prefix {tuple(self.prefix.shape)}"
        return f"{type(self).__name__}({shapes}, {kind} on {self.patches.device})"

    def show(self) -> Image:
        """Draw the maps of the first images in PCA colours, the same in all; a notebook shows the picture."""
        return picture(self._panels())

    def _repr_html_(self) -> str:
        return page_part(repr(self), {}, self._panels)

    def _panels(self) -> dict[str, Tensor]:
        maps = list(self.patches[:_SHOWN])
        return {f"image {i}": each for i, each in enumerate(pca_colours(maps) if maps else [])}

    def save(self, path: str | Path) -> Path:
        """Write both tensors to a .safetensors file; :meth:`load` reads it.

        Raises:
            WeightsError: the name does not end in .safetensors.
            ConfigError: the file cannot be written.
        """
        return save_tensors(path, _SCHEMA, {"patches": self.patches, "prefix": self.prefix})

    @classmethod
    def load(cls, path: str | Path) -> Tokens:
        """Read what :meth:`save` wrote.

        Raises:
            WeightsError: the file is missing, damaged, or holds no tokens.
        """
        return Tokens(**read_tensors(path, _SCHEMA, ("patches", "prefix")))

    @classmethod
    def of(cls, patches: Tensor) -> Tokens:
        """Make tokens without a prefix from (B, h, w, C) or a single (h, w, C) map."""
        patches = patches if patches.ndim == 4 else patches[None]
        return cls(patches, patches.new_zeros(patches.shape[0], 0, patches.shape[-1]))

    @property
    def grid(self) -> tuple[int, int]:
        """The number of patches in each direction, (h, w)."""
        return self.patches.shape[1], self.patches.shape[2]

    @property
    def feature_dim(self) -> int:
        """The number of channels, C."""
        return self.patches.shape[3]

    def __len__(self) -> int:
        return self.patches.shape[0]

    def __getitem__(self, index: int | slice) -> Tokens:
        part = self.part(index)
        return Tokens(self.patches[part], self.prefix[part])

    def part(self, index: int | slice) -> slice:
        """Convert an index of a batch to a slice, so that one image stays a batch of one."""
        if isinstance(index, slice):
            return index
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of a batch of {len(self)}")
        return slice(index % len(self), index % len(self) + 1)

    def with_patches(self, patches: Tensor) -> Tokens:
        """Replace the patch tokens and keep the prefix."""
        return Tokens(patches, self.prefix)

    def to(self, *args, **kwargs) -> Tokens:
        """Move or convert both tensors as :meth:`torch.Tensor.to` does."""
        return Tokens(self.patches.to(*args, **kwargs), self.prefix.to(*args, **kwargs))


def norm_bound(norms: Tensor, sigmas: float, ratio: float = 1.0) -> Tensor:
    """Compute the norm beyond which a token is an outlier among others.

    Norms of healthy features are skewed, so the bound is computed on their logarithms: `sigmas` robust sigmas (1.4826
    median absolute deviations) above the median, and at least at `ratio` times the median norm.

    Args:
        norms: norms of many tokens, any shape.
        sigmas: positive.
        ratio: 1 or more.

    >>> import torch
    >>> round(float(norm_bound(torch.tensor([1.0, 1.0, 1.0, 2.0, 50.0]), sigmas=5, ratio=2)), 6)
    2.0
    """
    logs = norms.clamp_min(1e-12).log()
    spread = sigmas * 1.4826 * (logs - logs.median()).abs().median()
    # The exponential of the median logarithm would be rounded, and could lie below equal norms.
    return norms.median() * spread.clamp_min(math.log(ratio)).exp()


class TokenMap(Protocol):
    """Map a backbone's patch tokens to other ones, as a denoiser does, and describe itself."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that the output depends on, as plain JSON values; part of the jobs that use it."""

    def __call__(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Map patches (B, h, w, C), beside prefix tokens (B, P, C), to patches of the same shape."""
