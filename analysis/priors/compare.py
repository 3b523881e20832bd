"""Compare priors conditioned on different tokens of the same images, with the same seeds, split and budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt.analysis.priors.config import Sampling
from dvt.analysis.priors.evaluate import round_trip_cosine
from dvt.analysis.priors.job_config import Comparison
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.sampling import draw_maps
from dvt.analysis.priors.scoring import Yardstick, pixels, random_filters
from dvt.analysis.priors.targets import PriorTarget
from dvt.analysis.priors.token_set import Clean, split, square, token_identity
from dvt.analysis.priors.training import fit_prior
from dvt.backbones import Backbone
from dvt.backbones.weights import read_described, save_state
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.images import load_image, readable, size_and_sha256
from dvt.progress import Progress, silent
from dvt.text import differing
from dvt.views import resize

_KEPT = "comparison"

Treatment = Callable[[Tensor], Tensor]
"""A function from an image (3, H, W) in [0, 1] at the backbone's size to patch tokens (h, w, C)."""


@dataclass(frozen=True)
class Material:
    """Hold all images of a comparison and their tokens.

    Args:
        pictures: (N, 3, S, S).
        tokens: for each kind, (N, h w, C) float16.
        grid: (h, w).
        chosen, held: rows of the training images and of the held-out ones.
        sha256s: hashes of the images' files.
    """

    pictures: Tensor
    tokens: dict[str, Tensor]
    grid: tuple[int, int]
    chosen: list[int]
    held: list[int]
    sha256s: list[str]


def look(
    paths: Sequence[Path],
    backbone: Backbone,
    config: Comparison,
    treatments: Mapping[str, Treatment] | None = None,
    shared: Callable[[list[Tensor]], Tensor] | None = None,
    denoiser: Clean | None = None,
    progress: Progress = silent,
    keep: tuple[Path, dict[str, Any]] | None = None,
) -> Material:
    """Compute the tokens of all kinds for all images, or read those that a file keeps.

    Args:
        paths: paths of the images.
        backbone: computes the raw tokens.
        config: gives the split and the kinds.
        treatments: for each further kind, a function of one image.
        shared: computes the artifact (h, w, C) of some training images, for the kind "raw - G".
        denoiser: applied to raw tokens for the kind "denoiser".
        progress: called with ("look", images done, images).
        keep: the file to keep the tokens in, with plain JSON values that say what else they depend on, such as the
            settings of the treatments.

    Raises:
        ConfigError: the file keeps tokens of something else.
    """
    given = (treatments or {}, shared, denoiser, progress)
    if keep is None:
        return _of_kinds(_looked(paths, backbone, config, *given), config.kinds)
    file, more = keep
    wanted = {"side": config.prior.side, "held_out": config.prior.held_out, "seed": config.prior.loop.seed}
    about = {**token_identity(backbone, denoiser), **wanted, **more}
    about = json.loads(json.dumps({**about, "images": [size_and_sha256(path)[1] for path in paths]}))
    if file.exists():
        there, state = read_described(file, _KEPT, "tokens of a comparison")
        _check_kept(file, there, about)
        return _of_kinds(_opened(there, state), config.kinds)
    material = _looked(paths, backbone, config, *given)
    rest = {"grid": material.grid, "chosen": material.chosen, "held": material.held, "sha256s": material.sha256s}
    state = {f"tokens {name}": values.contiguous() for name, values in material.tokens.items()}
    described = {"from": about, **rest, "kinds": list(material.tokens)}
    save_state(file, {"pictures": material.pictures, **state}, {_KEPT: json.dumps(described)})
    return _of_kinds(material, config.kinds)


def _check_kept(file: Path, there: Any, about: dict[str, Any]) -> None:
    """Refuse tokens that are kept of other images or settings."""
    source = there.get("from") if isinstance(there, dict) else None
    if source == about:
        return
    if not isinstance(source, dict):
        raise ConfigError(f"{str(file)!r} keeps no readable tokens of a comparison; begin anew (--overwrite)")
    raise ConfigError(
        f"{str(file)!r} keeps tokens of other images or settings: {differing(source, about)}. Continue with its own "
        "(--resume), begin anew in its place (--overwrite), or choose another folder"
    )


