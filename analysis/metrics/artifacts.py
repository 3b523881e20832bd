"""Label-free measures of the artifacts in token maps, each a pure function of tokens, and their nulls.

Most metrics are biased or have no natural zero, so a value alone means little: ``with_null`` also computes
the same metric on tokens that carry no position (``shuffled``) or no structure at all (``matched_noise``).
Most of these metrics favour smooth features: read them beside a score that needs labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.metrics.blank import TokensOfImages
from dvt.analysis.metrics.information import mic, most_informative
from dvt.analysis.metrics.nulls import TokenSets, token_maps
from dvt.analysis.metrics.ridge import HeldOut, held_out
from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size
from dvt.tokens import norm_bound

# Standard deviations of a normal variable in one median absolute deviation.
_MAD_TO_SIGMA = 1.4826


def _position_maps(tokens: TokenSets) -> list[Tensor]:
    maps = token_maps(tokens)
    small = [tuple(each.shape[:2]) for each in maps if min(each.shape[:2]) < 2]
    if small:
        raise ShapeError(f"a position metric needs at least 2 x 2 patches, got a grid of {small[0]}")
    return maps


def position_mic(tokens: TokenSets, candidates: int | None = None) -> float:
    """Measure how much the most position-bound channel tells of x, and of y, in [0, 1]; averaged over images.

    1/2 [max_c MIC(f_c, x) + max_c MIC(f_c, y)] with the grid bound B = (hw)^0.6. The maximum over channels biases
    it upwards (to about .25 for 192 channels of noise on 14 x 21 patches), so compare it with its null:
    ``with_null(position_mic, tokens, generator)``. Smoothness raises it as well, to .6 or .7 without any code of
    position, and no null within one image tells the two apart: for smooth maps use :func:`pooled_position_mic`.

    Args:
        tokens: the tokens of one or more images; grids may differ.
        candidates: how many channels are scored for each axis, those with most information on fixed cuts
            (:func:`dvt.analysis.metrics.information.most_informative`); None scores all, which takes 1 s per image.
            The maximum over fewer can only be lower: use the same number for the null.

    Source:
        Denoising Vision Transformers, ECCV 2024, appendix A.4.
    """
    return float(position_mics(tokens, candidates).mean())


def position_mics(tokens: TokenSets, candidates: int | None = None) -> Tensor:
    """Measure :func:`position_mic` of each image, (N,)."""
    scores = []
    for each in _position_maps(tokens):
        centres = grids.grid_centres((each.shape[0], each.shape[1]), each.device)
        scores.append(_largest_mic(each.flatten(0, 1), centres, candidates))
    return torch.stack(scores)


def _largest_mic(features: Tensor, centres: Tensor, candidates: int | None) -> Tensor:
    """Average over x and y the largest MIC that a channel of (n, C) has with them; centres are (..., 2), n in all."""
    best = []
    for axis in centres.reshape(-1, 2).unbind(-1):
        chosen = slice(None) if candidates is None else most_informative(features, axis, candidates)
        best.append(mic(features[:, chosen], axis).max())
    return torch.stack(best).mean()


def pooled_position_mic(tokens: TokenSets, candidates: int | None = 8) -> float:
    """Measure how much the most position-bound channel tells of x, and of y, over all images at once, in [0, 1].

    As :func:`position_mic`, but one channel has to say the same of a position in all images, so what is smooth in each
    in a way of its own cancels. With few images some of it stays, and the same amount stays in its null:
    ``with_null(pooled_position_mic, tokens, generator, null=torus_shifted)``. With one image that null says nothing.

    Args:
        tokens: the tokens of two or more images of one grid shape, the more the better.
        candidates: channels that are scored for each axis, as for :func:`position_mic`; None scores all, which is slow.

    Raises:
        ShapeError: there is one image, or grids differ.

    Source:
        Ours, of the MIC of Denoising Vision Transformers, ECCV 2024, appendix A.4.
    """
    maps = _position_maps(tokens)
    if len(maps) < 2 or len({each.shape[:2] for each in maps}) > 1:
        raise ShapeError(
            f"a pooled metric needs two or more images of one grid, got {len(maps)} on "
            f"{sorted({tuple(each.shape[:2]) for each in maps})}; use position_mic"
        )
    grid = grids.grid_centres((maps[0].shape[0], maps[0].shape[1]), maps[0].device)
    return float(_largest_mic(torch.stack(maps).flatten(0, 2), grid.expand(len(maps), -1, -1, -1), candidates))


def position_decodability(tokens: TokenSets, targets: Sequence[Tensor] | None = None) -> float:
    """Measure the held-out R^2 of a linear probe of a token's position (x, y): the effect that denoising reduces.

    A ridge probe with intercept is fitted on the first half of the images and scored on the others, its strength
    chosen by cross-validation over training images. The halves are contiguous, so that neighbouring frames of a
    film do not end up on both sides. With a single image the halves are random tokens of it: neighbours resemble
    each other, so that number is optimistic and only good beside its null.

    Args:
        tokens: the tokens of one or more images; grids may differ.
        targets: (h, w, K) for each image, what to read instead of the patch centres in [0, 1]^2.

    Returns:
        R^2, the mean over targets: 1 is perfect, 0 no better than their mean; it can be below 0.

    Source:
        Position probes of RASA (linear removal of position), with a ridge and held-out images.
    """
    return float(position_errors(tokens, targets).r2().mean())


def position_errors(tokens: TokenSets, targets: Sequence[Tensor] | None = None, width: int | None = None) -> HeldOut:
    """Compute the squared errors behind :func:`position_decodability`, for each held-out image.

    Args:
        tokens, targets: as for :func:`position_decodability`.
        width: the targets are read in blocks of this many, each by a probe of its own; see
            :func:`dvt.analysis.metrics.ridge.held_out`.
    """
    maps = _position_maps(tokens)
    if targets is None:
        targets = [grids.grid_centres((each.shape[0], each.shape[1]), each.device) for each in maps]
    if [each.shape[:2] for each in targets] != [each.shape[:2] for each in maps]:
        raise ShapeError("targets must be one (h, w, K) tensor for each image, with the grid of its tokens")
    parts = [
        (each.flatten(0, 1), target.to(each.device).flatten(0, 1)) for each, target in zip(maps, targets, strict=True)
    ]
    if len(parts) == 1:
        parts = _random_parts(*parts[0], 2)
    middle = (len(parts) + 1) // 2
    train, test = parts[:middle], parts[middle:]
    if len(train) == 1:
        train = _random_parts(*train[0], 2)
    return held_out(train, test, width)


def _random_parts(features: Tensor, targets: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    return [(features[part], targets[part]) for part in order.tensor_split(count)]


@dataclass(frozen=True)
class NormOutliers:
    """Token norms: the share of outliers and the quantiles of the L2 norm.

    Args:
        share: of tokens on either side beyond the threshold, in [0, 1].
        high_share: of tokens above it; the rest of the share lies below.
        q1: norm at the 1st percentile.
        q50: the median norm.
        q99: norm at the 99th percentile.
        largest: the largest norm.
        bounds: the norms between which a token is ordinary.
    """

    share: float
    high_share: float
    q1: float
    q50: float
    q99: float
    largest: float
    bounds: tuple[float, float] = (0.0, float("inf"))


def norm_outliers(tokens: TokenSets, sigmas: float = 5.0) -> NormOutliers:
    """Find the tokens whose L2 norm lies far from the median norm of all tokens.

    A robust sigma is 1.4826 times the median absolute deviation, and at least a thousandth of the median: norms
    that a layer norm makes equal have no outliers. Norms are skewed, so a few tokens lie beyond 5 sigmas in
    healthy features too; ``matched_noise`` gives the null of ``share``.

    Source:
        Darcet et al., Vision Transformers Need Registers, ICLR 2024 (norm > 150 for DINOv2-g: 2.37 % of tokens);
        the threshold in robust sigmas is ours.
    """
    if sigmas <= 0:
        raise ConfigError(f"sigmas must be positive, got {sigmas}")
    norms = torch.cat([each.norm(dim=-1).flatten() for each in token_maps(tokens)]).double()
    median = norms.median()
    sigma = torch.maximum(_MAD_TO_SIGMA * (norms - median).abs().median(), 1e-3 * median)
    bounds = (float(median - sigmas * sigma), float(median + sigmas * sigma))
    high, low = norms > bounds[1], norms < bounds[0]
    # torch.quantile refuses more than 2^24 values; sorting has no such limit.
    ordered = norms.sort().values
    q1, q50, q99 = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.01, 0.5, 0.99))
    share = float((high | low).double().mean())
    return NormOutliers(share, float(high.double().mean()), q1, q50, q99, float(ordered[-1]), bounds)


def log_norm_outliers(tokens: TokenSets, ratio: float = 2.0, sigmas: float = 5.0) -> Tensor:
    """Measure each image's share (N,) of tokens whose norm is far above the others', also where norms are uneven.

    A token counts when its norm is at least `ratio` times the median of all, and its logarithm more than `sigmas`
    robust sigmas above. Norms of healthy features are skewed, those of filter responses to photographs over a factor
    of five: on the logarithm they have no outliers, while :func:`norm_outliers` counts up to 1 %.
    """
    if ratio <= 1 or sigmas <= 0:
        raise ConfigError(f"ratio must be above 1 and sigmas positive, got {ratio} and {sigmas}")
    norms = [each.norm(dim=-1).flatten().double() for each in token_maps(tokens)]
    bound = norm_bound(torch.cat(norms), sigmas, ratio)
    return torch.stack([(each > bound).double().mean() for each in norms])


def grid_peak(tokens: TokenSets, period: int = 2) -> float:
    """Measure the power at the patch-grid frequencies over the median power around them; near 1 without a grid.

    The frequencies are one cycle in ``period`` tokens along x, along y and along both: with the default 2 the
    stripes and the checkerboard that alternate from patch to patch. Power is that of the map under a Hann window,
    summed over channels, as a share of the image's, averaged over images. Around a frequency means the
    frequencies two and three bins away in either direction, beyond the window's main lobe. The largest of the
    three ratios is returned, which biases it upwards, the more the fewer independent channels and images there are.
    Measured, white noise on 14 x 14 patches (mean, and 95 % of draws below): one image of 1, 4, 16 and 64 channels
    3.1 (7.9), 1.7 (3.4), 1.35 (1.8), 1.2 (1.4); 20 images 1.3 (1.8), 1.2 (1.4), 1.1 (1.15), 1.0 (1.1). Channels of real
    features depend on each other: :func:`matched_noise <dvt.analysis.metrics.nulls.matched_noise>` draws the null that
    belongs to them, ``with_null(grid_peak, tokens, generator, null=matched_noise)``.

    Args:
        tokens: maps of at least 8 x 8 patches.
        period: tokens in one period; patch / stride where patches overlap.
    """
    return float(peak_of(grid_powers(tokens, period).mean(0)))


def grid_powers(tokens: TokenSets, period: int = 2) -> Tensor:
    """Measure each image's share of power at and around the grid frequencies, (N, 3, 7, 7), for :func:`peak_of`."""
    if period < 2:
        raise ConfigError(f"period must be at least 2 tokens, got {period}")
    maps = token_maps(tokens)
    if any(min(each.shape[:2]) < 8 for each in maps):
        raise ShapeError("the grid peak needs maps of at least 8 x 8 patches; use a larger image size")
    return torch.stack([_power_around(each.double(), period) for each in maps])


