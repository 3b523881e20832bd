"""The one writer of a store: its lock, and shards that are whole or absent."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from dvt.errors import StoreError
from dvt.files import open_lock, remove_parts, take_lock, write_whole
from dvt.store.format import Record, shard_file
from dvt.store.index import StoredShard, read_shard, shard_files
from dvt.store.job import Job

log = logging.getLogger(__name__)


class StoreWriter:
    """The one writer of a store, as a context manager; the lock dies with the process.

    Args:
        folder: made if it is missing.
        job: what the tokens are; a folder that holds another job's shards is refused.
        wait: wait for another writer to finish, instead of refusing.

    Attributes:
        done: SHA-256 of each image whose shard is committed.
        images: path and SHA-256 of each of them.

    Raises:
        StoreError: on entry when the folder cannot be written, is locked, or holds something else or damaged shards.
    """

    def __init__(self, folder: str | Path, job: Job, wait: bool = True) -> None:
        self.folder, self.job, self.wait = Path(folder), job, wait
        self.done: set[str] = set()
        self.images: set[tuple[str, str]] = set()
        self._lock: _Lock | None = None

    def __enter__(self) -> StoreWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _Lock(self.folder, self.wait)
        except OSError as error:
            reason = "it is a file, not a folder" if self.folder.is_file() else error.strerror or error
            raise StoreError(f"cannot write to the store {str(self.folder)!r}: {reason}") from error
        try:
            # Only now that the lock is held: whoever was writing these is dead, so none is still in use. Shards are
            # listed after that too, or one that another writer had just committed would be computed again.
            remove_parts(self.folder, "*.h5")
            self.images = {image for shard in self._shards() for image in shard.images()}
            self.done = {sha256 for _, sha256 in self.images}
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write(
        self,
        name: str,
        records: Sequence[Record],
        artifact: np.ndarray | Tensor | None = None,
        dtype: str = "float16",
    ) -> Path:
        """Commit a shard: afterwards it survives a crash. Writing the same name again replaces it whole.

        Args:
            name: of the shard, as :func:`plan` gives it.
            records: its images, in order.
            artifact: (h, w, C) that all of them share, if any.
            dtype: "float16", which becomes float32 when a value of this shard would overflow, or "float32".

        Raises:
            StoreError: used outside its ``with`` block, a bad name, a hash or size that is none, or a full disk.
            ShapeError: shapes or terms that do not fit together.
            NonFiniteError: a value is NaN or infinite.
        """
        if self._lock is None:
            raise StoreError("a StoreWriter writes inside its with block: `with StoreWriter(folder, job) as writer:`")
        image = shard_file(name, self.job, records, artifact, dtype)  # all checks come before anything is written
        target = commit_shard(self.folder, name, image, allowed=self._lock.check)
        self.images.update((record.path, record.sha256) for record in records)
        self.done.update(record.sha256 for record in records)
        return target

    def _shards(self) -> Iterator[StoredShard]:
        for file in shard_files(self.folder):
            shard = read_shard(file)
            if shard.job.digest != self.job.digest:
                raise StoreError(
                    f"the folder {str(self.folder)!r} holds another job's tokens ({self.job.differences(shard.job)}); "
                    "choose another output folder"
                )
            yield shard


def commit_shard(folder: Path, name: str, image: bytes, allowed: Callable[[], None] = lambda: None) -> Path:
    """Write a shard's bytes into a folder, whole or not at all; the caller holds the store's lock, or is its helper.

    Args:
        folder: of the store.
        name: of the shard.
        image: from :func:`shard_file`.
        allowed: called before the shard takes its name; an OSError leaves it out.

    Raises:
        StoreError: the folder cannot be written, or the disk is full.
    """
    target = folder / f"{name}.h5"
    try:
        write_whole(target, image, allowed)
    except OSError as error:
        raise StoreError(
            f"cannot write {str(target)!r} ({len(image)} bytes): {error.strerror or error}. The shards "
            "before it are safe; make room and run the same command again"
        ) from error
    return target


class _Lock:
    """An advisory lock on a file of the folder, which the kernel gives back when its process dies.

    A POSIX lock belongs to a process, not to a descriptor: it does not keep the same process (or another of its
    threads) from taking it again, and is lost when the process closes *any* descriptor of the file. So `_held` refuses
    a second writer of this process before the file is opened. A child inherits the dictionary by fork but not the lock:
    therefore the id of the process that holds it is kept, not a mere True.
    """

    _held: dict[str, int] = {}  # noqa: RUF012  one for all instances: real path of the folder to the holder's id

    def __init__(self, folder: Path, wait: bool) -> None:
        self.key = os.path.realpath(folder)
        if self._held.get(self.key) == os.getpid():
            # Opening the file again and closing it would even release the lock that is held.
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
        # The holder wrote its id after it took the lock, so for a moment there may be none, or its predecessor's.
        holder = os.pread(self.fd, 20, 0).decode(errors="replace").strip() or "unknown"
        if not wait:
            raise StoreError(
                f"process {holder} is writing to the store {str(folder)!r}; wait for it or choose another folder"
            )
        log.info("waiting for process %s, which is writing to %s", holder, folder)
        take_lock(self.fd, wait=True)

    def check(self) -> None:
        """Check that the lock is still the folder's: one that was moved or made anew may have another writer by now."""
        if not os.path.samestat(os.fstat(self.fd), os.stat(os.path.join(self.key, "writer.lock"))):
            raise OSError(errno.ESTALE, "the folder was moved or made anew while it was written to")

    def release(self) -> None:
        del self._held[self.key]
        os.close(self.fd)
