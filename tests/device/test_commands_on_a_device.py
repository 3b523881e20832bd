"""Every command that computes, on the CPU and on the stand-in: the same numbers, and nothing that a GPU refuses."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64", "--dtype", "float32")
HERE = "{here}"
TRAINED = ("--steps", 4, "--batch-size", 4)
DENOISER = (*WITH, "--denoiser", f"{HERE}/denoiser.safetensors")


def close(one, other, tolerance=2e-3):
    """Whether maps are equal but for the order of sums, and half precision's rounding."""
    return float((one - other).norm() / one.norm().clamp_min(1e-6)) < tolerance


def denoised(places, photos, *more):
    results = places("denoise", photos, *WITH, "--views", 9, "--no-pictures", "--out", f"{HERE}/store", *more)
    assert [each["done"] for each in results] == [9, 9]
    return zip(*places.stores(), strict=True)


@pytest.mark.parametrize(
    "more",
    [(), ("--product", "ensembled"), ("--product", "ensembled", "--keep-terms", "--shared-artifact")],
    ids=["removed", "ensembled", "shared"],
)
def test_denoise(places, photos, more):
    """Groups of eight, and another stream for the solver, by default."""
    for here, there in denoised(places, photos, *more):
        assert here.keys() == there.keys()
        assert all(close(here[term], there[term]) or not here[term].any() for term in here)


def test_tf32_reaches_no_solver_beside_the_backbone(other, photos, tmp_path, monkeypatch):
    """It is a setting of the process, so nothing is solved while the backbone computes, whatever is asked for."""
    import dvt
    from dvt.backbones import precision
    from dvt.fields.config import DenoiseConfig
    from dvt.fields.images import denoise_images

    monkeypatch.setattr(precision, "has_tf32", lambda device: True)
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64).to(other)
    seen = set()
    backbone.model.blocks[0].register_forward_pre_hook(
        lambda *given: seen.add((threading.current_thread(), torch.get_float32_matmul_precision()))
    )
    config = DenoiseConfig(views=6, dtype="tf32", overlap=True)
    denoise_images(backbone, sorted(photos.iterdir())[:2], tmp_path / "store", config)
    assert seen == {(threading.current_thread(), "high")} and torch.get_float32_matmul_precision() == "highest"


def test_denoise_by_gradient_descent(places, photos):
    settings = ("--solver", "neural", "--product", "ensembled", "--neural.steps", 30, "--neural.levels", 3)
    for here, there in denoised(places, photos, *settings, "--neural.finest", 32, "--neural.tokens-per-step", 64):
        assert close(here["raw"], there["raw"]) and close(here["semantic"], there["semantic"], 0.02)


def test_extract_train_distill_and_what_reads_them(places, photos, differ):
    """A user's way from photographs to a clean backbone, on the device all along."""
    list(denoised(places, photos))
    trained = places("train", f"{HERE}/store", "--out", f"{HERE}/denoiser.safetensors", *TRAINED)
    assert not differ(*(each["validation"] for each in trained))
    places("extract", photos, *DENOISER, "--out", f"{HERE}/extracted", "--batch", 4, "--layer", 5, 11)
    for here, there in zip(*places.stores("extracted"), strict=True):
        assert here.keys() == there.keys() == {"raw", "denoised", "layer5"}
        assert all(close(here[term], there[term]) for term in here)
    student = places("distill", photos, *DENOISER, "--out", f"{HERE}/clean.safetensors", *TRAINED)
    assert not differ(*(each["validation"] for each in student))


def test_analyze_and_doctor(places, photos, differ):
    few = ("--images", 4, "--windows", 4, "--draws", 2)
    analysed = places(
        *("analyze", photos, *WITH, "--out", f"{HERE}/report", "--views", 6, *few),
        *("--layers", 5, "--mic-channels", 4, "--layer-images", 2),
    )
    assert analysed[0]["rows"] and not differ(*(each["rows"] for each in analysed), 0.02)
    quick = ("--product-images", 1, "--product-windows", 4)
    assert not differ(*places("doctor", photos, *WITH, *few, *quick, "--remedies"), 0.02)


