"""Backbones against plain timm, forward hooks, and planted coordinates; weights files good and bad."""

import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dvt.backbones import families, load_backbone, wrap
from dvt.backbones.catalogue import SMALLEST, family_table, try_size
from dvt.backbones.load import _check_single_scale
from dvt.backbones.weights import load_state, read_state
from dvt.backbones.wrapped import timm_backbone
from dvt.errors import BackboneError, ShapeError, WeightsError
from dvt.tokens import Tokens

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "backbones.md"

# What each family must do, written down by hand: prefix tokens at the last and at an earlier layer, stride, module
# whose output is the last layer's (checked by a forward hook).
PREFIX = {"cait": (1, 0), "convit": (1, 0), "deit": (1, 1), "eva": (5, 5), "beit": (1, 1), "naflexvit": (4, 4)}
PREFIX |= {"tnt": (1, 1), "vision_transformer": (1, 1), "vision_transformer_hybrid": (1, 1), "xcit": (1, 0)}
NO_STRIDE = {"gemma4_vit", "mlp_mixer", "naflexvit", "tnt", "vision_transformer_hybrid", "vitamin", "xcit"}
FIXED = {"beit", "cait", "convit", "mlp_mixer", "tnt", "vision_transformer_relpos"}
SIZE = dict.fromkeys(FIXED, (64, 96)) | {"convit": 64, "mlp_mixer": 224}
LAST = {"vision_transformer_sam": "neck", "convmixer": "blocks.31", "gemma4_vit": "blocks.15", "qwen3_vit": "blocks.11"}
SMALL = [name for name, m in SMALLEST.items() if not re.search("base|88m|167m|412m|samvit", m)]


@pytest.fixture(scope="module", params=sorted(SMALLEST))
def family(request):
    """A family and its smallest architecture with random weights, made once for all tests of the family."""
    torch.manual_seed(0)  # timm's initialisers take no generator
    return request.param, load_backbone(SMALLEST[request.param], pretrained=False, size=SIZE.get(request.param))


