"""Write the result: the encoded segments, the input's other streams, and all that belongs to them; then check it."""

from __future__ import annotations

import heapq
import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files.video.encoding import CONTAINERS, Plan, configure
from tinysr_kernels.files.video.metadata import container_tags, flags, lost_tags, stream_tags
from tinysr_kernels.files.video.opening import PlainFile, is_cover, main_video, opened, pyav
from tinysr_kernels.files.video.segments import WorkFolder
from tinysr_kernels.runtime.notices import notice

_BUFFER = 1 << 20
_PICTURES = {"png": ("image/png", "cover.png"), "bmp": ("image/bmp", "cover.bmp"), "gif": ("image/gif", "cover.gif")}
_BLOCK_ADDITIONAL = 15  # AV_PKT_DATA_MATROSKA_BLOCKADDITIONAL


@dataclass
class _Output:
    """The output container before its first packet. copies: by the index of the input's stream."""

    container: Any
    video: Any
    copies: dict[int, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def _open_output(file: Any, source: Any, video: Any, plan: Plan, suffix: str, strip: bool) -> _Output:
    """Open an output with all its streams. Raises InputError for audio that the container cannot hold."""
    form = CONTAINERS[suffix]
    tags, options = container_tags(source.metadata, form, strip=strip)
    container = pyav().open(
        PlainFile(file),
        "w",
        format=form,
        container_options=options,
        metadata_errors="surrogateescape",
        buffer_size=_BUFFER,
    )
    stream = container.add_stream(plan.encoder, rate=plan.rate, options=dict(plan.options))
    configure(stream.codec_context, plan)
    if plan.encoder == "libx265" and form in ("mp4", "mov"):
        stream.codec_context.codec_tag = "hvc1"  # the only one that Apple's players take
    stream.metadata.update(stream_tags(video, form, strip=strip))
    if plan.alpha and form in ("matroska", "webm"):
        stream.metadata["alpha_mode"] = "1"
    stream.disposition = video.disposition
    output = _Output(container, stream)
    for each in source.streams:
        if each.index != video.index:
            _copy(output, each, strip)
    container.metadata.update(tags)
    container.set_chapters(source.chapters())
    return output


def output_suffix(source: Path) -> str:
    """The suffix of a film's result in a folder: its own if such a file can be written with its sound, else ".mkv"."""
    form = CONTAINERS.get(source.suffix.lower())
    if form is None:
        return ".mkv"
    try:
        with opened(source) as container, pyav().open(PlainFile(io.BytesIO()), "w", format=form) as output:
            fits = not any(_unsupported(output, stream) for stream in container.streams.audio)
    except (InputError, OSError):  # said when the film's turn comes
        return source.suffix
    return source.suffix if fits else ".mkv"


def _unsupported(output: Any, source: Any) -> str | None:
    """Why an output container cannot hold a copy of a stream; None if it can."""
    form = output.format.name
    if source.type == "attachment":
        return None if form == "matroska" else f"{form} does not support attachments"
    if source.type not in ("audio", "subtitle") and not is_cover(source):
        return "only the largest film is upscaled" if source.type == "video" else "its meaning is unknown"
    if form in ("matroska", "webm") and is_cover(source):
        return None if form == "matroska" else "webm does not support attachments"
    context = source.codec_context
    name = getattr(getattr(context, "codec", None), "canonical_name", None) or getattr(context, "name", "its codec")
    return None if name in output.supported_codecs else f"{form} does not support {name}"


def _copy(output: _Output, source: Any, strip: bool) -> None:
    """Add a copy of a stream to the output, or note why there is none."""
    cover = is_cover(source)
    if (strip and cover) or (source.type == "data" and "timecode" in source.metadata):
        return  # a timecode is made again from the film's tag of that name
    reason, target = _unsupported(output.container, source), None
    if reason is None and cover and output.container.format.name == "matroska":
        _attach(output.container, source)
        return
    if reason is None:
        try:
            target = output.container.add_stream_from_template(source, opaque=True)
        except (ValueError, pyav().error.FFmpegError) as error:
            reason = str(error)
    if target is None:
        if source.type == "audio":
            raise InputError(f"the audio cannot be copied: {reason}; write .mkv instead")
        output.dropped.append(f"{'cover' if cover else source.type} stream dropped: {reason}")
        return
    tags = source.metadata if source.type == "attachment" else None
    target.metadata.update(tags or stream_tags(source, output.container.format.name, strip=strip))
    target.disposition = source.disposition
    if source.type != "attachment":
        output.copies[source.index] = target


def _attach(container: Any, source: Any) -> None:
    """Add a cover to Matroska, which has it as an attachment. Its packet is the first one of its file."""
    packet = next((packet for packet in source.container.demux(source) if packet.size), None)
    if packet is not None:
        mime, name = _PICTURES.get(source.codec_context.name, ("image/jpeg", "cover.jpg"))
        tags = source.metadata
        container.add_attachment(tags.get("filename", name), tags.get("mimetype", mime), bytes(packet))


def check_output(source: Path, plan: Plan, suffix: str, strip: bool) -> None:
    """Say what of the input's streams the output cannot hold, before any work is done. Raises InputError for audio."""
    with opened(source) as container:
        output = _open_output(io.BytesIO(), container, main_video(container), plan, suffix, strip)
    for message in output.dropped:
        notice(message)


def write_film(
    part: Path, source: Path, plan: Plan, folder: WorkFolder, suffix: str, interval: int, strip: bool
) -> int:
    """Write the result to `part`, an empty file, and return the number of its audio streams.

    interval: between frames in the encoder's time base, for the duration of the last one.
    """
    with opened(source) as container, open(part, "wb") as file:
        video = main_video(container)
        output = _open_output(file, container, video, plan, suffix, strip)
        with output.container:
            films = _film_packets(output.video, plan, folder, interval)
            others = _copied_packets(container, output.copies)
            faulty = 0
            for _, packet in heapq.merge(films, others, key=lambda item: item[0]):
                try:
                    output.container.mux(packet)
                except pyav().error.FFmpegError:
                    if packet.stream.index == output.video.index:
                        raise
                    faulty += 1
            if faulty:
                notice(f"{faulty} packets of sound or subtitles with impossible times were dropped")
            audio = sum(stream.type == "audio" for stream in output.copies.values())
        file.flush()
        os.fsync(file.fileno())
    return audio


def _copied_packets(container: Any, copies: dict[int, Any]) -> Iterator[tuple[float, Any]]:
    """Packets of the copied streams with their times in seconds. A damaged file ends where it cannot be read."""
    if not copies:
        return
    packets = container.demux([container.streams[index] for index in copies])
    while True:
        try:
            packet = next(packets)
        except (StopIteration, pyav().error.FFmpegError):
            return
        time = packet.dts if packet.dts is not None else packet.pts
        if time is None and not packet.size:  # a flush packet
            continue
        packet.stream = copies[packet.stream.index]
        yield -math.inf if time is None else float(time * packet.time_base), packet  # a cover has no time


def decoding_times(times: list[int]) -> list[int]:
    """The decoding times of packets whose presentation times are given in coding order; all distinct.

    A packet is decoded when the one `delay` places earlier in display order is shown, which is the least delay that
    never decodes after showing. Encoders choose them alike, but each segment has an encoder of its own.
    """
    shown = sorted(times)
    rank = {time: index for index, time in enumerate(shown)}
    delay = max((index - rank[time] for index, time in enumerate(times)), default=0)
    lead = shown[delay] - shown[0] if times else 0
    return [shown[index - delay] if index >= delay else shown[index] - lead for index in range(len(times))]


def _film_packets(stream: Any, plan: Plan, folder: WorkFolder, interval: int) -> Iterator[tuple[float, Any]]:
    """The packets of all segments with their decoding times in seconds."""
    av = pyav()
    times = [head.pts for head in folder.heads()]
    following = dict(itertools.pairwise(sorted(times)))
    for time, (head, data, extra) in zip(decoding_times(times), folder.packets(), strict=True):
        packet = av.Packet(data)
        packet.stream, packet.time_base = stream, plan.time_base
        packet.pts, packet.dts, packet.is_keyframe = head.pts, time, head.key
        packet.duration = head.duration or following.get(head.pts, head.pts + interval) - head.pts
        if extra:
            side = av.packet.PacketSideData(_BLOCK_ADDITIONAL, len(extra))
            side.update(extra)
            packet.set_sidedata(side)
        yield float(time * plan.time_base), packet


def check_film(part: Path, source: Path, plan: Plan, expected: int, suffix: str, strip: bool) -> None:
    """Read the finished file. Raises TinySRError unless it holds `expected` frames; says which metadata it lacks."""
    form = CONTAINERS[suffix]
    with opened(part) as result, opened(source) as original:
        stored = sum(1 for packet in result.demux(result.streams.video[0]) if packet.size)
        if stored != expected:
            raise TinySRError(f"{source}: expected {expected} frames, found {stored} stored")
        lost = lost_tags(container_tags(original.metadata, form, strip=strip)[0], result.metadata)
        video = main_video(original)
        pairs = [(video, result.streams.video[0])]
        for kind in ("audio", "subtitles"):
            before, after = getattr(original.streams, kind), getattr(result.streams, kind)
            if len(before) == len(after):
                pairs += zip(before, after, strict=True)
        for before, after in pairs:
            lost += lost_tags(stream_tags(before, form, strip=strip), after.metadata)
            lost += [f"flag {name}" for name in sorted(flags(before) - flags(after)) if name != "default"]
        if len(result.chapters()) < len(original.chapters()):
            lost.append("chapters")
        context = result.streams.video[0].codec_context
        tags = plan.format.primaries, plan.format.transfer, plan.format.tag
        names = "color primaries", "transfer function", "color matrix"
        found = int(context.color_primaries), int(context.color_trc), int(context.colorspace)
        lost += [name for name, tag, kept in zip(names, tags, found, strict=True) if tag not in (0, 2, kept)]
    if lost:
        words = ", ".join(dict.fromkeys(lost))
        notice(f"metadata that {suffix} cannot hold was dropped: {words[:300]}; .mkv keeps most")
