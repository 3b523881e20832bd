"""Distribute calls to actors on a Ray cluster, which may start and die at any time. Only this file uses Ray.

The driver has one thread and no locks. In a loop (:meth:`Pool.map`) it starts actors, gives them calls, waits for the
first call to end, and processes its result. All state is in the driver's `Pool`, so when an actor dies, the driver
still has the calls that it gave to it. Inside an actor on a GPU, two calls run in two of Ray's threads.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import dvt
from dvt.errors import ConfigError, DvtError, ImageError, NonFiniteError
from dvt.store import Job

log = logging.getLogger(__name__)

TRIES = 3
_GREETINGS = 5  # attempts; each of them loads a model
_POLL_SECONDS = 2.0
_LOCAL_OBJECTS = (
    512 << 20
)  # bytes of shared memory on a laptop: shards never go through it, only parts of a reduction do


@dataclass(frozen=True)
class Hello:
    """Hold an actor's greeting, which it sends when its work is ready.

    Args:
        node: Ray's id of the node.
        versions: the versions of dvt and torch.
        job: the job of the work.
        shard_images: images per shard.
        reduced_images: images of each grid shape that the work's reduction takes; 0 without a reduction.
        add: adds two parts of that reduction, of which one may be None.
    """

    node: str
    versions: tuple[str, str]
    job: Job
    shard_images: int
    reduced_images: int = 0
    add: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class LostCall:
    """Hold the reason why no worker could complete a call."""

    reason: str


@dataclass
class _Call:
    """Hold a call that is not done yet, and its failed tries."""

    number: int
    arguments: tuple[Any, ...]
    deaths: int = 0  # workers that died while they ran only this call
    errors: int = 0  # exceptions that it raised
    alone: bool = False  # a worker died during this call, which may be the cause: it is retried alone on a worker


@dataclass
class _Worker:
    """Hold the driver's record of an actor."""

    actor: Any
    greeting: Any  # future of its Hello
    node: str | None = None  # None until the greeting arrives; before, the actor gets no calls
    calls: dict[Any, _Call] = field(default_factory=dict)  # futures of its running and waiting calls


