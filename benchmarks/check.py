"""Whether the benchmarks' ratios are as good as the recorded ones.

python benchmarks/check.py                            bench.jsonl, as `make bench` writes it, against recorded.json
python benchmarks/check.py --record A B C             write recorded.json anew, from the bench.jsonl of several runs

Only ratios are compared, of two things measured in one run: seconds differ between machines. Exit code 0 when no ratio
is worse than its tolerance, 1 when one is or is missing. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dvt
from tables import described_machine, table

RECORDED = Path(__file__).with_name("recorded.json")

TIME = (0.10, "of seconds, which other programs on the machine disturb")
QUALITY = (0.02, "no clock in it; rounding differs between processors and versions of PyTorch")
EXACT = (0.001, "counted")

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """A number that a change must not make worse.

    Args:
        better: which way is better.
        floor: the least tolerance, as a share of the value, and why there is one.
        of: finds it in the results of all benchmarks.
    """

    better: Literal["higher", "lower"]
    floor: tuple[float, str]
    of: Callable[[Results], float]


@dataclass(frozen=True)
class Recorded:
    """A recorded ratio.

    Args:
        value: the median of some runs.
        better: which way is better.
        tolerance: how much worse it may be, as a share of the value.
        reason: why so much.
        spread: largest less smallest value of these runs, as a share of the median.
    """

    value: float
    better: Literal["higher", "lower"]
    tolerance: float
    reason: str
    spread: float

    def limit(self) -> float:
        """The worst value that passes."""
        return self.value * (1 - self.tolerance if self.better == "higher" else 1 + self.tolerance)

    def passes(self, value: float) -> bool:
        """Whether a value is no worse than the limit; NaN is."""
        return value >= self.limit() if self.better == "higher" else value <= self.limit()


# -- the ratios -------------------------------------------------------------------------------------------------------


def row_of(rows: Sequence[Results], **wanted: object) -> Results:
    """The one row of a table with these values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}")
    return found[0]


def latency(model: str) -> dict[str, Ratio]:
    def row(results: Results) -> Results:
        return row_of(results["latency"], model=model)

    return {
        f"{model} with its denoiser over alone, time": Ratio("lower", TIME, lambda r: row(r)["ratio"]),
        f"{model} with its denoiser over alone, memory": Ratio(
            "lower", QUALITY, lambda r: row(r)["megabytes_with"] / row(r)["megabytes"]
        ),
        f"{model}'s denoiser over the backbone, parameters": Ratio("lower", EXACT, lambda r: row(r)["parameter_share"]),
    }


def by_views(views: int) -> dict[str, Ratio]:
    """Relative errors on planted data: of F over all tokens, of G, and of the semantic estimate."""
    names = {"F over tokens": "F", "G": "G", "semantic": "semantic"}
    return {
        f"error of {short}, {views} views": Ratio(
            "lower", QUALITY, lambda r, key=key: row_of(r["views"]["rows"], views=views)[key]
        )
        for key, short in names.items()
    }


def processor(results: Results, what: str) -> float:
    return row_of(results["speed"]["rows"], what=what)["processor_seconds"]


def solver_ratio(results: Results, key: str) -> float:
    """Of the linear solver with its defaults over the shorter neural fit."""
    rows = results["planted"]["rows"]
    linear, neural = (row_of(rows, solver=name) for name in ("linear, defaults", "neural, 8 levels, 1,000 steps"))
    return linear[key] / neural[key]


def outliers(results: Results) -> Results:
    return row_of(results["planted"]["outliers"], outliers=0.02, robust=True)


def job(name: str) -> Ratio:
    return Ratio("higher", TIME, lambda r: row_of(r["cost"]["local"]["rows"], job=name)["predicted / measured"])


def stored(name: str) -> Ratio:
    return Ratio("higher", TIME, lambda r: r["store"]["ratios"][name])


RATIOS: dict[str, Ratio] = {
    "extract over the bare loop, images a second": Ratio("higher", TIME, lambda r: r["speed"]["over_loop"]["median"]),
    "extract over the bare loop, processor": Ratio(
        "higher", TIME, lambda r: processor(r, "loop") / processor(r, "extract")
    ),
    "extract over the forward pass, processor": Ratio(
        "higher", TIME, lambda r: processor(r, "forward") / processor(r, "extract")
    ),
    **latency("vit_small_patch16_224"),
    **latency("vit_base_patch16_224"),
    "neural over linear, processor": Ratio("higher", TIME, lambda r: solver_ratio(r, "processor_seconds") ** -1),
    "linear over neural, error of G": Ratio("lower", QUALITY, lambda r: solver_ratio(r, "G")),
    "error of F with outliers over without": Ratio("lower", QUALITY, lambda r: outliers(r)["F over tokens / clean"]),
    **{name: ratio for views in (16, 48, 256) for name, ratio in by_views(views).items()},
    "the solver's share of stage one": Ratio("lower", TIME, lambda r: r["cost"]["local"]["solver_share"]["measured"]),
    "extract, predicted over measured": job("extract"),
    "denoise, predicted over measured": job("denoise"),
    "training, predicted over measured": job("training"),
    "a store's items over .npy files": stored("store[i] over .npy"),
    "a store's batches over stacked .npy files": stored("store[[...]] over .npy, stacked"),
    "a store's loader over one of .npy files": stored("DataLoader of the store over DataLoader of .npy"),
    "a shard's bytes over the formula's": Ratio("lower", EXACT, lambda r: r["cost"]["local"]["stored_over_formula"]),
    "FLOPs off the formulas, 1 and the worst": Ratio("lower", QUALITY, lambda r: 1 + r["cost"]["flops"]["worst"]),
}


