"""The command line: tyro over dataclasses, rich for progress. Each module here holds the commands of one part."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

import dvt
from dvt.cli.analysis import Analyze, Doctor, ProbeCommand, ReportCommand, analyze, doctor, probe, report
from dvt.cli.common import DryRun
from dvt.cli.denoise import Demo, Denoise, Inspect, demo, denoise, inspect
from dvt.cli.denoiser import Distill, Export, Train, distill, export, train
from dvt.cli.extract import Extract, Store, extract, store
from dvt.cli.match import MatchCommand, match
from dvt.cli.priors import PriorCommand, prior
from dvt.cli.remedies import FindRemedy, remedy
from dvt.cli.show import Show, show
from dvt.errors import ConfigError, DvtError
from dvt.text import visible, visible_lines

CommandFunction = Callable[[Any, Console], tuple[int, dict[str, Any]]]

#: Each command's name, its settings and the function that does it: (settings, console) -> (exit code, JSON result).
COMMANDS: dict[str, tuple[type, CommandFunction]] = {
    "demo": (Demo, demo),
    "denoise": (Denoise, denoise),
    "extract": (Extract, extract),
    "inspect": (Inspect, inspect),
    "store": (Store, store),
    "train": (Train, train),
    "remedy": (FindRemedy, remedy),
    "distill": (Distill, distill),
    "export": (Export, export),
    "show": (Show, show),
    "match": (MatchCommand, match),
    "doctor": (Doctor, doctor),
    "analyze": (Analyze, analyze),
    "report": (ReportCommand, report),
    "probe": (ProbeCommand, probe),
    "prior": (PriorCommand, prior),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0 all done, 2 bad input, 1 failure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # file names are bytes on Linux, and need be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    errors = Console(stderr=True, soft_wrap=True, emoji=False)
    try:
        return _run(arguments, errors)
    except DvtError as error:
        errors.print(f"[bold red]error:[/] {escape(visible_lines(str(error)))}")
        return 2
    except BrokenPipeError:  # whoever read the output has gone
        return 1
    except OSError as error:  # a place or a disk of the user's, where nothing below says more
        where = "" if error.filename is None else f"{str(error.filename)!r}: "
        errors.print(f"[bold red]error:[/] {escape(visible_lines(where + (error.strerror or str(error))))}")
        return 2
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on where it was")
        return 1


def _run(arguments: list[str], errors: Console) -> int:
    if arguments == ["--version"]:
        _write(f"dvt {dvt.__version__}\n")
        return 0
    if empty := [each for each in arguments if each == "" or re.fullmatch(r"--[\w.-]+=", each)]:
        raise ConfigError(f"an argument is empty ({empty[0]!r}); is a variable of the shell not set? Give a value")
    description = "Clean dense features from Vision Transformers."  # not a docstring: python -OO has none
    command = tyro.cli(_union(), prog="dvt", description=description, args=arguments)
    console = Console(stderr=command.json, soft_wrap=True, emoji=False)
    handler = RichHandler(console=errors, show_path=False)
    handler.addFilter(_visible_record)
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[handler])
    run = next(function for settings, function in COMMANDS.values() if type(command) is settings)
    try:
        code, result = run(command, console)
    except DryRun as stopped:
        code, result = 0, stopped.settings
        console.print_json(data=result)
    if command.json:
        _write(json.dumps(result, default=str) + "\n")
    return code


def _visible_record(record: logging.LogRecord) -> bool:
    """Make one line of a record that a terminal shows and does not obey: names of files may lie in it."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


def _write(text: str) -> None:
    """Write to standard output, now: an error of it is ours to tell, not the interpreter's when it ends."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _union() -> Any:
    """The commands as one type for tyro."""
    union: Any = None
    for name, (settings, _) in COMMANDS.items():
        choice: Any = Annotated[settings, tyro.conf.subcommand(name)]
        union = choice if union is None else union | choice
    return union
