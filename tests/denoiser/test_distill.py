"""Stage 3: the mean of shifted views against loops, registers and layers against timm, and files that load in both."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay
from torch import nn

from dvt.backbones import load_backbone, wrap
from dvt.denoiser.config import DenoiserConfig
from dvt.denoiser.distill.card import read_card
from dvt.denoiser.distill.config import BackboneTraining
from dvt.denoiser.distill.examples import canvas_batches, held_out_batches
from dvt.denoiser.distill.job import distill_backbone
from dvt.denoiser.distill.other import OtherStudent, distill_student, read_projection
from dvt.denoiser.distill.scores import compare, distillation_loss, evaluate_student, make_teacher
from dvt.denoiser.distill.shifted import Canvas, view_mean
from dvt.denoiser.distill.student import Student, layer_groups, with_registers
from dvt.denoiser.model import Denoiser
from dvt.errors import BackboneError, ConfigError, ImageError, WeightsError
from dvt.tokens import Tokens
from dvt.training.checkpoint import run_identity

SIZE = 64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos(photo, tmp_path_factory):
    """Twelve different cut-outs of a photograph, of several shapes."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = (photo.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    for i in range(12):
        top, left, height, width = 20 * i, 200 - 10 * i, 150 + 10 * i, 240 - 5 * i
        Image.fromarray(pixels[top : top + height, left : left + width]).save(folder / f"{i:02}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def backbone(make_tiny_backbone):
    return make_tiny_backbone(SIZE)


@pytest.fixture(scope="module")
def denoiser():
    """The removal of a planted artifact: a wave over positions around an offset."""
    made = Denoiser(DenoiserConfig("subtract", 64, grid=(4, 4)))
    offset, wave = 0.4 * torch.randn(2, 64, generator=generator(1))
    made.body.artifact.data = offset + wave * torch.linspace(-1, 1, 4)[:, None, None].expand(4, 4, 1)
    return made.eval()


def settings_of(job, **changes):
    """A job's settings with changes, of the job itself and of its training loop."""
    loop = job().loop
    own = {name: changes.pop(name) for name in list(changes) if not hasattr(loop, name)}
    return job(loop=replace(loop, **changes), **own)


def short(**changes):
    values = {"steps": 40, "batch_size": 4, "learning_rate": 1e-2, "layer_decay": 0.3, "ema": 0.0}
    values |= {"validate_every": 0, "log_every": 5, "checkpoint_every": 20}
    return settings_of(BackboneTraining, **{**values, **changes})


def test_runs_of_earlier_versions_have_the_identity_of_these():
    """The same keys and values in a checkpoint as when the settings of the loop were fields of the job."""
    held = {"steps": 2000, "batch_size": 16, "learning_rate": 1e-4, "min_learning_rate": 1e-6, "warmup": 0.1}
    held |= {"weight_decay": 0.01, "betas": [0.9, 0.999], "clip": 1.0, "ema": 0.99, "precision": "no", "seed": 0}
    assert run_identity(BackboneTraining().loop, {})["config"] == held
    every = BackboneTraining().loop
    assert (every.validate_every, every.checkpoint_every, every.log_every, every.trackers) == (200, 500, 10, ())


# -- the mean of shifted views ----------------------------------------------------------------------------------------


def planted(window, patch=8, stride=8, artifact=None):
    """A backbone whose token is the mean colour of its patch, plus an artifact of its position."""

    def tokens(model, images):
        patches = nn.functional.avg_pool2d(images, patch, stride).permute(0, 2, 3, 1)
        return Tokens.of(patches if artifact is None else patches + artifact)

    return wrap(
        nn.Identity(), tokens, patch, name="planted", image_size=window, stride=stride, mean=(0, 0, 0), std=(1, 1, 1)
    )


@pytest.mark.parametrize(
    ("window", "stride", "mirrors"), [((32, 48), 8, True), ((32, 40), 4, True), ((32, 40), 3, False)]
)
def test_patches_of_shifted_and_mirrored_views_are_the_same_pixels(window, stride, mirrors):
    exact = planted(window, stride=stride)
    canvas = Canvas.of(exact, 0.5)
    assert canvas.mirrors == mirrors
    canvases = torch.rand(2, 3, *canvas.size, generator=generator())
    shifts = canvas.draw_shifts(12, generator(1))
    assert bool(shifts[:, 2].any()) == mirrors and shifts[:, :2].amin() < min(canvas.margin)
    mean, own = view_mean(exact, canvas, canvases, shifts)
    torch.testing.assert_close(mean, own.patches, rtol=0, atol=1e-6)
    assert torch.equal(own.patches, exact(canvas.middle(canvases)).patches)


def test_the_artifact_becomes_its_mean_over_the_positions_that_show_a_patch():
    rows, columns = 4, 6
    artifact = torch.randn(rows, columns, 3, generator=generator(2))
    dirty, clean = (planted((32, 48), artifact=each) for each in (artifact, None))
    canvas = Canvas.of(dirty, 0.75)
    assert canvas.margin == (3, 4)
    shifts = torch.tensor([[0, 0, 0], [6, 8, 0], [1, 3, 1], [5, 6, 1], [3, 0, 0]])
    canvases = torch.rand(1, 3, *canvas.size, generator=generator())
    mean, own = view_mean(dirty, canvas, canvases, shifts)
    content = clean(canvas.middle(canvases)).patches
    alone = 0
    for row in range(rows):
        for column in range(columns):
            seen = []
            for top, left, mirrored in shifts.tolist():  # where this patch of the canvas lies in the view
                y, x = 3 + row - top, 4 + column - left
                if 0 <= y < rows and 0 <= x < columns:
                    seen.append(artifact[y, columns - 1 - x if mirrored else x])
            alone += not seen
            wanted = torch.stack(seen or [artifact[row, column]]).mean(0)
            torch.testing.assert_close(mean[0, row, column] - content[0, row, column], wanted, rtol=0, atol=1e-5)
    assert 0 < alone < rows * columns  # some patches are in no view, and keep their own token
    torch.testing.assert_close(own.patches[0] - content[0], artifact, rtol=0, atol=1e-5)


def test_many_views_remove_an_artifact_and_leave_the_content():
    artifact = torch.randn(8, 8, 3, generator=generator(2))
    dirty, clean = (planted((64, 64), artifact=each) for each in (artifact, None))
    canvas = Canvas.of(dirty, 0.5)
    canvases = torch.rand(1, 3, *canvas.size, generator=generator())
    mean, own = view_mean(dirty, canvas, canvases, canvas.draw_shifts(400, generator(3)))
    content = clean(canvas.middle(canvases)).patches
    left, before = ((each - content).square().mean() for each in (mean, own.patches))
    assert left < before / 8  # a patch is seen at 16 to 64 of 64 positions


# -- examples ---------------------------------------------------------------------------------------------------------


def test_a_canvas_keeps_the_aspect_ratio_and_may_show_all_that_fits(tmp_path, backbone):
    """On an image of two ramps, the slopes of a canvas tell how it was cut."""
    height, width = 120, 200
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    Image.fromarray(np.stack((x, y, 0 * x), -1).astype(np.uint8)).save(tmp_path / "ramps.png")
    canvas, mirrored, areas = Canvas((64, 64), (16, 16), (0, 0), True), 0, []
    for seed in range(20):
        found = canvas.read(tmp_path / "ramps.png", (0.5, 1.0), generator(seed)) * 255
        across, down = (
            float(found[0, 32, 48] - found[0, 32, 16]) / 32,
            float(found[1, 48, 32] - found[1, 16, 32]) / 32,
        )
        assert abs(across) == pytest.approx(down, rel=0.05)
        mirrored += across < 0
        areas.append((64 * down) ** 2 / height**2)
    assert 4 < mirrored < 16
    assert 0.45 < min(areas) < 0.65 and 0.85 < max(areas) < 1.05
    whole = canvas.read(tmp_path / "ramps.png", (1.0, 1.0), generator()) * 255
    assert float(whole[1, 0].mean()) < 1.5 and float(whole[1, -1].mean()) > height - 2.5


def test_batches_are_pure_and_shared_among_processes(photos, backbone):
    config = short(teacher="views", batch_size=6)
    canvas = Canvas.of(backbone, 0.25)
    batches = canvas_batches(photos, canvas, config)
    one = batches(3, 0, 1)
    assert one["canvas"].shape == (6, 3, 96, 96) and one["shifts"].shape == (10, 3)
    parts = [batches(3, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part["canvas"] for part in parts]), one["canvas"])
    assert all(torch.equal(part["shifts"], one["shifts"]) for part in parts)
    other = batches(4, 0, 1)
    assert not torch.equal(other["shifts"], one["shifts"]) and not torch.equal(other["canvas"], one["canvas"])
    seeded = canvas_batches(photos, canvas, replace(config, loop=replace(config.loop, seed=1)))(3, 0, 1)
    assert not torch.equal(seeded["canvas"], one["canvas"])


