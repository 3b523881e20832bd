"""The online denoiser for all images: its kinds, its training, and its place inside timm models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvt.denoiser.attach import denoised_backbone as denoised_backbone
    from dvt.denoiser.config import DenoiserConfig as DenoiserConfig
    from dvt.denoiser.distill.card import read_card as read_card
    from dvt.denoiser.distill.config import BackboneTraining as BackboneTraining
    from dvt.denoiser.distill.job import distill_backbone as distill_backbone
    from dvt.denoiser.distill.student import with_registers as with_registers
    from dvt.denoiser.feature_maps import FeatureMaps as FeatureMaps
    from dvt.denoiser.folding import fold as fold
    from dvt.denoiser.folding import fold_after as fold_after
    from dvt.denoiser.folding import fold_into as fold_into
    from dvt.denoiser.model import Denoiser as Denoiser
    from dvt.denoiser.published import PUBLISHED as PUBLISHED
    from dvt.denoiser.published import published_backbone_state as published_backbone_state
    from dvt.denoiser.published import published_file as published_file
    from dvt.denoiser.remedies.config import RemedyConfig as RemedyConfig
    from dvt.denoiser.remedies.defect import fit_defect as fit_defect
    from dvt.denoiser.remedies.defect import predict_defect as predict_defect
    from dvt.denoiser.remedies.job import fit_remedies as fit_remedies
    from dvt.denoiser.remedies.job import fit_remedy as fit_remedy
    from dvt.denoiser.remedies.noise import fit_insid3 as fit_insid3
    from dvt.denoiser.remedies.noise import fit_noise as fit_noise
    from dvt.denoiser.remedies.noise import noise_maps as noise_maps
    from dvt.denoiser.remedies.rasa import fit_rasa as fit_rasa
    from dvt.denoiser.remedies.registers import fit_registers as fit_registers
    from dvt.denoiser.train import DenoiserTraining as DenoiserTraining
    from dvt.denoiser.train import train_denoiser as train_denoiser
    from dvt.denoiser.variants import fit_linear as fit_linear
    from dvt.denoiser.variants import fit_subtract as fit_subtract

# Loaded when first asked for: the denoiser needs timm.
_HOME = {
    "BackboneTraining": "dvt.denoiser.distill.config",
    "Denoiser": "dvt.denoiser.model",
    "DenoiserConfig": "dvt.denoiser.config",
    "DenoiserTraining": "dvt.denoiser.train",
    "FeatureMaps": "dvt.denoiser.feature_maps",
    "PUBLISHED": "dvt.denoiser.published",
    "RemedyConfig": "dvt.denoiser.remedies.config",
    "denoised_backbone": "dvt.denoiser.attach",
    "distill_backbone": "dvt.denoiser.distill.job",
    "fit_defect": "dvt.denoiser.remedies.defect",
    "fit_insid3": "dvt.denoiser.remedies.noise",
    "fit_linear": "dvt.denoiser.variants",
    "fit_noise": "dvt.denoiser.remedies.noise",
    "fit_rasa": "dvt.denoiser.remedies.rasa",
    "fit_registers": "dvt.denoiser.remedies.registers",
    "fit_remedies": "dvt.denoiser.remedies.job",
    "fit_remedy": "dvt.denoiser.remedies.job",
    "fit_subtract": "dvt.denoiser.variants",
    "fold": "dvt.denoiser.folding",
    "fold_after": "dvt.denoiser.folding",
    "fold_into": "dvt.denoiser.folding",
    "noise_maps": "dvt.denoiser.remedies.noise",
    "predict_defect": "dvt.denoiser.remedies.defect",
    "published_backbone_state": "dvt.denoiser.published",
    "published_file": "dvt.denoiser.published",
    "read_card": "dvt.denoiser.distill.card",
    "train_denoiser": "dvt.denoiser.train",
    "with_registers": "dvt.denoiser.distill.student",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dvt.denoiser' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
