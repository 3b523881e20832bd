"""Write the help of a command: for the terminal, for the documents, and as the completion of shells."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from itertools import groupby

from dvt.cli.options import Option, options_of
from dvt.text import WIDTH, wrapped

_TEXT_AT, _WIDEST = 26, 100


def usage(name: str, settings: type) -> str:
    """Write the line that says what a command must be given."""
    needed = [each for each in options_of(settings) if not each.flags or each.required]
    words = [each.values if not each.flags else f"{each.flags[-1]} {each.values}" for each in needed]
    return " ".join(["usage: dvt", name, *words, "[options]"])


def help_text(name: str, settings: type, width: int = WIDTH) -> str:
    """Write a command's help for a terminal of a width: its groups in the order of :data:`dvt.cli.options.GROUPS`."""
    width = min(max(width, 60), _WIDEST)
    parts = [wrapped(usage(name, settings), width), wrapped(about(settings), width)]
    for title, options in groupby(options_of(settings), key=lambda each: each.group):
        parts.append("\n".join([f"{title}:", *(line for each in options for line in _lines(each, width))]))
    return "\n\n".join(parts)


def about(settings: type) -> str:
    """Say what a command does: the text of its settings class, one line a paragraph."""
    text = inspect.cleandoc(settings.__doc__ or "")
    if text.startswith(f"{settings.__name__}("):  # under python -OO a dataclass has its signature instead
        return ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _lines(option: Option, width: int) -> list[str]:
    head = f"  {heading(option)}"
    text = textwrap.wrap(sentence(option), width - _TEXT_AT, break_long_words=False, break_on_hyphens=False)
    below = [" " * _TEXT_AT + line for line in text]
    if len(head) > _TEXT_AT - 2:
        return [*_broken_head(head, width), *below]
    return [f"{head.ljust(_TEXT_AT)}{text[0]}", *below[1:]]


def _broken_head(head: str, width: int) -> list[str]:
    """Divide the list of choices of an option where it is too long for a line."""
    if len(head) <= width:
        return [head]
    lines = textwrap.wrap(head.strip().replace(",", ", "), width - 8, break_long_words=False, break_on_hyphens=False)
    return ["  " + lines[0].replace(", ", ","), *("      " + line.replace(", ", ",") for line in lines[1:])]


def heading(option: Option) -> str:
    """Write how an option is given: its flags and what its value looks like."""
    if not option.flags:
        return option.values + (" {" + ",".join(option.choices) + "}" if option.choices else "")
    flags = [each for each in option.flags if not _turns_off(option, each)]
    return ", ".join(flags) + (f" {option.values}" if option.values else "")


def _turns_off(option: Option, flag: str) -> bool:
    """Tell whether a flag only says what holds anyway: --no-json, where json is off."""
    return not option.values and option.default is False and flag == option.flags[-1]


def sentence(option: Option) -> str:
    """Write an option's text and, where it says something, the default."""
    first = option.text.split(maxsplit=1)[0].rstrip(":,") if option.text else ""
    text = option.text if first in option.choices else option.text[:1].upper() + option.text[1:]
    text += "" if text.endswith((".", ":")) or not text else "."
    return " ".join(each for each in (text, default_words(option)) if each)


def default_words(option: Option) -> str:
    """Write what holds if an option is not given; empty where its text says so."""
    value = option.default
    if value is dataclasses.MISSING:
        return "" if not option.flags or not option.required else "Required."
    if value is None or value is False or value == () or (value == "auto" and '"auto"' in option.text):
        return ""
    if value is True:
        return "On by default."
    shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return f"Default: {shown}."


def markdown_page(commands: Mapping[str, Mapping[str, tuple[type, str]]]) -> str:
    """Write the page of the documents that lists every command and option."""
    parts = [
        "# Commands",
        "This page is made from the command line's own settings. `dvt COMMAND --help` prints the same. Options can "
        "also come from a file: `dvt config COMMAND > settings.json`, then `dvt COMMAND ... --config settings.json`.",
    ]
    for title, group in commands.items():
        parts.append(f"## {title[:1].upper()}{title[1:]}")
        for name, (settings, _) in group.items():
            parts += [f"### dvt {name}", f"```\n{usage(name, settings)}\n```", about(settings)]
            for group_title, options in groupby(options_of(settings), key=lambda each: each.group):
                parts.append(f"**{group_title[:1].upper()}{group_title[1:]}**")
                parts.append(_table(options))
    return "\n\n".join(parts) + "\n"


def _table(options: Iterable[Option]) -> str:
    rows = [f"| `{heading(each).replace('|', chr(92) + '|')}` | {_cell(sentence(each))} |" for each in options]
    return "\n".join(["| Option | Meaning |", "| --- | --- |", *rows])


def _cell(text: str) -> str:
    for character in "\\|*_<>":
        text = text.replace(character, f"\\{character}")
    return text


def completion(shell: str, commands: Mapping[str, tuple[type, str]]) -> str:
    """Write the completion of a shell, "bash" or "zsh": commands, options, choices and otherwise file names."""
    first = sorted({name.split()[0] for name in commands})
    second = {word: [n.split()[1] for n in commands if n.startswith(f"{word} ")] for word in first}
    cases = [f'    "{word} ") words="{" ".join(names)}" ;;' for word, names in second.items() if names]
    values = []
    for name, (settings, _) in commands.items():
        options = [each for each in options_of(settings) if each.flags]
        cases.append(f'    "{name}") words="{" ".join(flag for each in options for flag in each.flags)}" ;;')
        values += [
            f'    "{name} {(each.flags or name.split())[-1]}") words="{" ".join(each.choices)}" ;;'
            for each in options_of(settings)
            if each.choices
        ]
    script = _BASH.format(first=" ".join(first), cases="\n".join(cases), values="\n".join(values))
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script


_BASH = """_dvt() {{
  local now="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" name="${{COMP_WORDS[1]}}" words=""
  case "$name" in prior|store) name="$name ${{COMP_WORDS[2]}}" ;; esac
  if [ "$COMP_CWORD" -eq 1 ]; then words="{first} --help --version"
  elif [ "$COMP_CWORD" -eq 2 ] && [ "${{name% *}}" != "$name" ]; then name="${{COMP_WORDS[1]}} "; fi
  [ -z "$words" ] && [[ "$now" != -* ]] && case "$name $before" in
{values}
  esac
  if [ -z "$words" ] && {{ [[ "$now" == -* ]] || [ "$name" = "${{COMP_WORDS[1]}} " ]; }}; then case "$name" in
{cases}
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$now"))
}}
complete -o default -F _dvt dvt
"""
