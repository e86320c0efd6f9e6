"""Where the records of a zip archive written by torch.save lie in the file.

torch.save stores records uncompressed, none twice and none in another's place; an archive that does otherwise is
refused, for then two readers could see two different checkpoints in it. Layout: PKWARE's APPNOTE.TXT, 4.3.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from tinysr_kernels.checkpoint.read.paths import MappedFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError, shorten

MAGIC = b"PK\x03\x04"
DIRECTORY_LIMIT = 32 * 2**20  # bytes of the central directory: 300,000 records
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64_BYTES = 20


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of one record within the file, and their checksum (CRC-32)."""

    offset: int
    size: int
    crc: int


def read_records(file: MappedFile) -> dict[str, Record]:
    """The records by their names without the archive's own, such as `data.pkl` and `data/0`.

    Raises CheckpointError for anything that torch.save does not write: damage, compression, encryption, two records of
    one name or in one place, records outside the file.
    """
    _check_end(file)
    try:
        data: Any = file.data  # a mapping reads and seeks like a file
        with zipfile.ZipFile(data) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise _damaged(file, str(error) or type(error).__name__) from error
    records: dict[str, Record] = {}
    for info, following in zip(infos, [*(one.header_offset for one in infos[1:]), file.size], strict=True):
        record = _record(file, info)
        if record.offset + record.size > following:
            raise _damaged(file, f"record {quoted(info.filename)} reaches into the next one or past the file's end")
        name = info.filename.partition("/")[2]
        if name in records or info.filename.partition("/")[0] != infos[0].filename.partition("/")[0]:
            raise _damaged(file, f"record {quoted(info.filename)} is there twice, or from a second archive")
        records[name] = record
    return records


def read_record(file: MappedFile, record: Record) -> bytes:
    """The content of a (small) record; CheckpointError if it has changed since it was written."""
    content = file.read(record.offset, record.size)
    if zlib.crc32(content) != record.crc:
        raise _damaged(file, "a record's checksum is wrong")
    return content


def _check_end(file: MappedFile) -> None:
    """Bound the central directory before zipfile reads it: every 46 bytes of it become an object of some 500."""
    size = min(file.size, _END64.size + _LOCATOR64_BYTES + _END.size)
    tail = file.read(file.size - size, size)
    if size < _END.size or not tail[-_END.size :].startswith(b"PK\x05\x06"):
        raise _damaged(file, "no directory at its end")
    directory = _END.unpack(tail[-_END.size :])[5]
    if len(tail) > _END64.size and tail.startswith(b"PK\x06\x06"):
        directory = _END64.unpack(tail[: _END64.size])[8]
    if directory > DIRECTORY_LIMIT:
        raise _damaged(file, f"its directory claims {directory} bytes, expected at most {DIRECTORY_LIMIT}")


def _record(file: MappedFile, info: zipfile.ZipInfo) -> Record:
    where = f"record {quoted(info.filename)}"
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise CheckpointError(
            f"{file.path}: {where} is compressed or encrypted, expected it stored as torch.save does; save the file "
            "again with torch.save or as safetensors"
        )
    if info.header_offset + _LOCAL_HEADER.size > file.size:
        raise _damaged(file, f"{where} claims to lie past the file's end")
    header = _LOCAL_HEADER.unpack(file.read(info.header_offset, _LOCAL_HEADER.size))
    if header[0] != MAGIC:
        raise _damaged(file, f"{where} is not where the directory says")
    return Record(info.header_offset + _LOCAL_HEADER.size + header[9] + header[10], info.file_size, info.CRC)


def _damaged(file: MappedFile, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path}: damaged or truncated PyTorch archive: {shorten(found, 300)}; fetch it again, or save it again "
        "with torch.save or as safetensors"
    )
