"""Show scores side by side: means over seeds, intervals over seeds and images, differences from a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dvt.analysis.metrics.intervals import RESAMPLES, central_interval, resample_counts
from dvt.analysis.probes.probe import Probe
from dvt.errors import ConfigError, ShapeError
from dvt.text import aligned, wrapped

Summarise = Callable[[Tensor], dict[str, Tensor]]
Interval = tuple[float, float]

_DRAWS_AT_ONCE = 50
_ERRORS = ("AbsRel", "RMSE")


@dataclass(frozen=True)
class ProbeRow:
    """Hold the scores of one variant of the features.

    Args:
        variant: the variant's name.
        scores: each score's mean over seeds; None if it is not defined, with the reason in `notes`.
        seeds: 95 % interval of the headline's mean over seeds (Student's t); None for fewer than two seeds.
        images: 95 % bootstrap interval of the headline over test images.
        difference: the headline score minus the reference's; None for the reference itself.
        difference_interval: 95 % paired bootstrap interval of the difference over test images.
        notes: reasons for missing scores.
    """

    variant: str
    scores: Mapping[str, float | None]
    seeds: Interval | None
    images: Interval | None
    difference: float | None = None
    difference_interval: Interval | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeReport:
    """Hold the results of a probe for all variants of the features.

    Args:
        task: the probe's task.
        metric: the headline score, for which intervals and differences are given.
        reference: the variant that the others are compared with.
        rows: one row per variant.
        data: root, layout, protocol and the numbers of images and classes.
        config: the settings, ready for JSON.
        notes: warnings for the reader: a split made here, missing classes, images left out.
        compare: a function that computes the rows with another reference; see :meth:`against`.
        probes: the fitted probe of each variant, of the first seed; empty if the report was read from a file.
    """

    task: str
    metric: str
    reference: str
    rows: tuple[ProbeRow, ...]
    data: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    compare: Callable[[str], tuple[ProbeRow, ...]] | None = field(default=None, repr=False, compare=False)
    probes: Mapping[str, Probe] = field(default_factory=dict, repr=False, compare=False)

    def against(self, reference: str) -> ProbeReport:
        """Compute the differences from another row instead, and keep the rest of the table.

        Raises:
            ConfigError: there is no such row, or the report has been read from a file.
        """
        self.row(reference)
        if self.compare is None:
            raise ConfigError("the report was read from a file, without the statistics to compare; run the probe again")
        return replace(self, reference=reference, rows=self.compare(reference))

    def row(self, variant: str) -> ProbeRow:
        """Find the row of a variant.

        Raises:
            ConfigError: there is no row of that name.
        """
        for row in self.rows:
            if row.variant == variant:
                return row
        raise ConfigError(f"no row {variant!r}; there are {', '.join(row.variant for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; shares lie in [0, 1]."""
        values = asdict(replace(self, compare=None, probes={}))
        del values["compare"], values["probes"]
        return json.loads(json.dumps(values, allow_nan=False))

    def table(self) -> str:
        """Write the table as aligned text, with shares in per cent and errors in their units."""
        same = self._same()
        names = [name for name in self.rows[0].scores if name not in same]
        head = [
            "features",
            *(_title(name) for name in names),
            "over seeds",
            "over images",
            f"{self.metric} less {self.reference}'s",
            "",
        ]
        lines = [self._line(row, names) for row in self.rows]
        notes = [*self.notes, *(f"{row.variant}: {note}" for row in self.rows for note in row.notes)]
        if same:
            values = (f"{_title(name)} {_number(name, self.rows[0].scores[name])}" for name in same)
            notes.append(f"the same in all rows: {', '.join(values)}")
        return "\n".join([aligned(head, lines), *(wrapped(f"note: {note}") for note in notes)])

    def _same(self) -> list[str]:
        """List scores, other than the headline, that are equal in all rows, such as those of trivial guesses."""
        others = [name for name in self.rows[0].scores if name != self.metric]
        return [name for name in others if len(self.rows) > 1 and len({row.scores[name] for row in self.rows}) == 1]

    def _line(self, row: ProbeRow, names: Sequence[str]) -> list[str]:
        scores = [_number(name, row.scores[name]) for name in names]
        intervals = [_interval(self.metric, each) for each in (row.seeds, row.images)]
        difference = "" if row.difference is None else _number(self.metric, row.difference, "+")
        return [row.variant, *scores, *intervals, difference, _interval(self.metric, row.difference_interval)]


