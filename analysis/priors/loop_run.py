"""Refit a trained prior on its own samples, round after round, with and without a correction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt.analysis.priors.codebook import Codebook
from dvt.analysis.priors.compare import interval
from dvt.analysis.priors.config import PriorTraining, Sampling
from dvt.analysis.priors.evaluate import kernel_distance
from dvt.analysis.priors.job_config import Loop
from dvt.analysis.priors.loops import Generate, Transform, closed_loop, likelihood, mixing, nearest_cluster
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.reading import opened_tokens
from dvt.analysis.priors.run_folder import PriorRun, open_run
from dvt.analysis.priors.sampling import draw_maps
from dvt.analysis.priors.scoring import Yardstick, pixels, pooled, random_filters
from dvt.analysis.priors.training import fit_prior
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.images import file_sha256
from dvt.progress import Progress, silent

_FEWEST = 20  # held-out images that a distance needs


def loop_prior(
    run_dir: str | Path,
    out: str | Path,
    config: Loop | None = None,
    sampling: Sampling | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Refit an unconditional prior on real images and its own samples, round by round, and measure it each time.

    Args:
        run_dir: the folder of a prior that :func:`dvt.analysis.priors.runs.train_prior` trained without a condition; it
            is not changed.
        out: a folder for the rounds and loop.json.
        config: settings of the loop.
        sampling: settings for drawing samples.
        device: None takes a GPU if there is one.
        progress: called with ("rounds", rounds done, rounds of all seeds).

    Returns:
        A report ready for JSON: for each yardstick, the kernel distance from samples to the held-out images before the
        loop and after each round, with intervals over seeds; and the distance from the training images to them.

    Raises:
        ConfigError: the prior has a condition, or the run has too few held-out images.
        WeightsError: a file of the run is missing or damaged.
    """
    config, run = config or Loop(), open_run(run_dir, device)
    if run.prior.config.condition_dim is not None:
        raise ConfigError(f"a loop needs a prior without a condition, and that of {str(run_dir)!r} has one")
    held = run.pictures_of(run.held["maps"].float())
    if len(held) < _FEWEST:
        raise ConfigError(f"a distance needs {_FEWEST} held-out images, this run has {len(held)}; give more images")
    seen, sticks = opened_tokens(Path(run_dir) / "tokens"), (pixels(), random_filters())
    chosen = [row for row, name in enumerate(seen.names) if name not in set(run.names)]
    source = seen.pictures if seen.patches is None else seen.patches
    real = run.target.standardise(run.target.encode(source[chosen].float(), source[chosen].float()))
    found: list[dict[str, list[float]]] = []
    sampling, prior = sampling or Sampling(), file_sha256(Path(run_dir) / "prior.safetensors")
    progress("rounds", 0, config.seeds * config.rounds)
    for seed in range(config.seeds):
        folder = Path(out) / f"seed-{seed}"
        found.append(_one(run, real, held, seed, folder, config, sampling, sticks, prior))
        progress("rounds", (seed + 1) * config.rounds, config.seeds * config.rounds)
    beside = _distances(run.pictures_of(real), held, sticks)
    by_round = {name: zip(*(each[name] for each in found), strict=True) for name in beside}
    distances = {
        name: {"rounds": [interval(list(values)) for values in rounds], "real": beside[name]}
        for name, rounds in by_round.items()
    }
    report = {"config": asdict(config), "distances": distances}
    with whole_file(Path(out) / "loop.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _one(
    run: PriorRun,
    real: Tensor,
    held: Tensor,
    seed: int,
    folder: Path,
    config: Loop,
    sampling: Sampling,
    sticks: Sequence[Yardstick],
    sha256: str,
) -> dict[str, list[float]]:
    """Run the loop with one seed; return the distances by yardstick, before the loop and after each round."""
    # What each round's samples depend on; more rounds or seeds continue the same loop.
    about = {name: value for name, value in asdict(config).items() if name in ("mix", "corrector", "gamma", "clusters")}
    about |= {"sampling": asdict(sampling), "prior": sha256}
    prior = Prior(run.prior.config, torch.Generator().manual_seed(0)).to(next(run.prior.parameters()).device)
    prior.load_state_dict(run.prior.state_dict())
    rounds = iter(range(1, config.rounds + 1))
    draws = torch.Generator().manual_seed(seed)

    def generate(count: int, generator: torch.Generator) -> Tensor:
        fresh = int(torch.randint(2**31, (1,), generator=generator))
        return draw_maps(replace(sampling, seed=fresh), prior.eval(), None, count)[0].cpu()

    def fit(samples: Tensor) -> Generate:
        loop = replace(PriorTraining().loop, steps=config.round_steps, batch_size=min(64, len(samples)), seed=seed)
        loop = replace(loop, checkpoint_every=config.round_steps, validate_every=0, ema=0.98)
        prior.train()
        given = ((samples, None), (run.held["maps"], None))
        fit_prior(prior, *given, loop, folder / f"round-{next(rounds)}", settings=about)
        return generate

    def distances(count: int = len(real)) -> dict[str, float]:
        return _distances(run.pictures_of(generate(max(count, _FEWEST), draws)).cpu(), held, sticks)

    measured = [distances()]
    transform = _corrector(real, config, seed)
    for _ in closed_loop(fit, real, draws, rounds=config.rounds, share=config.mix, transform=transform, start=generate):
        measured.append(distances())
    return {name: [each[name] for each in measured] for name in measured[0]}


def _corrector(real: Tensor, config: Loop, seed: int) -> Transform | None:
    """Make the correction of maps, which treats each map as one row of all its values."""
    if config.corrector == "none":
        return None
    rows = real.flatten(1)
    if config.corrector == "likelihood":
        target = likelihood(rows, config.clusters, seed=seed)
    else:
        target = nearest_cluster(Codebook.fit(rows, min(config.clusters, len(rows)), seed), rows)
    correct = mixing(target, config.gamma)
    return lambda samples, generator: correct(samples.flatten(1), generator).view_as(samples)


def _distances(made: Tensor, held: Tensor, sticks: Sequence[Yardstick]) -> dict[str, float]:
    return {stick.name: kernel_distance(pooled(stick(held)), pooled(stick(made))).value for stick in sticks}
