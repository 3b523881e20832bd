"""Models of transformers, open_clip, torchvision and the DINO repositories: wrapped, and with a denoiser inside."""

import copy
import pickle
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor

import dvt
from dvt.backbones.export import export
from dvt.denoiser import Denoiser, DenoiserConfig, denoised_backbone
from dvt.denoiser.config import DenoiserTraining
from dvt.denoiser.train import train_denoiser
from dvt.errors import BackboneError, ShapeError
from dvt.tokens import Tokens
from dvt.training.config import TrainingConfig

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99, "bos_token_id": 1}
TEXT |= {"eos_token_id": 2}

#: name: (classes of transformers, options of the config, prefix tokens)
TRANSFORMERS = {
    "dinov2": ("Dinov2", {}, 1),
    "dinov2 registers": ("Dinov2WithRegisters", {"num_register_tokens": 4}, 5),
    "dinov3": ("DINOv3ViT", {"num_register_tokens": 4}, 5),
    "vit": ("ViT", {}, 1),
    "deit": ("DeiT", {}, 2),
    "mae": ("ViTMAE", {}, 1),
    "clip": ("CLIPVision", {}, 1),
    "siglip": ("SiglipVision", {}, 0),
    "siglip 2": ("Siglip2Vision", {"num_patches": 16}, 0),
    "clip, both towers": ("CLIP", {"vision_config": SMALL, "text_config": TEXT}, 1),
}
PREFIX = {name: prefix for name, (*_, prefix) in TRANSFORMERS.items()}
PREFIX |= {"torchvision": 1, "open_clip": 1, "dino repository": 1, "dino repository, registers": 3}
FIXED = ("torchvision", "open_clip")


