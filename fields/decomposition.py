"""Define the result of every solver: a fit of one image's views, and the terms into which it splits a token map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvt.errors import ConfigError, ShapeError
from dvt.images import ImageLike, read_image
from dvt.showing import page_part, pca_colours, picture, read_tensors, save_tensors

if TYPE_CHECKING:
    from PIL.Image import Image


_SCHEMA = "dvt-decomposition/1"


@dataclass(frozen=True, repr=False)
class Decomposition:
    """Hold one token map and its terms: raw = semantic + artifact + residual + error.

    Args:
        raw: (h, w, C) tokens of the backbone.
        semantic: (h, w, C) the chosen estimate of the clean features.
        artifact: (h, w, C) the part that depends on the patch position alone, with mean zero over positions.
        residual: (h, w, C) the part that depends on the token itself; zero if that term is off.
        field: (h, w, C) the semantic field (F) at the patch centres; `semantic` may blend it with `raw`.

    Raises:
        ShapeError: the five tensors are not (h, w, C) or do not share one shape.

    Source: the noise model raw = F(x) + G(p) + h(raw) of Denoising Vision Transformers (arXiv 2401.02957).

    >>> ones = torch.ones(2, 3, 4)
    >>> parts = Decomposition(raw=3 * ones, semantic=ones, artifact=ones, residual=0 * ones, field=ones)
    >>> parts.error.mean().item(), parts.at_strength(0.5).mean().item()
    (1.0, 2.0)
    """

    raw: Tensor
    semantic: Tensor
    artifact: Tensor
    residual: Tensor
    field: Tensor

    def __post_init__(self) -> None:
        shapes = {item.name: tuple(getattr(self, item.name).shape) for item in fields(self)}
        if self.raw.ndim != 3 or len(set(shapes.values())) != 1:
            raise ShapeError(f"all terms of a decomposition must have one shape (h, w, C), got {shapes}")

    def __repr__(self) -> str:
        height, width, channels = self.raw.shape
        spread = (self.raw - self.raw.mean((0, 1))).float().square().sum().clamp_min(1e-20)
        terms = {"artifact": self.artifact, "residual": self.residual, "change": self.raw - self.semantic}
        shares = ", ".join(f"{name} {float(each.float().square().sum() / spread):.0%}" for name, each in terms.items())
        kind = str(self.raw.dtype).removeprefix("torch.")
        return (
            f"Decomposition({height} x {width} patches, {channels} channels, {kind} on {self.raw.device}; "
            f"{shares} of raw's variance)"
        )

    def show(self, image: ImageLike | None = None) -> Image:
        """Draw the terms in PCA colours, beside the photograph if it is given; a notebook shows the picture.

        Raw and semantic have the same colours, artifact and residual their own.
        """
        panels = self._panels()
        if image is not None:
            panels = {"photograph": read_image(image).movedim(0, -1), **panels}
        return picture(panels)

    def _repr_html_(self) -> str:
        return page_part(repr(self), {}, self._panels)

    def _panels(self) -> dict[str, Tensor]:
        panels = dict(zip(("raw", "semantic"), pca_colours([self.raw, self.semantic]), strict=True))
        rest = {"artifact": self.artifact, "residual": self.residual}
        return panels | {name: pca_colours(each)[0] for name, each in rest.items() if each.any()}

    def save(self, path: str | Path) -> Path:
        """Write all terms to a .safetensors file; :meth:`load` reads it.

        Raises:
            WeightsError: the name does not end in .safetensors.
            ConfigError: the file cannot be written.
        """
        return save_tensors(path, _SCHEMA, {item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """Read what :meth:`save` wrote.

        Raises:
            WeightsError: the file is missing, damaged, or holds no decomposition.
        """
        return cls(**read_tensors(path, _SCHEMA, [item.name for item in fields(cls)]))

    @property
    def error(self) -> Tensor:
        """The part that no term explains, (h, w, C): raw - semantic - artifact - residual."""
        return self.raw - self.semantic - self.artifact - self.residual

    def at_strength(self, strength: float) -> Tensor:
        """Remove only a share of the artifact: raw + strength (semantic - raw), (h, w, C).

        Args:
            strength: in [0, 1]; 0 returns the values of `raw` and 1 those of `semantic`, exactly.

        Raises:
            ConfigError: strength lies outside [0, 1].
        """
        if not 0 <= strength <= 1:
            raise ConfigError(f"strength is {strength}; it must lie in [0, 1]: 0 returns raw, 1 returns semantic")
        # lerp is exact at both ends, which the plain formula is not.
        return torch.lerp(self.raw, self.semantic, float(strength))

    def weakened(self, strength: float) -> Decomposition:
        """Scale all that is removed by a strength in [0, 1]: `semantic` becomes :meth:`at_strength`; 1 changes nothing.

        >>> ones = torch.ones(2, 3, 4)
        >>> half = Decomposition(3 * ones, ones, ones, 0 * ones, ones).weakened(0.5)
        >>> half.semantic.mean().item(), half.artifact.mean().item(), half.error.mean().item()
        (2.0, 0.5, 0.5)
        """
        if strength == 1:
            return self
        semantic = self.at_strength(strength)
        return replace(self, semantic=semantic, artifact=strength * self.artifact, residual=strength * self.residual)

    def terms(self) -> dict[str, Tensor]:
        """List the four stored terms by name: raw, semantic, artifact, residual, in this order."""
        return {name: getattr(self, name) for name in ("raw", "semantic", "artifact", "residual")}

    def to(self, *args, **kwargs) -> Decomposition:
        """Move or convert all tensors as :meth:`torch.Tensor.to` does."""
        return Decomposition(**{item.name: getattr(self, item.name).to(*args, **kwargs) for item in fields(self)})


class Fit(ABC):
    """Hold the solution for one image: the semantic field F, the artifact G and the residual predictor h.

    Laws that every solver's fit keeps (and tests check):
        - `artifact` has mean zero over positions: F and G are known only up to one constant vector, which F contains.
        - `semantic` is a pure function of the coordinates, defined on all of [0, 1]^2.
        - `residual` is a pure function of the token, and zero if that term was not fitted.
        - `decompose(raw, coords)` gives a Decomposition with these three, in the dtype and on the device of `artifact`;
          its estimate lies between `field` and raw - artifact - residual.

    Attributes:
        artifact: (h, w, C), by patch position in a view's grid.
    """

    artifact: Tensor

    @abstractmethod
    def semantic(self, coords: Tensor) -> Tensor:
        """Evaluate F (..., C) at image coordinates (..., 2) in [0, 1]^2; points outside take the border's value."""

    @abstractmethod
    def residual(self, raw: Tensor) -> Tensor:
        """Compute the residual h (..., C) of raw tokens (..., C)."""

    def field_weight(self, raw: Tensor, coords: Tensor) -> Tensor | float:
        """Return the weight of F in the semantic estimate; raw - artifact - residual has the rest.

        Args:
            raw: (h, w, C) tokens.
            coords: (h, w, 2) their image coordinates.

        Returns:
            A number in [0, 1], or a tensor of numbers that broadcasts to (h, w, C). The default is 1: F alone, as in
            the paper.
        """
        return 1.0

    def decompose(self, raw: Tensor, coords: Tensor) -> Decomposition:
        """Split a token map of the fit's own grid shape into its terms.

        Args:
            raw: (h, w, C) tokens of any floating dtype.
            coords: (h, w, 2) their image coordinates, (x, y) in [0, 1]^2.

        Raises:
            ShapeError: raw does not have the artifact's shape, or coords do not fit it.
        """
        grid = tuple(self.artifact.shape)
        if tuple(raw.shape) != grid or tuple(coords.shape) != (*grid[:2], 2):
            raise ShapeError(
                f"raw has shape {tuple(raw.shape)} and coords {tuple(coords.shape)}; this fit decomposes maps of its "
                f"own grid: raw {grid} and coords {(*grid[:2], 2)}"
            )
        raw, coords = raw.to(self.artifact), coords.to(self.artifact.device)
        field, residual = self.semantic(coords), self.residual(raw)
        remaining = raw - self.artifact - residual
        semantic = torch.lerp(remaining, field, self.field_weight(raw, coords))
        return Decomposition(raw, semantic, self.artifact, residual, field)
