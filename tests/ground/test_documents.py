"""The site builds without a warning, and the code of its pages runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import dvt
from dvt.backbones import load_backbone
from dvt.backbones.export import export
from dvt.denoiser import Denoiser, DenoiserConfig

ROOT = Path(__file__).resolve().parents[2]


def code(page, holds):
    """The Python block of a page that holds some words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return next(block for block in blocks if holds in block)


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    shutil.rmtree(ROOT / "build" / "site-sources", ignore_errors=True)  # as in a new clone
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "tutorial.html", "commands.html", "api/index.html", "troubleshooting.html"} <= pages
    assert {f"notebooks/{path.stem}.html" for path in (ROOT / "examples").glob("*.ipynb")} <= pages
    assert "load_backbone" in (tmp_path / "site" / "api" / "index.html").read_text()
    assert "--product" in (tmp_path / "site" / "commands.html").read_text()


def test_the_tutorials_training_loop_runs_and_uses_clean_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    denoiser = Denoiser(DenoiserConfig("block", 64, (10, 10)), torch.Generator().manual_seed(0))
    for value in denoiser.parameters():
        value.data += 0.05
    denoiser.save_pretrained(Path("denoiser.safetensors"))
    small = code("tutorial.md", "optimizer").replace(
        '"vit_small_patch14_dinov2.lvd142m", pretrained=True', '"test_vit", pretrained=False'
    )
    names = {}
    exec(small, names)
    model, clean = names["model"], names["clean"]
    assert isinstance(clean, timm.models.VisionTransformer) and names["loss"].isfinite()
    images = torch.rand(1, 3, 160, 160)
    raw = model.forward_features(images)[:, 1:].unflatten(1, (10, 10))
    wanted = names["denoiser"](raw).permute(0, 3, 1, 2)
    torch.testing.assert_close(names["features"](images), wanted, atol=1e-5, rtol=1e-5)


def test_exported_files_are_run_as_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone("test_vit", pretrained=False)
    for name, holds in {"clean.onnx": "onnxruntime", "clean.pt2": "torch.export.load"}.items():
        export(backbone, name)
        names = {}
        exec(code("denoiser.md", holds), names)
        assert tuple(names["patches"].shape) == (2, 14, 14, 64) and tuple(names["prefix"].shape) == (2, 1, 64)
    images = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(names["model"](images)[0], backbone(images).patches, atol=1e-4, rtol=1e-4)


def test_pages_name_the_version_that_is_there():
    assert dvt.__version__ in (ROOT / "CHANGELOG.md").read_text()
