"""The result type: its law, its strength, and the split that both solvers share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvt.errors import ConfigError, ShapeError
from dvt.fields.decomposition import Decomposition, Fit


class FixedFit(Fit):
    """F = (x, y) repeated, h = a tenth of the token, and a given weight of F."""

    def __init__(self, artifact, weight=None):
        self.artifact = artifact
        self.weight = weight

    def semantic(self, coords):
        return coords.repeat_interleave(self.artifact.shape[-1] // 2, dim=-1).to(self.artifact)

    def residual(self, raw):
        return 0.1 * raw

    def field_weight(self, raw, coords):
        return super().field_weight(raw, coords) if self.weight is None else self.weight


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_decomposition(seed, shape=(3, 4, 6), scale=1.0):
    return Decomposition(*(scale * draw(seed + k, *shape) for k in range(5)))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_terms_and_error_add_up_to_raw(seed, scale):
    parts = random_decomposition(seed, scale=scale)
    total = parts.semantic + parts.artifact + parts.residual + parts.error
    torch.testing.assert_close(total, parts.raw, rtol=1e-6, atol=2e-6 * scale)
    expected = [
        r - s - a - h for r, s, a, h in zip(*(t.flatten().tolist() for t in parts.terms().values()), strict=True)
    ]
    torch.testing.assert_close(parts.error.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6 * scale)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), strength=st.floats(0, 1))
def test_strength_moves_linearly_from_raw_to_semantic(seed, strength):
    parts = random_decomposition(seed)
    moved = parts.at_strength(strength).double()
    expected = (1 - strength) * parts.raw.double() + strength * parts.semantic.double()
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_strength_is_exact_at_both_ends(scale):
    parts = random_decomposition(3, scale=scale)
    raw_only = Decomposition(
        parts.raw * 1e10, *(getattr(parts, k) for k in ("semantic", "artifact", "residual", "field"))
    )
    assert torch.equal(raw_only.at_strength(0), raw_only.raw)
    assert torch.equal(raw_only.at_strength(1), raw_only.semantic)


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan"), float("inf")])
def test_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ConfigError, match="strength"):
        random_decomposition(0).at_strength(strength)


@pytest.mark.parametrize("name", ["raw", "semantic", "artifact", "residual", "field"])
def test_terms_of_unequal_shapes_are_refused(name):
    terms = {k: torch.zeros(2, 3, 4) for k in ("raw", "semantic", "artifact", "residual", "field")}
    with pytest.raises(ShapeError):
        Decomposition(**{**terms, name: torch.zeros(3, 2, 4)})
    with pytest.raises(ShapeError):
        Decomposition(**{k: torch.zeros(3, 4) for k in terms})


def test_terms_have_the_stored_order_and_to_converts_all():
    parts = random_decomposition(0)
    assert list(parts.terms()) == ["raw", "semantic", "artifact", "residual"]
    assert all(torch.equal(term, getattr(parts, name)) for name, term in parts.terms().items())
    half = parts.to(torch.float16)
    assert {half.raw.dtype, half.semantic.dtype, half.artifact.dtype, half.residual.dtype, half.field.dtype} == {
        torch.float16
    }


def test_a_fit_uses_its_field_alone_by_default():
    raw, coords = draw(0, 2, 3, 4), torch.rand(2, 3, 2)
    parts = FixedFit(draw(1, 2, 3, 4)).decompose(raw, coords)
    assert torch.equal(parts.semantic, parts.field)
    assert torch.equal(parts.field[..., 0], coords[..., 0]) and torch.equal(parts.field[..., 3], coords[..., 1])


@pytest.mark.parametrize("weight", [0.0, 0.25, torch.tensor(0.25), torch.rand(2, 3, 1), torch.rand(4)])
def test_the_estimate_blends_field_and_remaining(weight):
    raw, coords, artifact = draw(0, 2, 3, 4), torch.rand(2, 3, 2), draw(1, 2, 3, 4)
    parts = FixedFit(artifact, weight).decompose(raw, coords)
    remaining = raw - artifact - 0.1 * raw
    torch.testing.assert_close(parts.semantic, weight * parts.field + (1 - weight) * remaining)
    torch.testing.assert_close(parts.residual, 0.1 * raw)
    assert torch.equal(parts.artifact, artifact) and torch.equal(parts.raw, raw)


def test_half_precision_tokens_are_decomposed_in_the_fits_precision():
    parts = FixedFit(draw(1, 2, 3, 4)).decompose(draw(0, 2, 3, 4).half(), torch.rand(2, 3, 2))
    assert {term.dtype for term in parts.terms().values()} == {torch.float32}


def test_maps_of_another_grid_are_refused():
    fit = FixedFit(draw(1, 2, 3, 4))
    with pytest.raises(ShapeError, match="own grid"):
        fit.decompose(torch.zeros(3, 3, 4), torch.zeros(3, 3, 2))
    with pytest.raises(ShapeError, match="own grid"):
        fit.decompose(torch.zeros(2, 3, 4), torch.zeros(3, 2, 2))
