"""The trunk, its two heads and the targets: known answers, causality, what the condition reaches."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.diffusion import Preconditioned, denoising_loss, draw_sigmas, heun, restart
from dvt.analysis.priors.evaluate import round_trip_cosine
from dvt.analysis.priors.heads import DenoisingMLP, SampleRequest
from dvt.analysis.priors.masking import draw_mask_ratios, unmasking
from dvt.analysis.priors.prior import Prior, sampling_sigmas
from dvt.analysis.priors.targets import PriorTarget, patchify
from dvt.analysis.priors.trunk import places
from dvt.errors import ConfigError, ShapeError, WeightsError

HEADS = [("image", "random"), ("token", "random"), ("token", "raster")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(head="image", order="random", opened=True, **changes):
    """A tiny prior; opened, its gates and outputs are not zero, as after some training."""
    given = {"grid": (3, 4), "token_dim": 5, "condition_dim": 8, "width": 32, "depth": 2, "heads": 2} | changes
    prior = Prior(PriorConfig(**given, head=head, order=order), generator()).eval()
    if opened:
        with torch.no_grad():
            for name, value in prior.named_parameters():
                if "modulation" in name or "leave" in name:
                    value.copy_(0.2 * torch.randn(value.shape, generator=generator(1)))
    return prior


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


# --- known answer 1: what cross-attention can say


def cross_outputs(prior, condition):
    """What each block's cross-attention answers in one pass."""
    seen = []
    hooks = [b.cross.register_forward_hook(lambda m, i, out: seen.append(out[0])) for b in prior.head.trunk.blocks]
    prior.loss(normal(2, 3, 4, 5), condition, generator())
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize(("head", "order"), HEADS)
def test_cross_attention_to_one_token_is_the_same_everywhere(head, order):
    prior = make(head, order)
    assert cross_outputs(prior, normal(2, 1, 8)).var(2).max() < 1e-10
    assert cross_outputs(prior, normal(2, 6, 8)).var(2).mean() > 1e-4


@pytest.mark.parametrize(("head", "order"), HEADS)
def test_an_untrained_prior_ignores_its_condition_because_its_gates_are_zero(head, order):
    prior, clean = make(head, order, opened=False), normal(2, 3, 4, 5)

    def losses():
        return [prior.loss(clean, normal(2, 6, 8, seed=seed), generator()) for seed in (1, 2)]

    # An output of zero would ignore it too: let it speak.
    for network in (prior.head, getattr(prior.head, "mlp", None)):
        if hasattr(network, "leave"):
            nn.init.normal_(network.leave.weight, generator=generator())
    first, second = losses()
    assert first == second
    for block in prior.head.trunk.blocks:
        nn.init.normal_(block.modulation.bias, generator=generator())
    if head == "token":
        for modulation in prior.head.mlp.modulation:
            nn.init.normal_(modulation.weight, std=0.1, generator=generator())
            nn.init.ones_(modulation.bias)
    first, second = losses()
    assert first != second


def test_the_prior_is_told_where_the_condition_tokens_lie():
    """Without a grid, a permutation of the condition tokens changes nothing; with one, it does."""
    condition, clean = normal(2, 6, 8), normal(2, 3, 4, 5)
    other = condition.flip(1)
    free, placed = make(), make(condition_grid=(2, 3))
    torch.testing.assert_close(free.loss(clean, condition, generator()), free.loss(clean, other, generator()))
    assert abs(placed.loss(clean, condition, generator()) - placed.loss(clean, other, generator())) > 1e-4


def test_places_of_two_grids_agree_where_they_lie_over_each_other():
    fine, coarse = places((3, 9), 32, torch.device("cpu")), places((1, 3), 32, torch.device("cpu"))
    torch.testing.assert_close(fine.view(3, 9, 32)[1, 1::3], coarse)
    assert torch.cdist(fine, fine).fill_diagonal_(9).min() > 0.1


@pytest.fixture(scope="module")
def digits():
    """Small pictures of digits (N, 3, 8, 8) and their patch tokens (N, 16, 192) in the bundled ViT."""
    import dvt

    data = pytest.importorskip("sklearn.datasets").load_digits()
    pictures = torch.from_numpy(data.images[:260]).float()[:, None].expand(-1, 3, -1, -1) / 16
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)

    @torch.no_grad()
    def see(images):
        return backbone(nn.functional.interpolate(images, (64, 64), mode="bicubic").clamp(0, 1)).patches

    return pictures, see


