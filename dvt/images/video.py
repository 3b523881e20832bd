"""Read single frames of videos, through PyAV (the extra `video`)."""

from __future__ import annotations

import functools
import os
import re
import stat
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dvt.images.urls import image_error
from dvt.text import counted

# FFmpeg gets the format by the suffix: by the content, it would also open playlists, which name other files and hosts.
_FORMATS = {".avi": "avi", ".m4v": "mov", ".mkv": "matroska", ".mov": "mov", ".mp4": "mov", ".webm": "matroska"}
SUFFIXES = tuple(_FORMATS)
"""Suffixes of the videos that are read."""

MAX_PIXELS = 1 << 26  # of a frame; 8K has 2^25
_NEAR = 64  # frames; what is not farther ahead is decoded on the way instead of searched for
_KEPT = 16  # decoded frames; threads that read ahead ask for them in a slightly other order
_OPEN = 4  # videos kept open


def chosen_frames(path: str, choice: str) -> list[int]:
    """List the numbers of the frames of a video that a choice stands for.

    If the video ends before the number of frames that it announces, the first missing one is listed, too: reading it
    tells so.

    Args:
        path: path of the video.
        choice: "" for all, a number, a slice such as "0:100:10", or a rate such as "2fps".

    Raises:
        ImageError: the video cannot be read, or the choice is not understood or stands for no frame.
    """
    video = _video(path)
    count, numbers = len(video.times), []
    if rate := re.fullmatch(r"(\d+(?:\.\d*)?)fps", choice):
        numbers = _at_rate(video.seconds, float(rate[1]))
    elif re.fullmatch(r"\d+", choice):
        numbers = [int(choice)] if int(choice) < count + video.missing else []
    elif re.fullmatch(r"(-?\d*):(-?\d*)(:[1-9]\d*)?", choice) or not choice:
        parts = [int(part) if part else None for part in choice.split(":")]
        numbers = list(range(count)[slice(*parts) if choice else slice(None)])
    if not numbers:
        raise image_error(
            f"{path}#{choice}",
            f"it stands for none of the video's {counted(count, 'frame')}; give a number from 0, a slice such as "
            "0:100:10, or a rate such as 2fps",
        )
    if video.missing and not re.fullmatch(r"\d+", choice) and (not choice or numbers[-1] >= count - _step(numbers)):
        numbers.append(count)
    return numbers


def _step(numbers: list[int]) -> int:
    return numbers[-1] - numbers[-2] if len(numbers) > 1 else 1


def _at_rate(seconds: list[float], rate: float) -> list[int]:
    """Choose the first frame at or after each multiple of 1 / rate seconds.

    >>> _at_rate([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], 5.0)
    [0, 2, 4]
    """
    found, due = [], 0
    for number, second in enumerate(seconds):
        if rate > 0 and second - seconds[0] >= due / rate - 1e-6:
            found.append(number)
            due = int((second - seconds[0]) * rate + 1e-6) + 1
    return found


def frame_bytes(path: str, member: str) -> bytes:
    """Read a frame as the bytes of a PPM file, so that its hash is that of its pixels.

    Raises:
        ImageError: there is no such frame, or it cannot be decoded.
    """
    if not re.fullmatch(r"\d+", member):
        raise image_error(f"{path}#{member}", "a frame of a video is named by its number")
    pixels = _video(path).frame(int(member))
    return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def file_version(path: str) -> tuple[int, int]:
    """Return the time of change and the size of a regular file, which are other ones once it has changed.

    Raises:
        ImageError: there is no such file, or it is a folder or a device.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise image_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise image_error(path, "it is not a regular file")
    return status.st_mtime_ns, status.st_size


def _video(path: str) -> _Video:
    return _opened(path, *file_version(path))


@functools.lru_cache(maxsize=_OPEN)
def _opened(path: str, changed: int, size: int) -> _Video:
    return _Video(path)


class _Video:
    """Hold an open video: the times of its frames, and a decoder that stands somewhere in it.

    Threads share it. Frames are numbered in the order in which they are shown.
    """

    def __init__(self, path: str) -> None:
        try:
            import av
        except ImportError as error:
            raise image_error(path, "videos need PyAV: pip install 'denoising-vit[video]'") from error
        self.path, self.errors = path, (av.error.FFmpegError, OSError, ValueError, MemoryError)
        self.lock, self.kept = threading.Lock(), OrderedDict[int, Any]()
        try:
            self.container = av.open(open(path, "rb"), "r", format=_FORMATS[Path(path).suffix.lower()])  # noqa: SIM115
        except self.errors as error:
            raise image_error(path, f"it cannot be opened as a video ({error}); a part of it may be missing") from error
        if not self.container.streams.video:
            raise image_error(path, "it holds no video")
        self.stream = self.container.streams.video[0]
        if not 0 < self.stream.width * self.stream.height <= MAX_PIXELS:
            raise image_error(path, f"its frames have {self.stream.height} x {self.stream.width} pixels")
        self.times = self._look()
        self.announced = self._announcement()
        self.frames: Iterator[Any] = iter(())
        self.at = len(self.times)  # the number of the frame that the decoder gives next

    def _look(self) -> list[int]:
        """List the times of all frames, without decoding them; a video that ends early has the frames before that."""
        times = []
        try:
            for packet in self.container.demux(self.stream):
                if packet.size and packet.pts is not None:
                    times.append(packet.pts)
        except self.errors as error:
            if not times:
                raise image_error(self.path, f"no frame of it can be read ({error})") from error
        if not times:
            raise image_error(self.path, "it holds no frames, or ends before the first one")
        return sorted(times)

    def _announcement(self) -> int:
        """Return the number of frames that the header announces; a length in time counts without its last second."""
        rate, length = self.stream.average_rate, self.container.duration
        return self.stream.frames or int(float(rate or 0) * ((length or 0) / 1e6 - 1))

    @property
    def missing(self) -> bool:
        """True if the video ends before its announced end."""
        return self.announced > len(self.times)

    @property
    def seconds(self) -> list[float]:
        """The times of the frames in seconds."""
        return [float(time * (self.stream.time_base or 0)) for time in self.times]

    def frame(self, number: int) -> np.ndarray:
        """Decode a frame: (H, W, 3) uint8, turned as its rotation says.

        Raises:
            ImageError: there is no such frame, or it cannot be decoded.
        """
        if number >= len(self.times):
            announced = f", of {self.announced} that it announces; copy it again" if self.missing else ""
            raise image_error(
                f"{self.path}#{number:06}", f"the video ends after {counted(len(self.times), 'frame')}{announced}"
            )
        with self.lock:
            try:
                if number not in self.kept:
                    self._decode(number)
                if number in self.kept:
                    frame = self.kept[number]
                    turned = np.rot90(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90)
                    return np.ascontiguousarray(turned)
                reason = "it is damaged, or the video ends within it"
            except self.errors as error:
                reason = f"it cannot be decoded ({error})"
            self.at = len(self.times)
        raise image_error(f"{self.path}#{number:06}", reason)

    def _decode(self, number: int) -> None:
        """Decode up to a frame, from where the decoder stands if that is near before it; keep the last frames."""
        if not self.at <= number <= self.at + _NEAR:
            self.container.seek(self.times[number], stream=self.stream)
            self.frames = self.container.decode(self.stream)
        for frame in self.frames:
            if frame.pts is None:
                continue
            place = bisect_left(self.times, frame.pts)
            self.at, self.kept[place] = place + 1, frame
            while len(self.kept) > _KEPT:
                self.kept.popitem(last=False)
            if place >= number:
                return