def images(count, size, seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def captured(module, run):
    """The first output of a module while a function runs."""
    seen = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        result = run()
    handle.remove()
    return seen[0], result


def sequence(output, channels):
    """(B, N, C) from whatever layout a timm block answers in."""
    output = output[1] if isinstance(output, tuple) else output  # TNT: (pixels, patches)
    if output.ndim == 4 and output.shape[-1] != channels:
        output = output.permute(0, 2, 3, 1)
    return output.flatten(1, 2) if output.ndim == 4 else output


def test_family_shapes(family):
    name, backbone = family
    size = try_size(backbone)
    with torch.no_grad():
        tokens = backbone(images(2, size))
    height, width = (s // p for s, p in zip(size, backbone.patch_size, strict=True))
    assert tokens.patches.shape == (2, height, width, backbone.feature_dim)
    assert tokens.prefix.shape == (2, PREFIX.get(name, (0, 0))[0], backbone.feature_dim)
    assert backbone.num_prefix_tokens == tokens.prefix.shape[1]
    assert tokens.patches.isfinite().all() and tokens.patches.flatten(1, 2).std(1).mean() > 0
    assert backbone.fixed_size == (name in FIXED)
    assert (height == width) == (name in ("convit", "mlp_mixer"))


def test_family_is_deterministic_and_batch_independent(family):
    _, backbone = family
    batch = images(2, try_size(backbone))
    with torch.no_grad():
        both, again, second = backbone(batch), backbone(batch), backbone(batch[1:])
    assert torch.equal(both.patches, again.patches) and torch.equal(both.prefix, again.prefix)
    torch.testing.assert_close(both.patches[1:], second.patches, rtol=1e-3, atol=1e-4)
    assert not torch.equal(both.patches[0], both.patches[1])


def test_family_last_layer_is_the_final_norm(family):
    name, backbone = family
    core = families.core(backbone.model)
    module = core.get_submodule(LAST.get(name, "norm"))
    reference, tokens = captured(module, lambda: backbone(images(1, try_size(backbone))))
    reference = sequence(reference, backbone.feature_dim)
    count = PREFIX.get(name, (0, 0))[0]
    assert torch.equal(tokens.patches.flatten(1, 2), reference[:, count:])
    assert torch.equal(tokens.prefix, reference[:, :count])


def test_family_earlier_layer_is_the_block(family):
    name, last = family
    backbone = timm_backbone(last.model, last.name, 1, last.patch_size, last.stride, last.image_size)
    block = families.core(last.model).blocks[1]
    reference, tokens = captured(block, lambda: backbone(images(1, try_size(backbone))))
    reference = sequence(reference, backbone.feature_dim)
    count = PREFIX.get(name, (0, 0))[1]
    assert torch.equal(tokens.patches.flatten(1, 2), reference[:, count:])
    assert torch.equal(tokens.prefix, reference[:, :count])
    assert backbone.num_prefix_tokens == count


@pytest.mark.parametrize("name", SMALL)
def test_family_equals_plain_timm(name):
    """The whole path (normalisation, size handling, splitting) against the model that timm makes by itself."""
    plain = timm.create_model(SMALLEST[name], pretrained=False, num_classes=0).eval()
    backbone = load_backbone(SMALLEST[name], pretrained=False)
    backbone.model.load_state_dict(plain.state_dict())
    batch = images(1, backbone.image_size)
    mean, std = (torch.tensor(plain.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        reference = sequence(plain.forward_features((batch - mean) / std), backbone.feature_dim)
        tokens = backbone(batch)
    found = torch.cat((tokens.prefix, tokens.patches.flatten(1, 2)), 1)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "patch", "prefix"),
    [
        ("deit_tiny_distilled_patch16_224", 16, 2),
        ("deit3_small_patch16_224", 16, 1),
        ("vit_small_patch14_dinov2", 14, 1),
        ("vit_small_patch14_reg4_dinov2", 14, 5),
        ("vit_small_patch16_dinov3", 16, 5),
        ("vit_base_patch16_siglip_512", 16, 0),
        ("vit_base_patch16_clip_224", 16, 1),
        ("vit_pe_spatial_tiny_patch16_512", 16, 1),
        ("eva02_tiny_patch14_336", 14, 1),
        ("beitv2_large_patch16_224", 16, 1),
        ("gemma4_vit_167m_enc", 16, 0),
        ("qwen3_vit_88m_enc", 16, 0),
    ],
)
def test_well_known_models(name, patch, prefix):
    """Prefix tokens and grid of models that users ask for by name; shapes only, without memory for their weights."""
    with torch.device("meta"), torch.no_grad():
        backbone = load_backbone(name, pretrained=False)
        size = backbone.image_size if backbone.fixed_size else backbone.input_size((300, 450))
        tokens = backbone(torch.rand(1, 3, *size))
    assert backbone.patch_size == (patch, patch) and tokens.prefix.shape[1] == prefix
    assert tokens.grid == (size[0] // patch, size[1] // patch)


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_family_stride(name):
    if name in NO_STRIDE:
        with pytest.raises(BackboneError, match="stride"):
            load_backbone(SMALLEST[name], pretrained=False, stride=4)
        return
    patch = {"deepseek_vit": 14, "convmixer": 7}.get(name, 16)
    across = patch // 2 if name == "convit" else patch  # ConViT's grid must stay square
    size = (4 * patch, 4 * patch) if name == "convit" else (4 * patch, 6 * patch)
    with torch.device("cpu" if name in SMALL else "meta"), torch.no_grad():
        backbone = load_backbone(SMALLEST[name], pretrained=False, stride=(patch // 2, across), size=size)
        tokens = backbone(torch.rand(1, 3, *size))
    assert backbone.stride == (patch // 2, across)
    assert tokens.grid == backbone.grid(size) == (3 * patch // (patch // 2) + 1, 7 if name == "convit" else 6)
    assert tokens.patches.is_meta or tokens.patches.isfinite().all()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "test_vit_relpos"])
def test_size_at_load_equals_timm_s_own_resizing(name, tmp_path):
    plain = timm.create_model(name, pretrained=False, num_classes=0).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in plain.named_parameters():
        if key.endswith(("pos_embed", "relative_position_bias_table")):
            value.data.normal_(generator=generator)
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(name, weights=tmp_path / "w.safetensors", size=(64, 96))
    plain.set_input_size((64, 96))
    batch = images(1, (64, 96))
    with torch.no_grad():
        tokens = backbone(batch)
        reference = plain.forward_features((batch - backbone.mean) / backbone.std)
    assert backbone.image_size == (64, 96) and tokens.grid == (4, 6)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), reference[:, backbone.num_prefix_tokens :])


def test_cait_and_tnt_take_a_size_at_load():
    for name in ("cait_xxs24_224", "tnt_s_legacy_patch16_224"):
        backbone = load_backbone(name, pretrained=False, size=(64, 96))
        assert backbone(images(1, (64, 96))).grid == (4, 6)
        assert backbone.input_size((1000, 500)) == (64, 96)
        with pytest.raises(ShapeError, match="takes only"):
            backbone(images(1, (96, 64)))


def test_sizes_that_a_family_cannot_take():
    with pytest.raises(BackboneError, match=r"\(224, 224\).*320"):
        load_backbone("gmlp_ti16_224", pretrained=False, size=320)
    with pytest.raises(BackboneError, match="square"):
        load_backbone("convit_tiny", pretrained=False, size=(64, 96))
    with pytest.raises(BackboneError, match="positive"):
        load_backbone("test_vit", pretrained=False, size=0)


# Sizes, grids, layers, strides -----------------------------------------------------------------------------------


def test_input_size_keeps_the_aspect_ratio():
    backbone = load_backbone("test_vit", pretrained=False, size=230)
    assert backbone.image_size == (224, 224) and backbone.patch_size == (16, 16)
    assert backbone.input_size((320, 480)) == (224, 336)
    assert backbone.input_size((480, 320)) == (336, 224)
    assert backbone.grid((224, 336)) == (14, 21)
    expected = torch.tensor([[8 / 336, 8 / 224], [24 / 336, 8 / 224]])
    torch.testing.assert_close(backbone.centres((224, 336))[0, :2], expected)


@pytest.mark.parametrize("stride", [None, 8, (4, 16)])
def test_centres_are_where_the_patches_look(stride):
    """A convolution that averages its patch reads, from an image of coordinates, the centre of each patch."""
    net = torch.nn.Conv2d(3, 3, 16, stride or 16, bias=False)
    net.weight.data = torch.eye(3)[:, :, None, None].expand(3, 3, 16, 16) / 256
    backbone = wrap(
        net,
        lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)),
        16,
        name="mean",
        mean=(0, 0, 0),
        std=(1, 1, 1),
        stride=stride,
    )
    height, width = 64, 96
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    tokens = backbone(torch.stack((x, y, x))[None])
    torch.testing.assert_close(tokens.patches[0, ..., :2], backbone.centres((height, width)), rtol=0, atol=1e-5)


def test_stride_one_patch_off_is_the_same_patch():
    """With half the stride, every second patch sees the same pixels: without positions the embedding is the same."""
    plain, dense = (load_backbone("test_vit", pretrained=False, stride=s) for s in (None, 8))
    dense.model.load_state_dict(plain.model.state_dict())
    batch = images(1, (64, 96))
    coarse, _ = captured(plain.model.patch_embed, lambda: plain(batch))
    fine, tokens = captured(dense.model.patch_embed, lambda: dense(batch))
    assert tokens.grid == (7, 11)
    torch.testing.assert_close(fine[:, ::2, ::2], coarse)


def test_layers_are_normalised_and_checked():
    assert [load_backbone("test_vit", pretrained=False, layer=k).layer for k in (-1, 5, -2, -6, 0)] == [-1, -1, 4, 0, 0]
    for layer in (6, -7):
        with pytest.raises(BackboneError, match=r"6 blocks.*-6 \.\.\. 5"):
            load_backbone("test_vit", pretrained=False, layer=layer)
    assert load_backbone("test_vit", pretrained=False).num_layers == 6


def test_sam_neck_changes_the_channels_of_the_last_layer():
    with torch.device("meta"):
        last = load_backbone("samvit_base_patch16", pretrained=False)
        early = load_backbone("samvit_base_patch16", pretrained=False, layer=3)
        assert (last.feature_dim, early.feature_dim) == (256, 768)
        assert last(torch.rand(1, 3, 64, 96)).patches.shape == (1, 4, 6, 256)


@pytest.mark.parametrize("stride", [0, 17, (8, 20), -4])
def test_strides_outside_the_patch_are_refused(stride):
    with pytest.raises(BackboneError, match=r"between 1 and the patch size \(16, 16\)"):
        load_backbone("test_vit", pretrained=False, stride=stride)


def test_images_of_wrong_shape_are_refused():
    backbone = load_backbone("test_vit", pretrained=False)
    for bad in (torch.rand(3, 160, 160), torch.rand(1, 1, 160, 160), torch.zeros(1, 3, 160, 160, dtype=torch.uint8)):
        with pytest.raises(ShapeError, match="B, 3, H, W"):
            backbone(bad)
    with pytest.raises(ShapeError, match=r"resize to \(160, 192\)"):
        backbone(torch.rand(1, 3, 160, 190))


# Names -----------------------------------------------------------------------------------------------------------


def test_unknown_names_come_with_close_ones():
    with pytest.raises(BackboneError, match="vit_small_patch14_dinov2"):
        load_backbone("vit_smal_patch14_dinov2")
    with pytest.raises(BackboneError, match="lvd142m"):
        load_backbone("vit_small_patch14_dinov2.lvd")
    with pytest.raises(BackboneError, match="hf-hub"):
        load_backbone("somebody/some-model")


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto", "hiera_tiny_224", "pvt_v2_b0"]
)
def test_hierarchical_models_are_refused_with_the_reason(name):
    with pytest.raises(BackboneError, match=r"hierarchical.*scales.*single-scale"):
        load_backbone(name)


