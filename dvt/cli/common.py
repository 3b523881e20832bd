"""Share output between commands: names on the terminal, progress, resolved settings, JSON files."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from dvt.cli.replay import MANNERS, command_of, settings_file
from dvt.cli.settings.common import Remade
from dvt.errors import ConfigError, DvtError
from dvt.files import missing_folders, remove, remove_unused, whole_file
from dvt.progress import Progress, is_first_process
from dvt.text import visible

if TYPE_CHECKING:
    from dvt.backbones import Backbone


class DryRun(Exception):
    """End a command with --dry-run, which prints its settings and stops.

    Args:
        settings: the settings, as :func:`resolved` makes them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__("dry run")
        self.settings = settings


def shown(name: object) -> str:
    """Escape a name for the terminal: its control characters and its markup have no effect."""
    return escape(visible(str(name)))


@contextmanager
def progress_bar(console: Console):
    """Show a progress bar; yield a callback (what, done, total) that updates it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    # Where nobody sees it move, it would only leave an empty line.
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_interactive) as bar:
        tasks: dict[str, Any] = {}

        told: set[str] = set()

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:  # the time of what is done before the first call is unknown, so the rate excludes it
                tasks[what] = bar.add_task(what, total=total, rate="", known=done)
            task = bar.tasks[tasks[what]]
            since, elapsed = done - task.fields["known"], task.elapsed or 0
            rate = f"{since / elapsed:.2f}/s" if since > 0 and elapsed > 0 else ""
            bar.update(tasks[what], completed=done, total=total, rate=rate)
            if since > 0 and elapsed >= _MEASURED and what not in told:
                told.add(what)
                left = f"{total - done} of {total} to do"
                if (ahead := (total - done) * elapsed / since) >= _WORTH_TELLING:
                    console.print(f"{escape(what)}: {duration(ahead)} ahead, {left}", style="dim")

        yield update


#: Seconds after which a rate is known, and of work ahead that is worth a line.
_MEASURED, _WORTH_TELLING = 2.0, 30.0


def duration(seconds: float) -> str:
    """Say about how long something takes.

    >>> duration(41), duration(400), duration(20000)
    ('about 40 seconds', 'about 7 minutes', 'about 5.6 hours')
    """
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    return f"about {round(seconds / 60)} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


#: Images of the passes that are timed: most passes are of windows, several at a time, which takes less for each.
_TOGETHER = 4


def say_ahead(console: Console, backbone: Backbone, passes: int, what: str) -> None:
    """Measure a forward pass, and say how long many of them take, with half as much again for everything else."""
    import torch

    size = backbone.image_size
    noise = torch.rand(_TOGETHER, 3, *size, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    with torch.no_grad():
        moments = [time.perf_counter()]
        for _ in range(4):  # the first pass of a model is slower, and any of them may be disturbed
            float(backbone(noise).patches.sum())  # waits for a GPU
            moments.append(time.perf_counter())
    ahead = 1.5 * passes * min(after - before for before, after in pairwise(moments)) / _TOGETHER
    if ahead >= _WORTH_TELLING:
        console.print(f"{what}: {duration(ahead)} ahead, {passes} passes of the backbone", style="dim")


def keeping(progress: Progress, out: Path, settings: dict[str, Any]) -> Progress:
    """Wrap a progress callback: with its first call, when a run has been accepted, the run's settings are kept."""
    kept: list[bool] = []

    def update(what: str, done: int, total: int) -> None:
        if not kept:
            kept.append(True)
            keep_settings(out, settings, new=True)
        progress(what, done, total)

    return update


