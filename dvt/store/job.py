"""The settings that a store's tokens depend on, and the plan that cuts its images into shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from dvt.errors import ConfigError
from dvt.grids import Size
from dvt.text import differing

if TYPE_CHECKING:
    from dvt.backbones import Backbone

SCHEMA = "dvt-features/1"

ATTRIBUTE_BYTES = 1 << 16
JSON_SETTINGS = ("layer", "stride", "size", "config")


@dataclass(frozen=True)
class Job:
    """Hold everything that changes the numbers in a store, and nothing else: no paths, device or worker count.

    Args:
        backbone: name of the model.
        weights_sha256: hash over its weights.
        layer: the block that the tokens come from; -1 is the last one, after the final norm.
        stride: pixels between patches, None for the patch size.
        size: the shorter side of the model's input in pixels, or (height, width), or None for the model's own.
        config: the other settings that change numbers (verb, solver, seed, ...), as JSON values.

    Raises:
        ConfigError: the settings cannot be written as JSON, or take 64 KB or more.

    >>> Job("vit", "ab", config={"seed": 0}).digest == Job("vit", "ab", config={"seed": 1}).digest
    False
    """

    backbone: str
    weights_sha256: str
    layer: int = -1
    stride: int | Sequence[int] | None = None
    size: int | Sequence[int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            plain = json.loads(canonical(asdict(self)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the settings of a job must be plain JSON values: {error}") from error
        for name, value in plain.items():  # with JSON's types, a job read from a file is equal to this one
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        _check_attributes(self.attributes())

    @classmethod
    def of(cls, backbone: Backbone, settings: Mapping[str, Any]) -> Job:
        """Make the job of a backbone and of the other settings that the tokens depend on."""
        spec = backbone.identity
        return cls(spec.name, spec.weights_sha256 or "", spec.layer, spec.stride, size=spec.image_size, config=settings)

    @property
    def digest(self) -> str:
        """The job hash: SHA-256 over the schema and all fields, as canonical JSON."""
        return sha256_of(canonical({"schema": SCHEMA, **asdict(self)}))

    def attributes(self) -> dict[str, str]:
        """Write the job as the text attributes of a shard."""
        values = asdict(self)
        text = {name: canonical(values[name]) if name in JSON_SETTINGS else values[name] for name in values}
        return {"schema": SCHEMA, **text}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, str]) -> Job:
        """Read the job from what :meth:`attributes` wrote."""
        values: dict[str, Any] = {name: json.loads(attributes[name]) for name in JSON_SETTINGS}
        return cls(attributes["backbone"], attributes["weights_sha256"], **values)

    def differences(self, other: Job, self_is: str = "you ask for") -> str:
        """Describe how another job differs from this one, in words; empty when they are equal.

        Args:
            other: the job of an earlier run, or of another store.
            self_is: what introduces this one's values.
        """
        theirs, mine = ({**asdict(job), **asdict(job)["config"]} for job in (other, self))
        verbs = theirs.get("verb"), mine.get("verb")
        if all(verbs) and verbs[0] != verbs[1]:  # the settings of two commands are of different kinds
            return f"it was made by `dvt {verbs[0]}`, this is `dvt {verbs[1]}`"
        for each in (theirs, mine):
            del each["config"]
        return differing(theirs, mine, self_is)


class ImageEntry(NamedTuple):
    """Identify an image in a plan.

    Args:
        path: path of the file, or URL.
        sha256: hash of the file's bytes.
        grid: (h, w) of the image's tokens.
    """

    path: str
    sha256: str
    grid: Size


@dataclass(frozen=True)
class Shard:
    """List the images of one shard, which is a unit of work; copies of equal bytes are next to each other."""

    name: str
    images: tuple[ImageEntry, ...]


def plan(images: Sequence[ImageEntry], shard_images: int, job: Job, by_grid: bool = False) -> list[Shard]:
    """Divide images into shards; the result depends only on the set of images and the job, not on the images' order.

    Args:
        images: (path, sha256, grid) of each image that is not done yet.
        shard_images: images per shard, including copies of equal bytes, which may be spread over several shards.
        job: its digest is part of the shards' names, with paths and hashes.
        by_grid: put images of only one grid into a shard, as a shared artifact needs.

    Raises:
        ConfigError: shard_images is below 1.
    """
    if shard_images < 1:
        raise ConfigError(f"a shard holds at least 1 image, got {shard_images}")
    copies: dict[str, list[ImageEntry]] = {}
    for image in sorted(set(images)):
        copies.setdefault(image[1], []).append(ImageEntry(*image))
    groups: dict[Size, list[ImageEntry]] = {}
    for same in copies.values():
        groups.setdefault(same[0].grid if by_grid else (0, 0), []).extend(same)
    runs = (
        groups[grid][i : i + shard_images] for grid in sorted(groups) for i in range(0, len(groups[grid]), shard_images)
    )
    return [_shard(run, job) for run in runs]


def _shard(images: list[ImageEntry], job: Job) -> Shard:
    listing = [(path, sha256) for path, sha256, _ in images]
    return Shard(f"shard-{sha256_of(canonical([job.digest, listing]))[:20]}", tuple(images))


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_attributes(attributes: Mapping[str, str]) -> None:
    for name, text in attributes.items():
        if len(text.encode()) >= ATTRIBUTE_BYTES:
            raise ConfigError(f"{name} takes {len(text.encode())} bytes as text; a store's attribute holds under 64 KB")
