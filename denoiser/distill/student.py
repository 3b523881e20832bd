"""Make the copy of a backbone that stage three fine-tunes: add register tokens, and set learning rates by layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dvt.backbones import Backbone, families, load_backbone
from dvt.errors import ConfigError
from dvt.tokens import Tokens

_REGISTER_STD = 0.02


class Student(nn.Module):
    """Copy a backbone in float32 so that it can be trained; it maps images (B, 3, H, W) in [0, 1] to Tokens.

    Parameters without influence on its tokens stay frozen. It stays in evaluation mode during training: there is no
    dropout, and BatchNorm keeps its statistics.
    """

    def __init__(self, backbone: Backbone, registers: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.backbone = with_registers(backbone, registers, generator) if registers else copy.deepcopy(backbone)
        self.backbone.__dict__.pop("weights_sha256", None)  # the cached hash is that of the original weights
        self.backbone.float().requires_grad_(False)
        self.backbone.precision = backbone.precision
        inner = families.core(self.backbone.model)
        for name in layers_of(inner, backbone.layer):
            inner.get_parameter(name).requires_grad_(True)
        self.eval()

    def forward(self, images: Tensor) -> Tokens:
        return self.backbone(images)

    def train(self, mode: bool = True) -> Student:
        return super().train(False)


def with_registers(backbone: Backbone, count: int, generator: torch.Generator | None = None) -> Backbone:
    """Copy a backbone and add register tokens after its prefix tokens.

    Their values are small random numbers; if prefix tokens have position embeddings, those of the registers are zero.
    The model is the one that ``timm.create_model(name, reg_tokens=...)`` makes.

    Args:
        backbone: a backbone from :func:`dvt.load_backbone`.
        count: number of tokens to add, at least 1.
        generator: draws the values; None is torch's global generator.

    Raises:
        ConfigError: timm's models of this family have no register tokens.

    >>> backbone = load_backbone("test_vit", pretrained=False)
    >>> with_registers(backbone, 4)(torch.rand(1, 3, 64, 64)).prefix.shape
    torch.Size([1, 5, 64])
    """
    model: Any = backbone.model
    if type(model).__name__ not in families.REGISTERS:
        raise ConfigError(
            f"timm's {type(model).__name__} ({backbone.name}) has no register tokens; they can be added to "
            f"{' and '.join(families.REGISTERS)}. Choose registers=0 here"
        )
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    added = _REGISTER_STD * torch.randn(1, count, model.embed_dim, generator=generator)
    state["reg_token"] = torch.cat([state[name] for name in ("reg_token",) if name in state] + [added], dim=1)
    if "pos_embed" in state and not model.no_embed_class:
        table, prefix = state["pos_embed"], model.num_prefix_tokens
        state["pos_embed"] = torch.cat((table[:, :prefix], torch.zeros_like(added), table[:, prefix:]), dim=1)
    result = load_backbone(backbone.name, state, layer=backbone.layer, stride=backbone.stride, size=backbone.image_size)
    return result.to(backbone.device)


def layers_of(model: nn.Module, read: int = -1) -> dict[str, int]:
    """Map the names of the parameters that influence the tokens read from a timm model to their layers.

    Modules before the blocks are layer 0, block i is layer i + 1, and modules after the blocks count with the last one.

    Args:
        model: a single-scale timm model.
        read: the block whose output is read, or -1 for the final features.
    """
    inner = families.core(model)
    count, at = len(inner.blocks), 0
    found = {}
    for name, _ in inner.named_parameters():  # in the order in which the model was built
        if name.startswith("blocks."):
            at = int(name.split(".")[1]) + 1
        elif at:
            at = count + 1
        if read == -1 or at <= read + 1:
            found[name] = min(at, count)
    return found


def layer_groups(
    model: nn.Module, decay: float, weight_decay: float, added: bool = False, read: int = -1
) -> list[dict[str, Any]]:
    """Group the parameters of a timm model by layer, for :func:`dvt.training.train`, with layer-wise learning rates.

    The last layer that is read has "lr_scale" 1, the previous one `decay`, the one before decay^2, and so on, as in
    timm.

    Args:
        model: a single-scale timm model.
        decay: factor from each layer to the previous one, in (0, 1].
        weight_decay: weight decay of all parameters except those in ``model.no_weight_decay()``.
        added: True if the model's registers are new; they get scale 1.
        read: as :func:`layers_of` takes it.
    """
    inner, layers = families.core(model), layers_of(model, read)
    plain: set[str] = getattr(inner, "no_weight_decay", set)()
    last = max(layers.values())
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, layer in layers.items():
        key = last if added and name == "reg_token" else layer, 0.0 if name in plain else weight_decay
        groups.setdefault(key, []).append(inner.get_parameter(name))
    return [
        {"params": parameters, "lr_scale": decay ** (last - layer), "weight_decay": value}
        for (layer, value), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
