"""Files and folders that appear whole or not at all, and locks that die with their process.

Whatever dvt writes under a user's name is written beside it first, to a file that is created anew: nothing that lies
there is overwritten, and no symbolic link is followed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dvt.errors import ConfigError

PART = ".part"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_NAME_BYTES = 160  # of a file's name in that of its unfinished one: file systems take 255 in all


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a file to write to, in a folder that is made; at the end of the block it takes the name `path`.

    Raises:
        ConfigError: something cannot be written; nothing is left of it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            yield part
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(path)!r}: {error.strerror or error}; make room or choose another place, and run the "
            "same command again"
        ) from error


def write_whole(path: Path, content: bytes, part: Path, allowed: Callable[[], None] = lambda: None) -> None:
    """Write a file's bytes, synced, to `part`, which then takes the name `path`.

    Args:
        path: in a folder that exists.
        content: of the file.
        part: the unfinished file; one that is left there is removed, so the caller holds a lock.
        allowed: called before the file takes its name; an OSError keeps it from that.

    Raises:
        OSError: something cannot be written; nothing is left of it.
    """
    if os.path.lexists(part):
        part.unlink()
    fd = os.open(part, _NEW, 0o666)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        allowed()
        os.replace(part, path)
        sync_path(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def replaced(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a new file to write to, which takes the name `path` at the end of the block, with the umask's permissions.

    Until then it has a name that nobody has; what dead processes left of this file is removed.

    Args:
        path: in a folder that exists.
        sync: put the file and its name on the disk before the block ends.

    Raises:
        OSError: something cannot be written; nothing is left of it.
    """
    _remove_dead_parts(path)
    part = path.with_name(f"{_short(path)}.{os.getpid()}.{secrets.token_hex(4)}{PART}")
    fd = os.open(part, _NEW, 0o666)
    mode = os.fstat(fd).st_mode & 0o777
    os.close(fd)
    try:
        yield part
        part.chmod(mode)  # some writers make a file of their own, for its owner alone
        if sync:
            sync_path(part)
        os.replace(part, path)
        if sync:
            sync_path(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to write files to, which takes the name `path`, synced, at the end of the block.

    It is NAME.part until then; one that is left there is removed, so the caller holds a lock.

    Raises:
        OSError: something cannot be written; nothing is left of it.
    """
    part = path.with_name(f"{path.name}{PART}")
    remove(part)
    part.mkdir()
    try:
        yield part
        for each in (*part.iterdir(), part):
            sync_path(each)
        os.replace(part, path)
        sync_path(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


def sync_path(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def writable(path: Path) -> Path:
    """Make the folder of a file to write, and try it: before hours of work, not after them.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(f"{_short(path)}.{secrets.token_hex(4)}{PART}")
        os.close(os.open(trial, _NEW))
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another place") from error
    return path


def open_lock(path: Path) -> int:
    """Open a lock's file and make it where it is missing; no link is followed. Returns its descriptor.

    Raises:
        OSError: it is a link, or cannot be written.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def take_lock(fd: int, wait: bool = False) -> bool:
    """Take a lock, which the kernel gives back when its process dies; False where another process holds it.

    POSIX locks (fcntl) do not keep a process from itself, and closing any descriptor of the file gives them back.
    """
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # the two that POSIX names for "another holds it"
        return False
    return True


def _short(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])


def _remove_dead_parts(path: Path) -> None:
    """Remove what processes that were killed while they wrote this file have left."""
    start = f"{_short(path)}."
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(start) and name.endswith(PART):
                pid = name[len(start) : -len(PART)].partition(".")[0]
                if pid.isdecimal() and not _alive(int(pid)):
                    (path.parent / name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