class DinoLike(nn.Module):
    """The interface of the DINOv2 repository's models, with one layer of attention."""

    def __init__(self, registers):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 48, 16, 16)
        self.patch_embed.patch_size, self.patch_embed.img_size = (16, 16), (64, 64)
        self.num_register_tokens, self.embed_dim, self.n_blocks, self.patch_size = registers, 48, 1, 16
        self.start = nn.Parameter(torch.randn(1, 1 + registers, 48))
        self.block = nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0, batch_first=True)
        self.norm, self.head = nn.LayerNorm(48), nn.Identity()

    def prepare_tokens_with_masks(self, x, masks=None):
        return torch.cat((self.start.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).mT), dim=1)

    def forward_features(self, x, masks=None):
        return [self.features(each) for each in x] if isinstance(x, list) else self.features(x, masks)

    def features(self, x, masks=None):
        out, first = self.norm(self.block(self.prepare_tokens_with_masks(x))), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": out[:, 0],
            "x_norm_regtokens": out[:, 1:first],
            "x_norm_patchtokens": out[:, first:],
            "masks": masks,
        }

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        out = self.block(self.prepare_tokens_with_masks(x))
        out = self.norm(out) if norm else out
        patches = out[:, 1 + self.num_register_tokens :]
        if reshape:
            patches = patches.unflatten(1, (x.shape[2] // 16, x.shape[3] // 16)).permute(0, 3, 1, 2)
        return ((patches, out[:, 0]),) if return_class_token else (patches,)

    def forward(self, x):
        return self.head(self.forward_features(x)["x_norm_clstoken"])


def of_transformers(name, kind="Model"):
    transformers = pytest.importorskip("transformers")
    family, options, _ = TRANSFORMERS[name]
    if not hasattr(transformers, f"{family}{kind}"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}{kind}")
    if family == "Siglip2Vision":
        options = options | {key: value for key, value in SMALL.items() if key != "image_size"}
    elif "vision_config" not in options:
        options = options | SMALL
    return getattr(transformers, f"{family}{kind}")(getattr(transformers, f"{family}Config")(**options))


def make(name):
    torch.manual_seed(0)  # the libraries' initialisers take no generator
    if name in TRANSFORMERS:
        model = of_transformers(name)
    elif name == "torchvision":
        model = VisionTransformer(64, 16, 2, 3, 48, 96)
    elif name == "open_clip":
        pytest.importorskip("open_clip")
        model = import_module("open_clip.transformer").VisionTransformer(64, 16, 48, 2, 3, 2.0, output_dim=32)
    else:
        model = DinoLike(2 if "registers" in name else 0)
    for value in model.parameters():
        value.data += 0.05 * torch.randn(value.shape)
    return model.eval()


def made(channels, **options):
    generator = torch.Generator().manual_seed(1)
    options = {"kind": "block", "grid": (5, 7), "num_heads": 1, "mlp_ratio": 0.5} | options
    denoiser = Denoiser(DenoiserConfig(feature_dim=channels, **options), generator)
    for value in denoiser.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return denoiser.eval()


def images(count, size):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=PREFIX)
def case(request):
    """(name, model, its backbone, images of a shape that it takes)."""
    model = make(request.param)
    backbone = dvt.wrap(model)
    return request.param, model, backbone, images(2, backbone.input_size((64, 96)))


def test_a_model_is_wrapped_without_arguments(case):
    name, _, backbone, batch = case
    tokens = backbone(batch)
    assert (backbone.patch_size, backbone.image_size, backbone.feature_dim) == ((16, 16), (64, 64), 48)
    assert backbone.num_prefix_tokens == tokens.prefix.shape[1] == PREFIX[name]
    assert backbone.fixed_size == (name in FIXED) and tokens.grid == ((4, 4) if name in FIXED else (4, 6))
    assert torch.equal(backbone(batch).patches, tokens.patches)
    twin = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(twin(batch).patches, tokens.patches) and twin.weights_sha256 == backbone.weights_sha256


def test_unmasked_patches_stay_in_order():
    model = make("mae")
    backbone, batch = dvt.wrap(model), images(2, (64, 64))
    model.embeddings.config.mask_ratio = 0.0
    order = torch.arange(16.0).expand(2, -1)
    expected = model(pixel_values=backbone.normalise(batch), noise=order).last_hidden_state
    torch.testing.assert_close(backbone(batch).patches.flatten(1, 2), expected[:, 1:])


def test_siglip_2_reads_its_processors_patches():
    transformers = pytest.importorskip("transformers")
    processor_class = getattr(transformers, "Siglip2ImageProcessor", None)
    if processor_class is None:
        pytest.skip("this transformers has no Siglip2ImageProcessor")
    from torchvision.transforms.functional import to_pil_image

    model, batch = make("siglip 2"), (images(1, (48, 80)) * 255).round() / 255
    inputs = processor_class(patch_size=16, max_num_patches=15)(images=[to_pil_image(batch[0])], return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[3, 5]]
    expected = model(**inputs).last_hidden_state[:, :15]
    torch.testing.assert_close(dvt.wrap(model)(batch).patches.flatten(1, 2), expected, rtol=1e-4, atol=1e-4)
    clean = made(48).attach(model)
    padded = processor_class(patch_size=16, max_num_patches=20)(images=[to_pil_image(batch[0])], return_tensors="pt")
    found = clean(**padded).last_hidden_state
    torch.testing.assert_close(found[:, :15], clean(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_attached_is_the_denoised_backbone(case):
    _, model, backbone, batch = case
    denoiser = made(48)
    raw, before = backbone(batch), {key: value.clone() for key, value in model.state_dict().items()}
    expected = denoised_backbone(denoiser, backbone)(batch)
    clean = denoiser.attach(model)
    assert type(clean).__name__ == type(model).__name__ and isinstance(clean, type(model))
    found = dvt.wrap(clean)(batch)
    assert torch.equal(found.patches, expected.patches) and torch.equal(found.prefix, expected.prefix)
    assert (expected.patches - raw.patches).abs().mean() > 0.05 * raw.patches.abs().mean()
    assert torch.equal(backbone(batch).patches, raw.patches)  # the original
    assert before.keys() == model.state_dict().keys()
    own = {key for key in clean.state_dict() if "denoiser." not in key}
    assert own == before.keys() and len(clean.state_dict()) == len(own) + len(denoiser.state_dict())


def test_copies_precision_and_state(case):
    _, model, _, batch = case
    clean = made(48).attach(model)
    expected = dvt.wrap(clean)(batch).patches
    for twin in (copy.deepcopy(clean), pickle.loads(pickle.dumps(clean))):
        assert type(twin) is type(clean) and torch.equal(dvt.wrap(twin)(batch).patches, expected)
    half = dvt.wrap(copy.deepcopy(clean).to(torch.bfloat16))(batch).patches
    assert half.dtype == torch.bfloat16 and (half.float() - expected).norm() < 0.05 * expected.norm()
    other = made(48)
    for value in other.parameters():
        value.data += 1
    fresh = other.attach(copy.deepcopy(model))
    assert not torch.equal(dvt.wrap(fresh)(batch).patches, expected)
    fresh.load_state_dict(clean.state_dict())
    assert torch.equal(dvt.wrap(fresh)(batch).patches, expected)


def test_what_transformers_answers_is_clean(case):
    name, model, backbone, batch = case
    if name not in TRANSFORMERS or name in ("clip, both towers", "siglip 2"):
        pytest.skip("not a model of transformers that takes pixels and answers last_hidden_state")
    batch = images(2, (64, 64))
    denoiser, x = made(48), backbone.normalise(batch)
    expected = denoised_backbone(denoiser, backbone)(batch)
    clean = denoiser.attach(model)
    for out in (clean(x), clean(pixel_values=x), clean(x, return_dict=False)):
        found = out[0] if isinstance(out, tuple) else out.last_hidden_state
        torch.testing.assert_close(found[:, PREFIX[name] :], expected.patches.flatten(1, 2))
    if name == "siglip":
        torch.testing.assert_close(
            clean(x).pooler_output, getattr(model, "vision_model", model).head(clean(x).last_hidden_state)
        )
        torch.testing.assert_close(clean(x, return_dict=False)[1], clean(x).pooler_output)
        assert not torch.allclose(clean(x).pooler_output, model(x).pooler_output)
    elif name != "mae":
        torch.testing.assert_close(clean(x).pooler_output, model(x).pooler_output)  # of the class token
        hidden = clean(x, output_hidden_states=True).hidden_states
        assert len(hidden) == 3 and torch.equal(hidden[1], model(x, output_hidden_states=True).hidden_states[1])
    assert len(list(model.modules())) + len(list(denoiser.modules())) == len(list(clean.modules()))


def test_a_pipeline_of_transformers_reads_clean_tokens():
    transformers = pytest.importorskip("transformers")
    from torchvision.transforms.functional import to_pil_image

    model, denoiser = make("dinov2"), made(48)
    sizes = {"size": {"height": 64, "width": 64}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}
    processor = transformers.ViTImageProcessor(**sizes)
    pipe = transformers.pipeline(
        "image-feature-extraction", model=denoiser.attach(model), image_processor=processor, device="cpu"
    )
    picture = to_pil_image(images(1, (64, 64))[0])
    found = torch.tensor(pipe(picture))
    exact = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    backbone = denoised_backbone(denoiser, dvt.wrap(model, processor=processor))
    torch.testing.assert_close(found[:, 1:], backbone(exact).patches.flatten(1, 2), rtol=1e-3, atol=1e-3)


def test_heads_and_backbones_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(**SMALL, out_features=["stage1", "stage2"])
    torch.manual_seed(0)
    classifier, maps = transformers.Dinov2ForImageClassification(config), transformers.Dinov2Backbone(config)
    maps.load_state_dict(classifier.dinov2.state_dict())
    denoiser, x = made(48), images(2, (64, 96))
    expected = denoiser.attach(classifier.eval().dinov2)(x).last_hidden_state
    pooled = torch.cat((expected[:, 0], expected[:, 1:].mean(1)), dim=1)
    torch.testing.assert_close(denoiser.attach(classifier)(x).logits, classifier.classifier(pooled))
    first, last = denoiser.attach(maps.eval())(x).feature_maps
    torch.testing.assert_close(last.flatten(2).mT, expected[:, 1:])
    assert torch.equal(first, maps(x).feature_maps[0])
    with pytest.raises(BackboneError, match="AutoModel"):
        dvt.wrap(maps)
    with pytest.raises(BackboneError, match="prefix tokens"):
        made(48, use_prefix=True).attach(maps)


def test_timm_inside_transformers_and_by_itself():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "TimmWrapperModel"):
        pytest.skip(f"transformers {transformers.__version__} has no TimmWrapperModel")
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="test_vit")).eval()
    denoiser, x = made(64), images(1, (160, 160))
    clean = denoiser.attach(model)
    expected = denoiser.attach(model.timm_model).forward_features(x)
    assert torch.equal(clean(x).last_hidden_state, expected) and type(clean) is type(model)
    assert not torch.equal(model(x).last_hidden_state, expected)
    assert torch.equal(dvt.wrap(clean)(x).patches, dvt.wrap(denoiser.attach(model.timm_model))(x).patches)
    strict = dvt.wrap(timm.create_model("test_vit", dynamic_img_size=False))
    assert strict.fixed_size and strict.num_layers == 6
    assert dvt.wrap(timm.create_model("test_vit", dynamic_img_size=True)).fixed_size is False


