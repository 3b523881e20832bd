"""The commands beyond stage one, in one process and in the order in which a user meets them."""

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt.cli import main

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64")


def photograph(path, seed, size=(90, 120)):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photographs, a store of them, and a denoiser trained on it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    for seed in range(6):
        photograph(folder / "photos" / f"{seed}.png", seed)
    photos, store, file = folder / "photos", folder / "store", folder / "denoiser.safetensors"
    assert main(["denoise", str(photos), "--out", str(store), "--views", "7", "--no-pictures", *WITH]) == 0
    assert main(["train", str(store), "--out", str(file), "--steps", "30", "--batch-size", "4"]) == 0
    return folder


def test_train_writes_a_denoiser_that_beats_doing_nothing_and_its_card(work):
    denoiser = dvt.Denoiser.from_pretrained(work / "denoiser.safetensors")
    metrics = denoiser.card["metrics"]
    assert metrics["validation"]["loss"] < 0.8 * metrics["baselines"]["no_op"]["loss"]
    assert denoiser.card["backbone"] == "vit_tiny_patch16_224" and denoiser.card["layer"] == -1


def test_train_twice_trains_once(work, run):
    before = (work / "denoiser.safetensors").read_bytes()
    run("train", work / "store", "--out", work / "denoiser.safetensors", "--steps", 30, "--batch-size", 4)
    assert (work / "denoiser.safetensors").read_bytes() == before


def test_train_without_semantic_tokens_is_refused(work, tmp_path, run):
    error = run("train", work / "photos", "--out", tmp_path / "d.safetensors", expect=2)
    assert "photos" in error and not list(tmp_path.iterdir())


def test_export_with_a_denoiser_gives_what_the_two_give(work, run):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = work / "clean.onnx"
    run("export", *WITH, "--denoiser", work / "denoiser.safetensors", "--out", out)
    images = np.random.default_rng(0).random((2, 3, 64, 96), dtype=np.float32)
    patches = onnxruntime.InferenceSession(out).run(["patches"], {"images": images})[0]
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)
    with torch.no_grad():
        tokens = backbone(torch.from_numpy(images))
        expected = dvt.Denoiser.from_pretrained(work / "denoiser.safetensors")(tokens.patches)
    np.testing.assert_allclose(patches, expected.numpy(), atol=1e-4)


def test_another_models_denoiser_is_refused_unless_forced(work, tmp_path, run):
    other = ("--backbone", "deit_tiny_patch16_224", "--weights", dvt.demo_weights(), "--size", "64")
    export = ("export", *other, "--denoiser", work / "denoiser.safetensors", "--out", tmp_path / "a.pt2")
    # the same weights under another name are the same model; another layer is not
    error = run(*export, "--layer", 3, expect=2)
    assert "layer" in error and not list(tmp_path.iterdir())
    assert run(*export, "--layer", 3, "--force")["deviation"] < 1e-4


def test_distill_writes_a_backbone_that_denoise_can_load(work, tmp_path, run):
    out = tmp_path / "clean.safetensors"
    arguments = ("distill", work / "photos", *WITH, "--denoiser", work / "denoiser.safetensors", "--out", out)
    result = run(*arguments, "--steps", 2, "--batch-size", 2)
    assert result["validation"]["loss"] < result["baselines"]["no_op"]["loss"]
    clean = dvt.load_backbone("vit_tiny_patch16_224", weights=out, size=64)
    raw = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)
    assert clean.weights_sha256 != raw.weights_sha256


def test_analyze_then_report(work, tmp_path, run):
    arguments = ("analyze", work / "photos", *WITH, "--denoiser", work / "denoiser.safetensors", "--views", 0)
    found = run(*arguments, "--store", work / "store", "--out", tmp_path / "report", "--windows", 2)
    rows = {(row["metric"], row["variant"]): row for row in found["rows"]}
    raw, clean = rows["position_r2", "raw"], rows["position_r2", "denoised"]
    assert raw["value"] > 0.5 > raw["null_high"] and clean["value"] < raw["value"]
    page = run("report", tmp_path / "report", "--out", tmp_path / "report.html")
    assert page["bytes"] < 8e6 and "position" in (tmp_path / "report.html").read_text()


def test_doctor_finds_the_demo_models_artifact(work, run):
    found = run("doctor", work / "photos", "--backbone", "vit_tiny_patch16_224", "--weights", "demo")
    assert found["kind"] in ("position", "both") and found["strength"] > 0


