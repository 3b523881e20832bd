"""Run `dvt prior train|sample|evaluate|loop`: generation from tokens shows which information they hold."""

from __future__ import annotations

import functools
from typing import Any

from rich.console import Console
from rich.table import Table

from dvt.cli.common import begin_anew, keep_settings, keeping, progress_bar, resolved, shown
from dvt.cli.settings.common import DenoiserOptions
from dvt.cli.settings.priors import PriorEvaluate, PriorLoop, PriorSample, PriorTrain
from dvt.devices import find_device
from dvt.errors import ConfigError
from dvt.images import find_images
from dvt.text import counted


def train(command: PriorTrain, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior train`; the exit code is 0 when the prior is trained."""
    from dvt.analysis.priors.runs import StoreTerm, train_prior

    if bool(command.images) == (command.store is not None):
        raise ConfigError("give either images or --store, a feature store's folder")
    paths = find_images(command.images) if command.images else []
    settings = resolved(command, command="prior train", images=paths)
    device = find_device(command.device)
    backbone = command.load() if paths and command.prior.needs_backbone else None
    if backbone is None and command.denoiser is not None:
        raise ConfigError(
            "a store's tokens are denoised already or not (take --term denoised instead of --denoiser), and without "
            "tokens there is nothing to denoise"
        )
    denoiser = None if backbone is None else token_map(command, backbone)
    source = paths if command.store is None else StoreTerm(command.store, command.term)
    if command.overwrite:
        begin_anew(command.out, "prior train")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        report = train_prior(source, backbone, command.out, command.prior, denoiser, progress, device, command.start)
    keep_settings(command.out, settings)
    counts = f"{counted(report['training'], 'image')} to learn from, {report['held_out']} held out"
    left = f", {report['left_out']} left out" if report["left_out"] else ""
    losses = f"loss {report['loss']:.4f}, held out {report['held_out_loss']:.4f} (1 is an untrained prior)"
    console.print(f"{counts}{left}; {losses}; {report['seconds']:.0f} s")
    run = shown(str(command.out))
    console.print(f"run: {run}; samples: {shown(report['samples'])}; more by `dvt prior sample {run}`")
    return 0, {**report, "settings": settings}


def token_map(command: DenoiserOptions, backbone: Any) -> Any:
    """Load the denoiser as a function of Tokens with its identity; None if no denoiser was named."""
    clean = command.token_function(backbone)
    if clean is None:
        return None
    named = functools.partial(clean)
    denoiser = command.load_denoiser(backbone)
    named.identity = denoiser.identity  # type: ignore[attr-defined, union-attr]
    return named


def sample(command: PriorSample, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior sample`; the exit code is 0 when the samples are written."""
    from dvt.analysis.priors.runs import sample_prior, write_samples

    settings, device = resolved(command, command="prior sample"), find_device(command.device)
    sheet = command.out is None or command.out.suffix
    if sheet and not command.condition and not command.label and not command.text:
        report = sample_prior(command.run, command.out, command.images, command.count, command.sampling, device)
        console.print(
            f"{shown(report['out'])}: {counted(report['samples'], 'sample')} of {counted(report['images'], 'image')}"
        )
        return 0, {**report, "settings": settings}
    if sheet:
        raise ConfigError("samples of your own conditions are written to a folder: give --out FOLDER")
    assert command.out is not None
    conditions = _own_conditions(command)
    report = write_samples(command.run, command.out, conditions, command.count, command.sampling, device)
    console.print(f"{shown(report['out'])}: {counted(len(report['files']), 'picture')} and samples.npz")
    return 0, {**report, "settings": settings}


def _own_conditions(command: PriorSample) -> Any:
    """Make the requested conditions, or take those of the held-out images."""
    from dvt.analysis.priors.conditions import conditions_of_images, conditions_of_labels, conditions_of_texts
    from dvt.analysis.priors.runs import open_run

    if sum(map(bool, (command.condition, command.label, command.text))) > 1:
        raise ConfigError("give one of --condition, --label and --text")
    run = open_run(command.run, "cpu")
    if command.text:
        return conditions_of_texts(command.run, run.prior.card, command.text)
    if command.label:
        return conditions_of_labels(run.prior.card, command.label)
    if command.condition:
        backbone = command.load()
        return conditions_of_images(run.prior.card, command.condition, backbone, token_map(command, backbone))
    return run.conditions(slice(command.images))


def loop(command: PriorLoop, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior loop`; the exit code is 0 when all rounds are done."""
    from dvt.analysis.priors.loop_run import loop_prior

    settings, device = resolved(command, command="prior loop"), find_device(command.device)
    if command.overwrite:
        begin_anew(command.out, "prior loop")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        report = loop_prior(command.run, command.out, command.loop, command.sampling, device, progress)
    keep_settings(command.out, settings)
    _print_rounds(console, report["distances"], command.loop.rounds)
    return 0, {**report, "settings": settings}


def _print_rounds(console: Console, distances: dict[str, Any], rounds: int) -> None:
    """Print a block a yardstick, a row a round: all rounds beside each other would be wider than a terminal."""
    from dvt.analysis.priors.compare_page import with_interval

    for name, found in distances.items():
        table = Table(f"{name}: round", "kernel distance to held-out images")
        for number in range(rounds + 1):
            table.add_row(str(number), with_interval(found["rounds"][number]))
        table.add_row("training images", f"{found['real']:.3f}")
        console.print(table)


def evaluate(command: PriorEvaluate, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior evaluate`; the exit code is 0 when all runs are measured."""
    from dvt.analysis.priors.scoring import evaluate_priors, pixels, random_filters
    from dvt.analysis.probes.heads import SavedHead

    settings, device = resolved(command, command="prior evaluate"), find_device(command.device)
    sticks = [pixels(), random_filters()]
    if (third := third_model(command.yardstick, command.yardstick_weights, command.yardstick_size, device)) is not None:
        sticks.append(third)
    head = None if command.head is None else SavedHead.load(command.head)
    with progress_bar(console) as progress:
        report = evaluate_priors(command.run, sticks, command.count, command.sampling, device, progress, head)
    for name, found in report["runs"].items():
        _print_evaluation(console, name, found)
    return 0, {**report, "settings": settings}


def third_model(name: str | None, weights: str | None, size: int | None, device: Any) -> Any:
    """Load a timm model as a yardstick; None where no model was named."""
    import dvt
    from dvt.analysis.priors.scoring import seen_by

    if name is None:
        return None
    file = dvt.demo_weights() if weights == "demo" else weights
    return seen_by(dvt.load_backbone(name, weights=file, size=size).to(device))


def _print_evaluation(console: Console, name: str, found: dict[str, Any]) -> None:
    table = Table(f"{name}: {counted(found['samples'], 'sample')}", "value", "beside it")
    table.add_row("held-out loss", f"{found['held_out_loss']:.4f}", "1 untrained")
    for stick, scores in found["yardsticks"].items():
        if (trip := scores["round_trip"]) is not None:
            beside = f"{trip['shuffled']:.3f} other images; {trip['sigmas']:.1f} standard errors apart"
            table.add_row(f"{stick}: cosine", f"{trip['matched']:.3f}", beside)
        if (kid := scores["kid"]) is not None:
            made, real = (f"{v['value']:.4f} [{v['low']:.4f}, {v['high']:.4f}]" for v in kid.values())
            table.add_row(f"{stick}: kernel distance", made, f"{real} held-out images")
        if scores["frechet"] is not None:
            table.add_row(f"{stick}: Frechet distance", f"{scores['frechet']:.3f}", "")
        if (copies := scores["memorisation"]) is not None:
            table.add_row(f"{stick}: memorised", f"{copies['share']:.3f}", "share; .05 is chance")
        for reason in scores["refused"]:
            table.add_row(f"{stick}: refused", "", reason)
    if (seen := found.get("head")) is not None:
        beside = f"{seen['shuffled']:.3f} other images; {seen['sigmas']:.1f} standard errors apart"
        table.add_row("head: same class at a place", f"{seen['matched']:.3f}", beside)
        table.add_row("head: classes' shares apart", f"{seen['shares']:.3f}", "0 as in real images, 1 at most")
    console.print(table)
