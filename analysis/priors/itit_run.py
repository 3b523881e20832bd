"""Train image-to-text and text-to-image priors of discrete tokens with few pairs, with and without cycles (ITIT)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt.analysis.priors.codebook import Codebook
from dvt.analysis.priors.compare import interval
from dvt.analysis.priors.config import PriorConfig, Sampling
from dvt.analysis.priors.job_config import Itit
from dvt.analysis.priors.loops import TokenModel, itit_losses
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.reading import Wanted, read_tokens
from dvt.analysis.priors.sampling import draw_maps
from dvt.analysis.priors.targets import PriorTarget
from dvt.analysis.priors.texts import Vocabulary, split_words, texts_of
from dvt.analysis.priors.token_set import split
from dvt.analysis.probes.classification import KnnClassification
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.progress import Progress, silent
from dvt.training import epoch_indices, train

_FEWEST = 20  # images to score on
_NEIGHBOURS = 5  # of the classifier that judges generated images


@dataclass(frozen=True)
class CaptionedImages:
    """Hold images and their texts as discrete tokens.

    Args:
        pictures: (N, 3, S, S) in [0, 1].
        maps: (N, h, w, D) standardised image tokens.
        ids: (N, L) entries of the codebook.
        words: (N, M) numbers of the texts' words.
        classes: the name of each image's folder.
    """

    pictures: Tensor
    maps: Tensor
    ids: Tensor
    words: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.pictures)


class CyclePair(nn.Module):
    """Join the two directions: discrete priors, each conditioned on the one-hot tokens of the other kind.

    Args:
        grid: (h, w) image tokens.
        centres: (K, D) the codebook.
        vocabulary: V, the number of words.
        length: M, the words of a text.
        config: architecture.
        seed: seed of the initial weights.
    """

    def __init__(self, grid: tuple[int, int], centres: Tensor, vocabulary: int, config: Itit, seed: int) -> None:
        super().__init__()
        codes, text = len(centres), (1, config.length)
        common: dict[str, Any] = {"head": "token", "width": config.width, "depth": config.depth, "drop": 0.0}
        to_image = PriorConfig(grid, centres.shape[1], vocabulary, text, codes=codes, **common)
        to_text = PriorConfig(text, vocabulary, codes, grid, codes=vocabulary, **common)
        self.to_image = Prior(to_image, torch.Generator().manual_seed(2 * seed))
        self.to_text = Prior(to_text, torch.Generator().manual_seed(2 * seed + 1))
        self.to_image.head.centres.copy_(centres)
        self.to_text.head.centres.copy_(torch.eye(vocabulary))

    def losses(
        self, pairs: tuple[Tensor, Tensor], images: Tensor, words: Tensor, weight: float, draws: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of pairs of ids, and with a weight above 0 those of the cycles of unpaired ids.

        Beside the losses of both directions from the whole other side, pairs are learnt with some tokens known, as
        sampling needs it.
        """
        codes, vocabulary = self.to_image.config.codes, self.to_text.config.codes
        models = (translator(self.to_text), translator(self.to_image))
        if not weight:
            images, words = images[:1], words[:1]
        losses = itit_losses(*models, pairs, images, words, (codes, vocabulary), draws, weight)
        picture, text = (one_hot(ids, size) for ids, size in zip(pairs, (codes, vocabulary), strict=True))
        maps = self.to_image.head.centres[pairs[0]].view(len(picture), *self.to_image.head.shape)
        known = self.to_image.loss(maps, text, draws) + self.to_text.loss(text[:, None], picture, draws)
        return {**losses, "loss": losses["loss"] + known, "known": known}


def one_hot(ids: Tensor, size: int) -> Tensor:
    """Turn ids (..., L) into one-hot tokens (..., L, size)."""
    return functional.one_hot(ids, size).float()


def translator(prior: Prior) -> TokenModel:
    """Adapt a discrete prior: from one-hot tokens (B, M, V) of its condition to logits (B, L, K) of all its tokens."""
    head = prior.head
    length = head.shape[0] * head.shape[1]

    def model(tokens: Tensor) -> Tensor:
        empty = tokens.new_zeros(len(tokens), length, head.shape[2])
        hidden = torch.ones(len(tokens), length, dtype=torch.bool, device=tokens.device)
        return head.logits(head.z(empty, hidden, prior.context(tokens)))

    return model


