"""Run `dvt prior represent|tower|itit`: encoders of a prior's samples, image-text towers, priors in a cycle."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dvt.cli.common import begin_anew, keep_settings, keeping, progress_bar, resolved, shown
from dvt.cli.settings.priors import PriorItit, PriorRepresent, PriorTower
from dvt.devices import find_device
from dvt.images import find_images
from dvt.text import counted


def represent(command: PriorRepresent, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior represent`; the exit code is 0 when all encoders are trained."""
    from dvt.analysis.priors.compare_page import with_interval
    from dvt.analysis.priors.represent import represent

    test = find_images(command.test) if command.test else []
    settings, device = resolved(command, command="prior represent"), find_device(command.device)
    if command.overwrite:
        begin_anew(command.out, "prior represent")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        report = represent(command.run, command.out, command.represent, test, command.sampling, device, progress)
    keep_settings(command.out, settings)
    counts = report["pictures"]
    console.print(
        f"{counted(counts['synthetic'], 'sample')} of {counted(counts['conditions'], 'condition')}, "
        f"{counted(counts['real'], 'real image')}, {counts['test']} to score on; chance {report['chance']:.3f}"
    )
    table = Table("accuracy of an encoder that learnt from", "kNN", "linear", "linear over real by image")
    for name, found in report["rows"].items():
        table.add_row(name, *(with_interval(found[each]) for each in ("kNN", "linear", "over_real")))
    console.print(table)
    for source, found in report["curves"].items():
        law = found["law"]
        console.print(
            f"{source}: error = {law['floor']:.3f} [{law['floor_low']:.3f}, {law['floor_high']:.3f}] + {law['a']:.2f} "
            f"D^-{law['k']:.2f} [{law['k_low']:.2f}, {law['k_high']:.2f}], D = {found['sizes']}"
        )
    console.print(f"curves: {shown(str(command.out / 'curves.png'))}")
    return 0, {**report, "settings": settings}


def tower(command: PriorTower, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior tower`; the exit code is 0 when the tower is trained."""
    from dvt.analysis.priors.tower_run import train_tower

    paths, test = find_images(command.images), find_images(command.test) if command.test else []
    settings = resolved(command, command="prior tower", images=paths)
    if command.overwrite:
        begin_anew(command.out, "prior tower")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        report = train_tower(paths, command.text_file, command.out, command.tower, test, progress)
    console.print(
        f"{counted(report['training'], 'image')} to learn from, {counted(report['words'], 'word')}; zero-shot accuracy "
        f"{report['zero_shot']:.3f} of {counted(report['test'], 'image')} (chance {report['chance']:.3f}); own text "
        f"nearest {report['retrieval']:.3f} of {counted(report['held_out'], 'held-out image')}"
    )
    keep_settings(command.out, settings)
    console.print(f"tower: {shown(report['out'])}")
    return 0, {**report, "settings": settings}


def itit(command: PriorItit, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior itit`; the exit code is 0 when all runs are done."""
    from dvt.analysis.priors.compare_page import with_interval
    from dvt.analysis.priors.itit_run import run_itit

    paths, test = find_images(command.images), find_images(command.test) if command.test else []
    settings = resolved(command, command="prior itit", images=paths)
    if command.overwrite:
        begin_anew(command.out, "prior itit")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        report = run_itit(paths, command.texts, command.out, command.itit, test, progress)
    keep_settings(command.out, settings)
    counts = report["images"]
    console.print(
        f"{counted(counts['training'], 'image')}, {counts['pairs']} of them with a text; {counts['test']} to score on; "
        f"chance {report['chance']:.3f}; real images judged right {report['real']:.3f}"
    )
    table = Table("share right", "image to text", "over pairs alone", "text to image", "over pairs alone")
    for name, found in report["rows"].items():
        names = ("image_to_text", "image_to_text_over_pairs", "text_to_image", "text_to_image_over_pairs")
        table.add_row(name, *(with_interval(found[each]) for each in names))
    console.print(table)
    console.print(f"samples: {shown(str(command.out / 'samples.png'))}")
    return 0, {**report, "settings": settings}