def test_probe_scores_rows_side_by_side(work, tmp_path, run):
    rng = np.random.default_rng(0)
    for split, seeds in (("train", (0, 1, 2, 3)), ("test", (4, 5))):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for seed in seeds:
            name = tmp_path / "images" / split / f"{seed}.png"
            name.write_bytes((work / "photos" / f"{seed}.png").read_bytes())
            labels = rng.integers(0, 3, (9, 12), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{seed}.png")
    arguments = ("probe", "knn", tmp_path, *WITH, "--denoiser", work / "denoiser.safetensors", "--ignore", 2)
    found = run(*arguments, "--store", work / "store", "--cache", tmp_path / "cache")
    assert {row["variant"] for row in found["rows"]} >= {"raw", "position-only", "denoised", "semantic"}
    assert all(0 <= row["scores"]["mIoU"] <= 1 for row in found["rows"])


def test_a_prior_is_trained_sampled_and_evaluated(work, tmp_path, run):
    small = (
        "--side",
        8,
        "--patch",
        4,
        "--width",
        16,
        "--depth",
        1,
        "--heads",
        2,
        "--steps",
        3,
        "--batch-size",
        4,
        "--held-out",
        0.4,
    )
    for seed in range(6, 12):
        photograph(work / "photos" / f"{seed}.png", seed)
    tokens = (*WITH, "--denoiser", work / "denoiser.safetensors")
    trained = run("prior", "train", work / "photos", *tokens, "--out", tmp_path / "run", *small)
    assert trained["steps"] == 3 and 0 < trained["held_out_loss"] < 2
    sampled = run("prior", "sample", tmp_path / "run", "--out", tmp_path / "grid.png", "--count", 2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert sampled["samples"] == 2 and np.asarray(grid.convert("L")).std() > 5
    found = run("prior", "evaluate", tmp_path / "run", "--count", 4, "--steps", 3)
    (scores,) = found["runs"].values()
    assert all(-1 <= each["round_trip"]["matched"] <= 1 for each in scores["yardsticks"].values())
    photo = work / "photos" / "6.png"
    files = ("prior", "sample", tmp_path / "run", "--condition", photo, "--out", tmp_path / "files", "--steps", 2)
    assert len(run(*files, *tokens, "--count", 2)["files"]) == 2
    assert "denoiser" in run(*files, *WITH, expect=2)
    assert "knows no labels" in run("prior", "sample", tmp_path / "run", "--label", "cat", "--out", "x", expect=2)
    assert "either images or --store" in run("prior", "train", "--out", tmp_path / "other", expect=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "store", "--out", "d.safetensors", "--steps", -5), "steps must be at least 1, got -5"),
        (("prior", "train", "photos", "--out", "run", "--side", 15), "multiple of the patch"),
        (("doctor", "photos", "--windows", 3), "windows is 3; it must be an even number"),
        (("probe", "knn", "data", "--seeds", 0), "seeds is 0"),
        (("export", *WITH, "--out", "/proc/nope/a.pt2"), "cannot write"),
        (("prior", "sample", "run", "--out", "a.txt"), ".png"),
    ],
)
def test_a_setting_out_of_range_is_said_before_anything_is_done(arguments, said, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert said in run(*arguments, expect=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "distill"])
def test_the_flags_of_training_have_no_prefix(command, tmp_path, run):
    """As when the settings of the loop were the job's own."""
    photograph(tmp_path / "one.png", 0)
    flags = {"steps": 7, "batch_size": 2, "learning_rate": 0.1, "min_learning_rate": 0.01, "warmup": 0.2, "clip": 0.5}
    flags |= {"weight_decay": 0.3, "ema": 0.4, "validate_every": 3, "checkpoint_every": 4, "log_every": 5, "seed": 6}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    words = ["--precision", "bf16", "--validation", 0.25, "--trackers", "wandb", "--dry-run"]
    training = run(command, tmp_path, "--out", tmp_path / "d.safetensors", *given, *words)["training"]
    assert {name: training["loop"][name] for name in flags} == flags
    assert (training["loop"]["precision"], training["loop"]["trackers"]) == ("bf16", ["wandb"])
    assert training["validation"] == 0.25


def test_another_kind_does_not_overwrite_a_denoiser(work, run):
    before = (work / "denoiser.safetensors").read_bytes()
    error = run("train", work / "store", "--out", work / "denoiser.safetensors", "--kind", "linear", expect=2)
    assert "block" in error and (work / "denoiser.safetensors").read_bytes() == before


def test_what_is_written_can_be_read_by_whoever_may_read_the_folder(work):
    (work / "plain").touch()
    assert (work / "denoiser.safetensors").stat().st_mode == (work / "plain").stat().st_mode


def test_pictures_of_an_earlier_run_are_no_photographs(work, tmp_path, run):
    photograph(tmp_path / "one.png", 0)
    arguments = ("denoise", tmp_path, "--out", tmp_path, "--views", 3, *WITH)
    assert run(*arguments)["done"] == 1
    again = run(*arguments)
    assert (again["done"], again["skipped"]) == (0, 1)


def test_an_image_of_one_patch_is_refused(tmp_path, run):
    photograph(tmp_path / "one.png", 0)
    run("denoise", tmp_path, "--out", tmp_path / "s", "--views", 3, *WITH[:4], "--size", 5, expect=2)


def test_distill_teaches_another_model(work, tmp_path, run):
    out = tmp_path / "small.safetensors"
    arguments = ("distill", work / "photos", *WITH, "--teacher", "raw", "--steps", 4, "--batch-size", 2)
    student = ("--student", "test_vit2", "--student-weights", "random", "--student-size", 48)
    result = run(*arguments, *student, "--out", out)
    assert result["student"] == "test_vit2" and result["grid"] == [3, 3]
    assert set(result["baselines"]) == {"mean", "start"}
    assert dvt.load_backbone("test_vit2", weights=out, size=48).feature_dim == 64
    projection = dvt.denoiser.read_projection(result["projection"])
    assert (projection.in_features, projection.out_features) == (64, 192)
    error = run(*arguments, *student[2:], "--out", tmp_path / "none.safetensors", expect=2)
    assert "--student, which is missing" in error and not (tmp_path / "none.safetensors").exists()
