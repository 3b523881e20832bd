"""Names that people type, folders of timm and transformers, and checkpoints in the forms that people have."""

import argparse
import logging
import re

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

import dvt
from dvt.backbones import load_backbone
from dvt.backbones.names import ALIASES, suggestions
from dvt.backbones.weights import read_state
from dvt.errors import BackboneError, DvtError, WeightsError


def test_every_alias_is_a_timm_model():
    missing = set(ALIASES.values()) - set(timm.list_pretrained())
    assert len(ALIASES) > 60 and not missing


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("facebook/dinov2-small", "vit_small_patch14_dinov2.lvd142m"),
        ("facebook/dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("facebook/dino-vits16", "vit_small_patch16_224.dino"),
        ("google/siglip2-base-patch32-256", "vit_base_patch32_siglip_256.v2_webli"),
    ],
)
def test_names_of_other_libraries_are_timms(typed, name):
    assert load_backbone(typed, pretrained=False).name == name


@pytest.mark.parametrize(
    ("typed", "close"),
    [
        ("facebook/dinov2-tiny", "facebook/dinov2-small"),
        ("vit_small_dinov2", "vit_small_patch14_dinov2"),
        ("siglip2-base", "siglip2-base-patch16"),
    ],
)
def test_unknown_names_come_with_those_of_their_family(typed, close):
    with pytest.raises(BackboneError, match=close):
        load_backbone(typed)


def images(count, size):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def spread(model):
    torch.manual_seed(0)
    for value in model.parameters():
        value.data += 0.02 * torch.randn(value.shape)
    return model.eval()


def test_folders_of_timm_and_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    transformers = pytest.importorskip("transformers")
    from timm.models import save_for_hf

    model = spread(timm.create_model("test_vit", dynamic_img_size=True))
    save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    backbone = load_backbone(str(tmp_path / "timm"))
    x = images(1, (96, 64))
    torch.testing.assert_close(backbone(x).patches.flatten(1, 2), model.forward_features(backbone.normalise(x))[:, 1:])
    assert backbone.name.partition(".")[0] == "test_vit"
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=70, patch_size=14
    )
    theirs = spread(transformers.Dinov2Model(config))
    theirs.save_pretrained(tmp_path / "theirs")
    for name in (str(tmp_path / "theirs"), f"hf:{tmp_path / 'theirs'}"):
        found = load_backbone(name, size=56)
        assert found.name == "hf:theirs" and found.image_size == (56, 56)
        assert torch.equal(found(images(1, (70, 98))).patches, dvt.wrap(theirs)(images(1, (70, 98))).patches)
    with pytest.raises(BackboneError, match="last layer"):
        load_backbone(name, layer=0)
    with pytest.raises(BackboneError, match="cannot load"):
        load_backbone(f"hf:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="it holds no model"):
        load_backbone(str(tmp_path / "empty"))


TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12}
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}

