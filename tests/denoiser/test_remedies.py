"""Remedies that need no training, on models whose disease was planted: register neurons, a defect, an artifact."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt import grids
from dvt.backbones import families, load_backbone
from dvt.denoiser import (
    Denoiser,
    DenoiserConfig,
    RemedyConfig,
    denoised_backbone,
    fit_defect,
    fit_insid3,
    fit_noise,
    fit_rasa,
    fit_registers,
    fit_remedies,
    fit_remedy,
    noise_maps,
    predict_defect,
)
from dvt.denoiser.remedies.outliers import RATIO, SIGMAS, entering
from dvt.errors import BackboneError, ConfigError, ImageError, NonFiniteError, ShapeError
from dvt.tokens import Tokens, norm_bound

SIZE = 160
PLACES = [(1, 17), (2, 40)]  # block, neuron


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def pictures(count=6, seed=0):
    """Smooth colour textures with a few places that stand out."""
    small = torch.rand(count, 3, 12, 14, generator=generator(seed))
    return list(torch.nn.functional.interpolate(small, (SIZE, 176), mode="bicubic").clamp(0, 1))


def healthy(name="test_vit", seed=0):
    """Weights of the size that timm draws, from fixed generators."""
    backbone = load_backbone(name, pretrained=False, size=SIZE)
    for place, (key, parameter) in enumerate(sorted(backbone.model.named_parameters())):
        if parameter.ndim > 1:
            spread = 0.2 if "patch_embed" in key else 0.02
            parameter.data = spread * noise(*parameter.shape, seed=1000 * seed + place)
        elif key.endswith("bias"):
            parameter.data.zero_()
        elif "gamma" in key:
            parameter.data.fill_(0.5)
    # What registers hold is not read, so that their being there can be told from what they say.
    written = written_direction(backbone.feature_dim)
    for block in backbone.model.blocks:
        block.attn.qkv.weight.data -= torch.outer(block.attn.qkv.weight @ written, written)
    return backbone


def written_direction(channels):
    """(C,) the direction of the planted vectors, without a mean, which a LayerNorm would remove."""
    direction = noise(channels, seed=80)
    return torch.nn.functional.normalize(direction - direction.mean(), dim=0)


def ill(places=PLACES, size=300.0, share=0.02, name="test_vit", seed=0):
    """(backbone, the same healthy): each neuron fires on a share of the pictures' tokens and writes a long vector."""
    backbone, clean = healthy(name, seed), healthy(name, seed)
    for number, (block, neuron) in enumerate(places):
        mlp = backbone.model.blocks[block].mlp
        with entering([mlp]) as seen:
            backbone(torch.stack(pictures()))
        reads = noise(backbone.feature_dim, seed=70 + number)
        response = seen[0][:, backbone.num_prefix_tokens :].flatten(0, 1) @ reads
        threshold, spread = response.quantile(1 - share), response.std()
        mlp.fc1.weight.data[neuron] = 10 * reads / spread
        mlp.fc1.bias.data[neuron] = -10 * threshold / spread
        written = written_direction(backbone.feature_dim)
        mlp.fc2.weight.data[:, neuron] = size * written
        clean.model.blocks[block].mlp.fc1.load_state_dict(mlp.fc1.state_dict())  # fires, but writes nothing
        clean.model.blocks[block].mlp.fc2.weight.data[:, neuron] = 0
    return backbone, clean


def block_norms(backbone, block, images):
    return [backbone.at_layers(each[None], [block])[block].patches[0].norm(dim=-1) for each in images]


# ------------------------------------------------------------------------------------------------- test-time registers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_planted_register_neurons_are_found_and_their_outliers_return_to_the_bulk(name, seed):
    backbone, clean = ill(name=name, seed=seed)
    images = pictures()
    denoiser = fit_registers(backbone, images)
    assert sorted(map(tuple, denoiser.body.places.tolist())) == PLACES
    assert denoiser.card["outliers_before"] > 0.02 and denoiser.card["outliers_after"] == 0

    mended = denoised_backbone(denoiser, backbone)
    last = len(backbone.model.blocks) - 1
    others = torch.stack(pictures(8, seed=9))  # not those that it was found on
    raw, well, after = (each.at_layers(others, [last])[last].patches for each in (backbone, clean, mended))
    bound = norm_bound(well.norm(dim=-1).double(), SIGMAS, RATIO)
    assert (raw.norm(dim=-1) > bound).double().mean() > 0.005
    assert after.norm(dim=-1).max() <= bound
    assert ((after - well).norm(dim=-1) / well.norm(dim=-1)).max() < 1e-3


