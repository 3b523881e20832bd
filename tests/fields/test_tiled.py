"""Large images in windows: blended, without seams, to the numbers of one piece where those do not depend on it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt import grids
from dvt.backbones import load_backbone, wrap
from dvt.backbones.tiles import Tiling
from dvt.errors import ConfigError, ImageError
from dvt.fields.config import DenoiseConfig
from dvt.fields.images import denoise_images
from dvt.fields.tiled import TiledDecomposeWork, denoise_tiled
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.jobs.run import run
from dvt.store import FeatureStore
from dvt.tokens import Tokens


def local(size=64, position=0.0):
    """A backbone whose tokens are means of their own patches and, by a weight, of their position in the input."""

    def tokens(model, images):
        means = torch.nn.functional.avg_pool2d(images, 16).movedim(1, -1)
        places = grids.grid_centres(means.shape[1:3])
        places = torch.cat((places, places[..., :1] * places[..., 1:]), -1)
        return Tokens(means + position * (places - places.mean((0, 1))), means.flatten(1, 2)[:, :1])

    spec = {"patch_size": 16, "image_size": size, "feature_dim": 3, "num_prefix_tokens": 1}
    return wrap(torch.nn.Conv2d(3, 3, 1), tokens, mean=(0, 0, 0), std=(1, 1, 1), name="local", **spec)


def smooth(height=192, width=320):
    """(3, H, W) slow waves of colour."""
    x, y = grids.grid_centres((height, width)).unbind(-1)
    return torch.stack([0.5 + 0.4 * torch.sin(3 * x + k) * torch.cos(2 * y - k) for k in range(3)])


def save(pixels, path):
    Image.fromarray(pixels.mul(255).round().byte().movedim(0, -1).numpy()).save(path)
    return path


def steps(maps):
    """The changes between neighbouring columns, and between neighbouring rows."""
    return maps.diff(dim=1).norm(dim=-1).mean(0), maps.diff(dim=0).norm(dim=-1).mean(1)


@pytest.mark.parametrize("size", [(192, 320), (64, 64), (64, 208), (100, 333)])
def test_tokens_of_their_own_patches_are_those_of_one_piece(size, tmp_path):
    backbone, image = local(), smooth(*size)
    path = save(image, tmp_path / "photo.png")
    extract_images(backbone, [path], tmp_path / "store", ExtractConfig(batch=3, tiling=Tiling()))
    found = FeatureStore(tmp_path / "store")[0].patches[0]
    pixels = dvt.views.resize(dvt.images.load_image(path), Tiling().input_size(backbone, size))
    expected = backbone(pixels[None]).patches[0]
    assert found.shape == expected.shape and min(found.shape[:2]) >= 4
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)  # half precision


def test_windows_cover_every_patch_and_end_with_the_image():
    backbone = local()
    for size in ((64, 64), (64, 80), (208, 336), (1600, 64)):
        for overlap in (0, 0.5, 0.75):
            tiling, grid = Tiling(overlap=overlap), backbone.grid(size)
            seen = torch.zeros(grid)
            for row, column in tiling.corners(backbone, size):
                seen[row : row + 4, column : column + 4] += 1
                assert tiling.cut(backbone, torch.zeros(3, *size), (row, column)).shape == (3, 64, 64)
            assert seen.min() >= 1 and seen[-1, -1] >= 1
            assert overlap < 0.5 or min(grid) < 8 or seen[2:-2, 2:-2].min() >= 2


def test_no_seam_shows_in_a_smooth_image():
    """Position is the larger part of these tokens. Side by side, windows meet in steps; blended, they do not."""
    backbone, image = local(size=128, position=1.0), smooth(384, 640)
    tiling = Tiling()

    def raw(images):
        return {"raw": backbone(images).patches}

    apart = steps(Tiling(overlap=0).blended(backbone, image, raw, 4)["raw"])
    blended = steps(tiling.blended(backbone, image, raw, 4)["raw"])
    clean = steps(denoise_tiled(backbone, image, DenoiseConfig(), tiling).decomposition.semantic)
    whole = steps(backbone(image[None]).patches[0])  # without windows
    without = steps(local(size=128)(image[None]).patches[0])
    for axis in (0, 1):
        assert apart[axis].max() > 4 * apart[axis].median()
        assert blended[axis].max() < 2 * blended[axis].median() + whole[axis].max()
        assert blended[axis].max() < apart[axis].max() / 2
        torch.testing.assert_close(clean[axis], without[axis], atol=0.01, rtol=0.05)


def test_the_terms_add_up_and_the_artifact_goes():
    backbone, image = local(size=128, position=1.0), smooth(256, 320)
    found = denoise_tiled(backbone, image, DenoiseConfig()).decomposition
    truth = local(size=128)(image[None]).patches[0]
    assert found.error.abs().max() < 0.02
    wrong = (found.semantic - truth) - (found.semantic - truth).mean((0, 1))
    assert wrong.norm() < 0.02 * found.artifact.norm()


def test_a_tiled_job_is_a_job_of_its_own_and_resumes(tmp_path):
    backbone = load_backbone("test_vit", pretrained=False, size=64)
    paths = [save(smooth(96 + 16 * i, 160), tmp_path / f"{i}.png") for i in range(3)]
    config = DenoiseConfig(views=4)
    done = run(TiledDecomposeWork(backbone, config, Tiling(), keep_terms=True), paths, tmp_path / "store")
    store = FeatureStore(tmp_path / "store")
    assert done.done == 3 and store.terms == ("raw", "semantic", "artifact", "residual")
    assert set(store.grids) == {(6 + i, 10) for i in range(3)}
    again = run(TiledDecomposeWork(backbone, config, Tiling(), keep_terms=True), paths, tmp_path / "store")
    assert (again.done, again.skipped) == (0, 3)
    for other in (Tiling(size=200), None):
        with pytest.raises(dvt.errors.StoreError, match="another job"):
            if other is None:
                denoise_images(backbone, paths, tmp_path / "store", config, keep_terms=True)
            else:
                run(TiledDecomposeWork(backbone, config, other, keep_terms=True), paths, tmp_path / "store")


def test_batches_of_windows_change_nothing():
    backbone, image = load_backbone("test_vit", pretrained=False, size=64), smooth(160, 240)

    def compute(images):
        return {"raw": backbone(images).patches, "prefix": backbone(images).prefix}

    one, many = (Tiling().blended(backbone, image, compute, batch) for batch in (1, 7))
    for name in one:
        torch.testing.assert_close(one[name], many[name], atol=1e-5, rtol=1e-5)
    assert one["raw"].shape == (10, 15, 64) and one["prefix"].shape == (1, 64)


@pytest.mark.parametrize("size", [(100, 150), (70, 400), (300, 64)])
@pytest.mark.parametrize("new", [(96, 160), (48, 80), (160, 160), (300, 64)])
def test_a_part_of_a_resized_image_is_computed_without_the_rest(size, new):
    pixels = torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(0)).byte()
    whole = dvt.views.resize(pixels / 255, new)
    for corner in ((0, 0), (16, 32), (new[0] - 32, new[1] - 16)):
        found = dvt.views.resize_part(pixels, new, corner, (32, 16))
        torch.testing.assert_close(found, whole[:, corner[0] :, corner[1] :][:, :32, :16], atol=2e-4, rtol=0)


def test_maps_are_in_half_precision_unless_their_values_do_not_fit():
    backbone, image = local(), smooth(128, 192)
    for scale, kind in ((1, torch.float16), (1e6, torch.float32)):
        found = Tiling().blended(backbone, image, lambda x, s=scale: {"raw": s * backbone(x).patches}, 4, torch.float16)
        assert found["raw"].dtype == kind
        torch.testing.assert_close(found["raw"].float(), scale * backbone(image[None]).patches[0], atol=1e-3, rtol=2e-3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux tells it")
@pytest.mark.parametrize("verb", ["extract", pytest.param("denoise", marks=pytest.mark.slow)])
def test_memory_holds_the_bytes_of_a_large_image_and_its_tokens_alone(verb, tmp_path):
    """Pillow's pixels take 4 bytes each and ours 3, for a moment together; floats would be 12 more each time."""
    sides = {"small": 64, "large": 5120}
    for name, side in sides.items():
        Image.new("RGB", (side, side), (200, 100, 50)).save(tmp_path / f"{name}.png")
    script = Path(__file__).with_name("tiled_memory.py")
    printed = subprocess.run(
        [sys.executable, script, verb, tmp_path], capture_output=True, text=True, check=True
    ).stdout
    assert int(printed) < 10 * sides["large"] ** 2