def resolved(settings: Any, /, **found: Any) -> dict[str, Any]:
    """Convert a command's settings, and values found for them such as image paths, to JSON values; honour --dry-run.

    Call it before anything that takes long.

    Raises:
        ConfigError: the place to write to holds a run of another command.
        DryRun: --dry-run was given; :func:`dvt.cli.main` prints the settings.
    """
    if isinstance(settings, Remade):
        check_place(settings.out, found["command"], settings.overwrite)  # type: ignore[attr-defined]
    given = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MANNERS}
    values = json.loads(json.dumps({**given, **found}, default=str))
    if settings.dry_run:
        raise DryRun(values)
    return values


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, which is whole or absent."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def keep_settings(out: Path, settings: dict[str, Any], *, new: bool = False) -> None:
    """Write a run's settings for --config and --resume into its folder; with `new`, only where there are none."""
    path = settings_file(str(out))
    if is_first_process() and not (new and path.exists()):
        save_json(path, settings)


@contextmanager
def leaving_nothing(command: Any) -> Iterator[None]:
    """Remove the folder of a command that was refused, if it made it and nobody can have begun to work in it."""
    folder = settings_file(str(getattr(command, "out", None) or ".")).parent
    made = missing_folders(folder)
    try:
        yield
    except DvtError:
        # Not with another lock in it: a process that holds it would lose its folder.
        remove_unused(made, ("config.json", "tokens.lock"))
        raise


def check_place(out: Path | str, name: str, overwrite: bool = False) -> None:
    """Refuse a place where another command keeps its run, which cannot go on, and whose settings would be lost.

    Raises:
        ConfigError: it does, and is not to be overwritten.
    """
    place, made_by = settings_file(str(out)).parent, command_of(str(out))
    if made_by in (None, name):
        return
    stores = {made_by, name} <= {"denoise", "extract"}
    if stores and overwrite:
        return
    anew = ", or begin anew in its place (--overwrite)" if stores else ""
    raise ConfigError(
        f"{shown(place)!r} was made by `dvt {visible(str(made_by))}`, and this is `dvt {name}`: choose another "
        f"--out{anew}"
    )


def begin_anew(out: Path, name: str) -> None:
    """Remove what a run of a command wrote: the file, or in its folder the run's files; others stay.

    Raises:
        ConfigError: another process trains there, or takes part in this run.
    """
    from dvt.jobs.launched import is_launched  # both import torch
    from dvt.training.checkpoint import checkpoints_in, locked_folder

    folder = settings_file(str(out)).parent
    if is_launched():  # another process could find what this one is about to remove
        raise ConfigError(f"--overwrite is for one process; remove {str(folder)!r} before a distributed run")
    if command_of(str(out)) is None and not checkpoints_in(folder):  # files of these names may be the user's own
        return
    with locked_folder(folder):
        for pattern in (*_OF_RUNS.get(name, ()), "step-*", "log.csv", "config.json"):
            for each in folder.glob(pattern):
                remove(each)
    if out.suffix == ".safetensors":
        remove(out)


#: What commands write into their folder beside checkpoints, log and settings.
_OF_RUNS = {
    "prior train": ("tokens", "samples", "prior.safetensors", "held_out.safetensors"),
    "prior compare": ("tokens.safetensors", "runs", "compare.json", "page.html", "curves.png", "samples.png"),
    "prior loop": ("seed-*", "loop.json"),
    "prior represent": ("samples.safetensors", "encoders", "represent.json", "curves.png"),
    "prior itit": ("runs", "itit.json", "samples.png"),
}


def print_skipped(console: Console, failed: Sequence[tuple[str, str]]) -> None:
    """Print each image that was left out once; those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for path, reason in failed:
        reasons.setdefault(reason.replace(path, "it"), []).append(path)
    for path, reason in failed:
        same = reasons[reason.replace(path, "it")]
        if len(same) < 3:
            console.print(f"[yellow]skipped[/] {shown(path)}: {shown(reason)}")
        elif same[0] == path:
            names = ", ".join(map(shown, same[:3])) + (f" and {len(same) - 3} more" if len(same) > 3 else "")
            console.print(f"[yellow]skipped {len(same)} images[/] ({names}): {shown(reason.replace(path, 'it'))}")