def test_nobody_finds_registers_where_there_are_no_outliers():
    backbone = healthy()
    with pytest.raises(BackboneError, match=r"no norm outliers to remove: .* Nothing was changed"):
        fit_registers(backbone, pictures())


def test_outliers_that_no_few_neurons_make_are_left_to_other_remedies():
    backbone, _ = ill(places=[(1, 3), (1, 4), (1, 5), (1, 6)], size=200)
    with pytest.raises(BackboneError, match="no 1 neurons of test_vit make its outliers"):
        fit_registers(backbone, pictures(), most=1)


def test_the_fewest_neurons_are_taken():
    places = [(0, 5), (1, 3), (2, 9)]
    backbone, _ = ill(places=places)
    assert sorted(map(tuple, fit_registers(backbone, pictures()).body.places.tolist())) == places


@pytest.fixture(scope="module")
def registers():
    backbone, _ = ill()
    return backbone, fit_remedy("registers", backbone, pictures())


def test_a_model_with_registers_is_of_its_class_answers_in_its_shapes_and_leaves_the_original_alone(registers):
    backbone, denoiser = registers
    images = noise(2, 3, SIZE, 192)
    before = backbone.model(images).clone(), {k: v.clone() for k, v in backbone.model.state_dict().items()}
    clean = denoiser.attach(backbone)
    assert isinstance(clean, type(backbone.model)) and type(clean).__name__ == type(backbone.model).__name__
    for options in (
        {},
        {"norm": True, "output_fmt": "NLC"},
        {"intermediates_only": True, "return_prefix_tokens": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"stop_early": True, "indices": [1]},
    ):
        shapes = [
            torch.utils._pytree.tree_map(lambda t: tuple(t.shape), m.forward_intermediates(images, **options))
            for m in (backbone.model, clean)
        ]
        assert shapes[0] == shapes[1]
    final, maps = clean.forward_intermediates(images, norm=True)
    torch.testing.assert_close(final, clean.forward_features(images))
    torch.testing.assert_close(maps[-1].flatten(2).mT, final[:, 1:])
    torch.testing.assert_close(denoised_backbone(denoiser, backbone).model(images), clean(images))
    assert (clean(images) - before[0]).abs().max() > 1e-3
    assert torch.equal(backbone.model(images), before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in backbone.model.state_dict().items())
    assert set(clean.state_dict()) - set(before[1]) == {"registers.body.places"}


def test_strength_zero_is_the_model_bit_for_bit_and_one_half_lies_between(registers):
    backbone, denoiser = registers
    clean, image = denoised_backbone(denoiser, backbone), pictures(1)[0][None]
    full = clean.at_layers(image, [3])[3].patches.norm(dim=-1).max()
    clean.model.registers.strength = 0.5
    half = clean.at_layers(image, [3])[3].patches.norm(dim=-1).max()
    clean.model.registers.strength = 0
    assert torch.equal(clean(image).patches, backbone(image).patches)
    assert full < 0.7 * half < 0.7 * backbone.at_layers(image, [3])[3].patches.norm(dim=-1).max()
    assert denoiser.strength == 1  # the backbone's is a copy


def test_registers_are_saved_with_their_neurons_and_come_back(registers, tmp_path):
    backbone, denoiser = registers
    denoiser.save_pretrained(tmp_path / "registers.safetensors")
    other = Denoiser.from_pretrained(tmp_path / "registers.safetensors")
    assert other.card == denoiser.card and other.card["neurons"] == denoiser.body.places.tolist()
    json.dumps(other.card)
    image = pictures(1)[0][None]
    ways = [denoised_backbone(each, backbone)(image).patches for each in (denoiser, other)]
    assert torch.equal(*ways)