def test_shifts_are_spread_evenly_over_the_margin(backbone):
    shifts = Canvas.of(backbone, 0.5).draw_shifts(9000, generator())
    for column in (0, 1):
        counts = torch.bincount(shifts[:, column], minlength=5)
        assert len(counts) == 5 and (counts / 1800 - 1).abs().max() < 0.1
    assert shifts[:, 2].float().mean() == 0.5


# -- the student ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_layers_learn_at_the_rates_of_timm(name):
    model = timm.create_model(name, num_classes=0)
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = {}
    no_decay = model.no_weight_decay()
    for group in param_groups_layer_decay(model, 0.05, no_decay, layer_decay=0.7):
        wanted |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
    found, decay = {}, {}
    for group in layer_groups(model, 0.7, 0.05):
        found |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
        decay |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert {n: found[n] for n in wanted} == pytest.approx(wanted)
    assert {n for n, value in decay.items() if not value} == {n for n in found if n in no_decay}
    assert sum(len(group["params"]) for group in layer_groups(model, 0.7, 0.05)) == len(names)


def test_layer_rates_written_down():
    model = timm.create_model("test_vit", num_classes=0, reg_tokens=2)
    depth = len(model.blocks)
    for added in (False, True):
        scale = {id(p): g["lr_scale"] for g in layer_groups(model, 0.5, 0.01, added) for p in g["params"]}
        assert scale[id(model.norm.weight)] == 1 and scale[id(model.blocks[-1].mlp.fc1.weight)] == 1
        assert scale[id(model.blocks[0].norm1.bias)] == 0.5 ** (depth - 1)
        assert scale[id(model.pos_embed)] == scale[id(model.patch_embed.proj.weight)] == 0.5**depth
        assert scale[id(model.reg_token)] == (1 if added else 0.5**depth)


