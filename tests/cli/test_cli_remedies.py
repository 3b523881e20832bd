"""`dvt remedy`, and the commands that take what it writes."""

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt.cli.commands import parse
from dvt.cli.remedies import remedy_commands
from dvt.cli.settings.analysis import Doctor
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.text import shell_lines

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photographs, and a denoiser of test-time registers as `dvt remedy registers` would write it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    for seed in range(4):
        coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((120, 90), Image.Resampling.BICUBIC).save(folder / "photos" / f"{seed}.png")
    registers = Denoiser(DenoiserConfig("registers", 192, (4, 4), rank=2))
    registers.body.places.copy_(torch.tensor([[3, 5], [7, 9]]))
    registers.card = {"backbone": "vit_tiny_patch16_224"}
    registers.save_pretrained(folder / "registers.safetensors")
    return folder


@pytest.mark.parametrize("remedy", ["noise", "insid3", "rasa"])
def test_a_remedy_is_written_and_taken_like_a_denoiser(remedy, work, tmp_path, run):
    images = [work / "photos"] if remedy == "rasa" else []
    out = tmp_path / "denoiser.safetensors"
    settings = ("--noise-images", 4, "--rank", 3, "--rounds", 2)
    small = WITH if remedy != "rasa" else (*WITH[:4], "--size", "224")
    found = run("remedy", remedy, *images, *small, *settings, "--out", out)
    assert found["card"]["remedy"] == remedy
    assert Denoiser.from_pretrained(out).card == found["card"]
    page = run("doctor", work / "photos", *small, "--denoiser", out, "--windows", 4)
    assert [each["name"] for each in page["treated"]] == ["denoised"]


def test_remedies_that_find_nothing_or_have_no_images_say_so(work, tmp_path, run):
    out = ("--out", tmp_path / "d.safetensors")
    assert "has no norm outliers to remove" in run("remedy", "registers", work / "photos", *WITH, *out, expect=2)
    assert "none was given" in run("remedy", "defect", *WITH, *out, expect=2)
    assert "noise_images is 1; it must be 2" in run("remedy", "noise", *WITH, "--noise-images", 1, *out, expect=2)
    assert not list(tmp_path.iterdir())


def test_the_doctor_compares_the_remedies_and_says_how_to_get_one(work, run):
    found = run("doctor", work / "photos", *WITH, "--windows", 4, "--remedies")
    assert {each["name"] for each in found["treated"]} >= {"noise", "insid3", "removed", "ensembled"}
    assert set(found["refused"]) >= {"registers", "defect"}
    if found["command"]:
        verb = "denoise" if found["best"] in ("removed", "ensembled") else "remedy"
        assert found["command"].startswith(f"dvt {verb} ") and "--size=64" in found["command"]
        assert found["command"] in " ".join(found["text"].replace("\\\n", "").split())
    alone = run("doctor", work / "photos" / "0.png", *WITH, "--windows", 4, "--remedies")
    assert {each["name"] for each in alone["treated"]} == {"noise", "insid3", "removed", "ensembled"}
    assert "about this one image" in alone["text"]
    assert "fitted to images" in alone["refused"]["rasa"]


def test_the_commands_of_the_doctor_run_as_they_are_printed(work, tmp_path, run):
    """From a folder whose name the shell would split."""
    photos = tmp_path / "my 'photos'"
    photos.symlink_to(work / "photos")
    plain = run("doctor", photos, *WITH[:4], "--size", 96, "--windows", 4)
    assert plain["kind"] == "position" and "dvt denoise (removed)" in plain["text"]
    compared = run("doctor", photos, *WITH, "--windows", 4, "--remedies")
    texts = [plain["text"], compared["text"]]
    for remedy in ("subtract", "per image", "denoiser"):
        how = remedy_commands(remedy, Doctor((str(photos),), weights="demo", size=64, layer=-2), (str(photos),))
        texts.append("\n".join(shell_lines(each) for each in how))
    found = [
        line for text in texts for line in re.sub(r" \\\n\s+", " ", text).split("\n") if line.startswith("    dvt ")
    ]
    assert len(found) >= 7
    for line in found:
        command, _ = parse(shlex.split(line)[1:])
        assert getattr(command, "images", (str(photos),)) in ((str(photos),), ())
        assert str(command.out) in ("features", "denoiser.safetensors") or command.out.suffix == ".safetensors"


def test_test_time_registers_are_taken_by_doctor_analyze_probe_and_export(work, tmp_path, run):
    options = (*WITH, "--denoiser", work / "registers.safetensors")
    found = run("doctor", work / "photos", *options, "--windows", 4)
    assert [each["name"] for each in found["treated"]] == ["denoised"]
    report = run("analyze", work / "photos", *options, "--views", 0, "--out", tmp_path / "report")
    assert {row["variant"] for row in report["rows"]} >= {"raw", "denoised"}
    probe = ("probe", "correspondence", work / "photos", *options, "--seeds", 2, "--cache", tmp_path / "cache")
    assert {row["variant"] for row in run(*probe)["rows"]} >= {"raw", "denoised"}
    assert run("export", *options, "--out", tmp_path / "clean.pt2")["deviation"] < 1e-4


def test_commands_that_take_denoisers_of_tokens_refuse_registers(work, tmp_path, run):
    options = (*WITH, "--denoiser", work / "registers.safetensors")
    error = run("extract", work / "photos", *options, "--out", tmp_path / "store", expect=2)
    assert "registers" in error
    error = run("prior", "train", work / "photos", *options, "--out", tmp_path / "run", expect=2)
    assert "act inside the backbone" in error
    assert dvt.demo_weights().is_file()
