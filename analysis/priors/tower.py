"""Encode pictures and texts into one space: a small tower of one's own, or one of open_clip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.encoder import PictureEncoder
from dvt.analysis.priors.job_config import EncoderConfig
from dvt.analysis.priors.texts import PAD, Vocabulary
from dvt.analysis.priors.trunk import Trunk, reset_weights
from dvt.backbones import weights_sha256
from dvt.backbones.weights import load_state, read_described, save_state
from dvt.errors import ConfigError, WeightsError
from dvt.schema import checked, typed
from dvt.views import resize

TOWER_SCHEMA = "dvt-tower/1"
OPEN_CLIP = "open_clip:"
_KEY = "dvt"
_COLDEST = 100.0  # largest factor of the cosines, as in CLIP


class JointSpace(Protocol):
    """Encode pictures and texts as unit vectors of one space."""

    @property
    def identity(self) -> dict[str, Any]:
        """The name of the model and what tells its weights."""

    def pictures(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, S, S) in [0, 1] of any side S as (B, C)."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts as (N, C)."""


@dataclass(frozen=True)
class TowerCard:
    """Describe a tower: the side of its pictures, the words that it knows, its architecture.

    Args:
        side: side of its pictures in pixels.
        words: the words, in the order of their numbers.
        length: words of a text that it reads.
        encoder: architecture of both encoders.
    """

    side: int
    words: tuple[str, ...]
    length: int
    encoder: EncoderConfig


class Tower(nn.Module):
    """Encode pictures and texts as unit vectors of one space, by a trunk of the priors each.

    Args:
        card: its description.
        generator: draws the initial weights, on the CPU.

    >>> card = TowerCard(8, ("a", "cat"), 3, EncoderConfig(width=16, depth=1, project=6))
    >>> tower = Tower(card, torch.Generator().manual_seed(0))
    >>> tower.pictures(torch.rand(2, 3, 8, 8)).shape, tower.texts(["a cat", "a dog", "cats"]).shape
    (torch.Size([2, 6]), torch.Size([3, 6]))
    """

    def __init__(self, card: TowerCard, generator: torch.Generator) -> None:
        super().__init__()
        width, out = card.encoder.width, card.encoder.project
        self.card, self.vocabulary = card, Vocabulary(card.words, card.length)
        self.picture = PictureEncoder(card.side, card.encoder, generator)
        self.word = nn.Embedding(len(self.vocabulary), width)
        self.trunk = Trunk(PriorConfig((1, card.length), width, None, None, width=width, depth=card.encoder.depth))
        self.ends = nn.ModuleList(nn.Linear(width, out) for _ in range(2))
        for part in (self.word, self.trunk, self.ends):
            reset_weights(part, generator)
        self.scale = nn.Parameter(torch.tensor(14.0).log())  # 1 / .07

    @property
    def identity(self) -> dict[str, Any]:
        """The name and hash of its weights."""
        return {"tower": TOWER_SCHEMA, "sha256": weights_sha256(self)}

    def pictures(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, S, S) in [0, 1] as unit vectors (B, C)."""
        shown = resize(pictures.float(), (self.card.side, self.card.side))
        return functional.normalize(self.ends[0](self.picture(shown)), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts as unit vectors (N, C); unknown words count as one word."""
        ids = self.vocabulary.encode(texts).to(self.scale.device)
        x = self.word(ids)
        there = (ids != PAD).to(x)[..., None]
        x = self.trunk(x * there, x.new_zeros(len(x), x.shape[-1]), None)
        mean = (x * there).sum(1) / there.sum(1).clamp(min=1)
        return functional.normalize(self.ends[1](mean), dim=-1)

    @property
    def temperature(self) -> Tensor:
        """The temperature of the contrastive loss, which is learned."""
        return 1 / self.scale.exp().clamp(max=_COLDEST)

    def save(self, path: str | Path) -> None:
        """Write weights and card to one .safetensors file, which is whole or absent."""
        described = {"schema": TOWER_SCHEMA, "card": asdict(self.card)}
        save_state(Path(path), self.state_dict(), {_KEY: json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> Tower:
        """Read a tower that :meth:`save` wrote, in evaluation mode.

        Raises:
            WeightsError: the file is missing, damaged or no tower.
        """
        about, state = read_described(path, _KEY, "an image-text tower")
        about = about if isinstance(about, dict) else {}
        if about.get("schema") != TOWER_SCHEMA:
            raise WeightsError(f"{str(path)!r} holds no tower of {TOWER_SCHEMA}; `dvt prior tower` trains one")
        try:
            parts = checked(about.get("card"), dict[str, Any], "its card")
            card = typed(TowerCard, parts | {"encoder": typed(EncoderConfig, parts.get("encoder"))})
            room = sum(value.nbytes for value in state.values())
            if max(card.side, card.length, card.encoder.width, card.encoder.depth, len(card.words)) > room:
                raise ConfigError("the file is too small for it")
            tower = cls(card, torch.Generator().manual_seed(0))
        except (ConfigError, RuntimeError) as error:
            raise WeightsError(f"{str(path)!r} describes a tower that cannot be made: {error}") from error
        load_state(tower, state, str(path))
        return tower.eval().requires_grad_(False)


class OpenClipTower(nn.Module):
    """Encode pictures and texts by a frozen model of open_clip.

    Args:
        name: a model such as ``ViT-B-32``.
        weights: a file, or a tag of open_clip to download; None keeps random weights, for tests.

    Raises:
        ConfigError: open_clip is not installed, or does not know the model or the weights.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError("towers of open_clip need it: pip install 'denoising-vit[prior]'") from error
        try:
            self.model = open_clip.create_model(name, pretrained=weights).eval().requires_grad_(False)
            self._tokenize = open_clip.get_tokenizer(name)
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"open_clip has no model {name!r} with weights {weights!r}: {error}") from error
        self._identity = {"tower": f"{OPEN_CLIP}{name}", "weights": weights}

    @property
    def identity(self) -> dict[str, Any]:
        """The name of the model and its weights."""
        return self._identity

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, S, S) in [0, 1] as unit vectors (B, C)."""
        about = self.model.visual.preprocess_cfg
        size = about["size"] if isinstance(about["size"], (tuple, list)) else (about["size"],) * 2
        shown = resize(pictures.float(), (int(size[0]), int(size[1])))
        mean, std = (shown.new_tensor(about[name])[:, None, None] for name in ("mean", "std"))
        return functional.normalize(self.model.encode_image((shown - mean) / std).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts as unit vectors (N, C)."""
        device = next(self.model.parameters()).device
        return functional.normalize(self.model.encode_text(self._tokenize(list(texts)).to(device)).float(), dim=-1)


def load_tower(name: str | Path) -> Tower | OpenClipTower:
    """Load a tower by its name: a file of `dvt prior tower`, or open_clip:MODEL or open_clip:MODEL:WEIGHTS."""
    given = str(name)
    if not given.startswith(OPEN_CLIP):
        return Tower.load(given)
    model, _, weights = given.removeprefix(OPEN_CLIP).partition(":")
    return OpenClipTower(model, weights or None)


@torch.no_grad()
def class_vectors(space: JointSpace, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Encode names of classes as unit vectors (K, C), each the mean over prompts with {} in place of the name."""
    each = [space.texts([prompt.replace("{}", name) for prompt in prompts]).mean(0) for name in classes]
    return functional.normalize(torch.stack(each), dim=-1)