def _of_kinds(material: Material, kinds: Sequence[str]) -> Material:
    """Select kinds of tokens, in the order given; all if none are given."""
    if unknown := [name for name in kinds if name not in material.tokens]:
        raise ConfigError(f"there are no tokens of kind {unknown[0]!r}; choose from {', '.join(material.tokens)}")
    return replace(material, tokens={name: material.tokens[name] for name in kinds or material.tokens})


def _opened(about: dict[str, Any], state: dict[str, Tensor]) -> Material:
    tokens = {name: state[f"tokens {name}"] for name in about["kinds"]}
    rows = (about["chosen"], about["held"], about["sha256s"])
    return Material(state["pictures"], tokens, (about["grid"][0], about["grid"][1]), *rows)


@torch.no_grad()
def _looked(
    paths: Sequence[Path],
    backbone: Backbone,
    config: Comparison,
    treatments: Mapping[str, Treatment],
    shared: Callable[[list[Tensor]], Tensor] | None,
    denoiser: Clean | None,
    progress: Progress,
) -> Material:
    found = readable(paths, lambda path: (size_and_sha256(path)[1], square(load_image(path))))
    sha256s, images = [each[0] for each in found.values()], [each[1] for each in found.values()]
    chosen, held = split(sha256s, config.prior.held_out, config.prior.loop.seed)
    inputs = [resize(image, backbone.image_size) for image in images]
    rows: dict[str, list[Tensor]] = {"raw": [], **{name: [] for name in treatments}}
    if denoiser is not None:
        rows["denoiser"] = []
    for done, image in enumerate(inputs, 1):
        tokens = backbone(image[None].to(backbone.mean))
        rows["raw"].append(tokens.patches[0].cpu())
        if denoiser is not None:
            rows["denoiser"].append(denoiser(tokens).patches[0].cpu())
        for name, treat in treatments.items():
            rows[name].append(treat(image).cpu())
        progress("look", done, len(inputs))
    maps = {name: torch.stack(values) for name, values in rows.items()}
    raw, mean = maps["raw"], maps["raw"][chosen].mean(0)
    maps |= {"raw - mean map": raw - mean, "position only": mean.expand_as(raw), "learned centring": raw}
    if shared is not None:
        maps["raw - G"] = raw - shared([inputs[row] for row in chosen[:24]]).cpu()
    other = torch.arange(len(raw))
    for side in (chosen, held):
        other[side] = torch.tensor(side).roll(1)
    maps["shuffled"] = raw[other]
    kept = {name: values.flatten(1, 2).half() for name, values in maps.items()}
    pictures = torch.stack([resize(image, (config.prior.side, config.prior.side)) for image in images])
    return Material(pictures, kept, (raw.shape[1], raw.shape[2]), chosen, held, sha256s)


