"""Make the conditions of a prior: in training, and of a trained one from images, names of classes or texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.priors.config import CONDITIONS, PriorTraining
from dvt.analysis.priors.reading import Wanted, read_tokens
from dvt.analysis.priors.texts import texts_of
from dvt.analysis.priors.token_set import BATCH, Clean, Rows, TokenSet, token_identity
from dvt.analysis.priors.tower import OPEN_CLIP, JointSpace, Tower, load_tower
from dvt.backbones import Backbone
from dvt.errors import BackboneError, ConfigError
from dvt.images import ImageLike, image_list
from dvt.progress import silent

TOWER_FILE = "tower.safetensors"  # in a run's folder


def conditions_of_images(
    card: dict[str, Any], images: Iterable[ImageLike] | str | Path, backbone: Backbone, denoiser: Clean | None = None
) -> Tensor:
    """Make conditions (n, M, C) from images.

    Args:
        card: the prior's card.
        images: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W), or a folder of them.
        backbone: the backbone of the training.
        denoiser: the denoiser of the training, if any.

    Raises:
        ConfigError: the prior is not conditioned on images.
        BackboneError: the prior was trained on tokens of another backbone or denoiser.
        ImageError: an image cannot be read.
    """
    if card.get("condition") not in CONDITIONS:
        given = card.get("condition")
        raise ConfigError(f"this prior is conditioned on {given!r}, not on images; leave --condition out")
    usual = {"precision": "float32"}
    here, there = usual | token_identity(backbone, denoiser), usual | card
    changed = [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]
    if changed:
        raise BackboneError(
            f"the prior was trained on other tokens ({'; '.join(changed)}); give the same backbone, size and denoiser"
        )
    seen = read_tokens(image_list(images), backbone, Wanted(card["condition"], False, 8), denoiser, silent)
    assert seen.conditions is not None
    return seen.conditions[list(range(len(seen)))]


def conditions_of_labels(card: dict[str, Any], labels: Sequence[str]) -> Tensor:
    """Make conditions (n, 1, K) from names of classes.

    Raises:
        ConfigError: the prior was trained without labels, or without one of these.
    """
    known = card.get("labels")
    if not known:
        given = card.get("condition")
        raise ConfigError(f"this prior is conditioned on {given!r} and knows no labels; train with --condition label")
    if unknown := [name for name in labels if name not in known]:
        raise ConfigError(f"there is no label {unknown[0]!r}; this prior knows {', '.join(known)}")
    return functional.one_hot(torch.tensor([known.index(name) for name in labels]), len(known)).half()[:, None]


def conditions_of_texts(run_dir: str | Path, card: dict[str, Any], texts: Sequence[str]) -> Tensor:
    """Make conditions (n, 1, C) from texts, by the tower of a prior that was trained on texts or pseudo-texts.

    Raises:
        ConfigError: the prior was trained without a tower.
        WeightsError: the tower's file in the run's folder is missing or damaged.
    """
    about = card.get("tower")
    if not isinstance(about, dict):
        given = card.get("condition")
        raise ConfigError(f"this prior is conditioned on {given!r}, not on texts; train with --condition pseudo-text")
    name = str(about.get("tower"))
    if name.startswith(OPEN_CLIP):
        space = load_tower(":".join(filter(None, (name, about.get("weights")))))
    else:
        space = load_tower(Path(run_dir) / TOWER_FILE)
    return space.texts(texts).detach().half()[:, None]


def keep_tower(space: JointSpace | None, folder: Path) -> None:
    """Write a tower into a run's folder, so that sampling needs nothing else; one of open_clip is only named."""
    if isinstance(space, Tower):
        space.save(folder / TOWER_FILE)


@torch.no_grad()
def make_conditions(
    config: PriorTraining, tokens: TokenSet, space: JointSpace | None
) -> tuple[Rows | None, list[str] | None]:
    """Make the condition of each image of a training and, if it is a label, the names of the classes."""
    if config.condition == "label":
        named = [Path(name).parent.name for name in tokens.names]
        classes = sorted(set(named))
        if len(classes) < 2:
            raise ConfigError(f"labels are the names of the images' folders, and all images lie in {classes[0]!r}")
        ids = torch.tensor([classes.index(name) for name in named])
        return functional.one_hot(ids, len(classes)).half()[:, None], classes
    if space is None:
        return tokens.conditions, None
    if config.texts is not None:
        given = texts_of(config.texts, tokens.names)
        return space.texts([texts[0] for texts in given]).half()[:, None], None
    starts = range(0, len(tokens), BATCH)
    parts = (tokens.pictures[list(range(start, min(start + BATCH, len(tokens))))] for start in starts)
    return torch.cat([space.pictures(part.float()) for part in parts]).half()[:, None], None
