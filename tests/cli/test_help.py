"""Help, completion and the files of settings are made from one list of options, which is tyro's."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import tyro

from dvt.cli import main
from dvt.cli.commands import COMMANDS, GROUPS, parse
from dvt.cli.help import completion, help_text, markdown_page
from dvt.cli.options import options_of
from dvt.cli.replay import template
from dvt.cli.values import REGISTRY

FLAG = re.compile(r"(?<![\w,{-])--?[a-z][\w.-]*")
EVERY = pytest.mark.parametrize("name", COMMANDS)


@EVERY
def test_the_options_are_those_of_tyro(name, capsys):
    settings = COMMANDS[name][0]
    with REGISTRY, pytest.raises(SystemExit):
        tyro.cli(settings, prog="x", args=["--help"])
    lines = [line.lstrip("│ ") for line in capsys.readouterr().out.splitlines()]
    theirs = {flag for line in lines if line.startswith("-") for flag in FLAG.findall(line.partition("  ")[0])}
    assert theirs - {"-h", "--help"} == {flag for each in options_of(settings) for flag in each.flags}


@EVERY
def test_every_option_has_a_text_and_fits_into_80_columns(name):
    settings = COMMANDS[name][0]
    assert [each.name for each in options_of(settings) if len(each.text.split()) < 2] == []
    text = help_text(name, settings, 80)
    assert max(map(len, text.splitlines())) <= 80 and "None)" not in text and "[[" not in text
    assert text.startswith(f"usage: dvt {name}")


def test_common_options_come_first_and_internals_last():
    groups = list(dict.fromkeys(each.group for each in options_of(COMMANDS["denoise"][0])))
    assert groups[:3] == ["arguments", "options", "model"] and all("internals" in each for each in groups[-2:])
    first = [each.name for each in options_of(COMMANDS["denoise"][0]) if each.group == "options"]
    assert first[:4] == ["out", "product", "strength", "views"]


@EVERY
def test_a_printed_file_of_settings_gives_the_defaults(name, tmp_path):
    settings = COMMANDS[name][0]
    file = tmp_path / "settings.json"
    file.write_text(template(name, settings))
    needed = []
    for each in options_of(settings):
        if each.default is dataclasses.MISSING:
            value = (each.choices or ("a.png",))[0]
            needed += [value] if not each.flags else [each.flags[-1], value]
    plain, _ = parse([*name.split(), *needed])
    replayed, _ = parse([*name.split(), *needed, "--config", str(file)])
    assert dataclasses.replace(replayed, config=None) == plain


def test_a_run_is_replayed_and_the_command_line_comes_before_the_file(tmp_path):
    file = tmp_path / "config.json"
    values = {"command": "denoise", "images": ["a.png", "b.png"], "out": "o", "views": 7, "linear": {"ridge": 0.5}}
    file.write_text(json.dumps({**values, "job": {"schema": "any"}, "json": True}))
    command, _ = parse(["denoise", "--config", str(file), "--linear.cutoff=3", "--out", "other"])
    assert command.images == ("a.png", "b.png") and command.views == 7 and command.out == "other"
    assert (command.linear.ridge, command.linear.cutoff, command.json) == (0.5, 3.0, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is not JSON"),
        ("[1]", "no named values"),
        ('{"command": "train"}', "it is of `dvt train`, not of `dvt denoise`"),
        ('{"vews": 3}', "no setting 'vews'; did you mean 'views'?"),
        ('{"views": "many"}', "views is 'many'; it must be int"),
        ('{"linear": {"ridges": 1}}', "no setting 'linear.ridges'"),
        (None, "give the config.json of an earlier run"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(text, said, tmp_path, capsys):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    assert main(["denoise", "a.png", "--out", str(tmp_path / "o"), "--config", str(file)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "config.json" in error and not (tmp_path / "o").exists()


def test_the_page_of_the_documents_lists_every_command():
    page = markdown_page(GROUPS)
    assert all(f"### dvt {name}\n" in page for name in COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["dvt", "den"], ["denoise"]),
        (["dvt", "prior", "sam"], ["sample"]),
        (["dvt", "denoise", "photos", "--prod"], ["--product"]),
        (["dvt", "denoise", "photos", "--product", "e"], ["ensembled"]),
        (["dvt", "prior", "train", "--trackers", "w"], ["wandb"]),
        (["dvt", "denoise", "pho"], []),
        (["dvt", "probe", "seg"], ["segmentation"]),
        (["dvt", "probe", "--siz"], ["--size"]),
    ],
)
def test_shells_complete(shell, words, wanted):
    if shell == "zsh" or shutil.which("bash") is None:  # its script differs by the line that loads bash's way
        assert completion("zsh", COMMANDS).endswith(completion("bash", COMMANDS))
        return
    script = f"{completion('bash', COMMANDS)}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _dvt\n"
    done = subprocess.run(["bash", "-c", f'{script}echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.split() == wanted