def test_torchvision_features_are_clean():
    model, denoiser, x = make("torchvision"), made(48), images(2, (64, 64))
    clean = denoiser.attach(model)
    found = create_feature_extractor(clean, ["encoder.ln"])(x)["encoder.ln"]
    raw = create_feature_extractor(model, ["encoder.ln"])(x)["encoder.ln"]
    expected = denoiser(raw[:, 1:].unflatten(1, (4, 4)), raw[:, :1]).flatten(1, 2)
    torch.testing.assert_close(found[:, 1:], expected)
    assert torch.equal(clean(x), model(x))  # of the class token


@pytest.mark.parametrize("after", [False, True])
def test_open_clip_pools_and_gives_clean_tokens(after):
    pytest.importorskip("open_clip")
    tower = import_module("open_clip.transformer").VisionTransformer
    model = tower(64, 16, 48, 2, 3, 2.0, output_dim=32, pool_type="avg", final_ln_after_pool=after, output_tokens=True)
    whole = nn.Module()
    whole.visual = model.eval()
    denoiser, x = made(48), images(2, (64, 64))
    clean = denoiser.attach(whole).visual
    pooled, tokens = clean(x)
    raw = model(x)[1].unflatten(1, (4, 4))
    torch.testing.assert_close(tokens.unflatten(1, (4, 4)), denoiser(raw))
    mean = model.ln_post(tokens.mean(1)) if after else tokens.mean(1)
    torch.testing.assert_close(pooled, mean @ model.proj)
    out = clean.forward_intermediates(x, normalize_intermediates=not after)
    torch.testing.assert_close(out["image_intermediates"][-1].flatten(2).mT, tokens)
    assert torch.equal(
        out["image_intermediates"][0],
        model.forward_intermediates(x, normalize_intermediates=not after)["image_intermediates"][0],
    )


