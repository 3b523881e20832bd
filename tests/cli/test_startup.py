"""Help, versions and mistakes are there at once: no command's code, and no torch, is loaded for them."""

import re
import subprocess
import sys

import pytest

from dvt.cli import main
from dvt.cli.commands import COMMANDS, parse

HEAVY = {"torch", "torchvision", "timm", "h5py", "numpy", "scipy", "sklearn", "matplotlib", "PIL"}


def loaded(*arguments):
    """The exit code and the top-level modules that a command line imports."""
    code = """
import sys
from dvt.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
sys.stderr.write("\\n" + " ".join({str(code), *(name.partition(".")[0] for name in sys.modules)}))
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split()), done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_needs_no_torch(name):
    modules, text = loaded(*name.split(), "--help")
    assert "0" in modules and not modules & HEAVY
    assert text.startswith(f"usage: dvt {name}")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), "0"),
        (("--version",), "0"),
        ((), "2"),
        (("denoize", "photos"), "2"),
        (("denoise", "photos", "--out", "x", "--vews", "3"), "2"),
        (("denoise",), "2"),
        (("probe", "segmentatoin", "data"), "2"),
        (("denoise", "x", "--out", "y", "--neural.steps", "0"), "2"),
    ],
    ids=str,
)
def test_what_ends_at_once_needs_no_torch(arguments, code):
    modules, _ = loaded(*arguments)
    assert code in modules and not modules & HEAVY


def test_the_overview_names_every_command_and_its_first_line():
    _, text = loaded("--help")
    for name, (settings, _) in COMMANDS.items():
        assert f"  {name} " in text and settings.__doc__.split()[0] in text


def test_the_demo_weights_name_their_backbone(capsys, tmp_path):
    from dvt.cli import main

    (tmp_path / "a.png").write_bytes(b"")
    line = ["extract", str(tmp_path), "--out", str(tmp_path / "s"), "--weights", "demo", "--dry-run", "--json"]
    assert main(line) == 0
    assert '"backbone": "vit_tiny_patch16_224"' in capsys.readouterr().out


def test_a_report_is_a_web_page_or_refused(capsys, tmp_path):
    from dvt.cli import main

    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.pdf")]) == 2
    assert ".html" in capsys.readouterr().err and not (tmp_path / "x.pdf").exists()


def test_a_rate_counts_only_what_was_seen_done():
    import time
    from io import StringIO

    from rich.console import Console

    from dvt.cli.common import progress_bar

    text = StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with progress_bar(console) as progress:
        progress("images", 5000, 6000)
        time.sleep(0.5)
        progress("images", 5001, 6000)
        time.sleep(0.3)
    shown = [float(rate) for rate in re.findall(r"([\d.]+)/s", text.getvalue())]
    assert shown and max(shown) < 20  # not 5000 images in no time


@pytest.mark.parametrize(
    ("arguments", "said", "unsaid"),
    [
        (("denoise", "a", "--out", "o", "--views", "x"), "'x' is not a whole number", "NoneType"),
        (("denoise", "a", "--out", "o", "--product", "remved"), "did you mean 'removed'?", "None"),
        (("denoise", "a", "--out", "o", "--neural.steps", "0"), "steps is 0; it must be 2 or more", "NeuralConfig"),
        (("train", "a", "--out", "o", "--learning-rate", "fast"), "'fast' is not a number", "float"),
        (("probe", "segmentatoin", "a"), "did you mean 'segmentation'?", "None"),
        (("denoise", "a"), "usage: dvt denoise IMAGES ... --out TEXT", "(required)"),
        (("denoise", "a", "--out", "o", "--vews", "3"), "did you mean --views?", "None"),
        (("denoise", "a", "--out", "o", "--weight=demo"), "no option --weight; did you mean --weights?", "residual"),
        (("denoise", "a", "--out"), "--out", "None"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_plain_words(arguments, said, unsaid, capsys):
    assert main(list(arguments)) == 2
    words = " ".join(capsys.readouterr().err.split())
    assert words.startswith("error: ") and said in words and unsaid not in words and "helptext" not in words


def test_what_may_be_left_out_is_none_in_any_case():
    command, _ = parse(
        ["analyze", "a", "--out", "o", "--mic-channels", "None", "--views", "none", "--product", "blend"]
    )
    assert (command.analysis.mic_channels, command.views, command.product) == (None, None, "blend")


def test_a_folder_without_a_report_is_told_what_it_lacks(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no report.json" in said and "FileNotFoundError" not in said
