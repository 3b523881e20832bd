"""Exported files, run by onnxruntime and torch.export.load, against the eager backbone."""

import json
import logging

import pytest
import torch
from torch import nn

import dvt.backbones.export as export_module
from dvt.backbones import load_backbone, wrap
from dvt.backbones.export import TOLERANCE, ExportConfig, Exported, export
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.denoiser.attach import denoised_backbone
from dvt.errors import BackboneError, ConfigError
from dvt.tokens import Tokens

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
import onnxruntime


def made(channels, kind="block", grid=(10, 10)):
    """A denoiser that changes much; its grid is the backbone's own, so that resampling and none both happen."""
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(kind, channels, grid), generator)
    for value in (*denoiser.parameters(), *denoiser.buffers()):
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    denoiser.card = {"backbone": "test_vit", "data": "planted"}
    return denoiser.eval()


def images(*shape):
    return torch.rand(*shape[:1], 3, *shape[1:], generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return denoised_backbone(made(64), load_backbone("test_vit", pretrained=False))


def run_onnx(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": batch.numpy()})), strict=True))


@pytest.fixture(scope="module")
def written(backbone, tmp_path_factory):
    return export(backbone, tmp_path_factory.mktemp("onnx") / "new" / "model.onnx")


@pytest.mark.parametrize("shape", [(1, 160, 160), (4, 64, 96), (2, 176, 208), (3, 320, 32)])
def test_onnx_takes_any_batch_and_grid(written, backbone, shape):
    assert isinstance(written, Exported) and written.dynamic_grid and written.opset >= 18
    batch = images(*shape)
    found, expected = run_onnx(written.path, batch), backbone(batch)
    assert list(found) == ["patches", "prefix"]
    for name, values in found.items():
        torch.testing.assert_close(values, getattr(expected, name), rtol=0, atol=TOLERANCE)


def test_onnx_says_where_it_comes_from(written, backbone):
    model = onnx.load(written.path)
    onnx.checker.check_model(model)
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.key.startswith("dvt.")}
    assert told["dvt.backbone"] == "test_vit" and told["dvt.layer"] == -1 and told["dvt.patch_size"] == [16, 16]
    assert told["dvt.denoiser"] == {"backbone": "test_vit", "data": "planted", "kind": "block"}
    assert told["dvt.weights_sha256"] == backbone.weights_sha256 and told["dvt.dynamic_grid"] is True


def test_nothing_but_the_file_is_left(written):
    assert [path.name for path in written.path.parent.iterdir()] == ["model.onnx"]
    assert written.deviation <= TOLERANCE and len({shape[0] for shape in written.tried}) == 2


@pytest.mark.parametrize("kind", ["block", "subtract"])
def test_pt2_takes_any_batch_and_grid(kind, tmp_path):
    backbone = denoised_backbone(made(64, kind), load_backbone("test_vit", pretrained=False))
    done = export(backbone, tmp_path / "model.pt2")
    extra = {"dvt.json": ""}
    program = torch.export.load(done.path, extra_files=extra).module()
    assert done.dynamic_grid and done.opset is None
    assert json.loads(extra["dvt.json"])["backbone"]["denoiser"]["kind"] == kind
    for shape in ((1, 160, 160), (5, 96, 64)):
        for one, two in zip(program(images(*shape)), vars(backbone(images(*shape))).values(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE)


def test_a_fixed_grid_where_the_model_has_one(tmp_path):
    backbone = load_backbone("test_vit_relpos", pretrained=False, size=(32, 48))
    done = export(backbone, tmp_path / "model.onnx")
    assert not done.dynamic_grid and done.size == (32, 48)
    found = run_onnx(done.path, images(3, 32, 48))
    assert list(found) == ["patches"]
    torch.testing.assert_close(found["patches"], backbone(images(3, 32, 48)).patches, rtol=0, atol=TOLERANCE)
    with pytest.raises(ConfigError, match="grid='fixed'"):
        export(backbone, tmp_path / "model.pt2", ExportConfig(grid="dynamic"))


class Unrolled(nn.Module):
    """A model whose Python depends on the size, so that no graph can be free in it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, 16)

    def forward(self, x):
        y = self.conv(x)
        return y + float(int(y.shape[2]) % 3 == 1)


def unrolled():
    return wrap(Unrolled(), lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="unrolled", image_size=(48, 64))


def test_a_grid_that_cannot_be_free_is_fixed_and_said(tmp_path, caplog):
    backbone = unrolled()
    with caplog.at_level(logging.WARNING):
        done = export(backbone, tmp_path / "model.pt2")
    assert not done.dynamic_grid and "unrolled" in caplog.text and "(48, 64)" in caplog.text
    batch = images(3, 48, 64)
    (found,) = torch.export.load(done.path).module()(batch)
    torch.testing.assert_close(found, backbone(batch).patches, rtol=0, atol=TOLERANCE)
    with pytest.raises(BackboneError, match="dynamic grid"):
        export(unrolled(), tmp_path / "other.pt2", ExportConfig(grid="dynamic"))
    assert not (tmp_path / "other.pt2").exists()


def test_half_precision_is_exported_in_single(tmp_path):
    backbone = load_backbone("test_vit", pretrained=False).to(torch.bfloat16)
    done = export(backbone, tmp_path / "model.pt2", ExportConfig(size=(64, 64)))
    (patches, _) = torch.export.load(done.path).module()(images(2, 64, 64))
    assert patches.dtype == torch.float32 and next(backbone.parameters()).dtype == torch.bfloat16
    assert not done.dynamic_grid and done.size == (64, 64)


def test_a_file_that_deviates_is_not_written(tmp_path, monkeypatch):
    backbone = load_backbone("test_vit", pretrained=False)
    path = tmp_path / "model.pt2"
    path.write_text("the one before")
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)
    with pytest.raises(BackboneError, match="deviates"):
        export(backbone, path, ExportConfig(grid="fixed"))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"] and path.read_text() == "the one before"


def test_missing_packages_are_named(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match=r"need onnxscript: pip install 'denoising-vit\[export\]'"):
        export(backbone, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pb", {}, r"\.onnx or \.pt2"),
        ("model", {}, r"\.onnx or \.pt2"),
        ("model.pt2", {"size": (30, 32)}, "multiple of the patch"),
        ("model.pt2", {"size": (0, 32)}, "positive"),
        ("model.pt2", {"grid": "free"}, "auto, dynamic, fixed"),
        ("model.pt2", {"grid": "dynamic", "size": (32, 32)}, "takes every size"),
        ("model.onnx", {"opset": 12}, "at least 18"),
    ],
)
def test_bad_settings_are_refused(backbone, tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        export(backbone, tmp_path / name, ExportConfig(**options))
    assert not list(tmp_path.iterdir())


def folder_of(path):
    return sorted(each.name for each in path.parent.iterdir())


def test_weights_that_do_not_fit_into_one_file_lie_beside_it_under_a_lasting_name(backbone, tmp_path, monkeypatch):
    path = tmp_path / "clean.onnx"
    monkeypatch.setattr(export_module, "MOST_INLINE", 1000)
    for _ in range(2):
        written = export(backbone, path)
        assert folder_of(path) == ["clean.onnx", "clean.onnx.data"] and written.deviation < TOLERANCE
        assert path.stat().st_size < path.with_name("clean.onnx.data").stat().st_size
    there = tmp_path / "elsewhere"
    there.mkdir()
    for name in folder_of(path)[:2]:
        (tmp_path / name).rename(there / name)
    batch = images(2, 96, 64)
    found = run_onnx(there / "clean.onnx", batch)
    torch.testing.assert_close(found["patches"], backbone(batch).patches, atol=TOLERANCE, rtol=TOLERANCE)
    assert "dvt.backbone" in {entry.key for entry in onnx.load(there / "clean.onnx").metadata_props}


def test_a_failed_export_leaves_the_pair_before_it_and_a_smaller_one_removes_the_weights(
    backbone, tmp_path, monkeypatch
):
    path = tmp_path / "clean.onnx"
    with monkeypatch.context() as lowered:
        lowered.setattr(export_module, "MOST_INLINE", 1000)
        export(backbone, path)
        before = [(tmp_path / name).read_bytes() for name in folder_of(path)]
        lowered.setattr(export_module, "TOLERANCE", -1.0)
        with pytest.raises(BackboneError, match="nothing was written"):
            export(backbone, path, ExportConfig(grid="fixed"))
        assert folder_of(path) == ["clean.onnx", "clean.onnx.data"]
        assert before == [(tmp_path / name).read_bytes() for name in folder_of(path)]
    export(backbone, path)
    assert folder_of(path) == ["clean.onnx"]
    run_onnx(path, images(1, 64, 64))
