"""Measure whether a token is matched to the same image point in a turned or cropped view, under known warps.

No labels are needed and the truth is exact. But a view keeps much of the picture's layout, so tokens that encode only
their position also match some points. :class:`Matches` reports the scores of chance and of position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.metrics.nulls import token_maps
from dvt.analysis.probes.probe import Centres, Maps, Probe
from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size
from dvt.progress import Progress
from dvt.text import counted
from dvt.tokens import Tokens
from dvt.views import resize

WARP_KINDS = ("crop", "rotation", "scale")
"""Kinds of warps: a crop at a random place, a rotation about the centre, an enlargement about the centre."""

# Cosines that differ by less count as equal, because the difference may be rounding.
_TIE = 1e-9


@dataclass(frozen=True)
class WarpConfig:
    """Hold the settings of an image's warped views; all lie inside the image and keep its aspect ratio.

    Args:
        crops: number of crops at random places.
        crop_zoom: smallest and largest side of a crop, as a share of the image's.
        rotations: number of views rotated about the image's centre, as large as fits.
        degrees: smallest and largest angle, in either direction.
        scales: number of enlarged views about the image's centre.
        scale_zoom: smallest and largest side that such a view shows, as a share of the image's.
        seed: seed of the generator; the same seed draws the same warps.
    """

    crops: int = 2
    crop_zoom: tuple[float, float] = (0.5, 0.8)
    rotations: int = 2
    degrees: tuple[float, float] = (10.0, 45.0)
    scales: int = 2
    scale_zoom: tuple[float, float] = (0.4, 0.8)
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.crops, self.rotations, self.scales)
        if min(counts) < 0 or not sum(counts):
            raise ConfigError(f"crops, rotations and scales must be 0 or more and one of them positive, got {counts}")
        for name, (low, high) in {"crop_zoom": self.crop_zoom, "scale_zoom": self.scale_zoom}.items():
            if not 0 < low <= high <= 1:
                raise ConfigError(f"{name} must satisfy 0 < smallest <= largest <= 1, got {(low, high)}")
        if not 0 <= self.degrees[0] <= self.degrees[1] <= 180:
            raise ConfigError(f"degrees must satisfy 0 <= smallest <= largest <= 180, got {self.degrees}")


def draw_warps(size: Size, config: WarpConfig, generator: torch.Generator) -> Tensor:
    """Draw random warps of an image of (H, W) pixels: affine maps (V, 2, 3) from a view's coordinates to the image's.

    They are drawn on the CPU, in the order crops, rotations, scales; see :func:`dvt.grids.rotated_view`.
    """
    kinds = ("crop",) * config.crops + ("rotation",) * config.rotations + ("scale",) * config.scales
    return torch.stack([_draw(kind, size, config, generator) for kind in kinds])


def kind_of(matrix: Tensor) -> str:
    """Name the kind of a (2, 3) map: "rotation" if it turns, "scale" if it keeps the centre, otherwise "crop"."""
    if float(matrix[0, 1].abs() + matrix[1, 0].abs()) > 1e-9:
        return "rotation"
    centre = torch.tensor([0.5, 0.5], dtype=matrix.dtype)
    return "scale" if torch.allclose(grids.move(centre, matrix), centre, atol=1e-9) else "crop"


def _draw(kind: str, size: Size, config: WarpConfig, generator: torch.Generator) -> Tensor:
    share, x, y, side = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if kind == "rotation":
        degrees = math.copysign(_between(config.degrees, share), side - 0.5)
        zoom = 1 / max(1.0, *grids.frame_reach(size, degrees))
        return grids.rotated_view(size, degrees, zoom)
    if kind == "scale":
        return grids.rotated_view(size, 0.0, _between(config.scale_zoom, share))
    zoom = _between(config.crop_zoom, share)
    centre = (_between((zoom / 2, 1 - zoom / 2), x), _between((zoom / 2, 1 - zoom / 2), y))
    return grids.rotated_view(size, 0.0, zoom, centre)


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + share * (limits[1] - limits[0])


def warped_images(image: Tensor, warps: Tensor, size: Size) -> Tensor:
    """Make model inputs (1 + V, 3, H', W'): the whole image, then its warped views, cut from the image as loaded.

    Args:
        image: (3, H, W) in [0, 1].
        warps: (V, 2, 3) warps drawn for an image of the same aspect ratio.
        size: (H', W') of the model input.
    """
    if image.ndim != 3:
        raise ShapeError(f"an image has shape (3, H, W), got {tuple(image.shape)}")
    pixels = grids.grid_centres(size, device=image.device).double()
    views = []
    for matrix in warps:
        # Shrink the source so that points of the view lie about one pixel of it apart, which avoids aliasing.
        zoom = float(torch.linalg.det(matrix[:, :2]).abs().sqrt())
        useful = [min(have, math.ceil(side / zoom)) for have, side in zip(image.shape[1:], size, strict=True)]
        views.append(grids.sample_pixels(resize(image, (useful[0], useful[1])), grids.move(pixels, matrix)))
    return torch.stack([resize(image, size), *views])


@dataclass(frozen=True)
class Matches:
    """Hold how well the patches of a view are matched to their place in the image; all are shares in [0, 1].

    Args:
        pck: share of matches whose patch is centred near enough to the true place.
        mutual: share of matches that also hold backwards. For noise of n patches it is n / (2n - 1), about a half, and
            enlarged views cannot reach 1, because several of their patches share one of the image: compare it between
            features only.
        mutual_right: share of matches that do both.
        chance: PCK of a random patch.
        position: PCK of the patch at the same place of the grid, as for tokens that encode only their position.
        ceiling: PCK of the nearest patch; below 1 only if patches are large compared with the threshold.
    """

    pck: float
    mutual: float
    mutual_right: float
    chance: float
    position: float
    ceiling: float


def match(
    image: Tensor, view: Tensor, matrix: Tensor, threshold: float = 0.1, centres: Tensor | None = None
) -> Matches:
    """Match each patch of a warped view to the patch of the image whose token has the largest cosine.

    A match is right if that patch's centre lies within ``threshold`` times the longer side from the true place,
    measured in patches. If several patches are equally similar, the score is the mean over them. Patches of the view
    whose true place lies outside the image are left out.

    Args:
        image: (h, w, C) tokens of the whole image.
        view: (h, w, C) tokens of the warped view.
        matrix: (2, 3) map from the view's coordinates to the image's.
        threshold: share of the longer side, positive.
        centres: (h, w, 2) patch centres, if patches overlap; None means that the grid tiles the image.

    Raises:
        ShapeError: the maps are empty or differ in shape, or the view shows nothing of the image.
        NonFiniteError: a token is NaN or infinite.

    Source:
        PCK as in Yang and Ramanan, Articulated Human Detection with Flexible Mixtures of Parts, TPAMI 2013;
        the warps and the baselines are ours.

    >>> tokens = torch.eye(16 * 16).view(16, 16, -1)
    >>> same = match(tokens, tokens, grids.rotated_view((64, 64), degrees=0, zoom=1))
    >>> same.pck, same.mutual, round(same.chance, 3)
    (1.0, 1.0, 0.032)
    """
    if threshold <= 0:
        raise ConfigError(f"threshold must be a positive share of the longer side, got {threshold}")
    matched, back = _matches(view, image)
    inside, right = _truth((image.shape[0], image.shape[1]), matrix, threshold, centres)
    both = matched * back
    return Matches(
        pck=float((matched * right)[inside].sum(1).mean()),
        mutual=float(both[inside].sum(1).mean()),
        mutual_right=float((both * right)[inside].sum(1).mean()),
        chance=float(right[inside].mean()),
        position=float(right.diagonal()[inside].mean()),
        ceiling=float(right[inside].amax(1).mean()),
    )


def _truth(grid: Size, matrix: Tensor, threshold: float, centres: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find which patches of the view lie in the image (n,), and which matches with the image's patches are right."""
    places = grids.grid_centres(grid) if centres is None else centres
    if tuple(places.shape) != (*grid, 2):
        raise ShapeError(f"centres {tuple(places.shape)} do not belong to maps of {grid} patches")
    places = places.flatten(0, 1).double().cpu()
    truth = grids.move(places, matrix.cpu())
    inside = ((truth >= 0) & (truth <= 1)).all(1)
    if not bool(inside.any()):
        raise ShapeError("the view shows nothing of the image, so there is nothing to match; check the warp's matrix")
    sides = torch.tensor([grid[1], grid[0]], dtype=torch.float64)
    # With a tolerance, so that rounding does not decide about places exactly at the threshold.
    near = torch.cdist(truth * sides, places * sides) <= threshold * max(grid) * (1 + 1e-6)
    return inside, near.double()


