"""Words, a small image-text tower, and priors that take texts (LaCLIP, LAFITE)."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.analysis.priors.conditions import conditions_of_texts
from dvt.analysis.priors.contrast import contrast
from dvt.analysis.priors.job_config import EncoderConfig, TowerTraining
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.runs import PriorTraining, Sampling, train_prior, write_samples
from dvt.analysis.priors.texts import Vocabulary, texts_of
from dvt.analysis.priors.tower import Tower, TowerCard, class_vectors, load_tower
from dvt.analysis.priors.tower_run import clip_loss, train_tower
from dvt.errors import ConfigError, WeightsError
from dvt.training import TrainingConfig

ENCODER = EncoderConfig(patch=4, width=16, depth=1, project=8, flip=0.0, colour=0.0, crop=1.0)
LOOP = TrainingConfig(120, 16, 5e-3, checkpoint_every=120, validate_every=0, ema=0.9)
COLOURS = {"red": (0.8, 0.2, 0.2), "blue": (0.2, 0.2, 0.8)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def write(folder, count):
    """Pictures of two colours, in folders named after them, and their texts with rewrites."""
    draws, lines = generator(), []
    for number in range(count):
        name = ("red", "blue")[number % 2]
        pixels = torch.tensor(COLOURS[name]).expand(8, 8, 3) + 0.08 * torch.randn(8, 8, 3, generator=draws)
        path = folder / name / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels.clamp(0, 1)).byte().numpy()).save(path)
        lines.append({"image": f"{name}/{path.name}", "text": f"a {name} thing", "rewrites": [f"one {name} object"]})
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("colours"), 40)


def settings(**changes):
    return TowerTraining(
        **{"side": 8, "length": 4, "prompts": ("a {} thing",), "encoder": ENCODER, "loop": LOOP, **changes}
    )


@pytest.fixture(scope="module")
def tower(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("tower") / "tower.safetensors"
    report = train_tower(sorted(data.rglob("*.png")), data / "texts.jsonl", path, settings())
    assert report["zero_shot"] == 1 and report["retrieval"] == 1 and report["words"] == 6
    return path


def test_texts_are_found_by_names_relative_to_their_file(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    assert texts_of(
        data / "texts.jsonl",
        [f"{data.name}/red/{n:03}.png" for n in range(0, 40, 2)]
        + [data / "blue" / f"{n:03}.png" for n in range(1, 40, 2)],
    )[0] == ("a red thing", "one red object")


def test_words_that_are_not_known_are_one_word():
    words = Vocabulary.of(["a red thing"], 3)
    ids = words.encode(["a green thing", "A PINK thing!", "red"])
    assert torch.equal(ids[0], ids[1]) and ids[2].tolist() == [words.words.index("red") + 2, 0, 0]
    assert words.decode(ids) == ["a ? thing", "a ? thing", "red"]


def test_a_tower_comes_back_and_is_blind_to_what_fills_texts_up(tower, tmp_path):
    found = Tower.load(tower)
    pictures, texts = torch.rand(3, 3, 16, 16, generator=generator()), ["a red thing", "blue"]
    found.save(tmp_path / "copy.safetensors")
    again = load_tower(tmp_path / "copy.safetensors")
    assert torch.equal(again.pictures(pictures), found.pictures(pictures)) and again.identity == found.identity
    torch.testing.assert_close(found.texts(texts).norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found.texts(texts)[1:], found.texts(["blue"]))
    mixed = class_vectors(found, ["red"], ["a {} thing", "one {} object"])
    both = found.texts(["a red thing", "one red object"]).mean(0, keepdim=True)
    torch.testing.assert_close(mixed, both / both.norm())


def test_the_loss_of_different_texts_is_clips():
    card = TowerCard(8, ("a", "b", "c"), 2, ENCODER)
    tower = Tower(card, generator())
    pictures = torch.rand(3, 3, 8, 8, generator=generator(1))
    images, texts = tower.pictures(pictures), tower.texts(["a", "b", "c"])
    plain = contrast(images, texts, temperature=0.07142857, symmetric=True)
    torch.testing.assert_close(clip_loss(tower, pictures, ["a", "b", "c"]), plain)
    assert not torch.allclose(clip_loss(tower, pictures, ["a", "a", "c"]), plain)


def test_rewrites_bring_words_that_the_originals_lack(data, tower, tmp_path):
    plain = tmp_path / "plain.safetensors"
    short = replace(LOOP, steps=2, checkpoint_every=2)
    report = train_tower(sorted(data.rglob("*.png")), data / "texts.jsonl", plain, settings(rewrites=False, loop=short))
    assert report["words"] == 4 and set(Tower.load(tower).card.words) - set(Tower.load(plain).card.words) == {
        "one",
        "object",
    }
    with pytest.raises(ConfigError, match="rewrites"):
        train_tower(sorted(data.rglob("*.png")), data / "texts.jsonl", plain, settings(loop=short))


# --- priors


@pytest.mark.parametrize("noise", ["fixed", "trained"])
def test_a_prior_that_saw_no_text_is_sampled_with_one(data, tower, noise, tmp_path):
    """LAFITE: trained on image features with noise, asked for a text's colour."""
    loop = replace(PriorTraining().loop, steps=150, batch_size=16, learning_rate=5e-3, checkpoint_every=150, ema=0.9)
    config = PriorTraining(
        "pseudo-text", tower=str(tower), pseudo=noise, side=8, patch=4, width=32, depth=1, heads=2, loop=loop
    )
    report = train_prior(data, None, tmp_path / "run", config, device="cpu")
    card = Prior.load(report["out"]).card
    assert card["tower"] == Tower.load(tower).identity and card["backbone"] is None
    given = conditions_of_texts(tmp_path / "run", card, ["a red thing", "a blue thing"])
    made = write_samples(tmp_path / "run", tmp_path / "made", given, 12, Sampling(steps=8, guidance=3), "cpu")
    shown = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in made["files"]]))
    colours = shown.double().mean((1, 2))
    redder = (colours[:, 0] > colours[:, 2]).view(2, 12).double().mean(1)
    assert float(redder[0] - redder[1]) > 0.5
    other = replace(config, loop=replace(loop, seed=1))
    with pytest.raises(ConfigError, match="seed"):
        train_prior(data, None, tmp_path / "run", other, device="cpu")


