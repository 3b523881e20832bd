"""Find the tokens of models of other libraries than timm, from the modules themselves.

Known are transformers' single-scale vision models (and the vision towers inside its larger ones), open_clip's visual
towers, torchvision's ``vit_*``, and modules of the DINOv2 and DINOv3 repositories (torch.hub). None of these libraries
is imported here.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.backbones.families import pair
from dvt.errors import BackboneError
from dvt.grids import Size

logger = logging.getLogger(__name__)

Vector = tuple[float, float, float]
Sequencer = Callable[[Any, Tensor], Tensor]

IMAGENET_MEAN: Vector = (0.485, 0.456, 0.406)
IMAGENET_STD: Vector = (0.229, 0.224, 0.225)
CLIP_MEAN: Vector = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Vector = (0.26862954, 0.26130258, 0.27577711)
HALF: Vector = (0.5, 0.5, 0.5)

#: Normalisation of transformers' families by `config.model_type`, if there is no processor.
NORMALISATION: dict[str, tuple[Vector, Vector]] = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "siglip": (HALF, HALF),
    "siglip2": (HALF, HALF),
    "vit_mae": (IMAGENET_MEAN, IMAGENET_STD),
    "vit_msn": (IMAGENET_MEAN, IMAGENET_STD),
    "vit": (HALF, HALF),
    "beit": (HALF, HALF),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov3_vit": (IMAGENET_MEAN, IMAGENET_STD),
}

KNOWN = (
    "transformers' vision models and towers (DINOv2, DINOv3, ViT, ViTMAE, CLIP, SigLIP, ...), open_clip's visual "
    "towers, torchvision's vit_*, modules of the DINOv2 and DINOv3 repositories, and timm's single-scale models"
)


@dataclass(frozen=True)
class Outside:
    """Describe how to read the tokens of a model of another library.

    Attributes:
        library: "transformers", "open_clip", "torchvision" or "torch.hub".
        path: dotted name of the encoder inside the model; "" for the model itself.
        encoder: the module that computes the tokens from normalised images.
        read: function of (encoder, normalised images) that returns (B, P + N, C), the prefix first.
        name: the model's name.
        patch_size, image_size: sizes in pixels.
        num_prefix_tokens: P, the number of prefix tokens.
        feature_dim: C, the number of channels.
        mean, std: normalisation of RGB in [0, 1]; for transformers, use :func:`normalisation`.
    """

    library: str
    path: str
    encoder: nn.Module
    read: Sequencer
    name: str
    patch_size: Size
    image_size: Size
    num_prefix_tokens: int
    feature_dim: int
    mean: Vector = IMAGENET_MEAN
    std: Vector = IMAGENET_STD


def recognise(model: nn.Module) -> Outside | None:
    """Find the encoder of a model of a known library; None for a model of another library.

    Raises:
        BackboneError: the library is known, but this model cannot be read.
    """
    return _transformers(model) or _open_clip(model) or _torchvision(model) or _hub(model)


def inner_timm(model: nn.Module) -> str | None:
    """Find the path of a timm model inside a wrapper of another library; None if there is none."""
    tower = "visual." if hasattr(getattr(model, "visual", None), "trunk") else ""
    for name in ("timm_model", f"{tower}trunk"):
        with_path = _submodule(model, name)
        if with_path is not None and hasattr(with_path, "pretrained_cfg"):
            return name
    return None


def shared_copy(model: nn.Module, kind: type[nn.Module] | None = None) -> Any:
    """Copy a module, optionally to another class, with shared submodules and parameters; later changes are separate."""
    kind = kind or type(model)
    result = kind.__new__(kind)
    containers = (dict, list, set)
    result.__dict__.update({k: copy.copy(v) if isinstance(v, containers) else v for k, v in model.__dict__.items()})
    return result


def shared_tree(model: nn.Module, made: dict[int, nn.Module] | None = None) -> Any:
    """Copy a module and all modules inside it, with the same parameters and buffers.

    Attributes set later on one of them (an input size, a mode, a new head) do not affect the other; values changed in
    place change in both.
    """
    made = {} if made is None else made
    if id(model) not in made:
        made[id(model)] = result = shared_copy(model)
        for name, child in model._modules.items():
            result._modules[name] = None if child is None else shared_tree(child, made)
    return made[id(model)]


def unmasked(encoder: nn.Module) -> Any:
    """Copy a transformers ViTMAE encoder, with shared weights, so that it masks no patch."""
    result = shared_copy(encoder)
    result.embeddings = shared_copy(result.embeddings)
    result.embeddings.config = copy.copy(result.embeddings.config)
    result.embeddings.config.mask_ratio = 0.0
    return result


def patch_order(images: Tensor, patch: Size) -> Tensor:
    """Make the noise (B, h w), by which ViTMAE orders its patches, so that their order does not change."""
    rows, columns = grids.grid_shape((images.shape[2], images.shape[3]), patch)
    order = torch.arange(rows * columns, device=images.device, dtype=torch.float32)
    return order.expand(images.shape[0], -1)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


# transformers ----------------------------------------------------------------------------------------------------


def _transformers(model: Any) -> Outside | None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type") or not hasattr(model, "main_input_name"):
        return None
    path, encoder = _encoder_path(model)
    config = getattr(encoder, "config", config)
    config = getattr(config, "vision_config", config)
    if not hasattr(encoder, "embeddings") or not hasattr(config, "patch_size"):
        raise BackboneError(
            f"{type(model).__name__} of transformers (model_type {config.model_type!r}) has no encoder that dvt knows: "
            "give tokens=, a function of (model, images) that returns (B, N, C) tokens, and patch_size="
        )
    patch = pair(_one_or_two(config.patch_size))
    own = getattr(config, "image_size", None)
    if own is None:  # SigLIP 2 that takes patches
        side = round(config.num_patches**0.5)
        own = (side * patch[0], side * patch[1])
    masking = hasattr(config, "mask_ratio")
    return Outside(
        "transformers",
        path,
        unmasked(encoder) if masking else encoder,
        _read_patches if "spatial_shapes" in _options(encoder) else _read_masked if masking else _read_hidden,
        _hub_name(config, getattr(model, "config", config)) or type(model).__name__,
        patch,
        pair(_one_or_two(own)),
        _prefix_count(encoder.embeddings),
        config.hidden_size,
    )


def _encoder_path(model: Any) -> tuple[str, Any]:
    """Find the module that embeds images itself."""
    path: list[str] = []
    while not hasattr(model, "embeddings"):
        names = ("vision_model", getattr(model, "base_model_prefix", ""))
        name = next((n for n in names if n and isinstance(getattr(model, n, None), nn.Module)), None)
        if name is None or getattr(model, name) is model:
            break
        path.append(name)
        model = getattr(model, name)
    return ".".join(path), model


def _one_or_two(value: Any) -> int | Size:
    return value if isinstance(value, int) else (int(value[0]), int(value[1]))


def _options(encoder: nn.Module) -> Any:
    return inspect.signature(encoder.forward).parameters


def _prefix_count(embeddings: Any) -> int:
    count = 0
    for name in ("cls_token", "class_embedding", "distillation_token", "register_tokens"):
        token = getattr(embeddings, name, None)
        if isinstance(token, Tensor):
            count += token.shape[-2] if token.ndim > 1 else 1
    return count


def _hub_name(*configs: Any) -> str:
    """Name a model as `--backbone` takes it, by the repository or the folder that it was loaded from."""
    for config in configs:
        source = str(getattr(config, "_name_or_path", "") or "")
        if source:
            return f"hf:{Path(source).name if Path(source).is_dir() else source}"
    return ""


def normalisation(model: Any, found: Outside) -> tuple[Vector, Vector]:
    """Find mean and deviation for RGB in [0, 1]: those of the model's processor if there is one, or the family's."""
    if found.library != "transformers":
        return found.mean, found.std
    source = getattr(model.config, "_name_or_path", "")
    if source:
        try:
            from transformers import AutoImageProcessor

            return processor_normalisation(AutoImageProcessor.from_pretrained(source, trust_remote_code=False))
        except Exception as error:  # of the hub's client, of files, of missing packages
            logger.info("%s has no processor that can be loaded: %s", source, error)
    config: Any = found.encoder.config
    kind = str(config.model_type).removesuffix("_vision_model")
    mean, std = NORMALISATION.get(kind, (IMAGENET_MEAN, IMAGENET_STD))
    if kind not in NORMALISATION or kind == "vit":  # the family's weights do not agree: DINO's ViT takes ImageNet's
        logger.warning(
            "there is no processor with the normalisation of this %s: mean %s and deviation %s are used; give "
            "processor=, or mean= and std=",
            type(model).__name__,
            mean,
            std,
        )
    return mean, std


def processor_normalisation(processor: Any) -> tuple[Vector, Vector]:
    """Read mean and deviation, for RGB in [0, 1], from a processor of transformers.

    Raises:
        BackboneError: the processor has no mean or deviation.
    """
    processor = getattr(processor, "image_processor", processor)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None:
        raise BackboneError(f"{type(processor).__name__} has no image_mean and image_std: give mean= and std=")
    if getattr(processor, "do_normalize", True) is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _read_hidden(encoder: Any, images: Tensor) -> Tensor:
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in _options(encoder) else {}
    return encoder(pixel_values=images, **options).last_hidden_state


def _read_masked(encoder: Any, images: Tensor) -> Tensor:
    order = patch_order(images, pair(_one_or_two(encoder.config.patch_size)))
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in _options(encoder) else {}
    return encoder(pixel_values=images, noise=order, **options).last_hidden_state


def _read_patches(encoder: Any, images: Tensor) -> Tensor:
    """Read SigLIP 2, which takes patches (B, h w, p p 3) and their grid."""
    patch = pair(_one_or_two(encoder.config.patch_size))
    rows, columns = grids.grid_shape((images.shape[2], images.shape[3]), patch)
    cut = images.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1])  # (B, 3, h, w, p, p)
    values = cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(values.shape[:2], dtype=torch.long, device=images.device)
    shapes = torch.tensor([[rows, columns]] * len(images), device=images.device)
    out = encoder(pixel_values=values, **{_mask_option(encoder): mask}, spatial_shapes=shapes)
    return out.last_hidden_state


def _mask_option(encoder: Any) -> str:
    return "pixel_attention_mask" if "pixel_attention_mask" in _options(encoder) else "attention_mask"


# The other libraries ---------------------------------------------------------------------------------------------


def _open_clip(model: Any) -> Outside | None:
    path, tower = ("visual", model.visual) if isinstance(getattr(model, "visual", None), nn.Module) else ("", model)
    if not type(tower).__module__.startswith("open_clip.") or not hasattr(tower, "conv1"):
        return None
    if getattr(tower, "attn_pool", None) is not None or not hasattr(tower, "_pool"):
        raise BackboneError(
            f"this {type(tower).__name__} of open_clip pools its tokens by attention, or open_clip is older than 3.0: "
            "its patch tokens cannot be read; give tokens= and patch_size="
        )
    chosen = getattr(tower, "preprocess_cfg", None) or {}
    return Outside(
        "open_clip",
        path,
        tower,
        _read_open_clip,
        type(model).__name__,
        pair(tower.patch_size),
        pair(tower.image_size),
        1,
        tower.conv1.out_channels,
        chosen.get("mean") or CLIP_MEAN,
        chosen.get("std") or CLIP_STD,
    )


def _read_open_clip(tower: Any, images: Tensor) -> Tensor:
    found = tower.forward_intermediates(
        images,
        indices=1,
        normalize_intermediates=not tower.final_ln_after_pool,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat((found["image_intermediates_prefix"][-1], found["image_intermediates"][-1]), dim=1)


def _torchvision(model: Any) -> Outside | None:
    if type(model).__module__ != "torchvision.models.vision_transformer" or not hasattr(model, "class_token"):
        return None
    patch, size = pair(model.patch_size), pair(model.image_size)
    width = model.hidden_dim
    name = f"torchvision vit, {width} channels"
    return Outside("torchvision", "", model, _read_torchvision, name, patch, size, 1, width)


def _read_torchvision(model: Any, images: Tensor) -> Tensor:
    patches = model._process_input(images)
    return model.encoder(torch.cat((model.class_token.expand(len(patches), -1, -1), patches), dim=1))


def _hub(model: Any) -> Outside | None:
    embed: Any = getattr(model, "patch_embed", None)
    if not hasattr(model, "prepare_tokens_with_masks") or not hasattr(embed, "patch_size"):
        return None
    registers = getattr(model, "num_register_tokens", getattr(model, "n_storage_tokens", 0)) or 0
    return Outside(
        "torch.hub",
        "",
        model,
        _read_hub,
        type(model).__name__,
        pair(_one_or_two(embed.patch_size)),
        pair(_one_or_two(getattr(embed, "img_size", 224))),
        1 + registers,
        model.embed_dim,
    )


def _read_hub(model: Any, images: Tensor) -> Tensor:
    out = model.forward_features(images)
    extra = out.get("x_norm_regtokens", out.get("x_storage_tokens"))
    parts = (out["x_norm_clstoken"][:, None], extra, out["x_norm_patchtokens"])
    return torch.cat([part for part in parts if part is not None], dim=1)
