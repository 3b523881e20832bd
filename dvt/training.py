"""The one training loop: AdamW, warm-up and cosine, averaged weights, checkpoints that a killed run continues exactly.

It runs through accelerate: started by ``accelerate launch`` or ``torchrun`` it takes as many processes as there are,
and the global batch, the schedule and the order of the data stay what they are with one. A run's folder holds

    step-00001000/   model.safetensors, ema.safetensors, optimizer.safetensors, state.json: whole, or not there
    log.csv          a row each `log_every` steps: step, lr, losses, and what `validate` measured

Nothing in a step depends on the steps before it, except through the weights and the optimizer's moments: batches are a
function of the step, and so is the seed of whatever draws random numbers inside the model. So a run that is killed
at any moment ends with the weights, bit by bit, that it would have had (on one device, with the same processes).
"""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvt.errors import ConfigError, NonFiniteError, WeightsError
from dvt.files import whole_file

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

Batches = Callable[[int, int, int], Any]
Loss = Callable[[nn.Module, Any], Mapping[str, Tensor]]
Row = dict[str, float]

_AHEAD = 2  # batches made while the model works on another
_NAME = re.compile(r"step-(\d{8,})")
# Changing these changes no weight, so a run may be continued with others.
_FREE = ("checkpoint_every", "log_every", "validate_every", "keep", "trackers")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; everything is counted in optimizer steps.

    Args:
        steps: the length of the whole run.
        batch_size: examples a step, over all processes together.
        learning_rate: the highest, at the end of the warm-up; at this batch size.
        min_learning_rate: at the last step.
        warmup: share of the steps, in [0, 1), during which the learning rate rises linearly.
        weight_decay: decoupled (AdamW); only on parameters with two or more dimensions.
        betas: decay of the first and second moment.
        clip: largest L2 norm of the gradient; 0 for no limit.
        ema: decay of the averaged weights, in [0, 1); 0 for none. The first steps forget faster: the decay
            of step n is at most (1 + n) / (10 + n).
        precision: "no" for float32, "bf16" or "fp16" for autocast; fp16 needs a GPU.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        log_every: steps between rows of the log; their losses are means since the row before.
        validate_every: steps between validations; 0 for only the last step, which always is one.
        keep: checkpoints that stay, the newest ones.
        seed: of everything random inside the model; the data's order is the caller's.
        trackers: "tensorboard", "wandb", both or none, beside log.csv.

    Raises:
        ConfigError: a value is outside its range.

    >>> config = TrainingConfig(steps=100, batch_size=8, learning_rate=1e-3, warmup=0.1)
    >>> [round(config.learning_rate_at(step), 6) for step in (0, 9, 99)]
    [0.0001, 0.001, 1e-06]
    """

    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float = 1e-6
    warmup: float = 0.15
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_every: int = 1000
    log_every: int = 10
    validate_every: int = 500
    keep: int = 2
    seed: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("validate_every", "weight_decay", "clip", "seed"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0")
        for name in ("warmup", "ema"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two, in [0, 1)")
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0")
        least = self.min_learning_rate
        _require(0 <= least <= self.learning_rate, "min_learning_rate", least, f"0 to {self.learning_rate}")
        _require(self.precision in ("no", "bf16", "fp16"), "precision", self.precision, "no, bf16 or fp16")
        known = set(self.trackers) <= {"tensorboard", "wandb"}
        _require(known, "trackers", self.trackers, "some of tensorboard and wandb")

    @classmethod
    def of(cls, job: Any, **changes: Any) -> TrainingConfig:
        """The settings of a job's own dataclass that have the same names, with changes."""
        names = {each.name for each in fields(cls)} & {each.name for each in fields(job)}
        return cls(**{name: getattr(job, name) for name in names} | changes)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then a cosine down to the last step."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising + 1) / (self.steps - rising)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class Trained:
    """The end of a run.

    Args:
        step: steps done, over all continuations.
        history: the rows of log.csv.
        checkpoint: the last one's folder.
        stopped: `on_checkpoint` ended the run before its last step.
    """

    step: int
    history: list[Row]
    checkpoint: Path
    stopped: bool


