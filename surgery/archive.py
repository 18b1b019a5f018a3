"""What the formats that are zip archives share: their contents, and what reading a damaged one raises."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.reader import LocalFile

# What Python's readers of archives, and of pickles and arrays in them, raise on damaged bytes.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
    ValueError, OSError, EOFError, RuntimeError, LookupError, TypeError, SyntaxError, MemoryError,
)  # fmt: skip


def zip_names(path: Path) -> list[str]:
    """The names in a zip; none where it is not a whole zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except DAMAGE:
        return []


def stored_offset(file: LocalFile, member: zipfile.ZipInfo) -> int:
    """Where the content of an uncompressed member begins; the local header's own lengths say so."""
    local = file.bytes(member.header_offset, 30)
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return member.header_offset + 30 + lengths


def is_pickle_record(name: str) -> bool:
    """Whether this member of an archive is the one that torch.save writes its pickle to."""
    return name == "data.pkl" or name.endswith("/data.pkl")


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
