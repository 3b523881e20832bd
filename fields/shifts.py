"""Solve for F and G from shifted windows: subtract the artifact from an image's own tokens, if a test finds one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dvt import grids
from dvt.devices import upload
from dvt.errors import ConfigError, NonFiniteError
from dvt.fields.batches import ViewBatch, check_batch, take_views
from dvt.fields.config import ShiftConfig
from dvt.fields.decomposition import Fit
from dvt.fields.equations import solve_artifact
from dvt.fields.gate import SignTest
from dvt.fields.trust import Trust
from dvt.fields.twoway import TwoWay
from dvt.grids import Size

log = logging.getLogger(__name__)

# Number of windows held in memory to find outlier tokens.
HELD = 64
# The weight below which a token is an outlier.
OUTLIER = 0.5


@dataclass(frozen=True)
class ShiftFit(Fit):
    """Hold the result of :class:`ShiftSolver`; see :class:`~dvt.fields.decomposition.Fit` for the laws.

    Args:
        field: (h, w, C) F at the image's own patches.
        artifact: (h, w, C); zero if the test found none.
        centres: (h, w, 2) the image's patch centres.
        noise: mean squared norm of raw - F - G.
        p_value: p-value of the test for an artifact; None without a test.
        found: True if there is an artifact. If there is none, the estimate is the input.
        config: the settings.
        share: (h, w, 1) the share of F in the estimate: 1 if this image's own token is an outlier and other windows
            show its content, 0 if no other window shows it reliably.
    """

    field: Tensor
    artifact: Tensor
    centres: Tensor
    noise: float
    p_value: float | None
    found: bool
    config: ShiftConfig
    share: Tensor

    def semantic(self, coords: Tensor) -> Tensor:
        """Evaluate F (..., C) at image coordinates (..., 2), bilinear between patch centres."""
        return grids.sample_centres(self.field, coords, self.centres)

    def residual(self, raw: Tensor) -> Tensor:
        """Return zero: this solver treats outliers by weights, not by a residual."""
        return torch.zeros_like(raw)

    def field_weight(self, raw: Tensor, coords: Tensor) -> Tensor | float:
        """Return the share of F, the average over windows, (h, w, 1); 0 if no artifact was found."""
        return self.share if self.found else 0.0


class ShiftSolver:
    """Split the features of one image's shifted windows into F, a vector per image patch, and G, one per position.

    Windows are read once and only sums are kept, except for the first windows, which are held to find outliers.

    Args:
        config: settings.
    """

    def __init__(self, config: ShiftConfig | None = None):
        self.config = config or ShiftConfig()

    def fit(self, views: Iterable[ViewBatch], artifact: Tensor | None = None) -> ShiftFit:
        """Fit one image.

        Args:
            views: batches of (tokens (V, h, w, C), coords (V, h, w, 2)) of windows at the image's own scale, shifted
                by whole patches, as :class:`dvt.views.Shifts` cuts them; read once.
            artifact: (h, w, C) a known G; then only F is fitted, without a test.

        Raises:
            ShapeError: batches disagree in grid or channels, or with the artifact.
            NonFiniteError: a token is NaN or infinite.
            ConfigError: there is no view, a view is not a shifted window, or the grid has only one row or column.
        """
        run = _ShiftPass(self, views, artifact)
        known = None
        if artifact is not None:
            known = (artifact - artifact.mean((0, 1))).flatten(0, 1)
        p_value = run.test.p_value() if run.test is not None else None
        found = p_value is None or p_value <= self.config.alarm
        if not found:
            say_if_too_small(run.grid, self.config.alarm)
            known = run.sums.position.new_zeros(run.sums.position.shape[1:])
        return self._result(run, known, p_value, found)

    def fit_many(self, views: Sequence[Iterable[ViewBatch]], artifact: Tensor | None = None) -> list[ShiftFit]:
        """Fit several images; images with one grid and equal offsets share the factor of their equations."""
        return [self.fit(each, artifact) for each in views]

    def artifact_equations(self, views: Iterable[ViewBatch]) -> tuple[Tensor, Tensor]:
        """Compute an image's part of the equations of a shared artifact, (n, n) and (n, C).

        The parts of images of one grid add up; :meth:`solve_shared` solves the sums.
        """
        schur, rhs = _ShiftPass(self, views, None, test=False).sums.equations()
        return schur[0], rhs[0]

    def solve_shared(self, equations: tuple[Tensor, Tensor], grid: Size) -> Tensor:
        """Solve the sums of many images' equations for the artifact (h, w, C), float32, that they share."""
        return solve_artifact(*equations, self.config.ridge).float().view(*grid, -1)

    def _result(self, run: _ShiftPass, known: Tensor | None, p_value: float | None, found: bool) -> ShiftFit:
        solution = run.sums.solve(self.config.ridge, known)
        (height, width), dtype = run.sums.grid, run.sums.content.dtype
        observed = run.sums.observed()[0]
        freedom = float(observed.sum() - (observed > 0).sum()) - (height * width - 1 if known is None else 0)
        field, seen = (each.view(*run.sums.period, -1)[:height, :width] for each in (solution.field[0], observed))
        return ShiftFit(
            field=field.to(dtype).contiguous(),
            artifact=solution.artifact[0].view(height, width, -1).to(dtype),
            centres=upload(grids.lattice_centres((height, width), run.sums.period), field.device),
            noise=float(solution.left[0]) / max(freedom, 1.0),
            p_value=p_value,
            found=found,
            config=self.config,
            share=self._share(run.own.view(height, width, 1), run.own_long.view(height, width, 1), seen).to(dtype),
        )

    def _share(self, own: Tensor, long: Tensor, seen: Tensor) -> Tensor:
        """Return F's share (h, w, 1) in the estimate.

        Args:
            own: weights of the image's own tokens.
            long: True for tokens that are outliers by their norm; F replaces them.
            seen: the sum of weights of each content over all windows. If it is too small without the token's own
                weight, the token itself is used.
        """
        share = torch.where(long, 1.0, torch.where(own < OUTLIER, 0.0, self.config.average))
        return torch.where(seen - own < OUTLIER, 0.0, share)


