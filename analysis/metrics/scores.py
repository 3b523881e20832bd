"""Make rows of a table from the metrics: a value, its null, and a bootstrap interval over images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.metrics import artifacts as metrics
from dvt.analysis.metrics.blank import blank_correlation, blank_energy
from dvt.analysis.metrics.intervals import RESAMPLES, central_interval, resample_counts
from dvt.analysis.metrics.nulls import Score, matched_noise, shuffled, token_maps, torus_shifted, with_null
from dvt.analysis.metrics.positions import PositionShare, score_of
from dvt.errors import ShapeError
from dvt.text import counted
from dvt.tokens import Tokens

# Several levels of grey, so that there is a mean over them.
GREYS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Metric:
    """Describe a metric, for tables.

    Args:
        title: short name.
        meaning: one line, with unit and range.
        better: "lower" or "higher", the direction of fewer artifacts.
    """

    title: str
    meaning: str
    better: str


METRICS = {
    "position_own": Metric(
        "Position share",
        "share of the variance within an image that depends on the patch position when the content moves, at most 1",
        "lower",
    ),
    "position_shared": Metric(
        "Position share, same in all",
        "the part of that share that is the same in all images, which one subtracted map would remove, at most 1",
        "lower",
    ),
    "position_r2": Metric("Position R²", "held-out R² of a linear probe that reads (x, y), at most 1", "lower"),
    "position_mic": Metric("Position MIC", "information of the best channel on x and y, 0 to 1", "lower"),
    "pooled_mic": Metric(
        "Pooled position MIC",
        "one channel's information over all images; its null moves each map around, 0 to 1",
        "lower",
    ),
    "outlier_share": Metric("Norm outliers", "share of tokens whose norm is beyond 5 robust sigmas, 0 to 1", "lower"),
    "norm_spread": Metric("Norm p99/p50", "99th percentile of the norm over the median, from 1", "lower"),
    "shift_p50": Metric("Shift cosine p50", "median cosine of one image point in shifted windows, at most 1", "higher"),
    "shift_p5": Metric("Shift cosine p5", "5th percentile of that cosine", "higher"),
    "blank_energy": Metric("Blank energy", "share of the response to a grey image that varies, 0 to 1", "lower"),
    "blank_correlation": Metric(
        "Blank corr. with G", "correlation of that response with the artifact, -1 to 1", "lower"
    ),
    "grid_peak": Metric("Grid peak", "power at patch-grid frequencies over that around them; 1 without", "lower"),
}


@dataclass(frozen=True)
class Row:
    """Hold one number of a report.

    Args:
        metric: a key of :data:`METRICS`.
        value: the metric; None if it is not computed, with the reason in `note`.
        null: the mean of the null; None if there is no null.
        null_low, null_high: 95 % prediction interval of one more draw of the null.
        low, high: 95 % bootstrap interval of the value over images; None with fewer than two images.
        images: number of images (or greys) behind the value.
        note: a remark.
        variant: "raw", a term, or the name of a denoiser.
        layer: -1 for the last layer, after the final norm.
        backbone: the backbone's label in the report.
    """

    metric: str
    value: float | None
    null: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    low: float | None = None
    high: float | None = None
    images: int = 0
    note: str = ""
    variant: str = "raw"
    layer: int = -1
    backbone: str = ""


def missing(metric: str, reason: str) -> Row:
    """Make a row without a value."""
    return Row(metric, None, note=reason)


def static_rows(
    maps: Sequence[Tokens],
    generator: torch.Generator,
    draws: int,
    mic_images: int,
    candidates: int | None,
    period: int = 2,
) -> list[Row]:
    """Compute the metrics that need only the tokens of photographs.

    Args:
        maps: one set of tokens per image.
        draws: number of draws of each null.
        mic_images: number of images, evenly spread over all, for MIC, which is by far the slowest.
        candidates: channels per axis that MIC scores; see :func:`dvt.analysis.metrics.artifacts.position_mic`.
        period: period of the grid; see :func:`dvt.analysis.metrics.artifacts.grid_peak`.
    """
    few = [maps[i] for i in torch.linspace(0, len(maps) - 1, min(mic_images, len(maps))).long().tolist()]
    tasks: list[tuple[str, Callable[[], list[Row]]]] = [
        ("position_r2", lambda: [position_r2_row(maps, generator, draws)]),
        ("position_mic", lambda: [position_mic_row(few, generator, candidates)]),
        ("pooled_mic", lambda: [pooled_mic_row(few, generator, draws)]),
        ("outlier_share", lambda: outlier_rows(maps, generator)),
        ("grid_peak", lambda: [grid_peak_row(maps, generator, draws, period)]),
    ]
    rows = []
    for name, task in tasks:
        try:
            rows += task()
        except ShapeError as error:  # the grid is too small for this metric
            rows.append(missing(name, str(error)))
    return rows


def position_r2_row(maps: Sequence[Tokens], generator: torch.Generator, draws: int) -> Row:
    """Score :func:`~dvt.analysis.metrics.artifacts.position_decodability`; the interval is over held-out images."""
    targets = []
    for each in token_maps(maps):
        centres = grids.grid_centres((each.shape[0], each.shape[1]))
        orders = [torch.randperm(centres[..., 0].numel(), generator=generator) for _ in range(draws)]
        drawn = [centres.flatten(0, 1)[order].view_as(centres) for order in orders]
        targets.append(torch.cat((centres, *drawn), dim=-1))
    found = metrics.position_errors(maps, targets, width=2)
    values = found.r2().unflatten(0, (-1, 2)).mean(1).cpu()
    interval = None
    if (groups := len(found.counts)) > 1:
        weights = resample_counts(groups, RESAMPLES, generator)
        interval = central_interval(found.r2(weights)[:, :2].mean(1).cpu())
    note = "" if len(maps) > 1 else "one image: its tokens are in training and test, so the number is optimistic"
    return _row("position_r2", float(values[0]), values[1:], interval, len(maps), note)


def position_mic_row(maps: Sequence[Tokens], generator: torch.Generator, candidates: int | None) -> Row:
    """Score :func:`dvt.analysis.metrics.artifacts.position_mic`."""
    values = metrics.position_mics(maps, candidates)
    rounds = _rounds(len(maps))
    null = torch.cat([metrics.position_mics(shuffled(maps, generator), candidates) for _ in range(rounds)])
    channels = maps[0].feature_dim
    note = "" if candidates is None or candidates >= channels else f"best {candidates} of {channels} channels per axis"
    return _mean_row("position_mic", values, null, generator, note)


def pooled_mic_row(maps: Sequence[Tokens], generator: torch.Generator, draws: int) -> Row:
    """Score :func:`dvt.analysis.metrics.artifacts.pooled_position_mic` of the images of the commonest grid.

    Its null moves each image's map around a torus, so a smooth map is not beyond chance because it is smooth. There is
    no interval over images: an image drawn twice would count as agreement between images.
    """
    same = [each for each in maps if each.grid == Counter(each.grid for each in maps).most_common(1)[0][0]]
    score = with_null(partial(metrics.pooled_position_mic, candidates=1), same, generator, draws, torus_shifted)
    left_out = len(maps) - len(same)
    note = f"{counted(left_out, 'image')} of other grids left out" if left_out else ""
    return Row("pooled_mic", score.value, score.null, score.low, score.high, images=len(same), note=note)


def outlier_rows(maps: Sequence[Tokens], generator: torch.Generator) -> list[Row]:
    """Score the share of norm outliers and the spread of norms; the null is noise of the same covariance.

    The thresholds come from all images together, also in the bootstrap. The null comes from up to 16 images.
    """
    few = list(maps[:: max(1, len(maps) // 16)])
    noise = [cast("list[Tokens]", matched_noise(few, generator)) for _ in range(_rounds(len(few)))]
    rows = []
    for metric, of in (("outlier_share", _shares), ("norm_spread", _spreads)):
        rows.append(_mean_row(metric, of(maps), torch.cat([of(each) for each in noise]), generator))
    return rows


def _rounds(images: int) -> int:
    """Choose how often to draw a null that has one value per image, so that there are at least six values."""
    return max(1, -(-6 // images))


def _shares(maps: Sequence[Tokens]) -> Tensor:
    """Compute the share of outliers of each image: (N,)."""
    low, high = metrics.norm_outliers(maps).bounds
    norms = [each.norm(dim=-1).double() for each in token_maps(maps)]
    return torch.stack([((each > high) | (each < low)).double().mean() for each in norms])


def _spreads(maps: Sequence[Tokens]) -> Tensor:
    """Compute p99 / p50 of the norms of each image: (N,)."""
    return torch.stack([_ratio(each.norm(dim=-1).flatten().double()) for each in token_maps(maps)])


def _ratio(norms: Tensor) -> Tensor:
    ordered = norms.sort().values
    return ordered[round(0.99 * (len(ordered) - 1))] / ordered.median().clamp(min=1e-12)


def grid_peak_row(maps: Sequence[Tokens], generator: torch.Generator, draws: int, period: int = 2) -> Row:
    """Score :func:`dvt.analysis.metrics.artifacts.grid_peak`."""
    powers = metrics.grid_powers(maps, period)
    value = float(metrics.peak_of(powers.mean(0)))
    null = [
        float(metrics.peak_of(metrics.grid_powers(shuffled(maps, generator), period).mean(0))) for _ in range(draws)
    ]
    interval = None
    if len(maps) > 1:
        weights = resample_counts(len(maps), RESAMPLES, generator).to(powers)
        interval = central_interval(metrics.peak_of(torch.einsum("ri,i...->r...", weights, powers)).cpu())
    return _row("grid_peak", value, torch.tensor(null), interval, len(maps))


def shift_rows(found: Sequence[metrics.ShiftStability], generator: torch.Generator, note: str = "") -> list[Row]:
    """Average :func:`~dvt.analysis.metrics.artifacts.shift_stability`; its null compares tokens of other points."""
    rows = []
    for metric, same, other in (("shift_p50", "p50", "unmatched"), ("shift_p5", "p5", "unmatched_p5")):
        values, null = (torch.tensor([getattr(each, name) for each in found]).double() for name in (same, other))
        rows.append(_mean_row(metric, values, null, generator, note))
    return rows


def blank_rows(
    responses: Sequence[Tensor], artifact: Tensor | None, generator: torch.Generator, draws: int
) -> list[Row]:
    """Score energy and correlation of the responses (h, w, C) to several greys; the interval is over greys.

    A model without artifacts of position gives equal tokens for a grey image, so the null of the energy is 0. The null
    of the correlation is the artifact with permuted positions.
    """
    energies = torch.tensor([blank_energy(each) for each in responses]).double()
    rows = [replace(_mean_row("blank_energy", energies, None, generator, "interval over greys"), null=0.0)]
    if artifact is None:
        return [*rows, missing("blank_correlation", "there is no artifact to correlate with")]
    values = torch.tensor([blank_correlation(each, artifact) for each in responses]).double()
    null = torch.tensor([blank_correlation(responses[0], _permuted(artifact, generator)) for _ in range(draws)])
    interval = _bootstrap_mean(values, generator)
    return [*rows, _row("blank_correlation", float(values.mean()), null, interval, len(values), "interval over greys")]


def _permuted(artifact: Tensor, generator: torch.Generator) -> Tensor:
    return shuffled(Tokens.of(artifact), generator).patches[0]  # type: ignore[union-attr]


def share_rows(share: PositionShare) -> list[Row]:
    """Make the two rows of a position share: within each image, and the same in all images."""
    own = _shared_row("position_own", share.own, share.own_interval, share.images)
    if share.shared is None:
        return [own, missing("position_shared", "it needs two images or more")]
    return [own, _shared_row("position_shared", share.shared, share.shared_interval, share.images)]


def _shared_row(metric: str, score: Score, interval: tuple[float, float] | None, images: int) -> Row:
    low, high = interval or (None, None)
    return Row(metric, score.value, score.null, score.low, score.high, low, high, images=images)


def _mean_row(metric: str, values: Tensor, null: Tensor | None, generator: torch.Generator, note: str = "") -> Row:
    """Make the row of a mean over images, with the mean of a null that has one draw per image."""
    from scipy.stats import t as student

    interval = _bootstrap_mean(values, generator)
    row = _row(metric, float(values.mean()), None, interval, len(values), note)
    if null is None:
        return row
    mean, count = float(null.double().mean()), len(null)
    if count < 2:
        return replace(row, null=mean)
    # The prediction interval of another mean over as many images.
    error = float(null.double().std()) * (1 / count + 1 / len(values)) ** 0.5
    half = float(student.ppf(0.975, count - 1)) * error
    return replace(row, null=mean, null_low=mean - half, null_high=mean + half)


def _bootstrap_mean(values: Tensor, generator: torch.Generator) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    return central_interval(resample_counts(len(values), RESAMPLES, generator) @ values.double().cpu() / len(values))


def _row(
    metric: str, value: float, null: Tensor | None, interval: tuple[float, float] | None, images: int, note: str = ""
) -> Row:
    low, high = interval or (None, None)
    if null is None or not len(null):
        return Row(metric, value, low=low, high=high, images=images, note=note)
    if len(null) == 1:
        return Row(metric, value, float(null[0]), low=low, high=high, images=images, note=note)
    score = score_of(value, null.double())
    return Row(metric, value, score.null, score.low, score.high, low, high, images, note)
