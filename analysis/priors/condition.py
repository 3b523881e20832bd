"""Randomise the conditions of a generative prior (dropping, pseudo-text, rewrites of texts); make discrete tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.files import read_plain
from dvt.schema import parsed_json

Texts = Sequence[Sequence[str]]
"""For each image its original text, then the rewrites."""


def drop(condition: Tensor, null: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a random share of conditions (B, ...) by ``null``, for classifier-free guidance.

    Args:
        condition: (B, ...).
        null: the replacement, learned or zero, broadcastable to one condition.
        share: probability of replacement in [0, 1]; Lumos takes .1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of dropped conditions must lie in [0, 1], got {share}")
    dropped = torch.rand(len(condition), generator=generator, device=generator.device) < share
    return torch.where(dropped.to(condition.device).view(-1, *[1] * (condition.ndim - 1)), null, condition)


# --- LAFITE: image features with noise, in place of text features


def pseudo_text(features: Tensor, generator: torch.Generator, xi: float = 3.0) -> Tensor:
    """Draw fixed pseudo-text features h = norm(f + xi |f| eps / |eps|), eps standard normal.

    The mean cosine of f and h tends to 1 / sqrt(1 + xi^2) in high dimension.

    Args:
        features: (..., C) image features, of any length.
        xi: strength of the disturbance, at least 0.

    Source:
        Zhou et al., LAFITE: Towards Language-Free Training for Text-to-Image Generation, 2022, with fixed noise.
    """
    if xi < 0:
        raise ConfigError(f"xi must be at least 0, got {xi}")
    noise = functional.normalize(_normal_like(features, generator), dim=-1)
    return functional.normalize(features + xi * features.norm(dim=-1, keepdim=True) * noise, dim=-1)


class PseudoText(nn.Module):
    """Learn pseudo-text features h = norm(f + mu(f) + exp(s(f)) eps) of f = norm(feature).

    At the start it equals :func:`pseudo_text` in high dimension: mu = 0 and exp(s) = xi / sqrt(C). Train it together
    with the generator through ``contrast(h, ..., temperature=.5)``.

    Args:
        feature_dim: C.
        xi: strength of the disturbance at the start, positive.

    Source:
        LAFITE, with trained noise; the initial values are ours.
    """

    def __init__(self, feature_dim: int, xi: float = 3.0) -> None:
        super().__init__()
        if xi <= 0:
            raise ConfigError(f"xi must be positive, got {xi}")
        self.hidden = nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.GELU())
        self.mean, self.log_scale = nn.Linear(feature_dim, feature_dim), nn.Linear(feature_dim, feature_dim)
        for layer in (self.mean, self.log_scale):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.log_scale.bias, math.log(xi / feature_dim**0.5))

    def forward(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Draw pseudo-text (..., C), unit vectors, for features (..., C)."""
        features = functional.normalize(features, dim=-1)
        hidden = self.hidden(features)
        noise = _normal_like(features, generator)
        return functional.normalize(features + self.mean(hidden) + self.log_scale(hidden).exp() * noise, dim=-1)


