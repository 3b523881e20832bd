"""Discrete priors from image to text and back: their gradients, what they learn, and the job."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dvt.analysis.priors.itit_run import CyclePair, one_hot, run_itit, translator
from dvt.analysis.priors.job_config import Itit
from dvt.analysis.priors.loops import cycle_loss
from dvt.errors import ConfigError
from dvt.training import TrainingConfig

LOOP = TrainingConfig(50, 8, 1e-2, 1e-2, warmup=0.0, checkpoint_every=50, validate_every=0)
TINY = Itit(side=8, patch=4, codes=4, length=3, pairs=0.2, seeds=2, width=16, depth=1, loop=LOOP)
COLOURS = {"red": (0.8, 0.2, 0.2), "blue": (0.2, 0.2, 0.8)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(seed=0):
    return CyclePair((2, 2), torch.randn(5, 3, generator=generator()), 4, replace(TINY, length=2), seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, draws, lines = tmp_path_factory.mktemp("colours"), generator(), []
    for number in range(64):
        name = ("red", "blue")[number % 2]
        pixels = torch.tensor(COLOURS[name]).expand(8, 8, 3) + 0.05 * torch.randn(8, 8, 3, generator=draws)
        path = folder / ("train" if number < 40 else "test") / name / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels.clamp(0, 1)).byte().numpy()).save(path)
        lines.append({"image": str(path.relative_to(folder)), "text": f"a {name} thing"})
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def files(data, split):
    return sorted((data / split).rglob("*.png"))


def test_the_cycle_of_discrete_priors_reaches_the_first_one():
    both = pair()
    with torch.no_grad():
        for value in both.parameters():  # gates that are open
            value.add_(0.1 * torch.randn(value.shape, generator=generator(1)))
    ids = torch.randint(5, (6, 4), generator=generator(2))
    first, second = translator(both.to_text), translator(both.to_image)
    assert first(one_hot(ids, 5)).shape == (6, 2, 4) and second(one_hot(ids[:, :2] % 4, 4)).shape == (6, 4, 5)
    cycle_loss(first, second, ids, 5, generator(3)).backward()
    reached = [value.grad is not None and bool(value.grad.any()) for value in both.to_text.head.trunk.parameters()]
    assert sum(reached) > len(reached) / 2
    both.zero_grad()
    cycle_loss(first, second, ids, 5, generator(3), through=False).backward()
    assert not any(value.grad is not None and bool(value.grad.any()) for value in both.to_text.parameters())


def test_without_a_weight_unpaired_tokens_change_nothing():
    ids, words = torch.randint(5, (3, 4), generator=generator(1)), torch.randint(4, (3, 2), generator=generator(2))
    others = torch.randint(5, (3, 4), generator=generator(3))
    found = [pair().losses((ids, words), images, words, 0.0, generator(4))["loss"] for images in (ids, others)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(pair().losses((ids, words), others, words, 1.0, generator(4))["loss"], found[0])


def test_two_colours_are_named_and_drawn(data, tmp_path):
    """With all pairs, both directions learn the two colours."""
    told = []
    report = run_itit(
        files(data, "train"), data / "texts.jsonl", tmp_path, TINY, files(data, "test"), lambda *a: told.append(a)
    )
    assert list(report["rows"]) == ["pairs alone", "with cycles", "all pairs"] and report["chance"] == 0.5
    assert report["images"] == {"training": 40, "pairs": 8, "test": 24} and report["real"] == 1
    assert report["rows"]["all pairs"]["image_to_text"]["mean"] > 0.9
    assert report["rows"]["all pairs"]["text_to_image"]["mean"] > 0.8
    assert report["rows"]["pairs alone"]["text_to_image_over_pairs"]["mean"] == 0
    assert json.loads((tmp_path / "itit.json").read_text())["rows"] == report["rows"]
    assert (tmp_path / "samples.png").exists() and told[-1] == ("runs", 6, 6)


def test_what_cannot_be_translated_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="20 images to score on, got 8"):
        run_itit(files(data, "train") + files(data, "test")[:0], _some(data, tmp_path, "train"), tmp_path / "a", TINY)
    (tmp_path / "green").mkdir()
    green = tmp_path / "green" / "1.png"
    green.write_bytes(files(data, "train")[0].read_bytes())
    (tmp_path / "texts.jsonl").write_text(json.dumps({"image": "green/1.png", "text": "a red thing"}))
    with pytest.raises(ConfigError, match="'green' has the text 'a red thing', which does not name it"):
        run_itit([green] * 1, tmp_path / "texts.jsonl", tmp_path / "b", TINY, [green])
    for changes, message in (({"pairs": 0.0}, "pairs"), ({"side": 9}, "multiple"), ({"codes": 1}, "codes")):
        with pytest.raises(ConfigError, match=message):
            replace(TINY, **changes)


def _some(data, folder, split):
    """The texts of one split, with absolute names."""
    lines = [json.loads(line) for line in (data / "texts.jsonl").read_text().splitlines()]
    kept = [{**line, "image": str(data / line["image"])} for line in lines if line["image"].startswith(split)]
    path = folder / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, kept)))
    return path