def test_an_earlier_layer_is_the_last_that_learns():
    model = timm.create_model("test_vit", num_classes=0)
    groups = layer_groups(model, 0.5, 0.01, read=2)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scale[id(model.blocks[2].norm1.weight)] == 1 and scale[id(model.pos_embed)] == 0.5**3
    assert id(model.blocks[3].norm1.weight) not in scale and id(model.norm.weight) not in scale
    student = Student(load_backbone("test_vit", pretrained=False, size=SIZE, layer=2))
    student(torch.rand(1, 3, SIZE, SIZE)).patches.sum().backward()
    learning = {name for name, p in student.named_parameters() if p.grad is not None}
    assert learning == {name for name, p in student.named_parameters() if p.requires_grad}
    assert len(learning) == len(scale)


def test_blocks_of_the_class_token_come_after_the_others():
    model = timm.create_model("xcit_nano_12_p8_224", num_classes=0)
    scale = {id(p): g["lr_scale"] for g in layer_groups(model, 0.5, 0.01) for p in g["params"]}
    assert scale[id(model.cls_attn_blocks[0].norm1.weight)] == scale[id(model.blocks[11].norm1.weight)] == 1
    assert (
        scale[id(model.blocks[0].norm1.weight)] == 0.5**11 and scale[id(model.patch_embed.proj[0][0].weight)] == 0.5**12
    )


# Class token, its position embedding, or registers of the model's own; RoPE.
REGISTERED = {"test_vit": 0, "test_vit2": 1, "deit3_small_patch16_224": 0, "vit_tiny_patch16_dinov3_qkvb": 4}


