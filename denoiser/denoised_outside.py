"""Put a denoiser inside models of other libraries than timm, by classes that extend their methods."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.backbones.outside import Outside, patch_order, shared_tree, unmasked
from dvt.denoiser.derived import derived, reduce_derived
from dvt.denoiser.sharing import PretrainedDenoiser
from dvt.errors import BackboneError, ShapeError
from dvt.grids import Size


class _WholeMap(nn.Module):
    """Denoise the patches of final tokens (B, P + h w, C)."""

    denoiser: PretrainedDenoiser
    denoised_patch: Size
    denoised_prefix: int

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return reduce_derived(self)

    def _grid(self, images: Tensor) -> Size:
        return grids.grid_shape((images.shape[2], images.shape[3]), self.denoised_patch)

    def _clean(self, tokens: Tensor, grid: Size) -> Tensor:
        count = self.denoised_prefix
        if tokens.shape[1] != count + grid[0] * grid[1]:
            raise ShapeError(
                f"the model gave {tokens.shape[1]} tokens where {count} and a grid of {grid} were expected: a denoiser "
                "needs whole token maps, so patches cannot be masked or dropped"
            )
        prefix, patches = tokens[:, :count], tokens[:, count:].unflatten(1, grid)
        return torch.cat((prefix, self.denoiser(patches, prefix).flatten(1, 2)), dim=1)


class DenoisedTransformers(_WholeMap):
    """Change an encoder of transformers to return denoised tokens, and to pool them if it pools patches."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return the encoder's output, with `last_hidden_state` (or the last feature map) denoised."""
        base = cast(Any, super())
        given = dict(zip(signature(base.forward).parameters, args)) | options  # noqa: B905 (most calls give some)
        images = given.get("pixel_values")
        if not isinstance(images, Tensor):
            raise ShapeError(f"{type(self).__name__} takes pixel_values, got {', '.join(given) or 'nothing'}")
        if hasattr(getattr(self, "embeddings", None), "random_masking"):
            given["noise"] = patch_order(images, self.denoised_patch)
        out = base.forward(**given)
        if isinstance(out, tuple):
            return self._tuple(out, given)
        if getattr(out, "feature_maps", None) is not None:
            out.feature_maps = self._maps(out.feature_maps, images)
            return out
        out.last_hidden_state = self._tokens(out.last_hidden_state, given)
        if getattr(out, "pooler_output", None) is not None:
            out.pooler_output = self._pooled(out.last_hidden_state, out.pooler_output, given)
        return out

    def _tuple(self, out: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, ...]:
        if isinstance(out[0], tuple):
            return (self._maps(out[0], given["pixel_values"]), *out[1:])
        clean = self._tokens(out[0], given)
        if len(out) > 1 and isinstance(out[1], Tensor) and out[1].ndim == 2 and "mask_ratio" not in vars(self.config):
            return (clean, self._pooled(clean, out[1], given), *out[2:])
        return (clean, *out[1:])

    def _tokens(self, tokens: Tensor, given: dict[str, Any]) -> Tensor:
        shapes = given.get("spatial_shapes")
        if shapes is None:
            return self._clean(tokens, self._grid(given["pixel_values"]))
        rows = []  # SigLIP 2: each image has its own grid, followed by padding
        for one, (height, width) in zip(tokens, shapes.tolist(), strict=True):
            count = height * width
            clean = self._clean(one[None, :count], (height, width))
            rows.append(torch.cat((clean[0], one[count:])))
        return torch.stack(rows)

    def _pooled(self, tokens: Tensor, raw: Tensor, given: dict[str, Any]) -> Tensor:
        pool = getattr(self, "head", None) or getattr(self, "pooler", None)
        if not isinstance(pool, nn.Module):
            return raw  # it is the class token, which does not change
        mask = given.get("pixel_attention_mask", given.get("attention_mask"))
        return pool(tokens, mask) if "spatial_shapes" in given else pool(tokens)

    def _maps(self, maps: tuple[Tensor, ...], images: Tensor) -> tuple[Tensor, ...]:
        """Denoise the last feature map of a transformers backbone, if it comes from the last block."""
        me = cast(Any, self)
        if me.out_features[-1] != me.stage_names[-1]:
            return maps
        last = maps[-1]
        if last.ndim == 3:
            return (*maps[:-1], self._clean(last, self._grid(images)))
        return (*maps[:-1], self.denoiser(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class DenoisedHub(_WholeMap):
    """Change a model of the DINOv2 or DINOv3 repository to return denoised final tokens."""

    def forward_features(self, x: Any, *args: Any, **options: Any) -> Any:
        """Return the model's output, with `x_norm_patchtokens` denoised."""
        out = cast(Any, super()).forward_features(x, *args, **options)
        if isinstance(out, list):
            return [self._features(one, images) for one, images in zip(out, x, strict=True)]
        return self._features(out, x)

    def get_intermediate_layers(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Return the model's output, with the last block's normalised tokens denoised."""
        base = cast(Any, super())
        names = list(signature(base.get_intermediate_layers).parameters)[1:]
        asked = dict(zip(names, args)) | options  # noqa: B905 (most calls give only some)
        found = base.get_intermediate_layers(x, **asked)
        taken = asked.get("n", 1)
        count = cast(Any, self).n_blocks
        if not asked.get("norm", True) or (not isinstance(taken, int) and count - 1 not in taken):
            return found
        entry = found[-1]
        raw = entry[0] if isinstance(entry, tuple) else entry
        if self.denoiser.config.use_prefix:
            clean = self.forward_features(x)["x_norm_patchtokens"].unflatten(1, self._grid(x))
        else:
            maps = raw.permute(0, 2, 3, 1) if raw.ndim == 4 else raw.unflatten(1, self._grid(x))
            clean = self.denoiser(maps)
        clean = clean.permute(0, 3, 1, 2).contiguous() if raw.ndim == 4 else clean.flatten(1, 2)
        return (*found[:-1], (clean, *entry[1:]) if isinstance(entry, tuple) else clean)

    def _features(self, out: dict[str, Any], images: Tensor) -> dict[str, Any]:
        extra = out.get("x_norm_regtokens", out.get("x_storage_tokens"))
        parts = [out["x_norm_clstoken"][:, None], *([] if extra is None else [extra]), out["x_norm_patchtokens"]]
        clean = self._clean(torch.cat(parts, dim=1), self._grid(images))
        return out | {"x_norm_patchtokens": clean[:, self.denoised_prefix :]}


class DenoisedOpenClip(_WholeMap):
    """Change a visual tower of open_clip to pool and return denoised tokens."""

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tower's pooled output and tokens, both from denoised tokens."""
        me = cast(Any, self)
        if me.final_ln_after_pool:
            pooled, tokens = me._global_pool(self._clean(x, me.grid_size))
            return me.ln_post(pooled), tokens
        return me._global_pool(self._clean(me.ln_post(x), me.grid_size))

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Return the tower's output, with the last block's normalised tokens denoised."""
        base, me = cast(Any, super()), cast(Any, self)
        asked = dict(zip(list(signature(base.forward_intermediates).parameters)[1:], args)) | options  # noqa: B905
        given = base.forward_intermediates(x, **(asked | {"output_extra_tokens": True}))
        count = len(me.transformer.resblocks)
        indices = asked.get("indices")
        taken = indices is None or isinstance(indices, int) or any(i % count == count - 1 for i in indices)
        if taken and bool(asked.get("normalize_intermediates")) != bool(me.final_ln_after_pool):
            last, prefix = given["image_intermediates"][-1], given["image_intermediates_prefix"][-1]
            maps = last.permute(0, 2, 3, 1) if last.ndim == 4 else last.unflatten(1, me.grid_size)
            clean = self.denoiser(maps, prefix)
            clean = clean.permute(0, 3, 1, 2).contiguous() if last.ndim == 4 else clean.flatten(1, 2)
            given["image_intermediates"] = [*given["image_intermediates"][:-1], clean]
        if not asked.get("output_extra_tokens"):
            del given["image_intermediates_prefix"]
        return given


class DenoisedTorchvisionNorm(_WholeMap):
    """Change the final norm of a torchvision ViT, which takes images of one size, to return denoised tokens."""

    denoised_grid: Size

    def forward(self, input: Tensor) -> Tensor:
        """Return the norm's output, denoised."""
        return self._clean(cast(Any, super()).forward(input), self.denoised_grid)


MIXINS: dict[str, type[_WholeMap]] = {
    "transformers": DenoisedTransformers,
    "torch.hub": DenoisedHub,
    "open_clip": DenoisedOpenClip,
    "torchvision": DenoisedTorchvisionNorm,
}


def with_denoiser_outside(model: nn.Module, found: Outside, denoiser: PretrainedDenoiser) -> nn.Module:
    """Copy a model of another library, with shared weights, and put a denoiser of its final tokens into the copy.

    Raises:
        BackboneError: the model already has a denoiser, or the denoiser does not fit there.
    """
    if any(isinstance(module, (_WholeMap, PretrainedDenoiser)) for module in model.modules()):
        raise BackboneError(f"this {type(model).__name__} has a denoiser already; attach the other one to the model")
    _check_maps(found, denoiser)
    clean = shared_tree(model)
    place = clean.get_submodule(found.path)
    if hasattr(getattr(place, "embeddings", None), "random_masking"):  # let the model see all patches, in order
        place.embeddings = unmasked(place).embeddings
    if found.library == "torchvision":
        place = place.encoder.ln
        place.denoised_grid = grids.grid_shape(found.image_size, found.patch_size)
    mixin: Any = MIXINS[found.library]
    kind: Any = type(place)
    place.__class__ = derived(mixin, kind)
    place.denoiser = denoiser
    place.denoised_patch, place.denoised_prefix = found.patch_size, found.num_prefix_tokens
    return clean


def _check_maps(found: Outside, denoiser: PretrainedDenoiser) -> None:
    """Refuse transformers backbones whose feature maps are not the tokens that a denoiser takes."""
    config = getattr(found.encoder, "config", None)
    if not hasattr(found.encoder, "out_features"):
        return
    name = type(found.encoder).__name__
    if not getattr(config, "apply_layernorm", False):
        raise BackboneError(
            f"the feature maps of this {name} come before the final norm, but the denoiser takes tokens after it: "
            "create the model with apply_layernorm=True"
        )
    if denoiser.config.use_prefix:
        raise BackboneError(
            f"this denoiser attends to prefix tokens, which the feature maps of {name} lack: attach it to the model "
            "that gives last_hidden_state"
        )