def test_models_without_intermediate_features_are_refused():
    with pytest.raises(BackboneError, match="no intermediate features"):
        _check_single_scale(torch.nn.Linear(3, 3), "a layer")  # timm 1.0.31 has no such model any more


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k", "hf-hub:nobody/nothing"])
def test_without_a_network_the_error_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError) as caught:
        load_backbone(name)
    assert name in str(caught.value) and "--weights" in str(caught.value) and "dvt demo" in str(caught.value)


# State of the module ---------------------------------------------------------------------------------------------


def test_frozen_in_evaluation_mode_and_can_be_unfrozen():
    backbone = load_backbone("test_vit", pretrained=False)
    assert not backbone.training and not backbone.model.training
    assert not any(p.requires_grad for p in backbone.parameters())
    backbone.requires_grad_(True)
    backbone(images(1, (32, 32))).patches.square().sum().backward()
    assert backbone.model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_dtype_follows_the_parameters_and_autocast():
    backbone = load_backbone("test_vit", pretrained=False)
    with torch.no_grad():
        full = backbone(images(1, (64, 64))).patches
        with torch.autocast("cpu", torch.bfloat16):
            mixed = backbone(images(1, (64, 64))).patches
        half = backbone.to(torch.bfloat16)(images(1, (64, 64))).patches
    assert full.dtype == torch.float32 and half.dtype == torch.bfloat16
    for low in (mixed, half):
        assert (low.float() - full).norm() < 0.05 * full.norm()


