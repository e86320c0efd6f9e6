"""What a file is, by its first bytes: the formats that are opened, and the true name of those that are not."""

from __future__ import annotations

from pathlib import Path

from tinysr_kernels.errors import InputError

HEAD_BYTES = 512

# The formats that Pillow may open: in common use, and decoded by code that is fuzzed by many. All others are refused:
# each decoder is one more way in, and those of rare formats (PSD, FITS, FLI, BLP) had most of the memory corruptions.
# TGA stands last, because it has no magic number. MPO files are opened as JPEG; TIFF and HEIF have own readers.
PILLOW_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "PPM", "ICO", "AVIF", "JPEG2000", "PCX", "SGI", "QOI"),
    "TGA",
)

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
_RAW = "a camera raw file; develop it first (in a raw converter) and save it as 16-bit TIFF or PNG"

# Signature, its offset, and what to say of the file.
_KNOWN = (
    (b"%PDF", 0, "a PDF document; render its pages to images first"),
    (b"%!PS", 0, "a PostScript file; render it to an image first"),
    (b"\xc5\xd0\xd3\xc6", 0, "a PostScript file; render it to an image first"),
    (b"PK\x03\x04", 0, "a ZIP archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive; unpack it first"),
    (b"Rar!", 0, "a RAR archive; unpack it first"),
    (b"\x1f\x8b\x08", 0, "a gzip archive; unpack it first"),
    (b"\xff\x0a", 0, "a JPEG XL image; convert it to PNG first"),
    (b"\0\0\0\x0cJXL ", 0, "a JPEG XL image; convert it to PNG first"),
    (b"II\xbc", 0, "a JPEG XR image; convert it to PNG first"),
    (b"8BPS", 0, "a Photoshop document; flatten it and save it as PNG or TIFF first"),
    (b"gimp xcf", 0, "a GIMP document; export it as PNG or TIFF first"),
    (
        b"\x76\x2f\x31\x01",
        0,
        "an OpenEXR image of floating-point samples; tone map it and save it as 16-bit PNG or TIFF",
    ),
    (b"#?RADIANCE", 0, "a Radiance HDR image; tone map it and save it as 16-bit PNG or TIFF"),
    (b"#?RGBE", 0, "a Radiance HDR image; tone map it and save it as 16-bit PNG or TIFF"),
    (b"PF\n", 0, "a PFM image of floating-point samples; save it as 16-bit PNG or TIFF"),
    (b"Pf\n", 0, "a PFM image of floating-point samples; save it as 16-bit PNG or TIFF"),
    (b"P7\n", 0, "a PAM image; convert it to PNG first"),
    (b"SIMPLE  =", 0, "a FITS file; stretch it and save it as 16-bit TIFF or PNG first"),
    (b"DDS ", 0, "a DDS texture; convert it to PNG or TGA first"),
    (b"\xabKTX ", 0, "a KTX texture; convert it to PNG first"),
    (b"BLP", 0, "a BLP texture; convert it to PNG first"),
    (b"icns", 0, "an Apple icon; convert it to PNG first"),
    (b"\0\0\2\0\1\0", 0, "a Windows cursor; convert it to PNG first"),
    (b"DICM", 128, "a DICOM file; export it as 16-bit PNG or TIFF first"),
    (b"AT&TFORM", 0, "a DjVu document; render its pages to images first"),
    (b"\x12\x11", 4, "a FLIC animation; convert it to PNG or GIF first"),
    (b"\xd7\xcd\xc6\x9a", 0, "a Windows metafile; render it to an image first"),
    (b"/* XPM", 0, "an XPM image; convert it to PNG first"),
    (b"#define ", 0, "an XBM image or other C source; convert it to PNG first"),
    (b"<svg", -1, "an SVG drawing; render it at the wanted size instead"),
)
_RAW_MAGIC = (
    (b"FUJIFILMCCD-RAW", 0),
    (b"ftypcrx ", 4),  # Canon CR3
    (b"IIRO", 0),  # Olympus ORF
    (b"IIRS", 0),
    (b"MMOR", 0),
    (b"IIU\0", 0),  # Panasonic RW2
    (b"CR\2", 8),  # Canon CR2, a TIFF file
    (b"HEAPCCDR", 6),  # Canon CRW
    (b"FOVb", 0),  # Sigma X3F
    (b"\0MRM", 0),  # Minolta
    (b"IIII", 8),  # Phase One, a TIFF file
    (b"MMMM", 8),
)


def is_tiff(head: bytes) -> bool:
    """Whether a file begins like TIFF or BigTIFF."""
    return head.startswith(_TIFF_MAGIC)


def is_heif(head: bytes) -> bool:
    """Whether a file begins like HEIC or HEIF; AVIF is a format of its own."""
    brands = head[8 : max(16, int.from_bytes(head[:4], "big"))]
    return head[4:8] == b"ftyp" and brands[:4] in _HEIF_BRANDS and not (brands[:4] == b"mif1" and b"avif" in brands)


def refused(path: Path, head: bytes) -> InputError | None:
    """The error for a file that is known and not accepted, else None. head: the first HEAD_BYTES bytes of the file."""
    if not head:
        return InputError(f"{path}: the file is empty")
    if any(head[offset:].startswith(magic) for magic, offset in _RAW_MAGIC):
        return raw_file(path)
    for magic, offset, what in _KNOWN:
        if magic in head[:256] if offset < 0 else head[offset:].startswith(magic):
            return InputError(f"{path}: {what}")
    return None


def raw_file(path: Path) -> InputError:
    """The error for a camera raw file, whose only finished image is its thumbnail."""
    return InputError(f"{path}: {_RAW}")


def unknown_content(path: Path, head: bytes) -> InputError:
    """The error for a file that no decoder accepts, naming its likely type. head: the first bytes of the file."""
    known = refused(path, head)
    if known is not None:
        return known
    if _is_text(head):
        return InputError(f"{path}: text, not an image (begins with {head[:24].decode(errors='replace')!r})")
    return InputError(
        f"{path}: not an image, damaged at its beginning, or in a format that is not accepted "
        f"(begins with {head[:12].hex(' ')}); convert it to PNG, JPEG or TIFF"
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character may be cut off at the end
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter in "\t\r\n\f\ufeff" for letter in text)
