"""A device that is not there: tensors that claim to lie on a GPU, and fail wherever those of a GPU would.

`register()` tells PyTorch about a device "standin". Its tensors hold their values on the CPU, so results can be
compared number by number; but an operation with tensors of two devices, a look at the memory by NumPy, or a CPU
generator raises, as on a GPU. What a GPU does later is late here too: a copy to the host with ``non_blocking=True``
holds NaN until an event behind it was waited for. `COUNTS` counts what makes the host wait for the device.

What it cannot show: kernels of a GPU and their rounding, races between streams, autocast (it changes nothing here).
"""

import contextlib
import threading
import time
import warnings
from collections import Counter

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "standin"
HOOK = "_setup_privateuseone_for_python_backend"

COUNTS: Counter[str] = Counter()
"""What made the host wait since :func:`counted` began: by operation, and "copy to the host", "upload" (of pageable
memory, which waits for the queue)."""

aten = torch.ops.aten
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_lstsq",
    "linalg_eig",
    "repeat_interleave",
}
MIXES = {"fill_", "masked_fill", "masked_fill_", "where", "index_put", "index_put_", "_index_put_impl_", "lerp"}
"""Operations, beside the pointwise ones, in which a number may lie on the CPU."""
BELOW = ("empty.memory_format", "empty_strided", "_copy_from")
"""Operations without a tensor of the device, and those that PyTorch runs beneath tensor subclasses."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}

_generator = torch.Generator()
_late: list[tuple[int, Tensor, Tensor]] = []  # copies on their way to the host: number, target, values
_enqueued = 0
_lock = threading.RLock()


def missing() -> str | None:
    """The reason why this PyTorch cannot have the stand-in, or None."""
    from torch.utils import backend_registration

    return None if hasattr(backend_registration, HOOK) else f"PyTorch {torch.__version__} has no {HOOK}"


class StandInTensor(torch.Tensor):
    """A tensor on the stand-in; `held` are its values, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "StandInTensor":
        strides = {} if values.layout != torch.strided else {"strides": values.stride()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=torch.device(NAME, 0), **strides
        )
        made.held = values
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    def __repr__(self, **_):
        return f"StandInTensor({self.held})"

    def tolist(self):
        return self.cpu().tolist()

    # Of sparse tensors. PyTorch takes a wrapper for a dense one.

    def coalesce(self):
        _wait("coalesce")
        return StandInTensor(self.held.coalesce())

    def indices(self):
        return StandInTensor(self.held.indices())

    def values(self):
        return StandInTensor(self.held.values())

    def record_stream(self, stream):
        assert isinstance(stream, Stream)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]


def on_device(value) -> bool:
    return isinstance(value, StandInTensor)


