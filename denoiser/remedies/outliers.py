"""Find the outliers among tokens, by their norms after each block, over several images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dvt.backbones import Backbone, families
from dvt.errors import BackboneError, ImageError
from dvt.images import ImageLike, read_image
from dvt.progress import Progress
from dvt.tokens import norm_bound
from dvt.views import resize

#: An outlier's norm is at least RATIO times the median, and its logarithm SIGMAS robust sigmas above that.
RATIO, SIGMAS = 2.0, 5.0
#: The smallest share of outliers that counts as a defect of the model: a tenth of that in DINOv2-g (Darcet et al.).
DEFECT_SHARE = 0.0025


@dataclass(frozen=True)
class OutlierTokens:
    """Mark the outlier tokens of several images, at the block with the most outliers.

    Args:
        masks: (n,) bool for each image's patches, row by row.
        block: index of the block after which norms were measured, or -1 for a backbone's own tokens.
        bound: the norm beyond which a token is an outlier.
        rising: the first block after which nine tenths of these tokens are outliers.
        share: share of outliers among all tokens.
    """

    masks: tuple[Tensor, ...]
    block: int
    bound: float
    rising: int
    share: float


def find_outliers(norms: Sequence[Sequence[Tensor]], name: str) -> OutlierTokens:
    """Find outliers from the norms of tokens.

    Args:
        norms: for each image, the norms (n,) of its patches after each block.
        name: name of the backbone, for the message.

    Raises:
        BackboneError: there are too few outliers after every block.
    """
    blocks = [torch.cat(each) for each in zip(*norms, strict=True)]
    bounds = [float(norm_bound(each.double(), SIGMAS, RATIO)) for each in blocks]
    found = [each > bound for each, bound in zip(blocks, bounds, strict=True)]
    shares = [float(each.double().mean()) for each in found]
    block = max(range(len(shares)), key=shares.__getitem__)
    if shares[block] < DEFECT_SHARE:
        raise BackboneError(
            f"{name} has no norm outliers to remove: at most {shares[block]:.3%} of its tokens, over {len(norms)} "
            f"images, have a norm of {RATIO:g} times the median and {SIGMAS:g} sigmas; a defect is {DEFECT_SHARE:.2%} "
            "and more. Nothing was changed; against artifacts of position use noise, insid3 or rasa, or dvt denoise"
        )
    own = found[block]
    rising = next(i for i, each in enumerate(found) if (each & own).sum() >= 0.9 * own.sum())
    masks = own.split([len(each[0]) for each in norms])
    return OutlierTokens(tuple(masks), block, bounds[block], rising, shares[block])


def block_norms(
    backbone: Backbone, images: Sequence[ImageLike], progress: Progress | None = None
) -> list[list[Tensor]]:
    """Compute the norms (n,) of each image's patch tokens after each block up to the backbone's layer.

    For a wrapped model there are only the norms of its own tokens.
    """
    if backbone.num_layers is None:
        return [[norms] for norms in _own_norms(backbone, images, progress)]
    model: Any = families.core(backbone.model)
    last = len(model.blocks) if backbone.layer == -1 else backbone.layer + 1
    layers = list(range(last))
    found = []
    for image in inputs(backbone, images, progress, "norms"):
        tokens = backbone.at_layers(image, layers)
        found.append([tokens[layer].patches.float().norm(dim=-1).flatten().cpu() for layer in layers])
    return found


def inputs(
    backbone: Backbone, images: Sequence[ImageLike], progress: Progress | None = None, what: str = "images"
) -> Iterator[Tensor]:
    """Read each image as (1, 3, H, W) at the backbone's input size, on its device.

    Raises:
        ImageError: there is no image, or one cannot be read.
    """
    if not len(images):
        raise ImageError("no image was given; this remedy is fitted to images, ten or more are better")
    for number, image in enumerate(images):
        pixels = read_image(image)
        size = backbone.input_size((pixels.shape[1], pixels.shape[2]))
        yield resize(pixels.to(backbone.device), size)[None]
        if progress:
            progress(what, number + 1, len(images))


@contextmanager
def entering(layers: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Record the inputs of some layers during a forward pass, by the layers' indices."""
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            seen[number] = args[0]

        return hook

    handles = [layer.register_forward_pre_hook(keep(number)) for number, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _own_norms(backbone: Backbone, images: Sequence[ImageLike], progress: Progress | None) -> Iterator[Tensor]:
    for image in inputs(backbone, images, progress, "norms"):
        yield backbone(image).patches.float().norm(dim=-1).flatten().cpu()