def peak_of(power: Tensor) -> Tensor:
    """Find the largest of the three ratios of :func:`grid_peak` in powers (..., 3, 7, 7); 1 where there is no power."""
    far = torch.arange(-3, 4).abs()
    around = torch.maximum(far[:, None], far) >= 2
    peak = power[..., 3, 3]
    ratio = peak / power[..., around].median(-1).values.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(peak > 0, ratio, torch.ones_like(ratio)).amax(-1)


def _power_around(tokens: Tensor, period: int) -> Tensor:
    """Measure an (h, w, C) map's power (3, 7, 7) at the grid frequencies (y, x, both) and up to 3 bins around."""
    centred = tokens - tokens.mean((0, 1))
    along_y, along_x = (_waves(n, period).to(centred.device) for n in tokens.shape[:2])
    # One axis after the other, the first of them on real numbers: all at once takes seven times as long.
    height, width, channels = centred.shape
    real = torch.view_as_real(along_y.flatten(0, 1)).movedim(-1, 0).flatten(0, 1)
    rows = (real @ centred.reshape(height, -1)).view(2, -1, width, channels)
    spectrum = (along_x.flatten(0, 1) @ torch.complex(rows[0], rows[1])).view(2, 7, 2, 7, channels).transpose(1, 2)
    power = spectrum.abs().square().sum(-1)
    total = centred.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.stack((power[1, 0], power[0, 1], power[1, 1])) / total


