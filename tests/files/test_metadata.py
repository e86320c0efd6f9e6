"""Metadata of files: kept where the output format can, moved to its obvious home, else named in one notice."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from tests.runtime.images.raw_files import bmp_v4, box, jp2, png
from tests.runtime.sample_images import bytes_of, enlarge_file, exif, nearest, noise, put
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.encode import Encoding, writable
from tinysr_kernels.files.picture_io import read_image
from tinysr_kernels.runtime.dispatch import upscale_image
from tinysr_kernels.runtime.images.color.h273 import Label
from tinysr_kernels.runtime.images.metadata import Metadata, collect
from tinysr_kernels.runtime.images.tags import exif as exif_tags
from tinysr_kernels.runtime.images.tags.header import read_header

PIXELS = np.full((6, 8, 3), 120, np.uint8)
PROMPT = "a cat, 東京\nSteps: 20, Size: 512x512"
IPTC = b"\x1c\x02\x05\x00\x04Head\x1c\x02\x78\x00\x07Caption"
SUFFIXES = [".png", ".jpg", ".webp", ".tif", ".avif"]


def text(key: str, value: str) -> tuple[bytes, bytes]:
    return b"iTXt", key.encode() + b"\0\0\0\0\0" + value.encode()


def found_in(path) -> Metadata:
    with Image.open(path) as image:
        header = read_header(image.fp, image.format)
        image.load()
        return collect(image, header)


def converted(folder, data: bytes, suffix: str, encoding: Encoding | None = None) -> Metadata:
    if not writable(suffix):
        pytest.skip("this Pillow lacks the format")
    enlarge_file(put(folder, "source", data), folder / f"result{suffix}", encoding)
    return found_in(folder / f"result{suffix}")


def jpeg(*, comment: bytes = b"", extra: bytes = b"", **options) -> bytes:
    return bytes_of(Image.fromarray(PIXELS), "JPEG", comment=comment, extra=extra, **options)


def app13(*resources: tuple[int, bytes]) -> bytes:
    data = b"Photoshop 3.0\0"
    for kind, content in resources:
        data += b"8BIM" + struct.pack(">HHI", kind, 0, len(content)) + content + b"\0" * (len(content) % 2)
    return b"\xff\xed" + struct.pack(">H", len(data) + 2) + data


# Texts and comments


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("late", [False, True])
def test_png_texts_stay_in_png(tmp_path, dtype, late, caplog):
    international = b"Title\0\0\0de\0Titel\0" + "Größe".encode()
    chunks = ((b"tEXt", b"Author\0J\xf6rg"), text("parameters", PROMPT), (b"iTXt", international))
    chunks += ((b"zTXt", b"workflow\0\0" + zlib.compress(b'{"nodes": 3}')),)
    data = png(PIXELS.astype(dtype), *(() if late else chunks), after=chunks if late else ())
    found = dict(converted(tmp_path, data, ".png").texts)
    assert found == {"Author": "Jörg", "parameters": PROMPT, "Title": "Größe", "workflow": '{"nodes": 3}'}
    assert (found["Title"].lang, found["Title"].tkey) == ("de", "Titel")
    assert not caplog.records


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_prompt_moves_to_the_user_comment(tmp_path, suffix, caplog):
    data = png(PIXELS, text("parameters", PROMPT), text("Author", "Jörg"), text("Title", "x"))
    made = converted(tmp_path, data, suffix).exif
    assert exif_tags.read_text(made, exif_tags.USER_COMMENT) == PROMPT
    assert exif_tags.read_text(made, exif_tags.ARTIST) == "Jörg"
    name = {".tif": "TIFF", ".jpg": "JPEG"}.get(suffix, suffix[1:].upper())
    dropped = [record.message for record in caplog.records if "dropped" in record.message]
    assert dropped == [f"dropped because {name} cannot store it: 'Title'"]


def test_a_prompt_joins_the_exif_that_is_there(tmp_path):
    data = bytes_of(Image.fromarray(PIXELS), "PNG", exif=exif(1), pnginfo=info(parameters=PROMPT, Software="webui"))
    converted(tmp_path, data, ".jpg")
    with Image.open(tmp_path / "result.jpg") as image:
        found = image.getexif()
    assert found[0x010F] == "maker"
    assert found[0x0131] == "webui"
    assert found.get_ifd(0x8769)[0xA002] == 32
    assert found.get_ifd(0x8769)[0x9286] == b"UNICODE\0" + PROMPT.encode("utf-16-be")
    assert found.get_ifd(0x8825)[1] == "N"


def info(**texts: str) -> PngImagePlugin.PngInfo:
    made = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        made.add_text(key, value)
    return made


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("form", ["JPEG", "GIF"])
def test_comments_are_kept(tmp_path, suffix, form):
    image = Image.fromarray(PIXELS)
    data = jpeg(comment="schön".encode()) if form == "JPEG" else bytes_of(image, "GIF", comment="schön".encode())
    found = converted(tmp_path, data, suffix)
    if suffix in (".png", ".jpg"):
        assert found.texts == (("Comment", "schön"),)
    else:
        assert exif_tags.read_text(found.exif, exif_tags.USER_COMMENT) == "schön"


def test_every_comment_of_a_jpeg_is_kept(tmp_path):
    more = b"\xff\xfe" + struct.pack(">H", 2 + 6) + b"second"
    found = converted(tmp_path, jpeg(comment=b"first", extra=more), ".jpg")
    assert sorted(found.texts) == [("Comment", "first"), ("Comment", "second")]


def test_a_long_text_is_left_out_of_jpeg_but_its_neighbors_stay(tmp_path, caplog):
    data = png(PIXELS, text("parameters", "x" * 70000), text("Author", "me"))
    made = converted(tmp_path, data, ".jpg").exif
    assert exif_tags.read_text(made, exif_tags.ARTIST) == "me"
    assert "dropped because JPEG cannot store it: 'parameters'" in caplog.text


def test_texts_named_like_other_things_do_no_harm(tmp_path, caplog):
    names = ["transparency", "icc_profile", "dpi", "gamma", "photoshop", "cicp", "aux", "depth_images", "xmp", "srgb"]
    for name in names:
        data = png(PIXELS, (b"tEXt", name.encode() + b"\0x"))
        found = converted(tmp_path, data, ".png")
        assert found == Metadata()
        assert f"the text '{name}'" in caplog.text
        result = upscale_image(Image.open(io.BytesIO(data)), nearest, 4)
        assert result.info == {}
        bytes_of(result, "PNG")


def test_the_signatures_of_encoders_are_no_comments(tmp_path):
    data = bytes_of(Image.fromarray(PIXELS), "JPEG2000")
    assert b"Created by OpenJPEG" in data
    assert converted(tmp_path, data, ".png").texts == ()


def test_the_time_of_a_png(tmp_path):
    time = struct.pack(">H5B", 2026, 3, 4, 5, 6, 7)
    assert converted(tmp_path, png(PIXELS, (b"tIME", time)), ".png").modified == time
    made = converted(tmp_path, png(PIXELS, (b"tIME", time)), ".jpg").exif
    assert exif_tags.read_text(made, exif_tags.DATE) == "2026:03:04 05:06:07"
    assert converted(tmp_path, png(PIXELS, (b"tIME", b"\xff" * 7)), ".jpg").exif is None


# IPTC


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("source", ["jpeg", "tiff", "png", "tiff in Photoshop's tag"])
def test_iptc_is_kept_or_named(tmp_path, suffix, source, caplog):
    raster = b"\x1c\x03\x14\x00\x02\x00\x08"  # 3:20, the width
    preview = b"\x1c\x02\xca\x80\x04\x00\x00\x00\x03abc"  # 2:202, with a long length
    records = IPTC[:9] + preview + raster + IPTC[9:]
    if source == "jpeg":
        data = jpeg(extra=app13((0x040C, b"thumb"), (0x0404, records)))
    elif source == "png":
        hexadecimal = f"\niptc\n{len(records):8d}\n{records.hex()}\n".encode()
        data = png(PIXELS, (b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(hexadecimal)))
    else:
        block = app13((0x0425, b"xyz"), (0x0404, records))[18:]
        tag, content = (33723, records) if source == "tiff" else (34377, block)
        data = bytes_of(Image.fromarray(PIXELS), "TIFF", tiffinfo={tag: content})
    found = converted(tmp_path, data, suffix)
    if suffix in (".webp", ".avif"):
        assert found.iptc is None
        assert f"dropped because {suffix[1:].upper()} cannot store it: IPTC" in caplog.text
    else:
        assert found.iptc == IPTC


# TIFF


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tiff_and_bigtiff(tmp_path, big, suffix, caplog):
    tags = ImageFileDirectory_v2()
    tags[271], tags[315], tags[270] = "maker", "Jörg".encode(), "a view"
    tags[0x8769], tags[0x8825] = {0xA002: 8, 0xA003: 6}, {1: "N"}
    data = bytes_of(Image.fromarray(PIXELS), "TIFF", big_tiff=big, tiffinfo=tags)
    made = converted(tmp_path, data, suffix).exif
    assert exif_tags.read_text(made, exif_tags.ARTIST) == "Jörg"
    assert exif_tags.read_text(made, exif_tags.DESCRIPTION) == "a view"
    with Image.open(tmp_path / f"result{suffix}") as image:
        found = image.getexif()
        assert found[271] == "maker"
        assert found.get_ifd(0x8769)[0xA002] == 32
        assert found.get_ifd(0x8825)[1] == "N"
    assert not caplog.records


@pytest.mark.parametrize(
    "description",
    [
        '{"shape": [6, 8, 3]}',
        "ImageJ=1.53t\nimages=1\nchannels=3\n",
        '<?xml version="1.0"?><OME><Pixels SizeX="8"/></OME>',
        "Aperio Image Library v10 8x6",
        "scan, 8 x 6 pixels",
    ],
)
def test_a_description_that_states_the_size_goes(tmp_path, description, caplog):
    data = bytes_of(Image.fromarray(PIXELS), "TIFF", tiffinfo={270: description, 305: "scanner"})
    made = converted(tmp_path, data, ".tif").exif
    assert exif_tags.read_text(made, exif_tags.DESCRIPTION) is None
    assert exif_tags.read_text(made, exif_tags.SOFTWARE) == "scanner"
    assert "a description that states the size (TIFF tag 270)" in caplog.text


def test_tags_about_the_old_pixels_go_with_one_notice(tmp_path, caplog):
    tags = {33550: (0.5, 0.5, 0.0), 33922: (0.0,) * 6, 42113: "-9999", 50839: b"ij", 37724: b"layers", 65000: 7}
    data = bytes_of(Image.fromarray(PIXELS), "TIFF", tiffinfo={**tags, 33432: "me"})
    converted(tmp_path, data, ".tif")
    with Image.open(tmp_path / "result.tif") as image:
        assert image.tag_v2[33432] == "me"
        assert not set(tags) & set(image.tag_v2)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("dropped with the old file: ")
    assert sorted(message[27:].split(", ")) == [
        "GDAL metadata",
        "ImageJ metadata",
        "Photoshop layers",
        "TIFF tag 65000",
        "georeference (GeoTIFF)",
    ]


# Other formats


def test_jpeg2000_keeps_xmp_and_exif(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:ImageWidth="8"/></x:xmpmeta>'
    stream = bytes_of(Image.fromarray(PIXELS), "JPEG2000", no_jp2=True)
    uuids = (
        box(b"uuid", bytes.fromhex("be7acfcb97a942e89c71999491e3afac"), xmp),
        box(b"uuid", b"JpgTiffExif->JP2", exif(1).tobytes()[6:]),
    )
    found = converted(tmp_path, jp2(stream, struct.pack(">BBBI", 1, 0, 0, 16), 8, 6, 3, *uuids), ".jpg")
    assert b'tiff:ImageWidth="32"' in found.xmp
    assert exif_tags.read_text(found.exif, 0x010F) == "maker"


def test_gif_keeps_xmp(tmp_path):
    data = bytes_of(Image.fromarray(PIXELS), "GIF")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r/></x:xmpmeta>'
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    at = data.index(b"\x2c\0\0\0\0")
    data = data[:at] + b"\x21\xff\x0bXMP DataXMP" + xmp + trailer + data[at:]
    assert converted(tmp_path, data, ".png").xmp == xmp


def test_bmp_keeps_the_colors_and_names_the_rest(tmp_path, caplog):
    gray = png(np.full((4, 5, 1), 64, np.uint8), (b"gAMA", struct.pack(">I", 100000)), text("Title", "x"))
    converted(tmp_path, gray, ".bmp")
    with Image.open(tmp_path / "result.bmp") as image:
        assert abs(image.convert("RGB").getpixel((0, 0))[0] - 137) <= 1  # linear 64/255 in sRGB
    assert "converted to sRGB, because the format cannot store an ICC profile" in caplog.text
    assert "dropped because BMP cannot store it: 'Title'" in caplog.text


def test_calibrated_bmp_stays_so(tmp_path):
    points = np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    put(tmp_path, "a.bmp", bmp_v4(PIXELS, points, 1.0))
    enlarge_file(tmp_path / "a.bmp", tmp_path / "b.bmp")
    assert abs(read_image(tmp_path / "b.bmp").image.getpixel((0, 0))[0] - 182) <= 1  # linear 120/255 in sRGB


def test_content_credentials_and_paths_are_named(tmp_path, caplog):
    jumbf = b"\xff\xeb" + struct.pack(">H", 12) + b"JP\0\x01abcdef"
    converted(tmp_path, jpeg(extra=jumbf + app13((2000, b"path"))), ".jpg")
    assert "dropped with the old file: Photoshop paths, Content Credentials (JUMBF)" in caplog.text


# HDR


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_hdr_labels_stay_in_png_and_avif_and_are_refused_elsewhere(tmp_path, dtype, caplog):
    data = png(noise(6, 8, 3, dtype), (b"cICP", bytes([9, 16, 0, 1])))
    found = converted(tmp_path, data, ".png")
    assert (found.label, found.icc) == (Label(9, 16), None)
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "result.png").image)[::4, ::4], np.asarray(noise(6, 8, 3, dtype))
    )
    for suffix in (".jpg", ".webp", ".tif", ".bmp"):
        with pytest.raises(InputError, match=r"cannot state that its values are PQ \(HDR\); write PNG instead"):
            converted(tmp_path, data, suffix)
    assert converted(tmp_path, data, ".avif").label == Label(9, 16)


@pytest.mark.parametrize("suffix", [".png", ".avif", ".jpg"])
def test_other_labels_come_with_a_profile(tmp_path, suffix):
    found = converted(tmp_path, png(PIXELS, (b"cICP", bytes([12, 13, 0, 1]))), suffix)
    assert found.icc == Label(12, 13).profile(gray=False)
    assert found.label == (Label(12, 13) if suffix == ".png" else None)  # elsewhere the profile takes precedence
    if suffix == ".avif":
        with Image.open(tmp_path / "result.avif") as image:
            assert read_header(image.fp, "AVIF").label == Label(12, 13)


# Stripping and size


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_stripping_leaves_color_alone(tmp_path, suffix):
    chunks = [text("parameters", PROMPT), (b"tIME", struct.pack(">H5B", 2026, 3, 4, 5, 6, 7))]
    chunks += [(b"eXIf", exif(1).tobytes()[6:]), text("XML:com.adobe.xmp", "<x/>"), (b"cICP", bytes([12, 13, 0, 1]))]
    chunks += [(b"tEXt", b"Raw profile type iptc\0" + f"\niptc\n{len(IPTC):8d}\n{IPTC.hex()}\n".encode())]
    data = png(PIXELS, *chunks, (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)))
    kept = converted(tmp_path, data, suffix)
    assert kept.exif
    found = converted(tmp_path, data, suffix, Encoding(strip=True))
    profile = Label(12, 13).profile(gray=False)
    assert found.icc == profile
    assert [found.xmp, found.iptc, found.texts, found.modified, found.dpi] == [None, None, (), None, None]
    written = (tmp_path / f"result{suffix}").read_bytes()
    assert b"maker" not in written
    assert b"Steps" not in written
    assert "Steps".encode("utf-16-be") not in written


def test_metadata_never_costs_much(tmp_path, caplog):
    """Texts beyond the limits are dropped with a notice; the picture is done."""
    bomb = (b"zTXt", b"bomb\0\0" + zlib.compress(bytes(50 << 20)))
    plain = (b"tEXt", b"plain\0" + b"x" * (20 << 20))
    for place in ("before", "after"):
        chunks = (text("Title", "x"), bomb, plain)
        data = png(PIXELS, *(chunks if place == "before" else ()), after=chunks if place == "after" else ())
        found = converted(tmp_path, data, ".png")
        assert found.texts == (("Title", "x"),)
        assert "'bomb'" in caplog.text
        assert "'plain'" in caplog.text
        assert (tmp_path / "result.png").stat().st_size < 100_000
        caplog.clear()
