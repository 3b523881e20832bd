"""Options and output that commands share: a backbone, devices, progress, settings on disk."""

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
    """Ends a command that was asked to print its settings and stop.

    Args:
        settings: as :func:`resolved` gives them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__("dry run")
        self.settings = settings


def shown(name: object) -> str:
    """Write a name for the terminal, where it is read and not obeyed: neither its control characters nor its markup."""
    return escape(visible(str(name)))


@contextmanager
def progress_bar(console: Console):
    """Show a progress bar; it is a callback (what, done, total)."""
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
            if what not in tasks:  # when this is first heard of, `done` is done already: its time is not known
                tasks[what] = bar.add_task(what, total=total, rate="", known=done)
            task = bar.tasks[tasks[what]]
            since, elapsed = done - task.fields["known"], task.elapsed or 0
            rate = f"{since / elapsed:.2f}/s" if since > 0 and elapsed > 0 else ""
            bar.update(tasks[what], completed=done, total=total, rate=rate)

        yield update


def resolved(settings: Any, /, **found: Any) -> dict[str, Any]:
    """Write a command's settings as JSON has them, with what they were resolved to, before anything long is done.

    Raises:
        DryRun: the command was asked to stop here; :func:`dvt.cli.main` prints the settings.
    """
    values = json.loads(json.dumps({**dataclasses.asdict(settings), **found}, default=str))
    if settings.dry_run:
        raise DryRun(values)
    return values


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def quiet_unless_first(console: Console) -> Console:
    """Return the console in the first process of a distributed run, and a silent one in the others."""
    return console if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
