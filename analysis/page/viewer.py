"""Compress the token maps of an analysis to 8 bits, for pictures and the interactive report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvt.tokens import Tokens
from dvt.views import resize

# Twelve images have to fit into a page of 8 MB, where base64 adds a third.
_BUDGET_BYTES = 5_000_000
_MOST_DIRECTIONS = 48
_JPEG_SIDE = 336
_NORM_BINS = 60


@dataclass(frozen=True)
class Shown:
    """Hold a token map to show.

    Args:
        image: its index in the report's images.
        backbone: label.
        layer: -1 for the final one.
        variant: "raw", a term or a denoiser.
        tokens: (h, w, C).
    """

    image: int
    backbone: str
    layer: int
    variant: str
    tokens: Tensor


class Arrays:
    """Collect a report's arrays and an index that describes them."""

    def __init__(self) -> None:
        self.index: dict[str, list[dict[str, Any]]] = {"jpegs": [], "maps": [], "positions": [], "norms": []}
        self.arrays: dict[str, np.ndarray] = {}

    def _add(self, kind: str, array: np.ndarray, **fields: Any) -> None:
        name = f"{kind}_{len(self.index[kind]):04d}"
        self.index[kind].append({"array": name, **fields})
        self.arrays[name] = array

    def add_jpeg(self, image: int, pixels: Tensor) -> None:
        """Add a small JPEG of an image (3, H, W) in [0, 1]."""
        self._add("jpegs", np.frombuffer(_jpeg(pixels), dtype=np.uint8), image=image)

    def add_maps(self, maps: Sequence[Shown]) -> None:
        """Add all token maps at once: those of one backbone and layer share their principal directions."""
        groups: dict[tuple[str, int], list[Shown]] = {}
        for each in maps:
            groups.setdefault((each.backbone, each.layer), []).append(each)
        patches = sum(each.tokens.shape[0] * each.tokens.shape[1] for each in maps)
        count = max(3, min(_MOST_DIRECTIONS, _BUDGET_BYTES // max(1, patches)))
        for group in groups.values():
            for each, (values, scale) in zip(group, quantise([item.tokens for item in group], count), strict=True):
                self._add(
                    "maps",
                    values,
                    image=each.image,
                    backbone=each.backbone,
                    layer=each.layer,
                    variant=each.variant,
                    scale=scale,
                )

    def add_position(self, backbone: str, layer: int, variant: str, artifact: Tensor) -> None:
        """Add the norm of an artifact (h, w, C) at each position."""
        norm = artifact.float().norm(dim=-1).cpu().numpy()
        self._add("positions", norm, backbone=backbone, layer=layer, variant=variant)

    def add_norms(self, backbone: str, layer: int, tokens: Mapping[str, Sequence[Tokens]]) -> None:
        """Add histograms of the token norms of one layer's variants, over common bins."""
        norms = {
            variant: np.concatenate([each.patches.float().norm(dim=-1).flatten().cpu().numpy() for each in maps])
            for variant, maps in tokens.items()
        }
        edges = np.linspace(0, max(float(each.max()) for each in norms.values()) * 1.0001 + 1e-9, _NORM_BINS + 1)
        for variant, values in norms.items():
            counts = np.histogram(values, edges)[0].astype(np.int64)
            self._add("norms", counts, backbone=backbone, layer=layer, variant=variant, edges=edges.tolist())


def quantise(maps: Sequence[Tensor], count: int) -> list[tuple[np.ndarray, float]]:
    """Compute the coordinates of token maps along their principal directions, as 8-bit integers.

    Args:
        maps: (h, w, C) each; grids may differ.
        count: the largest number of directions D.

    Returns:
        For each map the int8 (h, w, D) values and the scale: their product is the map without its mean over
        positions, in D orthonormal directions that all maps share.
    """
    centred = [(each.float() - each.float().mean((0, 1))).cpu() for each in maps]
    channels = centred[0].shape[-1]
    covariance = torch.zeros(channels, channels, dtype=torch.float64)
    for each in centred:
        rows = each.flatten(0, 1).double()
        covariance += rows.T @ rows / len(rows)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : min(count, channels)].float()
    found = []
    for each in centred:
        values = each @ directions
        scale = max(float(values.abs().max()) / 127, 1e-12)
        found.append(((values / scale).round().clamp(-127, 127).to(torch.int8).numpy(), scale))
    return found


def _jpeg(pixels: Tensor) -> bytes:
    from PIL import Image

    height, width = pixels.shape[1:]
    scale = min(1.0, _JPEG_SIDE / max(height, width))
    small = resize(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))
    values = (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(values).save(out, "JPEG", quality=80)
    return out.getvalue()
