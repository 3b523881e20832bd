"""Remove the defect direction, along which the outlier tokens of all images lie.

Source: SINDER (arXiv 2407.16826), which finds the direction in DINOv2's weights and fine-tunes them. Here the direction
is projected out of the tokens that lie far along it, without training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvt.backbones import Backbone, families
from dvt.denoiser.config import DenoiserConfig
from dvt.denoiser.model import Denoiser
from dvt.denoiser.remedies.install import FAMILIES, timm_model
from dvt.denoiser.remedies.outliers import find_outliers
from dvt.denoiser.variants import checked_maps
from dvt.errors import BackboneError, ShapeError

logger = logging.getLogger(__name__)

#: The final norm divides an outlier by its own size, so the rest of it, without the direction, is too small, and is
#: scaled up if it is this much smaller than other tokens; smaller differences are natural: outliers lie on flat areas.
_SQUEEZED = 2.0
#: Random tokens per channel for the least squares of a block.
_SAMPLES = 8


def fit_defect(
    maps: Iterable[Tensor],
    masks: Sequence[Tensor] | None = None,
    direction: Tensor | None = None,
    name: str = "this model",
) -> Denoiser:
    """Find the direction in which outlier tokens differ from the others, and the limit beyond which they are outliers.

    The direction is the leading principal direction of the outliers' unit vectors from the mean of the other tokens,
    over all images; the card holds its median angle with them ("angle", degrees; SINDER measures 5.5 in DINOv2). The
    limit is the larger of 5 robust sigmas and the 99.9th percentile of the other tokens' distances from their median
    along the direction.

    Args:
        maps: (h, w, C) raw token maps of several images, of any grids; kept in memory.
        masks: for each map (h w,), True for outliers; None finds them by their norms.
        direction: (C,) a known direction, such as from :func:`predict_defect`; None computes it from the outliers.
        name: name of the backbone, for messages.

    Returns:
        A denoiser of kind "defect", which does not change tokens within the limit.

    Raises:
        BackboneError: there are no outliers, or the direction does not separate them from the other tokens.
        ShapeError: there are no maps, or the maps or the direction differ in feature size.
        NonFiniteError: a map holds NaN or infinity.

    >>> maps = torch.randn(4, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    >>> maps[:, 2, 3, 0] += 40
    >>> clean = fit_defect(maps)(maps)
    >>> bool(clean.norm(dim=-1).max() < 10), torch.equal(clean[:, 3:], maps[:, 3:])
    (True, True)
    """
    tokens = [each.float().flatten(0, 1) for each in checked_maps(maps)]
    if masks is None:
        masks = find_outliers([[each.norm(dim=-1)] for each in tokens], name).masks
    values, chosen = torch.cat(tokens), torch.cat(list(masks)).to(tokens[0].device)
    mean = values[~chosen].mean(0)
    away = values - mean
    own = direction is None
    unit = _leading(away[chosen]) if direction is None else _checked_direction(direction, away, chosen)
    along = away @ unit
    cosines = along[chosen] / away[chosen].norm(dim=-1).clamp(min=1e-12)
    bounds = _bounds(along, away - along[:, None] * unit, chosen, name)
    denoiser = Denoiser(DenoiserConfig("defect", values.shape[1], (1, 1)))
    for held, value in ((denoiser.body.mean, mean), (denoiser.body.direction, unit), (denoiser.body.bounds, bounds)):
        held.copy_(value)
    beyond = (along - bounds[1]).abs() > bounds[0]
    denoiser.card = {
        "angle": float(cosines.median().clamp(-1, 1).acos().rad2deg()),
        "direction": "pooled over outliers" if own else "given",
        "outliers_before": float(chosen.double().mean()),
        "outliers_beyond_the_limit": float(beyond[chosen].double().mean()),
        "others_beyond_the_limit": float(beyond[~chosen].double().mean()),
    }
    return denoiser.eval()


@torch.no_grad()
def predict_defect(backbone: Backbone, block: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Predict the defect direction (C,), which a model's weights amplify in any image, from the weights alone.

    It is the leading left singular vector of the product of the linearised blocks (SINDER, section 4). A block is
    linearised by least squares over random tokens of unit variance, each alone in its sequence, so that its attention
    is the value and output projection. If the backbone has a final norm, its affine part is applied.

    Args:
        backbone: a timm model of plain transformer blocks.
        block: the last block of the product; None takes the backbone's layer.
        generator: draws the random tokens; None takes one seeded with 0.

    Returns:
        A unit vector. Its sign is arbitrary, as that of any singular vector; :func:`fit_defect` turns it towards
        outliers.

    Raises:
        BackboneError: the backbone is wrapped, or its blocks are not transformer blocks on one sequence.
    """
    inner: Any = families.core(timm_model(backbone))
    if type(inner).__name__ not in FAMILIES:
        raise BackboneError(
            f"the defect of {type(inner).__name__} cannot be predicted from its weights: that needs plain transformer "
            f"blocks ({', '.join(FAMILIES)}); fit it to images instead (dvt remedy defect)"
        )
    generator = generator or torch.Generator().manual_seed(0)
    count = len(inner.blocks) if backbone.layer == -1 else backbone.layer + 1
    product: Tensor | None = None
    for each in inner.blocks[: count if block is None else block + 1]:
        matrix = _linearised(each, backbone.device, generator)
        product = matrix if product is None else matrix @ product
        product = product / product.norm()
    assert product is not None  # every timm model here has blocks
    vector = torch.linalg.svd(product)[0][:, 0]
    norm = getattr(inner, "norm", None)
    if backbone.layer == -1 and isinstance(norm, nn.LayerNorm):
        vector = vector - vector.mean()
        vector = vector if norm.weight is None else vector * norm.weight.detach().double().cpu()
    return (vector / vector.norm()).float()


def _linearised(block: nn.Module, device: torch.device, generator: torch.Generator) -> Tensor:
    """Fit x -> M x + c to a block by least squares over single random tokens: M (C, C), float64."""
    weight = next(p for p in block.parameters())
    channels = next(m.normalized_shape[0] for m in block.modules() if isinstance(m, nn.LayerNorm))
    x = torch.randn(_SAMPLES * channels, channels, generator=generator)
    y = torch.cat([block(part[:, None].to(device, weight.dtype))[:, 0].float().cpu() for part in x.split(1024)])
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return torch.linalg.solve(x.T @ x, x.T @ y).T


def _leading(vectors: Tensor) -> Tensor:
    """Find the leading direction (C,) of the unit vectors along (n, C), with the sign of most of them."""
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    leading = torch.linalg.eigh(units.T @ units)[1][:, -1]
    return (leading * torch.sign((units @ leading).sum())).float()


def _checked_direction(direction: Tensor, away: Tensor, chosen: Tensor) -> Tensor:
    """Normalise a given direction to length 1, and turn it towards the outliers."""
    if direction.shape != away.shape[1:] or not direction.isfinite().all() or not direction.norm() > 0:
        raise ShapeError(
            f"the direction must be ({away.shape[1]},), as the tokens' channels, finite and not zero; "
            f"got {tuple(direction.shape)}"
        )
    unit = (direction / direction.norm()).to(away)
    return unit * torch.sign((away[chosen] @ unit).median())


def _bounds(along: Tensor, rest: Tensor, chosen: Tensor, name: str) -> Tensor:
    """Compute (limit, centre, scale) of the removal."""
    centre = along[~chosen].median()
    far = (along - centre).abs()
    own = far[~chosen].sort().values
    limit = torch.maximum(5 * 1.4826 * own[len(own) // 2], own[int(0.999 * (len(own) - 1))])
    caught = float((far[chosen] > limit).double().mean())
    if caught < 0.5:
        raise BackboneError(
            f"the direction does not separate the outliers of {name} from its other tokens: only {caught:.0%} of the "
            "outliers lie beyond the limit along it. Nothing was changed; use the remedy registers, or dvt denoise"
        )
    sizes = rest.norm(dim=-1)
    scale = sizes[~chosen].median() / sizes[chosen].median().clamp(min=1e-12)
    return torch.stack((limit, centre, scale if scale > _SQUEEZED else torch.ones_like(scale)))
