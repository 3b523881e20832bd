"""The training loop: schedule, exact continuation after kills, several processes, refusals."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dvt.errors import ConfigError, NonFiniteError, WeightsError
from dvt.files import new_part
from dvt.training import TrainingConfig, epoch_indices, train

COUNT = 50


class Net(nn.Module):
    """Small, with everything a checkpoint must bring back: dropout, a buffer that moves, a parameter never used."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(8, 16), nn.Dropout(dropout), nn.Linear(16, 8)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        generator = torch.Generator().manual_seed(0)
        for parameter in (*self.first.parameters(), *self.last.parameters()):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def solve(self, x):
        self.calls += self.training
        return self.last(self.dropout(torch.relu(self.first(x))))


def data():
    x = torch.randn(COUNT, 8, generator=torch.Generator().manual_seed(1))
    return x, 2 * x.flip(1)


def batches(step, rank, world, size=8):
    x, y = data()
    mine = slice(rank * size // world, (rank + 1) * size // world)
    chosen = epoch_indices(step, size, COUNT, seed=3)[mine]
    return {"x": x[chosen], "y": [y[chosen]]}


def loss(model, batch):
    error = model.solve(batch["x"]) - batch["y"][0]
    return {"loss": error.square().mean(), "mae": error.detach().abs().mean()}


def config(**changes):
    values = {"steps": 40, "batch_size": 8, "learning_rate": 1e-2, "ema": 0.9, "checkpoint_every": 10, "log_every": 5}
    return TrainingConfig(**{**values, "validate_every": 20, **changes})


def weights(folder, step=40):
    parts = ("model", "ema", "optimizer")
    return {
        f"{part}.{k}": v for part in parts for k, v in load_file(folder / f"step-{step:08}/{part}.safetensors").items()
    }


def bytes_of(folder, step=40):
    return {path.name: path.read_bytes() for path in (folder / f"step-{step:08}").iterdir()}


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of `config()`."""
    folder = tmp_path_factory.mktemp("whole")
    trained = train(Net(), loss, batches, config(), folder, validate=lambda model: {"seen": model.calls})
    return folder, trained


# -- what a run does --------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_promises(whole):
    folder, trained = whole
    assert (trained.step, trained.stopped, trained.checkpoint) == (40, False, folder / "step-00000040")
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000030", "step-00000040"]  # keep=2
    table = rows(folder)
    assert [int(row["step"]) for row in table] == list(range(5, 41, 5))
    assert [{k: float(v) for k, v in row.items() if v} for row in table] == trained.history
    assert float(table[-1]["loss"]) < 0.75 * float(table[0]["loss"])
    assert [row["step"] for row in table if row["seen"]] == ["20", "40"]


def test_steps_are_those_of_a_plain_loop(tmp_path):
    """The same optimizer, schedule, clipping and averaging written out."""
    settings = config(steps=12, clip=0.5, weight_decay=0.1, warmup=0.25, ema=0.8)
    model, plain = Net(0.0), Net(0.0)
    train(model, loss, batches, settings, tmp_path)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    average = {name: p.detach().clone() for name, p in plain.named_parameters()}
    plain.train()
    for step in range(12):
        rate = (
            1e-2 * (step + 1) / 3 if step < 3 else 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * (step - 2) / 9)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss(plain, batches(step, 0, 1))["loss"].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        decay = min(0.8, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * p.detach() for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(model.unused, torch.ones(3)) and not model.training and int(model.calls) == 12


def test_the_learning_rate_rises_to_its_peak_and_ends_at_its_least():
    settings = TrainingConfig(steps=1000, batch_size=1, learning_rate=3e-3, min_learning_rate=1e-5, warmup=0.15)
    rates = [settings.learning_rate_at(step) for step in range(1000)]
    assert (
        rates[0] == pytest.approx(3e-3 / 150)
        and rates[149] == pytest.approx(3e-3)
        and rates[999] == pytest.approx(1e-5)
    )
    middle = 149 + (999 - 149) // 2
    assert rates[middle] == pytest.approx((3e-3 + 1e-5) / 2, rel=1e-3)
    assert rates[:150] == sorted(rates[:150]) and rates[149:] == sorted(rates[149:], reverse=True)


@given(st.integers(1, 40), st.floats(0, 0.99), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_learning_rate_stays_in_its_range(steps, warmup, least):
    settings = TrainingConfig(steps=steps, batch_size=1, learning_rate=1, min_learning_rate=least, warmup=warmup)
    assert all(0 < settings.learning_rate_at(step) <= 1 + 1e-12 for step in range(steps)) or least == 0


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_epochs_are_permutations(size, count, seed):
    """Batch after batch, whatever their size, each run of `count` examples holds all of them."""
    steps = -(-3 * count // size)
    order = [i for step in range(steps) for i in epoch_indices(step, size, count, seed)]
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_differ_from_each_other_and_between_seeds():
    first, second = epoch_indices(0, 30, 30, 0), epoch_indices(1, 30, 30, 0)
    assert first != second and first != epoch_indices(0, 30, 30, 1) and first == epoch_indices(0, 30, 30, 0)


def test_groups_have_their_own_learning_rates(tmp_path):
    model, start = Net(), Net()
    groups = [
        {"params": model.first.parameters(), "lr_scale": 0.0},
        {"params": [*model.last.parameters(), model.unused]},
    ]
    train(model, loss, batches, config(steps=3, ema=0), tmp_path, groups=groups)
    assert torch.equal(model.first.weight, start.first.weight) and not torch.equal(model.last.weight, start.last.weight)


def test_frozen_parameters_stay(tmp_path):
    model, start = Net(), Net()
    model.first.requires_grad_(False)
    train(model, loss, batches, config(steps=5), tmp_path)
    assert torch.equal(model.first.weight, start.first.weight) and not torch.equal(model.last.weight, start.last.weight)


def test_the_callers_generators_are_left_alone(tmp_path):
    model, wanted = Net(), []
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(model, lambda m, b: wanted.append(torch.rand(1)) or loss(m, b), batches, config(steps=4), tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and len({float(value) for value in wanted}) == 4


def test_validation_sees_the_average_and_training_goes_on_with_its_own(tmp_path):
    """With and without looking, the weights are the same; what is looked at is ema.safetensors of that step."""
    seen = {}

    def look(model):
        assert not model.training and not torch.is_grad_enabled()
        seen[int(model.calls)] = model.first.weight.clone()
        return {"x": 1}

    train(Net(), loss, batches, config(validate_every=10, keep=9), tmp_path / "a", validate=look)
    train(Net(), loss, batches, config(keep=9), tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    for step in (10, 20):
        assert torch.equal(seen[step], weights(tmp_path / "a", step)["ema.first.weight"])
        assert not torch.equal(seen[step], weights(tmp_path / "a", step)["model.first.weight"])


def test_tied_weights_are_averaged_once(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__(0.0)
            self.again = self.first

    model, plain = Tied(), Net(0.0)
    train(model, loss, batches, config(steps=20), tmp_path / "a", validate=lambda m: {})
    train(plain, loss, batches, config(steps=20), tmp_path / "b", validate=lambda m: {})
    assert torch.equal(model.first.weight, plain.first.weight) and model.again.weight is model.first.weight


def test_half_precision_learns_and_says_so(tmp_path, whole):
    kinds = set()

    def noting(model, batch):
        model.last.register_forward_hook(lambda module, given, out: kinds.add(out.dtype))
        return loss(model, batch)

    trained = train(Net(), noting, batches, config(precision="bf16"), tmp_path)
    assert kinds == {torch.bfloat16}
    assert trained.history[-1]["loss"] == pytest.approx(whole[1].history[-1]["loss"], rel=0.05)
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path).values())


def test_an_accelerator_of_the_callers_is_left_alone(tmp_path):
    from accelerate import Accelerator

    own = Accelerator(cpu=True)
    train(Net(), loss, batches, config(steps=2, precision="bf16"), tmp_path)
    assert own.mixed_precision == "no" and own.device.type == "cpu" and own.num_processes == 1


# -- stopping and going on --------------------------------------------------------------------------------------------


def test_a_run_that_on_checkpoint_ends_is_continued_to_the_same_bytes(tmp_path, whole):
    stopped = train(
        Net(),
        loss,
        batches,
        config(),
        tmp_path,
        validate=lambda m: {"seen": m.calls},
        on_checkpoint=lambda path: path.name.endswith("20"),
    )
    assert (stopped.step, stopped.stopped) == (20, True)
    model = Net()
    trained = train(model, loss, batches, config(), tmp_path, validate=lambda m: {"seen": m.calls})
    assert bytes_of(tmp_path) == bytes_of(whole[0]) and trained.history == whole[1].history
    assert (tmp_path / "log.csv").read_text() == (whole[0] / "log.csv").read_text()
    assert torch.equal(model.first.weight, weights(tmp_path)["ema.first.weight"])


def test_a_finished_run_is_given_back_without_a_step(whole):
    model = Net()
    trained = train(model, lambda *_: 1 / 0, lambda *_: 1 / 0, config(), whole[0])
    assert trained.step == 40 and trained.history == whole[1].history
    assert torch.equal(model.last.weight, weights(whole[0])["ema.last.weight"])


SCRIPT = """
import os, sys, time
import pathlib
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_training import *
def slowly(step, rank, world):
    time.sleep({pause})
    return batches(step, rank, world)
changes = {changes!r}
net = Net(changes.pop("dropout", 0.1))
train(net, loss, slowly, config(**changes), {folder!r}, validate=lambda model: {{"seen": model.calls}})
"""


REFUSED = """
try:
    train(net, loss, batches, config(batch_size=7), {folder!r})
except ConfigError as error:
    print(error, flush=True)
# Everything is done and said. Torch 2.14 aborts now and then (1 of 14 on a busy machine) while the interpreter is torn
# down, also after destroy_process_group: without that, the exit code speaks of what came before.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def launch(folder, pause=0.0, processes=1, **changes):
    code = SCRIPT.format(tests=str(Path(__file__).parent), pause=pause, folder=str(folder), changes=changes)
    code += REFUSED.format(folder=str(folder)) if processes > 1 else ""
    script = Path(folder).with_suffix(".py")
    script.write_text(code)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_runs_end_with_the_bytes_of_one_that_was_not(tmp_path, whole):
    """SIGKILL at random moments, among them while checkpoints are written, until a run gets through."""
    folder, chance, kills = tmp_path / "run", random.Random(0), 0
    changes = {"checkpoint_every": 2}
    for _ in range(3):
        process = launch(folder, pause=0.02, **changes)
        deadline = time.monotonic() + 60
        before = len(list(folder.glob("step-*"))) and max(folder.glob("step-????????"))
        while time.monotonic() < deadline and process.poll() is None:
            now = list(folder.glob("step-????????"))
            if now and max(now) != before:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills >= 2
    train(Net(), loss, batches, config(**changes), folder, validate=lambda model: {"seen": model.calls})
    assert bytes_of(folder) == bytes_of(whole[0])
    steps = [int(row["step"]) for row in rows(folder)]
    assert steps == sorted(set(range(5, 41, 5)) | set(range(2, 41, 2)))
    assert not list(folder.glob("*.part"))


def test_a_keyboard_interrupt_leaves_whole_checkpoints(tmp_path, whole):
    def interrupted(step, rank, world):
        if step == 27:
            raise KeyboardInterrupt
        return batches(step, rank, world)

    with pytest.raises(KeyboardInterrupt):
        train(Net(), loss, interrupted, config(), tmp_path, validate=lambda model: {"seen": model.calls})
    assert max(tmp_path.glob("step-*")).name == "step-00000020" and not list(tmp_path.glob("*.part"))
    train(Net(), loss, batches, config(), tmp_path, validate=lambda model: {"seen": model.calls})
    assert bytes_of(tmp_path) == bytes_of(whole[0])


def test_two_processes_give_what_one_gives(tmp_path):
    """Real ones, through gloo; and a batch that they cannot share is refused."""
    process = launch(tmp_path / "two", processes=2, dropout=0.0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("batch_size 7 does not divide among 2 processes") == 2
    train(Net(0.0), loss, batches, config(), tmp_path / "one", validate=lambda model: {"seen": model.calls})
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert (one["model.first.weight"] - Net().first.weight).abs().max() > 0.01
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
        assert (a["lr"], a["seen"]) == (b["lr"], b["seen"])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["loss", "gradient"])
def test_nan_stops_and_names_the_last_good_checkpoint(tmp_path, at):
    calls = iter(range(100))

    def breaking(model, batch):
        values = loss(model, batch)
        if next(calls) == 16:  # the 17th step, between rows of the log
            nan = values["loss"] * math.nan if at == "loss" else torch.sqrt(model.unused * 0).sum()
            values["loss"] = nan + values["loss"]
        return values

    with pytest.raises(NonFiniteError, match=r"step 17: (loss|grad_norm).*step-00000010'"):
        train(Net(), breaking, batches, config(), tmp_path)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000010"]
    assert all(value.isfinite().all() for value in weights(tmp_path, 10).values())
    trained = train(Net(), loss, batches, config(), tmp_path)  # without the fault it goes on
    assert trained.step == 40


def test_other_settings_are_refused_by_name(whole):
    with pytest.raises(ConfigError, match=r"steps 40 \(you ask for 50\)"):
        train(Net(), loss, batches, config(steps=50), whole[0])
    with pytest.raises(ConfigError, match=r"learning_rate .*, seed 0 \(you ask for 1\).*, no data \(you ask for 'b'\)"):
        train(Net(), loss, batches, config(learning_rate=1e-3, seed=1), whole[0], settings={"data": "b"})


def test_settings_that_are_no_plain_values_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="plain JSON"):
        train(Net(), loss, batches, config(), tmp_path, settings={"data": object()})


