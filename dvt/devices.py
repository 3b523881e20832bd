"""Find devices by name, copy to them, wait for them, choose their precision, and recognise that memory is too small.

Only this module knows what devices there are. To the others a device is a GPU or not: a GPU works through a queue, its
*stream*, while the host goes on, so copies to it want page-locked memory, and its results and times are known only
after an *event* in that stream was waited for. Any device whose PyTorch module has streams and events is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dvt.errors import ConfigError

#: An event of a device, such as torch.cuda.Event.
Event = Any


def find_device(name: str) -> torch.device:
    """Find a device by name and try it; "auto" is a GPU if there is one.

    Raises:
        ConfigError: the device cannot be used.
    """
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used ({_reason(name, error)}); use --device auto, cpu, cuda or cuda:1"
        ) from error
    return device


def _reason(name: str, error: Exception) -> str:
    """Say why a device cannot be used, without torch's list of all kinds of devices."""
    text = str(error).splitlines()[0]
    return "there is no such kind of device" if "device type" in text and name.partition(":")[0] in text else text


@contextmanager
def repeatable() -> Iterator[None]:
    """Make models with the same random weights in every process; the state of torch's generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def default_device() -> torch.device:
    """Find the device that "auto" takes: CUDA if there is one, else the CPU.

    In a launch of several processes, each takes a GPU of its own.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def is_gpu(device: torch.device | str) -> bool:
    """Tell whether a device works through a stream while the host goes on.

    >>> is_gpu("cpu"), is_gpu("cuda:1")
    (False, True)
    """
    device = torch.device(device)
    parts = ("Stream", "Event", "current_stream", "stream")
    return device.type != "cpu" and all(hasattr(_module(device), part) for part in parts)


def _module(device: torch.device) -> Any:
    """Find PyTorch's module of a device's kind, such as torch.cuda."""
    return getattr(torch, device.type, None)


def has_kernels_of_cuda(device: torch.device | str) -> bool:
    """Tell whether packages of CUDA kernels can run on a device."""
    return torch.device(device).type == "cuda"


def on_gpu(values: Tensor) -> bool:
    """Tell whether values lie on a GPU."""
    return is_gpu(values.device)


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Copy values of the host to page-locked memory if `device` is a GPU, so that a copy to it need not wait."""
    return values.pin_memory() if is_gpu(device) and not on_gpu(values) else values


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy values to a device without waiting for it.

    The values are pinned first, because a copy from other memory would wait for all work that the GPU has queued.
    """
    return pinned(values, device).to(device, non_blocking=is_gpu(device) and not on_gpu(values))


def record(device: torch.device, *, timed: bool = False, blocking: bool = False) -> Event | None:
    """Put an event into a GPU's current stream; None on another device, which has nothing to wait for.

    Args:
        device: the device.
        timed: keep the event's time, for `elapsed_time`.
        blocking: let a thread that waits for it sleep, instead of looking again and again.
    """
    if not is_gpu(device):
        return None
    module = _module(device)
    event = module.Event(enable_timing=timed, blocking=blocking)
    event.record(module.current_stream(device))
    return event


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what its current stream holds."""
    if is_gpu(device):
        _module(device).current_stream(device).synchronize()


def finish_all(device: torch.device) -> None:
    """Wait until a device has done all its work, in every stream."""
    if is_gpu(device):
        _module(device).synchronize(device)


def new_stream(device: torch.device) -> Any | None:
    """Make a stream beside a GPU's current one; None on another device."""
    return _module(device).Stream(device) if is_gpu(device) else None


def in_stream(device: torch.device, stream: Any | None) -> AbstractContextManager:
    """Let a with block work in a stream of the device; None leaves the current one."""
    return nullcontext() if stream is None else _module(device).stream(stream)


def handed_over(values: Tensor) -> Tensor:
    """Mark values made in another stream as used in this one.

    Otherwise PyTorch's allocator could reuse their memory, once they are freed, while this stream still reads it.
    """
    if on_gpu(values):
        values.record_stream(_module(values.device).current_stream(values.device))
    return values


def free_memory(device: torch.device) -> int | None:
    """Find the free bytes of a GPU; None where that is not known."""
    return _module(device).mem_get_info(device)[0] if is_gpu(device) else None


def seed_device(device: torch.device, seed: int) -> None:
    """Seed a GPU's default generator; that of the CPU is another."""
    if is_gpu(device):
        module = _module(device)
        with module.device(device):
            module.manual_seed(seed)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Keep the states of the default generators, of the CPU and of a GPU, as they were before a with block."""
    gpus = [device] if is_gpu(device) else []
    kind = device.type if gpus else "cuda"  # torch wants one that it knows, also for none
    with torch.random.fork_rng(gpus, device_type=kind):
        yield


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Use a precision, by its name, for a forward pass: float32 is PyTorch's own, tf32 shortens products on CUDA."""
    if precision == "tf32":
        return _short_products()
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


@contextmanager
def _short_products() -> Iterator[None]:
    """Let CUDA multiply float32 in TF32. The setting is the process's: no other thread may multiply meanwhile."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tf32(device: torch.device) -> bool:
    """Tell whether a device multiplies in TF32: CUDA from compute capability 8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def fast_bfloat16(device: torch.device) -> bool:
    """Tell whether a device is fast in bfloat16: CUDA from compute capability 8, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return has_tf32(device)  # both came with the same generation
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device's memory, or the host's, is too small."""
    # On the CPU, torch raises a bare RuntimeError.
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
