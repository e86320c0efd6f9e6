"""Orientation, color labels, depth and transparency of films."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.files.video.films import audio, decoded, enlarge, frames_of, images, make, times, write_frames
from tests.runtime.sample_images import SCALE
from tinysr_kernels.files.video import upscale_video
from tinysr_kernels.files.video.color import Orientation, orientation_of

av = pytest.importorskip("av")


def matrix(*numbers: float) -> bytes:
    """A display matrix from a, b, c, d."""
    a, b, c, d = (round(number * 65536) for number in numbers)
    return struct.pack("=9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        # What each corner of [[1, 2], [3, 4]] becomes, by x' = a x + c y, y' = b x + d y.
        ((1, 0, 0, 1), [[1, 2], [3, 4]]),
        ((-1, 0, 0, 1), [[2, 1], [4, 3]]),
        ((1, 0, 0, -1), [[3, 4], [1, 2]]),
        ((-1, 0, 0, -1), [[4, 3], [2, 1]]),
        ((0, 1, 1, 0), [[1, 3], [2, 4]]),
        ((0, 1, -1, 0), [[3, 1], [4, 2]]),
        ((0, -1, 1, 0), [[2, 4], [1, 3]]),
        ((0, -1, -1, 0), [[4, 2], [3, 1]]),
        ((0, 0, 0, 0), [[1, 2], [3, 4]]),
        ((2, 0, 0, 3), [[1, 2], [3, 4]]),
    ],
)
def test_the_whole_matrix_is_applied(numbers, expected):
    pixels = np.array([[1, 2], [3, 4]])[..., None]
    assert orientation_of(matrix(*numbers)).apply(pixels)[..., 0].tolist() == expected


def test_no_and_odd_matrices(caplog):
    assert orientation_of(None) == orientation_of(b"short") == Orientation()
    assert not caplog.text
    assert orientation_of(matrix(0.9, 0.4, -0.4, 0.9)) == Orientation()
    assert "no multiple of 90 degrees" in caplog.text


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(("hflip", "vflip", "degrees"), [(True, False, 0), (False, True, 0), (True, False, 90)])
def test_mirrored_films_become_upright(tmp_path, suffix, hflip, vflip, degrees):
    (array,) = frames_of(1, 48, 36)
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv444p"
        stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        output.mux(stream.encode(None))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        sides = [side for side in frame.side_data if "DISPLAYMATRIX" in str(side.type)]
    if not sides:
        pytest.skip("this PyAV writes no matrix to this container")
    # av_display_matrix_flip multiplies the rotation; independent of the package: map each pixel by the matrix.
    a, b, _, c, d = (np.sign(number) for number in struct.unpack("=9i", bytes(sides[0]))[:5])
    y, x = np.mgrid[0:36, 0:48]
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    upright = np.zeros((new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
    upright[new_y, new_x] = array
    enlarge(path, tmp_path / f"b{suffix}", crf=4)
    (shown,) = images(tmp_path / f"b{suffix}")
    assert abs(shown[2::4, 2::4].astype(int) - upright).mean() < 6
    with av.open(str(tmp_path / f"b{suffix}")) as container:
        assert not [side for side in next(container.decode(video=0)).side_data if "DISPLAYMATRIX" in str(side.type)]


def ramp(bits: int) -> np.ndarray:
    """RGB uint16 [36,48,3], gray, with values that 8 bits cannot tell apart."""
    values = (np.arange(48) + (1 << (bits - 1))) << (16 - bits)
    return np.broadcast_to(values.astype(np.uint16)[None, :, None], (36, 48, 3)).copy()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_ten_bits_are_kept(tmp_path, caplog, suffix):
    write_frames(tmp_path / "a.mkv", [ramp(10)] * 2, "ffv1", "yuv420p10le", pixels="rgb48le")
    kinds = set()

    def stream(frames):
        for frame in frames:
            kinds.add((frame.dtype, frame.shape))
            yield frame.repeat(SCALE, 0).repeat(SCALE, 1)

    upscale_video(tmp_path / "a.mkv", tmp_path / f"b{suffix}", stream, SCALE, crf=1)
    assert kinds == {(np.dtype(np.uint16), (36, 48, 3))}
    before, after = decoded(tmp_path / "a.mkv", "gray10le")[0], decoded(tmp_path / f"b{suffix}", "gray10le")[0]
    assert abs(after[2::4, 2::4].astype(int) - before).max() <= 1
    assert len(np.unique(after)) > 24  # 8 bits would leave 12
    assert caplog.text == ""


def test_reduction_to_8_bits_is_noticed(tmp_path, caplog):
    write_frames(tmp_path / "a.mkv", [ramp(10)] * 2, "ffv1", "yuv420p10le", pixels="rgb48le")
    enlarge(tmp_path / "a.mkv", tmp_path / "b.webm")
    assert caplog.text.count("10-bit video was reduced to 8 bits; write .mp4 or .mkv to keep 10") == 1


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(
    ("primaries", "transfer", "colors"),
    [(9, 16, "BT.2020, PQ"), (9, 18, "BT.2020, HLG"), (12, 13, "Display P3"), (1, 1, None)],
)
def test_color_labels_are_kept_and_said(tmp_path, caplog, suffix, primaries, transfer, colors):
    tags = {"color_primaries": primaries, "color_trc": transfer, "colorspace": 9 if primaries == 9 else 1}
    write_frames(tmp_path / "a.mkv", [ramp(10)], "ffv1", "yuv420p10le", pixels="rgb48le", **tags)
    enlarge(tmp_path / "a.mkv", tmp_path / f"b{suffix}", crf=1)
    with av.open(str(tmp_path / f"b{suffix}")) as container:
        context = container.streams.video[0].codec_context
        assert {name: getattr(context, name) for name in tags} == tags
    before, after = decoded(tmp_path / "a.mkv", "gray10le")[0], decoded(tmp_path / f"b{suffix}", "gray10le")[0]
    assert abs(after[2::4, 2::4].astype(int) - before).max() <= 2
    assert caplog.text.count("not sRGB") == (1 if colors else 0)
    assert (colors or "") in caplog.text


def test_an_unknown_matrix_is_kept(tmp_path, caplog):
    """YCgCo: the values go through another matrix and back; calling the result BT.709 would change every color."""
    write_frames(tmp_path / "a.mkv", [ramp(8)], "libx264", "yuv444p", pixels="rgb48le", colorspace=8)
    enlarge(tmp_path / "a.mkv", tmp_path / "b.mkv", crf=1)
    with av.open(str(tmp_path / "b.mkv")) as container:
        assert container.streams.video[0].codec_context.colorspace == 8
    assert "the color matrix 8 is not supported" in caplog.text


def transparent() -> np.ndarray:
    """RGBA uint8 [36,48,4]: one color, alpha from 0 to 255."""
    pixels = np.zeros((36, 48, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, np.linspace(0, 255, 48).astype(np.uint8)
    return pixels


WITH_ALPHA = [
    *(("a.webm", "libvpx-vp9", "yuva420p"), ("a.mkv", "ffv1", "bgra"), ("a.mov", "png", "rgba")),
    *(("a.mov", "qtrle", "argb"), ("a.mov", "prores_ks", "yuva444p10le")),
]


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".webm"])
@pytest.mark.parametrize(("name", "codec", "pixel_format"), WITH_ALPHA)
def test_transparency_is_kept(tmp_path, name, codec, pixel_format, suffix):
    path, target = tmp_path / name, tmp_path / f"b{suffix}"
    write_frames(path, [transparent()] * 2, codec, pixel_format)
    kinds = set()

    def stream(frames):
        for frame in frames:
            kinds.add((frame.shape[-1], int(frame[..., 3].min()), int(frame[..., 3].max()) >> (frame.itemsize - 1) * 8))
            yield frame.repeat(SCALE, 0).repeat(SCALE, 1)

    upscale_video(path, target, stream, SCALE)
    assert kinds == {(4, 0, 255)}
    for frame in decoded(target, "rgba"):
        expected = transparent().repeat(SCALE, 0).repeat(SCALE, 1)
        assert abs(frame[..., 3].astype(int) - expected[..., 3]).mean() < 3
        assert abs(frame[..., 0].astype(int) - 200).mean() < 4


def test_transparency_is_dropped_with_one_notice(tmp_path, caplog):
    write_frames(tmp_path / "a.mkv", [transparent()] * 3, "ffv1", "bgra")
    enlarge(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert caplog.text.count("the transparency was dropped") == 1
    assert decoded(tmp_path / "b.mp4", "rgb24")[0].shape == (144, 192, 3)


def test_a_size_that_changes_is_scaled(tmp_path, caplog):
    """Two films of different sizes in one elementary stream, as broadcasts do."""
    parts = []
    for size in ((48, 36), (64, 48)):
        make(tmp_path / "part.264", size=size, audio=0, count=3)
        parts.append((tmp_path / "part.264").read_bytes())
    Path(tmp_path / "a.264").write_bytes(b"".join(parts))
    report = enlarge(tmp_path / "a.264", tmp_path / "b.mkv")
    assert (report.frames, report.output_size) == (6, (192, 144))
    assert caplog.text.count("the frame size changes within the film") == 1


def test_another_size_than_a_whole_factor(tmp_path):
    make(tmp_path / "a.mp4", count=3)

    def stream(frames):
        for frame in frames:
            yield frame.repeat(2, 0).repeat(2, 1)[:70, :90]

    report = upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", stream, lambda width, height: (90, 70))
    assert report.output_size == (90, 70)
    assert times(tmp_path / "b.mp4") == times(tmp_path / "a.mp4")
    assert audio(tmp_path / "b.mp4") == audio(tmp_path / "a.mp4")


def test_a_lost_description_of_the_display_is_said(tmp_path, caplog):
    make(tmp_path / "a.mkv", count=1, audio=0)
    write_hdr10(tmp_path / "b.mp4")
    enlarge(tmp_path / "a.mkv", tmp_path / "c.mkv")
    assert "HDR10" not in caplog.text
    enlarge(tmp_path / "b.mp4", tmp_path / "c.mkv")
    assert caplog.text.count("(HDR10) was dropped") == 1


def write_hdr10(path: Path) -> None:
    """HEVC with the light levels of its frames."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx265", rate=25, options={"x265-params": "log-level=none:max-cll=1000,400"})
        stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p10le"
        frame = av.VideoFrame.from_ndarray(np.zeros((72, 96, 3), np.uint16), format="rgb48le")
        output.mux(stream.encode(frame.reformat(format="yuv420p10le")))
        output.mux(stream.encode(None))