def test_copies_pickles_state_dicts_half_precision_and_compilers_take_a_model_with_registers(registers):
    backbone, denoiser = registers
    images = noise(1, 3, SIZE, SIZE)
    clean = copy.deepcopy(denoiser.attach(backbone))
    expected = clean.forward_features(images)
    file = io.BytesIO()
    torch.save(clean, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.forward_features(images), expected)
    again.registers.body.places.fill_(-1)
    assert not torch.equal(again.forward_features(images), expected)
    again.load_state_dict(clean.state_dict())
    assert torch.equal(again.forward_features(images), expected)
    compiled = torch.compile(clean, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), clean(images))
    exported = torch.export.export(clean, (images,)).module()
    torch.testing.assert_close(exported(images), clean(images))
    half = copy.deepcopy(clean).bfloat16().forward_features(images.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().mean() < 0.03 * expected.abs().mean()
    clean.set_grad_checkpointing()
    clean.train().forward_features(images.requires_grad_()).sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_denoiser_lies_behind_registers_but_not_in_front(registers):
    backbone, denoiser = registers
    mended = denoised_backbone(denoiser, backbone)
    artifact = Denoiser(DenoiserConfig("subtract", backbone.feature_dim, (10, 10)))
    artifact.body.artifact.copy_(noise(10, 10, backbone.feature_dim))
    image = pictures(1)[0][None]
    both = artifact.attach(denoiser.attach(backbone))
    features = both.forward_features(mended.normalise(image))
    torch.testing.assert_close(features[:, 1:].unflatten(1, (10, 11)), artifact(mended(image).patches))
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).forward_features(mended.normalise(image)), features)
    for taken in (artifact.attach(backbone), denoiser.attach(backbone)):
        with pytest.raises(BackboneError, match="already"):
            denoiser.attach(taken)
    with pytest.raises(BackboneError, match="weights"):  # the model with registers is another one
        fit_remedy("noise", backbone).check_fits(mended)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "test_vit4"])
def test_other_families_take_registers_and_a_register_that_takes_nothing_changes_little(name):
    backbone = load_backbone(name, pretrained=False, size=112)
    denoiser = Denoiser(DenoiserConfig("registers", backbone.feature_dim, (1, 1)))
    images = torch.rand(1, 3, 112, 112, generator=generator())
    raw, clean = backbone(images), denoised_backbone(denoiser, backbone)(images)
    assert raw.prefix.shape == clean.prefix.shape
    assert (raw.patches - clean.patches).norm() < 0.05 * raw.patches.norm()


def test_registers_of_other_weights_are_warned_of(registers, caplog):
    backbone, denoiser = registers
    denoiser.attach(backbone.model)
    assert not caplog.text
    denoiser.attach(healthy(seed=5).model)
    assert "not those that the denoiser was made for" in caplog.text


def test_registers_say_where_they_do_not_fit(registers):
    backbone, denoiser = registers
    plain = dvt.wrap(torch.nn.Conv2d(3, 64, 16, 16), lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="plain")
    for wrong in (lambda: fit_registers(plain, pictures()), lambda: denoised_backbone(denoiser, plain, force=True)):
        with pytest.raises(BackboneError, match=r"wrapped model.*take a remedy of its tokens"):
            wrong()
    mixer = load_backbone("mixer_s32_224", pretrained=False)
    with pytest.raises(BackboneError, match=r"MlpMixer has no MLP whose neurons.*defect, noise, insid3 or rasa"):
        fit_registers(mixer, [torch.rand(3, 224, 224)])
    with pytest.raises(BackboneError, match=r"act|attach"):
        denoiser(torch.zeros(1, 2, 2, backbone.feature_dim))
    with pytest.raises(ImageError, match="no image was given"):
        fit_registers(backbone, [])
    with pytest.raises(ConfigError, match="most=0"):
        fit_registers(backbone, pictures(), most=0)
    with pytest.raises(BackboneError, match="neurons of test_vit, and are to be attached to test_vit2"):
        denoiser.attach(load_backbone("test_vit2", pretrained=False).model)
    wide = Denoiser(DenoiserConfig("registers", 64, (1, 1)))
    wide.body.places.copy_(torch.tensor([[0, 999]]))
    with pytest.raises(BackboneError, match="neuron 999 of block 0"):
        wide.attach(backbone)
    with pytest.raises(BackboneError, match="attention mask"):
        denoiser.attach(backbone).forward_features(noise(1, 3, SIZE, SIZE), attn_mask=torch.zeros(101, 101))


# --------------------------------------------------------------------------------------------------- defect direction


