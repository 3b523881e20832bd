"""Run the training loop: optimizer steps, with rows of the log and checkpoints in between.

:mod:`dvt.training` describes the guarantees of a run.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dvt.devices import random_state_kept
from dvt.errors import ConfigError, NonFiniteError, WeightsError
from dvt.progress import Progress, silent
from dvt.training.average import WeightAverage, copy_values
from dvt.training.checkpoint import (
    check_identity,
    check_same,
    damaged,
    flat_identity,
    latest_checkpoint,
    locked_folder,
    prune_checkpoints,
    read_about,
    read_tensors,
    run_identity,
    write_checkpoint,
)
from dvt.training.config import TrainingConfig
from dvt.training.log import LogRow, RunLog
from dvt.training.optimizer import load_moments, parameter_groups
from dvt.training.processes import accelerator_for, seed_step, to_device

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

#: A function of (step, rank, world) that returns this process's share of the step's global batch.
Batches = Callable[[int, int, int], Any]
#: A function of (model, batch) that returns scalars by name, of which "loss" is minimised.
LossFunction = Callable[[nn.Module, Any], Mapping[str, Tensor]]

_BATCHES_AHEAD = 2  # batches prepared while the model works on another


@dataclass(frozen=True)
class Trained:
    """Hold the end of a run.

    Args:
        step: steps done, over all continuations.
        history: the rows of log.csv.
        checkpoint: folder of the last checkpoint.
        stopped: True if `on_checkpoint` ended the run before its last step.
    """

    step: int
    history: list[LogRow]
    checkpoint: Path
    stopped: bool


def train(
    model: nn.Module,
    loss: LossFunction,
    batches: Batches,
    config: TrainingConfig,
    folder: str | Path,
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_checkpoint: Callable[[Path], bool | None] | None = None,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Train a model in place, or continue the run that the folder holds; afterwards the model is in eval mode.

    A single process uses the device of the model's parameters; with several, accelerate assigns the devices.

    Args:
        model: the model; at the end it holds the averaged weights if ``config.ema`` is above 0, else the last ones.
        loss: a function of (model, batch) that returns scalars by name, each a mean over the batch, with the same names
            every time; the one called "loss" is minimised. It may call any method of the model.
        batches: a pure function of (step, rank, world) that returns this process's equal share of the step's global
            batch: nested dicts, lists and tuples of tensors, or anything with a ``to`` method. A thread calls it.
        config: settings of the training.
        folder: the run's folder, created if it is missing; several machines must share it.
        groups: dicts of "params" and, optionally, "lr_scale" (a factor of the learning rate) and "weight_decay";
            together they hold each parameter that requires a gradient once. None for one group with scale 1.
        validate: a function of the model that returns numbers by name; called in the main process with the averaged
            weights, in eval mode, without gradients or autocast.
        on_checkpoint: called in the main process with each new checkpoint's folder; if it returns True, the run ends.
        progress: called with ("train", steps done, steps).
        settings: all other settings that change the numbers (data, loss, ...), as plain JSON values; a run only
            continues if they are equal.

    Raises:
        ConfigError: the folder holds a run of another configuration, is in use, or cannot be written; the processes
            cannot share the batch size equally; or parameters are missing from the groups.
        NonFiniteError: a loss or gradient is NaN or infinite; the message names the step and the last checkpoint.
        WeightsError: a checkpoint is damaged or belongs to another model, or cannot be written.
    """
    with ExitStack() as stack:
        accelerator = stack.enter_context(accelerator_for(config, model, Path(folder)))
        if accelerator.is_main_process:
            stack.enter_context(locked_folder(Path(folder)))
        accelerator.wait_for_everyone()
        # Not accelerate's end_training, which would also end the process group.
        stack.callback(lambda: [tracker.finish() for tracker in accelerator.trackers])
        run = TrainingRun(accelerator, model, loss, config, Path(folder), groups, settings or {})
        stack.enter_context(random_state_kept(accelerator.device))  # each step seeds torch's generators
        return run.run(batches, validate, on_checkpoint, progress or silent)