def compare_priors(
    material: Material,
    out: Path,
    config: Comparison,
    yardsticks: Sequence[Yardstick] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train one prior for each kind and seed, measure all in the same way over steps, and write a page.

    Runs that are finished in the folder are not repeated. Yardsticks compare the sample for each held-out image with
    the image itself, after subtracting the training images' mean.

    Args:
        material: images and tokens, from :func:`look`.
        out: the folder for compare.json, page.html, samples.png and the runs.
        config: settings of the comparison.
        yardsticks: None for pixels and random filters.
        progress: called with ("runs", runs done, runs).

    Returns:
        A report ready for JSON: for each kind and measure, curves with intervals, and the last and the best point with
        their paired differences to raw.
    """
    sticks = list(yardsticks or (pixels(), random_filters()))
    jobs = [(kind, seed) for seed in range(config.seeds) for kind in material.tokens]
    curves: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in material.tokens}
    shown: dict[str, Tensor] = {}
    for number, (kind, seed) in enumerate(jobs, 1):
        rows, pictures = _run(kind, seed, material, out / "runs" / f"{_plain(kind)}-{seed}", config, sticks)
        curves[kind].append(rows)
        shown.setdefault(kind, pictures)
        progress("runs", number, len(jobs))
    report = {
        "config": {"seeds": config.seeds, **config.prior.to_json()},
        "images": {"training": len(material.chosen), "held_out": len(material.held)},
        "kinds": {kind: _summary(curves[kind], curves["raw"]) for kind in curves},
    }
    report = json.loads(json.dumps(report))
    with whole_file(out / "compare.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    from dvt.analysis.priors.compare_page import write_page

    write_page(report, {"held out": material.pictures[material.held], **shown}, out)
    return report


def _plain(kind: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in kind)


def _run(
    kind: str, seed: int, material: Material, folder: Path, config: Comparison, sticks: Sequence[Yardstick]
) -> tuple[list[dict[str, float]], Tensor]:
    """Train one prior; return its curve, and samples for the held-out images."""
    training, tokens = config.prior, material.tokens[kind]
    target = PriorTarget(training.target, training.patch, training.vae)
    raw = target.encode(material.pictures, material.pictures)
    target = target.fitted(raw[material.chosen])
    maps = target.standardise(raw)
    settings = replace(training, centred=kind == "learned centring")
    about = settings.prior((maps.shape[1], maps.shape[2]), maps.shape[3], tokens.shape[-1], material.grid)
    prior = Prior(about, torch.Generator().manual_seed(seed))
    prior.card = {"condition": "patch", "target": asdict(target)}
    held = (maps[material.held], tokens[material.held])
    reals, centres = material.pictures[material.held], {}
    for stick in sticks:
        centres[stick.name] = stick(material.pictures[material.chosen]).mean(0)

    def sampled() -> Tensor:
        return target.decode(draw_maps(Sampling(seed=seed), prior, held[1], len(held[1]))[0])

    def validate() -> dict[str, float]:
        pictures = sampled()
        found: dict[str, float] = {}
        for stick in sticks:
            trip = round_trip_cosine(stick(pictures) - centres[stick.name], stick(reals) - centres[stick.name])
            found |= {f"{stick.name}: cosine": trip.matched, f"{stick.name}: with others": trip.shuffled}
        return found

    loop = replace(training.loop, seed=seed, batch_size=min(training.loop.batch_size, len(material.chosen)))
    done = fit_prior(
        prior,
        (maps[material.chosen], tokens[material.chosen]),
        held,
        replace(loop, checkpoint_every=loop.steps, keep=1),
        folder,
        validate=validate,
        settings={"kind": kind, "prior": asdict(about), "tokens": _mark(tokens), "pictures": _mark(material.pictures)},
    )
    rows = [row for row in done.history if "held_out_loss" in row]
    return [{name: float(value) for name, value in row.items() if name != "lr"} for row in rows], sampled()


def _mark(values: Tensor) -> float:
    """Summarise a tensor by one number, which is a setting of its run: other tokens make another run."""
    return round(float(values.double().abs().mean()), 6)


# --- summaries of the curves


def _summary(runs: list[list[dict[str, float]]], raw: list[list[dict[str, float]]]) -> dict[str, Any]:
    steps = [int(row["step"]) for row in runs[0]]
    names = [name for name in runs[0][0] if name not in ("step", "loss", "grad_norm")]
    found = {}
    for name in names:
        mine, theirs = ([_values(rows, name) for rows in each] for each in (runs, raw))
        found[name] = {"steps": steps, **_measure(mine, theirs, name)}
    return found


def _values(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _measure(runs: list[list[float]], raw: list[list[float]], name: str) -> dict[str, Any]:
    """Summarise one measure of one kind, from curves (seeds, points), and compare it with raw."""
    best = min if "loss" in name else max
    mean = torch.tensor(runs).mean(0)
    quarter = max(1, len(mean) // 4)
    late, before = mean[-quarter:].mean(), mean[-2 * quarter : -quarter].mean()  # NaN if there is only one point
    return {
        "curve": [interval(list(point)) for point in zip(*runs, strict=True)],
        "last": interval([run[-1] for run in runs]),
        "best": interval([best(run) for run in runs]),
        "last_over_raw": interval([a[-1] - b[-1] for a, b in zip(runs, raw, strict=True)]),
        "best_over_raw": interval([best(a) - best(b) for a, b in zip(runs, raw, strict=True)]),
        "change_in_last_quarter": float(late - before),
    }


def interval(values: Sequence[float]) -> dict[str, float]:
    """Compute the mean over seeds and half the width of its 95 % t interval.

    >>> interval([1.0, 2.0, 3.0])["mean"]
    2.0
    """
    from scipy.stats import t as student

    each = torch.tensor(values, dtype=torch.float64)
    half = (
        float(student.ppf(0.975, len(each) - 1)) * float(each.std()) / len(each) ** 0.5 if len(each) > 1 else math.nan
    )
    return {"mean": float(each.mean()), "half": half}
