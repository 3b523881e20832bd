"""Priors as jobs: train, resume, sample, evaluate; what a run keeps, and what is refused."""

import csv
import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dvt.analysis.priors.compare import Comparison, compare_priors, look
from dvt.analysis.priors.conditions import conditions_of_images, conditions_of_labels
from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.job_config import Loop
from dvt.analysis.priors.loop_run import loop_prior
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.reading import Wanted, kept_tokens, opened_tokens, read_tokens
from dvt.analysis.priors.runs import (
    PriorTraining,
    Sampling,
    StoreTerm,
    fit_prior,
    open_run,
    sample_prior,
    train_prior,
    write_samples,
)
from dvt.analysis.priors.scoring import evaluate_priors
from dvt.analysis.priors.token_set import read_conditions, split, square
from dvt.backbones import wrap
from dvt.errors import BackboneError, ConfigError, ImageError, NonFiniteError, StoreError, WeightsError
from dvt.images import file_sha256, load_image
from dvt.progress import silent
from dvt.store import ImageEntry, Job, Record, StoreWriter, plan
from dvt.tokens import Tokens
from dvt.training import TrainingConfig
from dvt.views import resize

TINY = {"side": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "steps": 4, "batch_size": 4, "checkpoint_every": 2}
TINY |= {"ema": 0.5, "validate_every": 2, "log_every": 1, "held_out": 0.25}


def write(folder, count, side=32):
    """Pictures of one random colour each, with a little noise."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        colour = torch.rand(1, 1, 3, generator=generator)
        noise = 0.05 * torch.randn(side, side + 8, 3, generator=generator)
        pixels = (255 * (colour + noise).clamp(0, 1)).byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "colours", 12)


@pytest.fixture(scope="module")
def backbone(make_tiny_backbone):
    return make_tiny_backbone(size=32)


def ignore(what, done, total):
    pass


def tiny_training(**changes):
    """TINY with changes; those that are the loop's go into it."""
    given = {**TINY, **changes}
    inner = {each.name for each in fields(TrainingConfig)}
    loop = replace(PriorTraining().loop, **{name: value for name, value in given.items() if name in inner})
    return PriorTraining(**{name: value for name, value in given.items() if name not in inner}, loop=loop)


def train_tiny(images, backbone, out, denoiser=None, progress=None, **changes):
    return train_prior(images, backbone, out, tiny_training(**changes), denoiser, progress, device="cpu")


def is_picture(path):
    image = load_image(path)
    return image.shape[0] == 3 and min(image.shape[1:]) > 50 and image.std() > 0.01


# --- training


