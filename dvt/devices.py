"""Find devices by name, copy to them, choose their precision, and recognise that their memory is too small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from dvt.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Find a device by name and try it; "auto" is a GPU if there is one.

    Raises:
        ConfigError: the device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy values to a device without waiting for it.

    The values are pinned first, because a copy from other memory would wait for all work that the GPU has queued.
    """
    from_host = device.type == "cuda" and not values.is_cuda
    return values.pin_memory().to(device, non_blocking=True) if from_host else values.to(device)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Use mixed precision for a forward pass; float32 means none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def fast_bfloat16(device: torch.device) -> bool:
    """Tell whether a device is fast in bfloat16: CUDA from compute capability 8, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device's memory, or the host's, is too small."""
    # On the CPU, torch raises a bare RuntimeError.
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
