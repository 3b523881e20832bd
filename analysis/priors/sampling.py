"""Open the folder of a trained prior, draw samples from it, and measure how good they are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from dvt.analysis.pictures import pca_colours, save
from dvt.analysis.priors.diffusion import heun
from dvt.analysis.priors.evaluate import features, frechet_distance, memorisation, round_trip_cosine
from dvt.analysis.priors.heads import Sampler
from dvt.analysis.priors.prior import Prior, sampling_sigmas
from dvt.analysis.priors.targets import PriorTarget
from dvt.analysis.priors.token_set import BATCH, Clean, TokenSet, token_identity
from dvt.backbones import Backbone
from dvt.backbones.weights import save_state
from dvt.errors import BackboneError, ConfigError, WeightsError
from dvt.progress import Progress
from dvt.schema import typed

_FEWEST_COMPARED = 20  # held-out images that the memorisation check needs
_NOISE_DRAWS = 8  # of noise for each held-out image in a validation
_TILE, _GAP = 96, 4  # pixels of a picture of samples


def keep(path: Path, held: TokenSet, maps: Tensor, training: Tensor, reals: Tensor, names: Sequence[Path]) -> None:
    tensors = {"pictures": held.pictures, "maps": maps, "training_features": training, "held_out_features": reals}
    if held.conditions is not None:
        tensors["conditions"] = held.conditions
    save_state(path, tensors, {"images": json.dumps([str(name) for name in names])})


@dataclass(frozen=True)
class PriorRun:
    """Hold what a run's folder has for sampling.

    Args:
        prior: the trained prior, on its device.
        target: what it generates.
        held: tensors by name: pictures (n, 3, S, S), maps (n, h, w, D), conditions (n, M, C), training_features and
            held_out_features (N, C).
        names: files of the held-out images.
    """

    prior: Prior
    target: PriorTarget
    held: dict[str, Tensor]
    names: list[str]

    def conditions(self, rows: slice | list[int]) -> Tensor | None:
        """Move the conditions (n, M, C) of some rows to the prior's device; None where there are none."""
        if "conditions" not in self.held:
            return None
        return self.held["conditions"][rows].to(next(self.prior.parameters()).device)


def open_run(folder: str | Path, device: str | torch.device | None = None) -> PriorRun:
    """Open the run that :func:`train_prior` left, or is leaving, in a folder.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    folder = Path(folder)
    prior = Prior.load(folder / "prior.safetensors").to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = folder / "held_out.safetensors"
    try:
        with safe_open(str(path), "pt") as file:
            names = json.loads((file.metadata() or {})["images"])
        held = load_file(path)
        target = typed(PriorTarget, prior.card["target"])
        _check_held(held, names, prior, target)
    except Exception as error:  # of the header's JSON, of types that torch lacks, of a card that lacks something
        raise WeightsError(f"cannot read {str(path)!r}: {error}; run the training again, it continues") from error
    return PriorRun(prior, target, held, names)


def _check_held(held: dict[str, Tensor], names: Any, prior: Prior, target: PriorTarget) -> None:
    """Check that what a run keeps fits its prior, and holds numbers."""
    config, count = prior.config, len(names)
    condition = prior.card["condition"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("it names no images")
    wanted: dict[str, tuple[int | None, ...]] = {
        "maps": (count, *config.grid, config.token_dim),
        "pictures": (count, 3, None, None),
    }
    wanted |= {"training_features": (None, None), "held_out_features": (None, None)}
    if config.condition_dim is not None:
        cells = math.prod(config.condition_grid) if config.condition_grid else None
        wanted["conditions"] = (count, None if condition == "both" else cells, config.condition_dim)
    for name, shape in wanted.items():
        value = held[name]
        same = value.ndim == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape, strict=True))
        if not same or not value.numel() or not value.isfinite().all():
            raise ValueError(f"{name} is {tuple(value.shape)} instead of {shape}, or holds NaN")
    if target.kind != "latents":  # whose VAE is read when it is needed
        made = target.decode(held["maps"][:1].float())
        fits = target.kind == "features" or made.shape[1:] == held["pictures"].shape[1:]
        if not fits or made.shape[0] != 1 or not made.isfinite().all():
            raise ValueError(f"the target {target.kind!r} of patch {target.patch} does not fit them")


# --- sampling


def sample_prior(
    run_dir: str | Path,
    out: str | Path | None = None,
    images: int = 8,
    samples: int = 4,
    steps: int = 18,
    guidance: float = 1.0,
    seed: int = 0,
    sampler: Sampler = heun,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Draw samples for held-out images, each shown beside the image that its condition comes from.

    Args:
        run_dir: of :func:`train_prior`; nothing else is needed.
        out: the .png file to write; None for samples.png in the run's folder.
        images: rows at most, held-out images.
        samples: columns, samples of each.
        steps: noise levels of the sampler.
        guidance: 1 for none.
        seed: of the samples.
        sampler: of :mod:`dvt.analysis.priors.diffusion`.
        device: None for a GPU if there is one.

    Returns:
        A report ready for JSON: path, counts, calls of the network.
    """
    if out is not None and Path(out).suffix != ".png":
        raise ConfigError(f"samples are written to a .png file, got {str(out)!r}")
    if images < 1 or samples < 1:
        raise ConfigError(f"images and samples must be at least 1, got {images} and {samples}")
    run, out = open_run(run_dir, device), Path(out or Path(run_dir) / "samples.png")
    images = min(images, len(run.names))
    rows = [row for row in range(images) for _ in range(samples)]
    maps, calls = _drawn(run, rows, steps, guidance, seed, sampler)
    save(_figure(run, run.target.decode(maps).cpu(), images, samples), out)
    return {"out": str(out), "images": images, "samples": samples, "calls": calls}


