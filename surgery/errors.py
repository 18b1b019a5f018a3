"""The exceptions of the engine: one tree, each with a message for a person and a hint, the next command to type.

SurgeryError
├── CheckpointError   bytes that cannot be read, or are not what they say
├── PlanError         a plan that cannot be parsed, checked or applied
└── GraftError        the answer is no: ambiguous, refuted, or below what was required; carries the report
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.report import Report


class SurgeryError(Exception):
    """Base of all that the engine raises on purpose. `hint` is the next thing to try, or empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(SurgeryError):
    """A checkpoint cannot be read: missing, truncated, corrupt, of an unknown format, or a pickle that holds code."""


class PlanError(SurgeryError):
    """A plan does not parse, does not fit its source or target, or breaks the law of accounting."""


class GraftError(SurgeryError):
    """A graft was refused. The target is as it was before; `report` says what was found."""

    def __init__(self, message: str, *, hint: str = "", report: Report | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report
