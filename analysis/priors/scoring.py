"""Measure the samples of several runs by the same features, declared beforehand, so that runs can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.priors.config import Sampling
from dvt.analysis.priors.evaluate import (
    enough_for_frechet,
    features,
    frechet_distance,
    kernel_distance,
    memorisation,
    round_trip_cosine,
)
from dvt.analysis.priors.reading import opened_tokens
from dvt.analysis.priors.run_folder import PriorRun, open_run
from dvt.analysis.priors.sampling import draw_maps, held_out_loss
from dvt.analysis.priors.token_set import BATCH
from dvt.analysis.probes.heads import SavedHead
from dvt.backbones import Backbone
from dvt.errors import ConfigError
from dvt.progress import Progress, silent
from dvt.text import counted

_FEWEST = 20  # held-out images for distances and for memorisation

_MOST_CHANNELS = 256

See = Callable[[Tensor], Tensor]
"""Pictures (B, 3, S, S) in [0, 1] -> features (B, h, w, C)."""


@dataclass(frozen=True)
class Yardstick:
    """Compute features of pictures that no compared run was conditioned on.

    Args:
        name: its name in reports.
        see: maps pictures to features.
    """

    name: str
    see: See

    def __call__(self, pictures: Tensor) -> Tensor:
        """Compute features (N, h, w, C) of pictures (N, 3, S, S)."""
        return torch.cat([self.see(part.float().clamp(0, 1)).float().cpu() for part in pictures.split(BATCH)])


def pixels() -> Yardstick:
    """Take pixels themselves, averaged to 8 x 8 at most."""

    def see(pictures: Tensor) -> Tensor:
        side = min(8, pictures.shape[2])
        return functional.interpolate(pictures, (side, side), mode="area").permute(0, 2, 3, 1)

    return Yardstick("pixels", see)


def random_filters(channels: int = 32) -> Yardstick:
    """Take the rectified responses of fixed random filters, two layers deep: a model that has seen no image at all."""
    draws = torch.Generator().manual_seed(0)
    first = torch.randn(channels, 3, 5, 5, generator=draws)
    first = first - first.mean((1, 2, 3), keepdim=True)  # blind to brightness
    second = torch.randn(channels, channels, 3, 3, generator=draws) / (9 * channels) ** 0.5

    def see(pictures: Tensor) -> Tensor:
        shown = functional.interpolate(pictures, (32, 32), mode="bilinear", antialias=True)
        x = functional.conv2d(shown, first.to(shown), padding=2).relu()
        x = functional.conv2d(functional.avg_pool2d(x, 2), second.to(shown), padding=1).relu()
        return functional.avg_pool2d(x, 4).permute(0, 2, 3, 1)

    return Yardstick("random filters", see)


def seen_by(backbone: Backbone) -> Yardstick:
    """Take the raw patch tokens of a backbone."""

    def see(pictures: Tensor) -> Tensor:
        return features(backbone, pictures.to(backbone.mean), "patch", size=backbone.image_size)

    return Yardstick(backbone.name, see)


def pooled(sights: Tensor) -> Tensor:
    """Turn a yardstick's features (N, h, w, c) into one vector (N, C): all values if they are few, else their mean."""
    return sights.flatten(1) if sights[0].numel() <= _MOST_CHANNELS else sights.mean((1, 2))


def measured(made: Tensor, own: Sequence[int], reals: Tensor, training: Tensor, yardstick: Yardstick) -> dict[str, Any]:
    """Measure samples beside real pictures, in features less the training pictures' mean at each place.

    Args:
        made: (N, 3, S, S) samples.
        own: for each sample, the number of the real picture that its condition comes from.
        reals: (n, 3, S, S) held-out pictures.
        training: (M, 3, S, S) training pictures.
        yardstick: computes the features.

    Returns:
        "matched" and "shuffled" cosines with the own and with other real pictures, and the standard error of their
        difference over held-out images; "kid" and, where there are ten samples a channel, "frechet" to all real
        pictures; each with the same number for real held-out pictures beside it; "memorisation". None where there are
        too few images, with the reason in "refused".
    """
    sights = [yardstick(each) for each in (made, reals, training)]
    centre = sights[2].mean(0)
    made, reals, learnt = (each - centre for each in sights)
    index = torch.tensor(list(own))
    mean = torch.stack([made[index == row].flatten(1).mean(0) for row in sorted(set(own))])
    trip = round_trip_cosine(mean.view(-1, *made.shape[1:]), reals[sorted(set(own))]) if len(set(own)) > 2 else None
    generated, held, known = (pooled(each) for each in (made, reals, learnt))
    answer: dict[str, Any] = {
        "round_trip": None if trip is None else {**asdict(trip), "sigmas": trip.sigmas},
        "kid": None,
        "frechet": None,
        "memorisation": None,
        "refused": [],
    }
    if min(len(held), len(generated)) < _FEWEST:
        answer["refused"].append(f"distances need {_FEWEST} held-out images and samples, there are {len(held)}")
        return answer
    answer["kid"] = {
        "generated": asdict(kernel_distance(known, generated)),
        "held_out": asdict(kernel_distance(known, held)),
    }
    copies = memorisation(generated, known, held)
    answer["memorisation"] = {name: getattr(copies, name) for name in ("share", "p_value", "threshold")}
    channels, fewest = known.shape[1], min(len(generated), len(known))
    if enough_for_frechet(fewest, channels):
        answer["frechet"] = frechet_distance(known, generated)
    else:
        answer["refused"].append(f"a Frechet distance of {channels} channels needs {10 * channels}, there are {fewest}")
    return answer


