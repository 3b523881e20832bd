"""Files and folders that appear whole or not at all, and locks that die with their process.

A file with a name given by the user is first written beside that name, to a newly created file: no existing file is
overwritten, and no symbolic link is followed.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dvt.errors import ConfigError

MOST_BYTES = 64 << 20
"""Most bytes that are read of a file that describes other files: settings, lists, tables."""

PART = ".part"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_PART_NAME = re.compile(
    r"(?P<name>.+)\.(?P<pid>\d{1,10})\.(?P<host>[0-9a-f]{6})[0-9a-f]{10}" + re.escape(PART) + r"(\.\w+)?", re.DOTALL
)
_NAME_BYTES = 160  # of a file's name in that of its unfinished one: file systems take 255 in all


def read_plain(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Read a file that anybody may have written: of a bounded size, and no pipe or device, which may never end.

    Args:
        path: path of the file; links are followed.
        most: most bytes that the file may have.

    Raises:
        OSError: it is missing, unreadable, larger, or not a regular file.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        size = check_regular(file.fileno(), path)
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {most} are read", str(path))
        return file.read(size)


def similar(path: str | Path) -> str:
    """Find the file or folder whose name is most like that of a missing one; empty if none is.

    Returns:
        A clause for the end of a message: "; did you mean 'photos/b.jpg'?".
    """
    text = os.fspath(path)
    folder, name = os.path.split(text.rstrip("/"))
    with suppress(OSError, ValueError):
        others = [each for each in os.listdir(folder or ".") if each != name]  # it may be there, as another kind
        near = difflib.get_close_matches(name, others, 1, 0.6)
        return f"; did you mean {os.path.join(folder, near[0])!r}?" if near else ""
    return ""


def check_regular(file: int | str | Path, path: str | Path = "") -> int:
    """Return the size in bytes of a file, given by its path or descriptor, that is no pipe, device or folder.

    Raises:
        OSError: it is missing, or something else.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path or file))
    return status.st_size


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe without a writer would block


@contextmanager
def whole_file(path: str | Path, *, suffix: str = "", beside: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a new file to write to; at the end of the block it is renamed to `path`.

    Args:
        path: final path of the file; its folder is made if it is missing.
        suffix: suffix of the unfinished file's name, for writers that depend on it.
        beside: as :func:`replaced` takes it.

    Raises:
        ConfigError: something cannot be written; nothing is left of it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path, suffix=suffix, beside=beside) as part:
            yield part
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(path)!r}: {error.strerror or error}; make room or choose another place, and run the "
            "same command again"
        ) from error


