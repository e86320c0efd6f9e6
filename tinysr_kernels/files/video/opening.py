"""Open films by content, through a Python file object: FFmpeg never sees a file name and never opens anything itself.

A name handed to FFmpeg is a URL: `http:...` connects, `concat:...` and `subfile,,...` read other files. Some formats do
the same from within (HLS, DASH, SDP, concat lists, external data references in MOV). So the demuxers are an allow-list,
and whatever a demuxer asks to open in addition is refused.

Needs PyAV (the extra `video`), which is imported on first use only.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinysr_kernels.errors import InputError

CONTAINERS = ("mov", "matroska", "avi", "asf", "flv", "mpegts", "mpeg", "ogg", "mxf", "gxf", "nut", "rm", "wtv", "dv")
"""FFmpeg's demuxers of containers. Playlists, devices, network protocols and lists of files are absent on purpose."""

RAW = ("ivf", "yuv4mpegpipe", "h264", "hevc", "obu", "mpegvideo")
"""Demuxers of bare video streams. Some recognize chance data, so that a frame must be decoded to believe them."""

IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"crx ", b"jxl ")
"""Brands of ISO base media files that hold images; FFmpeg would open them as films."""

MAX_FRAME_PIXELS = 1 << 28  # 16384 x 16384; keeps a forged header from taking the memory while FFmpeg probes
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
_PROBE_SECONDS = 10.0
_PROBE_PACKETS = 100
_BUFFER = 1 << 16


def pyav() -> Any:
    """Import and return the module av. Raises InputError with the install command if it is missing."""
    try:
        import av
        import av.sidedata.sidedata
        import av.video.reformatter
    except ImportError as error:
        raise InputError('video needs PyAV: pip install "tinysr-kernels[video]"') from error
    return av


class PlainFile:
    """A file for PyAV to read or write, without a name, which FFmpeg would interpret, and with an optional deadline."""

    def __init__(self, file: Any, seconds: float | None = None) -> None:
        self.read = file.read if seconds is None else self._read
        self.write, self.seek, self.tell = file.write, file.seek, file.tell
        self.readable, self.writable, self.close = file.readable, file.writable, file.close
        self._file, self._end = file, time.monotonic() + (seconds or 0)

    def _read(self, size: int) -> bytes:
        if time.monotonic() > self._end:
            raise TimeoutError("the file takes too long to recognize")
        return self._file.read(size)


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("a film may not open other files or addresses")


@contextmanager
def opened(path: Path, seconds: float | None = None) -> Iterator[Any]:
    """Open a film by content and yield PyAV's input container.

    seconds: limit for reading it. Raises InputError for a file that is not a film, OSError if it cannot be read.
    """
    av = pyav()
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{path}: not a regular file")
    with open(path, "rb") as file:
        try:
            container = av.open(
                PlainFile(file, seconds),
                "r",
                options={"max_pixels": str(MAX_FRAME_PIXELS)},
                container_options={
                    "format_whitelist": ",".join(CONTAINERS + RAW),
                    "protocol_whitelist": "none",
                    "enable_drefs": "0",
                },
                metadata_errors="surrogateescape",
                buffer_size=_BUFFER,
                io_open=_refuse,
            )
        except (av.error.FFmpegError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: not a readable video: {error}") from error
        with container:
            yield container


def is_cover(stream: Any) -> bool:
    """Whether a video stream is a still picture attached to the file."""
    return bool(stream.disposition & _ATTACHED_PICTURE)


def main_video(container: Any) -> Any | None:
    """The largest video stream that can be decoded and is no cover; None if there is none."""
    videos = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not is_cover(stream) and stream.codec_context.width > 0
    ]
    return max(videos, key=lambda stream: stream.codec_context.width * stream.codec_context.height, default=None)


def _decodes(container: Any, video: Any) -> bool:
    for number, packet in enumerate(container.demux(video)):
        if video.codec_context.decode(packet):
            return True
        if number >= _PROBE_PACKETS:
            break
    return False


def probe_video(path: Path) -> bool:
    """Whether a file is a film that `upscale_video` can read, by content; for files that are not images.

    Never raises, takes at most some seconds, opens nothing but the file. False without PyAV.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:12] in IMAGE_BRANDS:
            return False
        with opened(path, _PROBE_SECONDS) as container:
            video = main_video(container)
            return video is not None and (container.format.name not in RAW or _decodes(container, video))
    except Exception:  # noqa: BLE001  whatever a damaged file makes PyAV raise, it is no film
        return False
