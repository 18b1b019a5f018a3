"""What the files of the second set share."""

from __future__ import annotations

from tests.mutations.defects import Slip
from tests.mutations.families import Family, awake, call, noise, rng

__all__ = ["Family", "awake", "call", "noise", "rng", "slips_of"]


def slips_of(family: str, *rows: tuple[str, str, tuple[str, ...], tuple[str, ...]]) -> list[Slip]:
    """(kind, the target's `slip`, modules of which one must be named, causes of which one must be named)."""
    return [Slip(family, kind, {"slip": slip}, where, causes) for kind, slip, where, causes in rows]
