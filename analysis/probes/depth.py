"""Predict metric depth from frozen tokens: a linear head over depth bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.analysis.probes.probe import (
    HeadConfig,
    Maps,
    Probe,
    check_maps,
    enlarged,
    fitted,
    grid_of,
    linear_head,
    train_head,
)
from dvt.errors import ConfigError, DataError, ShapeError
from dvt.grids import Size

# Share of the squared mean error that the loss ignores: 1 would leave the scale free (Eigen et al. take .5).
_FORGIVEN = 0.85
_DEPTH_BINS = 256


class DepthProbe(Probe):
    """Predict depth by BatchNorm and a 1x1 convolution to 256 bins, as the softmax-weighted mean of the bin centres.

    The bins lie evenly in depth or in its logarithm, between the extremes of the training images; in the logarithm the
    mean is taken there too. Depth is enlarged bilinearly. The loss is the scale-invariant logarithmic one, over pixels
    with a measurement.

    Args:
        bins: "log" or "linear".
        config: training settings.

    Source:
        Bins: AdaBins (Bhat et al., 2021) and DINOv2 (section 7.4); loss: Eigen et al., 2014, equation 4.
    """

    metric = "AbsRel"
    lower_is_better = True
    seeded = True

    def __init__(self, bins: Literal["log", "linear"] = "log", config: HeadConfig | None = None) -> None:
        if bins not in ("log", "linear"):
            raise ConfigError(f"bins is {bins!r}; it must be 'log' or 'linear'")
        self.bins = bins
        self.config = config or HeadConfig()
        self.head: nn.Module | None = None
        self.depths: tuple[float, float] | None = None

    def fit(self, tokens: Maps, targets: Sequence[Tensor]) -> DepthProbe:
        channels = check_maps(tokens, targets)
        self.depths = _extremes(targets)
        generator = torch.Generator().manual_seed(self.config.seed)
        head = self.empty_head(channels, self.depths, generator)
        self.head = train_head(head, _log_loss, tokens, targets, self.config, generator, self.centres)
        return self

    def empty_head(
        self, channels: int, depths: tuple[float, float], generator: torch.Generator | None = None
    ) -> nn.Module:
        """Make an untrained head for maps of C channels and depths between two bounds in metres."""
        head = linear_head(channels, _DEPTH_BINS, generator or torch.Generator())
        return nn.Sequential(*head, _Expectation(self.bins, *depths))

    @torch.no_grad()
    def predict(self, tokens: Maps, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Predict the depth of each image, (H, W) float32 metres, between the extremes of the training images."""
        head = fitted(self.head, self)
        found = []
        for i in range(len(tokens)):
            one = tokens[i].float()
            if one.shape[-1] != head[0].num_features:
                raise ShapeError(
                    f"tokens have {one.shape[-1]} channels; this probe was fitted on {head[0].num_features}"
                )
            size = grid_of(one) if sizes is None else sizes[i]
            found.append(enlarged(head(one.permute(2, 0, 1)[None]), size, self.centres)[0, 0])
        return found

    def sufficient_statistics(self, tokens: Maps, targets: Sequence[Tensor]) -> Tensor:
        """Compute 1, AbsRel, RMSE and delta1 of each image, (N, 4); zeros where the image has no measurement."""
        check_maps(tokens, targets)
        found = self.predict(tokens, [(target.shape[0], target.shape[1]) for target in targets])
        return torch.stack([depth_errors(p.cpu(), t) for p, t in zip(found, targets, strict=True)])

    @staticmethod
    def summarise(statistics: Tensor) -> dict[str, Tensor]:
        """Average AbsRel, RMSE (metres) and delta1 (share in [0, 1]) over images, as the field reports them."""
        means = statistics[..., 1:] / statistics[..., :1]
        return dict(zip(("AbsRel", "RMSE", "delta1"), means.unbind(-1), strict=True))


class _Expectation(nn.Module):
    """Turn (B, 256, h, w) logits into (B, 1, h, w) depth."""

    centres: Tensor

    def __init__(self, bins: str, low: float, high: float) -> None:
        super().__init__()
        self.log = bins == "log"
        ends = (math.log(low), math.log(high)) if self.log else (low, high)
        self.register_buffer("centres", torch.linspace(*ends, _DEPTH_BINS))

    def forward(self, logits: Tensor) -> Tensor:
        depth = torch.einsum("bkhw,k->bhw", logits.softmax(1), self.centres)[:, None]
        return depth.exp() if self.log else depth


def _log_loss(depth: Tensor, truth: Tensor) -> Tensor:
    known = truth > 0
    if not bool(known.any()):
        return 0.0 * depth.sum()
    error = depth[:, 0][known].log() - truth[known].log()
    return (error.square().mean() - _FORGIVEN * error.mean().square()).clamp(min=1e-10).sqrt()


def depth_errors(depth: Tensor, truth: Tensor) -> Tensor:
    """Compute (4,) float64: 1, AbsRel = mean |d - d*| / d*, RMSE, delta1 = share with max(d / d*, d* / d) < 1.25.

    Pixels without measurement (0) are left out; without any pixel all four are 0.
    """
    if depth.shape != truth.shape:
        raise ShapeError(f"predictions {tuple(depth.shape)} and depth {tuple(truth.shape)} differ in shape")
    known = truth > 0
    if not bool(known.any()):
        return torch.zeros(4, dtype=torch.float64)
    found, true = depth[known].double(), truth[known].double()
    difference = (found - true).abs()
    ratio = torch.maximum(found / true, true / found)
    values = ((difference / true).mean(), difference.square().mean().sqrt(), (ratio < 1.25).double().mean())
    return torch.stack((torch.ones_like(values[0]), *values))


#: Parts (top, bottom, left, right) of an image in which depth is scored, as shares of its sides: rows 45 to 471 and
#: columns 41 to 601 of NYU's 480 x 640, and the two of KITTI (Eigen et al., 2014; Garg et al., 2016).
CROPS: dict[str, tuple[float, float, float, float]] = {
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "eigen": (0.3324324, 0.91351351, 0.03594771, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}


def kept_depth(truth: Tensor, low: float, high: float | None, crop: str = "none") -> Tensor:
    """Mark depths outside of a range and of a part of the image as not measured (0).

    Args:
        truth: (H, W) metres.
        low, high: range in metres, its lower end excluded; None sets no upper end.
        crop: "none" or a name in :data:`CROPS`.

    >>> kept_depth(torch.tensor([[0.5, 1.0, 9.0]]), 0.5, 8.0)
    tensor([[0., 1., 0.]])
    """
    kept = (truth > low) & (truth <= (math.inf if high is None else high))
    if crop != "none":
        rows, columns = grids.share_of((truth.shape[0], truth.shape[1]), CROPS[crop])
        inside = torch.zeros_like(kept)
        inside[rows, columns] = True
        kept &= inside
    return torch.where(kept, truth, 0.0)


def _extremes(targets: Sequence[Tensor]) -> tuple[float, float]:
    """Find the smallest and largest depth of all pixels with a measurement."""
    low, high = math.inf, 0.0
    for i, target in enumerate(targets):
        if not bool(target.isfinite().all()) or float(target.min()) < 0:
            raise DataError(f"depth map {i} holds a negative, infinite or NaN value; 0 marks a missing measurement")
        known = target[target > 0]
        if len(known):
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    if not high:
        raise DataError(f"all {len(targets)} training depth maps are zero: there is no measurement to learn from")
    return low, high if high > low else low * 1.001