def defective(images=6, channels=32, share=0.02, strength=40.0, seed=0):
    """(maps, contents, masks, direction): some tokens lie far along one direction."""
    contents = noise(images, 9, 11, channels, seed=seed) + 2
    masks = torch.rand(images, 9, 11, generator=generator(seed + 1)) < share
    direction = torch.nn.functional.normalize(noise(channels, seed=seed + 2), dim=0)
    size = strength * (1 + 0.2 * torch.rand(images, 9, 11, 1, generator=generator(seed + 3)))
    return contents + masks[..., None] * size * direction, contents, masks, direction


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_defect_is_found_and_only_its_tokens_change(seed):
    maps, contents, masks, direction = defective(seed=seed)
    denoiser = fit_defect(maps)
    clean = denoiser(maps)
    assert denoiser.body.direction @ direction > 0.99 and denoiser.card["angle"] < 15
    assert torch.equal(clean[~masks], maps[~masks])
    assert clean.norm(dim=-1).max() <= contents.norm(dim=-1).max() * 1.05
    # What is left of an outlier is its content; along the direction it has the others' median.
    rest = (clean - contents)[masks]
    # The direction is known as well as the mean of so many contents.
    assert (rest - (rest @ direction)[:, None] * direction).norm(dim=-1).max() < 2 * (32 / len(rest)) ** 0.5


def test_outliers_squeezed_by_the_final_norm_get_the_size_of_the_others():
    maps, contents, masks, _ = defective(images=30, strength=400.0)
    maps = torch.nn.functional.layer_norm(maps, (32,))  # all norms are equal now
    masks = list(masks.flatten(1))
    clean = fit_defect(maps, masks)(maps)
    direction = fit_defect(maps, masks).body.direction
    chosen = torch.stack(masks).view(maps.shape[:3])

    def rest(tokens):
        centred = tokens - maps[~chosen].mean(0)
        return (centred - (centred @ direction)[..., None] * direction).norm(dim=-1)

    assert rest(maps)[chosen].median() < 0.2 * rest(maps)[~chosen].median()
    assert 0.8 < rest(clean)[chosen].median() / rest(maps)[~chosen].median() < 1.25
    well = torch.nn.functional.layer_norm(contents, (32,))
    assert torch.cosine_similarity(clean[chosen], well[chosen], dim=-1).mean() > 0.9


def test_a_defect_that_the_weights_make_is_predicted_from_them():
    for seed in range(3):
        backbone = healthy(seed=seed)
        written = torch.nn.functional.normalize(noise(64, seed=5) - noise(64, seed=5).mean(), dim=0)
        block = backbone.model.blocks[2]
        block.attn.proj.weight.data += 30 * torch.outer(
            written, torch.nn.functional.normalize(noise(64, seed=6), dim=0)
        )
        own = backbone.at_layers(torch.zeros(1, 3, SIZE, SIZE), [3])  # the model still runs
        assert own[3].patches.isfinite().all()
        for layer, expected in ((3, written), (-1, written)):
            read = load_backbone("test_vit", backbone.model.state_dict(), layer=layer, size=SIZE)
            assert (predict_defect(read) @ expected).abs() > 0.95


def test_a_direction_can_be_given_with_either_sign():
    maps, _, _, direction = defective()
    for given in (direction, -3 * direction):
        denoiser = fit_defect(maps, direction=given)
        torch.testing.assert_close(denoiser.body.direction, direction)
    with pytest.raises(ShapeError, match=r"must be \(32,\)"):
        fit_defect(maps, direction=torch.ones(5))
    with pytest.raises(BackboneError, match="does not separate the outliers"):
        fit_defect(maps, direction=torch.linalg.qr(torch.stack((direction, noise(32)), 1))[0][:, 1])


def test_no_defect_is_found_where_there_is_none():
    with pytest.raises(BackboneError, match="no norm outliers"):
        fit_defect(noise(6, 9, 11, 32))
    with pytest.raises(NonFiniteError):
        fit_defect([torch.full((4, 4, 8), float("nan"))])
    with pytest.raises(ShapeError, match="no token maps"):
        fit_defect([])


