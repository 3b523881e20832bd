"""Kept heads: they predict what their probe predicts, know their features, and refuse others."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dvt.analysis.predictions import class_colours, save_map
from dvt.analysis.probes.heads import SavedHead, kept_head
from dvt.analysis.probes.probe import HeadConfig
from dvt.analysis.probes.protocol import ProbeConfig, make_probe
from dvt.errors import BackboneError, ConfigError, WeightsError

CHANNELS, GRID = 6, (3, 4)


def fitted(task, tmp_path, **more):
    """A probe's settings, the probe fitted on random tokens, and those tokens."""
    config = ProbeConfig(task, tmp_path, head=HeadConfig(epochs=3), **more)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, *GRID, CHANNELS, generator=generator)
    size = (12, 16)
    targets = {
        "depth": torch.rand(6, *size, generator=generator) + 1,
        "discovery": torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]).expand(6, 1, 4),
    }.get(task, torch.randint(0, 3, (6, *size), generator=generator))
    return config, make_probe(config, 3).fit(tokens, list(targets)), tokens


@pytest.mark.parametrize("task", ["segmentation", "knn", "depth", "discovery"])
def test_a_kept_head_predicts_what_its_probe_predicts(task, tmp_path, tiny_backbone):
    config, probe, tokens = fitted(task, tmp_path)
    names = ("a", "b", "c") if task in ("segmentation", "knn") else ()
    kept_head(config, probe, tiny_backbone, [-1], CHANNELS, {"kind": "x"}, names).save(tmp_path / "head.safetensors")
    head = SavedHead.load(tmp_path / "head.safetensors")
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(1))
    for one in tokens:
        assert torch.equal(head.predict(one, image), probe.predict(one[None], [(24, 32)])[0])
    assert head.card.classes == names and head.card.denoiser == {"kind": "x"}


def test_a_head_for_finer_features_upsamples_them_by_the_image(tmp_path, tiny_backbone):
    from dvt.upsampling import upsample

    config, probe, tokens = fitted("segmentation", tmp_path, upsample=2)
    head = kept_head(config, probe, tiny_backbone, [-1], CHANNELS)
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(1))
    fine = upsample(tokens[0], image, 2)
    assert torch.equal(head.predict(tokens[0], image), probe.predict(fine[None], [(24, 32)])[0])


def test_a_head_refuses_other_features(tmp_path, tiny_backbone):
    import dvt

    config, probe, _ = fitted("segmentation", tmp_path)
    card = kept_head(config, probe, tiny_backbone, [tiny_backbone.layer], CHANNELS, {"strength": 1.0}).card
    card.check_fits(tiny_backbone, {"strength": 1.0})
    with pytest.raises(BackboneError, match="give --denoiser"):
        card.check_fits(tiny_backbone, None)
    with pytest.raises(BackboneError, match="another denoiser"):
        card.check_fits(tiny_backbone, {"strength": 0.5})
    other = dvt.load_backbone("test_vit", pretrained=False, layer=2)
    with pytest.raises(BackboneError, match=r"weights .* layer"):
        card.check_fits(other, {"strength": 1.0})
    raw = kept_head(config, probe, tiny_backbone, [tiny_backbone.layer], CHANNELS).card
    with pytest.raises(BackboneError, match="raw features, got denoised"):
        raw.check_fits(tiny_backbone, {"strength": 1.0})


def test_heads_that_cannot_be_kept(tmp_path, tiny_backbone):
    config, probe, _ = fitted("segmentation", tmp_path)
    with pytest.raises(ConfigError, match=r"2 names .* 3 classes"):
        kept_head(config, probe, tiny_backbone, [-1], CHANNELS, None, ("a", "b"))
    with pytest.raises(ConfigError, match="keeps no head"):
        kept_head(ProbeConfig("classification", tmp_path), probe, tiny_backbone, [-1], CHANNELS)
    with pytest.raises(ConfigError, match="position"):
        kept_head(ProbeConfig("knn", tmp_path, position="add"), probe, tiny_backbone, [-1], CHANNELS)
    with pytest.raises(ConfigError, match="safetensors"):
        kept_head(config, probe, tiny_backbone, [-1], CHANNELS).save(tmp_path / "head.pth")


@pytest.mark.parametrize("task", ["segmentation", "knn", "depth"])
def test_edited_heads_are_refused(task, tmp_path, tiny_backbone):
    config, probe, _ = fitted(task, tmp_path)
    path = tmp_path / "head.safetensors"
    kept_head(config, probe, tiny_backbone, [-1], CHANNELS).save(path)
    state = load_file(path)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["dvt"])
    edits = [{"channels": 10**9}, {"channels": "many"}, {"layers": []}, {"task": "correspondence"}, {"stride": [0, 1]}]
    edits += [{"depths": [2, 1]}] if task == "depth" else [{"num_classes": 0}, {"num_classes": 1}]
    for edit in edits:
        save_file(state, path, {"dvt": json.dumps({**described, "card": {**described["card"], **edit}})})
        with pytest.raises(WeightsError):
            SavedHead.load(path)
    bad = {
        name: torch.full_like(value, float("nan")) if value.dtype.is_floating_point else value
        for name, value in state.items()
    }
    for broken in (bad, {}):
        save_file(broken, path, {"dvt": json.dumps(described)})
        with pytest.raises(WeightsError):
            SavedHead.load(path)


def test_maps_are_written_as_probes_read_them(tmp_path):
    labels, depth = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[1.2345, 70.0], [0.5, 2.0]])
    save_map(labels, tmp_path / "labels.png")
    save_map(depth, tmp_path / "depth.png")
    save_map(labels + 300, tmp_path / "many.png")
    read = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("labels", "depth", "many")}
    assert read["labels"].dtype == np.uint8 and read["labels"].tolist() == labels.tolist()
    assert read["depth"].tolist() == [[1234, 65535], [500, 2000]]
    assert read["many"].tolist() == (labels + 300).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 21, 150])
def test_classes_have_colours_of_their_own(count):
    assert len(class_colours(count).unique(dim=0)) == count