def trained(prior, maps, conditions, steps, batch=32, rate=2e-3):
    optimizer = torch.optim.AdamW(prior.parameters(), rate)
    prior.train()
    draws = generator(5)
    for _ in range(steps):
        rows = torch.randint(len(maps), (batch,), generator=draws)
        loss = prior.loss(maps[rows], None if conditions is None else conditions[rows], draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prior.eval()


def test_after_training_samples_give_their_own_condition_back(digits):
    pictures, see = digits
    tokens = see(pictures)
    conditions, held = tokens.flatten(1, 2), slice(200, None)
    target = PriorTarget("pixels", 2)
    target = target.fitted(target.encode(pictures[:200], tokens))
    maps = target.standardise(target.encode(pictures, tokens))
    config = PriorConfig((4, 4), 12, 192, (4, 4), width=64, depth=2, heads=2)
    prior = trained(Prior(config, generator()), maps[:200], conditions[:200], 130)
    samples, calls = prior.sample(conditions[held], generator(), sigmas=sampling_sigmas(10))
    assert calls == 19
    trip = round_trip_cosine(see(target.decode(samples)), tokens[held])
    assert trip.sigmas > 5
    # The null: a prior that is shown conditions of other images cannot tell.
    other, _ = prior.sample(conditions[held].roll(1, 0), generator(), sigmas=sampling_sigmas(10))
    assert round_trip_cosine(see(target.decode(other)), tokens[held]).sigmas < 3


# --- known answer 2: the diffusion head, the masks, the first loss, the order of sampling


def kolmogorov_smirnov(sample, weights, centres, std):
    stats = pytest.importorskip("scipy.stats")

    def cdf(x):
        return sum(w * stats.norm.cdf(x, c, std) for w, c in zip(weights, centres, strict=True))

    return stats.kstest(sample.double().numpy(), cdf).statistic


def test_a_diffusion_head_finds_both_modes_where_squared_error_finds_their_mean():
    weights, centres, std = (0.3, 0.7), (-1.4, 0.6), 0.15  # mean 0, standard deviation .93
    draws = generator()
    z = torch.ones(512, 32)

    def data(count):
        first = torch.rand(count, generator=draws) < weights[0]
        return torch.where(first, centres[0], centres[1])[:, None] + std * torch.randn(count, 1, generator=draws)

    prior = make("token", token_dim=1, condition_dim=None, opened=False)
    head, x0 = prior.head.mlp, Preconditioned(prior.head.mlp)
    mean = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam([*head.parameters(), *mean.parameters()], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 900)
    for _ in range(900):
        clean = data(len(z))
        sigma, noise = draw_sigmas(len(z), draws, mean=-0.5), torch.randn(clean.shape, generator=draws)
        loss = denoising_loss(x0, clean, sigma, noise, z).mean() + (mean(z) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    sigmas = sampling_sigmas(24)
    start = float(sigmas[0]) * torch.randn(3000, 1, generator=draws)
    sample, _ = heun(x0, start, sigmas, torch.ones(3000, 32))
    assert kolmogorov_smirnov(sample[:, 0], weights, centres, std) < 0.05
    answer = mean(z)[:, 0].detach()
    assert abs(float(answer.mean())) < 0.1  # the mean, where there is no data
    assert kolmogorov_smirnov(answer, weights, centres, std) > 0.25


def test_mask_ratios_follow_the_truncated_normal():
    stats = pytest.importorskip("scipy.stats")
    ratios = draw_mask_ratios(20_000, generator())
    assert abs(float(ratios.mean()) - 0.867) < 0.002
    exact = stats.truncnorm(-1.2, 0, loc=1, scale=0.25)
    assert abs(exact.mean() - 0.867) < 5e-4
    assert stats.kstest(ratios.double().numpy(), exact.cdf).pvalue > 0.001


def test_hidden_tokens_are_as_many_as_drawn_and_anywhere():
    head = make("token", grid=(4, 5)).head
    hidden = head.draw_hidden(8000, generator())
    drawn = (draw_mask_ratios(8000, generator()) * 20).ceil()
    assert torch.equal(hidden.sum(1), drawn.long())
    assert (hidden.float().mean(0) - drawn.mean() / 20).abs().max() < 0.02
    assert make("token", "raster").head.draw_hidden(2, generator()).all()


@pytest.mark.parametrize(("head", "order"), HEADS)
def test_the_loss_starts_at_one_a_dimension(head, order):
    prior = make(head, order, opened=False)
    with torch.no_grad():
        each = [prior.loss(normal(64, 3, 4, 5, seed=k), normal(64, 2, 8), generator(k)) for k in range(12)]
    losses = torch.stack(each)
    assert abs(float(losses.mean()) - 1) < 4 * float(losses.std()) / 12**0.5 + 1e-3
    assert losses.std() < 0.1


@pytest.mark.parametrize("order", ["random", "raster"])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_each_position_is_filled_exactly_once(order, steps):
    prior, filled = make("token", order), []

    def numbering(x0_model, x_init, sigmas, condition, generator):
        """Each row it is asked for gets a number of its own; one written twice would be lost."""
        start = sum(filled)
        filled.append(len(x_init))
        return torch.arange(start, start + len(x_init)).float()[:, None].expand(x_init.shape) + 1, 1

    maps, calls = prior.sample(normal(3, 2, 8), generator(), sampler=numbering, steps=steps)
    assert sorted(maps[..., 0].flatten().tolist()) == list(range(1, 3 * 12 + 1))
    assert calls == len(filled) == (12 if order == "raster" else min(steps, 12))
    if order == "raster":
        assert torch.equal(maps[0, ..., 0].flatten().argsort(), torch.arange(12))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300))
