"""The solver of shifted windows: the artifact taken from an image's own tokens, if the data show that there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.fields.config import ShiftConfig
from dvt.fields.decomposition import Fit
from dvt.fields.equations import solve_artifact
from dvt.fields.gate import SignTest
from dvt.fields.twoway import TwoWay
from dvt.grids import Size

Batch = tuple[Tensor, Tensor]
#: Robust weights (V, n) of tokens (V, n, C) at coordinates (V, n, 2).
Weigh = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ShiftFit(Fit):
    """What :class:`ShiftSolver` returns; see :class:`~dvt.fields.decomposition.Fit` for the laws.

    Args:
        field: (h, w, C) F at the image's own patches.
        artifact: (h, w, C); zero where the test found none.
        centres: (h, w, 2) the image's patch centres.
        noise: mean squared norm of what F and G leave of a token.
        p_value: of the test for an artifact; None without one.
        found: whether there is an artifact. Where there is none, the estimate is the input.
        config: the settings.
    """

    field: Tensor
    artifact: Tensor
    centres: Tensor
    noise: float
    p_value: float | None
    found: bool
    config: ShiftConfig

    def semantic(self, coords: Tensor) -> Tensor:
        """F (..., C) at image coordinates (..., 2), bilinear between patch centres."""
        return grids.sample_centres(self.field, coords, self.centres)

    def residual(self, raw: Tensor) -> Tensor:
        """Zero: outliers are left to the weights."""
        return torch.zeros_like(raw)

    def field_weight(self, raw: Tensor, coords: Tensor) -> float:
        """The share of the average over windows; 0 where no artifact was found."""
        return self.config.average if self.found else 0.0


class ShiftSolver:
    """Splits the features of one image's shifted windows into F, one vector a patch, and G, one a position.

    Memory does not depend on the number of windows: they are read once and only sums are kept.

    Args:
        config: settings.
        weigh: gives every token a weight, to weigh outliers down; None trusts all of them.
    """

    def __init__(self, config: ShiftConfig | None = None, weigh: Weigh | None = None):
        self.config, self.weigh = config or ShiftConfig(), weigh

    def fit(self, views: Iterable[Batch], artifact: Tensor | None = None) -> ShiftFit:
        """Fit one image.

        Args:
            views: batches of (tokens (V, h, w, C), coords (V, h, w, 2)) of windows at the image's own scale, shifted
                by whole patches, as :class:`dvt.views.Shifts` cuts them; read once.
            artifact: (h, w, C) a known G; only F is fitted then, and nothing is tested.

        Raises:
            ShapeError: batches disagree in grid or channels, or with the artifact.
            NonFiniteError: a token is NaN or infinite.
            ConfigError: there is no view, a view is no shifted window, the grid has one row or column, or too few
                patches to test for an artifact.
        """
        run = _Run(self, views, artifact)
        known = None
        if artifact is not None:
            known = (artifact - artifact.mean((0, 1))).flatten(0, 1)
        p_value = run.test.p_value() if run.test is not None else None
        found = p_value is None or p_value <= self.config.alarm
        if not found:
            known = run.sums.position.new_zeros(run.sums.position.shape[1:])
        return self._result(run, known, p_value, found)

    def fit_many(self, views: Sequence[Iterable[Batch]], artifact: Tensor | None = None) -> list[ShiftFit]:
        """:meth:`fit` of each image; those of one grid and equal offsets share their system's factor."""
        return [self.fit(each, artifact) for each in views]

    def artifact_equations(self, views: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """One image's share of a shared artifact's equations, (n, n) and (n, C); add them over images of one grid.

        :meth:`solve_shared` solves the sums.
        """
        schur, rhs = _Run(self, views, None, test=False).sums.equations()
        return schur[0], rhs[0]

    def solve_shared(self, equations: tuple[Tensor, Tensor], grid: Size) -> Tensor:
        """The artifact (h, w, C), float32, that many images share, from the sums of their equations."""
        return solve_artifact(*equations, self.config.ridge).float().view(*grid, -1)

    def _result(self, run: _Run, known: Tensor | None, p_value: float | None, found: bool) -> ShiftFit:
        solution = run.sums.solve(self.config.ridge, known)
        (height, width), dtype = run.sums.grid, run.sums.content.dtype
        freedom = run.tokens - float((run.sums.observed() > 0).sum()) - (height * width - 1 if known is None else 0)
        field = solution.field[0].view(*run.sums.period, -1)[:height, :width]
        return ShiftFit(
            field=field.to(dtype).contiguous(),
            artifact=solution.artifact[0].view(height, width, -1).to(dtype),
            centres=grids.lattice_centres((height, width), run.sums.period).to(field.device),
            noise=float(solution.left[0]) / max(freedom, 1.0),
            p_value=p_value,
            found=found,
            config=self.config,
        )


class _Run:
    """One pass over the windows of an image: the two-way sums, those of the test, and the number of tokens."""

    def __init__(self, solver: ShiftSolver, views: Iterable[Batch], artifact: Tensor | None, test: bool = True):
        self.tokens = 0
        self.test: SignTest | None = None
        shape = None if artifact is None else tuple(artifact.shape)
        sums: TwoWay | None = None
        for tokens, coords in _checked(views, shape):
            offsets, period = grids.lattice(coords)
            flat = tokens.flatten(1, 2)
            if sums is None:
                grid = (tokens.shape[1], tokens.shape[2])
                sums = TwoWay(1, grid, period, flat.shape[2], flat)
                if test and artifact is None and solver.config.alarm < 1:
                    self.test = SignTest(grid, period, flat.shape[2], flat, solver.config.groups)
            if period != sums.period:
                raise ConfigError(f"windows of one image lie on grids of periods {sums.period} and {period}")
            weights = None if solver.weigh is None else solver.weigh(flat, coords.flatten(1, 2))
            sums.add(flat[None], offsets, None if weights is None else weights[None])
            if self.test is not None:
                self.test.add(flat, offsets, weights)
            self.tokens += flat.shape[0] * flat.shape[1]
        if sums is None:
            raise ConfigError("there are no views; give at least one batch of (tokens, coords)")
        self.sums = sums


def _checked(views: Iterable[Batch], shape: tuple[int, ...] | None) -> Iterator[Batch]:
    """The batches, once each is known to be of one shape (h, w, C) and finite."""
    for tokens, coords in views:
        if tokens.ndim != 4 or tuple(coords.shape) != (*tokens.shape[:3], 2):
            raise ShapeError(
                f"a batch of views has tokens {tuple(tokens.shape)} and coords {tuple(coords.shape)}; "
                "they must be (V, h, w, C) and (V, h, w, 2)"
            )
        shape = shape or tuple(tokens.shape[1:])
        if tuple(tokens.shape[1:]) != shape:
            raise ShapeError(f"a view has shape {tuple(tokens.shape[1:])}; it must be {shape}, as before")
        if not torch.isfinite(tokens.sum()):
            raise NonFiniteError("tokens are NaN or infinite; check the weights, or use --dtype float32")
        yield tokens, coords