def test_a_run_reports_and_keeps_what_sampling_needs(images, backbone, tmp_path):
    told = []
    report = train_tiny(images, backbone, tmp_path / "run", progress=lambda *about: told.append(about))
    assert (report["images"], report["training"], report["held_out"], report["steps"]) == (12, 9, 3, 4)
    assert json.loads(json.dumps(report)) == report
    assert ("look", 12, 12) in told and told[-1] == ("train", 4, 4)
    # Samples of every checkpoint, also of the last one, and the log of both losses.
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000004.png"]
    assert all(is_picture(tmp_path / "run" / "samples" / name) for name in names)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert len(rows) == 4 and float(rows[-1]["held_out_loss"]) == pytest.approx(report["held_out_loss"])
    prior = Prior.load(report["out"])
    assert prior.card["backbone"] == backbone.name and prior.card["weights_sha256"] == backbone.weights_sha256
    assert prior.card["metrics"]["steps"] == 4
    # The card lists the loop's settings beside the others, as it did before they were nested.
    settings = tiny_training()
    assert "loop" not in prior.card["training"] and TINY.items() <= prior.card["training"].items()
    assert prior.card["training"] == json.loads(json.dumps(settings.to_json()))
    assert all(settings.to_json()[name] == value for name, value in asdict(settings.loop).items())
    # The result holds the averaged weights of the last checkpoint.
    averaged = load_file(tmp_path / "run" / "step-00000004" / "ema.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in prior.state_dict().items())


def test_a_killed_run_ends_with_the_same_weights(images, backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "whole")

    def kill(what, done, total):
        if (what, done) == ("train", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(images, backbone, tmp_path / "killed", progress=kill)
    # What it left at step 2 can be sampled already, with the averaged weights.
    left, averaged = (
        load_file(tmp_path / "killed" / name) for name in ("prior.safetensors", "step-00000002/ema.safetensors")
    )
    assert all(torch.equal(left[name], averaged[name]) for name in averaged)
    assert (
        sample_prior(tmp_path / "killed", images=2, samples=1, sampling=Sampling(steps=2), device="cpu")["images"] == 2
    )
    train_tiny(images, backbone, tmp_path / "killed")
    first, second = (load_file(tmp_path / name / "prior.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = Prior.load(tmp_path / "whole" / "prior.safetensors")
    fresh = Prior(untrained.config, torch.Generator().manual_seed(0))
    assert not torch.equal(fresh.head.leave.weight, untrained.head.leave.weight)


def test_what_a_run_must_agree_with_to_be_continued(images, backbone, tmp_path):
    """Runs that are on users' disks go on only while these names and their values stay."""
    train_tiny(images, backbone, tmp_path)
    state = json.loads((tmp_path / "step-00000004" / "state.json").read_text())
    names = "steps batch_size learning_rate min_learning_rate warmup weight_decay betas clip ema precision seed"
    assert list(state["config"]) == names.split()
    assert [state["config"][name] for name in ("steps", "batch_size", "warmup", "ema")] == [4, 4, 0.05, 0.5]
    names = "backbone weights_sha256 layer stride size denoiser condition target data start prior"
    assert list(state["settings"]) == names.split()


def test_every_step_meets_other_noise(tmp_path):
    """One map, again and again, at a learning rate of nothing: only the noise moves the loss."""
    prior = Prior(PriorConfig((1, 2), 3, width=16, depth=1, heads=2), torch.Generator().manual_seed(0))
    data = (torch.ones(1, 1, 2, 3), None)
    config = TrainingConfig(5, 2, 1e-12, min_learning_rate=0.0, log_every=1)
    losses = [row["loss"] for row in fit_prior(prior, data, data, config, tmp_path).history]
    assert len(set(losses)) == 5


def test_a_run_of_another_backbone_is_not_continued(images, backbone, make_tiny_backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "run")
    other = make_tiny_backbone(size=32)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.safetensors")}
    with pytest.raises(ConfigError, match="weights_sha256"):
        train_tiny(images, other, tmp_path / "run")
    assert len(before) == 2 and all((tmp_path / "run" / name).read_bytes() == was for name, was in before.items())
    with pytest.raises(ConfigError, match="denoiser"):
        train_tiny(images, backbone, tmp_path / "run", denoiser=lambda tokens: tokens)


class Scaled:
    """A denoiser that multiplies, and says by how much."""

    def __init__(self, factor):
        self.factor, self.identity = factor, {"factor": factor}

    def __call__(self, tokens):
        return tokens.with_patches(self.factor * tokens.patches)


def test_a_run_goes_on_only_with_its_denoiser_size_and_images(images, backbone, make_tiny_backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "run", denoiser=Scaled(1.0))
    with pytest.raises(ConfigError, match=r"denoiser.*factor 1\.0 \(you ask for 2\.0\)"):
        train_tiny(images, backbone, tmp_path / "run", denoiser=Scaled(2.0))
    with pytest.raises(ConfigError, match=r"size \[32, 32\] \(you ask for \[48, 48\]\)"):
        train_tiny(images, make_tiny_backbone(size=48), tmp_path / "run", denoiser=Scaled(1.0))
    some = sorted(images.iterdir())[:10]
    with pytest.raises(ConfigError, match=r"images 12 of them \(you ask for 10 of them\)"):
        train_tiny(some, backbone, tmp_path / "run", denoiser=Scaled(1.0))
    assert train_tiny(images, backbone, tmp_path / "run", denoiser=Scaled(1.0))["steps"] == 4


def test_no_image_is_looked_at_twice(images, backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "run")

    def refuse(tokens):
        raise AssertionError("looked again")

    def kill(what, done, total):
        if what == "look":
            raise KeyboardInterrupt

    refuse.__module__, refuse.__qualname__ = ignore.__module__, ignore.__qualname__
    told = []
    train_tiny(images, backbone, tmp_path / "run", progress=lambda *about: told.append(about[0]))
    assert "look" not in told
    with pytest.raises(KeyboardInterrupt):
        train_tiny(images, backbone, tmp_path / "killed", progress=kill)
    assert not (tmp_path / "killed" / "tokens").exists()
    with pytest.raises(AssertionError, match="looked again"):
        train_tiny(images, backbone, tmp_path / "killed", denoiser=refuse)


def test_an_image_that_cannot_be_read_is_left_out(images, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "mine")
    (mine / "000.png").write_bytes((mine / "001.png").read_bytes()[:200])
    report = train_tiny(mine, backbone, tmp_path / "run")
    assert (report["images"], report["left_out"]) == (11, 1)


def test_a_finished_run_is_trained_further_from_its_weights(images, backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "first")
    kept = load_file(tmp_path / "first" / "prior.safetensors")
    changes = {"steps": 1, "learning_rate": 1e-12, "min_learning_rate": 0.0, "weight_decay": 0.0, "ema": 0.0}
    config = tiny_training(**changes)
    train_prior(images, backbone, tmp_path / "more", config, device="cpu", start=tmp_path / "first")
    after = load_file(tmp_path / "more" / "prior.safetensors")
    assert all(torch.allclose(kept[name], after[name], atol=1e-6) for name in kept)
    with pytest.raises(ConfigError, match="start"):
        train_prior(images, backbone, tmp_path / "more", config, device="cpu")
    with pytest.raises(ConfigError, match="width 16 there, 32 here"):
        other = tiny_training(width=32)
        train_prior(images, backbone, tmp_path / "x", other, device="cpu", start=tmp_path / "first")


def test_a_second_stage_learns_labels_and_is_sampled_by_them(images, backbone, tmp_path):
    for number, path in enumerate(sorted(images.iterdir())):
        target = tmp_path / "classes" / ("cat", "dog")[number % 2] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    train_tiny(images, backbone, tmp_path / "first")
    config = tiny_training(condition="label", pairs=0.5)
    report = train_prior(
        tmp_path / "classes", backbone, tmp_path / "second", config, device="cpu", start=tmp_path / "first"
    )
    assert report["training"] in (4, 5) and is_picture(report["samples"])
    card = Prior.load(report["out"]).card
    assert card["labels"] == ["cat", "dog"]
    told = conditions_of_labels(card, ["dog"])
    made = write_samples(tmp_path / "second", tmp_path / "dogs", told, 3, Sampling(steps=2), "cpu")
    assert [Path(name).name for name in made["files"]] == ["0000-00.png", "0000-01.png", "0000-02.png"]
    with np.load(tmp_path / "dogs" / "samples.npz") as arrays:
        assert arrays["pictures"].shape == (3, 3, 8, 8)
        shown = np.asarray(Image.open(made["files"][1])).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(arrays["pictures"][1], shown, atol=0.003)
    with pytest.raises(ConfigError, match="no label 'cow'; this prior knows cat, dog"):
        conditions_of_labels(card, ["cow"])
    with pytest.raises(ConfigError, match="knows no labels"):
        conditions_of_labels(Prior.load(tmp_path / "first" / "prior.safetensors").card, ["cat"])
    with pytest.raises(ConfigError, match="all images lie in"):
        train_tiny(images, backbone, tmp_path / "third", condition="label")


def test_conditions_of_images_are_those_of_the_training(images, backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "run")
    run = open_run(tmp_path / "run", "cpu")
    made = conditions_of_images(run.prior.card, [Path(name) for name in run.names], backbone)
    torch.testing.assert_close(made.float(), run.held["conditions"].float(), atol=1e-2, rtol=1e-3)
    pixels = [load_image(name) for name in run.names]
    assert torch.equal(conditions_of_images(run.prior.card, pixels, backbone), made)
    assert torch.equal(conditions_of_images(run.prior.card, pixels[0], backbone), made[:1])
    with pytest.raises(ImageError, match="given as int"):
        conditions_of_images(run.prior.card, 7, backbone)
    with pytest.raises(ConfigError, match="given as Tensor"):
        kept_tokens(tmp_path / "kept", pixels, backbone, Wanted("cls", False, 8), None, silent)
    with pytest.raises(BackboneError, match="trained on other tokens"):
        conditions_of_images(run.prior.card, sorted(images.iterdir())[:1], backbone, Scaled(2.0))


def test_a_prior_fitted_to_tensors_is_sampled_from_its_folder(tmp_path):
    prior = Prior(PriorConfig((2, 2), 3, 5, width=16, depth=1, heads=2), torch.Generator().manual_seed(0))
    data = (torch.randn(8, 2, 2, 3), torch.randn(8, 1, 5))
    fit_prior(prior, data, (data[0][:3], data[1][:3]), TrainingConfig(2, 4, 1e-3), tmp_path / "a")
    assert sample_prior(tmp_path / "a", sampling=Sampling(steps=2), device="cpu")["images"] == 3
    prior.swap_condition(4, torch.Generator().manual_seed(1))
    swapped = (data[0], torch.randn(8, 1, 4))
    fit_prior(prior, swapped, (data[0][:3], swapped[1][:3]), TrainingConfig(2, 4, 1e-3), tmp_path / "b")
    assert is_picture(sample_prior(tmp_path / "b", sampling=Sampling(steps=2), device="cpu")["out"])


@pytest.mark.parametrize("flips", [False, True])
def test_mirrored_images_are_learnt_from_and_not_held_out(images, backbone, tmp_path, flips):
    report = train_tiny(images, backbone, tmp_path, flips=flips)
    assert (report["training"], report["held_out"]) == ((18, 3) if flips else (9, 3))
    if flips:
        pictures = np.load(tmp_path / "tokens" / "pictures.npy")
        np.testing.assert_allclose(pictures[12:], pictures[:12, :, :, ::-1], atol=1e-3)


def test_a_store_gives_the_tokens_that_its_images_give(images, backbone, tmp_path):
    """Of any term, without a backbone; only pictures are kept."""
    paths = sorted(images.iterdir())
    job = Job.of(backbone, {"verb": "test"})
    entries = [ImageEntry(str(path), file_sha256(path), (2, 3)) for path in paths]
    with StoreWriter(tmp_path / "store", job) as writer:
        (shard,) = plan(entries, 100, job)
        records = []
        for path, sha256, _ in shard.images:
            with torch.no_grad():
                tokens = backbone(resize(load_image(path), (32, 48))[None])
            raw, prefix = tokens.patches[0].half().numpy(), tokens.prefix[0].half().numpy()
            records.append(Record(path, sha256, (32, 40), {"raw": raw, "denoised": 2 * raw}, prefix))
        writer.write(shard.name, records)
    config = tiny_training(target="features", condition="both")
    train_prior(StoreTerm(tmp_path / "store", "denoised"), None, tmp_path / "run", config, device="cpu")
    seen = opened_tokens(tmp_path / "run" / "tokens")
    assert sorted(path.name for path in (tmp_path / "run" / "tokens").iterdir()) == ["about.json", "pictures.npy"]
    with torch.no_grad():
        tokens = backbone(resize(load_image(seen.names[0]), (32, 48))[None])
    torch.testing.assert_close(seen.patches[[0]].float(), 2 * tokens.patches[:, :, :2], atol=2e-2, rtol=1e-2)
    assert seen.conditions[[0, 1]].shape == (2, 5, 64)
    with pytest.raises(StoreError, match="'semantic'"):
        train_prior(StoreTerm(tmp_path / "store", "semantic"), None, tmp_path / "other", config, device="cpu")
    with pytest.raises(StoreError, match="not a feature store"):
        train_prior(StoreTerm(tmp_path / "run"), None, tmp_path / "other", config, device="cpu")
    assert not (tmp_path / "other" / "tokens").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": "cls"},
        {"condition": "both", "head": "token"},
        {"condition": None, "head": "token", "order": "raster"},
        {"condition": "patch", "centred": True},
        {"head": "token", "order": "raster", "codes": 8},
        {"target": "features"},
        {"target": "features", "condition": "cls", "head": "token"},
    ],
)
def test_every_kind_of_prior_trains_samples_and_is_measured(images, backbone, tmp_path, changes):
    report = train_tiny(images, backbone, tmp_path, **changes)
    assert is_picture(report["samples"])
    found = evaluate_priors([tmp_path], samples=6, sampling=Sampling(steps=2), device="cpu")
    (scores,) = found["runs"].values()
    assert scores["samples"] == 6 and json.loads(json.dumps(found)) == found
    assert scores["held_out_loss"] == pytest.approx(report["held_out_loss"], rel=1e-5)
    for each in scores["yardsticks"].values():  # 3 held-out images are too few to compare with
        assert each["kid"] is None and each["frechet"] is None and "20 held-out images" in each["refused"][0]
        assert -1 <= each["round_trip"]["matched"] <= 1


def test_colours_are_given_back_by_a_prior_that_is_told_of_them(backbone, tmp_path):
    """Planted: the token map holds the colour, so a sample must have its own condition's colour, not another's."""
    images = write(tmp_path / "colours", 80)
    changes = {"steps": 150, "batch_size": 16, "ema": 0.9, "learning_rate": 3e-3, "width": 32, "validate_every": 0}
    changes |= {"checkpoint_every": 150, "held_out": 0.3}
    train_tiny(images, backbone, tmp_path / "told", **changes)
    run = open_run(tmp_path / "told", "cpu")
    maps, _ = run.prior.sample(run.conditions(slice(None)), torch.Generator().manual_seed(0))
    made, real = run.target.decode(maps).mean((2, 3)), run.held["pictures"].float().mean((2, 3))
    correlation = torch.corrcoef(torch.stack((made.flatten(), real.flatten())))[0, 1]
    assert correlation > 0.9
    (scores,) = evaluate_priors([tmp_path / "told"], samples=24, device="cpu")["runs"].values()
    for each in scores["yardsticks"].values():
        assert (
            each["memorisation"]["share"] <= 1 and each["kid"]["held_out"]["low"] < 0 < each["kid"]["held_out"]["high"]
        )
    assert scores["yardsticks"]["pixels"]["round_trip"]["sigmas"] > 5


# --- what the backbone sees


def test_the_conditions_are_the_tokens_of_the_middle_square(images, backbone):
    paths = sorted(images.iterdir())[:3]
    seen = read_tokens(paths, backbone, Wanted("both", True, 8), None, ignore)
    assert seen.conditions.shape == (3, 5, 64) and seen.pictures.shape == (3, 3, 8, 8)
    for row, path in enumerate(paths):
        image = load_image(path)[:, :, 4:36]  # 32 x 40 pixels: four columns are cut on each side
        assert torch.equal(square(load_image(path)), image)
        tokens = backbone(resize(image, (32, 32))[None])
        expected = torch.cat((tokens.prefix[0, :1], tokens.patches[0].flatten(0, 1)))
        torch.testing.assert_close(seen.conditions[row].float(), expected, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(seen.patches[row].float(), tokens.patches[0], atol=1e-2, rtol=1e-3)


def test_a_denoiser_changes_what_the_prior_is_told(images, backbone):
    paths = sorted(images.iterdir())[:2]
    wanted = Wanted("patch", False, 8)
    raw = read_tokens(paths, backbone, wanted, None, ignore).conditions
    halved = read_tokens(paths, backbone, wanted, Scaled(0.5), ignore).conditions
    torch.testing.assert_close(halved.float(), raw.float() / 2, atol=1e-3, rtol=1e-2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=8, max_size=30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_equal_files_are_on_one_side(names, share, seed):
    if len(set(names)) < 8:
        with pytest.raises(ConfigError, match="at least 8"):
            split(names, share, seed)
        return
    chosen, held = split(names, share, seed)
    assert sorted(chosen + held) == list(range(len(names)))
    assert not {names[i] for i in chosen} & {names[i] for i in held}
    assert len({names[i] for i in held}) >= 2 and len({names[i] for i in chosen}) >= 2
    assert split(names, share, seed) == (chosen, held)


# --- sampling and evaluation


def test_sampling_needs_the_folder_alone_and_repeats_itself(images, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "mine")
    train_tiny(mine, backbone, tmp_path / "run")
    shutil.rmtree(mine)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    reports = [
        sample_prior(
            moved, tmp_path / f"{name}.png", images=2, samples=3, sampling=Sampling(steps=3, seed=seed), device="cpu"
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert reports[0] == {"out": str(tmp_path / "a.png"), "images": 2, "samples": 3, "calls": 5}
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again and first != other
    assert sample_prior(moved, sampling=Sampling(steps=2), device="cpu")["out"] == str(moved / "samples.png")


def test_the_held_out_images_lie_beside_their_samples(images, backbone, tmp_path):
    """The first column of the picture holds the held-out images themselves."""
    train_tiny(images, backbone, tmp_path / "run")
    sample_prior(tmp_path / "run", tmp_path / "a.png", images=3, samples=1, sampling=Sampling(steps=2), device="cpu")
    run, picture = open_run(tmp_path / "run", "cpu"), load_image(tmp_path / "a.png")
    assert len(run.names) == 3 and all(name.endswith(".png") for name in run.names)
    top = 0.25 / (picture.shape[1] / 110)  # of the picture's height, where the titles are
    for row, colour in enumerate(run.held["pictures"].float().mean((2, 3))):
        height = int((top + (row + 0.5) / 3 * (1 - top)) * picture.shape[1])
        middle = picture[:, height - 9 : height + 9, picture.shape[2] // 4 - 9 : picture.shape[2] // 4 + 9].mean((1, 2))
        assert (middle - colour).abs().max() < 0.06


def test_runs_of_other_images_are_not_compared(images, backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "a")
    train_tiny(images, backbone, tmp_path / "b", denoiser=Scaled(9.0))
    train_tiny(sorted(images.iterdir())[:10], backbone, tmp_path / "c")
    how = {"samples": 3, "sampling": Sampling(steps=2), "device": "cpu"}
    found = evaluate_priors([tmp_path / "a", tmp_path / "b"], **how)["runs"]
    assert len(found) == 2
    with pytest.raises(ConfigError, match="different images"):
        evaluate_priors([tmp_path / "a", tmp_path / "c"], **how)
    shutil.rmtree(tmp_path / "a" / "tokens")
    with pytest.raises(ConfigError, match="keeps no tokens; give a folder"):  # as the runs of a comparison
        evaluate_priors([tmp_path / "a"], **how)
    (tmp_path / "a" / "tokens").mkdir()
    with pytest.raises(ConfigError, match="keeps no readable tokens"):
        evaluate_priors([tmp_path / "a"], **how)


def test_a_run_that_is_missing_or_damaged_is_named(images, backbone, tmp_path):
    with pytest.raises(WeightsError, match="holds no prior; give a folder"):
        sample_prior(tmp_path / "none", device="cpu")
    train_tiny(images, backbone, tmp_path / "run")
    (tmp_path / "run" / "held_out.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError, match=r"held_out\.safetensors"):
        sample_prior(tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="at least 1"):
        sample_prior(tmp_path / "run", images=0, device="cpu")


@pytest.mark.parametrize("name", ["maps", "pictures", "conditions"])
@pytest.mark.parametrize("change", [lambda v: v[:, :1], lambda v: v[:0], lambda v: v * float("nan"), lambda v: v[0, 0]])
def test_held_out_images_that_do_not_fit_are_refused(images, backbone, tmp_path_factory, name, change):
    folder = tmp_path_factory.getbasetemp() / "held-out-run"
    if not folder.exists():
        train_tiny(images, backbone, folder)
    path = folder / "held_out.safetensors"
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata)
    try:
        with pytest.raises(WeightsError, match=r"held_out\.safetensors"):
            open_run(folder, "cpu")
    finally:
        path.write_bytes(content)


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "words"}, "no condition 'words'.*cls, mean, patch, both"),
        ({"target": "sound"}, "no target 'sound'"),
        ({"target": "latents"}, "VAE"),
        ({"held_out": 0.0}, "held_out"),
        ({"side": 10}, "multiple of the patch"),
        ({"steps": 0}, "steps"),
        ({"heads": 3}, "heads"),
        ({"order": "spiral"}, "order"),
        ({"codes": 8}, "codes"),
        ({"pseudo": "fixed"}, "pseudo"),
        ({"pairs": 0.0}, "pairs"),
        ({"condition": "cls", "centred": True}, "centred=True needs"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_training(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": 1e6}, "guidance"),
        ({"temperature": 0.0}, "temperature"),
        ({"sampler": "euler"}, "heun, ddim, restart"),
        ({"ar_steps": 0}, "ar_steps"),
    ],
)
def test_ways_of_sampling_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_the_steps_of_unmasking_reach_a_token_head(images, backbone, tmp_path):
    """The calls of the small network: noise levels times unmasking steps."""
    train_tiny(images, backbone, tmp_path, head="token", condition=None)
    calls = [
        sample_prior(tmp_path, images=1, samples=1, sampling=Sampling(steps=1, ar_steps=n), device="cpu")["calls"]
        for n in (1, 2, 4)
    ]
    assert calls == [1, 2, 4]


def test_too_few_images_are_refused(backbone, tmp_path):
    with pytest.raises(ConfigError, match=r"at least 8 different images.*got 7"):
        train_tiny(write(tmp_path / "few", 7), backbone, tmp_path / "run")
    with pytest.raises(ImageError, match="no images"):
        (tmp_path / "empty").mkdir()
        train_tiny(tmp_path / "empty", backbone, tmp_path / "run")


def test_a_backbone_without_a_class_token_has_no_cls_condition(images, tmp_path):
    net = torch.nn.Conv2d(3, 8, 16, 16)
    plain = wrap(net, lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="plain", image_size=32)
    with pytest.raises(ConfigError, match="no class token"):
        train_tiny(images, plain, tmp_path, condition="cls")
    with pytest.raises(ConfigError, match="no condition 'words'"):
        read_conditions(Tokens.of(torch.zeros(1, 2, 2, 8)), "words")


def test_tokens_and_losses_that_are_not_finite_stop_the_run(images, backbone, tmp_path):
    with pytest.raises(NonFiniteError, match="NaN"):
        train_tiny(images, backbone, tmp_path / "a", denoiser=lambda t: t.with_patches(t.patches * torch.nan))
    changes = {"learning_rate": 1e30, "clip": 0, "warmup": 0.0, "steps": 12, "checkpoint_every": 1, "validate_every": 0}
    with pytest.raises(NonFiniteError, match=r"step .*step-0000000"):
        train_tiny(images, backbone, tmp_path / "b", **changes)


# --- comparison


def comparison(**changes):
    loop = replace(Comparison().prior.loop, steps=4, batch_size=4, validate_every=2, log_every=2)
    return Comparison(seeds=2, prior=replace(tiny_training(), loop=loop, **changes))


def test_kinds_of_tokens_are_compared_on_one_split_and_budget(images, backbone, tmp_path):
    paths, config = sorted(images.iterdir()), comparison()
    seen = look(
        paths, backbone, config, {"doubled": lambda image: 2 * backbone(image[None]).patches[0]}, denoiser=Scaled(3.0)
    )
    raw = seen.tokens["raw"].float()
    torch.testing.assert_close(seen.tokens["doubled"].float(), 2 * raw, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(seen.tokens["denoiser"].float(), 3 * raw, atol=1e-2, rtol=1e-2)
    mean = raw[seen.chosen].mean(0)
    torch.testing.assert_close(seen.tokens["raw - mean map"].float(), raw - mean, atol=1e-2, rtol=1e-2)
    assert all((row - mean).abs().max() < 0.01 for row in seen.tokens["position only"].float())
    # Each image is given the tokens of another one of its own side.
    for side in (seen.chosen, seen.held):
        rows = {tuple(row.flatten().tolist()) for row in seen.tokens["raw"][side]}
        assert all(tuple(row.flatten().tolist()) in rows for row in seen.tokens["shuffled"][side])
    assert not any(torch.equal(a, b) for a, b in zip(seen.tokens["shuffled"], seen.tokens["raw"], strict=True))
    report = compare_priors(seen, tmp_path, config)
    assert report["kinds"].keys() == seen.tokens.keys()
    assert report == json.loads((tmp_path / "compare.json").read_text())
    loss = report["kinds"]["raw"]["held_out_loss"]
    assert loss["steps"] == [2, 4] and len(loss["curve"]) == 2
    assert loss["last_over_raw"] == {"mean": 0.0, "half": 0.0}
    assert is_picture(tmp_path / "samples.png") and "raw - mean map" in (tmp_path / "page.html").read_text()
    # A finished comparison is not trained again, and gives the same numbers; other tokens are refused.
    assert compare_priors(seen, tmp_path, config)["kinds"] == report["kinds"]
    with pytest.raises(ConfigError, match="tokens"):
        other = look(paths, backbone, config, {"doubled": lambda image: backbone(image[None]).patches[0]})
        compare_priors(replace(other, tokens={**seen.tokens, "doubled": other.tokens["doubled"]}), tmp_path, config)


def test_a_comparison_keeps_its_tokens_and_selects_among_them(images, backbone, tmp_path):
    paths, config, asked = sorted(images.iterdir()), comparison(), []

    def doubled(image):
        asked.append(image)
        return 2 * backbone(image[None]).patches[0]

    keep = (tmp_path / "tokens.safetensors", {"views": 3})
    first = look(paths, backbone, config, {"doubled": doubled}, keep=keep)
    count = len(asked)
    some = replace(config, kinds=("raw", "doubled"))
    again = look(paths, backbone, some, {"doubled": doubled}, keep=keep)
    assert len(asked) == count and list(again.tokens) == ["raw", "doubled"]
    assert torch.equal(again.tokens["doubled"], first.tokens["doubled"])
    assert torch.equal(again.pictures, first.pictures) and (again.held, again.grid) == (first.held, first.grid)
    with pytest.raises(ConfigError, match="other images or settings"):
        look(paths, backbone, config, {"doubled": doubled}, keep=(keep[0], {"views": 4}))
    with pytest.raises(ConfigError, match="other images or settings"):
        look(paths[1:], backbone, config, {"doubled": doubled}, keep=keep)


def test_comparisons_out_of_range_are_refused(images, backbone):
    with pytest.raises(ConfigError, match="not among"):
        Comparison(kinds=("shuffled",))
    with pytest.raises(ConfigError, match="2 seeds"):
        Comparison(seeds=1)
    with pytest.raises(ConfigError, match="no tokens of kind 'clean'; choose from raw"):
        look(sorted(images.iterdir()), backbone, replace(comparison(), kinds=("raw", "clean")))


# --- loops on a trained prior


def test_a_trained_prior_is_looped_with_and_without_a_correction(backbone, tmp_path):
    images = write(tmp_path / "colours", 60)
    train_tiny(images, backbone, tmp_path / "run", condition=None, held_out=0.4)
    before = (tmp_path / "run" / "prior.safetensors").read_bytes()
    for corrector in ("none", "centres"):
        config = Loop(rounds=2, corrector=corrector, round_steps=2, seeds=2, clusters=4, mix=0.7)
        report = loop_prior(tmp_path / "run", tmp_path / corrector, config, Sampling(steps=2), "cpu")
        assert report == json.loads((tmp_path / corrector / "loop.json").read_text())
        for found in report["distances"].values():
            assert len(found["rounds"]) == 3 and all(each["half"] >= 0 for each in found["rounds"])
            # Samples of a hardly trained prior are further from the held-out images than the real ones.
            assert found["rounds"][0]["mean"] > found["real"]
    assert (tmp_path / "run" / "prior.safetensors").read_bytes() == before


def test_loops_that_cannot_be_run_are_refused(images, backbone, tmp_path):
    train_tiny(images, backbone, tmp_path / "told")
    with pytest.raises(ConfigError, match="without a condition"):
        loop_prior(tmp_path / "told", tmp_path / "out", device="cpu")
    train_tiny(images, backbone, tmp_path / "few", condition=None)
    with pytest.raises(ConfigError, match="20 held-out images, this run has 3"):
        loop_prior(tmp_path / "few", tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="mix"):
        Loop(mix=0.0)
    assert not (tmp_path / "out").exists()