def test_unmasking_fills_all_and_something_each_time(length, steps):
    counts = unmasking(length, steps)
    assert sum(counts) == length and min(counts) >= 1 and len(counts) == min(length, steps)


def test_unmasking_follows_the_cosine():
    left = 1024 - torch.tensor([0, *unmasking(1024, 8)]).cumsum(0)
    expected = [1024 * math.cos(math.pi / 2 * k / 8) for k in range(9)]
    assert (left - torch.tensor(expected)).abs().max() <= 1


# --- known answer 3: what z sees


@pytest.mark.parametrize("position", [0, 1, 6, 11])
def test_raster_z_sees_the_tokens_before_it_and_no_other(position):
    head = make("token", "raster").head
    tokens, hidden = normal(2, 12, 5), torch.ones(2, 12, dtype=torch.bool)
    context = normal(2, 3, 32)
    later = tokens.clone()
    later[:, position:] = normal(2, 12 - position, 5, seed=9)
    before, after = head.z(tokens, hidden, context), head.z(later, hidden, context)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    for further in range(position + 1, 12):
        assert (before[:, further] - after[:, further]).abs().max() > 1e-4


def test_random_z_does_not_see_the_values_of_hidden_tokens():
    head = make("token", "random").head
    hidden = head.draw_hidden(4, generator())
    tokens, context = normal(4, 12, 5), normal(4, 3, 32)
    other = torch.where(hidden[..., None], normal(4, 12, 5, seed=9), tokens)
    assert torch.equal(head.z(tokens, hidden, context), head.z(other, hidden, context))
    assert not hidden[0].all()
    seen = torch.where(hidden[..., None], tokens, normal(4, 12, 5, seed=9))
    difference = (head.z(tokens, hidden, context) - head.z(seen, hidden, context)).abs().amax((1, 2))
    assert (difference[~hidden.all(1)] > 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "raster"])
def test_a_token_head_learns_how_tokens_depend_on_each_other(order):
    """All eight tokens have one random sign: drawn by themselves, they would agree once in 128 times."""
    sign = torch.where(torch.rand(4000, 1, 1, 1, generator=generator()) < 0.5, -1.0, 1.0)
    maps = sign * torch.tensor([1.0, -1.0]).repeat(4).view(1, 2, 4, 1) + 0.1 * normal(4000, 2, 4, 1)
    prior = make("token", order, opened=False, grid=(2, 4), token_dim=1, condition_dim=None)
    trained(prior, maps, None, 600, batch=64)
    sample, _ = prior.sample(None, generator(), count=400, steps=8)
    signs = (sample * maps[:1].sign()).sign().flatten(1)
    assert (signs.sum(1).abs() == 8).float().mean() > 0.9
    assert abs(float(signs[:, 0].mean())) < 0.2


# --- guidance, samplers, drops


@pytest.mark.parametrize(("head", "order"), HEADS)
def test_guidance_runs_from_the_null_to_the_condition_and_beyond(head, order):
    prior = make(head, order)

    def sample(seed, scale):
        return prior.sample(normal(2, 3, 8, seed=seed), generator(), guidance=scale, sigmas=sampling_sigmas(4))[0]

    torch.testing.assert_close(sample(1, 0.0), sample(2, 0.0))  # nothing but the null
    assert (sample(1, 1.0) - sample(2, 1.0)).abs().max() > 1e-3
    assert (sample(1, 3.0) - sample(1, 1.0)).abs().max() > 1e-3