def test_show_and_match(places, photos, differ):
    matched = places("match", photos / "0.png", photos / "1.png", *WITH, "--out", f"{HERE}/match.png")
    assert not differ(*matched, 0.02)
    places("show", photos, *WITH, "--views", 4, "--out", f"{HERE}/shown")


def test_a_remedy(places, photos, differ):
    """The others need outliers, which the small model has not; `dvt doctor --remedies` tries all of them."""
    assert not differ(*places("remedy", "noise", photos, *WITH, "--out", f"{HERE}/remedy.safetensors"))


def labelled(photos, folder):
    """Data of all kinds: classes of pixels, depth and boxes, and in a folder beside, classes of images."""
    rng = np.random.default_rng(0)
    boxes = {}
    for split, seeds in (("train", range(6)), ("test", range(6, 9))):
        for kind in ("images", "annotations", "depth"):
            (folder / "data" / kind / split).mkdir(parents=True)
        for name in ("even", "odd"):
            (folder / "classes" / split / name).mkdir(parents=True)
        for seed in seeds:
            shutil.copy(photos / f"{seed}.png", folder / "data" / "images" / split)
            shutil.copy(photos / f"{seed}.png", folder / "classes" / split / ("odd" if seed % 2 else "even"))
            labels = rng.integers(0, 3, (9, 12), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(labels).save(folder / "data" / "annotations" / split / f"{seed}.png")
            depth = Image.fromarray(1000 + 500 * labels.astype(np.uint16))
            depth.save(folder / "data" / "depth" / split / f"{seed}.png")
            boxes[f"{split}/{seed}.png"] = {"width": 120, "height": 90, "boxes": [[20, 20, 80, 70]]}
    (folder / "data" / "boxes.json").write_text(json.dumps(boxes))


TASKS = ("segmentation", "knn", "depth", "correspondence", "discovery", "classification", "knn-classification")


@pytest.mark.parametrize("task", TASKS)
def test_probes(places, photos, tmp_path, differ, task):
    labelled(photos, tmp_path)
    data = tmp_path / ("classes" if "classification" in task else "data")
    head = ("--head.epochs", 2) if task in ("segmentation", "depth") else ()
    found = places("probe", task, data, *WITH, *head, "--seeds", 1, "--cache", f"{HERE}/cache", "--views", 4)
    assert found[0]["rows"] and not differ(*(each["rows"] for each in found), 0.02)


def test_a_prior(places, photos, differ):
    small = ("--side", 8, "--patch", 4, "--width", 16, "--depth", 1, "--heads", 2, "--held-out", 0.4)
    trained = places("prior", "train", photos, *WITH, "--out", f"{HERE}/run", *small, *TRAINED)
    assert not differ(*trained)
    places("prior", "sample", f"{HERE}/run", "--out", f"{HERE}/grid.png", "--count", 2, "--steps", 3)
    grids = [np.asarray(Image.open(places.folder / place / "grid.png").convert("L")) for place in ("cpu", places.other)]
    assert np.abs(grids[0].astype(float) - grids[1]).mean() < 3 and grids[0].std() > 5
    places("prior", "evaluate", f"{HERE}/run", "--count", 4, "--steps", 3)


def test_attached(other):
    """A denoised model answers there what it answers here."""
    import dvt
    from dvt.denoiser.config import DenoiserConfig

    answers = []
    for place in ("cpu", other):
        backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)
        denoiser = dvt.Denoiser(DenoiserConfig("block", 192, (4, 4)), torch.Generator().manual_seed(0))
        clean = denoiser.attach(backbone).to(place)
        images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).to(place)
        with torch.no_grad():
            answers.append([clean.forward_features(images), *clean.forward_intermediates(images, indices=2)[1]])
    for here, there in zip(*answers, strict=True):
        assert there.device.type == other.type
        torch.testing.assert_close(here, there.cpu(), atol=1e-4, rtol=1e-4)
