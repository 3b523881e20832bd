"""A process that has imported everything, and forks for each command: a run starts in milliseconds, and can be harmed.

It is told what to do by one JSON object a line on standard input, and answers each with one on standard output:

    {"start": arguments, "log": pipe, "faults": [...]}   ->   {"pid": number}
    {"wait": pid}                                        ->   {"code": exit code, or minus the signal}

The faults, each a JSON object with one of these keys:

    moments    count the moments (below) under that folder and write their number to the log's name + ".moments"
    kill       SIGKILL at this moment, from 1 on, under the folder "under"
    fsize      no file may grow beyond so many bytes; "fatal": the process dies inside that write
    memory     forward passes of the backbone with more images than this raise; "kind" is "cuda" or "cpu"
    space      so many more bytes of address space may be taken
    reads      ["pattern", error number, first]: reads of files whose path matches end with that error, from the
               first-th on (only where tests/faults/failing_reads.c could be compiled)
    locks      POSIX locks end with this error number, as on network file systems that keep none
    one_case   below that folder, which exists, capitals are small letters (only where one_case.c could be compiled)
    clock      each look at the wall clock shows so many seconds less than the one before
    at         the name (a pattern) of a file that is opened to be written or renamed to; the "nth" time, "do" happens:
               ["move", from, to], ["remove", file or folder], ["append", file] or ["sleep", seconds]

A moment is a file being opened for writing, written at a position, cut, synced, renamed or removed, or a folder made
or removed; so between two of them the disk changes by no more than what is written to open files.
"""

import time

_true_time, _clock = time.time, {"step": 0.0, "now": 0.0}


def _wall() -> float:
    if not _clock["step"]:
        return _true_time()
    _clock["now"] -= _clock["step"]
    return _clock["now"]


time.time = _wall  # before anyone can take the name

import fcntl  # noqa: E402
import fnmatch  # noqa: E402
import importlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402

import torch  # noqa: E402

import dvt.cli  # noqa: E402

# What commands import when they run. OpenBLAS, which comes with SciPy, waits for ever for memory that its start lacks.
for _name in (
    *("scipy.stats", "scipy.ndimage", "sklearn.linear_model"),
    *("accelerate", "accelerate.utils", "matplotlib.figure", "matplotlib.backends.backend_agg", "safetensors.torch"),
    *("timm", "dvt.analysis", "dvt.analysis.measure", "dvt.analysis.pictures", "dvt.analysis.page.plots"),
    *("dvt.analysis.page.report", "dvt.backbones", "dvt.denoiser", "dvt.denoiser.attach", "dvt.denoiser.distill.job"),
):
    importlib.import_module(_name)
torch.set_num_threads(1)

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0}  # which argument is the path that counts


def _changed(event: str, arguments: tuple) -> str | None:
    """The path that an audit event changes, if any."""
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
        path = arguments[0]
    elif event in _CHANGES:
        path = arguments[_CHANGES[event]]
    else:
        return None
    return os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else None


def _watch(fault: dict, log: str) -> None:
    """Counts moments; kills at one of them."""
    under, number, count = (
        os.path.abspath(fault.get("under") or fault["moments"]),
        fault.get("kill"),
        itertools.count(1),
    )

    def moment() -> None:
        now = next(count)
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if number is None:
            with open(f"{log}.moments", "a") as file:
                file.write(f"{now}\n")

    def audit(event: str, arguments: tuple) -> None:
        path = _changed(event, arguments)
        if path and (path + "/").startswith(under + "/"):
            moment()

    def counted(function):
        def call(*arguments):
            moment()
            return function(*arguments)

        return call

    for name in ("fsync", "ftruncate", "pwrite"):
        setattr(os, name, counted(getattr(os, name)))
    sys.addaudithook(audit)


def _act(what: str, *arguments) -> None:
    if what == "move":
        os.replace(*arguments)
    elif what == "remove":
        shutil.rmtree(arguments[0]) if os.path.isdir(arguments[0]) else os.remove(arguments[0])
    elif what == "append":
        with open(arguments[0], "ab") as file:
            file.write(b"more")
    else:
        time.sleep(float(arguments[0]))


def _trigger(fault: dict) -> None:
    """Does something when a file of that name is written."""
    left, busy = [fault.get("nth", 1)], threading.local()

    def audit(event: str, arguments: tuple) -> None:
        path = _changed(event, arguments)
        if path is None or getattr(busy, "now", False) or not fnmatch.fnmatch(os.path.basename(path), fault["at"]):
            return
        left[0] -= 1
        if left[0] == 0:
            busy.now = True
            _act(*fault["do"])
            busy.now = False

    sys.addaudithook(audit)


def _lack_memory(most: int, kind: str) -> None:
    """As the allocators say it."""
    from dvt.backbones import Backbone

    def full(module, inputs) -> None:
        if isinstance(module, Backbone) and len(inputs[0]) > most:
            if kind == "cuda":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 21474836480 bytes. Error code 12 (Cannot allocate memory)"
            )

    torch.nn.modules.module.register_module_forward_pre_hook(full)


def _harm(fault: dict, log: str) -> None:
    if "kill" in fault or "moments" in fault:
        _watch(fault, log)
    elif "at" in fault:
        _trigger(fault)
    elif "fsize" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fault.get("fatal") else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["fsize"], fault["fsize"]))
    elif "memory" in fault:
        _lack_memory(fault["memory"], fault["kind"])
    elif "space" in fault:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + fault["space"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    elif "reads" in fault:
        os.environ["DVT_READS_FAIL"] = ":".join(map(str, fault["reads"]))
    elif "one_case" in fault:
        os.environ["DVT_ONE_CASE"] = fault["one_case"]
    elif "locks" in fault:

        def refused(*arguments):
            raise OSError(fault["locks"], os.strerror(fault["locks"]))

        fcntl.lockf = refused
    elif "clock" in fault:
        _clock.update(step=fault["clock"], now=_true_time())
    else:
        raise ValueError(fault)


def _command(arguments: list[str], log: str, faults: list[dict]) -> None:
    """The forked child; never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        # As a process of its own would have them: the parent's streams know what their own files can do.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115  for as long as it lives
        for fault in faults:
            _harm(fault, log)
        try:
            code = dvt.cli.main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        code = 1
    finally:
        os._exit(code or 0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                _command(request["start"], request["log"], request["faults"])
            answer = {"pid": pid}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
