"""Share output between commands: names on the terminal, progress, resolved settings, JSON files."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from dvt.files import whole_file
from dvt.text import visible


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
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:  # the time of what is done before the first call is unknown, so the rate excludes it
                tasks[what] = bar.add_task(what, total=total, rate="", known=done)
            task = bar.tasks[tasks[what]]
            since, elapsed = done - task.fields["known"], task.elapsed or 0
            rate = f"{since / elapsed:.2f}/s" if since > 0 and elapsed > 0 else ""
            bar.update(tasks[what], completed=done, total=total, rate=rate)

        yield update


def resolved(settings: Any, /, **found: Any) -> dict[str, Any]:
    """Convert a command's settings, and values found for them such as image paths, to JSON values; honour --dry-run.

    Call it before anything that takes long.

    Raises:
        DryRun: --dry-run was given; :func:`dvt.cli.main` prints the settings.
    """
    values = json.loads(json.dumps({**dataclasses.asdict(settings), **found}, default=str))
    if settings.dry_run:
        raise DryRun(values)
    return values


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, which is whole or absent."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def quiet_unless_first(console: Console) -> Console:
    """Return the console in the first process of a distributed run, and a silent one in the others."""
    return console if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
