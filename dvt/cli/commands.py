"""Hold the table of commands and parse a command line. Only the code of the requested command is loaded."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dvt.cli.settings.analysis import Analyze, Doctor, Predict, ProbeCommand, ReportCommand
from dvt.cli.settings.denoise import Demo, Denoise, Inspect
from dvt.cli.settings.denoiser import Distill, Export, Train
from dvt.cli.settings.extract import Extract, Store
from dvt.cli.settings.priors import PriorCommand
from dvt.cli.settings.remedies import FindRemedy
from dvt.cli.settings.show import MatchCommand, SearchCommand, Show, View
from dvt.cli.values import REGISTRY
from dvt.errors import ConfigError

CommandFunction = Callable[[Any, Console], tuple[int, dict[str, Any]]]

#: By group and name: the settings class of a command, and its function as "module:function", which is imported only
#: when it runs: (settings, console) -> (exit code, JSON result).
GROUPS: dict[str, dict[str, tuple[type, str]]] = {
    "begin here": {
        "demo": (Demo, "dvt.cli.denoise:demo"),
        "doctor": (Doctor, "dvt.cli.analysis:doctor"),
    },
    "features on disk": {
        "denoise": (Denoise, "dvt.cli.denoise:denoise"),
        "extract": (Extract, "dvt.cli.extract:extract"),
        "inspect": (Inspect, "dvt.cli.denoise:inspect"),
        "store": (Store, "dvt.cli.extract:store"),
    },
    "denoisers for your own model": {
        "train": (Train, "dvt.cli.denoiser:train"),
        "remedy": (FindRemedy, "dvt.cli.remedies:remedy"),
        "distill": (Distill, "dvt.cli.denoiser:distill"),
        "export": (Export, "dvt.cli.denoiser:export"),
    },
    "what features hold": {
        "show": (Show, "dvt.cli.show:show"),
        "view": (View, "dvt.cli.view:view"),
        "match": (MatchCommand, "dvt.cli.match:match"),
        "search": (SearchCommand, "dvt.cli.search:search"),
        "analyze": (Analyze, "dvt.cli.analysis:analyze"),
        "report": (ReportCommand, "dvt.cli.analysis:report"),
        "probe": (ProbeCommand, "dvt.cli.analysis:probe"),
        "predict": (Predict, "dvt.cli.predict:predict"),
        "prior": (PriorCommand, "dvt.cli.priors:prior"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def parse(arguments: Sequence[str]) -> tuple[Any, CommandFunction]:
    """Read a command line that begins with a command's name; help and bad options end in SystemExit.

    Raises:
        ConfigError: there is no such command, or a setting is outside its range.
    """
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        guess = f"; did you mean {near[0]!r}?" if near else ";"
        raise ConfigError(f"there is no command {name!r}{guess} `dvt --help` lists them")
    settings, place = COMMANDS[name]
    with REGISTRY:
        given: Any = tyro.cli(settings, prog=f"dvt {name}", args=arguments[1:])

    def function(command: Any, console: Console) -> tuple[int, dict[str, Any]]:
        module, _, attribute = place.partition(":")
        return getattr(importlib.import_module(module), attribute)(command, console)

    return given, function


def print_overview(console: Console) -> None:
    """Print the commands in their groups, one per line."""
    console.print("usage: dvt COMMAND ... | --help | --version\n", markup=False)
    console.print("Clean dense features from Vision Transformers. Help on one: [bold]dvt COMMAND --help[/]")
    for title, commands in GROUPS.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(width=10)
        for name, (settings, _) in commands.items():
            table.add_row(f"  [bold]{name}[/]", escape((settings.__doc__ or "-").splitlines()[0]))  # python -OO
        console.print(f"\n{title}:")
        console.print(table)