def test_any_sampler_of_the_shared_call_serves():
    from functools import partial

    from dvt.analysis.priors.diffusion import Restart, ddim

    prior, condition = make(), normal(2, 3, 8)
    sigmas = sampling_sigmas(6)
    assert prior.sample(condition, generator(), sampler=ddim, sigmas=sigmas)[1] == 6
    again = partial(restart, intervals=[Restart(0.5, 2.0, points=3, repeats=2)])
    assert prior.sample(condition, generator(), sampler=again, sigmas=sigmas)[1] == 11 + 2 * 2 * 2


def test_dropped_conditions_are_dropped_in_training_only():
    prior, clean = make(drop=1.0), normal(4, 3, 4, 5)

    def losses():
        return [float(prior.loss(clean, normal(4, 3, 8, seed=seed), generator())) for seed in (1, 2)]

    first, second = losses()
    assert first != second
    prior.train()
    first, second = losses()
    assert first == pytest.approx(second, abs=1e-6)


def test_the_same_generator_gives_the_same_prior_and_the_same_sample():
    first, second = make(), make()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    condition = normal(2, 3, 8)
    assert torch.equal(first.sample(condition, generator(3))[0], second.sample(condition, generator(3))[0])
    assert not torch.equal(first.sample(condition, generator(3))[0], first.sample(condition, generator(4))[0])


# --- the second stage, files


def test_a_swapped_condition_leaves_the_trunk_as_it_was():
    prior = make(condition_grid=(1, 2))
    before = {name: value.clone() for name, value in prior.head.named_parameters()}
    prior.swap_condition(10, generator())
    assert prior.config.condition_dim == 10 and prior.config.condition_grid is None
    assert all(torch.equal(before[name], value) for name, value in prior.head.named_parameters())
    labels = nn.functional.one_hot(torch.tensor([3, 9]), 10)[:, None]
    assert prior.sample(labels, generator(), sigmas=sampling_sigmas(2))[0].isfinite().all()
    with pytest.raises(ShapeError, match="10"):
        prior.sample(normal(2, 3, 8), generator())


def test_the_second_stage_learns_labels_from_a_few_pairs():
    """Two classes of maps; the first stage is told the map itself, the second only the class, on a tenth of pairs."""
    signs = torch.where(torch.rand(600, generator=generator()) < 0.5, -1.0, 1.0)
    maps = signs.view(-1, 1, 1, 1) * torch.tensor([1.0, -1.0]).view(1, 1, 2, 1) + 0.1 * normal(600, 1, 2, 1)
    prior = make(grid=(1, 2), token_dim=1, condition_dim=2, opened=False)
    trained(prior, maps, maps.view(-1, 1, 2), 150)
    prior.swap_condition(2, generator(2))
    labels = nn.functional.one_hot((signs > 0).long(), 2)[:, None].float()
    trained(prior, maps[:60], labels[:60], 120)
    sample, _ = prior.sample(labels[300:400], generator(), sigmas=sampling_sigmas(8))
    assert (sample[:, 0, 0, 0].sign() == signs[300:400]).float().mean() > 0.9


