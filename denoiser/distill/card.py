"""Make and read the card of a distilled backbone, which its file holds beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvt.backbones import Backbone, families, weights_sha256
from dvt.backbones.weights import read_described, save_state
from dvt.denoiser.distill.config import BackboneTraining
from dvt.denoiser.model import Denoiser
from dvt.denoiser.sharing import METADATA_KEY
from dvt.errors import WeightsError
from dvt.training import flat_settings

BACKBONE_SCHEMA = "dvt-backbone/1"


def read_card(path: str | Path) -> dict[str, Any]:
    """Read the card of a backbone made by :func:`~dvt.denoiser.distill_backbone`: its origin and its scores.

    Raises:
        WeightsError: the file is missing, damaged, or not such a backbone.
    """
    card, _ = read_described(path, METADATA_KEY, "a distilled backbone", tensors=False)
    if not isinstance(card, dict) or card.get("schema") != BACKBONE_SCHEMA:
        raise WeightsError(
            f"{str(path)!r} has no card of schema {BACKBONE_SCHEMA!r}; give a file written by `dvt distill`"
        )
    return card


def make_card(
    original: Backbone,
    result: Backbone,
    config: BackboneTraining,
    denoiser: Denoiser | None,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe a distilled backbone: its origin, the arguments with which timm makes its model, and its scores."""
    model: Any = result.model
    options: dict[str, Any] = {"num_classes": 0}
    if config.registers:
        options[families.REGISTERS[type(model).__name__]] = model.reg_token.shape[1]
    if families.sizing(model) in ("loaded", "square"):
        options["img_size"] = list(result.image_size)
    return {
        "schema": BACKBONE_SCHEMA,
        **{name: getattr(original, name) for name in ("name", "layer", "stride", "feature_dim")},
        "size": original.image_size,
        "create_model": options,
        "original_weights_sha256": original.weights_sha256,
        "weights_sha256": result.weights_sha256,
        "denoiser": None if denoiser is None else {"sha256": weights_sha256(denoiser), **denoiser.card},
        "data": {name: report[name] for name in ("images", "training", "held_out")},
        "training": flat_settings(config),
        "steps": report["steps"],
        "metrics": {name: report[name] for name in ("validation", "baselines")},
    }


def save_with_card(backbone: Backbone, path: Path, card: Mapping[str, Any]) -> None:
    """Write the backbone's weights and card to a file, which is whole or absent."""
    save_state(path, backbone.model.state_dict(), {"format": "pt", METADATA_KEY: json.dumps(card)})