def epoch_indices(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """The examples of a step: permutations of all of them one after the other, a pure function of its arguments.

    Args:
        step: counted from 0.
        batch_size: of the global batch; it may be larger than `count`, and batches run over the ends of epochs.
        count: of the examples.
        seed: of the permutations.

    >>> sorted(epoch_indices(0, 3, 6, seed=1) + epoch_indices(1, 3, 6, seed=1))
    [0, 1, 2, 3, 4, 5]
    """
    start = step * batch_size
    return [int(_permutation(count, seed, i // count)[i % count]) for i in range(start, start + batch_size)]


def hold_out(sha256s: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on and of those held out; files of equal bytes are on one side.

    Args:
        sha256s: of each image's file.
        count: of different files to hold out.
        seed: another seed holds out others.

    >>> hold_out(["a", "b", "c", "b"], 1, seed=0)
    ([0, 1, 3], [2])
    """
    distinct = sorted(set(sha256s))
    held = {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for i, sha256 in enumerate(sha256s):
        sides[sha256 in held].append(i)
    return sides


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def train(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    config: TrainingConfig,
    folder: str | Path,
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_checkpoint: Callable[[Path], bool | None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Trains a model in place, or continues the run that the folder holds; afterwards the model is in eval mode.

    With one process it runs on the device of the model's parameters; with several, on those that accelerate gives.

    Args:
        model: afterwards it holds the averaged weights if ``config.ema`` is above 0, else the last ones.
        loss: (model, batch) to scalars by name, each a mean over the batch, the same names every time; the one
            called "loss" is minimised. Any method of the model may be called.
        batches: (step, rank, world) to this process's equal share of that step's global batch: nested dicts,
            lists and tuples of tensors, or anything with a ``to`` method. A pure function, called in a thread.
        config: how to train.
        folder: made if it is missing; with several machines, one that all of them see.
        groups: dicts of "params" and, if wanted, "lr_scale" (a factor on the learning rate) and "weight_decay";
            together they hold each parameter that wants a gradient once. None for all of them at 1.
        validate: model in eval mode, without gradients or autocast, with the averaged weights, to numbers by name; it
            runs in the main process.
        on_checkpoint: called in the main process with each new checkpoint's folder; True ends the run there.
        progress: called with ("train", steps done, steps).
        settings: whatever else changes the numbers (data, loss, ...), as plain JSON values; a run is only continued
            with equal ones.

    Raises:
        ConfigError: a folder with a run of another configuration, in use, or not writable; a batch size that the
            processes cannot share; parameters missing from the groups.
        NonFiniteError: a loss or gradient is NaN or infinite; the message names the step and the last checkpoint.
        WeightsError: a checkpoint is damaged or belongs to another model, or cannot be written.
    """
    with ExitStack() as stack:
        accelerator = stack.enter_context(_accelerator(config, model, Path(folder)))
        if accelerator.is_main_process:
            stack.enter_context(_lock(Path(folder)))
        accelerator.wait_for_everyone()
        # Not accelerate's end_training, which would also end the group of processes.
        stack.callback(lambda: [tracker.finish() for tracker in accelerator.trackers])
        run = _Run(accelerator, model, loss, config, Path(folder), groups, settings or {})
        cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(cuda))
        return run.run(batches, validate, on_checkpoint, progress or (lambda what, done, total: None))


class _Run:
    """The state of one run, and what happens to it."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss: Loss,
        config: TrainingConfig,
        folder: Path,
        groups: Sequence[Mapping[str, Any]] | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.accelerator, self.config, self.folder = accelerator, config, folder
        self.model = model.to(accelerator.device)
        optimizer = torch.optim.AdamW(_groups(model, groups, config), lr=config.learning_rate, betas=config.betas)
        self.average = _Average(model, config.ema)
        self.identity = _identity(config, settings)
        self.last = _latest(folder)
        self.step = self._resume(optimizer, self.last) if self.last else 0
        if self._agreed(self.step) != self.step:
            raise ConfigError(f"the processes find different runs in {str(folder)!r}; give a folder that all share")
        self.log = _Log(folder / "log.csv", self.step, accelerator.is_main_process)
        self.pending: list[dict[str, Tensor]] = []
        self.objective = accelerator.prepare_model(_Objective(model, loss), device_placement=False)
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if config.trackers and self.step < config.steps:
            accelerator.init_trackers("dvt", _flat(self.identity))

    def run(self, batches, validate, on_checkpoint, progress) -> Trained:
        config, main, stopped = self.config, self.accelerator.is_main_process, False
        if main:
            _prune(self.folder, config.keep)  # a process that was killed may have left one too many
        self.model.train()
        with self._prefetch(batches) as queue:
            while self.step < config.steps and not stopped:
                self._advance(queue())
                if main:
                    progress("train", self.step, config.steps)
                validating = validate is not None and self._due(config.validate_every)
                saving = self._due(config.checkpoint_every)
                if validating or saving or self._due(config.log_every):
                    row = self._summary()
                    if validating:
                        row.update(self._validated(validate))
                    self._report(row)
                if saving:
                    self._save()
                    stopped = self._agreed(bool(main and on_checkpoint and on_checkpoint(self.last)))
        stopped = stopped and self.step < config.steps
        self.average.copy_to(self.model)
        self.model.eval()
        assert self.last is not None  # the last step always saves
        return Trained(self.step, self.log.rows, self.last, stopped)

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _advance(self, batch: Any) -> None:
        _seed((self.config.seed, self.step, self.accelerator.process_index), self.accelerator.device)
        rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        losses = self.objective(batch)
        self.accelerator.backward(losses["loss"])
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model, self.step)
        values = {name: value.detach().float() for name, value in losses.items()}
        if self.accelerator.scaler is None:  # which meets infinite gradients while it looks for its scale
            values["grad_norm"] = norm.detach().float()
        self.pending.append(values)
        self.step += 1

    def _summary(self) -> Row:
        """Means since the last row, once all of them are known to be finite: only here the GPU is waited for."""
        names = list(self.pending[0])
        table = torch.stack([torch.stack([values[name] for name in names]) for values in self.pending])
        table = self.accelerator.reduce(table, "mean").cpu()
        first, self.pending = self.step - len(self.pending), []
        if not table.isfinite().all():
            self._give_up(names, table, first)
        row = {"step": self.step, "lr": self.config.learning_rate_at(self.step - 1)}
        return {**row, **dict(zip(names, table.double().mean(0).tolist(), strict=True))}

    def _report(self, row: Row) -> None:
        self.log.append(row)
        if self.config.trackers:
            self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=self.step)
        log.info("%s", "  ".join(f"{name} {value:.5g}" for name, value in row.items()))

    def _give_up(self, names: list[str], table: Tensor, first: int) -> None:
        row = int((~table.isfinite()).any(1).nonzero()[0])
        bad = ", ".join(
            f"{name} is {value}"
            for name, value in zip(names, table[row].tolist(), strict=True)
            if not math.isfinite(value)
        )
        kept = f"the last good checkpoint is {str(self.last)!r}" if self.last else "there is no checkpoint yet"
        raise NonFiniteError(
            f"training stopped at step {first + row + 1}: {bad}; {kept}. Lower the learning rate or clip, check the "
            "data, or train without reduced precision"
        )

    def _validated(self, validate: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
        measured: dict[str, float] = {}
        if self.accelerator.is_main_process:
            self.model.eval()
            with torch.no_grad(), self.average.inside(self.model):
                measured = {name: float(value) for name, value in validate(self.model).items()}
            self.model.train()
        return self._agreed(measured)

    def _agreed(self, value: Any) -> Any:
        """The main process's value, in all of them."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    @contextmanager
    def _prefetch(self, batches: Batches) -> Iterator[Callable[[], Any]]:
        """A function that gives one batch after the other, while a thread makes the next ones."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        steps = iter(range(self.step, self.config.steps))
        queue: deque[Future] = deque()

        def make(step: int) -> Any:
            return _on_device(batches(step, rank, world), device)

        def following() -> Any:
            if (step := next(steps, None)) is not None:
                queue.append(thread.submit(make, step))
            return queue.popleft().result()

        with ThreadPoolExecutor(1, "batches") as thread:
            try:
                queue.extend(thread.submit(make, step) for step in islice(steps, _AHEAD))
                yield following
            finally:
                thread.shutdown(wait=False, cancel_futures=True)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        target = self.folder / f"step-{self.step:08}"
        if self.accelerator.is_main_process:
            self.log.sync()
            state = self.optimizer.state_dict()["state"]
            moments = {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}
            scaler = self.accelerator.scaler
            about = {"step": self.step, **self.identity, "scaler": None if scaler is None else scaler.state_dict()}
            tensors = {"model": self.model.state_dict(), "ema": self.average.values, "optimizer": moments}
            try:
                _write(target, tensors, about)
                _prune(self.folder, self.config.keep)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(target.with_name(f"{target.name}.part"), ignore_errors=True)
                raise WeightsError(
                    f"cannot write the checkpoint {str(target)!r}: {error}; the ones before it are whole. Make room "
                    "and run the same command again"
                ) from error
        self.accelerator.wait_for_everyone()
        self.last = target

    def _resume(self, optimizer: torch.optim.Optimizer, checkpoint: Path) -> int:
        try:
            about = json.loads((checkpoint / "state.json").read_text())
            step = about["step"]
            if checkpoint.name != f"step-{step:08}" or not all(isinstance(about[k], dict) for k in self.identity):
                raise ValueError("its state.json belongs to something else")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(_damaged(checkpoint, error)) from error
        _compare(about, self.identity, checkpoint)
        try:
            tensors = {name: load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
            _check_same(tensors["model"], self.model.state_dict())
            _check_same(tensors["ema"], self.average.values)
            self.model.load_state_dict(tensors["model"])
            _copy(tensors["ema"], self.average.values)
            _load_moments(optimizer, tensors["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(about["scaler"])
        except Exception as error:  # safetensors raises nearly anything on damaged bytes
            raise WeightsError(_damaged(checkpoint, error)) from error
        log.info("continuing from %s", checkpoint)
        return step


class _Objective(nn.Module):
    """Loss and model as one module, so that what accelerate wraps (autocast, gradient averaging) holds for both."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return dict(self.loss(self.model, batch))


class _Average:
    """The exponential moving average of everything in a model's state dict, or nothing at decay 0."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict() if self.values else {}
        for name, value in self.values.items():
            if value.is_floating_point():
                value.lerp_(state[name], weight)
            else:
                value.copy_(state[name])

    def copy_to(self, model: nn.Module) -> None:
        _copy(self.values, model.state_dict())

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside the block, and its own again after it."""
        kept = {name: value.clone() for name, value in model.state_dict().items()} if self.values else {}
        try:
            self.copy_to(model)
            yield
        finally:
            _copy(kept, model.state_dict())


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        to[name].copy_(value)


class _Log:
    """log.csv: rows up to the step that a run continues from are kept, later ones cut."""

    def __init__(self, path: Path, step: int, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.rows = [row for row in _read_rows(path) if row["step"] <= step] if step else []
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if writes:
            self._rewrite()

    def append(self, row: Row) -> None:
        self.rows.append(row)
        if not self.writes:
            return
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            try:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(row)
            except OSError as error:
                raise ConfigError(
                    f"cannot write {str(self.path)!r}: {error.strerror or error}; make room and run the same command "
                    "again, which goes on from the last checkpoint"
                ) from error

    def sync(self) -> None:
        """Rows before a checkpoint must be on the disk before it is."""
        _sync(self.path)

    def _rewrite(self) -> None:
        with whole_file(self.path) as part:
            with open(part, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)
            _sync(part)


def _read_rows(path: Path) -> list[Row]:
    """The whole rows of a log; a process that was killed may leave half a row at the end."""
    if not path.is_file():
        return []
    try:
        with open(path, newline="", errors="replace") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, csv.Error) as error:
        raise WeightsError(f"cannot read the log {str(path)!r}: {error}; delete it to go on without it") from error
    rows: list[Row] = []
    for line in lines:
        if header[:1] == ["step"] and len(line) == len(header) and line[0]:
            with suppress(ValueError):
                pairs = zip(header, line, strict=True)
                rows.append({k: int(v) if k == "step" else float(v) for k, v in pairs if v})
    return rows


# -- pieces -----------------------------------------------------------------------------------------------------------


@contextmanager
def _accelerator(config: TrainingConfig, model: nn.Module, folder: Path) -> Iterator[Accelerator]:
    """accelerate's for this run. Its settings are a process's, for ever; so they are put back for the next run."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState, PartialState

    missing = [name for name in config.trackers if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the tracker {missing[0]} is not installed; `pip install {missing[0]}` or leave it out")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # accelerate would take a GPU wherever there is one; launched as several processes it decides.
    cpu = not torch.cuda.is_available() if "LOCAL_RANK" in os.environ else device.type == "cpu"
    if config.precision == "fp16" and cpu:
        raise ConfigError("precision fp16 needs a GPU, and this run is on the CPU; use bf16 or no")
    states = [AcceleratorState, GradientState]
    if not torch.distributed.is_initialized():
        states.append(PartialState)
    kept = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=cpu,
            log_with=list(config.trackers) or None,
            project_dir=str(folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if accelerator.num_processes == 1 and device.type == "cuda":
            accelerator.state.device = device
        if config.batch_size % accelerator.num_processes:
            raise ConfigError(
                f"batch_size {config.batch_size} does not divide among {accelerator.num_processes} processes; "
                "choose a multiple"
            )
        yield accelerator
    finally:
        for state, before in zip(states, kept, strict=True):
            if not (state is PartialState and torch.distributed.is_initialized()):
                state._shared_state.clear()
                state._shared_state.update(before)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One run a folder; a POSIX lock dies with its process. What a killed run left half written is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "run.lock", "a")  # noqa: SIM115  closed below
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {str(folder)!r}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(f"another process trains in {str(folder)!r}; wait, or choose another folder") from error
        for part in folder.glob("step-*.part"):
            shutil.rmtree(part, ignore_errors=True)
        yield


def _groups(
    model: nn.Module, groups: Sequence[Mapping[str, Any]] | None, config: TrainingConfig
) -> list[dict[str, Any]]:
    """AdamW's groups: each given one, split into what decays and what does not."""
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    given = groups if groups is not None else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    found: list[dict[str, Any]] = []
    for group in given:
        parameters = [p for p in group["params"] if p.requires_grad]
        decay, scale = group.get("weight_decay", config.weight_decay), group.get("lr_scale", 1.0)
        for chosen, value in (
            ([p for p in parameters if p.ndim > 1], decay),
            ([p for p in parameters if p.ndim < 2], 0.0),
        ):
            if chosen:
                found.append({"params": chosen, "weight_decay": value, "lr_scale": scale})
    held = [id(p) for group in found for p in group["params"]]
    if missing := [name for key, name in trainable.items() if key not in held]:
        raise ConfigError(f"{len(missing)} parameters want a gradient but are in no group: {', '.join(missing[:4])}")
    if not held or len(set(held)) < len(held):
        raise ConfigError("no parameter wants a gradient" if not held else "a parameter is in two groups")
    return found


def _identity(config: TrainingConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FREE}
    try:
        return json.loads(json.dumps({"config": plain, "settings": dict(settings)}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the settings of a run must be plain JSON values: {error}") from error


def _compare(about: Mapping[str, Any], identity: Mapping[str, Any], checkpoint: Path) -> None:
    theirs, mine = ({**a.get("config", {}), **a.get("settings", {})} for a in (about, identity))
    names = sorted(theirs.keys() | mine.keys())
    changed = [
        f"{name} {theirs.get(name, 'unset')!r} there, {mine.get(name, 'unset')!r} here"
        for name in names
        if theirs.get(name, "unset") != mine.get(name, "unset")
    ]
    if changed:
        raise ConfigError(
            f"{str(checkpoint.parent)!r} holds a run with other settings ({', '.join(changed)}); continue it with the "
            "same ones, or choose another folder"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    values = {**identity["config"], **identity["settings"]}
    return {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in values.items()}


def _seed(entropy: tuple[int, int, int], device: torch.device) -> None:
    """Random numbers of a step inside the model; the caller's generators were put aside."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _on_device(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import recursively_apply, send_to_device

    if device.type == "cuda":
        batch = recursively_apply(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(), batch)
    return send_to_device(batch, device, non_blocking=True)


def _write(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
    """A checkpoint's folder, on the disk under its name only when all of it is."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, values in tensors.items():
        # Copies, because safetensors refuses tensors that share memory.
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in values.items()}, part / f"{name}.safetensors")
    (part / "state.json").write_text(json.dumps(about, indent=1))
    for file in (*part.iterdir(), part):
        _sync(file)
    os.replace(part, target)
    _sync(target.parent)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def _latest(folder: Path) -> Path | None:
    return next(reversed(_checkpoints(folder)), None)


def _prune(folder: Path, keep: int) -> None:
    for old in _checkpoints(folder)[:-keep]:
        gone = old.with_name(f"{old.name}.part")  # renamed first: half a folder must not look like a checkpoint
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _load_moments(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    # Numbered as torch does it; some have no moments, because they never had a gradient.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        parameter, step = parameters[index], torch.zeros(())
        _check_same(values, {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_same(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """That tensors have the names, shapes and types of others, and are finite."""
    if values.keys() != like.keys():
        raise ValueError(f"it holds {sorted(values)[:4]} instead of {sorted(like)[:4]}")
    for name, value in values.items():
        if (value.shape, value.dtype) != (like[name].shape, like[name].dtype):
            raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype} instead of {tuple(like[name].shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def _damaged(checkpoint: Path, error: Exception) -> str:
    return (
        f"the checkpoint {str(checkpoint)!r} is damaged, or of another model ({error}); delete it to go on from the "
        "one before"
    )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