def test_a_defect_denoiser_keeps_the_laws_of_every_kind(tmp_path):
    maps, _, masks, _ = defective()
    denoiser = fit_defect(maps)
    full = denoiser(maps)
    torch.testing.assert_close(torch.compile(denoiser, backend="eager", fullgraph=True)(maps), full)
    exported = torch.export.export(denoiser, (maps,)).module()
    torch.testing.assert_close(exported(maps), full)
    half = denoiser(maps.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().mean() < 0.02
    assert torch.equal(half[~masks], maps.bfloat16()[~masks])
    denoiser.save_pretrained(tmp_path / "defect.safetensors")
    assert torch.equal(Denoiser.from_pretrained(tmp_path / "defect.safetensors")(maps), full)
    denoiser.strength = 0.5
    torch.testing.assert_close(denoiser(maps), (maps + full) / 2)
    fresh = Denoiser(DenoiserConfig("defect", 32, (1, 1)))
    assert torch.equal(fresh(maps), maps)


def test_the_remedy_defect_mends_a_model_whose_neurons_make_it():
    backbone, clean = ill()
    denoiser = fit_remedy(
        "defect", load_backbone("test_vit", backbone.model.state_dict(), layer=3, size=SIZE), pictures()
    )
    for image in pictures(3, seed=9):
        raw, well = (b.at_layers(image[None], [3])[3].patches for b in (backbone, clean))
        same = (raw - well).norm(dim=-1) < 0.05 * well.norm(dim=-1)
        after = denoiser(raw)
        assert 0.8 < same.double().mean() < 1 and torch.equal(after[same], raw[same])
        # Neurons that fire a little make tokens just below the bound, which are taken for healthy.
        assert (
            after.norm(dim=-1).max()
            <= 1.1 * norm_bound(well.norm(dim=-1).double(), SIGMAS, RATIO)
            < raw.norm(dim=-1).max() / 2
        )


# -------------------------------------------------------------------------------------- artifact from noise images


def artifact(grid, channels, strength=1.0):
    x, y = grids.grid_centres(grid).unbind(-1)
    made = torch.stack((x, y, x * y, (6 * y).sin()), dim=-1) @ noise(4, channels, seed=7)
    made = made - made.mean((0, 1))
    return strength * made / made.square().mean().sqrt()


def stand_in(strength, channels=32):
    """Responses of patches of pixels, which know no position, and an artifact."""
    weight = noise(channels, 3, 16, 16, seed=3) / 28

    def tokens(module, images):
        content = torch.nn.functional.conv2d(images, weight, stride=16).permute(0, 2, 3, 1)
        return Tokens.of(content + artifact(tuple(content.shape[1:3]), channels, strength))

    return dvt.wrap(torch.nn.Identity(), tokens, 16, name="stand-in", image_size=160, feature_dim=channels)


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_artifact_is_recovered_from_noise_images(seed):
    maps = list(noise_maps(stand_in(0.65), 16, generator(seed)))
    denoiser = fit_noise(maps)
    truth = artifact((10, 10), 32, 0.65)
    error = (denoiser.body.artifact - truth).norm() / truth.norm()
    content = torch.stack(maps) - truth
    chance = (content - content.mean((1, 2), keepdim=True)).std() / 16**0.5 / truth.square().mean().sqrt()
    assert error < 1.2 * chance + 1e-3 and denoiser.card["kept"] > 0.8
    assert abs(denoiser.body.artifact.mean((0, 1))).max() < 1e-5


@pytest.mark.parametrize("seed", range(10))
def test_without_an_artifact_noise_images_change_hardly_anything(seed):
    backbone = stand_in(0.0)
    maps = list(noise_maps(backbone, 16, generator(seed)))
    tokens = backbone(pictures(1)[0][None, :, :, :160]).patches
    for denoiser in (fit_noise(maps), fit_insid3(maps)):
        assert (denoiser(tokens) - tokens).norm() < 0.02 * (tokens - tokens.mean((1, 2))).norm()


@pytest.mark.parametrize("seed", range(5))
def test_insid3_removes_the_planted_subspace_and_no_other(seed):
    backbone = stand_in(2.0)
    denoiser = fit_insid3(noise_maps(backbone, 16, generator(seed)), rank=8)
    assert denoiser.card["directions"] == 4  # so many functions of position were planted, 8 were allowed
    left = denoiser(artifact((10, 10), 32, 2.0)[None])[0]
    assert (left - left.mean((0, 1))).norm() < 0.05 * artifact((10, 10), 32, 2.0).norm()


def test_rasa_removes_what_probes_read_and_stops_when_they_read_nothing():
    x = grids.grid_centres((9, 11))
    loadings = torch.linalg.qr(noise(16, 2, seed=4))[0]
    maps = [noise(9, 11, 16, seed=k) + (x - 0.5) @ (3 * loadings.T) for k in range(12)]
    denoiser = fit_rasa(maps)
    before, *_, after = denoiser.card["r2"]
    assert before > 0.3 and after < 0.02
    assert 2 <= denoiser.card["directions"] <= 4
    directions = denoiser.body.directions
    assert (loadings.T @ directions).norm(dim=1).min() > 0.9
    nothing = fit_rasa([noise(9, 11, 16, seed=k) for k in range(12)])
    assert nothing.card["directions"] == 0
    assert torch.equal(nothing(maps[0][None]), maps[0][None])


def test_fits_from_maps_say_what_they_need():
    with pytest.raises(ShapeError, match="2 maps or more"):
        fit_noise([noise(4, 4, 8)])
    with pytest.raises(ShapeError, match="give one grid"):
        fit_insid3([noise(4, 4, 8), noise(4, 5, 8)])
    with pytest.raises(ConfigError, match="rank"):
        fit_insid3([noise(4, 4, 8), noise(4, 4, 8)], rank=9)
    with pytest.raises(ShapeError, match="more tokens"):
        fit_rasa([noise(2, 2, 8)])
    with pytest.raises(ConfigError, match="rounds"):
        fit_rasa([noise(9, 9, 8)], rounds=0)
    with pytest.raises(ConfigError, match="2 or more"):
        next(noise_maps(stand_in(0), 1))


# ------------------------------------------------------------------------------------------------------ all of them


def test_the_bundled_model_has_no_outliers_and_says_so():
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    found, refused = fit_remedies(backbone, pictures(3), RemedyConfig(noise_images=4, rounds=1))
    assert set(found) == {"noise", "insid3", "rasa"} and set(refused) == {"registers", "defect"}
    assert all("no norm outliers" in reason for reason in refused.values())
    for name, denoiser in found.items():
        assert denoiser.card["remedy"] == name and denoiser.card["layer"] == -1
        denoiser.check_fits(backbone)
        assert denoiser.attach(backbone).forward_features(noise(1, 3, 224, 224)).isfinite().all()


def test_the_doctor_names_the_remedy_of_planted_outliers():
    from dvt.analysis import DoctorConfig, diagnose

    ill_model, _ = ill()
    backbone = load_backbone("test_vit", ill_model.model.state_dict(), layer=3, size=SIZE)
    found, refused = fit_remedies(backbone, pictures(), RemedyConfig(noise_images=4))
    assert {"registers", "defect"} <= set(found) and not {"registers", "defect"} & set(refused)
    ways = {
        "registers": denoised_backbone(found["registers"], backbone),
        "defect": lambda tokens: tokens.with_patches(found["defect"](tokens.patches)),
    }
    commands = {name: f"dvt remedy {name} photos" for name in ways}
    page = diagnose(backbone, pictures(seed=4), ways, DoctorConfig(windows=4), commands=commands)
    registers, defect = page.treated
    assert page.kind == "norm outliers" and page.outliers.value > 0.01
    assert registers.outliers == 0 and defect.outliers < 0.005
    assert page.best in ways and page.command == commands[page.best] and page.command in str(page)


def test_a_remedy_takes_images_in_every_form(tmp_path):
    backbone, drawn = stand_in(0.5), []
    for number, each in enumerate(pictures(3)):
        drawn.append(Image.fromarray(each.mul(255).byte().movedim(0, -1).numpy()))
        drawn[-1].save(tmp_path / f"{number}.png")
    forms = [tmp_path, sorted(tmp_path.iterdir()), drawn, [np.asarray(each) for each in drawn]]
    found = [fit_remedy("rasa", backbone, form).state_dict() for form in forms]
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in found[0])
    assert fit_remedy("rasa", backbone, np.asarray(drawn[0])).card["images"] == 1
    with pytest.raises(ImageError, match="given as dict"):
        fit_remedy("rasa", backbone, {"image": drawn[0]})


def test_remedies_are_refused_in_plain_words():
    backbone = stand_in(0.5)
    with pytest.raises(ConfigError, match="there is no remedy 'cure'; it must be one of registers, defect"):
        fit_remedy("cure", backbone)
    with pytest.raises(ImageError, match="no image"):
        fit_remedy("rasa", backbone)
    with pytest.raises(ConfigError, match="noise_images is 1; it must be 2 or more"):
        RemedyConfig(noise_images=1)
    with pytest.raises(BackboneError, match="wrapped model"):
        predict_defect(backbone)
    assert families.core(healthy().model) is not None