def test_settings_that_change_no_weight_may_differ(whole):
    trained = train(Net(), loss, batches, config(log_every=1, checkpoint_every=3, keep=1), whole[0])
    assert trained.step == 40


def test_the_checkpoint_of_another_model_is_refused(whole):
    class Other(Net):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(16, 9)

    with pytest.raises(WeightsError, match=r"step-00000040.*belongs to another model"):
        train(Other(), loss, batches, config(), whole[0])


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_and_deleting_it_helps(tmp_path, name):
    train(Net(), loss, batches, config(steps=20, log_every=20), tmp_path)
    before = bytes_of(tmp_path, 20)
    file = tmp_path / "step-00000020" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(WeightsError, match=r"step-00000020.*damaged.*delete it"):
        train(Net(), loss, batches, config(steps=20, log_every=20), tmp_path)
    for path in file.parent.iterdir():
        path.unlink()
    file.parent.rmdir()
    train(Net(), loss, batches, config(steps=20, log_every=20), tmp_path)
    assert bytes_of(tmp_path, 20) == before


def _nan(tensors):
    next(value for name, value in tensors.items() if value.is_floating_point()).view(-1)[0] = math.nan


def _broadcast(tensors):
    """One number where there were many, which copy_ would spread over all of them."""
    name = next(name for name, value in tensors.items() if value.numel() > 1)
    tensors[name] = tensors[name].flatten()[:1].clone()


