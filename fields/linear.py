"""The closed-form solver: F on a bilinear grid and G free per position, by streaming normal equations (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.fields.batches import ViewBatch, check_batch, take_views
from dvt.fields.config import LinearConfig
from dvt.fields.decomposition import Fit
from dvt.fields.defects import Gate
from dvt.fields.equations import NormalEquations, solve_artifact
from dvt.fields.pilot import Pilot, geman_mcclure
from dvt.grids import Size


@dataclass(frozen=True)
class LinearFit(Fit):
    """Hold the result of :class:`LinearSolver`; :class:`~dvt.fields.decomposition.Fit` states the laws.

    Args:
        nodes: (rows, columns, C) the field's values.
        artifact: (h, w, C).
        residual_map: (C, C) and residual_mean (C,): h(y) = (y - mean) @ map for tokens of a defect; None without one.
        gate: selects these tokens; h of all others is zero.
        noise: mean squared norm of the part of a token that other views of the same point do not share.
        error: mean squared norm of the residual of tokens in a view that was not fitted: noise plus F's error.
        config: the settings, with resolution and smoothness as chosen.
    """

    nodes: Tensor
    artifact: Tensor
    residual_map: Tensor | None
    residual_mean: Tensor
    noise: float
    error: float
    config: LinearConfig
    gate: Gate | None = None

    def semantic(self, coords: Tensor) -> Tensor:
        """Evaluate F (..., C) at image coordinates (..., 2)."""
        return grids.sample(self.nodes, coords)

    def residual(self, raw: Tensor) -> Tensor:
        """Compute the residual h (..., C) of raw tokens (..., C)."""
        if self.residual_map is None or self.gate is None:
            return torch.zeros_like(raw)
        return self.gate(raw) * ((raw - self.residual_mean) @ self.residual_map)

    def field_weight(self, raw: Tensor, coords: Tensor) -> Tensor | float:
        """Weigh F by variances, (h, w, 1): noise / (noise + F's error), and 1 for outlier tokens.

        Their sum is the larger of two mean squared residuals: that of held-out tokens, and that of this map, whose
        scale may differ from that of the views.
        """
        if not self.config.blend:
            return 1.0
        left = (raw - self.artifact - self.residual(raw) - self.semantic(coords)).square().sum(-1, keepdim=True)
        typical = left.median().clamp_min(torch.finfo(left.dtype).tiny)
        inlier = geman_mcclure(left.sqrt(), typical.sqrt(), self.config.cutoff)
        if self.gate is not None:
            inlier = inlier * (1 - self.gate(raw))
        floor = max(self.error, torch.finfo(left.dtype).tiny)
        both = ((inlier * left).sum() / inlier.sum()).clamp_min(floor)
        return 1 - inlier * (1 - (self.noise / both).clamp(0, 1))


class LinearSolver:
    """Split the features of one image's views into F, G and h by least squares.

    Memory does not depend on the number of views: they are read once and only sums are kept.

    Args:
        config: settings; the defaults choose resolution and smoothness from the data.
    """

    def __init__(self, config: LinearConfig | None = None):
        self.config = config or LinearConfig()

    def fit(self, views: Iterable[ViewBatch], artifact: Tensor | None = None) -> LinearFit:
        """Fit one image.

        Args:
            views: batches of (tokens (V, h, w, C), coords (V, h, w, 2)); read once.
            artifact: (h, w, C) a known G, for example one that many images share, which is centred first; only F and
                h are fitted then. A single view cannot separate F from G, so G is zero.

        Raises:
            ShapeError: batches disagree in grid or channels, or with the artifact.
            NonFiniteError: a token is NaN or infinite.
            ConfigError: there is no view.
        """
        return self.fit_many([views], artifact)[0]

    def fit_many(self, views: Sequence[Iterable[ViewBatch]], artifact: Tensor | None = None) -> list[LinearFit]:
        """Fit several images at once: to rounding, :meth:`fit` of each, in their order.

        On a GPU this takes little longer than one image; every image keeps its own resolution and smoothness. The
        first views of all images are read and held, image after image, then the others of each.

        Args:
            views: for each image its batches, as in :meth:`fit`; grid, channels and the number of views, as far as
                the pilot looks at them, are the same for all.
            artifact: (h, w, C) a known G, for all of them, as in :meth:`fit`.

        Raises:
            ShapeError: images or batches disagree in grid, channels or number of views, or with the artifact.
            NonFiniteError: a token of any image is NaN or infinite.
            ConfigError: an image has no view.
        """
        if not views:
            return []
        run = _LinearPass(self.config, views, artifact)
        fits: dict[int, LinearFit] = {}
        for resolution, images in run.pilot.groups().items():
            smoothness = [run.pilot.smoothness[image] for image in images]
            field, estimate = run.equations[resolution].solve(smoothness, run.known, self.config.ridge)
            noises = run.pilot.noise(images, field, estimate)
            for image, *parts in zip(images, field, estimate, noises, strict=True):
                fits[image] = self._result(run, image, *parts)
        return [fits[image] for image in range(len(views))]

    def _result(self, run: _LinearPass, image: int, field: Tensor, estimate: Tensor, noise: float) -> LinearFit:
        resolution, smoothness = run.pilot.resolution[image], run.pilot.smoothness[image]
        outliers = run.outliers[image]
        found = outliers.residual_map(field, estimate, resolution, self.config) if outliers else None
        residual_map, mean = found or (None, estimate.new_zeros(estimate.shape[-1]))
        dtype = torch.promote_types(run.dtype, torch.float32)
        return LinearFit(
            nodes=field.view(*resolution, -1).to(dtype),
            artifact=estimate.view(*run.grid, -1).to(dtype),
            residual_map=None if residual_map is None else residual_map.to(dtype),
            residual_mean=mean.to(dtype),
            noise=noise,
            error=run.pilot.error[image],
            config=replace(self.config, resolution=min(resolution), smoothness=smoothness),
            gate=run.gates[image],
        )

    def artifact_equations(self, views: Iterable[ViewBatch]) -> tuple[Tensor, Tensor]:
        """Compute an image's share of a shared artifact's equations, (n, n) and (n, C); add those of one grid.

        :meth:`solve_shared` solves the sums.
        """
        run = _LinearPass(self.config, [views], None)
        schur, rhs = run.equations[run.pilot.resolution[0]].artifact_equations(run.pilot.smoothness[0])
        return schur[0], rhs[0]

    def solve_shared(self, equations: tuple[Tensor, Tensor], grid: Size) -> Tensor:
        """Solve the sums of many images' equations for the artifact (h, w, C), float32, that they share."""
        return solve_artifact(*equations, self.config.ridge).float().view(*grid, -1)


class _LinearPass:
    """One pass over the views of some images: the pilot's choices and the sums."""

    def __init__(self, config: LinearConfig, views: Sequence[Iterable[ViewBatch]], artifact: Tensor | None):
        self.config = config
        shape: tuple[int, ...] = () if artifact is None else tuple(artifact.shape)
        images: list[_ImageViews] = []
        for each in views:
            images.append(_ImageViews(each, shape, config.pilot_views))
            shape = images[-1].shape
        seen = {image.seen for image in images}
        if len(seen) > 1:
            raise ShapeError(
                f"images that are fitted together need equally many views, at least up to {config.pilot_views}; they "
                f"have {sorted(seen)}; fit them one by one"
            )
        like = images[0].head[0][0].new_empty(0)
        positions, channels = shape[0] * shape[1], shape[2]
        self.grid: Size = (shape[0], shape[1])
        self.dtype = like.dtype
        self.known = None if artifact is None else _centred(artifact.flatten(0, 1))
        self.pilot = Pilot([image.head for image in images], self.grid, config, self.known)
        if self.known is None and seen == {1}:
            self.known = like.new_zeros(positions, channels)
        self.equations = {
            resolution: NormalEquations(len(members), resolution, positions, channels, like)
            for resolution, members in self.pilot.groups().items()
        }
        self.gates = [self.pilot.gate(number) for number in range(len(images))]
        # h is asked for tokens of a defect alone: without a gate, no moments are needed.
        self.outliers = [_Outliers(channels, like) if config.residual and gate else None for gate in self.gates]
        for number, image in enumerate(images):
            self._accumulate(number, image)

    def _accumulate(self, image: int, views: _ImageViews) -> None:
        config, resolution = self.config, self.pilot.resolution[image]
        equations = self.equations[resolution].image(self.pilot.groups()[resolution].index(image))
        outliers = self.outliers[image]
        for tokens, coords in views:
            weights = self.pilot.weights(image, tokens, coords) if config.robust else None
            equations.add(tokens[None], coords[None], None if weights is None else weights[None])
            if outliers is not None and weights is not None:
                outliers.add(tokens, coords, weights)


def _centred(artifact: Tensor) -> Tensor:
    """Centre (n, C) to mean zero over positions: the constant is F's, whatever a known artifact holds.

    One that is centred already, to rounding, stays as it is: what is subtracted is what was given, bit for bit.
    """
    mean = artifact.mean(0, dtype=torch.float64).to(artifact)
    rounding = 10 * torch.finfo(torch.float16).eps * artifact.abs().amax(0)
    return torch.where((mean.abs() <= rounding).all(), artifact, artifact - mean)


class _ImageViews:
    """The views of one image, checked and flattened to (V, n, C) and (V, n, 2), to be iterated once.

    Args:
        views: batches as in :meth:`LinearSolver.fit`.
        shape: (h, w, C) that they must have; () if they are the first.
        count: how many views are read at once, and held until they are iterated; `seen` is how many there were.
    """

    def __init__(self, views: Iterable[ViewBatch], shape: tuple[int, ...], count: int):
        self.shape = shape
        self._finite: list[Tensor] = []
        self._outside: list[Tensor] = []
        self.head, self._rest = take_views(self._read(views), count)
        self.seen = sum(len(tokens) for tokens, _ in self.head)
        if not self.seen:
            raise ConfigError("there are no views; give at least one batch of (tokens, coords)")
        self._check()

    def __iter__(self) -> Iterator[ViewBatch]:
        while self.head:
            yield self.head.pop(0)
        yield from self._rest
        self._check()

    def _read(self, views: Iterable[ViewBatch]) -> Iterator[ViewBatch]:
        for tokens, coords in views:
            self.shape = check_batch(tokens, coords, self.shape)
            self._finite.append(torch.isfinite(tokens.sum() + coords.sum().to(tokens)))
            self._outside.append(((coords - 0.5).abs() > 0.5 + 1e-4).any())
            yield tokens.flatten(1, 2), coords.to(tokens.device).flatten(1, 2)

    def _check(self) -> None:
        # Reading a batch's answer waits for the GPU: it is done for many batches at once.
        if self._finite and not torch.stack(self._finite).all():
            raise NonFiniteError("tokens are NaN or infinite; check the weights, or use --dtype float32")
        if self._outside and torch.stack(self._outside).any():
            raise ConfigError(
                "a view lies beyond the image, as shifted windows do: the field over scales takes crops alone; draw "
                "views with ViewConfig(kind='crops'), or solve shifts by ShiftSolver"
            )
        self._finite.clear()
        self._outside.clear()


class _Outliers:
    """The outlier tokens and the moments of all tokens, from which h follows.

    h is asked for what F and G leave of an outlier token and for nothing on every other token, so it cannot take away
    detail that the field is merely too coarse to hold.
    """

    LIMIT = 20_000

    def __init__(self, channels: int, like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.square = torch.zeros(channels, channels, device=like.device, dtype=dtype)
        self.total = torch.zeros(channels, device=like.device, dtype=torch.float64)
        self.count = 0
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self.outliers = 0

    def add(self, tokens: Tensor, coords: Tensor, weights: Tensor) -> None:
        """Add views with their robust weights: tokens (V, n, C), coords (V, n, 2), weights (V, n)."""
        flat = tokens.flatten(0, 1).to(self.square.dtype)
        self.square += flat.T @ flat
        self.total += flat.sum(0, dtype=torch.float64)
        self.count += len(flat)
        if self.outliers < self.LIMIT:
            view, position = (weights < 0.25).nonzero(as_tuple=True)
            self.outliers += len(view)
            self.kept.append((tokens[view, position], coords[view, position], position))

    def residual_map(
        self, field: Tensor, artifact: Tensor, resolution: Size, config: LinearConfig
    ) -> tuple[Tensor, Tensor] | None:
        """Find B (C, C) of the least squared error of (y - mean) B over all tokens plus a ridge, and the mean (C,).

        None without outliers.
        """
        if not self.outliers:
            return None
        tokens, coords, position = (torch.cat(part) for part in zip(*self.kept, strict=True))
        tokens = tokens.double()
        target = tokens - artifact[position] - grids.sample(field.view(*resolution, -1), coords)
        mean = self.total / self.count
        covariance = self.square.double() - self.count * torch.outer(mean, mean)
        # Where only the first outliers were kept, they stand for all of them.
        ridge = config.residual_ridge * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
        system = covariance + ridge * torch.eye(len(covariance)).to(covariance)
        return torch.linalg.solve(system, (tokens - mean).T @ target), mean
