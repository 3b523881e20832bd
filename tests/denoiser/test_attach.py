"""A denoiser inside timm models, against the denoiser applied by hand to tokens read through a backbone."""

import copy
import io
import logging
import pickle

import pytest
import timm
import torch
from torch import nn

import dvt
from dvt.backbones import families, load_backbone, wrap
from dvt.backbones.catalogue import SMALLEST, try_size
from dvt.backbones.wrapped import timm_backbone
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.denoiser.attach import attach, denoised_backbone
from dvt.denoiser.feature_maps import FeatureMaps
from dvt.errors import BackboneError, ConfigError, ShapeError
from dvt.tokens import Tokens

SIZE = dict.fromkeys(("beit", "cait", "tnt", "vision_transformer_relpos"), (64, 96)) | {"convit": 64}
NORMLESS = {"convmixer", "gemma4_vit", "qwen3_vit"}
LARGE = {"gemma4_vit", "deepseek_vit", "qwen3_vit", "naflexvit", "vision_transformer_sam"}


def made(channels, seed=0, **options):
    """A denoiser with weights large enough that what it does cannot be missed, and a matter of neighbours too."""
    generator = torch.Generator().manual_seed(seed)
    options = {"kind": "block", "grid": (5, 7), "num_heads": 1, "mlp_ratio": 0.5} | options
    denoiser = Denoiser(DenoiserConfig(feature_dim=channels, **options), generator)
    for value in denoiser.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return denoiser.eval()


