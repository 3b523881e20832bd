"""Load any single-scale timm model as a backbone, with timm's weights or with a file of weights."""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dvt import grids
from dvt.backbones import families
from dvt.backbones.backbone import Backbone, checked_stride, rounded_size
from dvt.backbones.converted import State, encoder_state, is_of_transformers, timm_names, unchunked
from dvt.backbones.hub import hub_or_cache, without_hub
from dvt.backbones.names import LOCAL, TRANSFORMERS, check_timm_name, resolved_name
from dvt.backbones.positions import grid_of_weights
from dvt.backbones.weights import folder_weights, load_state, read_state
from dvt.backbones.wrapped import load_transformers, timm_backbone, timm_name
from dvt.errors import BackboneError, WeightsError
from dvt.grids import Size

if TYPE_CHECKING:
    from dvt.store.job import Job

logger = logging.getLogger(__name__)


def load_backbone(
    name: str,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    pretrained: bool = True,
    layer: int = -1,
    stride: int | Size | None = None,
    size: int | Size | None = None,
) -> Backbone:
    """Load any single-scale timm model as a backbone, frozen and in evaluation mode.

    Args:
        name: a timm name such as ``vit_small_patch14_dinov2.lvd142m``, or ``hf-hub:organisation/model``; a name that
            other libraries use for the same weights (``dinov2_vits14``, ``facebook/dinov2-small``); a folder that
            timm or transformers saved; or ``hf:NAME_OR_FOLDER``, a model of transformers.
        weights: a .safetensors file, a .pth of tensors, or a state dict; None downloads timm's own from the Hugging
            Face hub. It may have the names of transformers or of the DINO repositories, and the prefixes and heads of
            training code. A classifier in it is left out, and position embeddings of another grid are resampled.
            The model gets as many register tokens as the file has, even if timm's model of this name has fewer or more.
        pretrained: False gives random weights, for tests.
        layer: -1 is the last block as timm's ``forward_features`` returns it, after the final norm where the model
            has one (models that pool first and norm afterwards have none; SAM's neck and XCiT's class attention
            belong to it). Another index reads the tokens after that block; the last index means -1.
        stride: pixels between neighbouring patches, from 1 to the patch size; below the patch size, patches overlap.
        size: input size in pixels, one number for a square or (height, width), rounded to the patch.

    Raises:
        BackboneError: the name is unknown, the model has several scales, there is no network, or the model does not
            support the layer, stride or size.
        WeightsError: the file does not hold finite weights of this model.

    >>> backbone = load_backbone("test_vit", pretrained=False)
    >>> tokens = backbone(torch.rand(1, 3, 160, 240))
    >>> tokens.grid, tokens.feature_dim, backbone.num_prefix_tokens
    ((10, 15), 64, 1)
    """
    name = resolved_name(name)
    if name.startswith(TRANSFORMERS):
        return load_transformers(name, weights, pretrained, layer, stride, size)
    if weights is None and pretrained and name.startswith(LOCAL):
        weights = folder_weights(Path(name.removeprefix(LOCAL)))
    state = _given_state(weights)
    with torch.device("meta"):  # check the arguments before gigabytes are downloaded
        skeleton = _create(name, pretrained=False)
    _check_single_scale(skeleton, name)
    layer = _checked_layer(layer, len(families.core(skeleton).blocks), name)
    patch = families.patch_size(skeleton)
    steps = checked_stride(stride, patch, name)
    if steps != patch and families.patch_convolution(skeleton) is None:
        raise BackboneError(f"{name} does not cut its patches by a plain convolution: it takes no stride but {patch}")
    image_size = _checked_size(skeleton, name, size, patch)

    options: dict[str, Any] = {"dynamic_img_size": True} if type(skeleton).__name__ in families.DYNAMIC else {}
    options |= _register_option(skeleton, state or {})
    model = _create(name, pretrained=pretrained and state is None, **options)
    source = ""
    if state is not None:
        source = "the state dict" if isinstance(weights, Mapping) else str(weights)
        _load_weights(model, state, image_size if size else None, source)
    if families.sizing(model) in ("loaded", "square"):
        _regrid(model, image_size, grids.grid_shape(image_size, patch, steps))
    if (convolution := families.patch_convolution(model)) is not None:
        convolution.stride = steps
    name = timm_name(model) if name.startswith(LOCAL) else name
    origin = "random weights" if state is None and not pretrained else "timm's weights" if state is None else source
    logger.info("loaded %s: %s, images of %d x %d, patches of %d x %d", name, origin, *image_size, *patch)
    return timm_backbone(model, name, layer, patch, steps, image_size)


