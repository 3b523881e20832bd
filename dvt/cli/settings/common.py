"""Define the options that commands share: of the backbone, the denoiser and the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import dvt
from dvt.errors import ConfigError

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.denoiser import Denoiser
    from dvt.tokens import Tokens


log = logging.getLogger(__name__)

DEFAULT_BACKBONE = "vit_small_patch14_dinov2.lvd142m"
DEMO_BACKBONE = "vit_tiny_patch16_224"  # the model of the weights that come with dvt


@dataclass(frozen=True, kw_only=True)
class Output:
    """Hold the options of every command."""

    json: bool = False
    """Print one JSON object on standard output, everything else on standard error."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=("-q",))] = False
    """Print only warnings and errors."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=("-v",))] = False
    """Also print what is done step by step."""
    log_file: Path | None = None
    """Append the command line, all messages with their times, and the exit code to this file."""
    dry_run: bool = False
    """Print the resolved settings and, if the command takes images, their paths; then stop."""
    config: Path | None = None
    """Take the settings from a config.json of an earlier run, or from a file that `dvt config COMMAND` printed; options
    of the command line come before it."""


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Hold the options of every command that computes; the seed is among the command's own settings."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Remade:
    """Hold the options of commands that continue what they find in their place, or refuse it."""

    resume: bool = False
    """Take all settings but those on the command line from the config.json of the earlier run in the same place."""
    overwrite: bool = False
    """Remove what an earlier run wrote there, and begin anew."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(Options):
    """Hold the options of every command that runs a backbone."""

    backbone: str = DEFAULT_BACKBONE
    """Name of a single-scale timm model, or its name elsewhere (dinov2_vits14, facebook/dinov2-small);
    hf:NAME_OR_FOLDER for a model of transformers; or a folder that timm or transformers saved."""
    weights: str | None = None
    """A .safetensors or .pth file instead of the hub's weights; "demo" means the small ViT that comes with dvt, and
    then --backbone is not needed; "random" means random weights, for trials without a network."""
    layer: int = -1
    """Block whose tokens are read; -1 is the last, after the final norm."""
    stride: int | None = None
    """Pixels between patches; patches overlap if it is smaller than their size."""
    size: int | None = None
    """Shorter side of the model's input in pixels; by default the model's own."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Precision of the backbone's forward pass. "auto" takes bfloat16 where the device is fast in it and a photograph's
    tokens change by at most half a percent, else tf32 on CUDA by the same trial, else float32."""

    def __post_init__(self) -> None:
        if self.weights == "demo" and self.backbone == DEFAULT_BACKBONE:
            object.__setattr__(self, "backbone", DEMO_BACKBONE)

    @property
    def own_layer(self) -> int:
        """The block whose tokens are the backbone's; the last one where several are given."""
        return self.layer

    @property
    def input_side(self) -> int | None:
        """The shorter side of the model's own input; `size`, unless images are read in windows."""
        return self.size

    def load(self, other: str | None = None) -> Backbone:
        """Load the backbone onto its device; or `other`, with the hub's weights and otherwise the same options."""
        from dvt.backbones import in_precision

        return in_precision(self.load_exact(other), self.dtype)

    def load_exact(self, other: str | None = None) -> Backbone:
        """Load it as :meth:`load` does, in the precision of its weights, for jobs that choose one by themselves."""
        from dvt.backbones import load_backbone
        from dvt.devices import find_device, repeatable

        weights = dvt.demo_weights() if self.weights == "demo" else self.weights
        random = self.weights == "random"
        if random:
            log.warning("%s has random weights: its features say nothing, and are for trials only", self.backbone)
        with repeatable() if random else nullcontext():
            backbone = load_backbone(
                other or self.backbone,
                weights=None if other or random else weights,
                pretrained=not random,
                layer=self.own_layer,
                stride=self.stride,
                size=self.input_side,
            )
        if self.input_side is not None and self.input_side not in backbone.image_size:
            side, taken = self.input_side, " x ".join(map(str, backbone.image_size))
            log.warning("size %d is not a multiple of the patch: %s takes %s instead", side, backbone.name, taken)
        return backbone.to(find_device(self.device))


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions(BackboneOptions):
    """Hold the options of every command that may apply a denoiser to the backbone's tokens."""

    denoiser: str | None = None
    """File, folder or hub repository of a denoiser."""
    strength: float | None = None
    """Share of the denoiser's change to apply, from 0 (raw tokens) to 1; by default the denoiser's own strength."""
    force: bool = False
    """Accept a denoiser that was made for another backbone, layer or weights."""

    def load_denoiser(self, backbone: Backbone) -> Denoiser | None:
        """Load the denoiser onto the backbone's device and check that it fits the backbone; None without --denoiser."""
        from dvt.denoiser import Denoiser

        if self.denoiser is None:
            if self.strength is not None:
                raise ConfigError("--strength is the strength of a denoiser; also give --denoiser FILE")
            return None
        denoiser = Denoiser.from_pretrained(self.denoiser)
        denoiser.strength = denoiser.strength if self.strength is None else self.strength
        denoiser.check_fits(backbone, self.force)
        return denoiser.to(backbone.device).eval()

    def variant(self, backbone: Backbone) -> Callable[[Tokens], Tokens] | Backbone | None:
        """Load the denoiser for analyses: as a function of Tokens or, for test-time registers, a backbone with them."""
        denoiser = self.load_denoiser(backbone)
        return None if denoiser is None else variant_of(denoiser, backbone, self.force)

    def token_function(self, backbone: Backbone) -> Callable[[Tokens], Tokens] | None:
        """Load the denoiser as a function of Tokens.

        Raises:
            ConfigError: the denoiser acts inside the backbone.
        """
        from dvt.backbones import Backbone as Inside

        found = self.variant(backbone)
        if isinstance(found, Inside):
            raise ConfigError(
                f"{self.denoiser} holds test-time registers, which act inside the backbone; this command takes "
                "denoisers of tokens only. Use registers with export, doctor, analyze or probe, or by attach in Python"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class LayersOptions(DenoiserOptions):
    """Hold the options of commands that read several layers in one forward pass."""

    layer: tuple[int, ...] = (-1,)  # type: ignore[assignment]
    """Blocks whose tokens are read, in one forward pass; -1 is the last, after the final norm. The last one given is
    "raw", which a denoiser takes; the others are "layer5" and so on."""

    @property
    def own_layer(self) -> int:
        if not self.layer:
            raise ConfigError("--layer names no block; give one or more, such as --layer 5 11")
        return self.layer[-1]

    def layers_of(self, backbone: Backbone) -> tuple[int, ...]:
        """List the layers as the backbone has them; its own alone if no others were given."""
        from dvt.backbones.layers import choose_layers

        return (backbone.layer,) if len(self.layer) < 2 else choose_layers(backbone, self.layer)


def variant_of(denoiser: Denoiser, backbone: Backbone, force: bool = False) -> Callable[[Tokens], Tokens] | Backbone:
    """Adapt a denoiser for analyses: as a function of Tokens or, for test-time registers, a backbone with them."""
    import torch

    from dvt.denoiser import denoised_backbone
    from dvt.denoiser.config import INSIDE

    if denoiser.config.kind in INSIDE:
        return denoised_backbone(denoiser, backbone, force)

    def clean(tokens: Tokens) -> Tokens:
        with torch.no_grad():
            return tokens.with_patches(denoiser(tokens.patches, tokens.prefix))

    return clean
