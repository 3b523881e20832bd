"""Put test-time registers inside a timm model: append a token to its sequence, and move activations to it.

Source: Vision Transformers Don't Need Trained Registers (arXiv 2506.08010).
"""

from __future__ import annotations

import copy
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from dvt.backbones import Backbone, families
from dvt.backbones.outside import shared_copy, shared_tree
from dvt.denoiser.derived import around, derived, patch_grid, reduce_derived
from dvt.denoiser.sharing import PretrainedDenoiser
from dvt.errors import BackboneError

#: Families whose blocks keep one sequence of tokens and take any number of them.
FAMILIES = ("VisionTransformer", "VisionTransformerDistilled", "Eva")


def with_test_time_registers(denoiser: PretrainedDenoiser, model: nn.Module) -> nn.Module:
    """Copy a timm model, with shared weights, and add a token to which the activations of register neurons move.

    Outputs keep their shapes, because the extra token is dropped from them. With strength 0 it is never appended, and
    outputs are equal to the original model's, bit for bit. The neurons are in the state dict under ``registers.``.

    Args:
        denoiser: a denoiser of kind "registers"; it is not copied.
        model: a timm model of one of :data:`FAMILIES`.

    Raises:
        BackboneError: the model's blocks have no such MLP or another width, or the model already has registers.
    """
    inner = cast(Any, families.core(model))
    layers, places = mlp_outputs(inner), denoiser.body.places
    if isinstance(inner, Registered) or hasattr(inner, "denoised_layer"):
        raise BackboneError(
            f"this {type(inner).__name__} has a denoiser or registers already; attach registers to the timm model "
            "first, then a denoiser made for the model with registers"
        )
    beyond = [
        (block, neuron)
        for block, neuron in places.tolist()
        if not (-1 <= block < len(layers) and -1 <= neuron < layers[block].in_features)
    ]
    if beyond:
        raise BackboneError(
            f"these registers take over neuron {beyond[0][1]} of block {beyond[0][0]}; {type(inner).__name__} has "
            f"{len(layers)} blocks of {layers[0].in_features} neurons: find the registers of this model "
            "(dvt remedy registers)"
        )
    base: Any = type(inner)
    clean = shared_tree(inner)
    clean.__class__ = derived(Registered, base)
    clean.registers = denoiser
    clean.option_names = tuple(signature(inner.forward_intermediates).parameters)[1:]
    clean.blocks = _hooked(inner.blocks, denoiser, families.prefix_tokens(inner))
    return around(model, clean)


def registered_backbone(denoiser: PretrainedDenoiser, backbone: Backbone) -> Backbone:
    """Make a backbone with test-time registers, from one made by :func:`dvt.load_backbone`; the denoiser is copied.

    Raises:
        BackboneError: the backbone was made by :func:`dvt.wrap`, or its model cannot have registers.
    """
    result = shared_copy(backbone)
    result.__dict__.pop("weights_sha256", None)  # the cached hash is that of the model without registers
    result.model = with_test_time_registers(copy.deepcopy(denoiser).to(backbone.device), timm_model(backbone))
    return result.eval().requires_grad_(False)


def timm_model(backbone: Backbone) -> nn.Module:
    """Find the timm model inside a backbone.

    Raises:
        BackboneError: the backbone is a wrapped model, whose modules dvt does not know.
    """
    if backbone.num_layers is None:
        raise BackboneError(
            f"{backbone.name} is a wrapped model, whose inside dvt does not know; test-time registers and predicted "
            "defects need a timm model (dvt.load_backbone). For this one take a remedy of its tokens: defect, noise, "
            "insid3 or rasa"
        )
    return backbone.model


def mlp_outputs(model: nn.Module) -> list[nn.Linear]:
    """List the last layer of each block's MLP, whose inputs are the activations of the block's neurons.

    Raises:
        BackboneError: the model is of another family, or its blocks have no such MLP.
    """
    inner: Any = families.core(model)
    found = [getattr(getattr(block, "mlp", None), "fc2", None) for block in getattr(inner, "blocks", ())]
    if type(inner).__name__ not in FAMILIES or not found or not all(isinstance(each, nn.Linear) for each in found):
        raise BackboneError(
            f"{type(inner).__name__} has no MLP whose neurons could be moved to a test-time register: that takes a "
            f"timm model of {', '.join(FAMILIES)} whose blocks end in an MLP (fc1, fc2). For other models take a "
            "remedy of the tokens: defect, noise, insid3 or rasa"
        )
    return cast("list[nn.Linear]", found)


