"""Outliers of many kinds against the linear solver: seeds x photographs, intervals, and an oracle that knows them.

python benchmarks/robust.py --seeds 10
python benchmarks/robust.py --seeds 10 --kinds scattered-.02 persistent-50

A run is one seed on one photograph (PHOTOGRAPHS; --natural takes .jpg files of a folder instead). Errors are relative;
the oracle gives no weight to the true outliers, with the resolution and smoothness of the same problem without any. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt.fields import LinearConfig, LinearFit, LinearSolver
from dvt.fields.equations import NormalEquations
from dvt.fields.pilot import node_resolution
from dvt.fields.planted import Planted, PlantedConfig, relative_error
from dvt.images import load_image
from tables import interval, table

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
FLAT = {share: {"outliers": 0.2 * share / 100, "outlier_rate": share / 100} for share in (20, 50, 80)}
KINDS: dict[str, dict[str, Any]] = {
    "scattered-.02": {"outliers": 0.02},
    "scattered-.05": {"outliers": 0.05},
    **{f"flickering-{share}": flat for share, flat in FLAT.items()},
    **{f"persistent-{share}": flat | {"outlier_cells": 32} for share, flat in FLAT.items()},
    "clustered-50": FLAT[50] | {"outlier_cells": 8},
    "half as long-.05": {"outliers": 0.05, "outlier_norm": 2.0},
    "each its own way-.05": {"outliers": 0.05, "outlier_spread": 100.0},
}
# Norm from which what a token has beyond F and G is an outlier: noise of .05 in 64 channels has .4.
OUTLIER = 4.0


@dataclass(frozen=True)
class Run:
    """One estimator's errors on one problem."""

    kind: str
    estimator: str
    photograph: str
    seed: int
    field: float = float("nan")
    semantic: float = float("nan")
    seconds: float = 0.0


def photographs(folder: Path | None) -> dict[str, Tensor]:
    """The photographs by name, from a folder or from scikit-image."""
    if folder is not None:
        return {path.stem: load_image(path) for path in sorted(folder.glob("*.jpg"))[:3]}
    import skimage.data

    return {name: torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255 for name in PHOTOGRAPHS}


class Problem:
    """A planted problem with its views in memory."""

    def __init__(self, image: Tensor, config: PlantedConfig):
        self.planted = Planted(image, config)
        self.batches = list(self.planted)
        self.raw = self.batches[0][0][0]

    def outliers(self, tokens: Tensor, coords: Tensor) -> Tensor:
        """(V, h, w) bool: the true ones."""
        return (tokens - self.planted.truth(coords) - self.planted.artifact).norm(dim=-1) > OUTLIER

    def errors(self, fit: LinearFit) -> tuple[float, float]:
        """Of F and of the semantic estimate."""
        parts = fit.decompose(self.raw, self.planted.coords)
        return tuple(relative_error(each, self.planted.field) for each in (parts.field, parts.semantic))

    def oracle(self, like: LinearFit) -> tuple[float, float]:
        """As `errors`, of a fit without the true outliers; where the image has one, its estimate is F."""
        height, width, channels = self.raw.shape
        nodes = node_resolution((height, width), like.config.resolution or 0)
        equations = NormalEquations(1, nodes, height * width, channels, self.raw)
        for tokens, coords in self.batches:
            weights = (~self.outliers(tokens, coords)).float()
            equations.add(*(part.flatten(1, 2)[None] for part in (tokens, coords)), weights.flatten(1)[None])
        field, artifact = equations.solve(like.config.smoothness or 0.0, ridge=like.config.ridge)
        field, artifact = field.view(*nodes, -1).float(), artifact.view(self.raw.shape).float()
        parts = replace(like, nodes=field, artifact=artifact).decompose(self.raw, self.planted.coords)
        outlier = self.outliers(self.raw[None], self.planted.coords[None])[0]
        semantic = torch.where(outlier[..., None], parts.field, parts.semantic)
        return tuple(relative_error(each, self.planted.field) for each in (parts.field, semantic))


SOLVERS = {"robust": LinearSolver(), "not robust": LinearSolver(LinearConfig(robust=False))}


def timed(run: Run, solver: LinearSolver, problem: Problem) -> tuple[LinearFit, Run]:
    """The fit, and the run with its errors and seconds."""
    start = time.perf_counter()
    fit = solver.fit(problem.batches)
    seconds = time.perf_counter() - start
    field, semantic = problem.errors(fit)
    return fit, replace(run, field=field, semantic=semantic, seconds=seconds)


def runs_of(seed: int, images: dict[str, Tensor], kinds: Sequence[str]) -> list[Run]:
    """All estimators on all photographs, for one seed, which fixes the direction of the defect too."""
    runs, clean = [], {}
    for name, image in images.items():
        problem, run = Problem(image, PlantedConfig(seed=seed)), Run("clean", "", name, seed)
        clean[name], found = timed(replace(run, estimator="robust"), SOLVERS["robust"], problem)
        runs += [found, timed(replace(run, estimator="not robust"), SOLVERS["not robust"], problem)[1]]
    for kind in kinds:
        problems = {name: Problem(image, PlantedConfig(seed=seed, **KINDS[kind])) for name, image in images.items()}
        for name, problem in problems.items():
            run = Run(kind, "", name, seed)
            runs += [timed(replace(run, estimator=each), solver, problem)[1] for each, solver in SOLVERS.items()]
            field, semantic = problem.oracle(clean[name])
            runs.append(replace(run, estimator="oracle", field=field, semantic=semantic))
    return runs


def summary(runs: Sequence[Run], kind: str) -> list[dict[str, Any]]:
    """One row an estimator: means with 95 % intervals, and ratios to the clean and the oracle's errors."""
    rows = []
    by = {(run.kind, run.estimator, run.photograph, run.seed): run for run in runs}
    own = [run for run in runs if run.kind == kind]
    for estimator in dict.fromkeys(run.estimator for run in own):
        these = [run for run in own if run.estimator == estimator]
        clean = [run.field / by["clean", "not robust", run.photograph, run.seed].field for run in these]
        best = [by.get((kind, "oracle", run.photograph, run.seed)) for run in these]
        oracle = [run.semantic / each.semantic for run, each in zip(these, best, strict=True) if each]
        field, semantic = (interval([getattr(run, term) for run in these]) for term in ("field", "semantic"))
        rows.append(
            {
                "kind": kind,
                "estimator": estimator,
                "runs": len(these),
                "F": field["mean"],
                "F +-": field["half"],
                "semantic": semantic["mean"],
                "semantic +-": semantic["half"],
                "F <= 1.3 clean": sum(ratio <= 1.3 for ratio in clean) / len(clean),
                "worst F / clean": max(clean),
                "semantic <= 2 oracle": sum(ratio <= 2 for ratio in oracle) / len(oracle) if oracle else 1.0,
                "worst semantic / oracle": max(oracle, default=1.0),
                "seconds": sum(run.seconds for run in these) / len(these),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--natural", type=Path, help="folder of photographs (.jpg); its first three are used")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = photographs(options.natural)
    seeds = range(options.first, options.first + options.seeds)
    runs = [run for seed in seeds for run in runs_of(seed, images, options.kinds)]
    rows = [row for kind in ("clean", *options.kinds) for row in summary(runs, kind)]
    for kind in ("clean", *options.kinds):
        title = f"{kind}: {options.seeds} seeds x {len(images)} photographs; clean is the fit that is not robust"
        table(title, [row for row in rows if row["kind"] == kind])
    print(json.dumps({"photographs": list(images), "seeds": list(seeds), "rows": rows}))


if __name__ == "__main__":
    main()
