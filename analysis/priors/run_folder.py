"""Write and open the files in a trained prior's folder that sampling needs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt.analysis.pictures import pca_colours
from dvt.analysis.priors.decoder import PixelDecoder
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.targets import PriorTarget
from dvt.analysis.priors.token_set import Rows
from dvt.backbones.weights import read_described, save_state
from dvt.devices import default_device
from dvt.errors import ConfigError, WeightsError
from dvt.files import similar
from dvt.schema import typed

GIVEN = "given"  # the condition of a prior that was trained on tensors


def keep_run(
    folder: Path,
    prior: Prior,
    held: tuple[Rows, Rows | None],
    pictures: Tensor | None = None,
    names: Sequence[str] | None = None,
    decoder: PixelDecoder | None = None,
) -> None:
    """Write the files that sampling needs: weights, and held-out maps with their conditions and pictures.

    Args:
        folder: the run's folder; prior.safetensors is written only if it is missing.
        prior: the prior; target and condition are added to its card if they are missing.
        held: standardised maps (n, h, w, D) and conditions (n, M, C) or None.
        pictures: (n, 3, S, S) pictures of the held-out images; None decodes the maps.
        names: names of the held-out images.
        decoder: decodes features to pixels.
    """
    maps, conditions = (None if each is None else each[list(range(len(each)))] for each in held)
    assert maps is not None
    prior.card.setdefault("target", asdict(PriorTarget("features")))
    prior.card.setdefault("condition", None if conditions is None else GIVEN)
    if pictures is None:
        target = typed(PriorTarget, json.loads(json.dumps(prior.card["target"])))
        made = target.decode(maps.float())
        if target.kind == "features":
            made = torch.stack(pca_colours(list(made))).permute(0, 3, 1, 2)
        pictures = made
    tensors = {"pictures": pictures.half(), "maps": maps.float()}
    if conditions is not None:
        tensors["conditions"] = conditions
    if decoder is not None:
        tensors["decoder"] = decoder.weights
    named = [str(name) for name in names] if names else [str(row) for row in range(len(maps))]
    save_state(folder / "held_out.safetensors", tensors, {"images": json.dumps(named)})
    if not (folder / "prior.safetensors").exists():
        prior.save(folder / "prior.safetensors")


@dataclass(frozen=True)
class PriorRun:
    """Hold the parts of a run that sampling needs.

    Args:
        prior: the trained prior, on its device.
        target: what the prior generates.
        held: tensors by name: pictures (n, 3, S, S), maps (n, h, w, D), conditions (n, M, C), and for features the
            weights of their decoder to pixels.
        names: files of the held-out images.
    """

    prior: Prior
    target: PriorTarget
    held: dict[str, Tensor]
    names: list[str]

    def pictures_of(self, maps: Tensor) -> Tensor:
        """Turn standardised maps into pictures (B, 3, S, S) in [0, 1]; features go through the decoder.

        Raises:
            ConfigError: the target is features and there is no decoder, as for a prior trained on tensors.
        """
        if self.target.kind != "features":
            return self.target.decode(maps)
        if "decoder" not in self.held:
            raise ConfigError(
                "this run generates features and has no decoder to pixels; train it again with `dvt prior train`"
            )
        return PixelDecoder(self.held["decoder"])(maps)

    def conditions(self, rows: slice | list[int]) -> Tensor | None:
        """Move the conditions (n, M, C) of some rows to the prior's device; None for an unconditional prior."""
        if "conditions" not in self.held:
            return None
        return self.held["conditions"][rows].to(next(self.prior.parameters()).device)


def open_run(folder: str | Path, device: str | torch.device | None = None) -> PriorRun:
    """Open a run of :func:`train_prior`, finished or not.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "prior.safetensors").is_file():
        hint = similar(folder) if not folder.exists() else ""
        raise WeightsError(
            f"{str(folder)!r} holds no prior{hint or '; give a folder that `dvt prior train` wrote (its --out)'}"
        )
    prior = Prior.load(folder / "prior.safetensors").to(device or default_device())
    path = folder / "held_out.safetensors"
    names, held = read_described(path, "images", "the held-out images")
    try:
        target = typed(PriorTarget, prior.card["target"])
        _check_held(held, names, prior, target)
    except Exception as error:  # from an incomplete card, tensors of other types
        raise WeightsError(f"cannot read {str(path)!r}: {error}; run the training again, it continues") from error
    return PriorRun(prior, target, held, names)


def _check_held(held: dict[str, Tensor], names: Any, prior: Prior, target: PriorTarget) -> None:
    """Check that a run's tensors have the shapes that its prior needs, and are finite."""
    config, count = prior.config, len(names)
    condition = prior.card["condition"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("it names no images")
    wanted: dict[str, tuple[int | None, ...]] = {
        "maps": (count, *config.grid, config.token_dim),
        "pictures": (count, 3, None, None),
    }
    if config.condition_dim is not None:
        cells = math.prod(config.condition_grid) if config.condition_grid else None
        wanted["conditions"] = (count, None if condition == "both" else cells, config.condition_dim)
    if "decoder" in held:
        wanted["decoder"] = (9 * config.token_dim + 1, None)
    for name, shape in wanted.items():
        value = held[name]
        same = value.ndim == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape, strict=True))
        if not same or not value.numel() or not value.isfinite().all():
            raise ValueError(f"{name} is {tuple(value.shape)} instead of {shape}, or holds NaN")
    if target.kind != "latents":  # a VAE is read only when it is needed
        made = target.decode(held["maps"][:1].float())
        fits = target.kind == "features" or made.shape[1:] == held["pictures"].shape[1:]
        if not fits or made.shape[0] != 1 or not made.isfinite().all():
            raise ValueError(f"the target {target.kind!r} of patch {target.patch} does not fit them")
