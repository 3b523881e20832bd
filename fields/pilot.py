"""Fit the first views robustly (a pilot fit), to choose resolution and smoothness and to find outlier tokens (ours).

All channels are mixed into a few random projections, which keep squared lengths on average, so the pilot costs little.
Every later token is compared with the pilot's fit, so robust weights need no second pass over the views. Images of one
grid shape are fitted together, but each has its own choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from dvt import grids
from dvt.devices import upload
from dvt.fields.config import LinearConfig
from dvt.fields.defects import Gate, Screen
from dvt.fields.equations import NormalEquations
from dvt.grids import Size

# Number of random projections that represent all channels.
PILOT_CHANNELS = 32
# The largest affordable number of nodes along the shorter side: the cost grows with its fourth power.
FINEST = 112
# Values of lambda that are tried.
SMOOTHNESS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# One view in this many is held out.
HELD_OUT = 5
# Number of tokens that count as neighbours in the image, including the token itself.
NEIGHBOURS = 9
# Rounds of weighting: each fits with the last round's weights and computes new ones from the residuals.
REWEIGHTS = 2
# The smoothness for computing weights and the artifact, before one is chosen.
MIDDLE = 0.1


class Pilot:
    """Fit the randomly projected tokens of B images.

    Args:
        heads: each image's first views, (tokens (V, n, C), coords (V, n, 2)); the same number for every image.
        grid: (h, w) of a view, n = h w.
        config: settings; if resolution or smoothness is None, it is chosen.
        known: (n, C) artifact of all images, or None to fit one to each.

    Attributes:
        resolution, smoothness: for each image, as given or chosen by the squared error on held-out views.
        error: for each image, the weighted mean of the squared norms of held-out residuals.
    """

    def __init__(
        self,
        heads: Sequence[list[tuple[Tensor, Tensor]]],
        grid: Size,
        config: LinearConfig,
        known: Tensor | None,
    ):
        self.config = config
        self.mix = mix_channels(heads[0][0][0], config.seed)
        self.tokens = torch.stack([torch.cat([self.sketch(tokens) for tokens, _ in head]) for head in heads])
        self.coords = torch.stack([torch.cat([coords for _, coords in head]) for head in heads]).to(self.tokens)
        nodes = node_resolution(grid, 2 * min(grid) + 1)
        self._near, near_nodes = _neighbours(self.coords, nodes)
        artifact = None if known is None else self.sketch(known)
        if artifact is None and self.tokens.shape[1] == 1:
            artifact = torch.zeros_like(self.tokens[0, 0])
        self._screen = Screen(self.tokens, self._near) if config.robust else None
        self._screened = self.tokens.new_ones(self.tokens.shape[:3]) if self._screen is None else self._screen.first
        self._token_weights = self._screened
        #: (B,) True if an image's tokens get robust weights, in addition to the screening.
        self.weighted = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        self.resolution, self.smoothness, self.error = self._choose(grid, artifact)
        left = self._without_defect(self._fit(artifact))
        # (B, rows, columns, 1) the usual norm of a residual near each node, at least the median.
        local = _local(left[..., None], near_nodes, 2)
        self.usual = local.clamp_min(_median(left)[:, None, None]).view(-1, *nodes, 1)

    def sketch(self, tokens: Tensor) -> Tensor:
        """Project tokens or nodes (..., C) onto fewer channels (..., S)."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.to(dtype) @ self.mix.to(dtype)

    def gate(self, image: int) -> Gate | None:
        """Return the gate that recognises an image's defective tokens one by one, or None."""
        if self._screen is None:
            return None
        per_size = self._screen.per_size[image]
        along = self.mix @ per_size.to(self.mix)
        return Gate(along, float(self._screen.middle[image])) if along.any() else None

    def _without_defect(self, left: Tensor) -> Tensor:
        """Set the residuals (B, V, n, ...) of a defect's tokens to zero, so that they do not influence neighbours."""
        keep = self._screened.view(*self._screened.shape, *(1,) * (left.ndim - 3))
        return left * keep

    def groups(self) -> dict[Size, list[int]]:
        """Group the indices of the images by resolution."""
        found: dict[Size, list[int]] = {}
        for image, resolution in enumerate(self.resolution):
            found.setdefault(resolution, []).append(image)
        return found

    def _fit(self, artifact: Tensor | None) -> Tensor:
        """Fit each image with its choices to all of its views; return the norms of the residuals (B, V, n)."""
        self.fields: dict[int, tuple[Tensor, Tensor]] = {}
        left = torch.empty_like(self._token_weights)
        for resolution, images in self.groups().items():
            smoothness = [self.smoothness[image] for image in images]
            tokens, coords, weights = self.tokens[images], self.coords[images], self._token_weights[images]
            fits = _equations(tokens, coords, weights, resolution).solve(smoothness, artifact, self.config.ridge)
            left[images] = _left(tokens, coords, *fits, resolution).norm(dim=-1)
            self.fields.update(zip(images, zip(*fits, strict=True), strict=True))
        return left

    def weights(self, image: int, tokens: Tensor, coords: Tensor) -> Tensor:
        """Compute robust weights (V, n) of an image's tokens (V, n, C); all 1 if the pilot has no residuals."""
        coords, sketched = coords.to(self.tokens), self.sketch(tokens)
        field, artifact = self.fields[image]
        left = _left(sketched[None], coords[None], field[None], artifact[None], self.resolution[image])[0]
        usual = self.usual[image]
        weights = geman_mcclure(left.norm(dim=-1), grids.sample(usual, coords)[..., 0], self.config.cutoff)
        weights = torch.where(usual.any() & self.weighted[image], weights, 1)
        return weights if self._screen is None else weights * self._screen.weights(image, sketched)

    def noise(self, images: list[int], field: Tensor, artifact: Tensor) -> list[float]:
        """Estimate the noise variance of all channels together, from residuals of neighbours in the image.

        It is half the median squared difference of the residuals of two tokens near one image point. Neighbours come
        from different views, so their common part is the field's own error, and cancels (the nugget of the residuals'
        variogram, in geostatistics). The median makes the estimate robust to outlier tokens.

        Args:
            images: indices of B images of one resolution.
            field: (B, nodes, C) their fields.
            artifact: (B, n, C) their artifacts.
        """
        tokens, coords = self.tokens[images], self.coords[images]
        left = _left(tokens, coords, self.sketch(field), self.sketch(artifact), self.resolution[images[0]])
        left = left.flatten(1, 2)
        if left.shape[1] < 2:
            return left.square().sum((1, 2)).tolist()
        near = _pick(left, self._near[images][..., 1])
        return (_median((left - near).square().sum(-1)) / 2).tolist()

    def _choose(self, grid: Size, artifact: Tensor | None) -> tuple[list[Size], list[float], list[float]]:
        """Choose resolution and smoothness; return them with the held-out error.

        The artifact and the weights hardly depend on these two: they are computed once, at a middle resolution. The
        sum of squared differences of neighbouring nodes is the integral of |grad F|^2 at every resolution (in two
        dimensions), so the best smoothness at one is the best at all.
        """
        config = self.config
        images, views, positions = self.tokens.shape[:3]
        sizes = _candidates(grid, views * positions, config.smoothness)
        sizes = sizes if config.resolution is None else [config.resolution]
        choices = SMOOTHNESS if config.smoothness is None else (config.smoothness,)
        resolutions = [node_resolution(grid, size) for size in sizes]
        middle, *others = resolutions
        number = torch.arange(views)
        held = number % HELD_OUT == HELD_OUT // 2
        if not held.any():
            return [middle] * images, [choices[len(choices) // 2]] * images, [0.0] * images
        fitted, held = (upload(number[chosen], self.tokens.device) for chosen in (~held, held))
        equations, artifact = self._choose_weights(fitted, held, artifact, middle)
        values = self.mix.new_tensor(choices)
        errors = self._error(equations, values[:, None].expand(-1, images), artifact, held)
        best, chosen = errors.min(0)
        found = [values[chosen], best]
        found += [self._error(self._equations(fitted, other), found[0], artifact, held) for other in others]
        # One transfer for all choices of all images, since each transfer waits for the GPU.
        smoothness, *table = torch.stack([each.double() for each in found]).tolist()
        bests = [min(zip(image, resolutions, strict=True)) for image in zip(*table, strict=True)]
        return [resolution for _, resolution in bests], smoothness, [error for error, _ in bests]

    def _error(self, equations: NormalEquations, smoothness: Tensor, artifact: Tensor, held: Tensor) -> Tensor:
        """Compute the weighted squared error (..., B) on held-out views, for smoothness (..., B)."""
        field, _ = equations.solve(smoothness, artifact)
        left = _left(self.tokens[:, held], self.coords[:, held], field, artifact, equations.resolution)
        weights = self._token_weights[:, held]
        return (left.square().sum(-1) * weights).sum((-2, -1)) / weights.sum((-2, -1))

    def _choose_weights(
        self, fitted: Tensor, held: Tensor, artifact: Tensor | None, resolution: Size
    ) -> tuple[NormalEquations, Tensor]:
        """Use robust weights in those images whose held-out views a weighted fit predicts better than a plain one.

        The loss is bounded, so that outliers among the held-out tokens count the same for both. In images without
        outliers, weights only remove tokens where the field has most detail; with few views, F would be lost there.

        Returns:
            The equations of the fitted views with the chosen weights, and the artifact (B, n, S) that they give.
        """
        ridge = self.config.ridge
        plain = self._equations(fitted, resolution)
        plain_fit = plain.solve(MIDDLE, artifact, ridge)
        if not self.config.robust:
            return plain, plain_fit[1]
        weighted, fit = plain, plain_fit
        for _ in range(REWEIGHTS):
            self._reweigh(fit, resolution)
            weighted = self._equations(fitted, resolution)
            fit = weighted.solve(MIDDLE, artifact, ridge)
        left, plain_left = (self._held_out(each, held, resolution) for each in (fit, plain_fit))
        scale = 2 * _median(plain_left)[:, None, None].clamp_min(torch.finfo(left.dtype).tiny)
        loss, plain_loss = (_bounded(each / scale) * self._screened[:, held] for each in (left, plain_left))
        self.weighted = loss.sum((1, 2)) < plain_loss.sum((1, 2))
        self._token_weights = torch.where(self.weighted[:, None, None], self._token_weights, self._screened)
        artifact = torch.where(self.weighted[:, None, None], fit[1], plain_fit[1])
        if self.weighted.all() or not self.weighted.any():
            return (weighted if self.weighted.any() else plain), artifact
        return self._equations(fitted, resolution), artifact

    def _held_out(self, fit: tuple[Tensor, Tensor], held: Tensor, resolution: Size) -> Tensor:
        """Compute the norms (B, V, n) of the residuals of held-out tokens."""
        return _left(self.tokens[:, held], self.coords[:, held], *fit, resolution).norm(dim=-1)

    def _reweigh(self, fit: tuple[Tensor, Tensor], resolution: Size) -> None:
        """Compute robust weights (B, V, n) of all tokens, from a fit of some views with the weights so far."""
        odd = self._oddity(self._without_defect(_left(self.tokens, self.coords, *fit, resolution)))
        median = _median(odd)[:, None, None]
        # The second smallest: up to seven outliers among nine neighbours do not raise the usual value there.
        usual = _local(odd[..., None], self._near, 2).view_as(odd).clamp_min(median)
        weights = torch.where(median > 0, geman_mcclure(odd, usual, self.config.cutoff), 1)
        self._token_weights = weights * self._screened

    def _oddity(self, left: Tensor) -> Tensor:
        """Compute the distance (B, V, n) of each residual from the median residual of its neighbours in the image.

        So detail is not mistaken for outliers: neighbours, which come from other views, share the detail for which the
        field is too coarse, but do not share an outlier.
        """
        return (left - _local(left, self._near, (NEIGHBOURS + 1) // 2).view_as(left)).norm(dim=-1)

    def _equations(self, views: Tensor, resolution: Size) -> NormalEquations:
        return _equations(self.tokens[:, views], self.coords[:, views], self._token_weights[:, views], resolution)


def _bounded(ratio: Tensor) -> Tensor:
    """Compute Geman-McClure's loss, 0 to 1, of residuals over their scale."""
    return ratio.square() / (1 + ratio.square())


def geman_mcclure(norm: Tensor, scale: Tensor | float, cutoff: float) -> Tensor:
    """Compute the Geman-McClure weights, in (0, 1], of residuals: 1 / (1 + (norm / (cutoff scale))^2)^2."""
    return (1 + (norm / (cutoff * scale)).square()).pow(-2)


def node_resolution(grid: Size, shorter: int) -> Size:
    """Compute (rows, columns) of nodes, `shorter` along the grid's shorter side, equally spaced in patches."""
    rows, columns = (max(2, round((shorter - 1) * side / min(grid)) + 1) for side in grid)
    return rows, columns


def _candidates(grid: Size, tokens: int, smoothness: float | None) -> list[int]:
    """List the numbers of nodes along the shorter side to try; smoothness is chosen at the first.

    These are four per patch, or as many as are affordable; then two; and six if there are two tokens per node. The
    nodes are spread from border to border, so that these numbers of them do not fall on the whole image's patch
    centres, where a bilinear fit is worst. A field of the largest smoothness has no detail that needs more than two.
    """
    if smoothness is not None and smoothness >= SMOOTHNESS[-1]:
        return [2 * min(grid)]
    first = next((multiple for multiple in (4, 3) if multiple * min(grid) <= FINEST), 2)
    rows, columns = node_resolution(grid, 6 * min(grid))
    fine = [6] if min(rows, columns) <= FINEST and 2 * rows * columns <= tokens else []
    return [multiple * min(grid) for multiple in dict.fromkeys((first, 2, *fine))]


def _equations(tokens: Tensor, coords: Tensor, weights: Tensor, resolution: Size) -> NormalEquations:
    equations = NormalEquations(len(tokens), resolution, tokens.shape[2], tokens.shape[3], tokens)
    equations.add(tokens, coords, weights)
    return equations


def _left(sketched: Tensor, coords: Tensor, field: Tensor, artifact: Tensor, resolution: Size) -> Tensor:
    """Compute the residuals (..., B, V, n, S) of projected tokens (B, V, n, S) at coords (B, V, n, 2).

    The field is (..., B, nodes, S), with leading dimensions for several fields; the artifact is (B, n, S).
    """
    field = field.to(sketched)
    index, weight = grids.interpolation(coords, resolution)
    corners = _pick(field, index.flatten(1)).unflatten(-2, index.shape[1:])
    return sketched - artifact.to(sketched)[:, None] - (corners * weight[..., None]).sum(-2)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Gather, from values (..., B, N, S), the rows at index (B, *K) of each image's N rows: (..., B, *K, S)."""
    first = values.shape[-2] * torch.arange(len(index), device=index.device)
    return values.flatten(-3, -2)[..., index + first.view(-1, *(1,) * (index.ndim - 1)), :]


def _median(values: Tensor) -> Tensor:
    """Take the median (B,) of each image's values (B, ...)."""
    return values.flatten(1).median(1).values


def _local(values: Tensor, near: Tensor, rank: int) -> Tensor:
    """Find the rank-th smallest (B, M, S) of the tokens' values (B, V, n, S) over neighbours (B, M, k)."""
    rest = [_pick(values.flatten(1, 2), index) for index in near.unbind(-1)]
    # Selecting by minima is exact and, for so few neighbours, many times faster than sorting.
    for _ in range(min(rank, len(rest)) - 1):
        for i in range(len(rest) - 1):
            rest[i], rest[i + 1] = torch.maximum(rest[i], rest[i + 1]), torch.minimum(rest[i], rest[i + 1])
        rest.pop()
    return reduce(torch.minimum, rest)


def _neighbours(coords: Tensor, nodes: Size) -> tuple[Tensor, Tensor]:
    """Find the indices of the nearest tokens of every token (B, V n, k) and of every node (B, rows * columns, k)."""
    places = coords.flatten(1, 2).cpu().numpy()
    points = [image.tobytes() for image in places]
    found = {
        each: [upload(near, coords.device).long() for near in _search(each, places.dtype.str, nodes)]
        for each in dict.fromkeys(points)
    }
    tokens, others = (torch.stack(part) for part in zip(*(found[each] for each in points), strict=True))
    return tokens, others


@lru_cache(maxsize=4)
def _search(points: bytes, dtype: str, nodes: Size) -> tuple[Tensor, Tensor]:
    """Search the neighbours in one image. The result is cached: images of one size share their views' coordinates."""
    places = np.frombuffer(points, dtype).reshape(-1, 2)
    tree, count = cKDTree(places), min(NEIGHBOURS, len(places))
    targets = places, grids.node_coords(nodes).view(-1, 2).numpy()
    found = [tree.query(each, k=[*range(1, count + 1)], workers=torch.get_num_threads())[1] for each in targets]
    near, near_nodes = (torch.from_numpy(each.astype(np.int32)) for each in found)
    return near, near_nodes


def mix_channels(tokens: Tensor, seed: int) -> Tensor:
    """Make orthonormal columns (C, S), scaled so that the squared length of a token is kept on average."""
    channels = tokens.shape[-1]
    width = min(PILOT_CHANNELS, channels)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(channels, width, generator=generator, dtype=torch.float64)).Q
    return upload(basis * (channels / width) ** 0.5, tokens.device)