def is_standin(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def run(operation, args, kwargs):
    """Run an operation on the values, after the checks that a GPU makes."""
    name = operation.overloadpacket.__name__
    if name in ("_to_copy", "copy_", "_copy_from"):
        return _copied(name, args, kwargs)
    if name == "_fused_sdp_choice":
        return 0  # by plain products: the CPU's own kernel is not known for this device
    flat, spec = tree_flatten((args, kwargs))
    _check_devices(operation, name, args, kwargs, flat)
    _count(name, args, kwargs)
    target = kwargs.get("device")
    inner_args, inner_kwargs = tree_unflatten([each.held if on_device(each) else each for each in flat], spec)
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    _draw_from_the_device(operation, flat, inner_kwargs)
    out = operation(*inner_args, **inner_kwargs)
    if target is not None and not is_standin(target):
        return out
    return _wrapped(operation, args, kwargs, out)


def _wrapped(operation, args, kwargs, out):
    """Wrap the results; those that the operation wrote to are the tensors that it was given."""
    known = {id(each.held): each for each in tree_flatten((args, kwargs))[0] if on_device(each)}
    wrapped = lambda each: known[id(each)] if id(each) in known else StandInTensor(each)  # noqa: E731
    return tree_map(lambda each: wrapped(each) if isinstance(each, Tensor) else each, out)


def _check_devices(operation, name, args, kwargs, flat):
    tensors = [each for each in flat if isinstance(each, Tensor)]
    if not any(map(on_device, tensors)):
        return
    written = {
        id(value)
        for argument, value in _named(operation, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    mixes = torch.Tag.pointwise in operation.tags or name in MIXES
    for each in tensors:
        if on_device(each) or (name in INDEXED and _is_index(each, args)):
            continue
        if each.ndim or not mixes or id(each) in written:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                f"{each.device}! ({operation})"
            )


def _is_index(tensor, args):
    """Tell whether a tensor is one of the indices, which may lie on the CPU; they are uploaded."""
    found = any(each is tensor for each in args[1] if each is not None)
    if found:
        _wait("upload")
    return found


def _named(operation, args, kwargs):
    """Yield each argument of an operation with its value."""
    arguments = operation._schema.arguments
    yield from zip(arguments, args)  # noqa: B905  trailing ones may be left out
    yield from ((each, kwargs[each.name]) for each in arguments if each.name in kwargs)


def _count(name, args, kwargs):
    masks = [each for each in args[1] if each is not None and each.dtype == torch.bool] if name in INDEXED else []
    number = name.startswith("index_put") and on_device(args[2]) and args[2].ndim == 0
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return
    if name in WAITS or (masks and not (name == "index_put_" and number)):
        _wait(name if not masks else "boolean mask")


def _wait(what):
    """The host waits for the device, so everything enqueued so far is done."""
    COUNTS[what] += 1
    arrive()


def arrive(upto=None):
    """Let copies to the host arrive: all of them, or those enqueued up to a number."""
    with _lock:
        for number, target, values in list(_late):
            if upto is None or number <= upto:
                target.copy_(values)
        _late[:] = [each for each in _late if upto is not None and each[0] > upto]


def _draw_from_the_device(operation, flat, kwargs):
    arguments = [each.name for each in operation._schema.arguments]
    if "generator" not in arguments:
        return
    given = [each for each in flat if isinstance(each, torch._C.Generator)]
    if not given:
        kwargs["generator"] = _generator
    elif given[0]._cdata not in Generator.known:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def _copied(name, args, kwargs):
    """Copy within the device, to it or from it."""
    if name == "_copy_from":
        args = (args[1], args[0], *args[2:])
        name = "copy_"
    if name == "copy_":
        target, source = args[0], args[1]
        late = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if on_device(target):
            if not on_device(source) and source.numel() > 1 and not pinned(source):
                _wait("upload")
            target.held.copy_(source.held if on_device(source) else source)
            return target
        return _to_host(target, source.held, late)
    source, device = args[0], kwargs.pop("device", None)
    late = kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    if not on_device(source):  # the way to the device
        if source.numel() > 1 and not pinned(source):
            _wait("upload")
        return StandInTensor(aten._to_copy.default(source.detach(), **kwargs))
    values = aten._to_copy.default(source.held, **kwargs)
    if device is None or is_standin(device):
        return StandInTensor(values)
    return _to_host(torch.empty_like(values), values, late)


def _to_host(target, values, late):
    global _enqueued
    if not late:
        _wait("copy to the host")
        return target.copy_(values)
    with _lock:
        _enqueued += 1
        _late.append((_enqueued, target, values.clone()))
        if target.dtype.is_floating_point:
            target.fill_(float("nan"))
        else:
            target.zero_()
    return target


# -- what the code asks of torch.cuda --------------------------------------------------------------------------------


class Event:
    """A mark in the device's queue."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.timed, self.number, self.time = enable_timing, None, 0.0

    def record(self, stream=None):
        self.number, self.time = _enqueued, time.perf_counter()

    def synchronize(self):
        assert self.number is not None, "an event that was never recorded"
        COUNTS["event"] += 1
        arrive(self.number)

    def query(self):
        return self.number is not None

    def wait(self, stream=None):
        assert self.number is not None

    def elapsed_time(self, end):
        assert self.timed and end.timed, "both events need enable_timing"
        return 1000 * (end.time - self.time)


class Stream:
    """A queue of work; the stand-in works at once, so all are alike."""

    def __init__(self, device=None, priority=0):
        self.device = torch.device(NAME, 0)

    def synchronize(self):
        _wait("stream")

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        event.wait(self)

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class DeviceModule:
    """torch.standin, as torch.cuda for CUDA."""

    Event, Stream = Event, Stream

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def set_device(self, device):
        assert is_standin(device)

    @contextlib.contextmanager
    def device(self, device):
        yield

    def current_stream(self, device=None):
        return Stream()

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    def synchronize(self, device=None):
        _wait("device")

    def manual_seed(self, seed):
        _generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device=None):
        return _generator.get_state()

    def set_rng_state(self, state, device=None):
        _generator.set_state(state)

    def mem_get_info(self, device=None):
        return 2**34, 2**35

    def get_device_name(self, device=None):
        return "stand-in"

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


class Generator(torch._C.Generator):
    """torch.Generator, which knows the stand-in: PyTorch has no hook for that."""

    known: dict[int, torch._C.Generator] = {}  # noqa: RUF012  those of the stand-in; operations get copies of the object

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu" if is_standin(device) else device)
        if is_standin(device):
            cls.known[made._cdata] = made
        return made

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return torch.device(NAME, 0) if self._cdata in self.known else super().device


_PINNED = "_pinned_for_the_standin"
_pin_memory = torch.Tensor.pin_memory


def pin_memory(tensor, *rest):
    """Tensor.pin_memory: the values stay where they are, but uploads of them no longer wait."""
    if on_device(tensor):
        raise RuntimeError(f"cannot pin 'torch.{NAME}.FloatTensor', only dense CPU tensors can be pinned")
    copied = tensor.clone()
    setattr(copied, _PINNED, True)
    return copied


def pinned(tensor):
    return getattr(tensor, _PINNED, False)


def register() -> None:
    """Tell PyTorch about the device, once a process and before its first backward pass, for the engine's threads."""
    from torch.utils import backend_registration

    if hasattr(torch, NAME):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(backend_registration, HOOK)(NAME, DeviceModule())
    library = torch.library.Library("aten", "IMPL")
    for name in BELOW:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        library.impl(name, _below(operation), "PrivateUse1")
    cast = torch.library.Library("_", "IMPL")
    cast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    register.libraries = library, cast  # what they registered ends with them


def _below(operation):
    return lambda *args, **kwargs: run(operation, args, kwargs)


@contextlib.contextmanager
def present():
    """Let torch.Generator and pin_memory know the device too."""
    generator = torch.Generator
    torch.Generator, torch.Tensor.pin_memory = Generator, pin_memory
    try:
        yield torch.device(NAME, 0)
    finally:
        torch.Generator, torch.Tensor.pin_memory = generator, _pin_memory
        arrive()


@contextlib.contextmanager
def counted():
    """Count what makes the host wait, in the block."""
    COUNTS.clear()
    yield COUNTS
