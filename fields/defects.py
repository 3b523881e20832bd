"""Outlier tokens that a defect makes: one direction, all or nothing, far longer than what content gives (ours).

A defect is looked for in the tokens alone, before anything is fitted, because a fit that holds it already no longer
tells it from content. Long tokens are not enough: real content of high contrast has them too. Two more things set a
defect apart. Its tokens point one way, and there is nothing between them and the others, while content, seen in views
of many scales, takes all values between a high and a low one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt.errors import ConfigError, NonFiniteError, ShapeError

# Robust standard deviations of the logarithm of the norm beyond which a token is a candidate.
SIGMAS = 2.5
# Cosine to the common direction from which a candidate is of the defect: its own content turns it away a little.
ALIGNED = 0.8
# Tokens whose length along the direction lies in this range, in defects' lengths, lie in the gap.
GAP = (0.3, 0.6)
# Most tokens in the gap, for each token of the defect.
IN_GAP = 0.25
# Where a token counts as the defect's, in defects' lengths: in the gap.
CUT = 0.5
# Refinements of the direction, each by the tokens that the last one aligned.
ROUNDS = 3
# Fewest tokens of a defect.
FEWEST = 8
# Views from which a median over them stands for what a position holds.
FEWEST_VIEWS = 5
# Standard deviations of a normal variable in one median absolute deviation.
_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Defect:
    """What outlier tokens have in common, in all images of a backbone.

    Args:
        direction: (C,) of unit length.
        size: how far along it the median outlier lies from an ordinary token, in the tokens' unit.
        images: how many images it was found in.
        share: of all tokens that carry it.

    Source: SINDER (arXiv 2407.16826): DINOv2's defect has one direction, within 5.5 degrees, in all images.
    """

    direction: Tensor
    size: float
    images: int = 1
    share: float = float("nan")

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or abs(float(self.direction.double().norm()) - 1) > 1e-3:
            raise ShapeError(
                f"a defect's direction is a (C,) vector of length 1, got shape {tuple(self.direction.shape)} and "
                f"length {float(self.direction.double().norm()):.4g}; divide it by its length"
            )
        if not 0 < self.size < float("inf"):
            raise ConfigError(f"a defect's size is {self.size}; it must be positive and finite")

    def along(self, tokens: Tensor) -> Tensor:
        """(...) lengths along the direction of tokens (..., C), in sizes."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.to(dtype) @ self.direction.to(tokens.device, dtype) / self.size


def defect_direction(maps: Iterable[Tensor], fewest_images: int = 2) -> Defect | None:
    """Find the direction that the outlier tokens of many images share.

    Args:
        maps: token maps (h, w, C) or (B, h, w, C) of different images; grids may differ. All are held in memory:
            some dozens of images are plenty.
        fewest_images: images that must have tokens of the defect; in a single one, content could look like it.

    Returns:
        The defect, or None where the images show none: too few of them, or tokens that fill the gap beneath it.

    Raises:
        ShapeError: a map is not (h, w, C) or (B, h, w, C), or C differs.
        NonFiniteError: a token is NaN or infinite.
    """
    images = [image for each in maps for image in _images(each)]
    if len({image.shape[-1] for image in images}) > 1:
        raise ShapeError(f"maps have different feature sizes {sorted({image.shape[-1] for image in images})}")
    if not images:
        return None
    tokens = torch.cat([image - image.median(0).values for image in images])
    owner = torch.cat([torch.full((len(image),), number) for number, image in enumerate(images)])
    direction, size, found, member = (each[0] for each in common_direction(tokens[None]))
    with_it = int(owner[member.cpu()].unique().numel())
    if not found or with_it < fewest_images:
        return None
    return Defect(direction, float(size), with_it, float(member.float().mean()))


def common_direction(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The direction of the long tokens of each of B sets, and whether it is a defect's.

    Args:
        tokens: (B, N, C) less what is ordinary at their place.

    Returns:
        direction (B, C), size (B,), found (B,) bool, and member (B, N) bool: the tokens that are long and point there.
        Nothing here waits for a GPU.
    """
    log = tokens.norm(dim=-1).clamp_min(torch.finfo(tokens.dtype).tiny).log()
    middle = log.median(-1, keepdim=True).values
    sigma = _MAD_TO_SIGMA * (log - middle).abs().median(-1, keepdim=True).values
    long = log > middle + SIGMAS * sigma
    unit = nnf.normalize(tokens, dim=-1)
    chosen = unit * long[..., None]
    direction = torch.linalg.eigh(chosen.mT @ chosen).eigenvectors[..., -1]
    sign = torch.where((chosen @ direction[..., None]).sum((1, 2)) < 0, -1, 1)
    direction = direction * sign[:, None]
    member = long
    for _ in range(ROUNDS):
        member = long & ((unit @ direction[..., None])[..., 0] > ALIGNED)
        direction = nnf.normalize(torch.einsum("bn,bnc->bc", member.to(tokens), tokens), dim=-1)
    along = (tokens @ direction[..., None])[..., 0]
    size = along.masked_fill(~member, float("nan")).nanmedian(-1).values
    share = along / size[:, None]
    between = ((share > GAP[0]) & (share < GAP[1])).sum(-1)
    count = member.sum(-1)
    found = (count >= FEWEST) & (between <= IN_GAP * count)
    return direction, size, found, member


class Screen:
    """Weights of 0 for the tokens of a defect, known or found in the first views of B images, and of 1 for others.

    What is ordinary at a position is the median over the views there: an artifact of the position is no defect.

    Args:
        first: (B, V, n, S) the first views' tokens, sketched; with a known defect (B, V, n, 1) lengths along it.
        known: whether the defect is.
    """

    def __init__(self, first: Tensor, known: bool):
        over = first if first.shape[1] >= FEWEST_VIEWS else first.flatten(1, 2)[:, :, None]
        self._ordinary = over.median(1, keepdim=True).values
        if known:
            self._per_size = first.new_ones(len(first), 1)
        else:
            direction, size, found, _ = common_direction((first - self._ordinary).flatten(1, 2))
            # Where there is none, no token lies along nothing.
            self._per_size = torch.where(found[:, None], direction / size[:, None], 0)
        self.first = self._of(first - self._ordinary, self._per_size[:, None])

    def weights(self, image: int, tokens: Tensor) -> Tensor:
        """(V, n) weights of an image's tokens (V, n, S), as in `first`."""
        return self._of(tokens - self._ordinary[image], self._per_size[image])

    @staticmethod
    def _of(tokens: Tensor, per_size: Tensor) -> Tensor:
        return ((tokens * per_size[..., None, :]).sum(-1) < CUT).to(tokens)


def _images(tokens: Tensor) -> list[Tensor]:
    """The (h w, C) float32 tokens of each image of a map or a batch of maps."""
    if tokens.ndim not in (3, 4) or tokens.numel() == 0:
        raise ShapeError(f"a token map is (h, w, C) or (B, h, w, C) and not empty, got {tuple(tokens.shape)}")
    if not tokens.isfinite().all():
        raise NonFiniteError("a token map holds NaN or infinity; compute it again, or use --dtype float32")
    batch = tokens if tokens.ndim == 4 else tokens[None]
    return [*batch.detach().float().flatten(1, 2)]
