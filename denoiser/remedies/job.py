"""Fit one of the training-free remedies to a backbone (`dvt remedy`), or all of them to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dvt.backbones import Backbone
from dvt.denoiser.model import Denoiser
from dvt.denoiser.remedies.config import REMEDIES, WITHOUT_IMAGES, Remedy, RemedyConfig
from dvt.denoiser.remedies.defect import fit_defect, predict_defect
from dvt.denoiser.remedies.noise import fit_insid3, fit_noise, noise_maps
from dvt.denoiser.remedies.outliers import OutlierTokens, block_norms, find_outliers, inputs
from dvt.denoiser.remedies.rasa import fit_rasa
from dvt.denoiser.remedies.registers import fit_registers
from dvt.errors import ConfigError, DvtError
from dvt.images import ImageLike, image_list, usable_images
from dvt.progress import Progress


def fit_remedy(
    remedy: Remedy,
    backbone: Backbone,
    images: Iterable[ImageLike] | str | Path = (),
    config: RemedyConfig | None = None,
    progress: Progress | None = None,
) -> Denoiser:
    """Fit one remedy to a backbone, without training; it is used like a trained denoiser.

    Args:
        remedy: one of :data:`REMEDIES`. "registers" and "defect" remove norm outliers, the others artifacts of
            position; "noise" and "insid3" need no images.
        backbone: the backbone, whose tokens at its own layer the remedy changes.
        images: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W), or a folder of them; no labels are needed,
            ten or more are better.
        config: settings of the remedies.
        progress: called with (what, done, total).

    Returns:
        A denoiser; its card names the backbone, its layer and weights, and holds the findings of the fit.

    Raises:
        ConfigError: there is no such remedy.
        ImageError: no image is given, or none can be read. If only some cannot be read, they are left out and logged.
        BackboneError: the backbone has nothing for the remedy to remove, or cannot take it.

    >>> import dvt
    >>> backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    >>> denoiser = fit_remedy("noise", backbone, config=RemedyConfig(noise_images=4))
    >>> denoiser.config.kind, denoiser.card["kept"] > 0.9
    ('subtract', True)
    """
    config = config or RemedyConfig()
    if remedy not in _FITS:
        raise ConfigError(f"there is no remedy {remedy!r}; it must be one of {', '.join(REMEDIES)}")
    found: list[ImageLike] = []
    if remedy not in WITHOUT_IMAGES:
        given = image_list(images)
        found = [given[i] for i in usable_images(given, backbone.input_size)]
    denoiser = _FITS[remedy](backbone, found, config, progress)
    denoiser.card |= {
        "remedy": remedy,
        "backbone": backbone.name,
        "stride": list(backbone.stride),
        "feature_dim": backbone.feature_dim,
        "weights_sha256": backbone.weights_sha256,
        "images": len(found),
    }
    if remedy != "registers":  # registers act on all layers
        denoiser.card["layer"] = backbone.layer
    return denoiser.to(backbone.device)


def fit_remedies(
    backbone: Backbone,
    images: Iterable[ImageLike] | str | Path = (),
    config: RemedyConfig | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Denoiser], dict[str, str]]:
    """Fit all remedies that a backbone can take; return them by name, and for the others the reason of refusal."""
    found, refused, images = {}, {}, image_list(images)
    for remedy in REMEDIES:
        try:
            found[str(remedy)] = fit_remedy(remedy, backbone, images, config, progress)
        except DvtError as error:
            refused[str(remedy)] = str(error)
    return found, refused


def _registers(
    backbone: Backbone, images: Sequence[ImageLike], config: RemedyConfig, progress: Progress | None
) -> Denoiser:
    return fit_registers(backbone, images, config.neurons, progress)


def _defect(
    backbone: Backbone, images: Sequence[ImageLike], config: RemedyConfig, progress: Progress | None
) -> Denoiser:
    found: OutlierTokens = find_outliers(block_norms(backbone, images, progress), backbone.name)
    direction = predict_defect(backbone) if config.predicted else None
    denoiser = fit_defect(_maps(backbone, images, progress), found.masks, direction, backbone.name)
    if config.predicted:
        denoiser.card["direction"] = "predicted from the weights"
    return denoiser


def _noise(
    backbone: Backbone, images: Sequence[ImageLike], config: RemedyConfig, progress: Progress | None
) -> Denoiser:
    return fit_noise(_noise_maps(backbone, config))


def _insid3(
    backbone: Backbone, images: Sequence[ImageLike], config: RemedyConfig, progress: Progress | None
) -> Denoiser:
    return fit_insid3(_noise_maps(backbone, config), config.rank)


def _rasa(backbone: Backbone, images: Sequence[ImageLike], config: RemedyConfig, progress: Progress | None) -> Denoiser:
    return fit_rasa(_maps(backbone, images, progress), config.rounds)


_FitRemedy = Callable[[Backbone, Sequence[ImageLike], RemedyConfig, "Progress | None"], Denoiser]
_FITS: dict[str, _FitRemedy] = {
    "registers": _registers,
    "defect": _defect,
    "noise": _noise,
    "insid3": _insid3,
    "rasa": _rasa,
}


def _noise_maps(backbone: Backbone, config: RemedyConfig) -> Iterator[Tensor]:
    return noise_maps(backbone, config.noise_images, torch.Generator().manual_seed(config.seed))


@torch.no_grad()
def _maps(backbone: Backbone, images: Sequence[ImageLike], progress: Progress | None) -> Iterator[Tensor]:
    """Compute the tokens (h, w, C) of each image, on the CPU."""
    for image in inputs(backbone, images, progress, "tokens"):
        yield backbone(image).patches[0].float().cpu()
