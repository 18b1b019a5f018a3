"""What the formats that are zip archives share: their contents, and what reading a damaged one raises."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

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


def is_pickle_record(name: str) -> bool:
    """Whether this member of an archive is the one that torch.save writes its pickle to."""
    return name == "data.pkl" or name.endswith("/data.pkl")


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
