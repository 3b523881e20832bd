"""Make token maps for probes: compute them once and keep them in a feature store, or derive them from other maps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.probes.layouts import some
from dvt.analysis.probes.probe import grid_of
from dvt.backbones import Backbone
from dvt.backbones.layers import joined_tokens
from dvt.errors import ConfigError, DataError, ImageError, ShapeError
from dvt.grids import Size
from dvt.images import file_sha256, load_image
from dvt.progress import Progress
from dvt.store import FeatureStore, ImageEntry, Job, Record, StoreWriter, plan
from dvt.text import counted
from dvt.tokens import Tokens
from dvt.views import Shifts, ViewConfig, Views, resize

log = logging.getLogger(__name__)

LazyItem = TypeVar("LazyItem")

PH_REG: dict[str, Any] = {"kind": "shifts", "reach": 0.15, "flip": 0.5}
"""Views of PH-Reg's teacher ("Vision Transformers with Self-Distilled Registers", 2025): shifts of at most 15 % of the
image's sides, and mirroring, at one scale. Different here: shifts by whole patches, and tokens of content outside the
image left out."""

_SHARD_IMAGES = 64
_HELD_BYTES = 2 << 30
_LEAST_EIGENVALUE = 1e-9


class Lazy(Sequence, Generic[LazyItem]):
    """Make the items of a sequence when they are indexed."""

    def __init__(self, length: int, make: Callable[[int], LazyItem]) -> None:
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        return self.make(index % self.length)


def held(items: Sequence[Tensor]) -> Sequence[Tensor]:
    """Read the items into memory if all are likely to take less than 2 GB; otherwise return them unchanged."""
    if not len(items):
        return items
    first = items[0]
    few = first.nbytes * len(items) < _HELD_BYTES
    return [first, *(items[i] for i in range(1, len(items)))] if few else items


def default_cache() -> Path:
    """Find the user's cache folder for features: $XDG_CACHE_HOME/dvt, or ~/.cache/dvt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvt"


# -- computed once ----------------------------------------------------------------------------------------------------


def cached_tokens(
    backbone: Backbone,
    images: Sequence[Path],
    cache: Path,
    views: ViewConfig | None = None,
    progress: Progress | None = None,
    layers: Sequence[int] = (),
) -> Sequence[Tokens]:
    """Read the raw tokens of image files, or their average over views; compute what the cache lacks first.

    Args:
        backbone: runs on its own device.
        images: files; equal bytes are computed once.
        cache: folder of feature stores, one per backbone and settings; it may be deleted at any time.
        views: None for one pass over the whole image; otherwise tokens are averaged as :func:`averaged_tokens` does.
        progress: called with (what, done, total).
        layers: whose tokens to read in one forward pass, side by side; none for the backbone's own alone.

    Returns:
        Tokens (a batch of one) of each image, read when indexed.
    """
    settings: dict[str, Any] = {"verb": "extract"}
    if views is not None:
        settings = {"verb": "average views", "views": _numbers(views)}
    if len(layers) > 1:
        settings |= {"layers": list(layers)}
    job = Job.of(backbone, settings | backbone.precision_setting)
    what = "features" if views is None else "view averages"
    folder = cache / f"{what.replace(' ', '-')}-{job.digest[:16]}"
    hashes = [file_sha256(path) for path in images]
    with StoreWriter(folder, job) as writer:
        todo = {sha256: path for sha256, path in zip(hashes, images, strict=True) if sha256 not in writer.done}
        listed = [ImageEntry(str(path), sha256, (0, 0)) for sha256, path in todo.items()]
        done = 0
        for shard in plan(listed, _SHARD_IMAGES, job):
            records = []
            for path, sha256, _ in shard.images:
                records.append(_record(backbone, path, sha256, views, layers or [backbone.layer]))
                done += 1
                if progress:
                    progress(what, done, len(todo))
            writer.write(shard.name, records)
    return stored_tokens(FeatureStore(folder), images, hashes)


def _numbers(views: ViewConfig) -> dict[str, object]:
    return {name: value for name, value in asdict(views).items() if name != "batch"}


@torch.no_grad()
def _record(backbone: Backbone, path: str, sha256: str, views: ViewConfig | None, layers: Sequence[int]) -> Record:
    pixels = load_image(path).to(backbone.device)
    size: Size = (pixels.shape[1], pixels.shape[2])
    resized = fitting_size(backbone, size, path)
    if views is None:
        tokens = joined_tokens(backbone, resize(pixels, resized)[None], layers)
    else:
        tokens = averaged_tokens(backbone, pixels, views)
    return Record(path, sha256, size, {"raw": tokens.patches[0]}, tokens.prefix[0])


def fitting_size(backbone: Backbone, size: Size, path: str | Path) -> Size:
    """Choose the size (H, W) to which an image file is resized.

    Raises:
        ImageError: the image is too long and thin; the message names the file.
    """
    try:
        return backbone.input_size(size)
    except ImageError as error:
        raise ImageError(f"{str(path)!r}: {error}") from error