class Pool:
    """Start and replace actors, and give each at most two calls, so that no actor waits for its next one."""

    def __init__(
        self,
        ray: Any,
        actor: type,
        arguments: tuple[Any, ...],
        workers: int | None,
        threads: int,
        device: str,
    ):
        self.ray, self.workers, self.limit, self.threads = ray, list[_Worker](), workers, threads
        self.gpu = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
        # On a GPU two calls run at a time, so that one decodes and solves while the other is in the backbone. Ray must
        # neither restart actors nor repeat calls, because the driver does both and counts the tries.
        options = {"num_gpus": 1, "max_concurrency": 2} if self.gpu else {"max_concurrency": 1}
        self.kind = ray.remote(actor).options(
            num_cpus=1 if self.gpu else threads, max_restarts=0, max_task_retries=0, **options
        )
        self.arguments = arguments
        self.hello: Hello | None = None
        self.failures, self.rest_until = 0, 0.0  # consecutive failed greetings; earliest time of the next new actor
        self.counted, self.devices = -_POLL_SECONDS, 1  # time and result of the last count of the cluster's devices
        self.told = time.monotonic()  # time of the last warning that Ray starts no workers

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            self._end(worker)

    def capacity(self) -> int:
        """Return the number of actors to run: the number asked for, or one per device that the cluster has now."""
        if self.limit is not None:
            return self.limit
        if time.monotonic() - self.counted >= _POLL_SECONDS:
            found = self.ray.cluster_resources()
            self.devices = max(1, int(found.get("GPU", 0) if self.gpu else found.get("CPU", 0) // self.threads))
            self.counted = time.monotonic()
        return self.devices

    def first(self, items: int) -> Hello:
        """Start actors, at most one per item, and return the first greeting."""
        while self.hello is None:
            self._resize(items, last=False)
            self._wait([])
        return self.hello

    def ordered(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield references to Ray's objects in the order of the calls; None for a call without a result."""
        early: dict[int, Any] = {}
        wanted = 0
        for number, result in self.map(method, calls, keep=True):
            early[number] = result
            while wanted in early:
                yield wanted, early.pop(wanted)
                wanted += 1

    def map(
        self, method: str, calls: Sequence[tuple[Any, ...]], keep: bool = False, last: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number and the result of each call, in any order; a :class:`LostCall` after three failed tries.

        Args:
            method: name of the actor's method.
            calls: the arguments of each call.
            keep: the method returns a pair; fetch the first value only and, if it is true, yield a reference to the
                second, which stays on its node.
            last: no calls follow these, so idle actors may be ended.

        Raises:
            Exception: the method raised it in three tries; for an error that `strict` reports, in one.
        """
        queue = deque(_Call(number, arguments) for number, arguments in enumerate(calls))
        again: deque[_Call] = deque()
        try:
            while left := len(queue) + len(again) + sum(len(worker.calls) for worker in self.workers):
                self._resize(left, last)
                self._hand_out(method, queue, again, keep)
                for worker, ref in self._wait([ref for one in self.workers for ref in one.calls]):
                    yield from self._settled(worker, ref, keep, again)
        finally:
            # After an early end the actors may still be busy; their results are ignored.
            for worker in self.workers:
                worker.calls.clear()

    def _settled(self, worker: _Worker, ref: Any, keep: bool, again: deque[_Call]) -> Iterator[tuple[int, Any]]:
        """Yield the number and result of an ended call, unless it must be retried."""
        try:
            result = self._result(ref[0] if keep else ref)
        except _Died as death:
            for lost in self._bury(worker, death.reason):
                if lost.deaths < TRIES:
                    again.append(lost)
                else:
                    yield lost.number, LostCall(f"its worker died {TRIES} times: {death.reason}")
            return
        except ConfigError as error:
            result = LostCall(str(error))
        except (ImageError, NonFiniteError):  # only raised if the work is strict
            raise
        except Exception as error:
            call = worker.calls.pop(ref)
            call.errors += 1
            if call.errors >= TRIES:
                raise
            log.warning("retrying a call: %s", brief(error))
            again.append(call)
            return
        call = worker.calls.pop(ref)
        if keep and not isinstance(result, LostCall):
            result = ref[1] if result else None
        yield call.number, result

    def _result(self, ref: Any) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(ref)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except (errors.RayActorError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            raise _Died(brief(error)) from error

    def _hand_out(self, method: str, queue: deque[_Call], again: deque[_Call], keep: bool) -> None:
        """Give each worker one call, then a second one.

        A call that may have killed a worker is run alone, so that no other call is blamed if it kills one again.
        """
        up = sorted((worker for worker in self.workers if worker.node is not None), key=lambda w: len(w.calls))
        for depth in (1, 2):
            reserved = len(again)
            for worker in up:
                if any(call.alone for call in worker.calls.values()) or len(worker.calls) >= depth:
                    continue
                if again and not worker.calls:
                    self._call(worker, method, again.popleft(), keep)
                elif worker.calls and reserved:  # no second call, so that this worker is free for one of `again` sooner
                    reserved -= 1
                elif queue and (depth == 1 or len(queue) >= len(up)):
                    self._call(worker, method, queue.popleft(), keep)

    def _call(self, worker: _Worker, method: str, call: _Call, keep: bool) -> None:
        remote = getattr(worker.actor, method)
        refs = remote.options(num_returns=2).remote(*call.arguments) if keep else remote.remote(*call.arguments)
        worker.calls[tuple(refs) if keep else refs] = call

    def _wait(self, calls: Sequence[Any]) -> list[tuple[_Worker, Any]]:
        """Wait for a call to end and return it, in a list of at most one; admit new actors meanwhile."""
        waiting = {worker.greeting: worker for worker in self.workers if worker.node is None}
        firsts = {ref[0] if isinstance(ref, tuple) else ref: ref for ref in calls}
        if not waiting and not firsts:
            time.sleep(_POLL_SECONDS / 10)
            return []
        ready, _ = self.ray.wait([*waiting, *firsts], num_returns=1, timeout=_POLL_SECONDS)
        for ref in ready:
            if ref in waiting:
                self._greet(waiting[ref])
        if not ready and len(waiting) == len(self.workers) and time.monotonic() - self.told > 30:
            log.warning("waiting for Ray to start %d workers; the cluster has %s", len(waiting), self._resources())
            self.told = time.monotonic()
        owners = {ref: worker for worker in self.workers for ref in worker.calls}
        return [(owners[firsts[ref]], firsts[ref]) for ref in ready if ref in firsts]

    def _resources(self) -> str:
        found = self.ray.cluster_resources()
        return ", ".join(f"{found.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))

    def _greet(self, worker: _Worker) -> None:
        """Add a new actor to the pool if it does the same work; if it failed to start, replace it later.

        Raises:
            DvtError: the work cannot be made on the actor, or differs from that of the others.
        """
        try:
            hello: Hello = self._result(worker.greeting)
        except DvtError:
            raise
        except Exception as error:
            self._end(worker)
            self.workers.remove(worker)
            self.failures += 1
            # An exception comes from the caller's function and will recur; a death may be the fault of one bad node.
            tries = _GREETINGS if isinstance(error, _Died) else 2
            if self.failures >= tries and not any(other.node for other in self.workers):
                if isinstance(error, _Died):
                    raise ConfigError(
                        f"{self.failures} workers in a row died while they prepared their work: {error.reason}"
                    ) from error
                raise
            log.warning("a worker failed to start and is replaced: %s", brief(error))
            self.rest_until = time.monotonic() + min(60.0, 2.0**self.failures)
            return
        self.failures = 0
        first = self.hello = self.hello or hello
        if hello.versions[0] != dvt.__version__:
            raise ConfigError(
                f"a worker has dvt {hello.versions[0]}, this command has {dvt.__version__}; install one version on all "
                "nodes"
            )
        if hello.versions[1] != first.versions[1]:
            log.warning("workers have torch %s and %s: last bits may differ", hello.versions[1], first.versions[1])
        if hello.job.digest != first.job.digest:
            raise ConfigError(
                f"workers do different jobs ({first.job.differences(hello.job, 'another has')}): are the files "
                "of weights the same on all nodes?"
            )
        worker.node = hello.node

    def _resize(self, left: int, last: bool) -> None:
        wanted = max(1, min(left, self.capacity()))
        while len(self.workers) < wanted and time.monotonic() >= self.rest_until:
            actor = self.kind.remote(*self.arguments)
            self.workers.append(_Worker(actor, actor.hello.remote()))
        idle = [worker for worker in self.workers if not worker.calls] if last else []
        for worker in sorted(idle, key=lambda w: w.node is not None)[: max(0, len(self.workers) - wanted)]:
            self._end(worker)
            self.workers.remove(worker)

    def _bury(self, worker: _Worker, reason: str) -> list[_Call]:
        """Remove a dead worker and return its calls; blame a call only if it ran alone and the node is alive."""
        log.warning("a worker died: %s", reason)
        self._end(worker)
        self.workers.remove(worker)
        calls = list(worker.calls.values())
        lives = any(node["Alive"] for node in self.ray.nodes() if node["NodeID"] == worker.node)
        for call in calls:
            call.deaths += len(calls) == 1 and lives
            call.alone = True
        return calls

    def _end(self, worker: _Worker) -> None:
        with suppress(Exception):  # the actor or the whole cluster may be dead
            self.ray.kill(worker.actor)


class _Died(Exception):
    """Say that a worker died during a call."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def brief(error: BaseException) -> str:
    """Shorten one of Ray's long messages to its informative part."""
    text = " ".join(str(error).split())
    found = text.find("The actor ", 1)
    text = text[max(found, 0) :] or type(error).__name__
    return text if len(text) < 500 else f"{text[:240]} ... {text[-240:]}"


@contextmanager
def connected(address: str, workers: int | None, threads: int) -> Iterator[Any]:
    """Connect to Ray and yield its module; see :func:`dvt.jobs.cluster.run`.

    Raises:
        ConfigError: Ray is missing, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(f"a cluster needs Ray ({error}): pip install 'denoising-vit[cluster]'") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        cores = None if workers is None else workers * threads
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _LOCAL_OBJECTS}
    else:
        _knock(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except (Exception, SystemExit) as error:  # Ray exits when a cluster does not answer
        reason = "it does not answer as Ray does" if isinstance(error, SystemExit) else " ".join(str(error).split())
        raise ConfigError(f"cannot connect to the Ray cluster at {address!r}: {reason}; {_ADDRESSES}") from error
    if threading.current_thread() is threading.main_thread() and handler is not None:
        # Ray's own raises SystemExit wherever the driver is, also inside its C++ code, which then aborts. Ended by the
        # signal, the driver is missed by its workers as after SIGKILL, and shards are whole at every moment.
        signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


_ADDRESSES = (
    "give 'local', 'auto' on a node of a cluster, HOST:PORT or ray://HOST:PORT; if the cluster asks for a token, also "
    "set RAY_AUTH_MODE=token here"
)


def _knock(address: str) -> None:
    """Try to connect to the port first, because Ray itself gives up only after minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not an address of a Ray cluster; {_ADDRESSES}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address!r} ({error.strerror or error}); {_ADDRESSES}") from error