def run_itit(
    images: Sequence[Path],
    texts: str | Path,
    out: str | Path,
    config: Itit | None = None,
    test: Sequence[Path] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train both directions on few pairs alone, with cycles over unpaired images and texts, and on all pairs.

    Args:
        images: files of the images, in folders named after a word of their texts, the class.
        texts: a file of JSON lines, as :func:`dvt.analysis.priors.texts.texts_of` reads it, for `images` and `test`.
        out: a folder for the runs, itit.json and samples.png.
        config: settings.
        test: images to score on; none holds some of `images` out.
        progress: called with ("look", ...) and ("runs", runs done, runs).

    Returns:
        A report ready for JSON: for each row "image_to_text", the share of images whose text, drawn in one step, names
        their class, and "text_to_image", the share of sampled images that a classifier of real pixels (nearest
        neighbours) takes for the class of their text, with intervals over seeds and paired differences to pairs alone.

    Raises:
        ConfigError: images and texts do not go together, a class is no word of a text, or there are too few images.
    """
    config, out = config or Itit(), Path(out)
    learnt, asked, vocabulary, target, centres = _read(images, texts, test, config, progress)
    count = max(2, round(config.pairs * len(learnt)))
    rows = {"pairs alone": (count, 0.0), "with cycles": (count, config.weight), "all pairs": (len(learnt), 0.0)}
    scores: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, Tensor] = {}
    for number, (name, (known, weight)) in enumerate(rows.items(), 1):
        scores[name] = {"image_to_text": [], "text_to_image": []}
        for seed in range(config.loop.seed, config.loop.seed + config.seeds):
            pair = _trained(learnt, centres, len(vocabulary), known, weight, seed, config, out / "runs")
            found, pictures = _scores(pair, learnt, asked, vocabulary, target, seed)
            for measure, value in found.items():
                scores[name][measure].append(value)
            shown.setdefault(name, pictures)
        progress("runs", number * config.seeds, len(rows) * config.seeds)
    report = _report(scores, config, learnt, asked, count)
    _save(report, asked, shown, out)
    return report


def _read(
    images: Sequence[Path], texts: str | Path, test: Sequence[Path], config: Itit, progress: Progress
) -> tuple[CaptionedImages, CaptionedImages, Vocabulary, PriorTarget, Tensor]:
    """Read images and texts, and make both into discrete tokens; the codebook and the words are the training's."""
    seen = read_tokens([*images, *test], None, Wanted(None, False, config.side), None, progress)
    given = [each[0] for each in texts_of(texts, [Path(name) for name in seen.names])]
    apart = {str(path) for path in test}
    if test:
        chosen = [row for row, name in enumerate(seen.names) if name not in apart]
        held = [row for row, name in enumerate(seen.names) if name in apart]
    else:
        chosen, held = split(seen.sha256s, config.held_out, config.loop.seed)
    classes = [Path(name).parent.name for name in seen.names]
    for name, text in zip(classes, given, strict=True):
        if name.lower() not in split_words(text):
            raise ConfigError(f"an image of the class {name!r} has the text {text!r}, which does not name it")
    if len(held) < _FEWEST:
        raise ConfigError(f"an accuracy needs {_FEWEST} images to score on, got {len(held)}; give more")
    vocabulary = Vocabulary.of([given[row] for row in chosen], config.length)
    target = PriorTarget("pixels", config.patch)
    pictures = seen.pictures[list(range(len(seen)))].float()
    raw = target.encode(pictures, pictures)
    target = target.fitted(raw[chosen])
    maps, words = target.standardise(raw), vocabulary.encode(given)
    codebook = Codebook.fit(maps[chosen].flatten(0, 2), config.codes, config.loop.seed)
    ids = codebook.encode(maps).flatten(1)
    sides = (
        CaptionedImages(pictures[rows], maps[rows], ids[rows], words[rows], [classes[row] for row in rows])
        for rows in (chosen, held)
    )
    return (*sides, vocabulary, target, codebook.centres)  # type: ignore[return-value]


def _trained(
    learnt: CaptionedImages,
    centres: Tensor,
    vocabulary: int,
    known: int,
    weight: float,
    seed: int,
    config: Itit,
    folder: Path,
) -> CyclePair:
    """Train one pair of priors; its first `known` images, in an order of the seed, have a text."""
    pair = CyclePair((learnt.maps.shape[1], learnt.maps.shape[2]), centres, vocabulary, config, seed)
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(seed))
    paired = order[:known]
    size, count = config.loop.batch_size, len(learnt)

    def batches(step: int, rank: int, world: int) -> dict[str, Tensor]:
        both = paired[epoch_indices(step, size, known, seed)]
        images, words = (epoch_indices(step, size, count, seed + shift) for shift in (1000, 2000))
        number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
        batch = {"images": learnt.ids[both], "words": learnt.words[both], "seed": torch.tensor(number)}
        return {**batch, "other_images": learnt.ids[images], "other_words": learnt.words[words]}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(int(batch["seed"]))
        pairs = (batch["images"], batch["words"])
        return pair.losses(pairs, batch["other_images"], batch["other_words"], weight, draws)

    loop = replace(config.loop, seed=seed, checkpoint_every=config.loop.steps)
    settings = {"known": known, "weight": weight, "itit": {k: v for k, v in asdict(config).items() if k != "loop"}}
    train(pair, loss, batches, loop, folder / f"{known}-{weight:g}-{seed}", settings=settings)
    return pair.eval()


