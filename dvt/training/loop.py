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

import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dvt.errors import ConfigError, NonFiniteError, WeightsError
from dvt.training.average import _Average, _copy
from dvt.training.checkpoint import (
    _check_same,
    _compare,
    _damaged,
    _flat,
    _identity,
    _latest,
    _load_moments,
    _lock,
    _prune,
    _write,
)
from dvt.training.config import TrainingConfig
from dvt.training.log import Row, _Log

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


Batches = Callable[[int, int, int], Any]


Loss = Callable[[nn.Module, Any], Mapping[str, Tensor]]


_AHEAD = 2  # batches made while the model works on another


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