class TrainingRun:
    """Hold the state of one run, and advance it by steps."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss: LossFunction,
        config: TrainingConfig,
        folder: Path,
        groups: Sequence[Mapping[str, Any]] | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.accelerator, self.config, self.folder = accelerator, config, folder
        self.model = model.to(accelerator.device)
        optimizer = torch.optim.AdamW(parameter_groups(model, groups, config), lr=config.peak_rate, betas=config.betas)
        self.average = WeightAverage(model, config.ema)
        self.identity = run_identity(config, settings)
        self.last = latest_checkpoint(folder)
        self.step = self._resume(optimizer, self.last) if self.last else 0
        if self._agreed(self.step) != self.step:
            raise ConfigError(f"the processes find different runs in {str(folder)!r}; give a folder that all share")
        self.log = RunLog(folder / "log.csv", self.step, accelerator.is_main_process)
        self.pending: list[dict[str, Tensor]] = []
        self.objective = accelerator.prepare_model(_LossModule(model, loss), device_placement=False)
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if config.trackers and self.step < config.steps:
            accelerator.init_trackers("dvt", flat_identity(self.identity))

    def run(
        self,
        batches: Batches,
        validate: Callable[[nn.Module], Mapping[str, float]] | None,
        on_checkpoint: Callable[[Path], bool | None] | None,
        progress: Progress,
    ) -> Trained:
        """Advance to the last step, or until `on_checkpoint` ends the run."""
        config, main, stopped = self.config, self.accelerator.is_main_process, False
        if main:
            prune_checkpoints(self.folder, config.keep)  # a killed process may have left one more
        self.model.train()
        with self._prefetch(batches) as next_batch:
            while self.step < config.steps and not stopped:
                self._advance(next_batch())
                if main:
                    progress("train", self.step, config.steps)
                saving = self._due(config.checkpoint_every)
                validating = validate if self._due(config.validate_every) else None
                if validating is not None or saving or self._due(config.log_every):
                    row = self._summary()
                    if validating is not None:
                        row.update(self._validated(validating))
                    self._report(row)
                if saving:
                    saved = self._save()
                    stopped = self._agreed(bool(main and on_checkpoint and on_checkpoint(saved)))
        stopped = stopped and self.step < config.steps
        self.average.copy_to(self.model)
        self.model.eval()
        assert self.last is not None  # the last step always saves
        return Trained(self.step, self.log.rows, self.last, stopped)

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _advance(self, batch: Any) -> None:
        seed_step((self.config.seed, self.step, self.accelerator.process_index), self.accelerator.device)
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
        if self.accelerator.scaler is None:  # with a scaler, gradients may be infinite while it finds its scale
            values["grad_norm"] = norm.detach().float()
        self.pending.append(values)
        self.step += 1

    def _summary(self) -> LogRow:
        """Average the losses since the last row, and raise if one is not finite.

        The losses of a step stay on the GPU until here, because reading one would make each step wait for the GPU.
        """
        names = list(self.pending[0])
        table = torch.stack([torch.stack([values[name] for name in names]) for values in self.pending])
        table = self.accelerator.reduce(table, "mean").cpu()
        first, self.pending = self.step - len(self.pending), []
        if not table.isfinite().all():
            self._give_up(names, table, first)
        row = {"step": self.step, "lr": self.config.learning_rate_at(self.step - 1)}
        return {**row, **dict(zip(names, table.double().mean(0).tolist(), strict=True))}

    def _report(self, row: LogRow) -> None:
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
        """Return the main process's value in every process; all processes must call this at the same point."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    @contextmanager
    def _prefetch(self, batches: Batches) -> Iterator[Callable[[], Any]]:
        """Yield a function that returns one batch after the other, while a thread prepares the next ones.

        There is one thread, so batches are made in the order of their steps. It copies them to the GPU without waiting,
        and the main thread takes a batch only when its future is done. Only the main thread uses the queue.
        """
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        steps = iter(range(self.step, self.config.steps))
        queue: deque[Future] = deque()

        def make(step: int) -> Any:
            return to_device(batches(step, rank, world), device)

        def following() -> Any:
            if (step := next(steps, None)) is not None:
                queue.append(thread.submit(make, step))
            return queue.popleft().result()

        with ThreadPoolExecutor(1, "batches") as thread:
            try:
                queue.extend(thread.submit(make, step) for step in islice(steps, _BATCHES_AHEAD))
                yield following
            finally:
                # After an error, batches not begun are dropped; leaving the block waits for the one being made.
                thread.shutdown(wait=False, cancel_futures=True)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        """Write a checkpoint in the main process, while the others wait."""
        target = self.folder / f"step-{self.step:08}"
        if self.accelerator.is_main_process:
            self.log.sync()  # first the log's rows, so that a checkpoint on the disk never lacks its rows
            state = self.optimizer.state_dict()["state"]
            moments = {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}
            scaler = self.accelerator.scaler
            about = {"step": self.step, **self.identity, "scaler": None if scaler is None else scaler.state_dict()}
            tensors = {"model": self.model.state_dict(), "ema": self.average.values, "optimizer": moments}
            try:
                write_checkpoint(target, tensors, about)
                prune_checkpoints(self.folder, self.config.keep)
            except (OSError, SafetensorError) as error:
                raise WeightsError(
                    f"cannot write the checkpoint {str(target)!r}: {error}; earlier checkpoints are whole. Make room "
                    "and run the same command again"
                ) from error
        self.accelerator.wait_for_everyone()  # no process continues before the checkpoint is written
        self.last = target
        return target

    def _resume(self, optimizer: torch.optim.Optimizer, checkpoint: Path) -> int:
        try:
            about = read_about(checkpoint)
        except (OSError, ConfigError) as error:
            raise WeightsError(damaged(checkpoint, error)) from error
        check_identity(about, self.identity, checkpoint)
        try:
            tensors = {name: read_tensors(checkpoint, name) for name in ("model", "ema", "optimizer")}
            check_same(tensors["model"], self.model.state_dict())
            check_same(tensors["ema"], self.average.values)
            self.model.load_state_dict(tensors["model"])
            copy_values(tensors["ema"], self.average.values)
            load_moments(optimizer, tensors["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(about["scaler"])
        except Exception as error:  # safetensors raises nearly anything on damaged bytes
            raise WeightsError(damaged(checkpoint, error)) from error
        log.info("continuing from %s", checkpoint)
        return about["step"]


class _LossModule(nn.Module):
    """Join model and loss in one module, so that accelerate's autocast and gradient averaging cover both."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return dict(self.loss(self.model, batch))