def stored_tokens(store: FeatureStore, images: Sequence[Path], hashes: Sequence[str] | None = None) -> Sequence[Tokens]:
    """Read a store's tokens (batches of one) of image files, found by their bytes.

    Raises:
        DataError: the store lacks some of them; they are listed.
    """
    where = {sha256: i for i, sha256 in enumerate(store.sha256s)}
    hashes = [file_sha256(path) for path in images] if hashes is None else hashes
    if missing := [str(path) for path, sha256 in zip(images, hashes, strict=True) if sha256 not in where]:
        raise DataError(
            f"the store {str(store.path)!r} lacks {len(missing)} of {counted(len(images), 'image')}: "
            f"{some(missing)}. Add them with the command that made the store"
        )
    return Lazy(len(images), lambda i: store[where[hashes[i]]])


# -- view averaging ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def averaged_tokens(backbone: Backbone, image: Tensor, config: ViewConfig) -> Tokens:
    """Average tokens over views: at each patch centre, the tokens of all views that show it, interpolated bilinearly.

    This is the baseline for any estimate from views: it spreads a position artifact out instead of estimating it.

    Args:
        image: (3, H, W) in [0, 1].
        config: settings of the views; the whole image is always the first view. Crops [ours] mix scales; shifts are at
            the image's own scale, each mirrored with probability `flip`, as in :data:`PH_REG`.

    Raises:
        ShapeError: the grid is smaller than 2 x 2 patches.
    """
    size = backbone.input_size((image.shape[1], image.shape[2]))
    centres = backbone.centres(size)
    if min(centres.shape[:2]) < 2:
        raise ShapeError(f"views are averaged on grids of 2 x 2 patches or more, got {tuple(centres.shape[:2])}")
    if config.kind == "shifts":
        return _averaged_shifts(backbone, Shifts(image, size, centres, config))
    views = Views(image, size, centres, config)
    total = torch.zeros(*centres.shape[:2], backbone.feature_dim, device=centres.device)
    count = torch.zeros(*centres.shape[:2], 1, device=centres.device)
    prefix, start = None, 0
    for images, _ in views:
        part = slice(start, start + len(images))
        start += len(images)
        tokens = backbone(images).to(torch.float32)
        prefix = tokens.prefix[:1] if prefix is None else prefix
        own = grids.image_to_view(centres.expand(len(images), -1, -1, -1), views.boxes[part], views.flips[part])
        seen = ((own >= 0) & (own <= 1)).all(-1, keepdim=True).to(torch.float32)
        # In grids.sample 0 and 1 are the outermost nodes, which here are the centres of the outermost patches.
        nodes = (own - centres[0, 0]) / (centres[-1, -1] - centres[0, 0])
        at_centres = torch.stack([grids.sample(one, where) for one, where in zip(tokens.patches, nodes, strict=True)])
        total = total + (seen * at_centres).sum(0)
        count = count + seen.sum(0)
    return Tokens((total / count)[None], torch.as_tensor(prefix))


def _averaged_shifts(backbone: Backbone, windows: Shifts) -> Tokens:
    """Average each patch's tokens over the windows, shifted by whole patches, that show the patch, not its mirror."""
    config, (height, width) = windows.config, windows.centres.shape[:2]
    total = torch.zeros(height, width, backbone.feature_dim, device=windows.centres.device)
    count = torch.zeros(height, width, 1, device=windows.centres.device)
    flips = torch.rand(len(windows), generator=torch.Generator().manual_seed(config.seed)) < config.flip
    flips[0] = False
    prefix, start = None, 0
    for images, _ in windows:
        mirrored = flips[start : start + len(images)].tolist()
        views = torch.stack([each.flip(-1) if flip else each for each, flip in zip(images, mirrored, strict=True)])
        tokens = backbone(views).to(torch.float32)
        prefix = tokens.prefix[:1] if prefix is None else prefix
        offsets = windows.offsets[start : start + len(images)].tolist()
        for patches, (down, right), flip in zip(tokens.patches, offsets, mirrored, strict=True):
            image_rows, view_rows = _overlap(height, down)
            image_columns, view_columns = _overlap(width, right)
            own = patches.flip(1) if flip else patches
            total[image_rows, image_columns] += own[view_rows, view_columns]
            count[image_rows, image_columns] += 1
        start += len(images)
    return Tokens((total / count)[None], torch.as_tensor(prefix))


def _overlap(length: int, offset: int) -> tuple[slice, slice]:
    """Find the part of an image that a window shifted by whole patches shows, as slices of the image and the window."""
    first, last = max(0, offset), length + min(0, offset)
    return slice(first, last), slice(first - offset, last - offset)


# -- baselines without labels -----------------------------------------------------------------------------------------


def position_features(grid: Size, waves: int = 4, device: torch.device | None = None) -> Tensor:
    """Multiply cosines of the patch centres' coordinates: (h, w, waves^2), features that know the position alone."""
    coords = grids.grid_centres(grid, device=device)
    cosines = torch.cos(torch.pi * coords[..., None] * torch.arange(waves, device=device))
    return (cosines[:, :, 0, :, None] * cosines[:, :, 1, None, :]).flatten(2)


