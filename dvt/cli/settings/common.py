"""Options that commands share: of a backbone, of a denoiser, of the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dvt
from dvt.errors import ConfigError

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.denoiser import Denoiser
    from dvt.tokens import Tokens


log = logging.getLogger(__name__)

DEFAULT_BACKBONE = "vit_small_patch14_dinov2.lvd142m"
DEMO_BACKBONE = "vit_tiny_patch16_224"  # of the weights that come with dvt


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command that computes; the seed is among the settings of each."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one."""
    json: bool = False
    """Print one JSON object on standard output, everything else on standard error."""
    dry_run: bool = False
    """Print the resolved settings, and the images where the command takes some, and stop."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(Options):
    """Options of every command that runs a backbone."""

    backbone: str = DEFAULT_BACKBONE
    """Name of a single-scale timm model, or what others call it (dinov2_vits14, facebook/dinov2-small);
    hf:NAME_OR_FOLDER for a model of transformers; or a folder that timm or transformers saved."""
    weights: str | None = None
    """A .safetensors or .pth file instead of the hub's weights; "demo" means the small ViT that comes with dvt, which
    also names the backbone."""
    layer: int = -1
    """Block whose tokens are read; -1 is the last, after the final norm."""
    stride: int | None = None
    """Pixels between patches; smaller than the patch they overlap."""
    size: int | None = None
    """Shorter side of the model's input in pixels; the model's own if not given."""

    def __post_init__(self) -> None:
        if self.weights == "demo" and self.backbone == DEFAULT_BACKBONE:
            object.__setattr__(self, "backbone", DEMO_BACKBONE)

    def load(self, other: str | None = None) -> Backbone:
        """Load the backbone onto its device; or `other`, with the hub's weights and otherwise the same options."""
        from dvt.backbones import load_backbone
        from dvt.devices import find_device

        weights = dvt.demo_weights() if self.weights == "demo" else self.weights
        backbone = load_backbone(
            other or self.backbone,
            weights=None if other else weights,
            layer=self.layer,
            stride=self.stride,
            size=self.size,
        )
        if self.size is not None and self.size not in backbone.image_size:
            taken = " x ".join(map(str, backbone.image_size))
            log.warning("size %d is not a multiple of the patch: %s takes %s instead", self.size, backbone.name, taken)
        return backbone.to(find_device(self.device))


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions(BackboneOptions):
    """Options of every command that may put a denoiser behind the backbone."""

    denoiser: str | None = None
    """File, folder or hub repository of a denoiser."""
    force: bool = False
    """Take a denoiser that was made for another backbone, layer or weights."""

    def load_denoiser(self, backbone: Backbone) -> Denoiser | None:
        """Load the denoiser onto the backbone's device and check that it belongs to it; None if none was asked for."""
        from dvt.denoiser import Denoiser

        if self.denoiser is None:
            return None
        denoiser = Denoiser.from_pretrained(self.denoiser)
        denoiser.check_fits(backbone, self.force)
        return denoiser.to(backbone.device).eval()

    def variant(self, backbone: Backbone) -> Callable[[Tokens], Tokens] | Backbone | None:
        """Load it as analyses take it: a function of Tokens or, for test-time registers, a backbone with them."""
        denoiser = self.load_denoiser(backbone)
        return None if denoiser is None else variant_of(denoiser, backbone, self.force)

    def token_function(self, backbone: Backbone) -> Callable[[Tokens], Tokens] | None:
        """Load it as a function of Tokens alone.

        Raises:
            ConfigError: the denoiser acts inside the backbone.
        """
        from dvt.backbones import Backbone as Inside

        found = self.variant(backbone)
        if isinstance(found, Inside):
            raise ConfigError(
                f"{self.denoiser} holds test-time registers, which act inside the backbone; this command takes "
                "denoisers of tokens only. export, doctor, analyze and probe take registers, and attach in Python"
            )
        return found


def variant_of(denoiser: Denoiser, backbone: Backbone, force: bool = False) -> Callable[[Tokens], Tokens] | Backbone:
    """Adapt a denoiser to what analyses take: a function of Tokens or a backbone with test-time registers."""
    import torch

    from dvt.denoiser import denoised_backbone
    from dvt.denoiser.config import INSIDE

    if denoiser.config.kind in INSIDE:
        return denoised_backbone(denoiser, backbone, force)

    def clean(tokens: Tokens) -> Tokens:
        with torch.no_grad():
            return tokens.with_patches(denoiser(tokens.patches, tokens.prefix))

    return clean