def read(path: Path) -> dict[str, Any]:
    """The results of all benchmarks of a run: each is a line, known by the names in it."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    results: dict[str, Any] = {}
    for line in lines:
        results |= {name: value for name, value in line.items() if isinstance(value, (dict, list))}
    return results


def ratios(results: Results) -> dict[str, float]:
    """By name; NaN where the results do not hold it."""
    found = {}
    for name, ratio in RATIOS.items():
        try:
            found[name] = float(ratio.of(results))
        except (LookupError, TypeError):
            found[name] = float("nan")
    return found


# -- recording and comparing ------------------------------------------------------------------------------------------


def recorded(runs: Sequence[Mapping[str, float]]) -> dict[str, Recorded]:
    """Medians of runs; a tolerance is twice their spread, at least its floor and at most a half."""
    entries = {}
    for name, ratio in RATIOS.items():
        values = [run[name] for run in runs]
        middle = statistics.median(values)
        spread = (max(values) - min(values)) / middle
        floor, reason = ratio.floor
        tolerance = round(min(max(floor, 2 * spread), 0.5), 4)
        why = f"{reason}; {'twice the spread' if 2 * spread > floor else 'the least'} of {len(values)} runs"
        entries[name] = Recorded(round(middle, 6), ratio.better, tolerance, why, round(spread, 4))
    return entries


def record(paths: Sequence[Path], target: Path) -> dict[str, Any]:
    runs = [ratios(read(path)) for path in paths]
    if missing := sorted({name for run in runs for name, value in run.items() if value != value}):
        raise SystemExit(f"not recorded: {', '.join(missing)} not found; run `make bench` whole")
    entries = {name: asdict(entry) for name, entry in recorded(runs).items()}
    about = {"machine": described_machine(), "version": dvt.__version__, "runs": len(runs)}
    target.write_text(json.dumps({**about, "ratios": entries}, indent=2) + "\n")
    table(f"recorded in {target.name}", [{"ratio": name, **brief(entry)} for name, entry in entries.items()])
    return {"recorded": len(entries), "runs": len(runs)}


def brief(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("value", "better", "tolerance", "spread")}


def compare(found: Mapping[str, float], entries: Mapping[str, Recorded]) -> list[dict[str, Any]]:
    """A row for each recorded ratio; one that was not found does not pass."""
    rows = []
    for name, entry in entries.items():
        value = found.get(name, float("nan"))
        verdict = "ok" if entry.passes(value) else "missing" if value != value else "WORSE"
        rows.append(
            {"ratio": name, "recorded": entry.value, "now": value, "at worst": entry.limit(), "verdict": verdict}
        )
    return rows


def check(path: Path, against: Path) -> dict[str, Any]:
    document = json.loads(against.read_text())
    entries = {name: Recorded(**entry) for name, entry in document["ratios"].items()}
    rows = compare(ratios(read(path)), entries)
    table(f"{path} against {against.name} ({document['machine']['processor']}, {document['version']})", rows)
    worse = [row for row in rows if row["verdict"] != "ok"]
    if worse:
        table(f"{len(worse)} of {len(rows)} are worse than their tolerance", worse)
    return {"checked": len(rows), "worse": {row["ratio"]: row["now"] for row in worse}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=[Path("bench.jsonl")], help="of `make bench`")
    parser.add_argument("--record", action="store_true", help="write the recorded ratios anew")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="the recorded ratios")
    options = parser.parse_args()
    if missing := [str(path) for path in options.results if not path.is_file()]:
        parser.error(f"there is no {', '.join(missing)}; `make bench` writes bench.jsonl")
    if options.record:
        outcome = record(options.results, options.recorded)
    elif len(options.results) == 1:
        outcome = check(options.results[0], options.recorded)
    else:
        parser.error("one run is checked at a time; several are for --record")
    print(json.dumps(outcome))
    sys.exit(1 if outcome.get("worse") else 0)


if __name__ == "__main__":
    main()