#: timm name: (class, options, what comes after last_hidden_state)
THEIRS = {
    "vit_tiny_patch16_224": ("ViT", TINY, None),
    "vit_tiny_patch16_224.mae": ("ViTMAE", TINY, None),
    "vit_small_patch14_dinov2": ("Dinov2", SMALL | {"image_size": 518, "patch_size": 14}, None),
    "vit_small_patch14_reg4_dinov2": ("Dinov2WithRegisters", SMALL | {"image_size": 518, "patch_size": 14}, None),
    "vit_small_patch16_dinov3_qkvb": ("DINOv3ViT", SMALL | {"num_register_tokens": 4}, None),
    "vit_base_patch32_clip_quickgelu_224": ("CLIPVision", BASE | {"patch_size": 32}, "post_layernorm"),
    "vit_base_patch32_siglip_256": ("SiglipVision", BASE | {"patch_size": 32, "image_size": 256}, None),
}


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_weights_of_transformers_give_its_outputs(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, options, norm = THEIRS[name]
    if not hasattr(transformers, f"{family}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}Model")
    torch.manual_seed(0)
    model = spread(getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**options)))
    model.save_pretrained(tmp_path)
    backbone = load_backbone(name.partition(".")[0], weights=tmp_path / "model.safetensors")
    theirs = dvt.wrap(model, mean=backbone.mean.flatten().tolist(), std=backbone.std.flatten().tolist())
    batch = images(1, backbone.image_size)
    found, expected = backbone(batch), theirs(batch).patches
    expected = expected if norm is None else getattr(getattr(model, "vision_model", model), norm)(expected)
    scale = expected.abs().max()
    torch.testing.assert_close(found.patches / scale, expected / scale, rtol=0, atol=1e-5)
    if family in ("CLIPVision", "SiglipVision"):  # as the hub has them: both towers, and each below its name
        state = {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
        both = {f"vision_model.{key}": value for key, value in state.items()}
        both |= {"text_model.embeddings.token_embedding.weight": torch.ones(9, 8), "logit_scale": torch.ones(())}
        save_file(both, tmp_path / "both.safetensors")
        again = load_backbone(name, weights=tmp_path / "both.safetensors")
        assert torch.equal(again(batch).patches, found.patches)


def outputs(state, path):
    torch.save(state, path)
    return load_backbone("test_vit", weights=path)(images(1, (96, 64))).patches


def test_checkpoints_of_training_code(tmp_path, caplog):
    model, other = (timm.create_model("test_vit", num_classes=0) for _ in range(2))
    own, wrong = spread(model).state_dict(), other.state_dict()
    expected = outputs(own, tmp_path / "plain.pth")

    def under(prefix, state=own, **more):
        return {f"{prefix}{key}": value for key, value in state.items()} | more

    head = {"head.mlp.0.weight": torch.ones(3, 3), "dino_head.last_layer.weight": torch.ones(2, 2)}
    chunked = {
        (f"blocks.{int(key.split('.')[1]) // 3}.{key.partition('.')[2]}" if key.startswith("blocks.") else key): value
        for key, value in own.items()
    }
    forms = {
        "dino": {"student": under("module.backbone.", wrong), "teacher": under("backbone.", **head), "epoch": 3},
        "namespace": {"teacher": under("backbone.", **head), "args": argparse.Namespace(lr=0.1, arch="vit_small")},
        "dinov2": {"teacher": under("backbone.", chunked, **head)},
        "student alone": {"student": under("backbone.", **head)},
        "lightning": {"state_dict": under("model.backbone.") | {"loss.weight": torch.ones(1)}},
        "two encoders": {"state_dict": under("student.backbone.", wrong) | under("teacher.backbone.")},
        "momentum": {"state_dict": under("encoder.", wrong) | under("momentum_encoder.")},
        "chunked": chunked,
    }
    for form, content in forms.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert torch.equal(outputs(content, tmp_path / "form.pth"), expected), form
        assert form == "chunked" or "left out" in caplog.text, form


class Other:
    """An object that no file of weights needs."""


def test_other_objects_beside_tensors_stay_refused(tmp_path):
    torch.save({"model": timm.create_model("test_vit").state_dict(), "args": Other()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not unpickle"):
        read_state(tmp_path / "w.pth")
    torch.save({"model": {}, "args": argparse.Namespace(inner=Other())}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not unpickle"):
        read_state(tmp_path / "w.pth")


def test_registers_of_a_dinov2_file_for_a_model_without(tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Dinov2WithRegistersModel"):
        pytest.skip(f"transformers {transformers.__version__} has no Dinov2WithRegistersModel")
    config = transformers.Dinov2WithRegistersConfig(**SMALL, image_size=518, patch_size=14, num_register_tokens=2)
    spread(transformers.Dinov2WithRegistersModel(config)).save_pretrained(tmp_path)
    both = [
        load_backbone(name, weights=tmp_path / "model.safetensors")
        for name in ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2")
    ]
    assert [backbone.num_prefix_tokens for backbone in both] == [3, 3]
    one, two = (backbone(images(1, (70, 98))).patches for backbone in both)
    torch.testing.assert_close(one, two)


def test_without_a_network_one_message_says_what_helps_within_seconds(monkeypatch, tmp_path):
    from dvt.backbones import hub
    from dvt.denoiser import Denoiser

    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for load in (
        lambda: load_backbone("vit_tiny_patch16_224.augreg_in21k"),
        lambda: load_backbone("hf:facebook/dinov2-small"),
        lambda: Denoiser.from_pretrained("nobody/nothing"),
    ):
        with pytest.raises(DvtError) as caught:
            load()
        said = str(caught.value)
        assert all(word in said for word in ("HF_HUB_OFFLINE=1", "HF_ENDPOINT", "--weights", "127.0.0.1:9"))
        assert not re.match(r"\w*Error", said) and "LocalEntryNotFound" not in said
        assert hub.constants.HF_HUB_OFFLINE is False


def test_a_hub_that_answers_nothing_is_not_waited_for(monkeypatch):
    import socket

    from dvt.backbones import hub

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "PATIENCE", 0.2)
        with hub.hub_or_cache() as why:
            assert why is not None and hub.constants.HF_HUB_OFFLINE
        assert not hub.constants.HF_HUB_OFFLINE


def test_a_cached_copy_is_used_without_a_network(monkeypatch, tmp_path):
    from dvt.backbones import hub
    from dvt.denoiser import Denoiser, DenoiserConfig

    Denoiser(DenoiserConfig("subtract", 8, (2, 2))).save_pretrained(tmp_path / "model.safetensors")
    folder = tmp_path / "hub" / "models--me--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (tmp_path / "model.safetensors").rename(folder / "snapshots" / ("a" * 40) / "model.safetensors")
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert Denoiser.from_pretrained("me/mine", cache_dir=tmp_path / "hub").feature_dim == 8


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("vit_tny", "vit_tiny_patch16_224"),
        ("vit_small_patch14_dino2", "vit_small_patch14_dinov2"),
        ("deit_tni", "deit_tiny"),
    ],
)
def test_a_short_misspelt_name_gets_the_plain_models_first(typed, wanted):
    assert any(name.startswith(wanted) for name in suggestions(typed))


def test_random_weights_are_the_same_each_time_and_touch_no_generator():
    from dvt.cli.settings.common import BackboneOptions

    state = torch.get_rng_state()
    one, two = (BackboneOptions(backbone="test_vit", weights="random").load_exact().weights_sha256 for _ in range(2))
    assert one == two and bool((torch.get_rng_state() == state).all())
