"""Store the finished shards of a cluster's workers: in a folder that all nodes share, or at a URL that fsspec knows."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvt.errors import DvtError, StoreError
from dvt.images import is_url, url_files
from dvt.store.index import ShardIndex, read_index
from dvt.store.writer import commit_shard

_INDEX_BLOCK = 256 << 10
# Object stores, in which a put appears whole or not at all, and a move would be a second copy.
_ATOMIC_PUT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}


@dataclass(frozen=True)
class ShardTarget:
    """Hold the place of a cluster's shards, and write and read them there.

    Args:
        place: the absolute path of a folder that all nodes share, or a URL.
    """

    place: str

    @property
    def remote(self) -> bool:
        """True if the target is behind a URL."""
        return is_url(self.place)

    def check(self) -> None:
        """Check, before hours of work, that there is a file system for the URL.

        Raises:
            StoreError: fsspec does not know it, or a package is missing.
        """
        if self.remote:
            with self._files("write to"):
                pass

    def put_shard(self, name: str, content: bytes) -> None:
        """Write a shard, whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        if self.remote:
            self.put(f"{name}.h5", content)
        else:
            commit_shard(Path(self.place), name, content)

    def put(self, name: str, content: bytes) -> None:
        """Write a file behind the URL, whole or not at all: by one put into an object store, elsewhere by a move.

        Raises:
            StoreError: it cannot be written.
        """
        with self._files("write") as (files, root):
            place, protocol = f"{root}/{name}", files.protocol
            if _ATOMIC_PUT & {*([protocol] if isinstance(protocol, str) else protocol)}:
                files.pipe_file(place, content)
            else:
                files.makedirs(root, exist_ok=True)
                part = f"{root}/{name}.{uuid.uuid4().hex}.part"
                files.pipe_file(part, content)
                _move(files, part, place, len(content))
            files.invalidate_cache()
            if (size := files.size(place)) != len(content):
                raise OSError(f"{size} bytes of {name} arrived, {len(content)} were sent")

    def shards(self) -> list[str]:
        """List the names of the shards behind the URL, without their suffix."""
        with self._files("read") as (files, root):
            files.invalidate_cache()
            try:
                entries = files.ls(root, detail=False)
            except FileNotFoundError:
                return []
            names = (str(entry).rstrip("/").rpartition("/")[2] for entry in entries)
            return sorted(name[:-3] for name in names if name.endswith(".h5"))

    def index(self, name: str, artifact: bool = False) -> ShardIndex:
        """Read the index of a shard behind the URL and, if asked for, the artifact that its images share.

        Raises:
            StoreError: the shard is damaged or cannot be read.
        """
        place = f"{self.place.rstrip('/')}/{name}.h5"
        with self._files("read") as (files, root):
            try:
                with files.open(f"{root}/{name}.h5", "rb", cache_type="blockcache", block_size=_INDEX_BLOCK) as file:
                    return read_index(file, place, artifact)
            except StoreError:  # HDF5 cannot distinguish damage from a broken connection; reading the whole file can
                return read_index(io.BytesIO(files.cat_file(f"{root}/{name}.h5")), place, artifact)

    @contextmanager
    def _files(self, what: str) -> Iterator[tuple[Any, str]]:
        try:
            files, root = url_files(self.place)
            yield files, root.rstrip("/")
        except DvtError:
            raise
        except ImportError as error:
            raise StoreError(
                f"cannot {what} {self.place!r}: a package is missing ({error}); s3:// needs `pip install s3fs`, gs:// "
                "gcsfs"
            ) from error
        except Exception as error:  # each file system has its own errors
            raise StoreError(f"cannot {what} {self.place!r}: {str(error) or type(error).__name__}") from error


def _move(files: Any, part: str, place: str, size: int) -> None:
    try:
        files.mv(part, place)
    except Exception:  # some file systems do not overwrite by a move; a file of this name and size is the same shard
        if not files.exists(place) or files.size(place) != size:
            raise
        files.rm_file(part)