@pytest.mark.parametrize("name", REGISTERED)
def test_registers_join_behind_the_prefix_and_nothing_else_moves(name):
    original = load_backbone(name, pretrained=False, size=SIZE)
    if original.model.pos_embed is not None:
        original.model.pos_embed.data.normal_(generator=generator(1))
    found = with_registers(original, 3, generator())
    before, after = original.model, found.model
    prefix = before.num_prefix_tokens
    assert after.reg_token.shape[1] == REGISTERED[name] + 3 and found.num_prefix_tokens == prefix + 3
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator())
    sequences = []
    for model in (before, after):
        taken = model._pos_embed(model.patch_embed(images))
        sequences.append(taken[0] if isinstance(taken, tuple) else taken)
    old, new = sequences
    assert torch.equal(new[:, :prefix], old[:, :prefix])  # class token and old registers
    assert torch.equal(new[:, prefix + 3 :], old[:, prefix:])
    assert torch.equal(new[0, prefix : prefix + 3], after.reg_token[0, -3:])
    assert 0.01 < after.reg_token[0, -3:].std() < 0.03
    tokens = found(images)
    assert tokens.prefix.shape[1] == prefix + 3 and tokens.grid == original(images).grid
    option = "num_reg_tokens" if name.endswith("qkvb") else "reg_tokens"
    plain = timm.create_model(name, num_classes=0, **{option: REGISTERED[name] + 3})
    plain.load_state_dict(after.state_dict(), strict=True)


def test_registers_keep_layer_stride_and_size():
    original = load_backbone("test_vit", pretrained=False, size=(64, 96), layer=2, stride=8)
    found = with_registers(original, 2)
    images = torch.rand(1, 3, 64, 96, generator=generator())
    assert (found.layer, found.stride, found.image_size) == (2, (8, 8), (64, 96))
    assert found(images).grid == original(images).grid == (7, 11) and found(images).prefix.shape[1] == 3


