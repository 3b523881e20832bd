"""Read the texts of images and their rewrites, draw among them, and number their words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dvt.errors import ConfigError
from dvt.files import read_plain
from dvt.schema import parsed_json
from dvt.text import counted

Texts = Sequence[Sequence[str]]
"""For each image its original text, then the rewrites."""

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
    path, found = Path(path), dict[str, tuple[str, ...]]()
    for number, name, texts in _lines(path):
        if name in found:
            raise ConfigError(
                f"{path}, line {number}: image {name!r} has a line already; put all of its rewrites into one line"
            )
        found[name] = texts
    _check_step(path, list(dict.fromkeys(images)), list(found))
    return [found[name] for name in images]


def _lines(path: Path) -> list[tuple[int, str, tuple[str, ...]]]:
    """Read the number of each line, its image and its texts."""
    try:
        lines = read_plain(path, _MOST_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the texts in {path}: {error}; they must be JSON lines in UTF-8") from error
    return [(n, *_parsed(line, f"{path}, line {n}")) for n, line in enumerate(lines, 1) if line.strip()]


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
            f"{counted(len(names), what)} without {other} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, what, other in ((missing, "image", "a line"), (unknown, "line", "an image"))
            if names
        ]
        raise ConfigError(
            f"{path} does not fit the {counted(len(images), 'image')}: {' and '.join(parts)}; "
            "give each image one line, with its name relative to the file's folder"
        )


def draw_texts(texts: Texts, generator: torch.Generator) -> list[str]:
    """Draw one text for each image, uniformly from its original and rewrites.

    Each image takes one random number, however many rewrites it has, so adding rewrites changes no other draw.
    """
    draws = torch.rand(len(texts), generator=generator, device=generator.device, dtype=torch.float64).tolist()
    return [choices[int(draw * len(choices))] for choices, draw in zip(texts, draws, strict=True)]


def texts_of(path: str | Path, images: Sequence[str | Path]) -> list[tuple[str, ...]]:
    """Read the texts of image files; the file names them relative to its own folder, or by absolute paths.

    Args:
        path: as :func:`read_texts` takes it.
        images: paths of the images, in the order of the result.
    """
    home = Path(path).absolute().parent
    known = {name for _, name, _ in _lines(Path(path))}
    names = []
    for image in images:
        whole = str(Path(image).absolute())
        names.append(whole if whole in known else Path(os.path.relpath(whole, home)).as_posix())
    return read_texts(path, names)


# --- words

PAD, UNKNOWN = 0, 1  # numbers that no word has


@dataclass(frozen=True)
class Vocabulary:
    """Number words: the first word is 2, because 0 fills texts up and 1 stands for all words that are not known.

    Args:
        words: the words, in lower case.
        length: number of words of a text that are read.

    >>> words = Vocabulary.of(["A cat.", "a small dog"], length=3)
    >>> words.encode(["a small horse", "Cat"]).tolist(), words.decode([[2, 5, 0]])
    ([[2, 5, 1], [3, 0, 0]], ['a small'])
    """

    words: tuple[str, ...]
    length: int

    @classmethod
    def of(cls, texts: Iterable[str], length: int) -> Vocabulary:
        """Collect the words of texts."""
        return cls(tuple(sorted({word for text in texts for word in split_words(text)})), length)

    def __len__(self) -> int:
        return len(self.words) + 2

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts as the numbers of their words: (N, length)."""
        place = {word: number for number, word in enumerate(self.words, 2)}
        ids = torch.full((len(texts), self.length), PAD)
        for row, text in enumerate(texts):
            found = [place.get(word, UNKNOWN) for word in split_words(text)][: self.length]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.long)
        return ids

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Join the words of numbers (N, length); what fills up is left out, an unknown word is a question mark."""
        rows = torch.as_tensor(ids).tolist()
        return [" ".join("?" if i == UNKNOWN else self.words[i - 2] for i in row if i != PAD) for row in rows]


def split_words(text: str) -> list[str]:
    """Split a text into its words, in lower case.

    >>> split_words("A cat, 2 dogs!")
    ['a', 'cat', '2', 'dogs']
    """
    return re.findall(r"\w+", text.lower())