def images(count, size, seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def normalised(backbone, batch):
    return (batch - backbone.mean) / backbone.std


def sequence(features, channels_last):
    """(B, N, C) from what a model's forward_features gives."""
    if features.ndim == 4:
        return (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    return features


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@pytest.fixture(scope="module", params=sorted(SMALLEST))
def family(request):
    torch.manual_seed(0)  # timm's initialisers take no generator
    name, architecture = request.param, SMALLEST[request.param]
    if name in LARGE:  # three of their blocks
        model = timm.create_model(architecture, num_classes=0, depth=3)
        patch = families.patch_size(model)
        backbone = timm_backbone(model, architecture, -1, patch, patch, families.own_size(model))
    else:
        backbone = load_backbone(architecture, pretrained=False, size=SIZE.get(name))
    return name, backbone, images(2, try_size(backbone))


def test_family_last_layer(family):
    name, backbone, batch = family
    denoiser = made(backbone.feature_dim)
    clean = attach(denoiser, backbone)
    x = normalised(backbone, batch)
    with torch.no_grad():
        raw = backbone(batch)
        expected = denoiser(raw.patches, raw.prefix)
        features = clean.forward_features(x)
        final, entries = clean.forward_intermediates(x, indices=[0, -1], norm=True)
        head = clean.forward_head(features) if hasattr(clean, "head") else features
        whole = clean(x)
    assert type(clean).__name__ == type(backbone.model).__name__ and isinstance(clean, type(backbone.model))
    assert (expected - raw.patches).abs().mean() > 0.01 * raw.patches.abs().mean()
    close(
        sequence(features, getattr(families.core(clean), "output_fmt", "") == "NHWC"),
        torch.cat((raw.prefix, expected.flatten(1, 2)), 1),
    )
    close(final, features)
    close(entries[1].permute(0, 2, 3, 1), expected)
    if name != "vision_transformer_sam":
        assert torch.equal(whole, head)


def test_family_earlier_layer(family):
    name, last, batch = family
    early = timm_backbone(last.model, last.name, 1, last.patch_size, last.stride, last.image_size)
    denoiser = made(early.feature_dim, seed=1)
    clean = attach(denoiser, early)
    x = normalised(early, batch)
    with torch.no_grad():
        raw = early(batch)
        expected = denoiser(raw.patches, raw.prefix)
        (found,) = clean.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
        final, (_, again, other) = clean.forward_intermediates(x, indices=[0, 1, 2])
        plain_final, (_, _, plain_other) = last.model.forward_intermediates(x, indices=[0, 1, 2])
        (normed,) = clean.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True, norm=True)
    close(found.permute(0, 2, 3, 1), expected)
    close(again, found)
    close(final, plain_final)  # later blocks read the raw tokens
    close(other, plain_other)
    core = families.core(last.model)
    if name == "vision_transformer_sam":
        reference = core.neck(expected.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    else:
        reference = expected if name in NORMLESS else core.norm(expected)
    close(normed.permute(0, 2, 3, 1), reference)


def test_family_without_strength_is_the_timm_model(family):
    name, backbone, batch = family
    denoiser = made(backbone.feature_dim)
    denoiser.strength = 0
    clean, plain = attach(denoiser, backbone), backbone.model
    x = normalised(backbone, batch)
    with torch.no_grad():
        close(clean(x), plain(x))
        for norm in (False, True) if name != "xcit" else (False,):
            options = {"norm": norm, "indices": 2}
            (one, maps), (two, references) = (m.forward_intermediates(x, **options) for m in (clean, plain))
            assert torch.equal(one, two)
            assert all(torch.equal(a, b) for a, b in zip(maps, references, strict=True))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", dynamic_img_size=True).eval()


@pytest.fixture
def clean(model):
    return attach(made(64), model)


def test_what_a_timm_model_answers(model, clean):
    assert isinstance(clean, type(model)) and clean.feature_info == model.feature_info
    assert clean.num_prefix_tokens == 1 and clean.num_features == 64 and clean.pretrained_cfg == model.pretrained_cfg
    assert clean.patch_embed.proj.weight is model.patch_embed.proj.weight and clean.head.weight is model.head.weight
    assert clean.no_weight_decay() == model.no_weight_decay() | {"denoiser.body.pos_embed"}
    clean.reset_classifier(7)
    assert clean(images(2, (96, 64))).shape == (2, 7) and model(images(2, (96, 64))).shape == (2, 1000)


def test_the_classifier_pools_denoised_patches():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", dynamic_img_size=True, global_pool="avg", fc_norm=False).eval()
    clean, x = attach(made(64), model), images(2, (96, 64))
    raw = model.forward_features(x)
    patches = made(64)(raw[:, 1:].unflatten(1, (6, 4))).flatten(1, 2)
    close(clean(x), model.head(patches.mean(1)))
    assert (clean(x) - model(x)).abs().max() > 0.01


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("layer", [-1, 2])
@torch.no_grad()
def test_every_flag_of_forward_intermediates(output_fmt, layer):
    torch.manual_seed(0)
    model = timm.create_model("test_vit3", dynamic_img_size=True).eval()
    clean, x, last = attach(made(96), model, layer), images(2, (96, 64)), len(model.blocks) - 1
    changed = last if layer == -1 else layer
    for indices in (None, 1, 3, [changed], [-1, 0]):
        for norm, only, prefix, dictionary in (
            (n, o, p, d) for n in (0, 1) for o in (0, 1) for p in (0, 1) for d in (0, 1)
        ):
            for early in (False, True):
                options = {"indices": indices, "return_prefix_tokens": bool(prefix), "norm": bool(norm)}
                options |= {"stop_early": early, "output_fmt": output_fmt, "intermediates_only": bool(only)}
                options["output_dict"] = bool(dictionary)
                found, plain = (m.forward_intermediates(x, **options) for m in (clean, model))
                reference(model, clean.denoiser, layer, x, options, plain, found)


def reference(model, denoiser, layer, x, options, plain, found):
    """Compare an answer with timm's, in which the one entry that must change is made by hand."""
    assert type(found) is type(plain)
    if isinstance(plain, dict):
        assert found.keys() == plain.keys()
        pairs = [(found["image_intermediates"], plain["image_intermediates"])]
        pairs += [(found[k], plain[k]) for k in plain if k == "image_intermediates_prefix"]
        finals = (found.get("image_features"), plain.get("image_features"))
    elif options["intermediates_only"]:
        pairs, finals = [(found, plain)], (None, None)
    else:
        pairs, finals = [(found[1], plain[1])], (found[0], plain[0])
    count, indices = len(model.blocks), options["indices"]
    taken = list(range(count))[-indices if indices else 0 :] if isinstance(indices, int | None) else indices
    taken = sorted(i % count for i in taken)
    tokens = model.forward_intermediates(x, indices=count, output_fmt="NLC", intermediates_only=True)
    for number, (one, two) in enumerate(zip(*pairs[0], strict=True)):
        block = taken[number]
        if isinstance(one, tuple):
            close(one[1], two[1])
            one, two = one[0], two[0]
        raw = tokens[block]
        if layer == -1 and block == count - 1 and options["norm"]:
            raw = denoiser(model.norm(raw).unflatten(1, (6, 4))).flatten(1, 2)
        elif layer == block:
            raw = denoiser(raw.unflatten(1, (6, 4))).flatten(1, 2)
            raw = model.norm(raw) if options["norm"] else raw
        else:
            raw = model.norm(raw) if options["norm"] else raw
            close(one, two)
        expected = raw.transpose(1, 2).unflatten(2, (6, 4)) if options["output_fmt"] == "NCHW" else raw
        assert one.shape == two.shape
        close(one, expected)
    for one, two in pairs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    if finals[1] is not None:
        ran_all = not options["stop_early"] or taken[-1] == count - 1
        expected = finals[1]
        if layer == -1 and ran_all:
            patches = denoiser(expected[:, 1:].unflatten(1, (6, 4))).flatten(1, 2)
            expected = torch.cat((expected[:, :1], patches), 1)
        close(finals[0], expected)


def test_positional_options_are_understood(model, clean):
    x = images(1, (96, 64))
    (one,) = clean.forward_intermediates(x, [-1], False, True, False, "NLC", True)
    close(one, clean.forward_features(x)[:, 1:])
    (two,) = clean.get_intermediate_layers(x, 1, norm=True)
    assert torch.equal(one, two)


def test_tokens_before_the_final_norm_stay_raw_and_say_so(model, clean, caplog):
    from dvt.denoiser.denoised_model import _warn_raw

    _warn_raw.cache_clear()
    x = images(1, (96, 64))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (found,) = clean.forward_intermediates(x, [-1], intermediates_only=True)
    assert torch.equal(found, model.forward_intermediates(x, [-1], intermediates_only=True)[0])
    assert len(caplog.records) == 1 and "norm=True" in caplog.text


def test_prefix_tokens_reach_a_denoiser_that_attends_to_them(model):
    denoiser = made(64, use_prefix=True)
    x = images(1, (96, 64))
    raw = model.forward_features(x)
    expected = denoiser(raw[:, 1:].unflatten(1, (6, 4)), raw[:, :1]).flatten(1, 2)
    close(attach(denoiser, model).forward_features(x)[:, 1:], expected)
    middle, prefix = model.forward_intermediates(x, [2], True, output_fmt="NLC", intermediates_only=True)[0]
    (found,) = attach(denoiser, model, 2).forward_intermediates(x, [2], output_fmt="NLC", intermediates_only=True)
    close(found, denoiser(middle.unflatten(1, (6, 4)), prefix).flatten(1, 2))


def test_overlapping_patches_in_both_layouts():
    backbone = load_backbone("test_vit", pretrained=False, stride=8)
    clean, batch = attach(made(64), backbone), images(1, (64, 96))
    expected = denoised_backbone(made(64), backbone)(batch).patches
    found = FeatureMaps(clean)
    (maps,) = found(normalised(backbone, batch))
    close(maps.permute(0, 2, 3, 1), expected)
    assert maps.shape[2:] == (7, 11) and found.feature_info.reduction() == [8]


def test_finer_feature_maps_are_guided_by_the_images():
    backbone = load_backbone("test_vit", pretrained=False)
    batch = images(2, (96, 64))
    maps = FeatureMaps(attach(made(64), backbone), upsample=4)
    (fine,) = maps(normalised(backbone, batch))
    expected = dvt.upsample(denoised_backbone(made(64), backbone)(batch).patches, batch, 4)
    torch.testing.assert_close(fine.movedim(1, -1), expected, atol=1e-4, rtol=1e-4)
    assert fine.shape == (2, 64, 24, 16) and maps.feature_info.reduction() == [4]
    with pytest.raises(ConfigError, match="upsample is 0"):
        FeatureMaps(backbone.model, upsample=0)


def test_feature_maps_are_a_features_only_backbone(model, clean):
    features, x = FeatureMaps(clean, (1, -1)), images(2, (96, 64))
    first, last = features(x)
    assert features.feature_info.channels() == [64, 64] and features.feature_info.reduction() == [16, 16]
    assert features.feature_info.module_name() == ["blocks.1", f"blocks.{len(model.blocks) - 1}"]
    close(last.flatten(2).transpose(1, 2), clean.forward_features(x)[:, 1:])
    assert torch.equal(first, model.forward_intermediates(x, [1], norm=True, intermediates_only=True)[0])


def test_timms_own_feature_getter_takes_it(clean):
    from timm.models._features import FeatureGetterNet

    x = images(1, (96, 64))
    (found,) = FeatureGetterNet(clean, out_indices=[-1], norm=True)(x)
    close(found, FeatureMaps(clean)(x)[0])


def test_pruning_keeps_what_the_denoiser_reads(model, clean):
    for options in ({"indices": [0]}, {"indices": 1, "prune_norm": True}):
        with pytest.raises(BackboneError, match="prune first"):
            clean.prune_intermediate_layers(**options)
    middle = attach(made(64), model, 2)
    assert middle.prune_intermediate_layers([2], prune_norm=True) == [2]
    assert len(middle.blocks) == 3 and len(model.blocks) > 3


def test_state_dict_copy_and_pickle(model, clean):
    x = images(1, (96, 64))
    expected = clean(x)
    own = {k: v for k, v in clean.state_dict().items() if not k.startswith("denoiser.")}
    assert own.keys() == model.state_dict().keys()
    assert {k[9:] for k in clean.state_dict() if k not in own} == clean.denoiser.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(clean.state_dict(), buffer)
    buffer.seek(0)
    fresh = attach(made(64, seed=9), timm.create_model("test_vit", dynamic_img_size=True).eval())
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), expected)
    for twin in (copy.deepcopy(clean), pickle.loads(pickle.dumps(clean))):
        assert type(twin) is type(clean) and torch.equal(twin(x), expected)
        twin.denoiser.body.pos_embed.data += 1
        assert torch.equal(clean(x), expected) and not torch.equal(twin.forward_features(x), clean.forward_features(x))


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_size_set_afterwards_is_of_one_of_the_two(which):
    model = timm.create_model("test_vit", dynamic_img_size=False).eval()
    x, other = images(1, (160, 160)), images(1, (96, 64))
    clean = attach(made(64), model)
    pair = [model, clean]
    changed, kept = pair[which], pair[1 - which]
    expected = kept.forward_features(x)
    changed.set_input_size((96, 64))
    assert changed.forward_features(other).shape[1] == 25
    assert torch.equal(kept.forward_features(x), expected)