def _waves(count: int, period: int) -> Tensor:
    """Make windowed waves (2, 7, count) at zero and at the grid frequency, each with up to 3 bins around."""
    bins = torch.arange(-3, 4, dtype=torch.float64) / count
    frequencies = torch.stack((bins, bins + 1 / period))
    window = torch.hann_window(count + 1, periodic=True, dtype=torch.float64)[1:]
    phases = -2 * torch.pi * frequencies[..., None] * torch.arange(count, dtype=torch.float64)
    return torch.polar(window.expand_as(phases), phases)


@dataclass(frozen=True)
class ShiftStability:
    """Cosines between tokens of the same image point in shifted views.

    Args:
        p1: cosine at the 1st percentile (the least stable tokens).
        p5: at the 5th.
        p50: the median.
        unmatched: median cosine of tokens of different points; a p50 near it means no agreement at all.
        unmatched_p5: their 5th percentile.
    """

    p1: float
    p5: float
    p50: float
    unmatched: float
    unmatched_p5: float = float("nan")


_SHIFTS = ((0, 1), (1, 0), (1, 1), (2, 3), (4, 4))


@torch.no_grad()
def shift_stability(
    backbone: TokensOfImages,
    image: Tensor,
    size: Size,
    patch: Size,
    stride: Size | None = None,
    shifts: Sequence[tuple[int, int]] = _SHIFTS,
) -> ShiftStability:
    """Measure how much a token changes when only its position in the view changes.

    Windows of one size are cut from a larger image, shifted by whole patches: their common patches hold the same
    pixels at other positions. Near a window's border the context differs too, so 1 is not quite reachable.

    Args:
        backbone: (B, 3, H, W) images in [0, 1] to tokens.
        image: (3, H, W), larger than ``size`` by the largest shift.
        size: (height, width) of the windows in pixels.
        patch: the backbone's patch in pixels.
        stride: pixels between patches; None means the patch.
        shifts: (down, right) in whole patches, none negative.

    Raises:
        ShapeError: the image is too small for the largest shift.

    Source:
        Ours, after PH-Reg's averaging over shifted views.
    """
    windows, places = shifted_windows(image, size, patch, stride, shifts)
    return stability_of(backbone(windows).patches, places)


