"""Hold the settings of `dvt config` and `dvt completion`, which are about the command line itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from dvt.cli.settings.common import Output


@dataclass(frozen=True)
class ConfigCommand(Output):
    """Print all settings of a command as JSON with comments, to be edited and handed to its --config."""

    name: tyro.conf.Positional[tuple[str, ...]]
    """A command, such as denoise or prior train."""


@dataclass(frozen=True)
class Completion(Output):
    """Print the completion of a shell: commands, options and their choices.

    For bash, add this line to ~/.bashrc: source <(dvt completion bash). For zsh, the same with zsh in ~/.zshrc.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    """The shell."""