def test_backbone_survives_pickling(tmp_path):
    backbone = load_backbone("test_vit", pretrained=False, layer=2)
    copy = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(copy(images(1, (32, 48))).patches, backbone(images(1, (32, 48))).patches)


# Weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A model with a classifier whose every tensor is random, as a checkpoint would have it."""
    model = timm.create_model("test_vit", pretrained=False, num_classes=10).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return model


def reference_tokens(model, batch):
    with torch.no_grad():
        return model.forward_features((batch - 0.5) / 0.5)[:, 1:]


@pytest.mark.parametrize("form", ["safetensors", "plain.pth", "wrapped.pth", "parallel.bin", "half.safetensors"])
def test_weights_of_every_form_are_loaded(form, trained, tmp_path):
    state = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "half.safetensors":
        save_file({k: v.half() for k, v in state.items()}, path)
    elif form == "plain.pth":
        torch.save(state, path)
    elif form == "wrapped.pth":
        torch.save({"epoch": 3, "state_dict": {f"model.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    backbone = load_backbone("test_vit", weights=path)
    assert backbone.model.patch_embed.proj.weight.dtype == torch.float32
    batch = images(1, (160, 160))
    tolerance = 0.05 if "half" in form else 1e-5
    found = backbone(batch).patches.flatten(1, 2)
    torch.testing.assert_close(found, reference_tokens(trained, batch), rtol=0, atol=tolerance)


def test_position_embeddings_of_another_grid(trained, tmp_path):
    """A file of another size is resampled by timm's own function; at its own size it is taken as it is."""
    other = timm.create_model("test_vit", pretrained=False, num_classes=10, img_size=96).eval()
    other.load_state_dict({k: v for k, v in trained.state_dict().items() if k != "pos_embed"}, strict=False)
    other.pos_embed.data.normal_(generator=torch.Generator().manual_seed(2))
    path = tmp_path / "at96.safetensors"
    save_file(other.state_dict(), path)
    batch = images(1, (96, 96))
    exact = load_backbone("test_vit", weights=path, size=96)(batch).patches.flatten(1, 2)
    torch.testing.assert_close(exact, reference_tokens(other, batch), rtol=0, atol=1e-5)
    resampled = load_backbone("test_vit", weights=path).model.pos_embed
    expected = timm.layers.resample_abs_pos_embed(other.pos_embed, [10, 10], [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(resampled, expected)


def test_weights_of_a_size_that_timm_does_not_convert(tmp_path):
    """timm's filter for CaiT resamples nothing: the size that the file was made for makes the shapes fit."""
    plain = timm.create_model("cait_xxs24_224", pretrained=False, num_classes=10, img_size=64).eval()
    path = tmp_path / "at64.safetensors"
    save_file(plain.state_dict(), path)
    with pytest.raises(WeightsError, match=r"pos_embed \(1, 16, 192\) instead of \(1, 196, 192\)"):
        load_backbone("cait_xxs24_224", weights=path)
    backbone = load_backbone("cait_xxs24_224", weights=path, size=64)
    assert torch.equal(backbone.model.pos_embed, plain.pos_embed)


@pytest.mark.parametrize(("name", "option", "own"), [("test_vit", "reg_tokens", 0), ("test_vit2", "reg_tokens", 1)])
@pytest.mark.parametrize("count", [1, 4])
def test_register_tokens_of_a_file(name, option, own, count, tmp_path):
    """A file with other registers than the model of its name makes the model that timm makes with as many."""
    plain = timm.create_model(name, num_classes=0, **{option: count}).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in plain.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    save_file(plain.state_dict(), tmp_path / "registers.safetensors")
    backbone = load_backbone(name, weights=tmp_path / "registers.safetensors")
    assert backbone.model.reg_token.shape[1] == count and backbone.num_prefix_tokens == plain.num_prefix_tokens
    batch = images(1, (160, 160))
    mean, std = (torch.tensor(plain.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    tokens = backbone(batch)
    with torch.no_grad():
        reference = plain.forward_features((batch - mean) / std)
    assert torch.equal(torch.cat((tokens.prefix, tokens.patches.flatten(1, 2)), 1), reference)


def test_a_file_without_registers_is_none_of_a_model_with_them(tmp_path):
    plain = timm.create_model("test_vit2", num_classes=0, reg_tokens=0)
    save_file(plain.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match="timm's conversion failed"):
        load_backbone("test_vit2", weights=tmp_path / "bare.safetensors")


def test_a_state_dict_instead_of_a_file(trained):
    backbone = load_backbone("test_vit", weights=trained.state_dict())
    batch = images(1, (160, 160))
    torch.testing.assert_close(backbone(batch).patches.flatten(1, 2), reference_tokens(trained, batch))
    with pytest.raises(WeightsError, match="the state dict lacks"):
        load_backbone("test_vit", weights={"norm.bias": torch.zeros(64)})


def test_hash_is_of_the_weights_alone(trained, tmp_path):
    state = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {k: v for k, v in state.items() if not k.startswith("head")}}, tmp_path / "b.pth")
    first, second = (
        load_backbone("test_vit", weights=tmp_path / n, layer=k) for n, k in (("a.safetensors", -1), ("b.pth", 2))
    )
    assert first.weights_sha256 == second.weights_sha256 and len(first.weights_sha256) == 64
    state["blocks.3.mlp.fc1.bias"][0] += 1e-6
    save_file(state, tmp_path / "c.safetensors")
    assert load_backbone("test_vit", weights=tmp_path / "c.safetensors").weights_sha256 != first.weights_sha256


def spoil(state, how):
    if how == "nan":
        state["blocks.2.attn.qkv.weight"][0, 0] = float("nan")
    elif how == "infinite after the cast":
        state["norm.weight"] = state["norm.weight"].double()
        state["norm.weight"][0] = 1e300
    elif how == "shape":
        state["norm.bias"] = torch.zeros(65)
        state["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    elif how == "missing":
        del state["blocks.5.norm2.weight"]
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"NaN.*blocks\.2\.attn\.qkv\.weight"),
        ("infinite after the cast", r"infinity.*norm\.weight"),
        ("shape", r"2 tensors of another shape.*blocks\.0\.mlp\.fc1\.weight \(3, 3\) instead of"),
        ("missing", r"lacks 1 of.*blocks\.5\.norm2\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(how, message, trained, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file(spoil({k: v.detach().clone() for k, v in trained.state_dict().items()}, how), path)
    with pytest.raises(WeightsError, match=message):
        load_backbone("test_vit", weights=path)


def test_weights_of_another_architecture_are_refused(tmp_path):
    for donor, taker in (
        ("test_vit", "xcit_nano_12_p8_224"),
        ("xcit_nano_12_p8_224", "test_vit"),
        ("test_vit2", "test_vit"),
    ):
        path = tmp_path / f"{donor}.safetensors"
        save_file(timm.create_model(donor, pretrained=False).state_dict(), path)
        with pytest.raises(WeightsError, match=r"another|lacks"):
            load_backbone(taker, weights=path)


class Mark:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "plain pickle"])
def test_code_in_a_pth_is_never_run(form, trained, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    content = {**trained.state_dict(), "extra": Mark(mark)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Mark(mark)}))
    with pytest.raises(WeightsError, match="does not unpickle"):
        load_backbone("test_vit", weights=path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the payload would have worked


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "empty.pth", "empty.safetensors", "notensors.pth"])
def test_damaged_files_are_refused(name, trained, tmp_path):
    path = tmp_path / name
    if name.startswith("cut"):
        whole = tmp_path / f"whole{path.suffix}"
        save_file(trained.state_dict(), whole) if path.suffix == ".safetensors" else torch.save(
            trained.state_dict(), whole
        )
        path.write_bytes(whole.read_bytes()[:-5000])
    elif name == "notensors.pth":
        torch.save({"epoch": 3}, path)
    else:
        path.touch()
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load_backbone("test_vit", weights=path)


def test_files_that_are_not_weights_are_refused(tmp_path):
    (tmp_path / "weights.npz").touch()
    for name in ("missing.safetensors", "weights.npz", "."):
        with pytest.raises(WeightsError, match="safetensors"):
            load_backbone("test_vit", weights=tmp_path / name)


def test_bundled_weights_give_features_that_vary():
    path = ROOT / "dvt" / "data" / "vit_tiny_patch16_224.mae_photos.safetensors"
    if not path.exists():
        pytest.skip("the bundled ViT is not in this checkout")
    astronaut = pytest.importorskip("skimage.data").astronaut()
    photo = torch.from_numpy(astronaut).permute(2, 0, 1)[None].float() / 255
    photo = torch.nn.functional.interpolate(photo, (224, 336), mode="bilinear", antialias=True)
    backbone = load_backbone("vit_tiny_patch16_224", weights=path)
    tokens = backbone(photo)
    assert tokens.patches.shape == (1, 14, 21, 192) and tokens.prefix.shape == (1, 1, 192)
    assert tokens.patches.isfinite().all()
    spread = tokens.patches.flatten(0, 2).std(0)
    assert (spread > 0.05).all()
    raw = load_file(path)["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(backbone.model.blocks[0].attn.qkv.weight, raw.float())


# Other models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 4])
def test_wrap_takes_a_transformers_dinov2(registers):
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14, "image_size": 70}
    if registers:
        if not hasattr(transformers, "Dinov2WithRegistersModel"):
            pytest.skip(f"transformers {transformers.__version__} has no Dinov2WithRegistersModel")
        config = transformers.Dinov2WithRegistersConfig(**options, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**options))

    def tokens(module, batch):
        out = module(pixel_values=batch).last_hidden_state
        prefix, patches = out[:, : 1 + registers], out[:, 1 + registers :]
        return Tokens(patches.unflatten(1, (batch.shape[2] // 14, batch.shape[3] // 14)), prefix)

    backbone = wrap(model, tokens, 14, name="dinov2", image_size=70, num_prefix_tokens=1 + registers)
    assert backbone.feature_dim == 48 and backbone.patch_size == (14, 14) and backbone.image_size == (70, 70)
    batch = images(2, (56, 84))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (batch - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        reference = model.eval()(pixel_values=normal).last_hidden_state
        found = backbone(batch)
    torch.testing.assert_close(found.patches.flatten(1, 2), reference[:, 1 + registers :])
    torch.testing.assert_close(found.prefix, reference[:, : 1 + registers])
    assert found.grid == (4, 6) and len(backbone.weights_sha256) == 64


def test_hash_leaves_a_classifier_out_and_nothing_else():
    def hashed(**changed):
        net = torch.nn.Sequential()
        for name in ("body", "head"):
            net.add_module(name, torch.nn.Linear(3, 3))
            torch.nn.init.constant_(net.get_submodule(name).weight, changed.get(name, 1.0))
            torch.nn.init.zeros_(net.get_submodule(name).bias)
        read = lambda m, x: x.flatten(2).mT  # noqa: E731
        return wrap(net, read, 1, name="net", feature_dim=3, image_size=8).weights_sha256

    assert hashed() == hashed(head=2.0) != hashed(body=2.0)


def test_wrap_notices_wrong_claims():
    net = torch.nn.Conv2d(3, 8, 16, 16)
    reader = lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1))  # noqa: E731
    for wrong in ({"patch_size": 8}, {"feature_dim": 9}, {"num_prefix_tokens": 1}, {"stride": 8}):
        with pytest.raises(ShapeError, match="check patch_size"):
            wrap(net, reader, **{"patch_size": 16, "name": "net", "feature_dim": 8, **wrong})


# The table -------------------------------------------------------------------------------------------------------


def documented():
    """Family -> (architectures, smallest) of the table in the documentation."""
    rows = re.findall(r"^\| (\w+) \| (\d+) \| `(\w+)` \| (\w+)", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {family: (int(count), smallest, supported) for family, count, smallest, supported in rows}


def test_documentation_lists_every_family():
    rows = documented()
    assert {family: smallest for family, (_, smallest, _) in rows.items()} == SMALLEST
    assert all(supported == "yes" for _, _, supported in rows.values())


@pytest.mark.slow
def test_table_is_what_timm_has_now():
    found = {row.family: (row.architectures, row.smallest, "yes" if row.supported else "no") for row in family_table()}
    assert found == documented()


def _archived(path, change):
    """The archive of torch.save at a path, compressed, with another file in it."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    folder = next(iter(entries)).split("/")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED) as new:
        for name, content in entries.items():
            new.writestr(name, content)
        if change == "script":
            new.writestr(f"{folder}/constants.pkl", b"\x80\x02).")


@pytest.mark.parametrize(("change", "words"), [("compressed", "a compressed archive"), ("script", "TorchScript")])
def test_archives_that_torch_save_does_not_write_are_refused(tmp_path, change, words):
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    assert read_state(tmp_path / "a.pth")["weight"].shape == (1 << 20,)
    _archived(tmp_path / "a.pth", change)
    with pytest.raises(WeightsError, match=words):
        read_state(tmp_path / "a.pth")


def test_tar_files_are_refused(tmp_path):
    """torch read them with weights_only, and before torch 2.6 not safely."""
    (tmp_path / "x").write_bytes(b"x")
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(tmp_path / "x", name)
    with pytest.raises(WeightsError, match="a tar file"):
        read_state(tmp_path / "a.pth")


def test_a_file_that_holds_itself_ends(tmp_path):
    content = {"epoch": 3}
    content["model"] = content["state_dict"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no named tensors"):
        read_state(tmp_path / "a.pth")


@pytest.mark.parametrize("values", [torch.ones(1).expand(4, 4), torch.ones(4, 4).to_sparse(), torch.ones(4, 4) * 1j])
def test_tensors_that_are_no_plain_arrays_are_refused(values):
    linear = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(WeightsError, match="no plain arrays of real numbers: weight"):
        load_state(linear, {"weight": values}, "it")