def test_a_prior_takes_the_texts_of_its_images(data, tower, tmp_path):
    loop = replace(PriorTraining().loop, steps=2, batch_size=8, checkpoint_every=2)
    config = PriorTraining(
        "text", tower=str(tower), texts=str(data / "texts.jsonl"), side=8, patch=4, width=16, depth=1, loop=loop
    )
    train_prior(data, None, tmp_path / "run", config, device="cpu")
    prior = Prior.load(tmp_path / "run" / "prior.safetensors")
    assert prior.config.condition_dim == 8 and prior.config.pseudo is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "text"}, "need a tower"),
        ({"condition": "label", "tower": "x"}, "need a tower"),
        ({"condition": "text", "tower": "x"}, "needs a file of texts"),
        ({"condition": "pseudo-text", "tower": "x", "texts": "y"}, "needs a file of texts"),
        ({"condition": "mean", "pseudo": "fixed"}, "noise of the condition 'pseudo-text'"),
        ({"condition": "pseudo-text", "tower": "x", "pseudo": "some"}, "fixed, trained or none"),
    ],
)
def test_texts_without_a_tower_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PriorTraining(**changes)


def test_what_is_no_tower_is_refused(data, tower, tmp_path):
    config = PriorTraining("pseudo-text", tower=str(tmp_path / "none.safetensors"), side=8)
    with pytest.raises(WeightsError, match="none"):
        train_prior(data, None, tmp_path / "run", config, device="cpu")
    prior = Prior(PriorTraining(side=8).prior((2, 2), 3, None, None), generator())
    prior.save(tmp_path / "prior.safetensors")
    with pytest.raises(WeightsError, match="no tower"):
        Tower.load(tmp_path / "prior.safetensors")
    with pytest.raises(ConfigError, match="not on texts"):
        conditions_of_texts(tmp_path, {"condition": "label"}, ["a"])
    with pytest.raises(ConfigError, match=r"\.safetensors file"):
        train_tower(sorted(data.rglob("*.png")), data / "texts.jsonl", tmp_path / "tower", settings())
    with pytest.raises(ConfigError, match="in place of the class"):
        TowerTraining(prompts=("a cat",))
