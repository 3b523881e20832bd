"""Hold the table of commands and parse a command line. Only the code of the requested command is loaded."""

from __future__ import annotations

import difflib
import importlib
import io
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dvt.cli.help import about, help_text, usage
from dvt.cli.options import Option, options_of
from dvt.cli.replay import defaults_from_file
from dvt.cli.settings.about import Completion, ConfigCommand
from dvt.cli.settings.analysis import Analyze, Doctor, Predict, ProbeCommand, ReportCommand
from dvt.cli.settings.denoise import Demo, Denoise, Inspect
from dvt.cli.settings.denoiser import Distill, Export, Train
from dvt.cli.settings.extract import Extract, StoreExport, StoreMerge
from dvt.cli.settings.priors import (
    PriorCompare,
    PriorEvaluate,
    PriorItit,
    PriorLoop,
    PriorRepresent,
    PriorSample,
    PriorTower,
    PriorTrain,
)
from dvt.cli.settings.remedies import FindRemedy
from dvt.cli.settings.show import MatchCommand, SearchCommand, Show, View
from dvt.cli.values import REGISTRY, refusal
from dvt.errors import ConfigError
from dvt.text import WIDTH

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
        "store merge": (StoreMerge, "dvt.cli.extract:merge"),
        "store export": (StoreExport, "dvt.cli.extract:export"),
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
        "prior train": (PriorTrain, "dvt.cli.priors:train"),
        "prior sample": (PriorSample, "dvt.cli.priors:sample"),
        "prior evaluate": (PriorEvaluate, "dvt.cli.priors:evaluate"),
        "prior compare": (PriorCompare, "dvt.cli.prior_compare:compare"),
        "prior loop": (PriorLoop, "dvt.cli.priors:loop"),
        "prior represent": (PriorRepresent, "dvt.cli.prior_learn:represent"),
        "prior tower": (PriorTower, "dvt.cli.prior_learn:tower"),
        "prior itit": (PriorItit, "dvt.cli.prior_learn:itit"),
    },
    "this command line": {
        "config": (ConfigCommand, "dvt.cli.about:config"),
        "completion": (Completion, "dvt.cli.about:completion"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def parse(arguments: Sequence[str]) -> tuple[Any, CommandFunction]:
    """Read a command line that begins with a command's name; help and bad options end in SystemExit.

    Raises:
        ConfigError: there is no such command, a setting is outside its range, or a file of settings cannot be used.
    """
    name = command_name(arguments)
    settings, place = COMMANDS[name]
    rest = arguments[len(name.split()) :]
    if "-h" in rest or "--help" in rest:
        sys.stdout.write(help_text(name, settings, shutil.get_terminal_size((WIDTH, 24)).columns) + "\n")
        raise SystemExit(0)
    default = defaults_from_file(name, settings, rest)
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with REGISTRY, redirect_stderr(said):
            command: Any = tyro.cli(settings, prog=f"dvt {name}", args=rest, **given)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        wrong = refusal(said.getvalue())
        if wrong.startswith("Missing from"):
            wrong = f"{_missing(settings, said.getvalue())} must be given; {usage(name, settings)}."
        elif wrong.startswith("there is no option "):
            wrong = _unknown(settings, wrong.split()[4].rstrip(".;").split("=")[0])
        raise ConfigError(f"{wrong} `dvt {name} --help` lists all options") from stop

    def function(command: Any, console: Console) -> tuple[int, dict[str, Any]]:
        module, _, attribute = place.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of dvt.__main__, for the time of the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return found(command, console)

    return command, function


def _unknown(settings: type, option: str) -> str:
    """Say that there is no such option, and which one begins like it or is most like it."""
    flags = [flag for each in options_of(settings) for flag in each.flags]
    near = [flag for flag in flags if flag.startswith(option)] or difflib.get_close_matches(option, flags, 1, 0.6)
    return f"there is no option {option}" + (f"; did you mean {near[0]}?" if near else ".")


def _missing(settings: type, panel: str) -> str:
    """Name what a command line lacks, by the texts that tyro's panel shows of it."""
    told = re.sub("[\\s\u2500-\u257f]", "", panel)
    lacking = [each for each in options_of(settings) if each.required and re.sub(r"\s", "", each.text) in told]
    return " and ".join(" ".join([*each.flags[-1:], each.values]) + _among(each) for each in lacking)


def _among(option: Option) -> str:
    return f" (one of {', '.join(option.choices)})" if option.choices and not option.flags else ""


def command_name(arguments: Sequence[str]) -> str:
    """Find the command that a command line begins with, of one word or two.

    Raises:
        ConfigError: there is none.
    """
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name
    actions = [each.split()[1] for each in COMMANDS if each.startswith(f"{arguments[0]} ")]
    typed = " ".join(arguments[:2]) if actions else arguments[0]
    near = difflib.get_close_matches(typed, COMMANDS, 1, 0.6)
    if actions:
        guess = f"did you mean `dvt {near[0]}`? " if near and len(arguments) > 1 else ""
        raise ConfigError(f"`dvt {arguments[0]}` takes one of {', '.join(actions)}; {guess}`dvt --help` lists them")
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    raise ConfigError(f"there is no command {arguments[0]!r}{guess} `dvt --help` lists them")


def print_overview(console: Console) -> None:
    """Print the commands in their groups, one per line."""
    console.print("usage: dvt COMMAND ... | --help | --version\n", markup=False)
    console.print("Clean dense features from Vision Transformers. Help on one: [bold]dvt COMMAND --help[/]")
    for title, commands in GROUPS.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(width=2 + max(map(len, COMMANDS)))
        for name, (settings, _) in commands.items():
            table.add_row(
                f"  [bold]{name}[/]", escape(about(settings).split("\n")[0].split(". ")[0].rstrip(".") or "-")
            )
        console.print(f"\n{title}:")
        console.print(table)