def named_patch_size(name: str) -> Size:
    """Find the size (height, width) of a timm model's patches, without its weights.

    Raises:
        BackboneError: timm has no such model.
    """
    with torch.device("meta"):
        return families.patch_size(_create(resolved_name(name), pretrained=False))


def overlapping_patches(job: Job, grid: Size, needed: bool = False) -> tuple[Size, Size] | None:
    """Find the size and the stride of a store's patches if they overlap; None where they tile the image.

    Args:
        job: the store's.
        grid: (h, w) of one of its images.
        needed: raise an error where the name of the backbone does not tell the size, instead of warning and answering
            None, which draws the patches as tiles.

    Raises:
        BackboneError: with `needed`, the patches may overlap, and nothing tells their size.
    """
    if job.stride is None:
        return None
    stride = families.pair(job.stride)  # type: ignore[arg-type]
    side = None if job.size is None else min(families.pair(job.size))  # type: ignore[arg-type]
    if min(n * d for n, d in zip(grid, stride, strict=True)) == side:
        return None
    try:
        return named_patch_size(job.backbone), stride
    except BackboneError:
        if needed:
            raise
        logger.warning("the name %r does not tell how far patches overlap: drawn as tiles, a little off", job.backbone)
        return None


def _given_state(weights: str | Path | Mapping[str, Tensor] | None) -> State | None:
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return unchunked(encoder_state(weights, "the state dict"))
    return read_state(weights)


def single_scale_models(family: str | None = None) -> Iterator[tuple[str, str, families.Model]]:
    """List (family, architecture, model without weights) of every timm model that dvt takes.

    Args:
        family: one timm module such as "eva"; None goes through all of them, which takes a minute. Only the first
            model of each family is checked: no family of timm mixes single-scale and hierarchical models.
    """
    for module in [family] if family else timm.list_modules():
        for number, name in enumerate(timm.list_models(module=module)):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False, num_classes=0)
            if families.scales(model) == 1:
                yield module, name, model
            elif number == 0:
                break


def _checked_layer(layer: int, count: int, name: str) -> int:
    if not -count <= layer < count:
        raise BackboneError(f"{name} has {count} blocks: layer must lie in {-count} ... {count - 1}, got {layer}")
    return -1 if layer % count == count - 1 else layer % count


def _checked_size(model: families.Model, name: str, size: int | Size | None, patch: Size) -> Size:
    own = rounded_size(families.own_size(model), patch)
    asked = own if size is None else rounded_size(size, patch)
    kind = families.sizing(model)
    if kind == "own" and asked != own:
        raise BackboneError(f"{name} mixes a fixed number of patches: it takes only size {own}, got {size}")
    if kind == "square" and asked[0] // patch[0] != asked[1] // patch[1]:
        raise BackboneError(f"{name} takes only square grids of patches, got size {size}; its own is {own}")
    return asked


def _check_single_scale(model: families.Model, name: str) -> None:
    count = families.scales(model)
    if count == 0:
        raise BackboneError(f"{name} ({type(model).__name__}) gives no intermediate features, so dvt cannot read it")
    if count > 1:
        raise BackboneError(
            f"{name} ({type(model).__name__}) is hierarchical: its features come at {count} scales. dvt takes "
            "single-scale models, such as ViTs, whose blocks all keep one grid of patches"
        )


def _create(name: str, pretrained: bool, **options: Any) -> families.Model:
    """Make a timm model without a classifier."""
    check_timm_name(name)
    remote = pretrained or name.startswith("hf-hub:")
    why: str | None = None
    try:
        with hub_or_cache() if remote else nullcontext() as why:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # each hub client raises its own kinds, and timm plain RuntimeErrors
        if why is not None:
            said = without_hub(f"the weights of {name!r}", why, _repository(name), "model.safetensors", _OPTION)
            raise BackboneError(said) from error
        raise BackboneError(
            f"cannot get the model {name!r}: {type(error).__name__}: {error}\n"
            "Without a network, or for a model without published weights, give a file with --weights FILE "
            "(in Python weights=...); `dvt demo` needs no network"
        ) from error


