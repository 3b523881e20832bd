"""Make the target tokens of a prior: patches of pixels or of latents of square pictures, or a backbone's features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.priors.config import TargetKind, check_target
from dvt.errors import ConfigError, NonFiniteError, ShapeError


def patchify(maps: Tensor, patch: int) -> Tensor:
    """Cut maps (B, C, H, W) into square patches: tokens (B, H / patch, W / patch, C patch^2).

    >>> maps = torch.rand(2, 3, 8, 12)
    >>> torch.equal(unpatchify(patchify(maps, 4), 4), maps)
    True
    """
    if maps.shape[2] % patch or maps.shape[3] % patch:
        raise ShapeError(f"{tuple(maps.shape[2:])} is not a multiple of the patch {patch}; choose another")
    columns = functional.unfold(maps, patch, stride=patch).transpose(1, 2)
    return columns.unflatten(1, (maps.shape[2] // patch, maps.shape[3] // patch))


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Invert :func:`patchify`."""
    height, width = tokens.shape[1:3]
    columns = tokens.flatten(1, 2).transpose(1, 2)
    return functional.fold(columns, (height * patch, width * patch), patch, stride=patch)


@dataclass(frozen=True)
class PriorTarget:
    """Describe what a prior generates, and convert it to token maps of mean 0 and standard deviation 1, and back.

    Args:
        kind: "pixels", "latents" or "features".
        patch: side of a token in pixels, or in cells of the latent; not used for features.
        vae: folder of a diffusers AutoencoderKL, for latents.
        mean: mean of the tokens: one number or, for features, one per channel.
        std: standard deviation of the tokens, in the same form.
    """

    kind: TargetKind
    patch: int = 1
    vae: str | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        check_target(self.kind, self.vae)

    def encode(self, pictures: Tensor, features: Tensor) -> Tensor:
        """Make target tokens (B, h, w, D), not standardised, from pictures (B, 3, S, S) or features (B, h, w, C)."""
        if self.kind == "features":
            return features.float()
        return patchify(self._latents(pictures) if self.kind == "latents" else pictures, self.patch)

    def decode(self, maps: Tensor) -> Tensor:
        """Turn standardised maps into pictures (B, 3, S, S), clipped to [0, 1]; for features, into tokens."""
        raw = self.restore(maps)
        if self.kind == "features":
            return raw
        pictures = unpatchify(raw, self.patch)
        return (self._pictures(pictures) if self.kind == "latents" else pictures).clamp(0, 1)

    def fitted(self, raw: Tensor | Iterable[Tensor]) -> PriorTarget:
        """Return the target with the mean and standard deviation of training tokens.

        Args:
            raw: tokens (N, h, w, D), or an iterable of parts of them, of which one is in memory at a time.
        """
        count, mean, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for part in [raw] if isinstance(raw, Tensor) else raw:
            if not bool(part.isfinite().all()):
                raise NonFiniteError("target tokens hold NaN or infinity; check the images, the VAE and the backbone")
            rows = part.double().flatten(0, 2) if self.kind == "features" else part.double().flatten()[:, None]
            new, own = len(rows), rows.mean(0)
            squares = squares + (rows - own).square().sum(0) + (own - mean).square() * count * new / (count + new)
            mean, count = mean + (own - mean) * new / (count + new), count + new
        variance = squares / max(count - 1, 1)
        if float(variance.sum()) == 0:
            raise ConfigError("all images are the same, so there is nothing to learn; give different images")
        # The noise of a channel that hardly varies must not be scaled to unit variance.
        std = variance.sqrt().clamp(min=1e-2 * float(variance.mean().sqrt()))
        return replace(self, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def standardise(self, raw: Tensor) -> Tensor:
        """Scale tokens to mean 0 and standard deviation 1."""
        return (raw - raw.new_tensor(self.mean)) / raw.new_tensor(self.std)

    def restore(self, maps: Tensor) -> Tensor:
        """Invert :meth:`standardise`."""
        return maps * maps.new_tensor(self.std) + maps.new_tensor(self.mean)

    @cached_property
    def _vae(self) -> Any:
        return load_vae(str(self.vae))

    @torch.no_grad()
    def _latents(self, pictures: Tensor) -> Tensor:
        return self._vae.to(pictures.device).encode(2 * pictures - 1).latent_dist.mean

    @torch.no_grad()
    def _pictures(self, latents: Tensor) -> Tensor:
        return (self._vae.to(latents.device).decode(latents).sample + 1) / 2


def load_vae(folder: str) -> Any:
    """Load diffusers' AutoencoderKL from a local folder (config.json and safetensors weights), frozen.

    Raises:
        ConfigError: diffusers is not installed, or the folder holds no such model.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError("latents need diffusers: pip install 'denoising-vit[prior]'") from error
    if not Path(folder).is_dir():
        raise ConfigError(f"there is no folder {folder!r}; give one with the config.json and weights of a VAE")
    read: Callable[..., Any] = AutoencoderKL.from_pretrained
    try:
        return read(folder, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder!r} holds no AutoencoderKL: {error}") from error
