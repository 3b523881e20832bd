"""`dvt probe --save` and `dvt predict` as a user runs them."""

import json

import numpy as np
from PIL import Image

WITH = ("--weights", "demo")


def two_colours(root):
    """Photographs whose left part is dark and right part bright, of several widths, with labels 0 and 1."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for number in range(count):
            edge = 32 + 16 * (number % 3)
            labels = np.zeros((64, 96), np.uint8)
            labels[:, edge:] = 1
            pixels = (40 + 170 * labels[..., None] + random.integers(0, 30, (64, 96, 3))).astype(np.uint8)
            for kind, values in (("images", pixels), ("annotations", labels)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / kind / split / f"{number}.png")


def test_a_kept_head_labels_photographs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_colours(tmp_path / "data")
    probe = ("probe", "segmentation", "data", *WITH, "--size", "64", "--cache", "cache", "--seeds", "1", "--baselines")
    run(*probe, "--save", "head.safetensors", "--names", "dark", "bright")
    found = run("predict", "head.safetensors", "data/images/test", *WITH, "--out", "out")
    assert found["predicted"] == 2 and found["failed"] == []
    names = json.loads((tmp_path / "out" / "index.json").read_text())
    for name, path in names.items():
        truth = np.asarray(Image.open(path.replace("images", "annotations")))
        assert (np.asarray(Image.open(tmp_path / "out" / "labels" / f"{name}.png")) == truth).mean() > 0.9
        assert (tmp_path / "out" / "overlays" / f"{name}.png").is_file()
    message = run(
        "predict",
        "head.safetensors",
        "data/images/test",
        "--backbone",
        "test_vit",
        "--weights",
        "demo",
        "--out",
        "bad",
        expect=2,
    )
    assert "another shape" in message
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    run("predict", "head.safetensors", "no.jpg", "data/images/test/0.png", *WITH, "--out", "two", expect=2)
    assert len(json.loads((tmp_path / "two" / "index.json").read_text())) == 1
    message = run("predict", "head.safetensors", "no.jpg", *WITH, "--out", "none/deep", expect=2)
    assert "the image given cannot be used: cannot read image 'no.jpg'" in message
    (tmp_path / "cut.png").write_bytes((tmp_path / "data" / "images" / "test" / "0.png").read_bytes()[:2000])
    message = run("predict", "head.safetensors", "no.jpg", "cut.png", *WITH, "--out", "none/deep", expect=2)
    assert "no.jpg" in message and "none of the 2 images can be used; the last one: cannot read image" in message
    assert not (tmp_path / "none").exists()
    message = run("prior", "train", "no.jpg", "cut.png", *WITH, "--out", "none/deep", expect=2)
    assert "no.jpg" in message and "none of the 2 images can be used; the last one: cannot read image" in message
    assert not (tmp_path / "none").exists()
    assert "keeps no head" in run("probe", "classification", "data", *WITH, "--save", "x.safetensors", expect=2)
    assert not (tmp_path / "bad").exists() and not (tmp_path / "x.safetensors").exists()
