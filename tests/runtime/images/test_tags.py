"""EXIF, XMP and IPTC: what states the size follows it, what shows the old picture goes, the rest keeps its bytes."""

from __future__ import annotations

import io
import struct
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.runtime.images.raw_files import box
from tests.runtime.sample_images import SCALE, bytes_of, exif, nearest
from tinysr_kernels.runtime.dispatch import upscale_image
from tinysr_kernels.runtime.images.tags import exif as exif_tags
from tinysr_kernels.runtime.images.tags import iptc, tiff, xmp
from tinysr_kernels.runtime.images.tags.header import read_header

NOTE = b"Canon note with offsets"


def camera(order: str = "<", thumbnail: bytes = b"JPEG" * 30) -> bytes:
    """EXIF as cameras write it: orientation, a maker's note, a position in pixels, GPS, a thumbnail."""

    def directory(*entries: tuple[int, int, int, bytes], following: int = 0) -> bytes:
        packed = [struct.pack(order + "HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries]
        return struct.pack(order + "H", len(entries)) + b"".join(packed) + struct.pack(order + "I", following)

    def long(number: int) -> bytes:
        return struct.pack(order + "I", number)

    def short(number: int) -> bytes:
        return struct.pack(order + "H", number)

    first, detail = 8, 8 + 2 + 3 * 12 + 4
    note = detail + 2 + 4 * 12 + 4
    second = note + len(NOTE) + len(NOTE) % 2
    picture = second + 2 + 2 * 12 + 4
    head = (b"II*\0" if order == "<" else b"MM\0*") + long(first)
    blob = head + directory(
        (0x010F, 2, 4, b"Can\0"), (0x0112, 3, 1, short(6)), (0x8769, 4, 1, long(detail)), following=second
    )
    blob += directory(
        (0x9214, 3, 2, short(4) + short(3)),
        (0x927C, 7, len(NOTE), long(note)),
        (0xA002, 3, 1, short(8)),
        (0xA003, 4, 1, long(6)),
    )
    blob += NOTE + b"\0" * (len(NOTE) % 2)
    blob += directory((0x0201, 4, 1, long(picture)), (0x0202, 4, 1, long(len(thumbnail)))) + thumbnail
    return b"Exif\0\0" + blob


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_is_edited_in_place(order, form):
    source = camera(order)
    image = Image.open(io.BytesIO(bytes_of(Image.new("RGB", (8, 6)), form, exif=source)))
    made = upscale_image(image, nearest, SCALE).info["exif"]
    assert made.index(NOTE) == source.index(NOTE)  # offsets in the note stay true
    assert b"JPEGJPEG" not in made
    found = Image.Exif()
    found.load(made)
    assert dict(found) == {0x010F: "Can", 0x8769: found[0x8769]}
    detail = found.get_ifd(0x8769)
    assert detail == {0x927C: NOTE, 0xA002: 24, 0xA003: 32}  # turned by the orientation
    assert found.get_ifd(1) == {}  # the thumbnail's directory


def test_exif_that_was_edited_in_memory_is_kept():
    image = Image.open(io.BytesIO(bytes_of(Image.new("RGB", (8, 6)), "JPEG", exif=camera())))
    image.getexif()[0x013B] = "me"
    made = upscale_image(image, nearest, SCALE).getexif()
    assert made[0x013B] == "me"
    assert 0x0112 not in made


def test_texts_are_appended():
    source = camera()
    made = exif_tags.with_texts(source, {exif_tags.ARTIST: "Jörg", exif_tags.USER_COMMENT: "東京"})
    assert made[: source.index(NOTE)][14:] == source[: source.index(NOTE)][14:]  # but for the link to the directory
    assert exif_tags.read_text(made, exif_tags.ARTIST) == "Jörg"
    assert exif_tags.read_text(made, exif_tags.USER_COMMENT) == "東京"
    found = Image.Exif()
    found.load(made)
    (count,) = struct.unpack_from("<H", made, start := 6 + struct.unpack_from("<I", made, 10)[0])
    written = [struct.unpack_from("<H", made, start + 2 + 12 * index)[0] for index in range(count)]
    assert written == [0x010F, 0x0112, 0x013B, 0x8769]  # TIFF wants them sorted
    assert found.get_ifd(0x8769)[0x927C] == NOTE
    assert exif_tags.read_text(exif_tags.with_texts(None, {exif_tags.ARTIST: "x"}), exif_tags.ARTIST) == "x"


def test_a_fixed_note_is_named_when_it_would_move():
    tags, lost = tiff.tags_of(camera())
    assert lost == ["the maker's note"]
    assert 0x927C not in tags[0x8769]
    movable = camera().replace(NOTE, b"FUJIFILM" + NOTE[8:])
    tags, lost = tiff.tags_of(movable)
    assert not lost
    assert tags[0x8769][0x927C].startswith(b"FUJIFILM")


@given(data=st.data())
def test_corrupt_exif_raises_only_what_is_caught(data):
    blob = bytearray(camera(data.draw(st.sampled_from("<>"))))
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(6, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(blob[: data.draw(st.integers(0, len(blob)))])
    for work in (
        exif_tags.cleaned,
        lambda given: exif_tags.resized(given, 10, 10),
        lambda given: exif_tags.with_texts(given, {exif_tags.ARTIST: "x", exif_tags.USER_COMMENT: "y"}),
        exif_tags.is_adobe_rgb,
    ):
        with suppress(struct.error, ValueError):
            result = work(cut)
            assert result is None or result is True or result is False or len(result) < 2 * len(blob) + 600


# XMP

PACKET = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description
  tiff:Orientation="6" tiff:ImageWidth='8' exif:PixelXDimension="8" hdrgm:Version="1.0"
  GCamera:MicroVideo="1" GCamera:MicroVideoOffset="99" xmpNote:HasExtendedXMP="AB"
  GPano:CroppedAreaImageWidthPixels="8" GPano:FullPanoWidthPixels="16" GPano:CroppedAreaTopPixels="3">
 <tiff:ImageLength>6</tiff:ImageLength><stDim:w>8</stDim:w><dc:title>left alone</dc:title>
 <mwg-rs:AppliedToDimensions stDim:w="8" stDim:h="6" stDim:unit="pixel"/>
 <hdrgm:GainMapMax><rdf:Seq><rdf:li>3</rdf:li></rdf:Seq></hdrgm:GainMapMax>
 <Container:Directory><rdf:Seq/></Container:Directory><xmp:Thumbnails>base64</xmp:Thumbnails>
</rdf:Description></x:xmpmeta>"""


def test_xmp_follows_the_size_and_forgets_the_old_file():
    packet, lost = xmp.clean(PACKET + b"\0")
    assert packet is not None
    packet = xmp.resized(packet, 24, 32)
    for kept in (
        *(b'tiff:Orientation="1"', b"tiff:ImageWidth='24'", b'exif:PixelXDimension="24"', b">32</tiff:ImageLength>"),
        *(b'ImageWidthPixels="24"', b'PanoWidthPixels="48"', b'TopPixels="9"', b'stDim:w="24" stDim:h="32"'),
        b"<dc:title>left alone</dc:title>",
    ):
        assert kept in packet
    for gone in (b"hdrgm", b"GCamera", b"HasExtended", b"Container", b"base64"):
        assert gone not in packet
    assert lost == ["the HDR gain map (the result is the SDR image)", "the film of a motion photo", "extended XMP"]


@pytest.mark.parametrize(
    "unit",
    [
        b"<hdrgm:A ",
        b"<hdrgm:A>",
        b" hdrgm:A='",
        b' hdrgm:A="',
        b"  ",
        b"<xmp:Thumbnails>",
        b'tiff:ImageWidth="1',
        b"\0",
    ],
)
def test_hostile_xmp_takes_linear_time(unit):
    started = time.process_time()
    packet, _ = xmp.clean(unit * ((1 << 20) // len(unit)) + b".")
    if packet:
        xmp.resized(packet, 10, 10)
    assert time.process_time() - started < 5  # 0.1 s; quadratic work would take hours


def test_long_or_empty_xmp_goes():
    assert xmp.clean(b" \r\n\0") == (None, [])
    assert xmp.clean(b"<x/>" * (5 << 20)) == (None, ["XMP (20971520 bytes)"])
    names = b"".join(b"<hdrgm:A%d>" % number for number in range(200))
    assert xmp.clean(names)[0] is None


# IPTC


def test_photoshop_resources_round_trip():
    records = b"\x1c\x02\x05\x00\x03abc"
    segment = iptc.jpeg_segment(records)
    assert iptc.from_resources(segment[18:]) == records
    named = b"8BIM\x03\xed\x03abc\0\0\0\x01x\0" + segment[18:]
    assert iptc.from_resources(named) == records
    assert iptc.from_png_text(iptc.to_png_text(records * 20)) == records * 20
    with pytest.raises(ValueError, match="too long"):
        iptc.jpeg_segment(bytes(65530))


@given(st.binary(max_size=80))
def test_any_bytes_can_be_asked_for_iptc(data):
    iptc.from_resources(b"8BIM" + data)
    iptc.from_resources(b"8BIM\x04\x03" + data)
    kept = iptc.without_raster(b"\x1c" + data)
    assert kept is None or kept in b"\x1c" + data or len(kept) < len(data)


# Headers


@given(data=st.data())
def test_corrupt_headers_are_left_to_the_decoders(data):
    files = {
        "AVIF": box(
            b"meta",
            bytes(4),
            box(b"pitm", bytes(4), b"\0\1"),
            box(
                b"iprp",
                box(b"ipco", box(b"colr", b"nclx" + struct.pack(">HHHB", 12, 13, 0, 128))),
                box(b"ipma", bytes(4), struct.pack(">IHBB", 1, 1, 1, 1)),
            ),
        ),
        "JPEG2000": box(b"jp2h", box(b"colr", struct.pack(">BBBI", 1, 0, 0, 21))) + box(b"uuid", bytes(20)),
        "BMP": b"BM"
        + bytes(12)
        + struct.pack("<I", 124)
        + bytes(52)
        + struct.pack("<12I", 4, 2, 0, 3, 7, 1, 2, 1, 9, 65536, 65536, 65536)
        + bytes(20),
        "GIF": b"GIF89a\x21\xff\x0bXMP DataXMP<x/>\x01\xff\xfe\xfd",
        "PNG": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 4) + b"cICP\x0c\x0d\0\1abcd",
    }
    form = data.draw(st.sampled_from(sorted(files)))
    assert read_header(io.BytesIO(files[form]), form) != read_header(None, form)
    blob = bytearray(files[form])
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    stream = io.BytesIO(bytes(blob[: data.draw(st.integers(0, len(blob)))]))
    stream.seek(3)
    read_header(stream, form)
    assert stream.tell() == 3


def test_gain_maps_of_heif_are_named():
    item = box(b"infe", b"\2\0\0\0\0\2\0\0", b"tmap\0")
    for parts in (box(b"iinf", bytes(6), item), box(b"iprp", box(b"ipco", box(b"auxC", b"urn:x:aux:hdrgainmap\0")))):
        header = read_header(io.BytesIO(box(b"ftyp", b"avif") + box(b"meta", bytes(4), parts)), "AVIF")
        assert header.lost == (xmp.GAIN_MAP,)


# Results in memory


def test_a_result_in_memory_has_the_texts_and_records():
    comment, records = b"remark", b"\x1c\x02\x05\x00\x03abc"
    data = bytes_of(Image.new("RGB", (8, 6)), "JPEG", comment=comment, extra=iptc.jpeg_segment(records), exif=exif(1))
    result = upscale_image(Image.open(io.BytesIO(data)), nearest, SCALE)
    assert result.info["comment"] == comment
    assert result.info["photoshop"] == {0x0404: records}
    again = Image.open(io.BytesIO(bytes_of(result, "JPEG")))  # Pillow's own writing keeps the comment
    assert again.info["comment"] == comment
    copied = upscale_image(result.convert("L"), nearest, SCALE)
    assert copied.info["photoshop"] == {0x0404: records}