@pytest.mark.parametrize(("head", "order"), HEADS)
def test_a_saved_prior_comes_back(head, order, tmp_path):
    prior = make(head, order, condition_grid=(1, 2))
    prior.card = {"backbone": "some", "target": {"mean": [0.25]}}
    prior.save(tmp_path / "deep" / "prior.safetensors")
    again = Prior.load(tmp_path / "deep" / "prior.safetensors")
    assert again.config == prior.config and again.card == prior.card and not again.training
    condition = normal(2, 3, 8)
    assert torch.equal(again.sample(condition, generator())[0], prior.sample(condition, generator())[0])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["prior.safetensors"]


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "prior.safetensors"
    with pytest.raises(WeightsError, match="cannot read"):
        Prior.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="holds no prior"):
        Prior.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot read"):
        Prior.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 1 << 40}, "too small for it"),  # refused before the memory is taken
        ({"depth": 10**12}, "too small for it"),
        ({"width": "8"}, "cannot be made"),
        ({"heads": None}, "cannot be made"),
        (None, "holds no prior"),
    ],
)
def test_a_prior_that_cannot_be_made_is_refused(tmp_path, changes, words):
    from safetensors.torch import save_file

    path, prior = tmp_path / "prior.safetensors", make(order="raster", head="token")
    config = None if changes is None else dataclasses.asdict(prior.config) | changes
    about = json.dumps({"schema": "dvt-prior/1", "config": config, "card": {}})
    save_file(prior.state_dict(), path, {"dvt": about})
    with pytest.raises(WeightsError, match=words):
        Prior.load(path)
    save_file(prior.state_dict(), path, {"dvt": "[" * 100_000})
    with pytest.raises(WeightsError, match="cannot read"):
        Prior.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "both"}, "head must be"),
        ({"head": "token", "order": "spiral"}, "order"),
        ({"width": 30}, "multiple"),
        ({"heads": 3}, "multiple"),
        ({"depth": 0}, "depth"),
        ({"drop": 1.5}, "drop"),
        ({"grid": (0, 3)}, "grid"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_a_condition_too_many_or_missing_is_refused():
    clean = normal(2, 3, 4, 5)
    with pytest.raises(ConfigError, match="has a condition"):
        make().loss(clean, None, generator())
    with pytest.raises(ConfigError, match="has no condition"):
        make(condition_dim=None).loss(clean, normal(2, 3, 8), generator())
    with pytest.raises(ConfigError, match="a count"):
        make(condition_dim=None).sample(None, generator())
    with pytest.raises(ConfigError, match="guidance"):
        make(condition_dim=None).sample(None, generator(), count=2, guidance=2.0)
    with pytest.raises(ShapeError, match="fewer than the grid"):
        make(condition_grid=(2, 3)).loss(clean, normal(2, 5, 8), generator())


# --- targets


def test_patches_are_cut_as_a_loop_would():
    image = normal(2, 3, 6, 8)
    tokens = patchify(image, 2)
    assert tokens.shape == (2, 3, 4, 12)
    for row in range(3):
        for column in range(4):
            cell = image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[:, row, column], cell.flatten(1))
    with pytest.raises(ShapeError, match="multiple"):
        patchify(image, 4)


@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_targets_are_standardised_and_come_back(kind):
    pictures, tokens = torch.rand((50, 3, 8, 8), generator=generator()), 3 * normal(50, 4, 4, 6) + 5
    tokens[..., 0] = 7 + 1e-6 * normal(50, 4, 4)  # a channel that says nothing
    target = PriorTarget(kind, 2 if kind == "pixels" else 1)
    raw = target.encode(pictures, tokens)
    target = target.fitted(raw)
    maps = target.standardise(raw)
    assert abs(float(maps.mean())) < 1e-4
    if kind == "features":
        assert maps[..., 0].std() < 0.01 and (maps[..., 1:].std((0, 1, 2)) - 1).abs().max() < 1e-3
        torch.testing.assert_close(target.decode(maps), tokens)
    else:
        assert abs(float(maps.std()) - 1) < 1e-4
        torch.testing.assert_close(target.decode(maps), pictures)
        assert target.decode(100 * maps).max() == 1 and target.decode(100 * maps).min() == 0


def test_targets_refuse_what_they_cannot_do(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="there is no target 'text'"):
        PriorTarget("text")
    with pytest.raises(ConfigError, match="needs a VAE"):
        PriorTarget("latents")
    with pytest.raises(ConfigError, match="needs a VAE"):
        PriorTarget("pixels", vae=str(tmp_path))
    with pytest.raises(ConfigError, match="all images are the same"):
        PriorTarget("pixels").fitted(torch.ones(4, 2, 2, 3))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="pip install"):
        PriorTarget("latents", vae=str(tmp_path)).encode(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 1, 1))


