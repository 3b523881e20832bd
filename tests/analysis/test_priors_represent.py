"""Encoders that learn from a prior's samples: their loss, their batches, and the job."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional

from dvt.analysis.priors.contrast import contrast, same
from dvt.analysis.priors.encoder import (
    ContrastiveLearner,
    PictureEncoder,
    augment,
    draw_groups,
    encode,
    sinkhorn,
    train_encoder,
)
from dvt.analysis.priors.job_config import EncoderConfig, Represent
from dvt.analysis.priors.represent import law_sizes, represent
from dvt.analysis.priors.runs import PriorTraining, Sampling, train_prior
from dvt.errors import ConfigError
from dvt.training import TrainingConfig

TINY = EncoderConfig(patch=4, width=16, depth=1, project=8, members=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def supervised_contrast(z, labels, tau):
    """Khosla et al., Supervised Contrastive Learning, 2020, equation 2, as written there."""
    z = functional.normalize(z, dim=-1)
    total = 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        normaliser = sum(torch.exp(z[i] @ z[a] / tau) for a in others)
        total = total - sum(torch.log(torch.exp(z[i] @ z[p] / tau) / normaliser) for p in positives) / len(positives)
    return total / len(z)


def test_with_labels_as_conditions_the_loss_is_supervised_contrast():
    z, labels = torch.randn(12, 6, generator=generator(), dtype=torch.float64), torch.arange(12) % 3
    expected = supervised_contrast(z, labels, 0.1)
    torch.testing.assert_close(contrast(z, positives=same(labels), temperature=0.1), expected)


def test_assignments_have_rows_of_one_and_even_columns():
    found = sinkhorn(3 * torch.randn(40, 5, generator=generator()), rounds=50)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    torch.testing.assert_close(found.sum(0), torch.full((5,), 8.0), atol=1e-3, rtol=0)


def test_a_batch_has_as_many_of_each_group_as_asked_for():
    ids = torch.tensor([0] * 5 + [1] * 2 + [2] * 7 + [3])
    rows = draw_groups(ids, 12, 3, generator())
    groups = ids[rows].view(4, 3)
    assert bool((groups == groups[:, :1]).all()) and sorted(groups[:, 0].tolist()) == [0, 1, 2, 3]
    # No sample twice where there are enough, and all of them where there are few.
    assert len({row for row in rows if ids[row] == 2}) == 3 and {row for row in rows if ids[row] == 1} == {5, 6}
    assert len(draw_groups(ids, 30, 3, generator(1))) == 30  # more groups than there are


def test_a_change_of_nothing_leaves_pictures_and_mirroring_mirrors_them():
    pictures = torch.rand(5, 3, 8, 8, generator=generator())
    still = EncoderConfig(crop=1.0, flip=0.0, colour=0.0)
    # The aspect ratio of a crop still varies, so that only its centre is the picture's.
    changed = augment(pictures, still, generator())
    assert changed.shape == pictures.shape and 0 <= float(changed.min()) <= float(changed.max()) <= 1
    mirrored = augment(pictures, replace(still, flip=1.0), generator())
    torch.testing.assert_close(mirrored, changed.flip(3))
    plain = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(augment(plain, still, generator()), plain, atol=1e-5)
    assert not torch.allclose(augment(plain, replace(still, colour=0.3), generator()), plain, atol=1e-2)


def test_hidden_patches_are_not_seen_and_the_teacher_follows():
    draws = generator()
    encoder = PictureEncoder(8, TINY, draws)
    with torch.no_grad():
        for value in encoder.parameters():  # gates that are open
            value.add_(0.2 * torch.randn(value.shape, generator=draws))
    pictures = torch.rand(4, 3, 8, 8, generator=draws)
    hidden = torch.tensor([[True, False, False, False]]).expand(4, 4)
    other = pictures.clone()
    other[:, :, :4, :4] = 0
    assert torch.equal(encoder.tokens(pictures, hidden), encoder.tokens(other, hidden))
    assert not torch.equal(encoder.tokens(pictures), encoder.tokens(other))
    learner = ContrastiveLearner(encoder, TINY, draws)
    before = [value.clone() for value in learner.teacher.parameters()]
    losses = learner.loss(pictures, torch.tensor([0, 0, 1, 1]), draws)
    losses["loss"].backward()
    assert all(value.grad is None for value in learner.teacher.parameters())
    assert float(losses["loss"]) == pytest.approx(float(losses["contrast"] + TINY.masked * losses["masked"]))
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(1.0)
    learner.loss(pictures, torch.tensor([0, 0, 1, 1]), draws)
    moved = [b - a for a, b in zip(before, learner.teacher.parameters(), strict=True)]
    assert any(float(change.abs().max()) > 0.009 for change in moved)


def stripes(count, seed=0):
    """Pictures of two kinds, horizontal and vertical stripes, of random colour, phase and noise."""
    draws = generator(seed)
    kinds = torch.arange(count) % 2
    wave = ((torch.arange(8) // 2) % 2).float()
    pictures = []
    for kind in kinds.tolist():
        bars = wave.roll(int(torch.randint(8, (1,), generator=draws)))
        plain = bars[:, None].expand(8, 8) if kind else bars[None].expand(8, 8)
        colour = 0.3 + 0.5 * torch.rand(3, 1, 1, generator=draws)
        pictures.append((colour * plain + 0.1 * torch.randn(3, 8, 8, generator=draws)).clamp(0, 1))
    return torch.stack(pictures), kinds


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_an_encoder_learns_what_makes_pictures_positives(masked, tmp_path):
    pictures, kinds = stripes(64)
    config = replace(TINY, masked=masked, members=4, flip=0.0, crop=0.8)
    loop = TrainingConfig(120, 16, 3e-3, checkpoint_every=120, validate_every=0)
    encoder = train_encoder(pictures, kinds, config, loop, tmp_path)
    new, truth = stripes(40, seed=1)
    known, asked = (functional.normalize(encode(encoder, each), dim=-1) for each in (pictures, new))
    found = kinds[(asked @ known.T).argmax(1)]
    assert float((found == truth).double().mean()) > 0.9


# --- the job


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_tiny_backbone):
    """A prior of striped pictures with labels as its condition, hardly trained."""
    folder = tmp_path_factory.mktemp("represent")
    for name, count, seed in (("train", 60, 0), ("test", 24, 1)):
        pictures, kinds = stripes(count, seed)
        for number, (picture, kind) in enumerate(zip(pictures, kinds.tolist(), strict=True)):
            path = folder / name / ("across", "down")[kind] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * picture).round().byte().permute(1, 2, 0).numpy()).save(path)
    loop = replace(PriorTraining().loop, steps=4, batch_size=8, checkpoint_every=4)
    for condition in ("label", "patch", None):
        config = PriorTraining(condition, side=8, patch=4, width=16, depth=1, heads=2, loop=loop)
        train_prior(folder / "train", make_tiny_backbone(size=32), folder / str(condition), config, device="cpu")
    return folder


LOOP = TrainingConfig(3, 8, 1e-3, checkpoint_every=3, validate_every=0)
SMALL = Represent(samples=2, seeds=2, sizes=(4, 8, 12, 16, 20), neighbours=5, encoder=TINY, loop=LOOP)


@pytest.mark.parametrize("condition", ["label", "patch"])
def test_encoders_of_samples_are_probed_beside_those_of_real_images(run, condition, tmp_path):
    test = sorted((run / "test").rglob("*.png"))
    told, groups = [], 2 if condition == "label" else 54
    report = represent(
        run / condition, tmp_path, SMALL, test, Sampling(steps=2), "cpu", lambda *about: told.append(about)
    )
    assert json.loads((tmp_path / "represent.json").read_text()) == json.loads(json.dumps(report))
    assert list(report["rows"]) == ["by condition", "masked", "by image", "real by image", "real by class", "untrained"]
    assert report["pictures"] == {"synthetic": 108, "conditions": groups, "real": 54, "test": 24}
    assert report["chance"] == 0.5 and all(0 <= row["linear"]["mean"] <= 1 for row in report["rows"].values())
    assert report["rows"]["real by image"]["over_real"]["mean"] == 0
    assert report["curves"]["real"]["sizes"] == [4, 8, 12, 16, 20] and (tmp_path / "curves.png").exists()
    again = represent(run / condition, tmp_path, SMALL, test, Sampling(steps=2), "cpu")
    assert again["rows"] == report["rows"]
    with pytest.raises(ConfigError, match="other samples"):
        represent(run / condition, tmp_path, replace(SMALL, samples=3), test, Sampling(steps=2), "cpu")


def test_what_cannot_be_represented_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="no condition"):
        represent(run / "None", tmp_path, SMALL, device="cpu")
    with pytest.raises(ConfigError, match="20 test images, got 6"):
        represent(run / "label", tmp_path, SMALL, device="cpu")
    stranger = tmp_path / "other" / "a.png"
    stranger.parent.mkdir()
    stranger.write_bytes(next((run / "test").rglob("*.png")).read_bytes())
    with pytest.raises(ConfigError, match="test image of class 'other'; the prior learnt from across, down"):
        represent(run / "label", tmp_path, SMALL, [stranger], device="cpu")
    with pytest.raises(ConfigError, match=r"2 \.\.\. 30"):
        law_sizes(Represent(sizes=(2, 4, 8, 16, 32)), 50, 30)
    with pytest.raises(ConfigError, match="5 different sizes"):
        Represent(sizes=(2, 4, 8))
    with pytest.raises(ConfigError, match="multiple of the 4 members"):
        Represent(loop=LOOP, encoder=EncoderConfig(members=4), seeds=2).loop and Represent(
            loop=replace(LOOP, batch_size=6)
        )
    with pytest.raises(ConfigError, match="patches of 4"):
        PictureEncoder(6, TINY, generator())