def test_what_cannot_be_tiled_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="overlap is 1"):
        Tiling(overlap=1)
    with pytest.raises(ImageError, match="more than 262144"):
        Tiling().input_size(local(), (1, 30_000_000))
    with pytest.raises(ConfigError, match="312 x 312 patches, more than 16384; choose a smaller --tile"):
        Tiling().input_size(local(size=4992), (320, 480))
    with pytest.raises(ConfigError, match="only 1 x 1 patches"):
        TiledDecomposeWork(local(size=16), DenoiseConfig(), Tiling())
    with pytest.raises(ConfigError, match="shared artifact"):
        TiledDecomposeWork(local(), DenoiseConfig(shared_artifact=True), Tiling())


def test_the_commands_read_large_images_in_windows(tmp_path, monkeypatch, capsys, caplog):
    from dvt.cli import main

    monkeypatch.chdir(tmp_path)
    save(smooth(200, 300), tmp_path / "a.png")
    options = ("a.png", "--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--tile", "64")
    assert main(["extract", *options, "--out", "raw", "--upsample", "2"]) == 0
    assert main(["denoise", *options, "--out", "clean", "--views", "4", "--size", "160"]) == 0
    assert FeatureStore("raw").grids == [(12, 19)] and FeatureStore("clean").grids == [(10, 15)]
    assert np.load(next((tmp_path / "raw" / "upsampled").glob("*.npy"))).shape[:2] == (24, 38)
    assert len(list((tmp_path / "clean" / "pictures").glob("*.png"))) == 1
    odd = ("a.png", "--weights", "demo", "--tile", "70")  # divides neither the image nor by the patch
    assert main(["extract", *odd, "--out", "odd"]) == main(["denoise", *odd, "--out", "odd2", "--views", "2"]) == 0
    assert FeatureStore("odd").grids == FeatureStore("odd2").grids == [(12, 19)]
    assert "64 x 64 instead" in caplog.text
    for side, said in ((0, "tile is 0; give"), (10, "less than a patch of 16 x 16"), (5000, "choose a smaller")):
        for verb in ("extract", "denoise"):
            assert main([verb, *odd[:-1], str(side), "--out", "none"]) == 2
            assert said in " ".join(capsys.readouterr().err.split())
    assert main(["denoise", *options, "--out", "clean", "--views", "4"]) == 2
    assert "--size 160 (you ask for none)" in " ".join(capsys.readouterr().err.split())
