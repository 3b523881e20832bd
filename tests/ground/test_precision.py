"""The precision of forward passes: bfloat16 where it is fast and changes next to nothing, else float32."""

from pathlib import Path

import pytest
import torch
from torch import nn

import dvt
from dvt.backbones import Backbone, choose_precision, in_precision, precision
from dvt.devices import autocast
from dvt.errors import ConfigError
from dvt.fields.config import DenoiseConfig
from dvt.fields.images import denoise_job
from dvt.jobs.extract import ExtractConfig, extract_job
from dvt.tokens import Tokens


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: True)


class Patches(nn.Module):
    """Mean colours of 16 x 16 patches by a linear layer, less an offset: bfloat16 loses what the offset hides."""

    def __init__(self, offset: float):
        super().__init__()
        self.project, self.offset = nn.Linear(3, 4), offset

    def forward(self, images):
        small = nn.functional.avg_pool2d(images, 16).permute(0, 2, 3, 1)
        return self.project(small + self.offset) - self.project(torch.full_like(small, self.offset))


def wrapped(offset: float) -> Backbone:
    torch.manual_seed(0)
    model = Patches(offset)
    return dvt.wrap(
        model, lambda inner, images: Tokens.of(inner(images)), 16, feature_dim=4, image_size=64, name="patches"
    )


def test_bfloat16_is_taken_where_it_is_fast_and_changes_little(vit, fast):
    assert choose_precision(vit) == "bfloat16"
    assert 1e-4 < precision.precision_difference(vit, "bfloat16") < precision.MOST_DIFFERENCE


def test_a_loop_over_images_tries_a_model_out_once(fast, monkeypatch):
    model = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)
    images = []
    blocks = model.model.blocks[0].register_forward_hook(lambda *given: images.append(1))
    first = choose_precision(model)
    count = len(images)
    assert count > 0 and choose_precision(model) == first == choose_precision(in_precision(model)) == "bfloat16"
    assert len(images) == count
    blocks.remove()


def test_commands_run_backbones_in_the_precision_asked_for(fast):
    from dvt.cli.settings.common import BackboneOptions

    taken = {kind: BackboneOptions(weights="demo", dtype=kind, device="cpu").load() for kind in ("auto", "float32")}
    assert [each.precision for each in taken.values()] == ["bfloat16", "float32"]
    assert BackboneOptions(weights="demo", device="cpu").load_exact().precision == "float32"


def test_features_of_two_precisions_are_not_mixed_in_a_cache(vit, tmp_path):
    from dvt.analysis.probes.features import cached_tokens

    photos = [Path(dvt.__file__).parent / "data" / "photos" / "astronaut.jpg"]
    exact, rough = (
        cached_tokens(in_precision(vit, kind), photos, tmp_path)[0].patches for kind in ("float32", "bfloat16")
    )
    assert len(list(tmp_path.iterdir())) == 2 and not torch.equal(exact, rough)


def test_float32_is_taken_where_bfloat16_is_not_fast(vit, monkeypatch):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)
    assert choose_precision(vit) == "float32"


def test_float32_is_taken_where_bfloat16_changes_much(fast):
    assert precision.precision_difference(wrapped(100.0), "bfloat16") > precision.MOST_DIFFERENCE
    assert choose_precision(wrapped(100.0)) == "float32"


def test_tf32_is_taken_on_cuda_where_bfloat16_changes_much(fast, monkeypatch):
    sensitive = wrapped(100.0)
    seen = []
    sensitive.model.register_forward_pre_hook(lambda *given: seen.append(torch.get_float32_matmul_precision()))
    monkeypatch.setattr(precision, "has_tf32", lambda device: True)
    assert choose_precision(sensitive) == "tf32"
    assert seen == ["highest", "highest", "highest", "high"] and torch.get_float32_matmul_precision() == "highest"
    sensitive.precision = "tf32"
    sensitive(torch.rand(1, 3, 64, 64))
    assert seen[-1] == "high" and torch.get_float32_matmul_precision() == "highest"


def test_tf32_ends_with_the_pass_that_fails():
    with pytest.raises(ZeroDivisionError), autocast(torch.device("cuda"), "tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        _ = 1 / 0
    assert not torch.backends.cuda.matmul.allow_tf32


def test_tf32_is_refused_where_it_is_not(vit):
    with pytest.raises(ConfigError, match="cpu does not have"):
        choose_precision(vit, "tf32")


def test_weights_of_another_precision_keep_it(fast):
    assert choose_precision(wrapped(0.0).bfloat16()) == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_named_is_taken(vit, dtype):
    assert choose_precision(vit, dtype) == dtype


def test_an_unknown_precision_is_refused(vit):
    with pytest.raises(ConfigError, match="'half'"):
        choose_precision(vit, "half")
    for config in (ExtractConfig, DenoiseConfig):
        with pytest.raises(ConfigError, match="'half'"):
            config(dtype="half")


JOBS = {
    "extract": lambda vit, dtype: extract_job(vit, ExtractConfig(dtype=dtype)),
    "denoise": lambda vit, dtype: denoise_job(vit, DenoiseConfig(dtype=dtype), False),
}


@pytest.mark.parametrize("make", JOBS.values(), ids=JOBS)
def test_a_job_holds_what_was_taken(vit, fast, make):
    assert make(vit, "auto") == make(vit, "bfloat16") != make(vit, "float32")


def test_a_backbone_in_another_precision_shares_the_weights_and_gives_float32(vit):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rough = in_precision(vit, "bfloat16")
    with torch.no_grad():
        exact, found = vit(images), rough(images)
        layers = rough.at_layers(images, [3, -1])
    assert rough.model is vit.model and rough.weights_sha256 == vit.weights_sha256 and vit.precision == "float32"
    assert found.patches.dtype == layers[3].patches.dtype == torch.float32
    difference = float((found.patches - exact.patches).norm() / exact.patches.norm())
    assert 1e-4 < difference < 0.01
    assert torch.equal(layers[-1].patches, found.patches)
    assert torch.equal(in_precision(vit, "float32")(images).patches, exact.patches)
