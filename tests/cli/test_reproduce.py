"""The way to the paper's table, at its smallest: all steps, resumed, from tiny folders to the page."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import Block

from dvt.errors import BackboneError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reproduce():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "examples" / "reproduce" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_smoke(reproduce, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["--smoke", "--device", "cpu"]) == 0
    first = capsys.readouterr().out
    assert "SMOKE" in first and "predicted on cpu" in first
    found = json.loads((tmp_path / "reproduced" / "dinov2.json").read_text())
    rows = {(row["task"], row["score"]): row for row in found["rows"]}
    assert {task for task, _ in rows} == {"VOC2012", "ADE20K", "NYUv2", "VOC2007"}
    voc = rows["VOC2012", "mIoU"]
    assert (voc["paper's raw"], voc["paper's denoised"]) == (0.836, 0.8484)
    for row in rows.values():
        assert row["difference"] == pytest.approx(row["our denoised"] - row["our raw"])
        assert row["interval"] is None or row["interval"][0] <= row["difference"] <= row["interval"][1]
    assert "83.60" in (tmp_path / "reproduced" / "dinov2.html").read_text()
    assert reproduce.main(["--smoke", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("done before") == 6
    assert json.loads((tmp_path / "reproduced" / "dinov2.json").read_text())["rows"] == found["rows"]


def authors_denoiser(path, channels, side):
    """Write a small denoiser in the authors' format, which changes little."""
    block = Block(channels, num_heads=channels // 64, qkv_bias=True, init_values=None)
    held = {f"denoiser.{name}": value * 0.1 for name, value in block.state_dict().items()}
    path.parent.mkdir(parents=True)
    torch.save({"denoiser": held | {"pos_embed": torch.zeros(1, side * side, channels)}}, path)


def test_smoke_with_the_authors_denoiser_from_a_folder(reproduce, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    authors_denoiser(tmp_path / "files" / "voc_denoised" / "vit_tiny_patch16_224.pth", 192, 6)
    assert reproduce.main(["--smoke", "--published", "files", "--model", "clip", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "stage one 0.0, stage two 0.0" in said and "== stage-" not in said
    page = (tmp_path / "reproduced" / "clip.html").read_text()
    assert "VOC2012: table 2 of the paper" in page and page.count("not sourced") == 1  # discovery, of CLIP
    assert not (tmp_path / "reproduced" / "clip" / "store").exists()


@pytest.mark.parametrize("channels", [None, 64], ids=["none", "another model's"])
def test_a_published_denoiser_that_does_not_serve_ends_before_anything_is_computed(
    reproduce, tmp_path, monkeypatch, channels
):
    monkeypatch.chdir(tmp_path)
    if channels is not None:
        authors_denoiser(tmp_path / "files" / "vit_tiny_patch16_224.pth", channels, 6)
    with pytest.raises((SystemExit, BackboneError), match="there is neither" if channels is None else "64"):
        reproduce.main(["--smoke", "--published", "files", "--device", "cpu"])
    assert not (tmp_path / "reproduced" / "dinov2").exists()


def test_the_papers_numbers_say_where_they_are_from(reproduce):
    paper = reproduce.PAPER
    assert len(paper["families"]) == 7
    for family in paper["families"].values():
        for task, scores in family["numbers"].items():
            assert task in paper["sources"] and task in paper["tables"]
            assert set(scores) <= set(reproduce.TASKS[task].scores)
            assert all(set(pair) == {"raw", "denoised"} for pair in scores.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet"], "is none of"),
        ([], "at least one data set"),
        (["--data", "VOC=there"], "NAME=FOLDER"),
    ],
)
def test_a_wrong_start_is_said(reproduce, arguments, said):
    with pytest.raises(SystemExit, match=said):
        reproduce.main(arguments)


def test_data_of_another_layout_are_refused_before_anything_is_computed(reproduce, tmp_path):
    from dvt.errors import DataError

    (tmp_path / "voc").mkdir()
    with pytest.raises(DataError):
        reproduce.main(["--data", f"VOC2012={tmp_path / 'voc'}", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