@torch.no_grad()
def judged(head: SavedHead, made: Tensor, own: Sequence[int], reals: Tensor) -> dict[str, Any]:
    """Compare what a frozen segmentation head sees in generated features and in the real ones of the same images.

    Args:
        head: trained on real features of the backbone whose features are generated.
        made: (N, h, w, C) generated features.
        own: for each, the number of the real image that its condition comes from; the first of each is compared.
        reals: (n, h, w, C) features of the held-out images.

    Returns:
        "matched", the share of tokens with the class of the same place in the own real image; "shuffled", with that of
        other images; their difference in standard errors; and "shares", half the summed difference of the classes'
        shares in all generated and all real tokens.

    Raises:
        ConfigError: the head labels no classes, or takes other features.
    """
    card, channels = head.card, reals.shape[-1]
    if card.task not in ("segmentation", "knn") or card.upsample != 1 or card.channels != channels:
        raise ConfigError(
            f"a head for generated features of {channels} channels must be one for segmentation of as many, not "
            f"upsampled; this one is for {card.task}, {card.channels} channels, upsampled {card.upsample} times"
        )
    first = [list(own).index(row) for row in range(len(reals))]
    labels = [torch.stack(head.probe.predict(maps.float().cpu())) for maps in (made[first], reals)]
    seen = [functional.one_hot(each, card.num_classes).double() for each in labels]
    trip = round_trip_cosine(*seen)
    shares = 0.5 * float((seen[0].mean((0, 1, 2)) - seen[1].mean((0, 1, 2))).abs().sum())
    return {"matched": trip.matched, "shuffled": trip.shuffled, "sigmas": trip.sigmas, "shares": shares}


def check_head(head: SavedHead, run: PriorRun, name: str) -> None:
    """Refuse a head for a run that generates no features, or those of other weights."""
    if run.target.kind != "features":
        raise ConfigError(f"a head judges generated features, and {name!r} generates {run.target.kind}")
    there, denoiser = run.prior.card.get("weights_sha256"), run.prior.card.get("denoiser")
    if there != head.card.weights_sha256 or (denoiser is None) != (head.card.denoiser is None):
        raise ConfigError(
            f"the head was trained on features of {head.card.backbone} ({head.card.weights_sha256[:8]}, "
            f"{'denoised' if head.card.denoiser else 'raw'}), and {name!r} generates those of "
            f"{run.prior.card.get('backbone')} ({str(there)[:8]}, {'denoised' if denoiser else 'raw'})"
        )


def evaluate_priors(
    run_dirs: Sequence[str | Path],
    yardsticks: Sequence[Yardstick] | None = None,
    samples: int = 2000,
    sampling: Sampling | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    head: SavedHead | None = None,
) -> dict[str, Any]:
    """Measure runs on their held-out images, all by the same yardsticks.

    Args:
        run_dirs: folders of :func:`dvt.analysis.priors.runs.train_prior`, of the same images and held-out images.
        yardsticks: None for pixels and random filters; a third model, which no run was conditioned on, is better.
        samples: least number of samples per run; each held-out image gets the same number.
        sampling: sampling settings.
        device: None takes a GPU if there is one.
        progress: called with ("evaluate", runs done, runs).
        head: a frozen head of `dvt probe segmentation --save`, for runs that generate features.

    Returns:
        A report ready for JSON: by run the held-out loss (1 is an untrained prior), by yardstick what :func:`measured`
        gives and, with a head, what :func:`judged` gives.

    Raises:
        ConfigError: there are no runs, or they used different images.
        WeightsError: a run's file is missing or damaged.
    """
    if not run_dirs or samples < 1:
        raise ConfigError(
            f"evaluation needs a run and a sample at least, got {counted(len(run_dirs), 'run')}, "
            f"{counted(samples, 'sample')}"
        )
    runs = {str(folder): open_run(folder, device) for folder in run_dirs}
    data = {name: run.prior.card.get("data", {}).get("sha256", name) for name, run in runs.items()}
    if len(set(data.values())) > 1:
        raise ConfigError(
            f"the runs {', '.join(runs)} learnt from or held out different images: their numbers say nothing of each "
            "other. Evaluate each alone, or train them on the same images with the same --seed and --held-out"
        )
    if head is not None:
        for name, run in runs.items():
            check_head(head, run, name)
    found = {}
    for number, (name, run) in enumerate(runs.items(), 1):
        found[name] = _scores(Path(name), run, yardsticks or (pixels(), random_filters()), samples, sampling, head)
        (progress or silent)("evaluate", number, len(runs))
    return {"runs": found}


def _scores(
    folder: Path,
    run: PriorRun,
    yardsticks: Sequence[Yardstick],
    samples: int,
    sampling: Sampling | None,
    head: SavedHead | None,
) -> dict[str, Any]:
    seen, held = opened_tokens(folder / "tokens"), run.held["pictures"]
    apart = set(run.names)
    chosen = [row for row, name in enumerate(seen.names) if name not in apart]
    each = -(-samples // len(held))
    own = [row for row in range(len(held)) for _ in range(each)]
    maps, calls = draw_maps(sampling or Sampling(), run.prior, run.conditions(own), len(own))
    made = run.pictures_of(maps).cpu()
    side = made.shape[2:]
    training, reals = (
        functional.interpolate(part.float(), side, mode="area") if part.shape[2:] != side else part.float()
        for part in (seen.pictures[chosen], held)
    )
    report = {
        "held_out_loss": held_out_loss(run.prior, run.held["maps"], run.conditions(slice(None))),
        "samples": len(made),
        "calls": calls,
        "yardsticks": {each.name: measured(made, own, reals, training, each) for each in yardsticks},
    }
    if head is not None:
        given = (run.target.restore(each).cpu() for each in (maps, run.held["maps"].float().to(maps)))
        generated, real = given
        report["head"] = judged(head, generated, own, real)
    return report
