"""Write a store: one writer at a time, held by a lock, and shards that are whole or absent."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from dvt.errors import DvtError, StoreError
from dvt.files import missing_folders, open_lock, remove_parts, remove_unused, take_lock, write_whole
from dvt.store.format import Record, check_name, write_shard
from dvt.store.index import StoredShard, read_shard, shard_files
from dvt.store.job import Job

log = logging.getLogger(__name__)


class StoreWriter:
    """Write shards to a store, as a context manager that holds the store's lock; the lock dies with the process.

    Args:
        folder: the store; it is created if it is missing.
        job: the job of the tokens; a folder with another job's shards is refused.
        wait: wait for another writer to finish, instead of raising.

    Attributes:
        done: SHA-256 of each image whose shard is committed.
        images: path and SHA-256 of each of these images.

    Raises:
        StoreError: on entry, if the folder cannot be written, is locked, or holds another job's or damaged shards.
    """

    def __init__(self, folder: str | Path, job: Job, wait: bool = True) -> None:
        self.folder, self.job, self.wait = Path(folder), job, wait
        self.done: set[str] = set()
        self.images: set[tuple[str, str]] = set()
        self._lock: _Lock | None = None
        self._made: list[Path] = []

    def __enter__(self) -> StoreWriter:
        self._made = missing_folders(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _Lock(self.folder, self.wait)
        except OSError as error:
            reason = "it is a file, not a folder" if self.folder.is_file() else error.strerror or error
            raise StoreError(f"cannot write to the store {str(self.folder)!r}: {reason}") from error
        try:
            # The order matters. With the lock held, any writer of these partial files is dead, so none is in use. And
            # shards are listed only after the lock, or one that another writer just committed would be computed again.
            remove_parts(self.folder, "*.h5")
            self.images = {image for shard in self._shards() for image in shard.images()}
            self.done = {sha256 for _, sha256 in self.images}
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._lock is None:
            return
        if kind is None or issubclass(kind, DvtError):  # an interrupted run goes on with the settings that it left
            remove_unused(self._made, ("config.json", "writer.lock"))
        self._lock.release()
        self._lock = None

    def write(
        self,
        name: str,
        records: Sequence[Record],
        artifact: np.ndarray | Tensor | None = None,
        dtype: str = "float16",
    ) -> Path:
        """Commit a shard, which then survives a crash. Writing the same name again replaces the whole shard.

        Args:
            name: name of the shard, from :func:`plan`.
            records: the shard's images, in order.
            artifact: (h, w, C) the artifact that all of them share, if any.
            dtype: "float16", which becomes float32 when a value of this shard would overflow, or "float32".

        Raises:
            StoreError: the writer is not in its ``with`` block, the name, a hash or a size is invalid, or the disk is
                full.
            ShapeError: shapes or terms do not fit together.
            NonFiniteError: a value is NaN or infinite.
        """
        if self._lock is None:
            raise StoreError("a StoreWriter writes inside its with block: `with StoreWriter(folder, job) as writer:`")
        check_name(name)
        content = partial(write_shard, name=name, job=self.job, records=records, artifact=artifact, dtype=dtype)
        target = commit_shard(self.folder, name, content, allowed=self._lock.check)
        self.images.update((record.path, record.sha256) for record in records)
        self.done.update(record.sha256 for record in records)
        return target

    def _shards(self) -> Iterator[StoredShard]:
        for file in shard_files(self.folder):
            shard = read_shard(file)
            if shard.job.digest != self.job.digest:
                raise StoreError(f"the folder {str(self.folder)!r} holds another job's tokens: {self._ways_out(shard)}")
            yield shard

    def _ways_out(self, shard: StoredShard) -> str:
        own = self.job.config.get("verb") == shard.job.config.get("verb")  # only a command's own run can go on
        go_on = "Go on with its own settings (--resume), begin" if own else "Begin"
        differences = self.job.differences(shard.job)
        return f"{differences}. {go_on} anew in its place (--overwrite), or choose another output folder"


def clear_store(folder: Path, wait: bool = True) -> None:
    """Remove a store's shards and settings; other files in its folder stay.

    Args:
        folder: the store's folder; it need not exist.
        wait: wait for another writer to finish, instead of raising.

    Raises:
        StoreError: another process writes to it, or it cannot be written.
    """
    if not folder.is_dir():
        return
    try:
        lock = _Lock(folder, wait)
        try:
            for file in (*shard_files(folder), folder / "config.json"):
                file.unlink(missing_ok=True)
        finally:
            lock.release()
    except OSError as error:
        raise StoreError(f"cannot clear the store {str(folder)!r}: {error.strerror or error}") from error


def commit_shard(
    folder: Path, name: str, content: bytes | Callable[[BinaryIO], None], allowed: Callable[[], None] = lambda: None
) -> Path:
    """Write a shard into a folder, whole or not at all; the caller, or the driver of its job, holds the lock.

    Args:
        folder: the store's folder.
        name: name of the shard.
        content: the bytes, from :func:`shard_file`, or a function that writes them to a file.
        allowed: called before the shard is renamed to its name; if it raises an OSError, no shard is written.

    Raises:
        StoreError: the folder cannot be written, or the disk is full.
    """
    target = folder / f"{name}.h5"
    try:
        write_whole(target, content, allowed)
    except OSError as error:
        raise StoreError(
            f"cannot write {str(target)!r}: {error.strerror or error}. The shards "
            "before it are safe; make room and run the same command again"
        ) from error
    return target


class _Lock:
    """Hold an advisory lock on a file of the folder, which the kernel releases when its process dies.

    A POSIX lock belongs to a process, not to a descriptor: it does not keep the same process (or another of its
    threads) from taking it again, and is lost when the process closes *any* descriptor of the file. So `_held` refuses
    a second writer of this process before the file is opened. A forked child inherits the dictionary but not the lock,
    so the dictionary holds the id of the process that has the lock, not just True.
    """

    _held: dict[str, int] = {}  # noqa: RUF012  shared by all instances: real path of the folder to the holder's id

    def __init__(self, folder: Path, wait: bool) -> None:
        self.key = os.path.realpath(folder)
        if self._held.get(self.key) == os.getpid():
            # Opening and closing the file again would release the lock.
            raise StoreError(f"this process is already writing to the store {str(folder)!r}; use that writer")
        self.fd = open_lock(folder / "writer.lock")
        try:
            self._take(folder, wait)
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(self.fd)
            raise
        self._held[self.key] = os.getpid()

    def _take(self, folder: Path, wait: bool) -> None:
        if take_lock(self.fd):
            return
        # The holder writes its id after taking the lock, so for a moment there may be no id, or its predecessor's.
        holder = os.pread(self.fd, 20, 0).decode(errors="replace").strip()
        holder = holder if holder.isascii() and holder.isdigit() else "unknown"
        if not wait:
            raise StoreError(
                f"process {holder} is writing to the store {str(folder)!r}; wait for it or choose another folder"
            )
        log.info("waiting for process %s, which is writing to %s", holder, folder)
        take_lock(self.fd, wait=True)

    def check(self) -> None:
        """Check that the lock file is still the folder's; a moved or recreated folder may have another writer now."""
        if not os.path.samestat(os.fstat(self.fd), os.stat(os.path.join(self.key, "writer.lock"))):
            raise OSError(errno.ESTALE, "the folder was moved or recreated while it was written to")

    def release(self) -> None:
        del self._held[self.key]
        os.close(self.fd)