def _drawn(
    run: PriorRun, rows: list[int], steps: int, guidance: float, seed: int, sampler: Sampler
) -> tuple[Tensor, int]:
    generator = torch.Generator(next(run.prior.parameters()).device).manual_seed(seed)
    sigmas, parts, calls = sampling_sigmas(steps), [], 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        maps, more = run.prior.sample(
            run.conditions(part), generator, len(part), sampler=sampler, sigmas=sigmas, guidance=guidance
        )
        parts.append(maps)
        calls += more
    return torch.cat(parts), calls


def _figure(run: PriorRun, generated: Tensor, images: int, samples: int) -> Any:
    """Draw rows of held-out images, their samples to the right of them; features in the colours of the real ones."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    first = [picture.float().permute(1, 2, 0) for picture in run.held["pictures"][:images]]
    columns = [first]
    if run.target.kind == "features":
        reals = list(run.target.restore(run.held["maps"][:images]))
        colours = pca_colours(reals, *generated)
        columns.append(colours[:images])
        flat = colours[images:]
    else:
        flat = [picture.permute(1, 2, 0) for picture in generated]
    columns += [flat[k::samples] for k in range(samples)]

    condition = (
        "held-out image" if run.prior.config.condition_dim is None else f"condition: {run.prior.card['condition']}"
    )
    titles = [condition, *(["its features"] if len(columns) > samples + 1 else []), "samples"]
    side = math.ceil(_TILE / len(first[0])) * len(first[0])  # a multiple, so that pixels stay squares
    tiles = [_tile(column[row], side) for row in range(images) for column in columns]
    sheet = make_grid(torch.stack(tiles), len(columns), padding=_GAP, pad_value=1.0).permute(1, 2, 0)
    height, width = sheet.shape[0] / 100, sheet.shape[1] / 100
    figure = Figure(figsize=(width, height + 0.25), facecolor="white")
    axis = figure.add_axes((0, 0, 1, height / (height + 0.25)))
    axis.imshow(sheet.numpy(), interpolation="nearest")
    axis.set_axis_off()
    for column, title in enumerate(titles):
        axis.text(column * (side + _GAP) + _GAP, -4, title, fontsize=8)
    return figure


def _tile(picture: Tensor, side: int) -> Tensor:
    """Enlarge (h, w, 3) to (3, side, side), pixels as squares."""
    return functional.interpolate(picture.clamp(0, 1).permute(2, 0, 1)[None].float(), (side, side), mode="nearest")[0]


# --- evaluation


@torch.no_grad()
def held_out_loss(prior: Prior, maps: Tensor, conditions: Tensor | None, draws: int = _NOISE_DRAWS) -> float:
    """Average the loss of images that were not trained on, over images and over `draws` of fixed noise for each."""
    device, total, count = next(prior.parameters()).device, 0.0, 0
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(draws):
        for start in range(0, len(maps), BATCH):
            part = maps[start : start + BATCH].to(device).float()
            given = None if conditions is None else conditions[start : start + BATCH].to(device)
            total += float(prior.loss(part, given, generator)) * len(part)
            count += len(part)
    return total / count


def evaluate_prior(
    run_dir: str | Path,
    backbone: Backbone,
    denoiser: Clean | None = None,
    steps: int = 18,
    guidance: float = 1.0,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Measure one sample for each held-out image in the backbone's features, beside what chance or truth gives.

    Args:
        run_dir: of :func:`train_prior`.
        backbone: the one that it was trained with.
        denoiser: the one that it was trained with, or None.
        steps, guidance, seed, device: as for :func:`sample_prior`.

    Returns:
        A report ready for JSON. "round_trip": cosines of the samples' features with their own condition ("matched"),
        with those of others ("shuffled", the null), the difference in standard errors ("sigmas") and what the real
        pictures reach at this size ("ceiling"); for features, with the real map; None without a condition.
        "frechet": distance of the training images' features from the samples' ("generated") and from the same number
        of held-out ones ("held_out", the null). "memorisation": share of samples nearer to a training image than all
        but 5 % of held-out ones are, p_value and threshold; None with fewer than 20 held-out images. "held_out_loss".

    Raises:
        BackboneError: the prior was trained with another backbone, or with and not without a denoiser.
    """
    run = open_run(run_dir, device)
    _check_same(run.prior.card, token_identity(backbone, denoiser))
    rows = list(range(len(run.names)))
    maps, calls = _drawn(run, rows, steps, guidance, seed, heun)
    made = run.target.decode(maps)
    pictures = run.held["pictures"].float()
    if run.target.kind == "features":
        summary, seen = made.mean((1, 2)).cpu(), made.cpu()
        trip = _round_trip(run, seen, run.target.restore(run.held["maps"]), None)
    else:
        read = "cls" if run.prior.card["condition"] == "cls" else "patch"
        summary = _features(made, backbone, denoiser, "mean")
        seen, best = (_features(each, backbone, denoiser, read) for each in (made, pictures))
        trip = _round_trip(run, seen, None, best)
    training, held = run.held["training_features"], run.held["held_out_features"]
    return {
        "held_out_loss": held_out_loss(run.prior, run.held["maps"], run.conditions(rows)),
        "round_trip": trip,
        "frechet": {"generated": frechet_distance(training, summary), "held_out": frechet_distance(training, held)},
        "memorisation": _memorised(summary, training, held),
        "samples": len(made),
        "calls": calls,
    }


