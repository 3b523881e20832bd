"""Run the command line: tyro reads dataclasses, rich shows progress. Each module holds the commands of one part."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import sys
import traceback

from rich.console import Console
from rich.markup import escape

import dvt
from dvt.cli.commands import parse, print_overview
from dvt.cli.common import DryRun, leaving_nothing
from dvt.cli.settings.common import Output
from dvt.errors import ConfigError, DvtError
from dvt.progress import is_first_process
from dvt.text import visible, visible_lines

log = logging.getLogger(__name__)

#: What threads, shared libraries, oneDNN and HDF5 say when memory is too small.
_NO_ROOM = (
    *("can't start new thread", "failed to map segment", "annot allocate memory", "could not create a primitive"),
    *("bad_alloc", "can't create fractal heap header"),
)
_ALLOCATOR = "[enforce fail at alloc_cpu.cpp"
_TOO_LITTLE_MEMORY = (
    "there is too little memory for this; close other programs, give the process more, or take smaller batches, fewer "
    "workers or a smaller size. The same command goes on where it was"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0 all done, 2 bad input, 1 failure, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # file names are bytes on Linux, and need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    errors = Console(stderr=True, soft_wrap=not sys.stderr.isatty(), emoji=False)  # a file's lines are not broken
    try:
        return _run(arguments, errors)
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from what was saved last")
        return _logged(130, "stopped")
    except BrokenPipeError:  # the reader of the output has ended
        return 1
    except Exception as error:
        if _out_of_memory(error):
            _free(error)
            sys.stderr.write(f"error: {_TOO_LITTLE_MEMORY}\n")  # as it is: what shows errors needs memory, too
            return _logged(2, f"error: {_TOO_LITTLE_MEMORY}")
        if (words := _words(error)) is None:
            log.error("failed", exc_info=True) if _file_handlers() else None
            raise
        errors.print(f"[bold red]error:[/] {escape(words)}")
        return _logged(2, f"error: {words}")
    finally:
        for handler in _file_handlers():
            logging.getLogger().removeHandler(handler)
            handler.close()


def _words(error: Exception) -> str | None:
    """Say in words what a user can do about an error; None for an error of dvt itself."""
    if isinstance(error, DvtError):
        return visible_lines(str(error))
    if isinstance(error, OSError):  # a path or a disk of the user's, which no function below has explained
        where = "" if error.filename is None else f"{str(error.filename)!r}: "
        return visible_lines(where + (error.strerror or str(error)))
    return None


def _run(arguments: list[str], errors: Console) -> int:
    if arguments == ["--version"]:
        _write(f"dvt {dvt.__version__}\n")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print_overview(Console(stderr=not arguments))
        return 0 if arguments else 2
    if empty := [each for each in arguments if each == "" or re.fullmatch(r"--[\w.-]+=", each)]:
        raise ConfigError(f"an argument is empty ({empty[0]!r}); is a variable of the shell not set? Give a value")
    command, function = parse(arguments)
    stream = sys.stderr if command.json else sys.stdout
    quiet = command.quiet or not is_first_process()
    console = Console(stderr=command.json, soft_wrap=not stream.isatty(), emoji=False, quiet=quiet)
    _start_logging(command, errors, arguments)
    try:
        with leaving_nothing(command):
            code, result = function(command, console)
    except DryRun as stopped:
        code, result = 0, stopped.settings
        console.print_json(data=result)
    if command.json and is_first_process():
        _write(json.dumps(result, default=str) + "\n")
    return _logged(code, "done" if code == 0 else "done in part")


def _start_logging(command: Output, errors: Console, arguments: list[str]) -> None:
    """Show messages on the terminal and, with --log-file, to a file; -v shows the steps too."""
    from rich.logging import RichHandler  # slow to import, and not needed for help

    level = "INFO" if command.verbose else "WARNING"
    shown = RichHandler(level, console=errors, show_path=False, show_time=False)
    shown.addFilter(_visible_record)
    shown.addFilter(lambda record: record.name != log.name)  # what a user has just typed
    logging.basicConfig(level=level, format="%(message)s", handlers=[shown])
    own = logging.getLogger("dvt")
    own.setLevel("INFO" if command.verbose or command.log_file else logging.NOTSET)
    if command.log_file is None:
        return
    try:
        command.log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(command.log_file, errors="backslashreplace")
    except OSError as error:
        raise ConfigError(
            f"cannot write the log {str(command.log_file)!r}: {error.strerror or error}; choose another place"
        ) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    file.addFilter(_visible_record)
    logging.getLogger().addHandler(file)
    log.info("dvt %s: dvt %s", dvt.__version__, shlex.join(arguments))


def _file_handlers() -> list[logging.Handler]:
    return [each for each in logging.getLogger().handlers if type(each) is logging.FileHandler]


def _logged(code: int, words: str) -> int:
    """Write how a command ended to the file of --log-file, if there is one."""
    if _file_handlers():
        log.info("%s; exit code %d", words, code)
    return code


def _out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or what came before it, says that memory is too small; not one that is told in words."""
    if isinstance(error, (DvtError, OSError)):
        return False
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_ROOM):
        return True
    if len(str(error)) > 9 and _ALLOCATOR.startswith(str(error)):  # without memory for the rest of the message
        return True
    if error.__context__ is not None and _out_of_memory(error.__context__):
        return True
    if "torch" not in sys.modules:  # which takes seconds to import
        return False
    from dvt.devices import out_of_memory

    return out_of_memory(error)


def _free(error: BaseException) -> None:
    """Let go of what the functions held in which an error, and those before it, came up: there is nothing else left."""
    before: BaseException | None = error
    while before is not None:
        traceback.clear_frames(before.__traceback__)
        before = before.__context__


def _visible_record(record: logging.LogRecord) -> bool:
    """Escape a log record to one line, because it may hold file names with control characters."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


def _write(text: str) -> None:
    """Write to standard output and flush it, so that `main` reports an error, not the interpreter at exit."""
    sys.stdout.write(text)
    sys.stdout.flush()
