"""The stand-in itself: what fails on a GPU fails on it, what a GPU does later is late, and waiting is counted."""

import pytest
import torch
from torch import nn


def test_it_holds_the_values_of_the_cpu(device):
    host = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    there = host.to(device)
    assert there.device == device and there.shape == host.shape and not there.is_cpu
    assert torch.equal((2 * there + 1).cpu(), 2 * host + 1)
    made = torch.zeros(2, 3, device=device), torch.arange(4, device=device), torch.eye(3, device=device)
    assert all(each.device == device for each in made)
    assert torch.tensor([1.0, 2.0], device=device).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "wrong",
    {
        "two devices": lambda host, there: there + host,
        "in place, across": lambda host, there: host.add_(there),
        "in place, across, of a number": lambda host, there: host.add_(there.sum()),
        "out of another device": lambda host, there: torch.add(there, there, out=host),
        "an index on the host": lambda host, there: there.index_select(0, torch.tensor([0])),
        "a gathered index on the host": lambda host, there: there.gather(0, torch.zeros(1, 4, dtype=torch.long)),
        "joined": lambda host, there: torch.cat([host, there]),
        "multiplied": lambda host, there: host @ there.T,
        "numpy": lambda host, there: there.numpy(),
        "an array": lambda host, there: __import__("numpy").asarray(there),
        "a generator of the host": lambda host, there: torch.randn(3, device=there.device, generator=torch.Generator()),
        "pinned": lambda host, there: there.pin_memory(),
        "a weight on the host": lambda host, there: nn.Linear(4, 2)(there),
    }.items(),
    ids=lambda each: each[0],
)
def test_what_fails_on_a_gpu_fails(device, wrong):
    host = torch.ones(3, 4)
    with pytest.raises((RuntimeError, TypeError)):
        wrong[1](host, host.to(device))


def test_numbers_of_the_host_may_join_in(device):
    there = torch.ones(3, device=device)
    assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]
    assert there.masked_fill(there > 0, torch.tensor(5.0)).tolist() == [5.0, 5.0, 5.0]
    assert torch.where(there > 0, torch.tensor(5.0), there).tolist() == [5.0, 5.0, 5.0]


def test_copies_to_the_host_are_late(device, standin):
    there = torch.ones(3, device=device)
    late = there.to("cpu", non_blocking=True)
    other = (2 * there).to("cpu", non_blocking=True)
    assert late.isnan().all() and other.isnan().all()
    event = standin.Event()
    event.record()
    after = (3 * there).to("cpu", non_blocking=True)
    event.synchronize()
    assert late.tolist() == [1.0, 1.0, 1.0] and other.tolist() == [2.0, 2.0, 2.0] and after.isnan().all()
    there.sum().item()
    assert after.tolist() == [3.0, 3.0, 3.0]


def test_waiting_is_counted(device, standin):
    there = torch.tensor([1.0, -1.0, 2.0]).pin_memory().to(device)
    with standin.counted() as counts:
        (there * 2 + there.sum()).sqrt().sort()
        there[there.argsort()]
        assert not counts
        there.sum().item()
        assert there.max() > 1
        there[there > 0]
        there.nonzero()
        there.cpu()
        torch.ones(3).to(device)
        torch.ones(3).pin_memory().to(device)
        torch.linalg.cholesky(torch.eye(2, device=device))
        torch.standin.current_stream().synchronize()
    assert counts == {
        "_local_scalar_dense": 2,
        "boolean mask": 1,
        "nonzero": 1,
        "copy to the host": 1,
        "upload": 1,
        "_linalg_check_errors": 1,
        "stream": 1,
    }


def test_gradients_and_optimizers(device):
    """A small network learns there exactly what it learns here."""
    results = []
    for place in ("cpu", device):
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        inputs = torch.randn(16, 4, generator=generator).to(place)
        model.to(place)
        for optimizer in (torch.optim.AdamW(model.parameters()), torch.optim.Adam(model.parameters(), fused=True)):
            for _ in range(3):
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
        assert all(parameter.device.type == torch.device(place).type for parameter in model.parameters())
        results.append(torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*results)


def test_generators_of_the_device(device):
    here, there = torch.Generator().manual_seed(3), torch.Generator(device).manual_seed(3)
    assert there.device == device
    for _ in range(2):
        assert torch.equal(torch.randn(4, generator=here), torch.randn(4, device=device, generator=there).cpu())
    assert sorted(torch.randperm(5, device=device, generator=there).tolist()) == [0, 1, 2, 3, 4]


def test_writing_into_a_view_writes_into_the_whole(device):
    whole = torch.zeros(3, 4, device=device)
    whole[1].add_(1)
    whole[:, 2] = 7
    whole.view(-1)[-1] = 5
    assert whole.tolist() == [[0, 0, 7, 0], [1, 1, 7, 1], [0, 0, 7, 5]]