def _normal_like(features: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(features.shape, generator=generator, device=generator.device).to(features)


# --- LaCLIP: texts and their rewrites

_MOST_BYTES = 1 << 30  # of the texts of all images


def read_texts(path: str | Path, images: Sequence[str]) -> list[tuple[str, ...]]:
    """Read each image's text and rewrites from a file of JSON lines.

    A line is ``{"image": NAME, "text": ORIGINAL, "rewrites": [TEXT, ...]}``; rewrites may be missing.

    Args:
        path: the file, UTF-8.
        images: names as in the file, in the order of the result; a name may be repeated.

    Raises:
        ConfigError: a line is not such an object, the file repeats a name, or its names and `images` differ.

    Source:
        Fan et al., Improving CLIP Training with Language Rewrites (LaCLIP), 2023.
    """
    path = Path(path)
    try:
        lines = read_plain(path, _MOST_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the texts in {path}: {error}; they must be JSON lines in UTF-8") from error
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, texts = _parsed(line, f"{path}, line {number}")
            if name in found:
                raise ConfigError(
                    f"{path}, line {number}: image {name!r} has a line already; put all of its rewrites into one line"
                )
            found[name] = texts
    _check_step(path, list(dict.fromkeys(images)), list(found))
    return [found[name] for name in images]


def _parsed(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        entry = parsed_json(line)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not isinstance(entry, dict) or not {"image", "text"} <= entry.keys() <= {"image", "text", "rewrites"}:
        raise ConfigError(
            f'{where}: a line is {{"image": NAME, "text": TEXT, "rewrites": [TEXT, ...]}}, got {line[:80]}'
        )
    rewrites = entry.get("rewrites", [])
    texts = [entry["image"], entry["text"], *(rewrites if isinstance(rewrites, list) else [None])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"{where}: image, text and each of the rewrites must be text that is not empty")
    return entry["image"], tuple(texts[1:])


def _check_step(path: Path, images: list[str], named: list[str]) -> None:
    there, wanted = set(named), set(images)
    missing, unknown = [n for n in images if n not in there], [n for n in named if n not in wanted]
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, what in ((missing, "images without a line"), (unknown, "lines without an image"))
            if names
        ]
        raise ConfigError(f"{path} does not fit the {len(images)} images: {' and '.join(parts)}; make it again")


def draw_texts(texts: Texts, generator: torch.Generator) -> list[str]:
    """Draw one text for each image, uniformly from its original and rewrites.

    Each image takes one random number, however many rewrites it has, so adding rewrites changes no other draw.
    """
    draws = torch.rand(len(texts), generator=generator, device=generator.device, dtype=torch.float64).tolist()
    return [choices[int(draw * len(choices))] for choices, draw in zip(texts, draws, strict=True)]


class TextTower(nn.Module):
    """Encode a list of N texts as (N, C) features, with a frozen text encoder of open_clip.

    Args:
        name: an open_clip model such as ``ViT-B-32``.
        weights: a file, or a tag of open_clip to download; None keeps random weights, for tests.

    Raises:
        ConfigError: open_clip is not installed, or does not know the model or the weights.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError("texts need open_clip: pip install 'denoising-vit[prior]'") from error
        try:
            self.model = open_clip.create_model(name, pretrained=weights).eval().requires_grad_(False)
            self._tokenize = open_clip.get_tokenizer(name)
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"open_clip has no model {name!r} with weights {weights!r}: {error}") from error

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts as (N, C) features, not normalised."""
        device = next(self.model.parameters()).device
        return self.model.encode_text(self._tokenize(list(texts)).to(device)).float()


# --- discrete tokens


@dataclass(frozen=True)
class Codebook:
    """Hold cluster centres (K, C) in feature space, for discrete tokens, the baseline for continuous ones."""

    centres: Tensor

    @classmethod
    def fit(cls, features: Tensor, count: int, seed: int = 0) -> Codebook:
        """Find the k-means centres of (..., C) features, such as the patch tokens of many images.

        Raises:
            ConfigError: there are fewer features than centres.
            NonFiniteError: a feature is NaN or infinite.
        """
        from sklearn.cluster import MiniBatchKMeans

        rows = features.detach().flatten(0, -2).float().cpu()
        if not 1 <= count <= len(rows):
            raise ConfigError(f"count must lie in 1 ... {len(rows)}, the number of features, got {count}")
        if not bool(rows.isfinite().all()):
            raise NonFiniteError("features hold NaN or infinity; compute them again")
        means = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096).fit(rows.numpy())
        return cls(torch.from_numpy(means.cluster_centers_).to(features))

    def encode(self, features: Tensor) -> Tensor:
        """Find the index of the nearest centre of each feature: (..., C) -> (...)."""
        if features.shape[-1] != self.centres.shape[1]:
            raise ShapeError(f"features have {features.shape[-1]} channels, the codebook {self.centres.shape[1]}")
        rows = features.flatten(0, -2).to(self.centres)
        parts = [torch.cdist(part, self.centres).argmin(1) for part in rows.split(16384)]
        return torch.cat(parts).view(features.shape[:-1])

    def decode(self, ids: Tensor) -> Tensor:
        """Look up the centres of indices: (...) -> (..., C)."""
        return self.centres[ids]
