"""Name and read images inside of other files: members of .tar archives (webdataset shards) and frames of videos.

Each has a path of its own, FILE#MEMBER, such as "shard-000.tar#cat.jpg" or "clip.mp4#000012". So it is listed, hashed,
stored and resumed like a file.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from dvt.errors import ImageError
from dvt.images.urls import MAX_BYTES, image_error
from dvt.images.video import SUFFIXES as VIDEOS
from dvt.images.video import chosen_frames, file_version, frame_bytes
from dvt.text import counted

#: Suffixes of the files that hold images.
CONTAINERS = (".tar", *VIDEOS)


def is_container(path: str) -> bool:
    """Tell whether a file holds images, by its suffix."""
    return path.lower().endswith(CONTAINERS) and os.path.isfile(path)


def split_member(path: str | Path) -> tuple[str, str] | None:
    """Split FILE#MEMBER into the file, which exists, and the member; None for the path of a file."""
    text = os.fspath(path)
    if "#" not in text or os.path.lexists(text):
        return None
    for at, letter in enumerate(text):
        if letter == "#" and is_container(text[:at]):
            return text[:at], text[at + 1 :]
    return None


def member_title(path: str | Path) -> str:
    """Make a short title of an image: its stem and, for the frame of a video, its number.

    >>> member_title("in/clip.mp4#000012"), member_title("in/cat.jpg")
    ('clip-000012', 'cat')
    """
    name, _, frame = os.path.basename(os.fspath(path)).partition("#")
    stem = Path(name if not frame or name.lower().endswith(VIDEOS) else frame).stem
    return f"{stem}-{frame}" if frame and name.lower().endswith(VIDEOS) else stem


def film_of(path: str | Path) -> str | None:
    """Return the video that an image is a frame of; None for other images."""
    name, _, frame = os.fspath(path).rpartition("#")
    return name if frame and name.lower().endswith(VIDEOS) else None


def expand_container(path: str, choice: str, is_image: Callable[[str], bool]) -> list[str]:
    """List the images in a file as FILE#MEMBER.

    Args:
        path: path of a .tar archive or a video.
        choice: of an archive, a name or a pattern; of a video, a frame's number, a slice such as "0:100:10", or a rate
            such as "2fps"; "" for all.
        is_image: tells by its name whether a member of an archive is an image.

    Raises:
        ImageError: the file cannot be read, or holds no such image.
    """
    if path.lower().endswith(VIDEOS):
        return [f"{path}#{number:06}" for number in chosen_frames(path, choice)]
    names = [name for name in _tar_members(path) if is_image(name)]
    found = [name for name in names if not choice or name == choice or fnmatch.fnmatchcase(name, choice)]
    if not found:
        kept = f"the archive holds {counted(len(names), 'image')}, and none of that name"
        raise image_error(f"{path}#{choice}" if choice else path, kept if names else "the archive holds no images")
    return [f"{path}#{name}" for name in found]


def member_bytes(path: str, member: str) -> bytes:
    """Read a member of an archive, or a frame of a video as the bytes of a PPM file.

    Raises:
        ImageError: there is no such member or frame, or the file ends before its end.
    """
    if path.lower().endswith(VIDEOS):
        return frame_bytes(path, member)
    place = _tar_members(path).get(member)
    if place is None:
        raise image_error(f"{path}#{member}", "the archive holds no file of this name")
    start, size = place
    if size > MAX_BYTES:
        raise image_error(f"{path}#{member}", f"it has more than {MAX_BYTES >> 30} GB, the largest size that is read")
    try:
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise image_error(f"{path}#{member}", error) from error
    if len(content) < size:
        raise image_error(f"{path}#{member}", "the archive ends within it; copy the archive again")
    return content


def _tar_members(path: str) -> dict[str, tuple[int, int]]:
    """Read the place and size of each regular file in an archive, by name; of equal names the last counts, as in tar.

    The list is kept as long as the archive does not change.
    """
    return _scanned(path, *file_version(path))


@functools.lru_cache(maxsize=16)
def _scanned(path: str, changed: int, size: int) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            try:
                for member in archive:
                    if member.isreg() and not member.issparse():
                        found[member.name] = (member.offset_data, member.size)
            except (tarfile.TarError, EOFError) as error:  # it ends early: what is there is used, its last file named
                if not found:
                    raise ImageError(str(error)) from error
    except (OSError, ValueError, tarfile.TarError, EOFError) as error:
        raise image_error(
            path, f"it is not an uncompressed tar archive, or is damaged ({error}); unpack a compressed one before"
        ) from error
    return found