def test_the_student_is_a_trainable_copy_that_stays_in_evaluation_mode(backbone):
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator())
    student = Student(backbone).train()
    assert all(p.requires_grad for p in student.parameters()) and not any(m.training for m in student.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert torch.equal(student(images).patches, backbone(images).patches)
    sha256 = backbone.weights_sha256
    student = Student(backbone)
    with torch.no_grad():
        student.backbone.model.pos_embed.add_(1)
    assert student.backbone.weights_sha256 != sha256


# -- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_its_parts():
    numbers = generator()
    draw = lambda *shape: torch.randn(*shape, generator=numbers)  # noqa: E731
    target, own = draw(2, 3, 4, 5), Tokens(draw(2, 3, 4, 5), draw(2, 2, 5))
    found = Tokens(draw(2, 3, 4, 5), draw(2, 6, 5))  # four registers were added

    def naive(a, b):
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        return float((a - b).square().mean() + 1 - cosine.mean())

    for weight in (0.0, 0.7):
        wanted = naive(found.patches, target) + weight * naive(found.prefix[:, :2], own.prefix)
        assert float(compare(found, target, own, weight)["loss"]) == pytest.approx(wanted, rel=1e-5)
    bare = compare(Tokens.of(found.patches), target, Tokens.of(own.patches), 1.0)
    assert set(bare) == {"loss", "mse", "cosine"}


def test_checkpointing_changes_no_gradient(backbone):
    canvas = Canvas.of(backbone)
    batch = {"canvas": torch.rand(2, 3, SIZE, SIZE, generator=generator()), "shifts": torch.zeros(0, 3)}

    def teacher(canvases, shifts):
        own = backbone(canvases)
        return 2 * own.patches, own

    gradients = []
    for on in (False, True):
        student = Student(backbone, 2, generator())
        student.backbone.model.set_grad_checkpointing(on)
        distillation_loss(student, batch, teacher, canvas, 1.0)["loss"].backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    plain, checkpointed = gradients
    assert all(value is not None and value.abs().sum() > 0 for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)


# -- the job ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled(backbone, denoiser, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "b.safetensors"
    return out, distill_backbone(backbone, photos, out, short(), denoiser)


def test_the_backbone_learns_what_its_denoiser_does(distilled, backbone, denoiser, photos):
    _, report = distilled
    reached, before = report["validation"], report["baselines"]["no_op"]
    assert reached["loss"] < 0.4 * before["loss"] and reached["cosine"] > before["cosine"] + 0.05
    assert before["mse"] == pytest.approx(float(denoiser.body.artifact.square().mean()), rel=1e-4)
    assert before["prefix_cosine"] == pytest.approx(1) and reached["prefix_cosine"] > 0.9
    assert report["steps"] == 40 and report["training"] + report["held_out"] == report["images"] == 12
    json.dumps(report)


def test_the_result_in_timm_and_in_dvt(distilled, backbone):
    out, report = distilled
    card = read_card(out)
    assert card["create_model"] == {"num_classes": 0} and card["name"] == "test_vit"
    plain = timm.create_model("test_vit", **card["create_model"], img_size=160).eval()
    plain.load_state_dict(load_file(out), strict=True)
    loaded = load_backbone("test_vit", weights=out, size=SIZE)
    assert loaded.weights_sha256 == card["weights_sha256"] != card["original_weights_sha256"]
    assert card["original_weights_sha256"] == backbone.weights_sha256
    assert card["metrics"]["validation"] == report["validation"] and card["denoiser"]["sha256"]
    images = torch.rand(2, 3, 160, 160, generator=generator())
    tokens = loaded(images)
    with torch.no_grad():
        sequence = plain.forward_features((images - loaded.mean) / loaded.std)
    assert torch.equal(tokens.patches.flatten(1, 2), sequence[:, 1:]) and torch.equal(tokens.prefix, sequence[:, :1])
    assert not list(out.parent.glob("*.part"))


def test_views_teach_a_backbone_with_registers(backbone, photos, tmp_path):
    """With the trained module's own tokens, bit for bit, out of the file."""
    seen = []
    config = short(teacher="views", views=4, shift=0.5, registers=3, steps=25, ema=0.8)
    report = distill_backbone(
        backbone, photos, tmp_path / "b.safetensors", config, progress=lambda what, done, total: seen.append(done)
    )
    assert seen == list(range(1, 26))
    assert report["validation"]["loss"] < 0.8 * report["baselines"]["no_op"]["loss"]
    options = read_card(tmp_path / "b.safetensors")["create_model"]
    assert options == {"num_classes": 0, "reg_tokens": 3}
    state = load_file(tmp_path / "b.safetensors")
    timm.create_model("test_vit", **options).load_state_dict(state, strict=True)
    loaded = load_backbone("test_vit", weights=tmp_path / "b.safetensors", size=SIZE)
    assert loaded.num_prefix_tokens == 4
    checkpoint = load_file(f"{report['checkpoint']}/ema.safetensors")
    student = Student(backbone, 3)
    student.load_state_dict(checkpoint)
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator())
    assert torch.equal(loaded(images).patches, student(images).patches)
    assert torch.equal(loaded(images).prefix, student(images).prefix)
    added = student.backbone.model.reg_token
    assert (added - with_registers(backbone, 3, generator()).model.reg_token).abs().min() > 0


def test_the_weight_of_the_prefix_keeps_the_class_token(distilled, backbone, denoiser, photos, tmp_path):
    _, held = distilled
    free = distill_backbone(backbone, photos, tmp_path / "free.safetensors", short(prefix_weight=0.0), denoiser)
    assert free["validation"]["prefix_cosine"] < held["validation"]["prefix_cosine"] - 0.02


def test_a_family_whose_size_is_chosen_at_load(photos, tmp_path):
    """Its position tables have the size that it was trained at, so the card says which; also in bfloat16."""
    sized, out = load_backbone("test_vit_relpos", pretrained=False, size=(64, 96)), tmp_path / "b.safetensors"
    config = short(teacher="views", views=1, steps=2, batch_size=2, precision="bf16", grad_checkpointing=True)
    distill_backbone(sized, photos, out, config)
    options = read_card(out)["create_model"]
    assert options == {"num_classes": 0, "img_size": [64, 96]}
    plain = timm.create_model("test_vit_relpos", **options).eval()
    plain.load_state_dict(load_file(out), strict=True)
    images = torch.rand(2, 3, 64, 96, generator=generator())
    tokens = load_backbone("test_vit_relpos", weights=out, size=(64, 96))(images)
    with torch.no_grad():
        sequence = plain.forward_features((images - sized.mean) / sized.std)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), sequence)
    assert not torch.equal(tokens.patches, sized(images).patches)