@pytest.mark.parametrize("change", [_nan, _broadcast])
@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_checkpoint_with_other_values_is_refused(tmp_path, whole, name, change):
    shutil.copytree(whole[0], tmp_path / "run")
    file = tmp_path / "run" / "step-00000040" / f"{name}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"step-00000040.*damaged"):
        train(Net(), loss, batches, config(), tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[]", "{}", '{"step": 40, "config": 1, "settings": {}}', '{"step": 1e999}', '{"step": 30}'],
)
def test_a_state_of_something_else_is_refused(tmp_path, whole, content):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "step-00000040" / "state.json").write_text(content)
    with pytest.raises(WeightsError, match=r"step-00000040.*damaged"):
        train(Net(), loss, batches, config(), tmp_path / "run")


def test_a_damaged_log_loses_only_its_damaged_rows(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    log = tmp_path / "run" / "log.csv"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], b"\xb2,\xff,x,y,z\n", lines[3].replace(b".", b"x"), *lines[4:]]))
    done = train(Net(), loss, batches, config(), tmp_path / "run")
    assert done.history == [row for i, row in enumerate(whole[1].history) if i != 2]


def test_half_a_row_of_the_log_is_cut(tmp_path, whole):
    options = {"validate": lambda model: {"seen": model.calls}}
    train(Net(), loss, batches, config(), tmp_path, on_checkpoint=lambda path: path.name.endswith("20"), **options)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("25,0.001,3,4,5,\n1")  # a row after the checkpoint, and the first digit of the next
    train(Net(), loss, batches, config(), tmp_path, **options)
    assert (tmp_path / "log.csv").read_text() == (whole[0] / "log.csv").read_text()