class _ShiftPass:
    """Make one pass over the windows of an image.

    Attributes:
        sums: the sums of the two-way model.
        test: the scores of the test, if there is one.
        own: (n,) weights of the tokens of the first window, the whole image.
        own_long: (n,) True for tokens of the first window that are outliers by their norm.
    """

    def __init__(self, solver: ShiftSolver, views: Iterable[ViewBatch], artifact: Tensor | None, test: bool = True):
        self.solver = solver
        self.test: SignTest | None = None
        self.trust: Trust | None = None
        batches = _checked(views, () if artifact is None else tuple(artifact.shape))
        first_ones, rest = take_views(batches, HELD)
        head = [_windows(*each) for each in first_ones]
        if not head:
            raise ConfigError("there are no views; give at least one batch of (tokens, coords)")
        self.grid, self.period = head[0].grid, head[0].period
        if solver.config.robust:
            tokens, offsets = torch.cat([each.tokens for each in head]), torch.cat([each.offsets for each in head])
            self.trust = Trust(tokens, offsets, self.grid, self.period, solver.config)
        first = head[0].tokens
        self.sums = TwoWay(1, self.grid, self.period, first.shape[2], first)
        if test and artifact is None and solver.config.alarm < 1:
            self.test = SignTest(self.grid, self.period, first.shape[2], first, solver.config.groups)
        self.own = self._add(head[0])[0]
        self.own_long = self.own < 0 if self.trust is None else self.trust.is_long(first[:1])[0]
        for each in head[1:]:
            self._add(each)
        for batch in rest:
            self._add(_windows(*batch))

    def _add(self, windows: _Windows) -> Tensor:
        """Add windows to the sums; return their weights (V, n)."""
        tokens, offsets = windows.tokens, windows.offsets
        if windows.period != self.period:
            raise ConfigError(f"windows of one image lie on grids of periods {self.period} and {windows.period}")
        weights = tokens.new_ones(tokens.shape[:2]) if self.trust is None else self.trust.weights(tokens, offsets)
        plain = self.trust is None  # without weights, all images of a grid share one system
        self.sums.add(tokens[None], offsets, None if plain else weights[None])
        if self.test is not None:
            self.test.add(tokens, offsets, None if plain else weights)
        return weights


class _Windows(NamedTuple):
    """Hold a batch of windows: tokens (V, n, C), offsets (V, 2), and the grid and period that all of them share."""

    tokens: Tensor
    offsets: Tensor
    grid: Size
    period: Size


@lru_cache
def say_if_too_small(grid: Size, alarm: float) -> None:
    """Say once per grid that its images have too few patches for the test to find an artifact."""
    if 2.0 ** (1 - grid[0] * grid[1]) > alarm:
        log.warning(
            "on a grid of %d x %d patches the test cannot find an artifact at a false alarm rate of %g, so such images "
            "are not changed; choose a larger --size, or --product ensembled",
            *grid,
            alarm,
        )


def _windows(tokens: Tensor, coords: Tensor) -> _Windows:
    offsets, period = grids.lattice(coords)
    grid = (tokens.shape[1], tokens.shape[2])
    return _Windows(tokens.flatten(1, 2), offsets, grid, period)


def _checked(views: Iterable[ViewBatch], shape: tuple[int, ...]) -> Iterator[ViewBatch]:
    """Yield batches after checking that all have one shape (h, w, C) and are finite."""
    for tokens, coords in views:
        shape = check_batch(tokens, coords, shape)
        if not torch.isfinite(tokens.sum()):
            raise NonFiniteError("tokens are NaN or infinite; check the weights, or use --dtype float32")
        yield tokens, coords
