"""Start `dvt`, whatever its streams are and whenever it is stopped."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while libraries are imported there is nothing to end well
    _open_streams()
    from dvt.cli import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code: object = run()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over
    _end(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Open what the shell has closed, or the next file that is opened gets its number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _end(code: int) -> NoReturn:
    """End the process; where it held a group of processes or a cluster, without the libraries' teardown.

    Everything is written and synced by then, and torch and Ray abort in their teardown now and then.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more; or the interpreter says so once again
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
