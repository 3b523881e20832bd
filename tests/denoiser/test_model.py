"""The denoiser's forward pass against timm's Block by hand, and the laws that hold for every kind."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block

from dvt import grids
from dvt.denoiser.config import DENOISER_KINDS, DenoiserConfig
from dvt.denoiser.model import Denoiser
from dvt.errors import ConfigError, ShapeError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_denoiser(kind="block", channels=32, grid=(4, 5), **settings):
    """A denoiser that changes its input much, whatever its kind."""
    denoiser = Denoiser(DenoiserConfig(kind, channels, grid, **settings), generator())
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator(tensor.numel()))
    return denoiser.eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed))


def by_hand(denoiser, patches, position, prefix=None):
    """What the kind "block" is, written with timm's Block alone."""
    config = denoiser.config
    x = patches.flatten(1, 2) + position
    if prefix is not None:
        x = torch.cat((prefix, x), dim=1)
    for own in denoiser.body.blocks:
        norm = partial(torch.nn.LayerNorm, eps=1e-6)
        block = Block(config.feature_dim, config.heads, mlp_ratio=config.mlp_ratio, qkv_bias=True, norm_layer=norm)
        block.load_state_dict(own.state_dict())
        x = block.eval()(x)
    start = 0 if prefix is None else prefix.shape[1]
    return x[:, start:].unflatten(1, patches.shape[1:3])


# ---------------------------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("settings", [{}, {"depth": 3}, {"num_heads": 4, "mlp_ratio": 2.0}])
def test_a_block_is_timms_block_behind_an_unsampled_position_embedding(settings):
    denoiser = random_denoiser(**settings)
    patches = tokens(2, 4, 5, 32)
    assert torch.equal(denoiser(patches), by_hand(denoiser, patches, denoiser.body.pos_embed))


def test_on_another_grid_the_position_embedding_is_resampled_as_timm_does():
    denoiser = random_denoiser()
    patches = tokens(1, 7, 3, 32)
    position = resample_abs_pos_embed(denoiser.body.pos_embed, [7, 3], [4, 5], num_prefix_tokens=0)
    torch.testing.assert_close(denoiser(patches), by_hand(denoiser, patches, position))


def test_without_position_a_block_commutes_with_permutations_and_with_it_not():
    patches = tokens(2, 4, 5, 32)
    order = torch.randperm(20, generator=generator())

    def permute(maps):
        return maps.flatten(1, 2)[:, order].unflatten(1, (4, 5))

    blind, seeing = random_denoiser(position=False), random_denoiser()
    torch.testing.assert_close(blind(permute(patches)), permute(blind(patches)))
    assert (seeing(permute(patches)) - permute(seeing(patches))).abs().max() > 0.1
    assert "body.pos_embed" not in blind.state_dict()


def test_a_block_attends_to_the_prefix_when_asked_and_leaves_it_alone():
    denoiser = random_denoiser(use_prefix=True)
    patches, prefix = tokens(2, 4, 5, 32), tokens(2, 3, 32, seed=2)
    before = prefix.clone()
    expected = by_hand(denoiser, patches, denoiser.body.pos_embed, prefix)
    torch.testing.assert_close(denoiser(patches, prefix), expected)
    assert torch.equal(prefix, before)
    assert (denoiser(patches, prefix[:, :1]) - expected).abs().max() > 1e-3
    torch.testing.assert_close(denoiser(patches, prefix[:, :0]), by_hand(denoiser, patches, denoiser.body.pos_embed))


@pytest.mark.parametrize("kind", DENOISER_KINDS)
def test_otherwise_the_prefix_has_no_say(kind):
    denoiser, patches = random_denoiser(kind), tokens(2, 4, 5, 32)
    assert torch.equal(denoiser(patches, tokens(2, 1, 32)), denoiser(patches))


def test_a_prefix_that_is_needed_must_be_given_and_fit():
    denoiser, patches = random_denoiser(use_prefix=True), tokens(2, 4, 5, 32)
    for prefix in (None, tokens(1, 3, 32), tokens(2, 3, 16), tokens(2, 32)):
        with pytest.raises(ShapeError, match="attends to prefix tokens"):
            denoiser(patches, prefix)


# ------------------------------------------------------------------------------------------- laws of every kind


@pytest.mark.parametrize("kind", DENOISER_KINDS)
@given(strength=st.floats(0, 1), height=st.integers(1, 6), width=st.integers(1, 6))
@settings(max_examples=10, deadline=None)
def test_strength_blends_between_raw_and_denoised(kind, strength, height, width):
    denoiser, patches = random_denoiser(kind), tokens(2, height, width, 32)
    full = denoiser(patches)
    assert (full - patches).abs().max() > 0.01
    denoiser.strength = strength
    torch.testing.assert_close(denoiser(patches), patches + strength * (full - patches))


@pytest.mark.parametrize("kind", DENOISER_KINDS)
def test_strength_zero_is_the_input_bit_for_bit_even_where_the_denoiser_is_broken(kind):
    denoiser = random_denoiser(kind)
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data.fill_(float("nan"))
    denoiser.strength = 0
    patches = tokens(1, 3, 3, 32).half()
    assert torch.equal(denoiser(patches), patches)


@pytest.mark.parametrize("kind", DENOISER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_half_precision_is_close(kind, dtype):
    denoiser, patches = random_denoiser(kind), tokens(2, 4, 5, 32)
    out = denoiser(patches.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), denoiser(patches), rtol=0.03, atol=0.05)
    assert denoiser.to(torch.bfloat16)(patches.to(dtype)).dtype == dtype