def _matches(view: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the probabilities (n, n) of matching a view's patch to an image's (rows sum to 1), and back (columns)."""
    if view.ndim != 3 or view.shape != image.shape or not view.numel():
        raise ShapeError(
            f"image and view need token maps (h, w, C) of one shape, not empty; got {tuple(image.shape)} and "
            f"{tuple(view.shape)}"
        )
    pair = [each.flatten(0, 1).double().cpu() for each in token_maps([Tokens.of(view), Tokens.of(image)])]
    first, second = (torch.nn.functional.normalize(each, dim=1) for each in pair)
    cosines = first @ second.T
    there = (cosines >= cosines.amax(1, keepdim=True) - _TIE).double()
    back = (cosines >= cosines.amax(0, keepdim=True) - _TIE).double()
    return there / there.sum(1, keepdim=True), back / back.sum(0, keepdim=True)


class Correspondence(Probe):
    """Match nearest neighbours, as a probe; nothing is fitted.

    The "map" of an image is (1 + V, h, w, C): the whole image's tokens, then its views'. Its target are the warps
    (V, 2, 3) from :func:`draw_warps`.

    Args:
        threshold: largest distance of a right match, as a share of the longer side.
        centres: maps a grid (h, w) to its patch centres (h, w, 2), if patches overlap; by default the grid tiles the
            image.
    """

    metric = "PCK"
    seeded = True

    def __init__(self, threshold: float = 0.1, centres: Centres = grids.grid_centres) -> None:
        self.threshold = threshold
        self.centres = centres

    def fit(self, tokens: Maps, targets: Sequence[Tensor]) -> Correspondence:
        """Do nothing, because matching has no parameters."""
        return self

    def predict(self, tokens: Maps, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Find for each image the coordinates in [0, 1] of each view patch's match (V, h, w, 2), the first in ties.

        `sizes` is ignored.
        """
        return [self._places(tokens[i]) for i in range(len(tokens))]

    def _places(self, views: Tensor) -> Tensor:
        grid = (views.shape[1], views.shape[2])
        picks = [_matches(view, views[0])[0].argmax(1).view(grid) for view in views[1:]]
        return self.centres(grid).flatten(0, 1)[torch.stack(picks)]

    def sufficient_statistics(self, tokens: Maps, targets: Sequence[Tensor]) -> Tensor:
        """Count each image's views of each of :data:`WARP_KINDS`, and add up their :class:`Matches`.

        Returns:
            (N, 3, 7): the number of views, then the sums in the order of the fields.

        Raises:
            ShapeError: counts or shapes differ.
        """
        if not len(tokens) or len(tokens) != len(targets):
            raise ShapeError(
                f"{counted(len(tokens), 'image')} came with the warps of {len(targets)}; give one of each per image"
            )
        return torch.stack([self._image_statistics(tokens[i], targets[i]) for i in range(len(tokens))])

    def _image_statistics(self, views: Tensor, warps: Tensor) -> Tensor:
        if views.ndim != 4 or tuple(warps.shape) != (len(views) - 1, 2, 3) or not len(warps):
            raise ShapeError(
                f"tokens {tuple(views.shape)} must be (1 + V, h, w, C) for warps (V, 2, 3), at least one; "
                f"got warps {tuple(warps.shape)}"
            )
        centres = self.centres((views.shape[1], views.shape[2]))
        total = torch.zeros(len(WARP_KINDS), 7, dtype=torch.float64)
        for view, matrix in zip(views[1:], warps, strict=True):
            found = match(views[0], view, matrix, self.threshold, centres)
            total[WARP_KINDS.index(kind_of(matrix))] += torch.tensor([1.0, *astuple(found)], dtype=torch.float64)
        return total

    @staticmethod
    def summarise(statistics: Tensor) -> dict[str, Tensor]:
        """Average :class:`Matches` over views; `mutual PCK` is the share of right ones among the mutual matches.

        Chance, position and ceiling do not depend on tokens. PCK and position are also given for each kind of warp.
        """
        total = statistics.sum(-2)
        pck, mutual, both, chance, position, ceiling = (total[..., 1:] / total[..., :1]).unbind(-1)
        scores = {"PCK": pck, "mutual": mutual, "mutual PCK": both / mutual}
        scores |= {"chance PCK": chance, "position PCK": position, "ceiling PCK": ceiling}
        for kind, values in zip(WARP_KINDS, statistics.unbind(-2), strict=True):
            if bool(values[..., 0].any()):
                shares = values[..., 1:] / values[..., :1]
                scores |= {f"PCK {kind}": shares[..., 0], f"position PCK {kind}": shares[..., 4]}
        return scores


@torch.no_grad()
def correspondence(
    backbone: Callable[[Tensor], Tokens],
    images: Iterable[Tensor],
    input_size: Callable[[Size], Size],
    config: WarpConfig | None = None,
    variants: Mapping[str, Callable[[Tokens], Tokens]] | None = None,
    probe: Correspondence | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Compare raw features and variants of them on the same warped views, with one pass of the backbone for all.

    Args:
        backbone: maps (B, 3, H', W') images in [0, 1] to tokens.
        images: each (3, H, W) in [0, 1]; read once, one at a time.
        input_size: maps an image's (H, W) to the (H', W') of the model input, as
            :meth:`dvt.backbones.Backbone.input_size`.
        config: settings of the warps.
        variants: functions of tokens by name, for example denoisers; "raw" is always included.
        probe: settings of the matching.
        progress: called with (what, done, total); total is 0 if the number of images is not known.

    Returns:
        For each variant, the statistics (N, 3, 7) of each image; ``Correspondence.summarise(statistics.sum(0))`` gives
        its scores.

    Raises:
        ShapeError: there is no image.
    """
    config, probe = config or WarpConfig(), probe or Correspondence()
    ways = {"raw": lambda tokens: tokens, **(variants or {})}
    generator = torch.Generator().manual_seed(config.seed)
    total = len(images) if isinstance(images, Sequence) else 0
    found: dict[str, list[Tensor]] = {name: [] for name in ways}
    for done, image in enumerate(images, 1):
        shape = (image.shape[-2], image.shape[-1])
        warps = draw_warps(shape, config, generator)
        tokens = backbone(warped_images(image, warps, input_size(shape)))
        for name, way in ways.items():
            found[name].append(probe.sufficient_statistics([way(tokens).patches], [warps])[0])
        if progress is not None:
            progress("correspondence", done, total)
    if not found["raw"]:
        raise ShapeError("no image was given; correspondence needs at least one")
    return {name: torch.stack(each) for name, each in found.items()}
