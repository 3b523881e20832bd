"""Run `dvt config` and `dvt completion`, which are about the command line itself."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from dvt.cli.commands import COMMANDS, command_name
from dvt.cli.help import completion as script
from dvt.cli.replay import template
from dvt.cli.settings.about import Completion, ConfigCommand
from dvt.errors import ConfigError


def config(command: ConfigCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt config`; exit code 0."""
    if not command.name:
        raise ConfigError("give the command whose settings to print, such as `dvt config denoise`")
    name = command_name(command.name)
    text = template(name, COMMANDS[name][0])
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0, {"command": name, "text": text}


def completion(command: Completion, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt completion`; exit code 0."""
    text = script(command.shell, COMMANDS)
    console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
    return 0, {"shell": command.shell, "text": text}