@pytest.mark.parametrize("kind", DENOISER_KINDS)
def test_images_of_a_batch_do_not_see_each_other(kind):
    denoiser, patches = random_denoiser(kind), tokens(3, 4, 5, 32)
    torch.testing.assert_close(denoiser(patches)[1:2], denoiser(patches[1:2]))


@pytest.mark.parametrize("kind", DENOISER_KINDS)
def test_the_input_is_not_changed_and_a_copy_is_independent(kind):
    denoiser, patches = random_denoiser(kind), tokens(2, 4, 5, 32)
    before, expected = patches.clone(), denoiser(patches)
    other = copy.deepcopy(denoiser)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    other.strength = 0.5
    assert torch.equal(patches, before) and torch.equal(denoiser(patches), expected)


@pytest.mark.parametrize("kind", DENOISER_KINDS)
def test_gradients_reach_the_input_and_every_parameter(kind):
    denoiser, patches = random_denoiser(kind), tokens(2, 4, 5, 32).requires_grad_()
    denoiser(patches).square().sum().backward()
    assert patches.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in denoiser.parameters())


@pytest.mark.parametrize("kind", DENOISER_KINDS)
def test_compiles_without_a_graph_break(kind):
    denoiser, patches = random_denoiser(kind), tokens(2, 3, 6, 32)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(patches), denoiser(patches))


@pytest.mark.parametrize("kind", DENOISER_KINDS)
def test_exports_for_every_batch_and_grid(kind):
    denoiser = random_denoiser(kind, use_prefix=kind == "block")
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    dynamic = {"patches": sizes, "prefix": {0: torch.export.Dim.AUTO} if kind == "block" else None}

    def arguments(batch, height, width):
        return tokens(batch, height, width, 32), tokens(batch, 3, 32) if kind == "block" else None

    exported = torch.export.export(denoiser, arguments(2, 3, 7), dynamic_shapes=dynamic).module()
    for shape in ((2, 3, 7), (1, 4, 5), (3, 8, 2)):
        torch.testing.assert_close(exported(*arguments(*shape)), denoiser(*arguments(*shape)))


# ------------------------------------------------------------------------------------------------ what a fresh one is


@pytest.mark.parametrize("kind", [kind for kind in DENOISER_KINDS if kind != "block"])
def test_a_fresh_baseline_is_the_identity(kind):
    patches = tokens(2, 4, 5, 32)
    assert torch.equal(Denoiser(DenoiserConfig(kind, 32, (4, 5)))(patches), patches)


def test_a_fresh_block_is_near_the_identity():
    patches = tokens(2, 4, 5, 64)
    assert (Denoiser(DenoiserConfig("block", 64, (4, 5)), generator())(patches) - patches).abs().mean() < 0.1


def test_initial_weights_come_from_the_generator_alone():
    state = torch.random.get_rng_state()
    first, second, third = (
        Denoiser(DenoiserConfig("block", 32, (4, 5), depth=2), generator(seed)).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], third[name]) == (value.ndim == 1) for name, value in first.items())


@pytest.mark.parametrize(("kind", "size"), [("conv1x1", 1), ("conv3x3", 3)])
def test_a_convolution_adds_a_weighted_sum_of_the_tokens_around(kind, size):
    denoiser, patches = random_denoiser(kind), tokens(1, 4, 5, 32)
    weight, bias = denoiser.body.conv.weight, denoiser.body.conv.bias
    reach = size // 2
    padded = torch.nn.functional.pad(patches, (0, 0, reach, reach, reach, reach))
    expected = patches + bias
    for i in range(size):
        for j in range(size):
            expected = expected + padded[:, i : i + 4, j : j + 5] @ weight[:, :, i, j].T
    torch.testing.assert_close(denoiser(patches), expected)


def test_convolutions_look_as_far_as_their_kernel():
    patches = tokens(1, 5, 5, 32)
    touched = patches.clone()
    touched[0, 2, 2] += 1
    for kind, reach in (("conv1x1", 1), ("conv3x3", 9)):
        denoiser = random_denoiser(kind)
        assert ((denoiser(touched) - denoiser(patches)).abs().amax(-1) > 1e-6).sum() == reach


def test_subtract_takes_the_stored_artifact_resampled():
    denoiser, patches = random_denoiser("subtract"), tokens(1, 8, 5, 32)
    expected = patches - grids.resample(denoiser.body.artifact, (8, 5))
    torch.testing.assert_close(denoiser(patches), expected)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("channels", "heads"), [(16, 1), (64, 1), (192, 3), (200, 2), (384, 6), (1024, 16)])
def test_heads_have_64_channels_where_these_divide_the_feature_size(channels, heads):
    assert DenoiserConfig("block", channels, (2, 2)).heads == heads


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "mlp"}, "'mlp'; it must be one of block"),
        ({"grid": (4,)}, "grid must be"),
        ({"grid": (0, 4)}, "grid must be"),
        ({"feature_dim": 0}, "feature_dim must be positive"),
        ({"depth": 0}, "depth must be positive"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be positive"),
        ({"num_heads": 5}, "must divide feature_dim 32, got 5"),
        ({"strength": 1.5}, r"strength must lie between 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        DenoiserConfig(**{"kind": "block", "feature_dim": 32, "grid": (4, 5)} | wrong)


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_strength_stays_between_zero_and_one(value):
    with pytest.raises(ConfigError, match="strength"):
        random_denoiser().strength = value


@pytest.mark.parametrize("kind", DENOISER_KINDS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 16), (4, 5, 32), (2, 32, 4, 5)])
def test_tokens_of_another_feature_size_are_refused(kind, shape):
    denoiser = random_denoiser(kind)
    denoiser.strength = 0
    with pytest.raises(ShapeError, match=r"takes \(B, h, w, 32\)"):
        denoiser(tokens(*shape))
