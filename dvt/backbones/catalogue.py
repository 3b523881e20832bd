"""Describe what each timm family supports, tried on its smallest model with random weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dvt.backbones import families
from dvt.backbones.backbone import Backbone
from dvt.backbones.load import load_backbone, single_scale_models
from dvt.errors import DvtError
from dvt.grids import Size

logger = logging.getLogger(__name__)

#: The smallest architecture of each family by parameters, at timm 1.0.31; `family_table` recomputes them.
SMALLEST = {
    "beit": "beit_base_patch16_224",
    "cait": "cait_xxs24_224",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "gemma4_vit": "gemma4_vit_167m",
    "mlp_mixer": "gmlp_ti16_224",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "qwen3_vit": "qwen3_vit_88m",
    "tnt": "tnt_s_legacy_patch16_224",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "xcit": "xcit_nano_12_p8_224",
}

SIZES = {
    "any": "any, in each forward pass",
    "loaded": "any, chosen at load",
    "square": "any square, chosen at load",
    "own": "only its own",
}


@dataclass(frozen=True)
class FamilyRow:
    """One family of timm models.

    Attributes:
        family: timm's module name.
        architectures: number of single-scale architectures.
        smallest: the architecture with the fewest parameters; the other attributes describe it.
        supported: whether the forward passes gave finite tokens of the right shapes.
        prefix: prefix tokens of that architecture, at the last layer / at an earlier one.
        size: which input sizes it takes.
        stride: whether patches can overlap.
        notes: the reason if it is not supported.
    """

    family: str
    architectures: int
    smallest: str
    supported: bool
    prefix: str = ""
    size: str = ""
    stride: bool = False
    notes: str = ""


def family_table(names: Iterable[str] | None = None) -> list[FamilyRow]:
    """Describe each timm family with single-scale models in a row, computed by real forward passes.

    Args:
        names: families to try; None means all families of the installed timm (about two minutes).
    """
    found: dict[str, list[tuple[int, str, str]]] = {}
    models = single_scale_models() if names is None else (m for n in names for m in single_scale_models(n))
    for family, name, model in models:
        size = sum(parameter.numel() for parameter in model.parameters())
        found.setdefault(family, []).append((size, name, families.sizing(model)))
    return [_row(family, found[family]) for family in sorted(found)]


def _row(family: str, models: list[tuple[int, str, str]]) -> FamilyRow:
    _, smallest, sizing = min(models)
    try:
        last = load_backbone(smallest, pretrained=False)
        size = try_size(last)
        _forward(last, size)
        early = load_backbone(smallest, pretrained=False, layer=0)
        _forward(early, size)
    except DvtError as error:
        return FamilyRow(family, len(models), smallest, False, notes=str(error))
    prefix = f"{last.num_prefix_tokens} / {early.num_prefix_tokens}"
    return FamilyRow(family, len(models), smallest, True, prefix, SIZES[sizing], _strides(smallest, last, size))


def try_size(backbone: Backbone) -> Size:
    """Choose a small oblong input size if the model supports it, otherwise the model's own size."""
    height, width = backbone.patch_size
    return backbone.image_size if backbone.fixed_size else (4 * height, 6 * width)


def _forward(backbone: Backbone, size: Size) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens = backbone(torch.rand(1, 3, *size, generator=generator))
    if not tokens.patches.isfinite().all():
        raise DvtError(f"{backbone.name} gives NaN or infinity with random weights")


def _strides(name: str, backbone: Backbone, size: Size) -> bool:
    half: Size = (max(1, backbone.patch_size[0] // 2), max(1, backbone.patch_size[1] // 2))
    try:
        _forward(load_backbone(name, pretrained=False, stride=half), size)
    except DvtError as error:
        logger.info("%s takes no stride: %s", name, error)
        return False
    return True