@torch.no_grad()
def _scores(
    pair: CyclePair,
    learnt: CaptionedImages,
    asked: CaptionedImages,
    vocabulary: Vocabulary,
    target: PriorTarget,
    seed: int,
) -> tuple[dict[str, float], Tensor]:
    """Score both directions on images that were not learnt from; also return the sampled pictures."""
    codes, size = pair.to_image.config.codes, len(vocabulary)
    sampling = Sampling(ar_steps=8, seed=seed)
    # All words at once: with so few of them training hides nearly always all, and has not seen some known.
    once = replace(sampling, ar_steps=1, temperature=0.1)
    texts, _ = draw_maps(once, pair.to_text, one_hot(asked.ids, codes), len(asked))
    said = vocabulary.decode(texts[:, 0].argmax(-1))
    right = sum(name.lower() in text.split() for name, text in zip(asked.classes, said, strict=True))
    maps, _ = draw_maps(sampling, pair.to_image, one_hot(asked.words, size), len(asked))
    pictures = target.decode(maps)
    judged = _judge(learnt, pictures)
    alike = sum(a == b for a, b in zip(judged, asked.classes, strict=True))
    return {"image_to_text": right / len(asked), "text_to_image": alike / len(asked)}, pictures


def _judge(learnt: CaptionedImages, pictures: Tensor) -> list[str]:
    """Find the class of pictures by the nearest real ones, in pixels."""
    names = sorted(set(learnt.classes))
    probe = KnnClassification(len(names), _NEIGHBOURS)
    known = learnt.pictures.flatten(1)[:, None, None]
    probe.fit(known, [torch.tensor(names.index(name)) for name in learnt.classes])
    return [names[int(number)] for number in probe.predict(pictures.flatten(1)[:, None, None])]


def _report(
    scores: dict[str, dict[str, list[float]]],
    config: Itit,
    learnt: CaptionedImages,
    asked: CaptionedImages,
    known: int,
) -> dict[str, Any]:
    alone = scores["pairs alone"]
    rows = {
        name: {
            **{measure: interval(values) for measure, values in found.items()},
            **{
                f"{measure}_over_pairs": interval([a - b for a, b in zip(values, alone[measure], strict=True)])
                for measure, values in found.items()
            },
        }
        for name, found in scores.items()
    }
    chance = max(asked.classes.count(name) for name in set(asked.classes)) / len(asked)
    real = _judge(learnt, asked.pictures)
    counts = {"training": len(learnt), "pairs": known, "test": len(asked)}
    beside = {"chance": chance, "real": sum(a == b for a, b in zip(real, asked.classes, strict=True)) / len(asked)}
    return {"config": asdict(config), "images": counts, **beside, "rows": rows}


def _save(report: dict[str, Any], asked: CaptionedImages, shown: dict[str, Tensor], out: Path) -> None:
    from dvt.analysis.priors.compare_page import save_samples

    with whole_file(out / "itit.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    save_samples({"real image of the text": asked.pictures, **shown}, out / "samples.png")