_OPTION = "--weights FILE (in Python weights=...)"


def _repository(name: str) -> str | None:
    """Find the hub's repository of timm's weights."""
    if name.startswith("hf-hub:"):
        return name.partition(":")[2]
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    found = getattr(known, "hf_hub_id", None)
    return f"{found}{getattr(known, 'name', '')}" if found and found.endswith("/") else found


def _regrid(model: families.Model, image_size: Size, grid: Size) -> None:
    """Give a model that was built for one size another: position embeddings and relative positions are resampled."""
    embed = families.embedding(model)
    old = tuple(embed.grid_size)
    embed.img_size = image_size
    if old == grid:
        return
    embed.grid_size, embed.num_patches = grid, math.prod(grid)
    if hasattr(model, "num_patches"):
        model.num_patches = math.prod(grid)
    for name in ("pos_embed", "patch_pos"):
        table = getattr(model, name, None)
        if table is not None:
            prefix = table.shape[1] - math.prod(old)
            setattr(model, name, nn.Parameter(resample_abs_pos_embed(table.detach(), list(grid), list(old), prefix)))
    for module in model.modules():
        if hasattr(module, "set_window_size"):
            module.set_window_size(grid)


def _load_weights(model: families.Model, state: State, size: Size | None, source: str) -> None:
    """Load a user's file through timm's own conversion for the family."""
    own = model.state_dict()
    other_shapes = any(k in own and own[k].shape != v.shape for k, v in state.items())
    asked = None if size is None else grids.grid_shape(size, families.patch_size(model))
    found = grid_of_weights(model, state, asked, source)
    sized = getattr(families.embedding(model), "grid_size", None)
    if size is not None and asked is not None and sized and (other_shapes or found == asked):
        # A file made for the requested size is loaded unchanged, not resampled to the model's own size and back.
        _regrid(model, size, asked)
    try:
        if is_of_transformers(state):
            state = timm_names(state, model)
        with _made_for(model, size if found is not None else None):
            state = _conversion(model)(dict(state))
    except Exception as error:  # timm's conversions index and reshape without checks
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: timm's conversion failed with {error!r}; "
            "are these the weights of another architecture?"
        ) from error
    own = model.state_dict()
    lost = [k for k, v in state.items() if k.endswith((".q_bias", ".v_bias")) and k not in own and v.any()]
    if lost:
        raise WeightsError(
            f"{source} has biases of queries and values ({lost[0]}, ...) that {type(model).__name__} as built by this "
            "name lacks: load it as timm's model whose name has _qkvb"
        )
    load_state(model, state, source)


@contextmanager
def _made_for(model: families.Model, size: Size | None) -> Iterator[None]:
    """Tell timm's conversion, which reads the model's record, the input size that a file was made for."""
    own: Any = getattr(model, "pretrained_cfg", None)
    if size is None or not isinstance(own, Mapping):
        yield
        return
    model.pretrained_cfg = {**own, "input_size": (3, *size)}
    try:
        yield
    finally:
        model.pretrained_cfg = own


def _register_option(model: families.Model, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """List timm's arguments that give the model the register tokens of a file."""
    option = families.REGISTERS.get(type(model).__name__)
    found = [n for n in ("reg_token", "register_tokens", "storage_tokens", "embeddings.register_tokens") if n in state]
    if option is None or not found or state[found[0]].ndim != 3:
        return {}
    count = state[found[0]].shape[1]
    own = 0 if model.reg_token is None else model.reg_token.shape[1]
    if count == own:
        return {}
    # DINOv2's registers have no position, nor has its class token then (timm's conversion adds it to the token).
    positionless = "register_tokens" in found[0] and option == "reg_tokens"
    return {option: count} | ({"no_embed_class": True} if positionless else {})


def _conversion(model: families.Model) -> Callable[[State], State]:
    """Apply timm's filter for a family's checkpoints: names of other projects, position embeddings of other grids."""
    module = sys.modules[type(model).__module__]
    kind = "classifier" if families.core(model) is not model else "encoder"
    function = getattr(module, "checkpoint_filter_fn", getattr(module, f"checkpoint_filter_fn_{kind}", None))
    if function is None:
        return lambda state: state
    adapt = "adapt_layer_scale" in inspect.signature(function).parameters  # DeiT-III as its authors published it
    return partial(function, model=model, **({"adapt_layer_scale": True} if adapt else {}))