def test_modules_of_the_dino_repositories_give_clean_tokens():
    model, x = make("dino repository, registers"), images(2, (64, 96))
    for denoiser in (made(48), made(48, use_prefix=True)):
        clean = denoiser.attach(model)
        expected = clean.forward_features(x)["x_norm_patchtokens"]
        assert not torch.allclose(expected, model.forward_features(x)["x_norm_patchtokens"])
        torch.testing.assert_close(clean.forward_features([x, x])[1]["x_norm_patchtokens"], expected)
        torch.testing.assert_close(clean.get_intermediate_layers(x)[0], expected)
        maps, token = clean.get_intermediate_layers(x, [0], True, True)[0]
        torch.testing.assert_close(maps.flatten(2).mT, expected)
        assert torch.equal(token, clean(x)) and torch.equal(token, model(x))
        raw = model.get_intermediate_layers(x, norm=False)[0]
        assert torch.equal(clean.get_intermediate_layers(x, norm=False)[0], raw)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda m, x: m(x), r"tensor of shape .* return dvt.Tokens"),
        (lambda m, x: SimpleNamespace(last_hidden_state=m(x)), "return its .last_hidden_state"),
        (lambda m, x: {"x_norm_patchtokens": m(x)}, "x_norm_patchtokens"),
        (lambda m, x: None, "a NoneType"),
        (lambda m, x: m(x).flatten(2).mT[:, :3], "3 tokens"),
    ],
)
def test_returns_of_another_type_are_named(give, message):
    with pytest.raises(ShapeError, match=message):
        dvt.wrap(nn.Conv2d(3, 8, 16, 16), give, 16, image_size=64)


def test_a_model_that_draws_at_random_is_refused():
    net = nn.Conv2d(3, 8, 16, 16)
    noisy = lambda m, x: m(x).flatten(2).mT + torch.rand(1)  # noqa: E731
    with pytest.raises(BackboneError, match="two calls"):
        dvt.wrap(net, noisy, 16, image_size=64)
    model = make("mae")
    model.config.mask_ratio = 0.0
    with pytest.raises(BackboneError, match="two calls"):  # it shuffles its patches even when it masks none
        dvt.wrap(model, lambda m, x: m(x).last_hidden_state, 16, image_size=64)


