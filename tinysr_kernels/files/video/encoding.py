"""Which encoder a film is written with, and how it is set up."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.video.color import FrameFormat
from tinysr_kernels.files.video.opening import pyav
from tinysr_kernels.runtime.notices import notice

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
VIDEO_SUFFIXES = tuple(CONTAINERS)
"""What films are written as: containers that hold exact timestamps and the codecs used here."""

_MPEG4_TICKS = 65535  # the finest time base that MPEG-4 can represent
_H265_SIDE = 64  # libx265 4.2 writes beyond its buffers for frames smaller than a coding tree unit


@dataclass(frozen=True)
class Plan:
    """An encoder and its settings.

    size: (width, height). deep, alpha: the kind of the arrays, see Converter. source, format: of the input's frames and
    of those that are encoded.
    """

    encoder: str
    options: dict[str, str]
    pixel_format: str
    size: tuple[int, int]
    time_base: Fraction
    rate: Fraction
    bit_rate: int
    aspect: Fraction | None
    deep: bool
    alpha: bool
    source: FrameFormat
    format: FrameFormat

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return {key: str(value) for key, value in asdict(self).items()}


def _candidates(suffix: str, form: FrameFormat, size: tuple[int, int]) -> list[tuple[str, str, bool]]:
    """Encoders in order of preference: (name, pixel format, whether alpha is kept)."""
    even = size[0] % 2 == 0 and size[1] % 2 == 0
    plain = "yuv420p" if even else "yuv444p"
    found = []
    if form.alpha and suffix == ".mov":
        found.append(("prores_ks", "yuva444p10le", True))
    if form.alpha and suffix in (".mkv", ".webm"):
        found.append(("libvpx-vp9", "yuva420p", True))
    if suffix == ".webm":
        return [*found, ("libvpx-vp9", plain, False)]
    if form.bits > 8:
        if min(size) >= _H265_SIDE:
            found.append(("libx265", plain + "10le", False))
        found.append(("libx264", plain + "10le", False))
    return [*found, ("libx264", plain, False), ("mpeg4", "yuv420p", False)]


def _options(name: str, crf: int) -> dict[str, str]:
    return {
        # Else libx264's macroblock tree gives other bytes from run to run on processors with AVX-512; it is as fast.
        "libx264": {"crf": str(crf), "preset": "medium", "x264-params": "cpu-independent=1"},
        "libx265": {"crf": str(crf), "preset": "medium", "x265-params": "log-level=none"},
        "libvpx-vp9": {"crf": str(min(crf + 8, 63)), "b": "0", "row-mt": "1", "cpu-used": "2"},
        "prores_ks": {"profile": "4444", "alpha_bits": "16"},
    }.get(name, {})


def make_plan(
    form: FrameFormat,
    context: Any,
    *,
    suffix: str,
    size: tuple[int, int],
    time_base: Fraction,
    rate: Fraction,
    codec: str | None,
    crf: int,
) -> Plan:
    """Choose the encoder for a film and say what it cannot keep.

    form, context, time_base, rate: of the input. suffix, size: of the output. Raises InputError if this PyAV has no
    encoder for it.
    """
    choices = _candidates(suffix, form, size)
    if codec is not None:
        choices = [choice for choice in choices if choice[0] == codec] or [(codec, choices[-1][1], False)]
    if codec == "libx265" and min(size) < _H265_SIDE:
        raise InputError(f"libx265 needs frames of at least {_H265_SIDE} pixels per side, found {size[0]}x{size[1]}")
    choice = next((choice for choice in choices if choice[0] in pyav().codecs_available), None)
    if choice is None:
        names = " or ".join(dict.fromkeys(name for name, _, _ in choices if name != "libx265"))
        raise InputError(f"this PyAV has no encoder {names}; choose another container")
    name, pixel_format, alpha = choice
    deep = form.bits > 8 and pixel_format.endswith("10le")
    if form.alpha and not alpha:
        notice(f"the transparency was dropped: {suffix} with {name} cannot hold it; write .mov or .mkv to keep it")
    if form.bits > (10 if deep else 8):
        way = "" if deep else f"; write {'.mov' if alpha else '.mp4 or .mkv'} to keep 10"
        notice(f"{form.bits}-bit video was reduced to {10 if deep else 8} bits{way}")
    bit_rate = 0
    if name == "mpeg4":
        time_base = max(time_base, Fraction(1, _MPEG4_TICKS)).limit_denominator(_MPEG4_TICKS)
        bit_rate = min(int(size[0] * size[1] * rate / 4), 400_000_000)
    aspect = context.sample_aspect_ratio or None
    if aspect and form.orientation.transpose:
        aspect = 1 / aspect
    options = _options(name, crf)
    made = _prores_format(form) if name == "prores_ks" else form
    return Plan(name, options, pixel_format, size, time_base, rate, bit_rate, aspect, deep, alpha, form, made)


def _prores_format(form: FrameFormat) -> FrameFormat:
    """ProRes is always of limited range, and its frames name three matrices only."""
    tag = {1: 1, 5: 6, 6: 6, 9: 9}.get(form.tag, 1)
    matrix = form.matrix if form.tag in (1, 5, 6, 9) else 1
    return replace(form, full_range=False, tag=tag, matrix=matrix)


def configure(context: Any, plan: Plan) -> None:
    """Set up an encoder's codec context."""
    context.width, context.height = plan.size
    context.pix_fmt = plan.pixel_format
    context.time_base = plan.time_base
    context.framerate = plan.rate
    context.thread_type = "FRAME"  # PyAV's default, slices, costs libx264 bits
    if plan.bit_rate:
        context.bit_rate = plan.bit_rate
    if plan.aspect:
        context.sample_aspect_ratio = plan.aspect
    form = plan.format
    context.colorspace = form.tag
    context.color_range = 2 if form.full_range else 1
    context.color_primaries, context.color_trc = form.primaries, form.transfer


def open_encoder(plan: Plan) -> Any:
    """An opened encoder that is independent of any container. Raises InputError if it refuses the settings."""
    av = pyav()
    context = av.CodecContext.create(plan.encoder, "w")
    configure(context, plan)
    context.options = dict(plan.options)
    context.flags |= av.codec.context.Flags.global_header  # as all containers written here want it
    try:
        context.open()
    except (av.error.FFmpegError, ValueError) as error:
        width, height = plan.size
        raise InputError(
            f"{plan.encoder} cannot encode {width}x{height} frames as {plan.pixel_format}: {error}; "
            "use a smaller scale or another container"
        ) from error
    return context