class Registered(nn.Module):
    """Change a timm model to drop the extra token of test-time registers from all of its outputs."""

    registers: PretrainedDenoiser
    option_names: tuple[str, ...]  # of forward_intermediates, after the images

    def forward_features(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the output of timm's method, without the extra token."""
        return self._cut(cast(Any, super()).forward_features(x, *args, **options))

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Return the output of timm's method, without the extra token."""
        asked = dict(zip(self.option_names, args)) | options  # noqa: B905 (most calls give only some)
        take = cast(Any, super()).forward_intermediates
        if not self.registers.strength:
            return take(x, **asked)
        out = take(x, **asked | {"output_fmt": "NLC"})  # timm's reshape to NCHW would fail with the extra token
        entry = partial(self._entry, images=x, maps=asked.get("output_fmt", "NCHW") == "NCHW")
        if isinstance(out, dict):
            changed = {"image_intermediates": [entry(each) for each in out["image_intermediates"]]}
            final = {"image_features": self._cut(out["image_features"])} if "image_features" in out else {}
            return out | changed | final
        if asked.get("intermediates_only"):
            return [entry(each) for each in out]
        return self._cut(out[0]), [entry(each) for each in out[1]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return reduce_derived(self)

    def _cut(self, tokens: Tensor) -> Tensor:
        return tokens[:, :-1] if self.registers.strength else tokens

    def _entry(self, entry: Any, images: Tensor, maps: bool) -> Any:
        """Convert an intermediate output (B, n + 1, C), perhaps with its prefix beside it, to the form asked for."""
        if isinstance(entry, tuple):
            return self._entry(entry[0], images, maps), entry[1]
        patches = self._cut(entry)
        return patches.unflatten(1, patch_grid(self, images)).permute(0, 3, 1, 2).contiguous() if maps else patches


class _Appending:
    """Hook before each block: append the extra token (zeros) before the first block, without a rotary position."""

    def __init__(self, denoiser: PretrainedDenoiser, first: bool) -> None:
        self.denoiser, self.first = denoiser, first

    def __call__(self, block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not self.denoiser.strength:
            return None
        if options.get("attn_mask") is not None or options.get("is_causal"):
            raise BackboneError("test-time registers take no attention mask: all tokens must attend to the register")
        x, *rest = args
        if self.first:
            x = torch.cat((x, torch.zeros_like(x[:, :1])), dim=1)
        if (rope := options.get("rope")) is not None:  # sines and cosines, (..., n, 2 d)
            still = torch.cat((torch.zeros_like(rope[..., :1, ::2]), torch.ones_like(rope[..., :1, ::2])), dim=-1)
            options = options | {"rope": torch.cat((rope, still), dim=-2)}
        return (x, *rest), options


class _Moving:
    """Hook before the last layer of a block's MLP: move activations to the extra token."""

    def __init__(self, denoiser: PretrainedDenoiser, block: int, prefix: int) -> None:
        self.denoiser, self.block, self.prefix = denoiser, block, prefix

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        strength = self.denoiser.strength
        return (self.denoiser.body.move(args[0], self.block, self.prefix, strength),) if strength else None


def _hooked(blocks: nn.Module, denoiser: PretrainedDenoiser, prefix: int) -> nn.Module:
    """Copy the blocks, with shared weights, and give the copies hooks."""
    result = shared_copy(blocks)
    for name, block in blocks.named_children():
        number = int(name)
        copied = result._modules[name] = shared_copy(block)
        copied.register_forward_pre_hook(_Appending(denoiser, number == 0), with_kwargs=True)
        if (denoiser.body.places[:, 0] == number).any():
            copied.mlp = shared_copy(cast(Any, block).mlp)
            copied.mlp.fc2 = shared_copy(cast(Any, block).mlp.fc2)
            copied.mlp.fc2.register_forward_pre_hook(_Moving(denoiser, number, prefix))
    return result
