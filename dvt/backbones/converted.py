"""Convert state dicts to timm's form: from transformers' names, blocks in chunks, or prefixes of training code."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

#: The beginnings of an encoder's parameter names in timm, in the DINO repositories and in transformers.
_STARTS = r"(patch_embed\.|embeddings\.patch_embed|embeddings\.cls_token|blocks\.0\.|conv1\.)"
_START = re.compile(rf"^(.*?){_STARTS}")
#: Parts of prefixes that identify the encoder to take if a file holds several; earlier parts have priority.
PREFERRED = ("teacher", "target", "ema", "momentum", "student")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
SHOWN = 4

#: Renames from transformers' names to timm's, applied in this order; names that match no pattern are kept.
_RENAMES: tuple[tuple[str, str], ...] = tuple(
    (re.compile(pattern).pattern, replacement)
    for pattern, replacement in (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.register_tokens$", "register_tokens"),
        (r"^embeddings\.mask_token$", "mask_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^embeddings\.patch_embeddings?\.(?:projection\.)?(weight|bias)$", r"patch_embed.proj.\1"),
        (r"^embeddings\.patch_embedding\.(weight|bias)$", r"patch_embed.proj.\1"),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(?:post_layernorm|layernorm|norm)\.", "norm."),
        (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
        (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.(?:self_attn|attention)\.([qkv])_proj\.", r".attn.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.(?:self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    )
)


def encoder_state(state: Mapping[str, Tensor], source: str) -> State:
    """Select the tensors of a checkpoint's encoder, without their common prefix; log the others.

    Prefixes are such as ``teacher.backbone.``, ``model.backbone.`` or ``vit.``. If a file holds several encoders, the
    teacher's is selected; see :data:`PREFERRED`.
    """
    prefixes: list[str] = []
    for name in state:
        if (found := _START.match(name)) and found[1] not in prefixes:
            prefixes.append(found[1])
    # timm's own conversions recognise these by their prefix.
    if not prefixes or "" in prefixes or all(p.startswith(("visual.", "module.visual.")) for p in prefixes):
        return dict(state)
    ranks = {p: next((i for i, word in enumerate(PREFERRED) if word in p), len(PREFERRED)) for p in prefixes}
    prefix = min(prefixes, key=lambda p: (ranks[p], "decoder" in p, len(p)))
    taken = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    left = [name for name in state if not name.startswith(prefix)]
    if left:
        shown = ", ".join(left[:SHOWN]) + (", ..." if len(left) > SHOWN else "")
        logger.warning(
            "%s: loaded the encoder under %r, left out %d other tensors: %s", source, prefix, len(left), shown
        )
    return taken


def unchunked(state: Mapping[str, Tensor]) -> State:
    """Rename the blocks of a model that was trained in chunks from ``blocks.0.3.`` to ``blocks.3.``."""
    blocks = [name for name in state if name.startswith("blocks.")]
    if not blocks or not all(_CHUNKED.match(name) for name in blocks):
        return dict(state)
    return {_CHUNKED.sub(r"blocks.\1.", name): value for name, value in state.items()}


def is_of_transformers(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has transformers' names."""
    return any(name.startswith("embeddings.patch_embedding") for name in state)


def timm_names(state: Mapping[str, Tensor], model: Any) -> State:
    """Rename the tensors of a vision model of transformers to the names in timm's model of the same weights.

    Takes DINOv2, DINOv3, ViT, ViTMAE, CLIP and SigLIP. Tensors that timm lacks (poolers, heads) keep their names.

    Args:
        state: the tensors by name, without a prefix.
        model: the timm model; its names show if it has one projection for queries, keys and values, or three.
    """
    own = set(model.state_dict())
    rotary = "pos_embed" not in own and any("gamma_1" in name for name in own)  # DINOv3 is timm's Eva
    renamed: State = {}
    for name, value in state.items():
        new = _renamed(name)
        if rotary:
            new = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", new)
            new = new.replace("register_tokens", "reg_token").replace(".mlp.up_proj.", _up(own))
            new = new.replace(".mlp.down_proj.", ".mlp.fc2.").replace(".mlp.gate_proj.", ".mlp.fc1_g.")
        if new == "pos_embed" and value.ndim == 2:
            value = value[None]
        if new == "cls_token" and value.ndim == 1:
            value = value[None, None]
        renamed[new] = value
    if "attn_pool.in_proj.weight" in renamed:
        _split_pool(renamed)
    joined = _joined(renamed, own)
    # With a mask token, timm's own conversions would mistake the state for one of the original repositories.
    return {name: value for name, value in joined.items() if name != "mask_token" or "register_tokens" in joined}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _up(own: set[str]) -> str:
    return ".mlp.fc1_x." if any(".mlp.fc1_x." in name for name in own) else ".mlp.fc1."


def _split_pool(state: State) -> None:
    """Split SigLIP's joint pooling projection into timm's two: for queries, and for keys and values."""
    for kind in ("weight", "bias"):
        queries, keys, values = state.pop(f"attn_pool.in_proj.{kind}").chunk(3)
        state |= {f"attn_pool.q.{kind}": queries, f"attn_pool.kv.{kind}": torch.cat((keys, values))}


def _joined(state: State, own: set[str]) -> State:
    """Join the three projections of each block into one; in DINOv3, as in timm's Eva, keys have no bias."""
    result = dict(state)
    places = {name.rpartition(".attn.")[0] for name in state if re.search(r"\.attn\.(q_proj|query)\.weight$", name)}
    for place in places:
        style = ("q_proj", "k_proj", "v_proj") if f"{place}.attn.q_proj.weight" in state else ("query", "key", "value")
        weights = [result.pop(f"{place}.attn.{part}.weight") for part in style]
        biases = [result.pop(f"{place}.attn.{part}.bias", None) for part in style]
        result[f"{place}.attn.qkv.weight"] = torch.cat(weights)
        if f"{place}.attn.qkv.bias" not in own:
            result |= {
                f"{place}.attn.{letter}_bias": bias
                for letter, bias in zip("qkv", biases, strict=True)
                if bias is not None
            }
        elif any(bias is not None for bias in biases):
            rows = [
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
            result[f"{place}.attn.qkv.bias"] = torch.cat(rows)
    return result
