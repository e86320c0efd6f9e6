"""Read a film once without decoding: how many frames it holds, and whether it is cut off.

Reading is cheap against the network, and a film that ends early is best known before the first frame is upscaled.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.video.opening import main_video, opened, pyav
from tinysr_kernels.files.video.stated_size import stated_size

# What the header of a whole file may state beyond the end of its last packet, in seconds, in addition to two frames.
# Other formats state no duration, or FFmpeg derives it from the end of the file itself.
_SLACK = {"matroska,webm": 0.1, "avi": 0.1, "mxf": 0.1, "ivf": 0.1, "flv": 1.1, "asf": 1.1}


@dataclass(frozen=True)
class Survey:
    """frames: packets of the film's video stream that are shown. cut_off: what is missing, in words; None if whole."""

    frames: int
    cut_off: str | None = None


def frame_rate(video: Any) -> Fraction:
    """Nominal frames per second of a stream; 25 if the file does not state it."""
    return video.average_rate or video.guessed_rate or Fraction(25)


def survey_film(source: Path) -> Survey:
    """Count the frames of a film and compare its end with what its header states.

    Raises InputError for a file that is not a film, OSError if it cannot be read.
    """
    with opened(source) as container:
        video = main_video(container)
        if video is None:
            raise InputError(f"{source}: the file has no video stream that can be decoded")
        read = shown = 0
        end, error = 0.0, None
        packets = container.demux()
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except pyav().error.FFmpegError as failure:
                error = str(failure)
                break
            if not packet.size:
                continue
            end = max(end, _end(packet))
            if packet.stream.index == video.index:
                read += 1
                shown += not packet.is_discard
        missing = _missing(container, video, read, end)
    with open(source, "rb") as file:
        size, stated = os.fstat(file.fileno()).st_size, stated_size(file)
    if stated is not None and size < stated:
        missing = f"{size} of {stated} bytes are there" + (f", {missing}" if missing else f" with {read} frames")
    elif missing is None and error is not None:
        missing = f"reading stopped after {shown} frames ({error})"
    return Survey(shown, missing)


def _end(packet: Any) -> float:
    """When a packet ends, in seconds; -inf if it does not say."""
    start = packet.pts if packet.pts is not None else packet.dts
    if start is None or not packet.time_base:
        return -math.inf
    return float((start + (packet.duration or 0)) * packet.time_base)


def _missing(container: Any, video: Any, read: int, end: float) -> str | None:
    """What the header states beyond the frames that were read and the end of the last packet, in seconds."""
    if container.format.name.startswith("mov,"):
        listed = len(video.index_entries)  # every frame, also those that an edit list hides
        return f"{read} of {listed} frames" if read < listed else None
    slack = _SLACK.get(container.format.name)
    if slack is None or container.duration is None or read == 0:
        return None
    stated = container.duration / 1e6 + min(container.start_time or 0, 0) / 1e6
    if end + slack + 2 / float(frame_rate(video)) >= stated:
        return None
    about = f" of about {round(stated * read / end)}" if end > 0 else ""
    return f"{read}{about} frames, {max(end, 0):.2f} of {stated:.2f} seconds"