def test_an_interrupted_run_ends_with_the_same_bytes(distilled, backbone, denoiser, photos, tmp_path):
    def interrupt(what, done, total):
        if done == 33:
            raise KeyboardInterrupt

    steps, path = [], tmp_path / "cut.safetensors"
    with pytest.raises(KeyboardInterrupt):
        distill_backbone(backbone, photos, path, short(), denoiser, interrupt)
    assert not path.exists()
    distill_backbone(backbone, photos, path, short(), denoiser, lambda what, done, total: steps.append(done))
    assert steps[0] == 21  # from the checkpoint at 20
    whole, cut = load_file(distilled[0]), load_file(path)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_evaluation_is_of_the_teacher_s_tokens(backbone, photos):
    """A student equal to its teacher has no loss, and the original one has that of a naive mean."""
    config = short()
    canvas = Canvas.of(backbone)
    shifted = Student(backbone).requires_grad_(False)
    shifted.backbone.model.norm.bias.data += 1

    def teacher(canvases, shifts):
        return shifted(canvases).patches, backbone(canvases)

    given = [canvas_batches(photos, canvas, config)(step, 0, 1) for step in range(2)]
    scores = evaluate_student(shifted, teacher, canvas, given)
    assert scores["student"]["mse"] == 0 and scores["student"]["cosine"] == pytest.approx(1)
    assert scores["no_op"]["mse"] == pytest.approx(1, rel=1e-4)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(backbone, images, tmp_path, error, match, denoiser=None, out="b.safetensors", **changes):
    with pytest.raises(error, match=match):
        distill_backbone(backbone, images, tmp_path / out, short(**changes), denoiser)
    assert not (tmp_path / out).exists()


def test_a_wrapped_model(photos, tmp_path):
    refused(planted((32, 32)), photos, tmp_path, BackboneError, "planted is a wrapped model", teacher="views")


def test_a_denoiser_of_another_backbone(backbone, photos, tmp_path):
    other = Denoiser(DenoiserConfig("subtract", 32, grid=(4, 4)))
    refused(backbone, photos, tmp_path, BackboneError, "32 channels.*gives 64", other)
    named = Denoiser(DenoiserConfig("subtract", 64, grid=(4, 4)))
    named.card = {"backbone": "vit_small_patch14_dinov2", "weights_sha256": "ab" * 32, "layer": -1}
    refused(backbone, photos, tmp_path, BackboneError, "vit_small_patch14_dinov2", named)


def test_teacher_and_denoiser_that_contradict_each_other(backbone, denoiser, photos, tmp_path):
    refused(backbone, photos, tmp_path, ConfigError, "'denoiser' needs a denoiser")
    refused(backbone, photos, tmp_path, ConfigError, "'views' uses no denoiser", denoiser, teacher="views")


def test_too_few_images(backbone, photos, tmp_path):
    for images in ([], photos[:1], [photos[0], photos[0]]):
        refused(backbone, images, tmp_path, ImageError, "needs at least 2", teacher="views")