def with_class_token(tokens: Tokens) -> Tensor:
    """Join the class token to each patch token of one image: (h, w, 2 C).

    Raises:
        ShapeError: the tokens have no prefix, or are of several images.

    Source: DINOv2's linear evaluation of depth (Oquab et al., 2023, section 7.4).
    """
    if len(tokens) != 1 or not tokens.prefix.shape[1]:
        raise ShapeError(
            f"patches {tuple(tokens.patches.shape)} with prefix {tuple(tokens.prefix.shape)}: one image with a class "
            "token is needed"
        )
    patches = tokens.patches[0]
    return torch.cat((patches, tokens.prefix[0, :1].expand(*patches.shape[:2], -1)), dim=-1)


def position_only(tokens: Tokens) -> Tokens:
    """Replace tokens by functions of their coordinates: the baseline of a task in which layout is a cue."""
    return Tokens.of(position_features(tokens.grid, device=tokens.patches.device).expand(len(tokens), -1, -1, -1))


def with_position(tokens: Tensor, how: str) -> Tensor:
    """Add position features to a map (h, w, C).

    Args:
        how: "concatenate" appends :func:`position_features`, "add" adds sines and cosines of the coordinates as
            masked autoencoders do (C a multiple of 4); both at the RMS of the tokens. "none" changes nothing.
    """
    if how == "none":
        return tokens
    size = grid_of(tokens)
    scale = tokens.square().mean().sqrt()
    if how == "concatenate":
        waves = position_features(size, device=tokens.device)
        return torch.cat((tokens, scale * waves.to(tokens.dtype)), dim=-1)
    if how == "add":
        return tokens + scale * 2**0.5 * _sines(size, tokens.shape[-1]).to(tokens)
    raise ConfigError(f"position is {how!r}; it must be 'none', 'concatenate' or 'add'")


def _sines(grid: Size, channels: int) -> Tensor:
    """Compute sines and cosines of patch numbers at C / 4 frequencies, (h, w, C), as in masked autoencoders."""
    if channels % 4:
        raise ConfigError(f"adding a position needs channels in multiples of 4, got {channels}; use 'concatenate'")
    frequency = 10000.0 ** -torch.linspace(0, 1, channels // 4 + 1)[:-1]
    numbers = grids.grid_centres(grid) * torch.tensor([grid[1], grid[0]])
    angles = (numbers[..., None] * frequency).flatten(2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def mean_subtraction(train: Iterable[Tokens]) -> Callable[[Tokens], Tokens]:
    """Make a function that subtracts the mean map over training images, without its mean over positions.

    For maps of another grid the mean map is resampled.
    """
    total, count = None, 0
    for tokens in train:
        part = tokens.patches.float().sum(0)
        total = part if total is None else total + grids.resample(part, grid_of(total))
        count += len(tokens)
    if total is None:
        raise DataError("no training image was given; give those whose mean is to be subtracted")
    mean = total / count
    mean = mean - mean.mean((0, 1))
    return lambda tokens: tokens.with_patches(tokens.patches - grids.resample(mean, tokens.grid).to(tokens.patches))


def linear_removal(train: Iterable[Tokens], rank: int = 8, waves: int = 6) -> Callable[[Tokens], Tokens]:
    """Make a function that removes the directions in which tokens encode their position [ours; the aim is RASA's].

    Tokens are regressed on :func:`position_features`; along the `rank` principal directions of the prediction, tokens
    are set to their mean. Covariances suffice, so the tokens are read once. (RASA removes the directions from which a
    regression *reads* the position. These are small where the position signal is large, so that many rounds hardly
    change anything.)
    """
    products, channels = None, 0
    for tokens in train:
        channels = tokens.patches.shape[-1]
        rows = _rows(tokens, waves)
        products = rows.T @ rows if products is None else products + rows.T @ rows
    if products is None:
        raise DataError("no training image was given; the directions of position are estimated from them")
    mean = products[-1, :-1] / products[-1, -1]
    covariance = products[:-1, :-1] / products[-1, -1] - mean[:, None] * mean
    across, within = covariance[:channels, channels:], covariance[channels:, channels:]
    # Small grids cannot tell all waves apart.
    predicted = across @ torch.linalg.pinv(within, rtol=_LEAST_EIGENVALUE, hermitian=True) @ across.T
    variances, directions = torch.linalg.eigh(predicted)
    used = directions[:, -rank:] * (variances[-rank:] > _LEAST_EIGENVALUE * variances[-1])
    remove, centre = (used @ used.T).float(), mean[:channels].float()

    def change(tokens: Tokens) -> Tokens:
        patches = tokens.patches.float()
        return tokens.with_patches(patches - (patches - centre) @ remove)

    return change


def _rows(tokens: Tokens, waves: int) -> Tensor:
    """Join rows [token, position features without the constant, 1]: (B h w, C + waves^2) float64."""
    position = position_features(tokens.grid, waves, tokens.patches.device).expand(len(tokens), -1, -1, -1)
    return torch.cat((tokens.patches, position[..., 1:], position[..., :1]), dim=-1).flatten(0, 2).double()
