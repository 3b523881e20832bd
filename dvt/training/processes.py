"""Set up the processes of a run and their devices by accelerate; seed each step and move batches to the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dvt.devices import default_device, is_gpu, pinned, seed_device
from dvt.errors import ConfigError
from dvt.training.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def accelerator_for(config: TrainingConfig, model: nn.Module, folder: Path) -> Iterator[Accelerator]:
    """Make the Accelerator of one run; with a single process it uses the model's device.

    accelerate keeps its settings in class attributes until the process ends. The previous settings are restored at the
    end of the run, so that the next run may have other ones. The process group itself is kept.

    Raises:
        ConfigError: a tracker is not installed, fp16 is asked for on the CPU, or the processes cannot share the batch
            equally.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState, PartialState

    missing = [name for name in config.trackers if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the tracker {missing[0]} is not installed; `pip install {missing[0]}` or leave it out")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # By itself accelerate takes a GPU if there is one. Only in a launch of several processes may it choose.
    cpu = not is_gpu(default_device() if "LOCAL_RANK" in os.environ else device)
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
        if accelerator.num_processes == 1 and is_gpu(device):
            # In both: every new view of the larger state copies the device of the smaller one.
            PartialState().device = accelerator.state.device = device
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


def seed_step(entropy: tuple[int, int, int], device: torch.device) -> None:
    """Seed torch's default generators for one step; the loop has saved the caller's states and restores them."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
    torch.default_generator.manual_seed(seed)
    seed_device(device, seed)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch to a device; called in the thread that makes batches.

    Copies from pinned memory do not wait for the GPU. They are enqueued on the default stream, which all threads share:
    the step that the main thread enqueues later runs after them, so it needs no event to wait for.
    """
    from accelerate.utils import recursively_apply, send_to_device

    if is_gpu(device):
        batch = recursively_apply(lambda tensor: pinned(tensor, device), batch)
    return send_to_device(batch, device, non_blocking=True)