def _check_same(card: dict[str, Any], here: dict[str, Any]) -> None:
    changed = [
        f"{name} {card.get(name)!r} there, {value!r} here" for name, value in here.items() if card.get(name) != value
    ]
    if changed:
        raise BackboneError(
            f"the prior was trained on tokens of another backbone ({'; '.join(changed)}); give the same one, and a "
            "denoiser where it had one"
        )


def _round_trip(run: PriorRun, made: Tensor, reals: Tensor | None, ceiling: Tensor | None) -> dict[str, float] | None:
    if "conditions" not in run.held or len(made) < 3:
        return None
    if reals is None:
        reals = run.held["conditions"].float()
        if run.prior.card["condition"] == "cls":
            reals = reals[:, 0]
        else:
            reals = reals[:, -made[0, ..., 0].numel() :].view_as(made)
    trip = round_trip_cosine(made, reals)
    best = 1.0 if ceiling is None else round_trip_cosine(ceiling, reals).matched
    return {**asdict(trip), "sigmas": trip.sigmas, "ceiling": best}


def _memorised(made: Tensor, training: Tensor, held: Tensor) -> dict[str, float] | None:
    if len(held) < _FEWEST_COMPARED:
        return None
    found = memorisation(made, training, held)
    return {"share": found.share, "p_value": found.p_value, "threshold": found.threshold}


def summaries(seen: TokenSet, backbone: Backbone, denoiser: Clean | None, progress: Progress) -> Tensor:
    """Compute mean features (N, C) of real images, at the size that is generated."""
    if seen.patches is not None:
        return seen.patches.float().mean((1, 2))
    parts = []
    for start in range(0, len(seen.pictures), BATCH):
        parts.append(_features(seen.pictures[start : start + BATCH].float(), backbone, denoiser, "mean"))
        progress("features", min(start + BATCH, len(seen.pictures)), len(seen.pictures))
    return torch.cat(parts)


def _features(pictures: Tensor, backbone: Backbone, denoiser: Clean | None, read: Any) -> Tensor:
    pictures = pictures.to(backbone.mean)
    return features(backbone, pictures, read, clean=denoiser, size=backbone.image_size, batch_size=BATCH).cpu()
