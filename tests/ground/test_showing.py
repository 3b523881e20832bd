"""What tokens, decompositions, stores and denoisers show of themselves, and the files that keep them."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.errors import ConfigError, NonFiniteError, ShapeError, WeightsError
from dvt.showing import pca_colours
from dvt.store import Job, Record, StoreWriter


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures_of(html):
    """The pictures of a page, as (h, w, 3) arrays."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


@pytest.fixture
def parts():
    raw, artifact = noise(6, 9, 12), noise(6, 9, 12, seed=1)
    semantic = raw - artifact
    return dvt.Decomposition(raw, semantic, artifact, torch.zeros_like(raw), semantic)


@pytest.fixture
def store(tmp_path):
    with StoreWriter(tmp_path / "store", Job("vit_<b>tiny", "ab" * 32)) as writer:
        records = [
            Record(f"photos/{i}.jpg", f"{i}" * 64, (60, 90), {"raw": noise(4, 6, 8, seed=i).half()}) for i in range(5)
        ]
        writer.write("one", records)
    return dvt.FeatureStore(tmp_path / "store")


def test_texts_are_one_line_with_what_matters(parts, store):
    tokens = dvt.Tokens(noise(2, 4, 5, 6), noise(2, 1, 6))
    assert repr(tokens) == "Tokens(patches (2, 4, 5, 6), prefix (2, 1, 6), float32 on cpu)"
    assert (
        "6 x 9 patches, 12 channels, float32 on cpu; artifact 99%, residual 0%, change 99% of raw's variance)"
        in repr(parts)
    )
    assert "5 images of vit_<b>tiny, layer -1; grids 4 x 6 (5); 8 channels; terms raw; reads raw" in repr(store)
    assert repr(store[0]).startswith("StoredTokens(patches (1, 4, 6, 8)")
    denoiser = Denoiser(DenoiserConfig("block", 64, grid=(7, 9)))
    denoiser.card["backbone"] = "vit_tiny"
    assert re.fullmatch(
        r"Denoiser\(block for vit_tiny, layer -1: 64 channels, grid 7 x 9, 0\.05 M .*, strength 1\)", repr(denoiser)
    )
    for each in (tokens, parts, store, denoiser):
        assert len(repr(each)) < 300 and "\n" not in repr(each)


def test_pages_hold_the_maps_and_escape_names(parts, store):
    html = parts._repr_html_()
    raw, semantic, artifact = pictures_of(html)  # no residual, which is zero
    colours = pca_colours([parts.raw, parts.semantic])
    assert np.array_equal(raw, colours[0].mul(255).round().byte())
    assert np.array_equal(semantic, colours[1].mul(255).round().byte())
    assert np.array_equal(artifact, pca_colours(parts.artifact)[0].mul(255).round().byte())
    html = store._repr_html_()
    assert "vit_&lt;b&gt;tiny" in html and "<b>tiny" not in html and "4x6 (5)" in html
    assert [each.shape for each in pictures_of(html)] == [(4, 6, 3)] * 4
    assert len(pictures_of(store[0]._repr_html_())) == 1
    broken = dvt.Tokens.of(torch.full((1, 2, 2, 4), float("nan")))
    assert "hold NaN or infinity" in broken._repr_html_() and not pictures_of(broken._repr_html_())
    with pytest.raises(NonFiniteError):
        broken.show()


def test_pictures_have_the_panels_side_by_side(parts, store, tmp_path):
    one, two = dvt.Tokens.of(parts.raw).show(), parts.show()
    assert two.width > 2 * one.width  # three panels
    beside = parts.show(torch.rand(3, 60, 90))
    assert beside.width > two.width
    beside.save(tmp_path / "shown.png")
    assert store.show(2).width < store.show().width
    with pytest.raises(ShapeError, match="no token map"):
        dvt.Tokens.of(torch.zeros(0, 2, 2, 4)).show()


def test_a_denoiser_shows_what_it_removes_by_position():
    denoiser = Denoiser(DenoiserConfig("subtract", 8, grid=(5, 7)))
    artifact = noise(5, 7, 8)
    denoiser.body.artifact.copy_(artifact)
    (shown,) = pictures_of(denoiser._repr_html_())
    assert np.array_equal(shown, pca_colours(-artifact)[0].mul(255).round().byte())
    inside = Denoiser(DenoiserConfig("registers", 8, grid=(5, 7)))
    assert "act inside a model" in inside._repr_html_()
    with pytest.raises(ConfigError, match="act inside a model"):
        inside.show()


def test_files_keep_all_bits_and_refuse_others(parts, tmp_path):
    path = parts.save(tmp_path / "new" / "parts.safetensors")
    again = dvt.Decomposition.load(path)
    for name, value in [*parts.terms().items(), ("field", parts.field)]:
        assert torch.equal(getattr(again, name), value)
    tokens = dvt.Tokens(noise(2, 4, 5, 6).half(), noise(2, 1, 6).half())
    kept = dvt.Tokens.load(tokens.save(tmp_path / "tokens.safetensors"))
    assert torch.equal(kept.patches, tokens.patches) and torch.equal(kept.prefix, tokens.prefix)
    with pytest.raises(WeightsError, match=r"of schema 'dvt-tokens/1' and not 'dvt-decomposition/1'"):
        dvt.Decomposition.load(tmp_path / "tokens.safetensors")
    with pytest.raises(WeightsError, match="saved as a"):
        parts.save(tmp_path / "parts.npy")
    with pytest.raises(WeightsError, match="missing"):
        dvt.Tokens.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="damaged"):
        dvt.Decomposition.load(tmp_path / "cut.safetensors")