def write_whole(
    path: Path, content: bytes | Callable[[BinaryIO], object], allowed: Callable[[], None] = lambda: None
) -> None:
    """Write a file's bytes, synced, beside it, which then take the name `path`.

    Unfinished files of killed processes stay; the holder of the folder's lock removes them by :func:`remove_parts`.

    Args:
        path: path in an existing folder.
        content: content of the file, or a function that writes it to the open file.
        allowed: called before the file is renamed; if it raises an OSError, the file is not renamed.

    Raises:
        OSError: something cannot be written; nothing is left of it.
    """
    part = _part_name(path)
    fd = os.open(part, _NEW, 0o666)
    try:
        with open(fd, "wb+", buffering=0 if callable(content) else -1) as file:
            if callable(content):
                content(file)
            else:
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
def replaced(path: Path, *, sync: bool = False, suffix: str = "", beside: Sequence[str] = ()) -> Iterator[Path]:
    """Give a new file to write to, which takes the name `path` at the end of the block, with the umask's permissions.

    Until then it has an unused name. Unfinished versions left by dead processes are removed.

    Args:
        path: path in an existing folder.
        sync: sync the file and its folder to the disk before the block ends.
        suffix: suffix of the unfinished file's name, for writers that depend on it.
        beside: names of files that belong to this one. Those that the writer makes in the unfinished file's folder are
            put beside `path`, older ones are removed; at no moment is `path` there with those of another version.

    Raises:
        OSError: something cannot be written; nothing is left of it.
    """
    remove_dead(path.parent, path.name)
    folder = _part_name(path)  # of its own: some writers make files beside the one that they were given
    folder.mkdir()
    part = folder / f"{_short(path.name)}{suffix}"
    try:
        fd = os.open(part, _NEW, 0o666)
        mode = os.fstat(fd).st_mode & 0o777
        os.close(fd)
        yield part
        part.chmod(mode)  # some writers replace the file by one that only its owner can read
        if sync:
            sync_path(part)
        _replace_beside(folder, path, beside)
        os.replace(part, path)
        if sync:
            sync_path(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_beside(folder: Path, path: Path, names: Sequence[str]) -> None:
    """Put the files that belong to `path` in place and remove those of its last version, with `path` out of the way."""
    changed = [name for name in names if (folder / name).exists() or os.path.lexists(path.with_name(name))]
    if changed:
        remove(path)
    for name in changed:
        remove(path.with_name(name))
        if (folder / name).exists():
            os.replace(folder / name, path.with_name(name))


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to write files to, which takes the name `path`, synced, at the end of the block.

    Until then it has an unused name; its files get the umask's permissions. Unfinished folders of this name that dead
    processes have left are removed.

    Raises:
        OSError: something cannot be written; nothing is left of it.
    """
    remove_dead(path.parent, path.name)
    part = _part_name(path)
    part.mkdir()
    mode = part.stat().st_mode & 0o666
    try:
        yield part
        for each in part.rglob("*"):
            if each.is_file():
                each.chmod(mode)  # some writers replace the file by one that only its owner can read
            sync_path(each)
        sync_path(part)
        os.replace(part, path)
        sync_path(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def renamed_away(path: Path) -> Path:
    """Rename a folder before its removal to an unfinished name: a half-removed folder must not look complete."""
    part = _part_name(path)
    os.replace(path, part)
    return part


def new_part(path: Path) -> Path:
    """Make an empty file that has the name of an unfinished `path`.

    Raises:
        OSError: it cannot be written.
    """
    part = _part_name(path)
    os.close(os.open(part, _NEW, 0o666))
    return part


def remove_parts(folder: Path, pattern: str) -> None:
    """Remove unfinished files and folders, recognised by dvt's own naming; a user's own NAME.part stays.

    Args:
        folder: their folder. The caller holds its lock, so no living process is writing them.
        pattern: glob pattern of their final names.
    """
    for each in _parts(folder):
        if fnmatch.fnmatchcase(each["name"], pattern):
            remove(folder / each[0])


def remove_dead(folder: Path, name: str | None = None) -> None:
    """Remove what processes of this machine that are dead have left unfinished in a folder.

    Args:
        folder: the folder.
        name: final name of the files or folders to remove; None for any.
    """
    for each in _parts(folder):
        wanted = name is None or each["name"] == _short(name)
        if wanted and each["host"] == _host() and not _alive(int(each["pid"])):
            remove(folder / each[0])


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists; the target of a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


def missing_folders(folder: Path) -> list[Path]:
    """List a folder that is missing and those of its parents that are, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def remove_unused(made: Sequence[Path], idle: Collection[str]) -> None:
    """Remove folders that this process made, if nothing came to be in the innermost one but files of no use alone.

    Args:
        made: what :func:`missing_folders` listed before they were made.
        idle: names of files that may lie there before its work begins, such as settings and this process's own lock.
    """
    with suppress(OSError):
        if made and set(names := os.listdir(made[0])) <= set(idle):
            for name in names:
                (made[0] / name).unlink()
            for each in made:
                each.rmdir()


def sync_path(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def writable(path: Path) -> Path:
    """Check that a file can be written, before hours of work rather than after them; its folder is made with it.

    Raises:
        ConfigError: the place is not writable or a folder, or weights could not be read back under that name.
    """
    try:
        str(path if path.suffix == ".safetensors" else "").encode()
    except UnicodeError as error:  # file names are bytes on Linux; safetensors writes such files, and reads none
        raise ConfigError(f"the name {str(path)!r} is no UTF-8, and weights are read by such names only") from error
    if path.is_dir():
        raise ConfigError(f"cannot write {str(path)!r}: it is a folder; give the name of a file in it")
    nearest = next(each for each in path.absolute().parents if os.path.lexists(each))
    try:
        new_part(nearest / path.name).unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another place") from error
    return path


def open_lock(path: Path) -> int:
    """Open a lock file, made if it is missing, and return its descriptor; no link is followed.

    Raises:
        OSError: it is a link, has another name too, or cannot be written.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    if os.fstat(fd).st_nlink > 1:  # a hard link: the same file has another name, and is not ours to write to
        os.close(fd)
        raise OSError(errno.EMLINK, "it is a hard link", str(path))
    return fd


def take_lock(fd: int, wait: bool = False) -> bool:
    """Take a lock, which the kernel releases when its process dies; return False if another process holds it.

    POSIX locks (fcntl) do not exclude their own process, and closing any descriptor of the file releases them.

    Raises:
        OSError: the file system has no locks, like some network file systems.
    """
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # the two that POSIX names for "another holds it"
        return False
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: its file system keeps no locks, without which two writers would spoil each other's "
            "work; choose a folder on another one, or mount it with locks",
        ) from error
    return True


def _part_name(path: Path) -> Path:
    """Make an unused name beside `path` that holds its name and this process's."""
    return path.with_name(f"{_short(path.name)}.{os.getpid()}.{_host()}{secrets.token_hex(5)}{PART}")


@functools.cache
def _host() -> str:
    """Shorten this machine's name: on a disk that several share, the processes of the others are none of ours."""
    return hashlib.sha256(os.fsencode(socket.gethostname())).hexdigest()[:6]


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])


def _parts(folder: Path) -> list[re.Match[str]]:
    """List the unfinished files of a folder, each with its final name and the process that wrote it."""
    with suppress(OSError):
        return [each for name in os.listdir(folder) if (each := _PART_NAME.fullmatch(name)) is not None]
    return []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
