"""Whatever a command prints as a table fits into a terminal of 80 columns, whatever the names in it."""

import io

import pytest
import torch
from rich.console import Console

import dvt
from dvt.analysis import DoctorConfig, diagnose
from dvt.analysis.findings import Findings
from dvt.analysis.metrics.scores import METRICS, Row
from dvt.analysis.probes.table import ProbeReport, ProbeRow
from dvt.cli.denoise import _print_summary
from dvt.cli.denoiser import _print_distillation, _print_training
from dvt.cli.jobs import print_job
from dvt.cli.prior_compare import _print as _print_compared
from dvt.cli.priors import _print_evaluation, _print_rounds
from dvt.cli.settings.denoise import Denoise
from dvt.jobs.work import Summary
from dvt.text import aligned, shell_lines, wrapped
from dvt.tokens import Tokens

LONG = "vit_small_patch14_reg4_dinov2.lvd142m"


def widest(text):
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize("backbones", [1, 2])
def test_an_analysis(nulls, backbones):
    about = [{"label": f"{LONG} ({number})", "layer": -1} for number in range(backbones)]
    rows = [
        Row(metric, 1234.567, -0.5, -12.345, 12.345, -1234.567, 1234.567, 24, "a note", variant, layer, b)
        for b in (each["label"] for each in about)
        for metric in METRICS
        for variant in ("raw", "semantic", "artifact", "a denoiser with a long name")
        for layer in (-1, 0, 1)
    ]
    seconds = {"forward": 1.0, "fields": 2.0, "denoisers": 3.0, "metrics": 4.0, "total": 10.0}
    text = Findings(rows, [f"{i}.jpg" for i in range(24)], about, seconds).to_text(nulls)
    assert widest(text) <= 80 and ("chance -0.500" in text) is nulls
    assert all(metric.title in text for metric in METRICS.values()) and "1234.567 [-1234.567, 1234.567]" in text


@pytest.mark.parametrize(
    "scores",
    [
        ("AbsRel", "RMSE", "d1", "d2", "d3", "SIlog", "log10"),
        ("PCK@.1", "PCK@.05", "PCK@.02", "distance", "position PCK", "random PCK", "PCK per image"),
        ("mIoU", "mAcc", "aAcc", "bAcc"),
    ],
)
def test_a_probe(scores):
    def row(name, difference=None):
        interval = (0.1234, 0.9876)
        return ProbeRow(name, dict.fromkeys(scores, len(name) / 99), interval, interval, difference, interval)

    rows = (row("raw"), row("denoised", 0.1), row("linear-removal at x4", -0.2))
    report = ProbeReport("depth", scores[0], "raw", rows, {}, notes=("of what a reader must know, at length " * 4,))
    text = report.table()
    assert widest(text) <= 80 and text.count("linear-removal at x4") >= 2 and all(name in text for name in scores)


def test_the_doctor():
    net = torch.nn.Conv2d(3, 8, 16, 16)

    def tokens(module, images):
        made = module(images).permute(0, 2, 3, 1)
        return Tokens.of(made + 3 * torch.linspace(-1, 1, made.shape[2])[:, None])

    plain = dvt.wrap(net, tokens, 16, name=LONG)
    halves = {"a denoiser with a long name": lambda t: t.with_patches(t.patches - t.patches.mean(1, keepdim=True))}
    command = f"dvt remedy noise photographs/of/last/summer --backbone {LONG} --out noise.safetensors"
    commands = dict.fromkeys(halves, command)
    found = diagnose(plain, torch.rand(3, 3, 224, 224), halves, DoctorConfig(windows=4), commands=commands)
    text = found.to_text()
    assert found.kind == "position" and widest(text) <= 80
    if found.command:
        pasted = text[text.index("dvt remedy noise") :].replace("\\\n", "").split()
        assert pasted[: len(command.split())] == command.split()


def test_the_tables_of_jobs_training_and_priors():
    console = Console(file=(out := io.StringIO()), width=80, soft_wrap=True)
    summary = Summary(done=1000, skipped=99, failed=[])
    print_job(console, Denoise(images=("a",), out="o"), summary, 12.3, [("position R², semantic", "0.996 (chance)")])
    scores = {"loss": 1.0, "mse": 1.0, "cosine": 1.0, "prefix_cosine": 1.0}
    report = {"baselines": {"no_op": scores, "linear_removal": scores}, "validation": scores, "kind": "block"}
    report |= {"training": 1, "held_out": 1, "parameters": 1, "seconds": 1.0, "out": "o"}
    _print_training(console, report)
    _print_distillation(console, report, LONG)
    found = {"samples": 9, "held_out_loss": 0.5}
    trip = {"matched": 0.5, "shuffled": 0.1, "sigmas": 12.3}
    kid = {name: {"value": 0.1, "low": 0.05, "high": 0.2} for name in ("made", "real")}
    stick = {"round_trip": trip, "kid": kid, "frechet": 1.0, "memorisation": {"share": 0.1}, "refused": ["few " * 30]}
    _print_evaluation(console, "a run", {**found, "yardsticks": {LONG: stick}})
    interval = {"mean": -12.3456, "half": 1.2345}
    points = dict.fromkeys(("best", "best_over_raw", "last", "last_over_raw"), interval)
    curve = {"held_out_loss": {**points, "change_in_last_quarter": -0.1234}}
    _print_compared(console, {"kinds": dict.fromkeys(("raw", "raw - G of all images", "position alone"), curve)})
    rounds = {name: {"rounds": [interval] * 5, "real": 0.1} for name in (LONG, "pixels")}
    _print_rounds(console, rounds, 4)
    boxes = [line for line in out.getvalue().splitlines() if line[:1] in "┌│├└┏┃┡"]
    assert len(boxes) > 25 and max(map(len, boxes)) <= 80


def test_the_summary_of_a_store_with_long_names():
    console = Console(file=(out := io.StringIO()), width=80, soft_wrap=True)
    values = {"images": 1000, "backbone": LONG, "weights_sha256": "f" * 64, "grids": {"16 x 24": 9}, "path": "q" * 200}
    _print_summary(console, "a store of " + "long " * 20, values)
    name, *table = out.getvalue().splitlines()
    assert name.startswith("a store of long") and max(map(len, table)) <= 80
    assert out.getvalue().count("q") == 200  # nothing is cut off


def test_lines_break_between_words_and_commands_can_be_pasted():
    text = "  " + "words of a sentence " * 9 + "\n- " + "and of a note " * 9
    assert widest(wrapped(text)) <= 80 and wrapped(text).split() == text.split()
    assert wrapped("x" * 99) == "x" * 99  # a path is not broken
    pasted = shell_lines("dvt doctor " + "photographs/a.jpg " * 9).replace("\\\n", "")
    assert pasted.split() == ["dvt", "doctor", *["photographs/a.jpg"] * 9]


def test_columns_that_have_no_room_follow():
    table = aligned(["row", *"abc"], [["x", "1" * 30, "2" * 30, "3" * 30]], 70)
    assert widest(table) <= 70 and table.count("row") == 2 and "3" * 30 in table.split("\n\n")[1]