def test_an_image_that_cannot_be_read(backbone, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(photos[0].read_bytes()[:200])
    refused(backbone, [*photos[:2], tmp_path / "broken.png"], tmp_path, ImageError, "broken.png", teacher="views")


def test_a_result_that_is_no_safetensors_file(backbone, photos, tmp_path):
    refused(backbone, photos, tmp_path, ConfigError, "safetensors file", out="b.pth", teacher="views")


def test_registers_in_a_family_without_them(photos, tmp_path):
    relative = load_backbone("test_vit_relpos", pretrained=False, size=SIZE)
    refused(relative, photos, tmp_path, ConfigError, "RelPos.*no register tokens", teacher="views", registers=2)


def test_checkpointing_in_a_family_without_it(photos, tmp_path):
    plain = load_backbone("convit_tiny", pretrained=False, size=SIZE)
    refused(plain, photos, tmp_path, ConfigError, "ConVit.*no gradient", teacher="views", grad_checkpointing=True)


def test_a_run_with_other_settings_or_images_is_not_continued(distilled, backbone, denoiser, photos):
    out, _ = distilled
    for images, changes, name in ((photos[:8], {}, "images"), (photos, {"layer_decay": 0.5}, "layer_decay")):
        with pytest.raises(ConfigError, match=f"other settings.*{name}"):
            distill_backbone(backbone, images, out, short(**changes), denoiser)


def test_a_file_without_a_card(backbone, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    for name in ("plain", "damaged", "missing"):
        with pytest.raises(WeightsError, match=f"{name}.safetensors"):
            read_card(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": "student"},
        {"views": 0},
        {"shift": 0.0},
        {"shift": 1.5},
        {"registers": -1},
        {"prefix_weight": -0.1},
        {"layer_decay": 0.0},
        {"scale": (0.5, 0.4)},
        {"validation": 1.0},
        {"steps": 0},
    ],
)
def test_settings_outside_their_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        short(**changes)


# -- another model as the student


def test_another_model_learns_its_teacher_through_a_projection(backbone, denoiser, photos, tmp_path):
    """Its grid is finer than the teacher's, its channels are others; clean tokens and raw ones."""
    small = load_backbone("test_vit2", pretrained=False, size=96)
    for kind, cleaner in {"denoiser": denoiser, "raw": None}.items():
        out = tmp_path / f"{kind}.safetensors"
        config = short(teacher=kind)
        report = distill_student(backbone, small, photos, out, config, cleaner)
        mean, start, reached = (*report["baselines"].values(), report["validation"])
        assert reached["loss"] < 0.9 * start["loss"] and start["loss"] < mean["loss"]
        assert report["grid"] == small.grid((96, 96)) != backbone.grid((SIZE, SIZE)) and "prefix_cosine" not in reached
        loaded, card = load_backbone("test_vit2", weights=out, size=96), read_card(out)
        assert loaded.weights_sha256 == card["weights_sha256"] != small.weights_sha256
        assert card["name"] == "test_vit2" and card["teacher"]["weights_sha256"] == backbone.weights_sha256
        projection = read_projection(report["projection"])
        assert projection(loaded(torch.rand(1, 3, 96, 96)).patches).shape == (1, *report["grid"], 64)
        json.dumps(report)
    again = distill_student(backbone, small, photos, out, config)  # the finished run: the same result
    assert again["validation"] == report["validation"]
    with pytest.raises(ConfigError, match="other settings"):
        distill_student(backbone, load_backbone("test_vit2", pretrained=False, size=64), photos, out, config)


def test_the_first_projection_is_the_least_squares_one(backbone, photos):
    """With the teacher itself as the student it is the identity."""
    model, canvas = OtherStudent(backbone, 64), Canvas.of(backbone)
    config = BackboneTraining(teacher="raw")
    teacher = make_teacher(backbone, canvas, raw=True)
    mean = model.fit(teacher, canvas, held_out_batches(photos, canvas, config))
    image = next(iter(held_out_batches(photos, canvas, config)))["canvas"]
    expected = backbone(canvas.middle(image)).patches
    found = model(canvas.middle(image)).patches
    assert (found - expected).norm() < 0.02 * (expected - mean).norm()


def test_students_that_cannot_be_are_refused(backbone, denoiser, photos, tmp_path):
    out, small = tmp_path / "s.safetensors", load_backbone("test_vit2", pretrained=False)
    with pytest.raises(ConfigError, match=r"or 'views' or 'raw' \(on the command line: --denoiser FILE, or --teacher"):
        distill_student(backbone, small, photos, out)
    with pytest.raises(ConfigError, match="for a student of another model"):
        distill_backbone(backbone, photos, out, short(teacher="raw"))
    with pytest.raises(ConfigError, match="choose a student that has them"):
        distill_student(backbone, small, photos, out, short(teacher="raw", registers=2))
    wrapped = wrap(nn.Conv2d(3, 8, 16, 16), lambda m, x: Tokens.of(m(x).movedim(1, -1)), patch_size=16, image_size=64)
    with pytest.raises(BackboneError, match=r"the student .* is no timm model"):
        distill_student(backbone, wrapped, photos, out, short(teacher="raw"))
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError, match="cannot read a projection"):
        read_projection(tmp_path / "no.safetensors")
    assert not out.exists()