def _title(name: str) -> str:
    return name + (" (m)" if name == "RMSE" else "" if name in _ERRORS else " %")


def _number(name: str, value: float | None, sign: str = "-") -> str:
    if value is None:
        return "none"
    return f"{value:{sign}.3f}" if name in _ERRORS else f"{100 * value:{sign}.1f}"


def _interval(name: str, interval: Interval | None) -> str:
    return "" if interval is None else f"[{_number(name, interval[0])}, {_number(name, interval[1])}]"


# -- statistics -------------------------------------------------------------------------------------------------------


def make_rows(
    statistics: Mapping[str, Tensor],
    summarise: Summarise,
    metric: str,
    reference: str,
    draws: int = RESAMPLES,
    seed: int = 0,
) -> tuple[ProbeRow, ...]:
    """Make rows from the statistics (seeds, images, ...) of each variant.

    Args:
        statistics: for each variant, statistics of each test image under each seed, which can be added; all variants
            have the same images in the same order.
        summarise: computes the probe's scores from added statistics.
        metric: name of the headline score.
        reference: the variant that the others are compared with.
        draws: number of bootstrap samples of the images.
        seed: seed of the bootstrap; all variants get the same samples, so that their differences are paired.

    Raises:
        ShapeError: variants were scored on different numbers of images.
    """
    counts = {name: each.shape[1] for name, each in statistics.items()}
    if len(set(counts.values())) > 1:
        raise ShapeError(f"variants were scored on different numbers of images: {counts}")
    samples = resample_counts(counts[reference], draws, torch.Generator().manual_seed(seed))
    base = resampled(statistics[reference], samples, summarise, metric)
    level = float(summarise(statistics[reference].sum(1))[metric].mean())
    rows = []
    for name, each in statistics.items():
        scores = summarise(each.sum(1))
        drawn = base if name == reference else resampled(each, samples, summarise, metric)
        against = None if name == reference else (level, base)
        rows.append(_row(name, scores, metric, drawn, against))
    return tuple(rows)


def _row(
    name: str, each: Mapping[str, Tensor], metric: str, drawn: Tensor, against: tuple[float, Tensor] | None
) -> ProbeRow:
    scores = {key: _finite(float(values.mean())) for key, values in each.items()}
    reasons = tuple(
        f"{key} is not defined: no scored image has anything to count for it" for key in each if scores[key] is None
    )
    row = ProbeRow(name, scores, student(each[metric]), central_interval(drawn), notes=reasons)
    if against is None:
        return row
    difference = _finite(float(each[metric].mean()) - against[0])
    return replace(row, difference=difference, difference_interval=central_interval(drawn - against[1]))


def resampled(statistics: Tensor, samples: Tensor, summarise: Summarise, metric: str) -> Tensor:
    """Score each bootstrap sample of the images, averaged over seeds: (draws,).

    Args:
        statistics: (seeds, images, ...).
        samples: (draws, images), how often each sample contains each image.
        summarise: computes the scores from added statistics.
        metric: which score.
    """
    flat = statistics.double().flatten(2)
    parts = []
    for some in samples.split(_DRAWS_AT_ONCE):
        total = torch.einsum("dn,snk->dsk", some, flat).unflatten(-1, statistics.shape[2:])
        parts.append(summarise(total)[metric].mean(1))
    return torch.cat(parts)


def student(values: Tensor) -> Interval | None:
    """Compute the 95 % interval (Student's t) of the mean of independent values; None for fewer than two."""
    from scipy.stats import t

    if len(values) < 2 or not bool(values.isfinite().all()):
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean - half, mean + half


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