def test_sizes_are_found_out_or_refused():
    model = make("vit")
    fixed = dvt.wrap(model, lambda m, x: m(x).last_hidden_state, 16, image_size=64)
    assert fixed.fixed_size and fixed.num_prefix_tokens == 1 and fixed.input_size((480, 640)) == (64, 64)
    with pytest.raises(ShapeError, match="takes only"):
        fixed(images(1, (64, 96)))
    with pytest.raises(BackboneError, match="image_size="):
        dvt.wrap(model, lambda m, x: m(x).last_hidden_state, 16)
    tokens = dvt.wrap(model)(images(1, (64, 96)))
    assert isinstance(tokens, Tokens) and tokens.grid == (4, 6)


def test_normalisation_is_that_of_the_processor_or_the_family(tmp_path):
    transformers = pytest.importorskip("transformers")
    clip = dvt.wrap(make("clip"))
    assert clip.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    model = make("dinov2")
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    for backbone in (dvt.wrap(model, processor=processor), dvt.wrap(model, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))):
        assert backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert backbone.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    loaded = dvt.wrap(transformers.AutoModel.from_pretrained(tmp_path / "mine"))
    assert loaded.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3]) and loaded.name == "hf:mine"


def test_what_cannot_be_read_or_attached_is_refused(case):
    _, model, backbone, _ = case
    with pytest.raises(BackboneError, match="channels"):
        made(32).attach(model)
    with pytest.raises(BackboneError, match="last layer"):
        made(48).attach(model, layer=0)
    with pytest.raises(BackboneError, match="already"):
        made(48).attach(made(48).attach(model))
    with pytest.raises(BackboneError, match="got 8"):
        dvt.wrap(model, patch_size=8)
    other = made(48)
    other.card = {"backbone": "mine", "layer": -1, "weights_sha256": "0" * 64}
    with pytest.raises(BackboneError, match="force=True"):
        other.attach(model)
    other.attach(model, force=True)
    other.card = {"backbone": backbone.name, "layer": -1, "weights_sha256": backbone.weights_sha256}
    other.attach(model)
    with pytest.raises(BackboneError, match="none of the models"):
        dvt.wrap(nn.Linear(2, 2))


def test_train_save_load_attach(case, tmp_path):
    """A store of the wrapped model, a denoiser of it, kept in a file, and put into the model."""
    _, model, backbone, batch = case
    shape = backbone.input_size((64, 96))
    for number, picture in enumerate(images(4, shape)):
        pixels = (picture.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    dvt.denoise_images(backbone, sorted(tmp_path.glob("*.png")), tmp_path / "store", dvt.DenoiseConfig(views=3))
    settings = DenoiserTraining("block", heads=1, loop=TrainingConfig(steps=2, batch_size=2, learning_rate=1e-3))
    train_denoiser(tmp_path / "store", tmp_path / "denoiser.safetensors", settings, device="cpu")
    denoiser = Denoiser.from_pretrained(tmp_path / "denoiser.safetensors")
    assert denoiser.card["weights_sha256"] == backbone.weights_sha256
    found = dvt.wrap(denoiser.attach(model))(batch).patches
    assert torch.equal(found, denoised_backbone(denoiser, backbone)(batch).patches)
    assert not torch.equal(found, backbone(batch).patches)
    other = copy.deepcopy(model)
    next(value for value in dvt.wrap(other).model.parameters() if value.ndim > 1).data += 0.1
    with pytest.raises(BackboneError, match="other weights"):
        denoiser.attach(other)


#: Sizes that the files of denoised backbones take, as (.pt2, .onnx); None where the export refuses the model.
EXPORTED = dict.fromkeys(PREFIX, ("one", "any")) | {
    "dinov2 registers": ("one", "one"),
    "dinov3": ("any", "any"),
    "mae": ("one", "one"),
    "open_clip": ("one", "one"),
    "siglip 2": (None, None),
    "torchvision": (None, None),
    "dino repository": (None, None),
    "dino repository, registers": (None, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_exports_are_those_of_the_table_of_models(case, form, tmp_path):
    """docs/models.md lists them."""
    name, _, backbone, _ = case
    clean, wanted = denoised_backbone(made(48), backbone), EXPORTED[name][form == "onnx"]
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    if wanted is None:
        with pytest.raises(BackboneError, match=r"cannot trace .*\(batch\)"):
            export(clean, tmp_path / f"clean.{form}")
        return
    done = export(clean, tmp_path / f"clean.{form}")
    assert done.dynamic_grid == (wanted == "any") and done.deviation < 1e-5
