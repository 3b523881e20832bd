"""Noise schedules and samplers against closed forms: Gaussian data, a mixture with its exact score, naive loops."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

from dvt.analysis.priors import diffusion
from dvt.analysis.priors.diffusion import Preconditioned, Restart, ddim, heun, karras_sigmas, restart
from dvt.errors import ConfigError, NonFiniteError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def gaussian(mean=0.0, std=1.0):
    """The exact x0 of data N(mean, std^2)."""
    return lambda x, sigma, _: (std**2 * x + sigma[:, None] ** 2 * mean) / (std**2 + sigma[:, None] ** 2)


class Counted:
    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, *inputs):
        self.calls += 1
        return self.model(*inputs)


class Zero(nn.Module):
    def forward(self, x, label, condition):
        return torch.zeros_like(x)


# --- parameterisation


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 50.0])
def test_an_untrained_model_scores_one_a_dimension(sigma, sigma_data):
    clean = sigma_data * noise(4000, 8)
    model = Preconditioned(Zero(), sigma_data)
    sigmas = torch.full((4000,), sigma, dtype=torch.float64)
    loss = diffusion.denoising_loss(model, clean, sigmas, noise(4000, 8, seed=1), sigma_data=sigma_data)
    assert loss.shape == (4000,)
    assert float(loss.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 32000))


def test_a_network_sees_unit_variance_and_its_condition():
    seen = {}

    class Spy(nn.Module):
        def forward(self, x, label, condition):
            seen.update(x=x, label=label, condition=condition)
            return torch.zeros_like(x)

    sigma = torch.tensor([0.1, 3.0], dtype=torch.float64).repeat_interleave(3000)
    x = 0.5 * noise(6000, 4, 2) + sigma[:, None, None] * noise(6000, 4, 2, seed=1)
    Preconditioned(Spy(), 0.5)(x, sigma, "this")
    assert seen["condition"] == "this"
    torch.testing.assert_close(seen["label"], sigma.log() / 4)
    assert all(part.std() == pytest.approx(1, abs=0.02) for part in seen["x"].split(3000))


def test_a_networks_answer_is_asked_for_in_unit_variance():
    """What is left to the network, x0 - c_skip x, has the standard deviation by which its answer is scaled."""

    class One(nn.Module):
        def forward(self, x, label, condition):
            return torch.ones_like(x)

    for level in (0.1, 3.0):
        sigma = torch.full((20000,), level, dtype=torch.float64)
        clean = 0.5 * noise(20000, 1)
        x = clean + level * noise(20000, 1, seed=1)
        skipped = Preconditioned(Zero(), 0.5)(x, sigma)
        scale = Preconditioned(One(), 0.5)(x, sigma) - skipped
        assert float((clean - skipped).std()) == pytest.approx(float(scale.mean()), rel=0.02)


def test_the_loss_is_zero_for_the_truth_and_the_weight_is_edms():
    clean, sigma = noise(5, 3), torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)
    truth = diffusion.denoising_loss(lambda *_: clean, clean, sigma, noise(5, 3, seed=1))
    off = diffusion.denoising_loss(lambda *_: clean + 1, clean, sigma, noise(5, 3, seed=1), sigma_data=0.5)
    assert float(truth.abs().max()) == 0
    torch.testing.assert_close(off, 1 / sigma**2 + 1 / 0.5**2)


def test_training_noise_levels_are_log_normal():
    drawn = diffusion.draw_sigmas(5000, generator(), mean=-0.4, std=1.0)
    assert kstest((drawn.log().numpy() + 0.4), "norm").pvalue > 0.01


def test_guidance_extrapolates_from_the_null():
    model = Counted(lambda x, sigma, condition: x + condition)
    x, sigma = noise(2, 3), torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(diffusion.guided(model, 3.0, null=-1.0)(x, sigma, 2.0), x - 1 + 3 * 3)
    assert model.calls == 2
    assert diffusion.guided(model, 1.0, null=0.0) is model


# --- schedules


@given(st.integers(2, 40), st.floats(1e-3, 0.5), st.floats(1.0, 100.0))
@settings(max_examples=25, deadline=None)
def test_the_karras_grid(count, low, high):
    sigmas = karras_sigmas(count, low, high)
    root = sigmas[:-1] ** (1 / 7)
    assert len(sigmas) == count + 1 and float(sigmas[-1]) == 0
    assert float(sigmas[0]) == pytest.approx(high) and float(sigmas[-2]) == pytest.approx(low)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(count - 1))


def test_the_ddpm_schedules():
    linear, cosine = diffusion.alpha_bars("linear"), diffusion.alpha_bars("cosine")
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(linear, np.exp(np.log1p(-betas).cumsum()), rtol=1e-12)
    time = np.arange(1, 1001) / 1000
    closed = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[:-1], closed[:-1], rtol=1e-9)
    assert 0 < cosine[-1] < 1e-6  # the last beta is clipped to .999


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddpm_noise_levels_fall_from_the_last_step_to_zero(kind):
    sigmas, schedule = diffusion.ddpm_sigmas(kind, 10), diffusion.alpha_bars(kind)
    assert len(sigmas) == 11 and bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) == 0
    for sigma, step in ((sigmas[0], 999), (sigmas[-2], 0)):  # sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, rescaled
        assert float(sigma) == pytest.approx(float(((1 - schedule[step]) / schedule[step]).sqrt()))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_ddpm_network_becomes_an_x0_model(kind):
    schedule, steps = diffusion.alpha_bars(kind, 50), []

    def network(x, step, condition):
        """The exact noise of data N(.5, 2^2) in DDPM's own variables."""
        steps.append(step)
        keep = schedule[step][:, None]
        return (1 - keep).sqrt() * (x - keep.sqrt() * 0.5) / (4 * keep + 1 - keep)

    sigma = (1 / schedule - 1).sqrt()
    x = noise(50, 3) * 5
    found = diffusion.x0_from_noise(network, schedule)(x, sigma, None)
    torch.testing.assert_close(found, gaussian(0.5, 2.0)(x, sigma, None), rtol=1e-7, atol=1e-7)
    assert steps[0].tolist() == list(range(50))


