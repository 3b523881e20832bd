"""mmsegmentation with backbones of dvt: real training, validation and tests on tiny data that is written here."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dvt.backbones import load_backbone
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.errors import BackboneError, ConfigError, DvtError
from dvt.images import load_image

pytest.importorskip("mmseg", reason="mmsegmentation is not installed; it has its own environment: `make test-mmseg`")

from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import DATASETS, MODELS, TRANSFORMS

from dvt.denoiser.mmseg import DvtBackbone, DvtLinearHead

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "mmseg"
COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [230, 230, 60]], dtype=np.uint8)
VOID = 11


@pytest.fixture(scope="module")
def weights(make_tiny_backbone, tmp_path_factory):
    """A file of the tiny backbone's weights."""
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(make_tiny_backbone(96).model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def make_denoiser(tmp_path_factory):
    def make(strength=1.0, card=None):
        denoiser = Denoiser(DenoiserConfig("conv1x1", 64, grid=(6, 6), strength=strength), torch.Generator())
        denoiser.card = card or {}
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        path = tmp_path_factory.mktemp("denoiser") / "denoiser.safetensors"
        denoiser.save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("mmseg_run_example", EXAMPLES / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pair(image, labels, seed, first_id=0):
    """An image of 2 x 3 blocks, each of one class, which its colour tells; the last column of pixels is void."""
    random = np.random.default_rng(seed)
    blocks = random.permutation(np.arange(6) % len(COLOURS)).reshape(2, 3)
    classes = np.kron(blocks, np.ones((32, 32), dtype=np.uint8)).astype(np.uint8)
    pixels = COLOURS[classes] + random.integers(0, 20, (64, 96, 3), dtype=np.uint8)
    ids = classes + first_id
    ids[:, -1] = VOID if first_id == 0 else 0
    for path, array in ((image, pixels), (labels, ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    root = tmp_path_factory.mktemp("camvid")
    for split, count in (("train", 8), ("val", 2), ("test", 3)):
        for k in range(count):
            image, labels = root / f"images/{split}/{k}.jpg", root / f"annotations/{split}/{k}.png"
            write_pair(image, labels, seed=100 * count + k)
    return root


SMALL = (
    *("train_dataloader.batch_size=4", "model.data_preprocessor.size=(64,64)"),
    *("train_dataloader.dataset.pipeline.2.scale=(400,64)", "train_dataloader.dataset.pipeline.3.crop_size=(64,64)"),
    *("val_dataloader.dataset.pipeline.1.scale=(400,64)", "test_dataloader.dataset.pipeline.1.scale=(400,64)"),
    *("model.test_cfg.crop_size=(64,64)", "model.test_cfg.stride=(32,32)", "optim_wrapper.optimizer.lr=0.02"),
)


def arguments(weights, data, folder, *more, config="camvid", options=SMALL):
    given = [EXAMPLES / f"{config}.py", "--data-root", data, "--work-dir", folder, "--iterations", 20, "--workers", 0]
    backbone = ["--backbone", "test_vit", "--weights", weights]
    return [str(each) for each in (*given, *backbone, *more, "--cfg-options", *options)]


# -- the backbone -----------------------------------------------------------------------------------------------------


def test_the_map_is_the_backbones_tokens_raw_and_denoised(weights, make_denoiser):
    images, file = torch.rand(2, 3, 64, 96), make_denoiser()
    (raw,) = MODELS.build({"type": "DvtBackbone", "name": "test_vit", "weights": weights})(images)
    (clean,) = DvtBackbone("test_vit", weights, denoiser=file)(images)
    tokens = load_backbone("test_vit", weights)(images).patches
    assert raw.shape == (2, 64, 4, 6)
    torch.testing.assert_close(raw.permute(0, 2, 3, 1), tokens)
    torch.testing.assert_close(clean.permute(0, 2, 3, 1), Denoiser.from_pretrained(file)(tokens))
    assert (clean - raw).abs().max() > 0.1


def test_several_blocks_and_a_pyramid(weights, make_denoiser):
    images = torch.rand(2, 3, 64, 96)
    plain = load_backbone("test_vit", weights)
    maps = DvtBackbone("test_vit", weights, out_indices=(1, 3, 5))(images)
    found = plain.at_layers(images, (1, 3, -1))
    for given, layer in zip(maps, (1, 3, -1), strict=True):
        torch.testing.assert_close(given.permute(0, 2, 3, 1), found[layer].patches)
    file = make_denoiser()
    clean = DvtBackbone("test_vit", weights, denoiser=file, out_indices=(1, 5))(images)
    torch.testing.assert_close(clean[0], maps[0])
    torch.testing.assert_close(clean[1].permute(0, 2, 3, 1), Denoiser.from_pretrained(file)(found[-1].patches))
    pyramid = DvtBackbone("test_vit", weights, out_indices=(1, 3, 4, 5), factors=(4, 2, 1, 0.5))(images)
    assert [tuple(each.shape[2:]) for each in pyramid] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for options in (
        {"out_indices": (1, 5), "layer": 3},
        {"out_indices": ()},
        {"out_indices": (5, -1)},
        {"factors": (1, 2)},
        {"out_indices": (1, 5), "factors": (1, 0)},
    ):
        with pytest.raises(ConfigError):
            DvtBackbone("test_vit", weights, **options)


def test_maps_of_overlapping_patches_tile_the_image(weights):
    """Coordinates as features: each cell of the map holds its own place, inside the outermost patches."""
    from dvt import grids

    backbone = DvtBackbone("test_vit", weights, stride=8)
    (given,) = backbone(torch.rand(1, 3, 64, 96))
    assert given.shape == (1, 64, 8, 12)
    centres = backbone.backbone.centres((64, 96))
    places = backbone._map(centres[None], (64, 96), 1)[0].movedim(0, -1)
    expected = grids.grid_centres((8, 12))
    inside = ((expected >= centres[0, 0]) & (expected <= centres[-1, -1])).all(-1)
    torch.testing.assert_close(places[inside], expected[inside])
    assert inside.sum() == 6 * 10


def test_uperhead_learns(weights, camvid, tmp_path, run):
    options = (*SMALL, "model.decode_head.channels=16", "model.backbone.out_indices=(1,3,4,5)")
    report = run.main(arguments(weights, camvid, tmp_path, config="upernet_camvid", options=options))
    assert report["results"]["raw"]["mIoU"] > 20  # of 11 classes, of which four occur


def test_an_earlier_layer_and_the_bundled_weights():
    backbone = DvtBackbone("vit_tiny_patch16_224", "demo", layer=5)
    assert backbone.feature_dim == 192 and backbone.backbone.layer == 5
    assert backbone(torch.rand(1, 3, 32, 48))[0].shape == (1, 192, 2, 3)


def test_a_size_that_is_no_multiple_of_the_patch_still_covers_the_image(weights):
    """White in the right 7 of 71 pixels must be seen: a crop to whole patches would lose it."""
    backbone = DvtBackbone("test_vit", weights)
    images = torch.zeros(1, 3, 50, 71)
    (black,) = backbone(images)
    images[..., 64:] = 1
    (white,) = backbone(images)
    assert black.shape == (1, 64, 3, 4)
    change = (white - black).norm(dim=1)[0]
    assert (change[:, 3] > 2 * change[:, :3].amax(1)).all()
    resized = nnf.interpolate(images, (48, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(white, backbone(resized)[0])


def test_it_stays_frozen_whatever_mmengine_does(weights):
    backbone = DvtBackbone("test_vit", weights)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.init_weights()
    backbone.train()
    assert not any(module.training for module in backbone.backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(torch.rand(1, 3, 64, 64))[0].requires_grad
    assert before and all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_images_that_are_normalised_already_are_refused(weights):
    with pytest.raises(ConfigError, match=r"std=\[255, 255, 255\]"):
        DvtBackbone("test_vit", weights)(torch.randn(1, 3, 64, 64))


def test_a_denoiser_of_another_backbone_is_refused_unless_forced(weights, make_denoiser):
    other = make_denoiser(card={"backbone": "vit_base_patch16_224"})
    with pytest.raises(BackboneError, match="vit_base_patch16_224"):
        DvtBackbone("test_vit", weights, denoiser=other)
    assert DvtBackbone("test_vit", weights, denoiser=other, force=True).feature_dim == 64


# -- the head ---------------------------------------------------------------------------------------------------------


def test_the_head_is_normalisation_and_one_linear_map():
    torch.manual_seed(0)
    head = DvtLinearHead(6, num_classes=3).train()
    x = 5 + 3 * torch.randn(4, 6, 5, 7)
    got = head((x,))
    flat = x.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    normed = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    weight, bias = (value.detach().numpy() for value in (head.conv_seg.weight[:, :, 0, 0], head.conv_seg.bias))
    expected = (normed @ weight.T + bias).reshape(4, 5, 7, 3).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-4)
    assert sum(p.numel() for p in head.parameters()) == 6 * 3 + 3 + 2 * 6
    assert head.dropout is None


def test_the_head_takes_several_maps():
    head = DvtLinearHead([4, 2], num_classes=3, in_index=[0, 1], input_transform="resize_concat").eval()
    assert head((torch.rand(1, 4, 6, 8), torch.rand(1, 2, 3, 4))).shape == (1, 3, 6, 8)


# -- the data ---------------------------------------------------------------------------------------------------------


def test_camvid_reads_ids_as_they_are_and_void_as_ignored(camvid):
    options = {"data_prefix": {"img_path": "images/val", "seg_map_path": "annotations/val"}, "data_root": str(camvid)}
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "mmseg.LoadAnnotations"}]
    data = DATASETS.build({"type": "CamVidDataset", "pipeline": pipeline, **options})
    assert len(data) == 2 and len(data.metainfo["classes"]) == len(data.metainfo["palette"]) == 11
    assert (data.metainfo["classes"][0], data.metainfo["classes"][10]) == ("sky", "bicyclist")
    for k in range(2):
        stored = np.asarray(Image.open(camvid / f"annotations/val/{k}.png"))
        assert (stored == VOID).any()
        np.testing.assert_array_equal(data[k]["gt_seg_map"], np.where(stored == VOID, 255, stored))


@pytest.mark.parametrize("name", ["camvid", "voc2012", "ade20k"])
def test_the_configs_give_the_backbone_rgb_between_0_and_1(name, camvid):
    config, file = Config.fromfile(EXAMPLES / f"{name}.py"), camvid / "images/val/0.jpg"
    load = TRANSFORMS.build({"type": "LoadImageFromFile"})
    pack = TRANSFORMS.build({"type": "mmseg.PackSegInputs", "meta_keys": ()})
    sample = pack(load({"img_path": str(file)}))
    preprocess = MODELS.build(config.model.data_preprocessor)
    images = preprocess({"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]})["inputs"]
    torch.testing.assert_close(images[0], load_image(file))


# -- training through mmengine's Runner -------------------------------------------------------------------------------


def head_of(folder):
    state = torch.load(folder / "iter_20.pth", weights_only=False)["state_dict"]  # our own file, written just now
    return {name: value for name, value in state.items() if name.startswith("decode_head.")}


def test_twenty_iterations_learn_and_validate(weights, camvid, tmp_path, run):
    args = run.parse(arguments(weights, camvid, tmp_path))
    config = run.of_variant(run.load_config(args), "raw", None, 64, tmp_path)
    runner = Runner.from_cfg(config)
    model = runner.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("decode_head.")}
    assert runner.iter == 20
    val = runner.message_hub.get_scalar("val/mIoU").current()
    # Four colours: guessing one class gives 1/4 of the pixels, and far below 1/4 as a mean over classes.
    assert val > 75 and runner.test()["mIoU"] > 75


def test_raw_and_denoised_side_by_side_and_resumed(weights, camvid, tmp_path, run, make_denoiser, capsys):
    # A denoiser of strength 0 changes nothing: equal scores mean equal crops and equal first weights of the head.
    same = run.main(arguments(weights, camvid, tmp_path, "--denoiser", make_denoiser(strength=0.0)))
    out = capsys.readouterr().out.strip().splitlines()
    assert same["results"]["raw"] == same["results"]["denoised"]
    assert set(same["results"]["difference"].values()) == {0.0}
    assert json.loads(out[-1])["results"] == same["results"]
    raw, denoised, difference = out[-4:-1]
    assert raw.split() == ["raw", *(f"{value:.2f}" for value in same["results"]["raw"].values())]
    assert denoised.split()[1:] == raw.split()[1:] and difference.split()[1:] == ["+0.00"] * 3
    first = head_of(tmp_path / "raw")
    assert all(torch.equal(value, first[name]) for name, value in head_of(tmp_path / "denoised").items())

    resumed = run.main(arguments(weights, camvid, tmp_path, "--resume"))
    assert resumed["results"] == {"raw": same["results"]["raw"]}  # nothing left to train, the same head


def test_a_denoiser_that_erases_everything_costs_everything(weights, camvid, tmp_path, run):
    """So the second column is the denoised backbone's, and not the raw one's again."""
    denoiser = Denoiser(DenoiserConfig("conv1x1", 64, grid=(6, 6)), torch.Generator())
    with torch.no_grad():
        for module in denoiser.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(-torch.eye(64)[:, :, None, None])
                module.bias.zero_()
    denoiser.save_pretrained(tmp_path / "zero.safetensors")
    results = run.main(arguments(weights, camvid, tmp_path / "work", "--denoiser", tmp_path / "zero.safetensors"))
    assert results["results"]["denoised"]["mIoU"] < 25 < 75 < results["results"]["raw"]["mIoU"]


def voc_files(root):
    for split, names in (("train", "abcd"), ("val", "ef")):
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for k, name in enumerate(names):
            write_pair(root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png", seed=k)


def ade_files(root):
    for split, count in (("training", 4), ("validation", 2)):
        for k in range(count):
            # Ids go from 1 here: 0 is what does not count.
            write_pair(root / f"images/{split}/{k}.jpg", root / f"annotations/{split}/{k}.png", seed=k, first_id=1)


@pytest.mark.parametrize(("config", "write", "classes"), [("voc2012", voc_files, 21), ("ade20k", ade_files, 150)])
def test_the_other_configs_learn_tiny_sets(config, write, classes, weights, tmp_path, run):
    write(tmp_path / "data")
    results = run.main(arguments(weights, tmp_path / "data", tmp_path / "work", config=config))["results"]["raw"]
    assert results["aAcc"] > 75 and np.isfinite(list(results.values())).all()
    assert head_of(tmp_path / "work/raw")["decode_head.conv_seg.weight"].shape == (classes, 64, 1, 1)


def test_ade20ks_ids_go_down_by_one_and_0_is_ignored(tmp_path):
    ade_files(tmp_path)
    options = Config.fromfile(EXAMPLES / "ade20k.py").val_dataloader.dataset
    loaders = [{"type": "LoadImageFromFile"}, {"type": "mmseg.LoadAnnotations"}]
    data = DATASETS.build({**options, "data_root": str(tmp_path), "pipeline": loaders})
    stored = np.asarray(Image.open(tmp_path / "annotations/validation/0.png")).astype(int)
    assert set(np.unique(stored)) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(data[0]["gt_seg_map"], np.where(stored == 0, 255, stored - 1))


@pytest.mark.parametrize("name", ["voc2012", "ade20k"])
def test_the_protocol_is_the_papers(name):
    config = Config.fromfile(EXAMPLES / f"{name}.py")
    assert config.train_cfg.max_iters == 40_000 and config.train_dataloader.batch_size == 16
    assert config.model.test_cfg == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    assert (config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.weight_decay) == (1e-3, 1e-4)
    assert [(part.begin, part.end) for part in config.param_scheduler] == [(0, 1500), (1500, 40_000)]


# -- what can be wrong ------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_is_trained(weights, camvid, tmp_path, run, make_denoiser, capsys):
    for wrong in (["nowhere.py"], [str(EXAMPLES / "camvid.py"), "--iterations", "0"]):
        with pytest.raises(SystemExit):
            run.main(wrong)
    assert "nowhere.py" in capsys.readouterr().err
    with pytest.raises(DvtError, match="--data-root"):
        run.main(arguments(weights, tmp_path / "missing", tmp_path))
    other = make_denoiser(card={"backbone": "vit_base_patch16_224"})
    with pytest.raises(BackboneError, match="made for another backbone"):
        run.main(arguments(weights, camvid, tmp_path, "--denoiser", other))
    assert not list(tmp_path.iterdir())
