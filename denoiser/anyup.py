"""Upsample features by AnyUp, a learned upsampler for any backbone, from its published weights.

Source: Wimmer et al., "AnyUp: Universal Feature Upsampling", 2025 (arXiv 2510.12764). The network is written anew here,
for the names in the published weights, which are the authors' (CC BY 4.0) and not part of dvt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt import grids
from dvt.backbones import IMAGENET_MEAN, IMAGENET_STD
from dvt.backbones.weights import read_state
from dvt.errors import ConfigError, ShapeError, WeightsError
from dvt.grids import Size

URLS = {
    "anyup": "https://github.com/wimmerth/anyup/releases/download/checkpoint_v2/anyup_multi_backbone.pth",
    "anyup-dinov2": "https://github.com/wimmerth/anyup/releases/download/checkpoint/anyup_paper.pth",
}
"""The authors' weights by name: trained on features of several backbones, and on those of DINOv2 ViT-S/14 alone."""

_HEADS, _GROUPS, _WINDOW = 4, 8, 0.1  # of the published models; a window is this share of the image to each side
_SCORES = 1 << 25  # attention scores held at once
_NEEDED = (
    *("image_encoder.0.weight", "key_encoder.0.weight", "query_encoder.0.weight", "aggregation.0.weight"),
    *("key_features_encoder.0.basis", "rope.freqs", "cross_decode.conv2d.weight"),
    *("cross_decode.cross_attn.norm_q.weight", "cross_decode.cross_attn.norm_k.weight"),
    *("cross_decode.cross_attn.attention.in_proj_weight", "cross_decode.cross_attn.attention.in_proj_bias"),
)


