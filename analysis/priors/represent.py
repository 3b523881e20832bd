"""Train encoders on a prior's samples, and probe them on real labels beside encoders that learnt from real images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt.analysis.priors.compare import interval
from dvt.analysis.priors.config import Sampling
from dvt.analysis.priors.encoder import PictureEncoder, encode, train_encoder
from dvt.analysis.priors.job_config import Represent
from dvt.analysis.priors.reading import Wanted, opened_tokens, read_tokens
from dvt.analysis.priors.run_folder import PriorRun, open_run
from dvt.analysis.priors.sampling import draw_maps
from dvt.analysis.priors.scaling import FlooredLaw, fit_floored_law
from dvt.analysis.probes.classification import ClassificationProbe, KnnClassification, LinearClassification
from dvt.backbones.weights import read_described, save_state
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.images import file_sha256
from dvt.progress import Progress, silent
from dvt.text import differing

_FEWEST = 20  # test images
_LAW_SIZES = 5


@dataclass(frozen=True)
class Pictures:
    """Hold pictures and, for each, the number of its condition and of its class.

    Args:
        pictures: (N, 3, S, S) in [0, 1].
        conditions: (N,) for samples, the number of the condition; for real images, that of the image.
        classes: (N,) index of the class; -1 for an unknown one.
    """

    pictures: Tensor
    conditions: Tensor
    classes: Tensor

    def first(self, count: int) -> Pictures:
        """Take some pictures only; whole groups of samples of one condition, for these lie together."""
        return Pictures(self.pictures[:count], self.conditions[:count], self.classes[:count])

    def __len__(self) -> int:
        return len(self.pictures)


def represent(
    run_dir: str | Path,
    out: str | Path,
    config: Represent | None = None,
    test: Sequence[Path] = (),
    sampling: Sampling | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Sample a prior, train encoders on the samples and on real images, and probe all of them on real labels.

    The rows are

    =================  =================================================================================
    by condition       samples; those of one condition are positives (StableRep)
    masked             the same, and hidden patches are predicted (SynCLR)
    by image           samples; two views of one sample are positives (SimCLR)
    real by image      the prior's training images; two views of one image are positives
    real by class      the same; images of one class are positives (supervised contrast)
    untrained          no training
    =================  =================================================================================

    Args:
        run_dir: the folder of a prior that was trained with a condition on images in folders named after their class.
        out: a folder for samples, encoders, represent.json and curves.png; encoders that are finished there are kept.
        config: settings.
        test: labelled images to score on, in folders named as the training images'; none for the run's held-out images.
        sampling: settings for drawing samples.
        device: where to sample; None takes a GPU if there is one. Encoders are trained on the CPU.
        progress: called with ("look" or "encoders", done, total).

    Returns:
        A report ready for JSON: rows with accuracies and intervals over seeds, and by source the error of the linear
        probe against the number of pictures with a law with a floor.

    Raises:
        ConfigError: the prior has no condition or generates features, there are fewer than two classes, or too few
            test images.
    """
    config, out, run = config or Represent(), Path(out), open_run(run_dir, device)
    real, names = _real(Path(run_dir), run)
    tested = _test(run, names, [Path(path) for path in test], int(real.pictures.shape[2]), progress)
    made = _made(Path(run_dir), run, real, out / "samples.safetensors", config, sampling or Sampling())
    jobs = _jobs(config, made, real)
    progress("encoders", 0, len(jobs))
    scores: dict[str, dict[str, list[float]]] = {}
    for number, (name, pictures, ids, masked) in enumerate(jobs, 1):
        encoders = [_trained(name, pictures, ids, seed, masked, config, out / "encoders") for seed in _seeds(config)]
        scores[name] = _probed(encoders, real, tested, len(names), config)
        progress("encoders", number, len(jobs))
    draws = (torch.Generator().manual_seed(seed) for seed in _seeds(config))
    side = int(real.pictures.shape[2])
    untrained = [PictureEncoder(side, config.encoder, each) for each in draws]
    scores["untrained"] = _probed(untrained, real, tested, len(names), config)
    report = _report(scores, config, made, real, tested, names)
    with whole_file(out / "represent.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    draw_curves(report, out / "curves.png")
    return report


# --- pictures


def _real(folder: Path, run: PriorRun) -> tuple[Pictures, list[str]]:
    """Take the training images of a run with their classes, and the classes' names."""
    if run.prior.config.condition_dim is None:
        raise ConfigError("samples of one condition are positives of each other, and this prior has no condition")
    if run.target.kind == "features":
        raise ConfigError("encoders learn from pictures, and this prior generates features; train one on pixels")
    seen = opened_tokens(folder / "tokens")
    apart = set(run.names)
    rows = [row for row, name in enumerate(seen.names[: len(seen) - seen.mirrored]) if name not in apart]
    named = [Path(seen.names[row]).parent.name for row in rows]
    names = sorted(set(named))
    if len(names) < 2:
        raise ConfigError(f"classes are the names of the images' folders, and all images lie in {names[0]!r}")
    classes = torch.tensor([names.index(name) for name in named])
    return Pictures(seen.pictures[rows].float(), torch.tensor(rows), classes), names


def _test(run: PriorRun, names: list[str], test: list[Path], side: int, progress: Progress) -> Pictures:
    """Read the test images, or take the run's held-out ones."""
    if test:
        seen = read_tokens(test, None, Wanted(None, False, side), None, progress)
        found, pictures = list(seen.names), seen.pictures[list(range(len(seen)))].float()
    else:
        found, pictures = run.names, run.held["pictures"].float()
    named = [Path(name).parent.name for name in found]
    if unknown := sorted(set(named) - set(names)):
        raise ConfigError(f"there is a test image of class {unknown[0]!r}; the prior learnt from {', '.join(names)}")
    if len(named) < _FEWEST:
        raise ConfigError(f"an accuracy needs {_FEWEST} test images, got {len(named)}; give more by --test")
    classes = torch.tensor([names.index(name) for name in named])
    return Pictures(pictures, torch.arange(len(named)), classes)


def _made(folder: Path, run: PriorRun, real: Pictures, path: Path, config: Represent, sampling: Sampling) -> Pictures:
    """Draw samples for the training images' conditions and keep them in a file, or read those that it holds."""
    wanted = min(config.conditions or len(real), len(real))
    about = {
        "prior": file_sha256(folder / "prior.safetensors"),
        "sampling": asdict(sampling),
        "samples": config.samples,
        "conditions": wanted,
    }
    if path.exists():
        there, state = read_described(path, "samples", "samples of a prior")
        if there != about:
            changed = differing(there if isinstance(there, dict) else {}, about)
            raise ConfigError(
                f"{str(path)!r} holds other samples: {changed}. Continue with their settings "
                "(--resume), begin anew in their place (--overwrite), or choose another folder"
            )
        return Pictures(state["pictures"].float(), state["conditions"], state["classes"])
    seen = opened_tokens(folder / "tokens")
    some = torch.randperm(len(real), generator=torch.Generator().manual_seed(sampling.seed))[:wanted]
    given = _conditions(run, seen, [int(real.conditions[row]) for row in some], real.classes[some])
    maps, _ = draw_maps(sampling, run.prior, given.repeat_interleave(config.samples, 0), wanted * config.samples)
    classes = real.classes[some].repeat_interleave(config.samples)
    ids = classes if run.prior.card.get("labels") else torch.arange(wanted).repeat_interleave(config.samples)
    tensors = {"pictures": run.pictures_of(maps).cpu().half(), "conditions": ids, "classes": classes}
    save_state(path, tensors, {"samples": json.dumps(about)})
    return Pictures(tensors["pictures"].float(), ids, classes)


def _conditions(run: PriorRun, seen: Any, rows: list[int], classes: Tensor) -> Tensor:
    if seen.conditions is not None:
        return seen.conditions[rows]
    if not (known := run.prior.card.get("labels")):
        raise ConfigError(
            f"the conditions of this run, {run.prior.card.get('condition')!r}, are not kept in its folder"
        )
    return functional.one_hot(classes, len(known)).half()[:, None]


# --- encoders and probes

_Wish = tuple[str, Pictures, Tensor, bool]


def _jobs(config: Represent, made: Pictures, real: Pictures) -> list[_Wish]:
    """List the encoders to train: (name, pictures, which are positives, whether patches are hidden)."""
    alone, apart = torch.arange(len(made)), torch.arange(len(real))
    jobs: list[_Wish] = [
        ("by condition", made, made.conditions, False),
        ("masked", made, made.conditions, True),
        ("by image", made, alone, False),
        ("real by image", real, apart, False),
        ("real by class", real, real.classes, False),
    ]
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    mixed = Pictures(real.pictures[order], apart, real.classes[order])
    for count in law_sizes(config, len(made), len(real)):
        some = made.first(count)
        jobs.append((f"synthetic, {count}", some, some.conditions, False))
        jobs.append((f"real, {count}", mixed.first(count), apart[:count], False))
    return jobs


def law_sizes(config: Represent, made: int, real: int) -> list[int]:
    """List the numbers of pictures at which synthetic and real ones are compared.

    Raises:
        ConfigError: there are fewer pictures than a size asks for, or too few for five sizes.
    """
    most = min(made, real)
    sizes = sorted(config.sizes) or [most // 2**k for k in reversed(range(_LAW_SIZES))]
    if sizes[-1] > most or sizes[0] < 2:
        raise ConfigError(f"sizes must lie in 2 ... {most}, the number of samples and of real images, got {sizes}")
    return sizes


def _seeds(config: Represent) -> range:
    return range(config.loop.seed, config.loop.seed + config.seeds)


def _trained(
    name: str, pictures: Pictures, ids: Tensor, seed: int, masked: bool, config: Represent, folder: Path
) -> nn.Module:
    encoder = config.encoder if masked else replace(config.encoder, masked=0.0)
    plain = "".join(letter if letter.isalnum() else "_" for letter in name)
    loop = replace(config.loop, seed=seed, checkpoint_every=config.loop.steps)
    return train_encoder(pictures.pictures, ids, encoder, loop, folder / f"{plain}-{seed}")


def _probed(
    encoders: Sequence[nn.Module], real: Pictures, test: Pictures, classes: int, config: Represent
) -> dict[str, list[float]]:
    """Score encoders by probes that are fitted on all real training images, whatever the encoder learnt from."""
    probes: dict[str, Callable[[], ClassificationProbe]] = {
        "kNN": partial(KnnClassification, classes, config.neighbours),
        "linear": partial(LinearClassification, classes),
    }
    found: dict[str, list[float]] = {name: [] for name in probes}
    for encoder in encoders:
        known, asked = (encode(encoder, each.pictures)[:, None, None] for each in (real, test))
        for name, make in probes.items():
            probe = make().fit(known, list(real.classes))
            found[name].append(probe.score(asked, list(test.classes))["accuracy"])
    return found


def _report(
    scores: dict[str, dict[str, list[float]]],
    config: Represent,
    made: Pictures,
    real: Pictures,
    test: Pictures,
    names: list[str],
) -> dict[str, Any]:
    sizes = law_sizes(config, len(made), len(real))
    curves: dict[str, Any] = {}
    for source in ("synthetic", "real"):
        # Half an error more: an encoder without errors on the test images still has a logarithm.
        errors = [[max(1 - v, 0.5 / len(test)) for v in scores[f"{source}, {n}"]["linear"]] for n in sizes]
        law: FlooredLaw = fit_floored_law(sizes, errors)
        curves[source] = {"sizes": sizes, "errors": [interval(each) for each in errors], "law": asdict(law)}
    beside = scores["real by image"]
    rows = {
        name: {
            **{probe: interval(values) for probe, values in found.items()},
            "over_real": interval([a - b for a, b in zip(found["linear"], beside["linear"], strict=True)]),
        }
        for name, found in scores.items()
        if "," not in name
    }
    counts = {"synthetic": len(made), "conditions": len(made.conditions.unique())}
    counts |= {"real": len(real), "test": len(test)}
    chance = float(test.classes.bincount(minlength=len(names)).max()) / len(test)
    return {"config": asdict(config), "pictures": counts, "chance": chance, "rows": rows, "curves": curves}


def draw_curves(report: dict[str, Any], path: Path) -> Path:
    """Draw the error against the number of pictures, with the laws, into a .png file."""
    from matplotlib.figure import Figure

    from dvt.analysis.pictures import save

    figure = Figure(figsize=(6, 4), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for source, found in report["curves"].items():
        sizes, means = found["sizes"], [each["mean"] for each in found["errors"]]
        halves = [each["half"] for each in found["errors"]]
        law = found["law"]
        words = f"{source}: k {law['k']:.2f} [{law['k_low']:.2f}, {law['k_high']:.2f}], floor {law['floor']:.3f}"
        (line, *_) = axis.errorbar(sizes, means, halves, marker="o", linestyle="none", capsize=3, label=words)
        steps = torch.linspace(sizes[0], sizes[-1], 100)
        curve = law["floor"] + law["a"] * steps ** -law["k"]
        axis.plot(steps.tolist(), curve.tolist(), color=line.get_color())
    axis.set_xscale("log")
    axis.set_xlabel("pictures that the encoder learnt from")
    axis.set_ylabel("error of the linear probe")
    axis.legend(fontsize=8)
    return save(figure, path)