def test_latents_of_a_local_vae(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    vae.save_pretrained(tmp_path)
    target, pictures = PriorTarget("latents", 2, str(tmp_path)), torch.rand((4, 3, 16, 16), generator=generator())
    raw = target.encode(pictures, pictures)
    with torch.no_grad():
        latents = vae.encode(2 * pictures - 1).latent_dist.mean
        expected = ((vae.decode(latents).sample + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(raw, patchify(latents, 2))
    fitted = target.fitted(raw)
    torch.testing.assert_close(fitted.decode(fitted.standardise(raw)), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="no folder"):
        PriorTarget("latents", 2, str(tmp_path / "none")).encode(pictures, pictures)


def test_denoising_mlp_answers_zero_at_first():
    with torch.random.fork_rng():
        prior = make("token", opened=False)
    assert isinstance(prior.head.mlp, DenoisingMLP)
    assert not prior.head.mlp(normal(7, 5), normal(7), normal(7, 32)).any()


# --- discrete tokens, raster memory, temperature


def test_a_raster_prior_that_remembers_draws_what_the_whole_trunk_answers():
    """z of each token from kept keys and values equals the causal trunk on all tokens, with and without a condition."""
    config = PriorConfig((2, 3), 4, 5, head="token", order="raster", width=16, depth=2, heads=2)
    prior = Prior(config, generator())
    with torch.no_grad():
        for value in prior.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator(1)))
    head, tokens, context = prior.head, normal(3, 6, 4, seed=2), prior.context(normal(3, 2, 5, seed=3))
    hidden = torch.ones(3, 6, dtype=torch.bool)
    with torch.no_grad():
        whole, memory, parts = head.z(tokens, hidden, context), {}, []
        for place in range(6):
            now = torch.full((3, 1), place)
            parts.append(head._asked(tokens, hidden, now, context, memory))
    torch.testing.assert_close(torch.stack(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["random", "raster"])
def test_a_discrete_head_recovers_a_planted_joint(order):
    """Two places, three codes: a joint table that is not the product of its margins."""
    table = torch.tensor([[0.30, 0.02, 0.02], [0.02, 0.02, 0.28], [0.02, 0.30, 0.02]])
    centres = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]])
    drawn = torch.multinomial(table.flatten(), 6000, replacement=True, generator=generator(5))
    ids = torch.stack((drawn // 3, drawn % 3), 1)
    maps = centres[ids].view(-1, 1, 2, 2)
    config = PriorConfig((1, 2), 2, head="token", order=order, codes=3, width=32, depth=1, heads=2)
    prior = Prior(config, generator())
    prior.head.centres.copy_(centres)
    if order == "random":  # with two tokens MAR's shares hide both, always; here either may be hidden
        prior.head.draw_hidden = lambda count, draws: torch.rand(count, 2, generator=draws) < 0.7
    optimizer, draws = torch.optim.Adam(prior.parameters(), lr=3e-3), generator(6)
    assert float(prior.loss(maps[:64], None, draws)) == pytest.approx(1, abs=1e-5)  # untrained: log K / log K
    for _ in range(400):
        rows = torch.randint(len(maps), (128,), generator=draws)
        loss = prior.loss(maps[rows], None, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made, calls = prior.eval().sample(None, generator(7), count=4000, steps=2)
    found = prior.head.ids(made.flatten(1, 2))
    assert calls == 2 and torch.equal(prior.head.centres[found].view_as(made), made)
    counted = torch.bincount(3 * found[:, 0] + found[:, 1], minlength=9).view(3, 3) / 4000
    assert float((counted - table).abs().sum()) / 2 < 0.05  # total variation; the margins alone are .57 away


def test_temperature_scales_what_a_gaussian_prior_draws():
    """Untrained, x0 shrinks linearly: samples are normal with a deviation proportional to the temperature."""
    prior = Prior(PriorConfig((4, 4), 8, width=16, depth=1, heads=2), generator()).eval()
    warm, cool = (prior.sample(None, generator(1), 32, temperature=t)[0] for t in (1.0, 0.5))
    torch.testing.assert_close(cool, warm / 2, atol=1e-5, rtol=1e-4)


def test_a_rising_guidance_ends_at_its_scale():
    levels = torch.tensor([8.0, 2.0, 0.5, 0.0])
    request = SampleRequest(1, None, None, generator(), heun, levels, 3.0, 1, rising=True)
    scale = request.scale_of_noise()
    assert [round(scale(float(level)), 6) for level in levels[:3]] == [1.0, 2.0, 3.0]
    assert [request.scale_at(done) for done in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]


def test_a_learned_centring_can_take_any_constant_off():
    """With the constant as its centre, conditions that share it are read as if it were not there."""
    config = PriorConfig((2, 2), 3, 6, (2, 2), width=16, depth=1, heads=2, centred=True)
    prior, plain = Prior(config, generator()), normal(3, 4, 6, seed=1)
    shift = 5 * normal(4, 6, seed=2)
    before = prior.context(plain)
    torch.testing.assert_close(before, Prior(dataclasses.replace(config, centred=False), generator()).context(plain))
    with torch.no_grad():
        prior.embed.centre.copy_(shift)
    torch.testing.assert_close(prior.context(plain + shift), before, atol=1e-4, rtol=1e-4)
