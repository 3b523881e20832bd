"""Start `dvt` and end it well, also if its streams are closed or a signal stops it early."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    # Nothing needs cleaning up until the command's libraries are there, and torch aborts where an exception meets its
    # import; dvt.cli.commands takes the usual handler then.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_streams()
    from dvt.cli import main as run

    try:
        code: object = run()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the result is final: a late Ctrl-C must not change the exit code
    _end(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Open /dev/null for each standard stream that the shell closed.

    Otherwise the next file that is opened would get the stream's number, and everything printed would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _end(code: int) -> NoReturn:
    """End the process, without the libraries' teardown if it was part of a process group or of a cluster.

    Everything is written and synced by then, and torch and Ray sometimes abort in their teardown.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone; send the rest to /dev/null, or the interpreter reports it once more
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or 1
    torch: Any = sys.modules.get("torch")  # not imported here: most failures come before it is needed
    distributed = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed:
        torch.distributed.destroy_process_group()
    if distributed or "ray" in sys.modules or code != 0:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