# --- samplers


def naive_heun(model, x, sigmas):
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        slope = (x - model(x, torch.full((len(x),), now, dtype=x.dtype), None)) / now
        moved = x + (then - now) * slope
        if then:
            end = (moved - model(moved, torch.full((len(x),), then, dtype=x.dtype), None)) / then
            moved = x + (then - now) * (slope + end) / 2
        x = moved
    return x


def test_heun_is_the_naive_loop():
    x, sigmas = 80 * noise(6, 3), karras_sigmas(9)
    torch.testing.assert_close(heun(gaussian(1.0, 0.5), x, sigmas)[0], naive_heun(gaussian(1.0, 0.5), x, sigmas))


@pytest.mark.parametrize(("sampler", "order"), [(heun, 2), (ddim, 1)])
def test_the_order_of_convergence(sampler, order):
    """Down to a positive level the flow of Gaussian data is known: it scales x - mean."""
    x, errors = 10 * noise(200, 2), []
    for steps in (20, 40, 80):
        found, _ = sampler(gaussian(0.7, 1.0), x, karras_sigmas(steps + 1, 0.1, 10.0)[:-1])
        exact = 0.7 + (x - 0.7) * math.sqrt((1 + 0.1**2) / (1 + 10.0**2))
        errors.append(float((found - exact).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_the_papers_step_in_its_own_variables(eta):
    schedule = diffusion.alpha_bars("linear")
    sigmas = diffusion.ddpm_sigmas("linear", 8)
    keeps = [float(schedule[step]) for step in np.linspace(999, 0, 8).round().astype(int)] + [1.0]
    x = float(sigmas[0]) * noise(5, 3)
    found, calls = ddim(gaussian(1.0, 0.3), x, sigmas, generator=generator(4), eta=eta)

    draws, y = generator(4), x * math.sqrt(keeps[0])
    for keep, after in pairwise(keeps):
        level = torch.full((5,), math.sqrt(1 / keep - 1), dtype=torch.float64)
        clean = gaussian(1.0, 0.3)(y / math.sqrt(keep), level, None)
        eps = (y - math.sqrt(keep) * clean) / math.sqrt(1 - keep)
        spread = eta * math.sqrt((1 - after) / (1 - keep) * (1 - keep / after))
        y = math.sqrt(after) * clean + math.sqrt(1 - after - spread**2) * eps
        if spread:
            y = y + spread * torch.randn(y.shape, generator=draws, dtype=y.dtype)
    torch.testing.assert_close(found, y)
    assert calls == 8


def test_samples_of_an_exact_model_have_the_datas_moments():
    model = Preconditioned(Zero(), 0.5)  # exact for N(0, .5^2)
    for sampler, steps in ((heun, 60), (ddim, 400)):
        found, _ = sampler(model, 80 * noise(20000, 1), karras_sigmas(steps), None, generator())
        assert float(found.std()) == pytest.approx(0.5, abs=0.015)


@given(st.integers(2, 20), st.lists(st.tuples(st.floats(0.1, 1.5), st.integers(2, 5), st.integers(1, 3)), max_size=3))
@settings(max_examples=25, deadline=None)
def test_calls_are_counted_exactly(steps, chosen):
    intervals = [Restart(low, 70.0, points, repeats) for low, points, repeats in chosen]
    model = Counted(gaussian())
    _, calls = restart(model, 80 * noise(2, 1), karras_sigmas(steps), None, generator(), intervals)
    assert calls == model.calls == 2 * steps - 1 + sum(2 * repeats * (points - 1) for _, points, repeats in chosen)
    for sampler, expected in ((heun, 2 * steps - 1), (ddim, steps)):
        model = Counted(gaussian())
        assert sampler(model, 80 * noise(2, 1), karras_sigmas(steps))[1] == model.calls == expected


@pytest.mark.parametrize(
    ("std", "low", "high", "repeats"), [(1.0, 0.3, 2.0, 3), (0.5, 0.2, 1.0, 2), (2.0, 0.5, 4.0, 1)]
)
def test_restart_contracts_errors_on_gaussian_data(std, low, high, repeats):
    """Mean errors shrink by r^(K/2) and variance errors by r^K, r = (s^2 + low^2) / (s^2 + high^2)."""
    mean, shift, excess, count = 0.7, 3.0, 6.0, 40000
    ratio = (std**2 + low**2) / (std**2 + high**2)
    start = noise(count // 2, 1)
    start = torch.cat((start, -start))
    start = start / start.square().mean().sqrt()
    # One step from a level just above `low` leaves the planted errors as they are.
    sigmas = torch.tensor([low * (1 + 1e-6), low, 0.0], dtype=torch.float64)
    x = mean + shift + math.sqrt(std**2 + low**2 + excess) * start
    found, calls = restart(gaussian(mean, std), x, sigmas, None, generator(3), [Restart(low, high, 40, repeats)])
    assert calls == 3 + 2 * repeats * 39
    last = std**2 / (std**2 + low**2)  # the final step answers x0, which is linear in x
    found = (found - mean) / last
    spread = math.sqrt((std**2 + low**2 + excess) / count)
    assert float(found.mean()) == pytest.approx(shift * ratio ** (repeats / 2), abs=4 * spread)
    expected = excess * ratio**repeats
    variance = std**2 + low**2 + expected
    assert float(found.var()) - (std**2 + low**2) == pytest.approx(expected, abs=5 * variance * math.sqrt(2 / count))
    assert expected > 5 * variance * math.sqrt(2 / count)  # the test can tell it from nothing


ANGLES = torch.arange(8) * math.pi / 4
MODES = 1.5 * torch.stack((ANGLES.cos(), ANGLES.sin()), dim=1)
EVEN, SKEWED = torch.full((8,), 1 / 8), (2 * ANGLES.cos()).softmax(0)


def ring(wrong_above=math.inf):
    """x0 of eight modes of width .1 on a circle of radius 1.5, with wrong weights above a noise level."""

    def model(x, sigma, _):
        width = (0.1**2 + sigma**2)[:, None]
        weights = torch.where((sigma > wrong_above)[:, None], SKEWED, EVEN)
        share = (weights.log() - (x[:, None] - MODES).square().sum(-1) / (2 * width)).softmax(1)
        return (0.1**2 * x + sigma[:, None] ** 2 * (share @ MODES)) / width

    return model


def on_ring(count, draws):
    return MODES[torch.randint(8, (count,), generator=draws)] + 0.1 * torch.randn(count, 2, generator=draws)


def sliced_w2(first, second):
    angles = torch.arange(64) * math.pi / 64
    along = torch.stack((angles.cos(), angles.sin()))
    return float(((first @ along).sort(0).values - (second @ along).sort(0).values).square().mean().sqrt())


def ring_distances(seed, count):
    draws = generator(seed)
    real, floor = on_ring(count, draws), on_ring(count, draws)
    x = 80 * torch.randn(count, 2, generator=draws)
    plain, plain_calls = heun(ring(2.05), x, karras_sigmas(150))
    again, again_calls = restart(ring(2.05), x, karras_sigmas(18), None, draws, [Restart(0.3, 2.0, 5, 8)])
    exact, _ = heun(ring(), x, karras_sigmas(18))
    assert (plain_calls, again_calls) == (299, 99)
    return [sliced_w2(real, each) for each in (floor, plain, again, exact)]


def test_restart_repairs_a_score_that_is_wrong_at_high_noise():
    floor, plain, again, _ = ring_distances(0, 2000)
    assert plain > 0.3
    assert again < 0.12 and floor < 0.12 and again < plain / 3


@pytest.mark.slow
def test_restart_reaches_the_floor_where_heun_stays_far_and_gains_nothing_on_an_exact_score():
    floor, plain, again, exact = torch.tensor([ring_distances(seed, 4000) for seed in range(10)]).unbind(1)
    error = float(torch.stack((floor.std(), again.std())).norm()) / math.sqrt(10)
    print(
        f"floor {floor.mean():.3f}, Heun {plain.mean():.3f}, restart {again.mean():.3f}, exact Heun {exact.mean():.3f}"
    )
    assert float(plain.mean()) == pytest.approx(0.39, abs=0.03)
    assert float(again.mean() - floor.mean()) < 3 * error + 0.01
    assert float(exact.mean()) < float(floor.mean()) + 3 * error + 0.01


def test_restart_starts_from_the_nearest_level():
    seen = []

    def spy(x, sigma, _):
        seen.append(float(sigma[0]))
        return x * 0

    sigmas = torch.tensor([8.0, 4.0, 1.0, 0.0])
    restart(spy, noise(1, 1), sigmas, None, generator(), [Restart(1.4, 6.0, 3, 1)])
    assert seen[:4] == [8, 4, 4, 1]  # two Heun steps, then from 6 back to 1, then the last step
    assert seen[4] == pytest.approx(6) and seen[7] == seen[8] == 1 and len(seen) == 9


def test_the_condition_reaches_the_model_and_dtypes_stay():
    def model(x, sigma, condition):
        assert sigma.dtype == x.dtype and sigma.shape == (2,)
        return condition

    target = noise(2, 3, 4, dtype=torch.float32)
    for sampler in (heun, ddim, restart):
        found, _ = sampler(model, 80 * torch.ones(2, 3, 4), karras_sigmas(12), target, generator())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)


def test_the_same_generator_gives_the_same_sample():
    def run(seed):
        return restart(gaussian(), noise(3, 2), karras_sigmas(5), None, generator(seed), [Restart(0.3, 2.0, 3, 1)])[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


# --- bad input


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0], [1.0, 1.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
@pytest.mark.parametrize("sampler", [heun, ddim])
def test_noise_levels_that_do_not_fall_are_refused(sampler, sigmas):
    with pytest.raises(ConfigError, match="falling noise levels"):
        sampler(gaussian(), noise(1, 1), torch.tensor(sigmas))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Restart(2.0, 1.0, 3, 1), "0 < low < high"),
        (lambda: Restart(0.1, 1.0, 1, 1), "points >= 2"),
        (lambda: karras_sigmas(0), "count >= 1"),
        (lambda: karras_sigmas(3, 2.0, 1.0), "low < high"),
        (lambda: diffusion.alpha_bars("square"), "'cosine' or 'linear'"),
        (lambda: diffusion.ddpm_sigmas("linear", 0), "1 ... 1000"),
        (lambda: Preconditioned(Zero(), 0.0), "must be positive"),
        (lambda: ddim(gaussian(), noise(1, 1), karras_sigmas(3), eta=1.5), r"eta must lie in \[0, 1\]"),
        (lambda: ddim(gaussian(), noise(1, 1), karras_sigmas(3), eta=1.0), "give it a torch.Generator"),
        (
            lambda: restart(gaussian(), noise(1, 1), karras_sigmas(1), None, generator(), [Restart(0.1, 1.0, 2, 1)]),
            "no inner noise level",
        ),
    ],
)
def test_settings_out_of_range_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_diverged_model_is_named():
    with pytest.raises(NonFiniteError, match="diverged"):
        heun(lambda x, sigma, _: x * math.nan, noise(1, 1), karras_sigmas(3))
