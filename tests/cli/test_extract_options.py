"""`dvt extract --upsample` and `--layer` with several blocks, and a head of several layers, as a user runs them."""

import json

import numpy as np
import torch
from PIL import Image

import dvt
from dvt.images import load_image
from dvt.store import FeatureStore

WITH = ("--weights", "demo", "--size", "64", "--dtype", "float32")


def save(photo, name):
    Image.fromarray(photo.mul(255).byte().movedim(0, -1).numpy()).save(name)


def test_finer_features_lie_beside_the_store(photo, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(photo[:, :256, :384], "a.png")
    run("extract", "a.png", *WITH, "--upsample", 3, "--out", "store")
    (name,) = json.loads((tmp_path / "store" / "upsampled" / "index.json").read_text())
    fine = torch.from_numpy(np.load(tmp_path / "store" / "upsampled" / name).astype(np.float32))
    raw = FeatureStore(tmp_path / "store")[0].patches[0]
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)
    pixels = dvt.views.resize(load_image("a.png"), backbone.input_size((256, 384)))
    wanted = dvt.upsample(raw, pixels, 3, centres=backbone.centres((64, 96)))
    assert fine.shape == (12, 18, 192) and float((fine - wanted).norm() / wanted.norm()) < 2e-3
    assert "1 or more" in run("extract", "a.png", *WITH, "--upsample", 0, "--out", "bad", expect=2)


def test_several_layers_are_terms_of_one_store_and_one_head(photo, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(photo[:, :128, :128], "a.png")
    run("extract", "a.png", *WITH, "--layer", 5, 8, 11, "--out", "store")
    store = FeatureStore(tmp_path / "store")
    assert store.terms == ("raw", "layer5", "layer8") and store.job.layer == -1
    run("show", "store", "--terms", "layer5", "raw", "--out", "shown")
    assert "5 8 11 (you ask for 5 11)" in run("extract", "a.png", *WITH, "--layer", 5, 11, "--out", "store", expect=2)
    assert "12 blocks" in run("extract", "a.png", *WITH, "--layer", 5, 12, "--out", "bad", expect=2)
    assert "no block" in run("extract", "a.png", *WITH, "--layer", "--out", "bad", expect=2)
    for split, count in (("train", 3), ("test", 1)):
        for number in range(count):
            labels = np.zeros((64, 64), np.uint8)
            labels[:, 16 + 16 * number :] = 1
            for kind, values in (("images", 40 + 170 * labels), ("annotations", labels)):
                (tmp_path / "data" / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(tmp_path / "data" / kind / split / f"{number}.png")
    probe = ("probe", "segmentation", "data", *WITH[:4], "--layer", 5, 11, "--cache", "cache", "--seeds", 1)
    found = run(*probe, "--baselines", "--save", "head.safetensors")
    assert [row["variant"] for row in found["rows"]] == ["raw", "layer5", "layer5 + layer11"]
    done = run("predict", "head.safetensors", "data/images/test", "--weights", "demo", "--out", "out")
    assert done["predicted"] == 1