def shifted_windows(
    image: Tensor, size: Size, patch: Size, stride: Size | None = None, shifts: Sequence[tuple[int, int]] = _SHIFTS
) -> tuple[Tensor, Tensor]:
    """Cut the windows (V, 3, H, W) of :func:`shift_stability`; return their patches' places (V, h, w, 2) too."""
    pixels = [(down * patch[0], right * patch[1]) for down, right in shifts]
    if not pixels or min(min(each) for each in pixels) < 0:
        raise ConfigError(f"shifts must be one or more pairs (down, right) of patches, none negative, got {shifts}")
    need = tuple(side + max(each[axis] for each in pixels) for axis, side in enumerate(size))
    if image.shape[-2] < need[0] or image.shape[-1] < need[1]:
        raise ShapeError(f"windows of {size} with these shifts need an image of {need}, got {tuple(image.shape[-2:])}")
    corners = [(0, 0), *pixels]
    windows = torch.stack([image[:, y : y + size[0], x : x + size[1]] for y, x in corners])
    boxes = grids.boxes_from_pixels(
        torch.tensor([(x, y, x + size[1], y + size[0]) for y, x in corners]), (image.shape[-2], image.shape[-1])
    )
    centres = grids.patch_centres(size, patch, stride).double()
    return windows, grids.view_to_image(centres, boxes, torch.zeros(len(boxes), dtype=torch.bool))


def stability_of(patches: Tensor, places: Tensor) -> ShiftStability:
    """Compute :func:`shift_stability` from the windows' tokens (V, h, w, C) and places (V, h, w, 2)."""
    maps, places = patches.float().flatten(1, 2), places.flatten(1, 2)
    same, other = [], []
    for shifted, where in zip(maps[1:], places[1:], strict=True):
        distance, index = torch.cdist(places[0], where).min(1)
        common = distance < 1e-4
        first, second = maps[0][common.to(maps.device)], shifted[index[common].to(maps.device)]
        same.append(torch.cosine_similarity(first, second, dim=-1))
        other.append(torch.cosine_similarity(first, second.roll(len(second) // 2, 0), dim=-1))
    if not sum(map(len, same)):
        raise ConfigError("the shifts leave no common patch in windows of this size; use smaller ones")
    levels = torch.tensor([0.01, 0.05, 0.5]).double().to(maps.device)
    p1, p5, p50 = torch.cat(same).double().quantile(levels).tolist()
    unmatched = torch.cat(other).double().quantile(levels)
    return ShiftStability(p1, p5, p50, float(torch.cat(other).median()), float(unmatched[1]))