def test_dtype_device_and_autocast(clean):
    x = images(2, (96, 64))
    expected = clean.forward_features(x)
    with torch.autocast("cpu", torch.bfloat16):
        close16(clean.forward_features(x).float(), expected)
    half = copy.deepcopy(clean).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    out = half.forward_features(x.bfloat16())
    assert out.dtype == torch.bfloat16
    close16(out.float(), expected)
    assert {p.device.type for p in copy.deepcopy(clean).to("meta").parameters()} == {"meta"}


def close16(found, expected):
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_gradients_flow_where_unfrozen(clean):
    clean.train()
    clean.set_grad_checkpointing()
    clean.forward_features(images(2, (96, 64)))[:, 1:].square().sum().backward()
    trained = {n for n, p in clean.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "patch_embed.proj.weight" in trained and "denoiser.body.pos_embed" in trained
    assert {f"denoiser.{n}" for n, p in clean.denoiser.named_parameters() if n.endswith("weight")} <= trained
    frozen = attach(made(64), load_backbone("test_vit", pretrained=False))
    frozen.forward_features(images(1, (96, 64)))[:, 1:].square().sum().backward()
    assert {n.partition(".")[0] for n, p in frozen.named_parameters() if p.grad is not None} == {"denoiser"}


def test_a_batch_is_as_its_images(clean):
    x = images(3, (96, 64))
    close(clean.forward_features(x)[1:2], clean.forward_features(x[1:2]))


@pytest.mark.parametrize("layer", [-1, 2])
@torch.no_grad()
def test_compiles_in_one_graph(model, layer):
    clean, x = attach(made(64), model, layer), images(2, (96, 64))
    forward = torch.compile(clean, fullgraph=True, backend="eager")
    close(forward(x), clean(x))
    maps = torch.compile(FeatureMaps(clean, (2, -1)), fullgraph=True, backend="eager")
    for one, two in zip(maps(x), FeatureMaps(clean, (2, -1))(x), strict=True):
        close(one, two)


def test_torch_export(clean):
    x = images(2, (96, 64))
    dims = {0: torch.export.Dim("b"), 2: 16 * torch.export.Dim("h", min=2), 3: 16 * torch.export.Dim("w", min=2)}
    program = torch.export.export(clean, (x,), dynamic_shapes=(dims,)).module()
    for batch in (x, images(3, (160, 112))):
        close(program(batch), clean(batch))


def test_a_denoised_backbone_is_frozen_and_apart():
    denoiser, backbone = made(64), load_backbone("test_vit", pretrained=False)
    clean, batch = denoised_backbone(denoiser, backbone), images(2, (96, 64))
    raw = backbone(batch)
    tokens = clean(batch)
    assert torch.equal(tokens.patches, denoiser(raw.patches, raw.prefix)) and torch.equal(tokens.prefix, raw.prefix)
    assert (clean.name, clean.layer, clean.num_layers) == (backbone.name, -1, backbone.num_layers)
    assert clean.weights_sha256 != backbone.weights_sha256
    assert not any(p.requires_grad for p in clean.parameters()) and all(p.requires_grad for p in denoiser.parameters())
    twin = pickle.loads(pickle.dumps(clean))
    assert torch.equal(twin(batch).patches, tokens.patches)
    assert clean.to(torch.float64)(batch.double()).patches.dtype == torch.float64


def test_a_wrapped_model_is_denoised_through_its_backbone():
    net = nn.Conv2d(3, 8, 16, 16)
    backbone = wrap(net, lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="one convolution")
    denoiser, batch = made(8, kind="conv3x3"), images(2, (64, 96))
    assert torch.equal(denoised_backbone(denoiser, backbone)(batch).patches, denoiser(backbone(batch).patches))
    with pytest.raises(BackboneError, match="denoised_backbone"):
        attach(denoiser, backbone)


def test_the_demo_model_through_the_denoisers_method():
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    denoiser = made(192)
    x = images(1, (64, 96))
    clean = denoiser.attach(backbone)
    close(
        clean.forward_features(x)[:, 1:].unflatten(1, (4, 6)),
        denoiser(backbone.model.forward_features(x)[:, 1:].unflatten(1, (4, 6))),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoiser": made(32)}, "32 channels"),
        ({"layer": 99}, "must lie in"),
        ({"card": {"layer": 3}}, "layer 3"),
        ({"card": {"backbone": "vit_small_patch14_dinov2.lvd142m"}}, "vit_small_patch14_dinov2"),
        ({"model": nn.Linear(2, 2)}, "none of the models"),
        ({"model": timm.create_model("test_resnet")}, "none of the models"),
        ({"model": attach(made(64), timm.create_model("test_vit"))}, "already"),
        ({"model": load_backbone("test_vit", pretrained=False, layer=1), "layer": 2}, "layer=1"),
    ],
)
def test_what_does_not_fit_is_refused(model, change, message):
    denoiser = change.get("denoiser", made(64))
    denoiser.card = change.get("card", {})
    with pytest.raises(BackboneError, match=message):
        attach(denoiser, change.get("model", model), change.get("layer", -1))
    if "card" in change:
        attach(denoiser, model, force=True)


def test_incomplete_token_maps_are_refused(model):
    dropping = timm.create_model("test_vit", dynamic_img_size=True, patch_drop_rate=0.5)
    with pytest.raises(ShapeError, match="cannot be dropped"):
        attach(made(64), dropping.train())(images(1, (96, 64)))
    naflex = timm.create_model("naflexvit_base_patch16_gap", depth=1, num_classes=0).eval()
    with pytest.raises(ShapeError, match="whole token maps"):
        attach(made(768), naflex).forward_intermediates({"patches": torch.zeros(1, 4, 768)}, norm=True)