def test_one_run_a_folder(tmp_path):
    """A lock that dies with its process."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    hold += "; input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process trains"):
            train(Net(), loss, batches, config(), tmp_path)
        process.kill()
    assert train(Net(), loss, batches, config(), tmp_path).step == 40


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    train(Net(), loss, batches, config(), tmp_path, on_checkpoint=lambda path: True)
    with monkeypatch.context() as patch:
        patch.setattr("dvt.training.checkpoint.save_file", full)
        with pytest.raises(WeightsError, match="No space left"):
            train(Net(), loss, batches, config(), tmp_path)
    assert train(Net(), loss, batches, config(), tmp_path).step == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"min_learning_rate": 1.0},
        {"warmup": 1.0},
        {"ema": 1.0},
        {"clip": -1.0},
        {"betas": (0.9, 1.0)},
        {"precision": "fp8"},
        {"trackers": ("mlflow",)},
        {"seed": -1},
        {"keep": 0},
    ],
)
def test_settings_outside_their_range_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config(**changes)


def test_parameters_outside_the_groups_are_refused(tmp_path):
    model = Net()
    with pytest.raises(ConfigError, match=r"3 parameters.*unused.*last.weight"):
        train(model, loss, batches, config(), tmp_path, groups=[{"params": model.first.parameters()}])
    with pytest.raises(ConfigError, match="two groups"):
        groups = [{"params": model.parameters()}, {"params": [model.unused]}]
        train(model, loss, batches, config(), tmp_path, groups=groups)
    with pytest.raises(ConfigError, match="no parameter"):
        train(model.requires_grad_(False), loss, batches, config(), tmp_path)


def test_a_tracker_that_is_not_installed_is_named(tmp_path):

    missing = next((name for name in ("tensorboard", "wandb") if not _installed(name)), None)
    if missing is None:
        pytest.skip("both trackers are installed")
    with pytest.raises(ConfigError, match=f"{missing} is not installed"):
        train(Net(), loss, batches, config(trackers=(missing,)), tmp_path)


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_tensorboard_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    train(Net(), loss, batches, config(trackers=("tensorboard",)), tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_state_is_plain_json_and_nothing_is_pickled(whole):
    folder = whole[0] / "step-00000040"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / "state.json").read_text())["step"] == 40


def test_a_run_removes_what_killed_processes_left_beside_files_that_are_whole(tmp_path):
    """Such a file is not written again, so nothing else would remove its unfinished name."""
    folder = tmp_path / "run"
    script = "import os, pathlib; from dvt.files import new_part; print(new_part(pathlib.Path(os.environ['OUT'])).name)"
    for name in ("held_out.safetensors", "log.csv"):
        environment = {**os.environ, "OUT": str(folder / name)}
        folder.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
    living = new_part(folder / "other.safetensors")
    (folder / "my.part").touch()
    train(Net(), loss, batches, TrainingConfig(steps=1, batch_size=8, learning_rate=0.1), folder)
    assert sorted(path.name for path in folder.glob("*.part")) == sorted(("my.part", living.name))
