"""Train a small image-text tower on images and texts with rewrites, and measure it on classes that it was not shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvt.analysis.priors.contrast import contrast, same
from dvt.analysis.priors.encoder import augment
from dvt.analysis.priors.job_config import TowerTraining
from dvt.analysis.priors.reading import Wanted, read_tokens
from dvt.analysis.priors.texts import Vocabulary, draw_texts, texts_of
from dvt.analysis.priors.token_set import TokenSet, split
from dvt.analysis.priors.tower import Tower, TowerCard, class_vectors
from dvt.errors import ConfigError
from dvt.progress import Progress, silent
from dvt.training import epoch_indices, sides_digest, train

Labelled = tuple[Tensor, list[str]]
"""Pictures (N, 3, S, S) and the class of each, the name of its folder."""


def train_tower(
    images: Sequence[Path],
    texts: str | Path,
    out: str | Path,
    config: TowerTraining | None = None,
    test: Sequence[Path] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a tower by the contrastive loss of CLIP, each step with one text per image, or continue such a run.

    In a batch, images with equal texts are positives of each other.

    Args:
        images: files of the images.
        texts: a file of JSON lines, as :func:`dvt.analysis.priors.texts.texts_of` reads it.
        out: the .safetensors file to write; checkpoints and log.csv go beside it, to NAME.run.
        config: settings.
        test: labelled images to score on, in folders named after their class; none for the held-out images.
        progress: called with ("look" or "train", done, total).

    Returns:
        A report ready for JSON: "zero_shot", the accuracy among the classes' prompts, with "chance", the share of the
        most frequent class, and "retrieval", the share of held-out images whose nearest text is their own.

    Raises:
        ConfigError: images and texts do not go together, or the name does not end in .safetensors.
    """
    config, out = config or TowerTraining(), Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"a tower is written to a .safetensors file, got {str(out)!r}")
    seen = read_tokens(images, None, Wanted(None, False, config.side), None, progress)
    given = texts_of(texts, [Path(name) for name in seen.names])
    chosen, held = split(seen.sha256s, config.held_out, config.loop.seed)
    learnt = [given[row] if config.rewrites else given[row][:1] for row in chosen]
    tower = _untrained(learnt, config)
    pictures = seen.pictures[list(range(len(seen)))].float()
    asked = _labelled(seen, held, pictures) if not test else _read(test, config.side, progress)

    def batches(step: int, rank: int, world: int) -> dict[str, Tensor]:
        part = config.loop.batch_size // world
        rows = epoch_indices(step, config.loop.batch_size, len(chosen), config.loop.seed)[rank * part :][:part]
        seed = int(np.random.SeedSequence((config.loop.seed, step, rank)).generate_state(1)[0])
        return {"rows": torch.tensor(rows), "seed": torch.tensor(seed)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        generator, rows = torch.Generator().manual_seed(int(batch["seed"])), batch["rows"].tolist()
        drawn = draw_texts([learnt[row] for row in rows], generator)
        views = augment(pictures[[chosen[row] for row in rows]], config.encoder, generator)
        return {"loss": clip_loss(tower, views, drawn)}

    def validate(model: nn.Module) -> dict[str, float]:
        return measure(tower, asked, (pictures[held], [given[row][0] for row in held]), config.prompts)

    settings = _settings(config, learnt, seen, (chosen, held))
    run = out.with_suffix(".run")
    done = train(tower, loss, batches, config.loop, run, validate=validate, progress=progress, settings=settings)
    tower.save(out)
    chance = max(asked[1].count(name) for name in set(asked[1])) / len(asked[1])
    counts = {"training": len(chosen), "held_out": len(held), "test": len(asked[1]), "words": len(tower.card.words)}
    return {**counts, "loss": done.history[-1]["loss"], **validate(tower), "chance": chance, "out": str(out)}


def _untrained(texts: Sequence[Sequence[str]], config: TowerTraining) -> Tower:
    words = Vocabulary.of((text for each in texts for text in each), config.length)
    card = TowerCard(config.side, words.words, words.length, config.encoder)
    return Tower(card, torch.Generator().manual_seed(config.loop.seed))


def _settings(
    config: TowerTraining, texts: Sequence[Sequence[str]], seen: TokenSet, sides: tuple[Sequence[int], Sequence[int]]
) -> dict[str, Any]:
    """List what a continued run must agree with."""
    return {
        "side": config.side,
        "rewrites": config.rewrites,
        "encoder": asdict(config.encoder),
        "texts": sides_digest(*texts),
        "images": sides_digest(*([seen.sha256s[row] for row in side] for side in sides)),
    }


def clip_loss(tower: Tower, pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """Compute CLIP's symmetric loss of pictures (B, 3, S, S) and B texts; equal texts are positives of each other."""
    number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    ids = torch.tensor([number[text] for text in texts], device=pictures.device)
    seen, said = tower.pictures(pictures), tower.texts(texts)
    return contrast(seen, said, positives=same(ids), temperature=tower.temperature, symmetric=True)


@torch.no_grad()
def measure(
    tower: Tower, asked: Labelled, held: tuple[Tensor, Sequence[str]], prompts: Sequence[str]
) -> dict[str, float]:
    """Score a tower: "zero_shot" on labelled pictures, "retrieval" of the own text among all different ones."""
    classes, texts = sorted(set(asked[1])), list(dict.fromkeys(held[1]))
    near = (tower.pictures(asked[0]) @ class_vectors(tower, classes, prompts).T).argmax(1).tolist()
    zero_shot = sum(classes[i] == name for i, name in zip(near, asked[1], strict=True)) / len(near)
    found = (tower.pictures(held[0]) @ tower.texts(texts).T).argmax(1).tolist()
    retrieval = sum(texts[i] == text for i, text in zip(found, held[1], strict=True)) / len(found)
    return {"zero_shot": zero_shot, "retrieval": retrieval}


def _labelled(seen: TokenSet, rows: Sequence[int], pictures: Tensor) -> Labelled:
    return pictures[list(rows)], [Path(seen.names[row]).parent.name for row in rows]


def _read(paths: Sequence[Path], side: int, progress: Progress) -> Labelled:
    seen = read_tokens(paths, None, Wanted(None, False, side), None, progress)
    every = list(range(len(seen)))
    return _labelled(seen, every, seen.pictures[every].float())