class AnyUp:
    """Upsample token maps, guided by their image, by attention that was learned on other images.

    Each cell of the result is a mean of the tokens near it, weighted by a network that sees the image and the tokens.

    Args:
        state: the weights, by the names of the published files.

    Raises:
        WeightsError: a tensor is missing.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        if missing := [name for name in _NEEDED if name not in state]:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise WeightsError(f"these are no weights of AnyUp: {missing[0]!r} is missing{more}")
        self.state = {name: value.float() for name, value in state.items()}

    @classmethod
    def load(cls, source: str | Path) -> AnyUp:
        """Load the weights from a file, or by a name in :data:`URLS` from the authors' release.

        Raises:
            WeightsError: the file is missing, damaged, or of something else; or it cannot be downloaded.
        """
        if str(source) in URLS and not os.path.exists(source):
            try:
                state = torch.hub.load_state_dict_from_url(URLS[str(source)], map_location="cpu", weights_only=True)
            except Exception as error:  # of the network, of the file
                raise WeightsError(
                    f"cannot download {URLS[str(source)]} ({error}); download it elsewhere, and give the file"
                ) from error
        else:
            state = read_state(source)
        return cls(state)

    def to(self, device: str | torch.device) -> AnyUp:
        """Copy the weights to a device."""
        return AnyUp({name: value.to(device) for name, value in self.state.items()})

    @torch.no_grad()
    def upsample(self, tokens: Tensor, image: Tensor, factor: int | None = None, *, size: Size | None = None) -> Tensor:
        """Upsample a token map, as :func:`dvt.upsample` does.

        Args:
            tokens: (h, w, C).
            image: (3, H, W) RGB in [0, 1] of the same area; it is seen at its own resolution.
            factor: number of cells per token and side.
            size: (H', W') of the result, instead of a factor.

        Returns:
            (H', W', C), in the dtype of the tokens.

        Raises:
            ShapeError: tokens or image have other shapes.
            ConfigError: neither or both of factor and size are given, or the result would be smaller than the grid.
        """
        if tokens.ndim != 3 or image.ndim != 3 or image.shape[0] != 3:
            raise ShapeError(
                f"tokens {tuple(tokens.shape)} and image {tuple(image.shape)} must be (h, w, C), (3, H, W)"
            )
        grid = (tokens.shape[0], tokens.shape[1])
        if (factor is None) == (size is None) or (factor is not None and factor < 1):
            raise ConfigError(f"give either a factor of 1 or more or a size, got factor {factor} and size {size}")
        wanted = size or (grid[0] * int(factor or 1), grid[1] * int(factor or 1))
        if any(a < b for a, b in zip(wanted, grid, strict=True)):
            raise ConfigError(f"the size {wanted} is smaller than the grid {grid}")
        values = tokens.float().to(self.state["rope.freqs"].device)
        seen = self._seen(image.to(values))
        queries = nnf.adaptive_avg_pool2d(self._encoded("query_encoder", seen), wanted)
        queries = nnf.conv2d(queries, self.state["cross_decode.conv2d.weight"], padding=1)
        return self._attended(queries, self._keys(seen, values), values).to(tokens)

    def _seen(self, image: Tensor) -> Tensor:
        """Encode an image to (1, D, H, W), and turn the channels by the place in the image (rotary embedding)."""
        mean, std = (image.new_tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
        x = self._encoded("image_encoder", ((image - mean) / std)[None])
        places = grids.node_coords((x.shape[2], x.shape[3]), x.device).flip(-1)  # (y, x), from edge to edge
        angle = (places @ self.state["rope.freqs"]).movedim(-1, 0)
        first, second = x.chunk(2, dim=1)
        return x * angle.cos() + torch.cat((-second, first), dim=1) * angle.sin()

    def _keys(self, seen: Tensor, tokens: Tensor) -> Tensor:
        """Encode image and tokens to keys (1, D, h, w)."""
        grid = (tokens.shape[0], tokens.shape[1])
        own = nnf.adaptive_avg_pool2d(self._encoded("key_encoder", seen), grid)
        unified = _unified(nnf.normalize(tokens, dim=-1), self.state["key_features_encoder.0.basis"])
        of_tokens = self._blocks("key_features_encoder", unified)
        return self._encoded("aggregation", torch.cat((own, of_tokens), dim=1))

    def _encoded(self, name: str, x: Tensor) -> Tensor:
        """Apply a convolution and residual blocks."""
        weight = self.state[f"{name}.0.weight"]
        reach = weight.shape[-1] // 2
        padded = nnf.pad(x, (reach,) * 4, mode="reflect") if reach else x
        return self._blocks(name, nnf.conv2d(padded, weight))

    def _blocks(self, name: str, x: Tensor) -> Tensor:
        number = 1
        while f"{name}.{number}.block.2.weight" in self.state:
            part = {k.removeprefix(f"{name}.{number}."): v for k, v in self.state.items() if f"{name}.{number}." in k}
            y = x
            for norm, conv in ((0, 2), (3, 5)):
                y = nnf.group_norm(y, _GROUPS, part[f"block.{norm}.weight"], part[f"block.{norm}.bias"])
                y = nnf.conv2d(nnf.silu(y), part[f"block.{conv}.weight"])
            x = y + (nnf.conv2d(x, part["shortcut.weight"]) if "shortcut.weight" in part else x)
            number += 1
        return x

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Average the tokens (h, w, C) around each cell of queries (1, D, H', W'), a few rows at a time."""
        at = "cross_decode.cross_attn."
        query, key = (x[0].movedim(0, -1) for x in (queries, keys))
        width = query.shape[-1]
        query, key = (
            nnf.rms_norm(x, (width,), self.state[f"{at}norm_{name}.weight"], torch.finfo(x.dtype).eps)
            for name, x in (("q", query), ("k", key))
        )
        weights = self.state[f"{at}attention.in_proj_weight"].chunk(3)
        biases = self.state[f"{at}attention.in_proj_bias"].chunk(3)
        query, key = (
            nnf.linear(x, w, b).unflatten(-1, (_HEADS, width // _HEADS))
            for x, w, b in zip((query, key), weights, biases, strict=False)
        )
        down, across = (_near(n, m, query.device) for n, m in zip(query.shape[:2], key.shape[:2], strict=True))
        rows = max(1, _SCORES // (_HEADS * query.shape[1] * key.shape[0] * key.shape[1]))
        result = []
        for start in range(0, len(query), rows):
            inside = down[start : start + rows]
            some = inside.any(0)  # key rows that any of these cells is near to
            scores = (
                torch.einsum("ijnd,klnd->nijkl", query[start : start + rows], key[some]) * (width // _HEADS) ** -0.5
            )
            near = inside[:, None, some, None] & across[None, :, None, :]
            shares = scores.masked_fill(~near, -torch.inf).flatten(3).softmax(-1).mean(0)
            result.append(shares @ values[some].flatten(0, 1))
        return torch.cat(result)


def _near(count: int, length: int, device: torch.device) -> Tensor:
    """Tell which of `length` tokens along a side lie within the window of each of `count` cells: (count, length)."""
    centre = grids.grid_centres((count, 1), device)[:, 0, 1]
    first = ((centre - _WINDOW).clamp(0, 1) * length).floor()
    last = ((centre + _WINDOW).clamp(0, 1) * length).ceil()
    place = torch.arange(length, device=device)
    return (place >= first[:, None]) & (place < last[:, None])


def _unified(tokens: Tensor, basis: Tensor) -> Tensor:
    """Turn any number of channels C (h, w, C) into (1, D, h, w), by D small filters whose answers are shared out.

    The published network was trained with the C x D answers read as D x C, so that each group of C that a softmax
    compares mixes filters and channels; it is the same here.
    """
    height, width, channels = tokens.shape
    reach = basis.shape[-1] // 2
    maps = nnf.pad(tokens.movedim(-1, 0)[:, None], (reach,) * 4)
    ones = nnf.pad(tokens.new_ones(1, 1, height, width), (reach,) * 4)
    rows = max(1, _SCORES // (channels * len(basis) * width))
    result = []
    for start in range(0, height, rows):
        band = slice(start, min(start + rows, height) + 2 * reach)
        covered = nnf.conv2d(ones[:, :, band], torch.ones_like(basis[:1]))
        answers = nnf.conv2d(maps[:, :, band], basis) / covered
        result.append(answers.reshape(len(basis), channels, *answers.shape[2:]).softmax(0).mean(1))
    return torch.cat(result, dim=1)[None]
