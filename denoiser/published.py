"""Find and read the checkpoints that the authors of Denoising ViT publish.

A denoiser's file is a dict whose "denoiser" holds ``pos_embed`` (1, n n, C) and the names of a timm Block after
``denoiser.`` (with several blocks after ``denoiser.0.``, ``denoiser.1.``, ...). A distilled backbone's file is a dict
whose "model" holds timm's names after ``model.``. Both are read with ``weights_only``: code in a file is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import Tensor

from dvt.backbones.hub import hub_or_cache, without_hub
from dvt.backbones.weights import State, read_content
from dvt.denoiser.config import HEAD_DIM
from dvt.errors import WeightsError

REPOSITORY = "jjiaweiyang/DVT"

_DISTILLED_BACKBONES = (
    "deit3_base_patch16_224.fb_in1k",
    "eva02_base_patch16_clip_224.merged2b",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_224.dino",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_384.augreg_in21k_ft_in1k",
    "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
)
_SMALL_AND_LARGE = (
    "vit_large_patch14_dinov2.lvd142m",
    "vit_large_patch14_reg4_dinov2.lvd142m",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
)

#: For each folder of the repository, the timm models whose results the authors report; a file is FOLDER/NAME.pth.
#: "denoised" folders hold denoisers, "distilled" ones whole backbones; the first part names the training images.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "voc_denoised": tuple(sorted(_DISTILLED_BACKBONES + _SMALL_AND_LARGE)),
    "voc_distilled": _DISTILLED_BACKBONES,
    "imgnet_denoised": ("vit_base_patch14_dinov2.lvd142m",),
    "imgnet_distilled": ("vit_base_patch14_dinov2.lvd142m",),
}

DISTILLED_HELP = (
    "{folder} holds whole distilled backbones; denoisers are in voc_denoised and imgnet_denoised. Load this backbone "
    "with dvt.load_backbone({name!r}, weights=dvt.denoiser.published_file({name!r}, {folder!r}))"
)

#: Names of the parameters of a transformer block.
_IN_BLOCK = re.compile(
    r"denoiser\.(?:(\d+)\.)?((?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(?:weight|bias))"
)


def published_file(name: str, folder: str = "voc_denoised", **options: Any) -> Path:
    """Download one published checkpoint, or find it in the hub's cache.

    Args:
        name: a timm model name with its tag.
        folder: a folder of the repository; :data:`PUBLISHED` lists them.
        options: options of :func:`huggingface_hub.hf_hub_download`: revision, token, cache_dir, local_files_only, ...

    Raises:
        WeightsError: the download failed; the message lists the known published files.
    """
    listed, why = name in PUBLISHED.get(folder, ()), None
    try:
        with hub_or_cache() as why:
            return Path(hf_hub_download(REPOSITORY, f"{folder}/{name}.pth", **options))
    except Exception as error:  # each release of the hub's client raises its own kinds
        if listed and why is not None:
            file = f"{folder}/{name}.pth"
            raise WeightsError(without_hub(file, why, REPOSITORY, file, "Denoiser.from_pretrained(FILE)")) from error
        known = "; ".join(f"{where}: {', '.join(names)}" for where, names in PUBLISHED.items())
        hint = "is the network reachable?" if listed else f"known published files are {known}"
        raise WeightsError(
            f"cannot get {folder}/{name}.pth of {REPOSITORY}: {type(error).__name__}: {error}\n{hint}"
        ) from error


def published_denoiser(path: str | Path) -> tuple[dict[str, Any], dict[str, Any], State]:
    """Read a published denoiser's file; return the settings of a DenoiserConfig, a card, and tensors by dvt's names.

    The grid is square; its side is the square root of the embedding's length.

    Raises:
        WeightsError: the file is missing or damaged, holds pickled code, or holds no such denoiser.
    """
    path = Path(path)
    content = read_content(path)
    held = content.get("denoiser") if isinstance(content, Mapping) else None
    if not isinstance(held, Mapping):
        raise WeightsError(
            f"{path} holds no published denoiser: a dict with an entry 'denoiser' is needed, got "
            f"{sorted(map(str, content))[:4] if isinstance(content, Mapping) else type(content).__name__}. A distilled "
            "backbone (an entry 'model') is read with dvt.load_backbone(name, weights=file)"
        )
    places = {str(name): _IN_BLOCK.fullmatch(str(name)) for name in held if name != "pos_embed"}
    unknown = [name for name, place in places.items() if not place]
    unknown += [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
    if unknown or not places:
        raise WeightsError(
            f"{path} is not a denoiser made of plain transformer blocks: it holds {unknown[:4] or 'no block'}"
        )
    state = {f"body.blocks.{place[1] or 0}.{place[2]}": held[name] for name, place in places.items() if place}
    depth = 1 + max(int(place[1] or 0) for place in places.values() if place)
    return _settings(path, state, held.get("pos_embed"), depth), _card(path), state


def _settings(path: Path, state: State, position: Tensor | None, depth: int) -> dict[str, Any]:
    """Infer the settings from the shapes of the tensors; add the position embedding to the state."""
    hidden = state.get("body.blocks.0.mlp.fc1.weight")
    if hidden is None or hidden.ndim != 2:
        raise WeightsError(f"{path} lacks the weight of mlp.fc1 (hidden, C), which gives the feature size")
    channels = hidden.shape[1]
    side = 1
    if position is not None:
        side = math.isqrt(position.shape[1]) if position.ndim == 3 else 0
        if position.ndim != 3 or tuple(position.shape) != (1, side * side, channels):
            raise WeightsError(
                f"{path} has a pos_embed of shape {tuple(position.shape)}; a square grid has (1, n n, {channels})"
            )
        state["body.pos_embed"] = position
    return {
        "kind": "block",
        "feature_dim": channels,
        "grid": (side, side),
        "num_heads": max(1, channels // HEAD_DIM),
        "depth": depth,
        "mlp_ratio": hidden.shape[0] / channels,
        "position": position is not None,
    }


def _card(path: Path) -> dict[str, Any]:
    """Make a card from a file's name; published denoisers are for the last layer, after the norm."""
    known = any(path.stem in names for names in PUBLISHED.values())
    return {"layer": -1, "source": REPOSITORY} | ({"backbone": path.stem} if known else {})


def published_backbone_state(path: str | Path) -> State:
    """Read the tensors of a published distilled backbone, by timm's names.

    ``dvt.load_backbone(name, weights=path)`` also reads such a file; use this function for a timm model of your own.

    Raises:
        WeightsError: the file is missing or damaged, holds pickled code, or holds no distilled backbone.
    """
    content = read_content(Path(path))
    held = content.get("model") if isinstance(content, Mapping) else None
    state = {
        str(name).removeprefix("model."): value
        for name, value in (held.items() if isinstance(held, Mapping) else ())
        if str(name).startswith("model.") and isinstance(value, Tensor)
    }
    if not state:
        raise WeightsError(
            f"{path} holds no distilled backbone: a dict with an entry 'model' of tensors named model.* is needed. "
            "A denoiser (an entry 'denoiser') is read with dvt.denoiser.Denoiser.from_pretrained(file)"
        )
    return state
