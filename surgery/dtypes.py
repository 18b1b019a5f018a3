"""Element types by the names that safetensors gives them ("F32", "BF16", "I64" ...): sizes, and the torch type of each.

Nothing here imports torch before a torch type is asked for, so that sizes and structure can be had without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# name: (bits of one element, attribute of torch). F6 has no torch type: it can be listed, hashed and copied, not read.
_TABLE: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    # torch and numpy have these, safetensors does not: they can be read, and written only after a cast.
    "C32": (32, "complex32"),
    "C128": (128, "complex128"),
}
_NOT_SAFETENSORS = frozenset({"C32", "C128"})

SAFETENSORS: frozenset[str] = frozenset(_TABLE) - _NOT_SAFETENSORS


def attributes() -> list[tuple[str, str]]:
    """Each name, and the attribute of torch that is its type."""
    return [(name, attribute) for name, (_, attribute) in _TABLE.items() if attribute]


def bits(dtype: str) -> int:
    """Bits of one element."""
    try:
        return _TABLE[dtype][0]
    except KeyError:
        raise CheckpointError(f"unknown dtype {dtype!r}", hint=f"Known: {', '.join(sorted(_TABLE))}.") from None


def nbytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor of this type and shape; None where packed elements do not fill whole bytes."""
    total = math.prod(shape) * bits(dtype)
    return None if total % 8 else total // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a name. CheckpointError where this torch has none."""
    import torch

    bits(dtype)
    found = getattr(torch, _TABLE[dtype][1], None) if _TABLE[dtype][1] else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"torch {torch.__version__} has no type for {dtype}",
            hint="A newer torch may have it: pip install -U torch. Listing, hashing and copying work without it.",
        )
    return found


def torch_shape(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape torch gives to a tensor of this type: F4 is packed two to a byte along the last axis."""
    if dtype != "F4" or not shape:
        return tuple(shape)
    return (*shape[:-1], shape[-1] // 2)


@cache
def _names() -> dict[torch.dtype, str]:
    import torch

    pairs = ((getattr(torch, attribute, None), name) for name, attribute in attributes())
    return {dtype: name for dtype, name in pairs if isinstance(dtype, torch.dtype)}


def name_of(dtype: torch.dtype) -> str:
    """The name of a torch type; its own spelling ("qint8") where safetensors has no name for it."""
    return _names().get(dtype, str(dtype).removeprefix("torch."))
