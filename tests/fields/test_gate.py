"""The test for an artifact: its rate of false alarms and its power."""

import pytest
import torch

from dvt import grids
from dvt.fields.gate import SignTest, sign_flip_p_value

GRID, CHANNELS, RUNS = (8, 10), 8, 300


def p_values(artifact, heavy=False, reach=1.0, scatter=False):
    found = []
    for seed in range(RUNS):
        draw = torch.Generator().manual_seed(seed)
        offsets = grids.draw_offsets(GRID, 16, reach, draw)
        period = (2 * GRID[0], 2 * GRID[1])
        index = grids.lattice_index(GRID, offsets, period)
        field = torch.randn(period[0] * period[1], CHANNELS, generator=draw)
        noise = torch.randn(*index.shape, CHANNELS, generator=draw)
        noise = noise**3 if heavy else noise
        tokens = field[index] + 0.3 * noise + artifact * torch.randn(index.shape[1], CHANNELS, generator=draw)
        if scatter:
            offsets = offsets[torch.randperm(len(offsets), generator=draw)]
        test = SignTest(GRID, period, CHANNELS, tokens)
        test.add(tokens[:7], offsets[:7])
        test.add(tokens[7:], offsets[7:])
        found.append(test.p_value())
    return torch.tensor(found)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("reach", [0.5, 1.0])
def test_false_alarms_come_at_the_stated_rate(heavy, reach):
    p = p_values(0.0, heavy, reach)
    for rate in (0.01, 0.05, 0.2):
        spread = (rate * (1 - rate) / RUNS) ** 0.5
        assert (p <= rate).double().mean() <= rate + 3 * spread
    assert 0.4 < p.mean() < 0.6


def test_an_artifact_of_a_third_of_the_noise_is_found():
    assert (p_values(0.1) <= 0.01).double().mean() > 0.95


def test_equal_groups_give_the_least_p_value_and_opposite_ones_none():
    assert sign_flip_p_value(torch.ones(8, 8)) == 2.0**-7
    assert sign_flip_p_value(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == 1.0


def test_a_grid_of_few_patches_has_fewer_groups_and_abstains_below_its_least_p_value():
    for grid, least in [((2, 2), 1 / 8), ((2, 3), 1 / 32), ((3, 4), 1 / 128)]:
        offsets = grids.draw_offsets(grid, 16, 1.0, torch.Generator().manual_seed(0))
        period = (2 * grid[0], 2 * grid[1])
        index = grids.lattice_index(grid, offsets, period)
        draw = torch.Generator().manual_seed(1)
        clean = torch.randn(period[0] * period[1], CHANNELS, generator=draw)[index]
        for tokens, expected in [(clean, None), (clean + 9 * torch.randn(*index.shape[1:], CHANNELS), least)]:
            test = SignTest(grid, period, CHANNELS, tokens)
            test.add(tokens, offsets)
            assert test.p_value() >= least and (expected is None or test.p_value() == expected)


def test_mirror_images_share_a_group_and_blocks_do():
    group = grids.lattice_blocks((8, 12), 2, 4).view(8, 12)
    assert torch.equal(group, group.flip(0)) and torch.equal(group, group.flip(1))
    assert torch.equal(group[:4:2, :6:2], group[1:4:2, 1:6:2]) and len(group.unique()) == 4
