"""What running said, as data: residuals by pass and output, what was not exercised, symmetries, the first divergence.

The judge that fills it in is surgery.judge; nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GATE = (
    1e-12  # relative, in float64: two programs of one function differ by 1e-15, a wrong LayerNorm eps by 1e-8 and more
)

Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class PassResult:
    """One device and dtype. `status` "not run" is never a pass; `why` says what stood in the way, or what went
    wrong."""

    name: str  # "cpu/float64"
    status: Status
    why: str = ""
    residuals: Mapping[str, float] = field(default_factory=dict)  # by output, the worst over all inputs
    gate: float = GATE
    inputs: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)  # what the pass ran with, and how its gate was derived
    differs: bool = False  # it ran on both sides and gave another result; else `failed` means that it shows nothing

    @property
    def worst(self) -> float:
        """The largest residual; infinite where outputs cannot be compared, 0 where nothing was."""
        return max(self.residuals.values(), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where infinity does not exist: a residual that is not finite is null."""
        return {
            "name": self.name,
            "status": self.status,
            "why": self.why,
            "residuals": {name: _finite(value) for name, value in self.residuals.items()},
            "gate": _finite(self.gate),
            "inputs": list(self.inputs),
            "details": dict(self.details),
        }

    def __str__(self) -> str:
        if self.status == "not run":
            return f"{self.name}: not run: {self.why}"
        said = ", ".join(f"{name} {power(value)}" for name, value in self.residuals.items())
        where = f" on {', '.join(self.inputs)}" if self.inputs else ""
        why = f"; {self.why}" if self.why else ""
        return f"{self.name}: {self.status}: {said} (gate {power(self.gate)}){where}{why}"


@dataclass(frozen=True)
class Divergence:
    """The first place of the target that computes something else."""

    target_module: str
    reference_module: str  # of the reference's activation that is closest to what the target's module computed
    residual: float
    why: str  # in a sentence; with the cause, where trying it removed the difference
    cause: str = ""  # "eps", "gelu" ..., where one was found
    file: str = ""  # of the line of the target's program that computes it, where it is known
    line: int = 0
    fix: str = ""  # in the person's words: "Block.norm1 (mymodel.py:41): eps is 1e-05, the source has 1e-12"
    further: tuple[str, ...] = ()  # modules that add an error of their own once this one is corrected
    input: str = ""  # the proof input on which the two part: "plain", "padded" ...

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "target_module": self.target_module,
            "reference_module": self.reference_module,
            "residual": _finite(self.residual),
            "why": self.why,
            "cause": self.cause,
            "file": self.file,
            "line": self.line,
            "fix": self.fix,
            "further": list(self.further),
            "input": self.input,
        }

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class Departure:
    """A module of the target that computes something else, as allowed; the rest was proven around it."""

    module: str
    allowed: str  # the pattern that allows it
    reference: str  # the module of the reference whose activation took the place of what it gives
    drift: float  # max |its output - that activation| / max |that activation|, the worst of all calls and inputs

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "module": self.module,
            "allowed": self.allowed,
            "reference": self.reference,
            "drift": _finite(self.drift),
        }


@dataclass(frozen=True)
class Proof:
    """What running said."""

    passes: tuple[PassResult, ...]
    not_exercised: tuple[
        str, ...
    ] = ()  # "blocks.0.bias: filled, not exercised: 3 of 12 rows", "mask: masks nothing ..."
    symmetries: tuple[str, ...] = ()  # what no output can tell
    storage: float = 0.0  # relative, what storing the values in the target's dtypes costs; 0 where nothing is rounded
    divergence: Divergence | None = None
    surface: Mapping[str, str] = field(default_factory=dict)  # output: the target's module where it was found
    causes: tuple[str, ...] = ()  # what kept a residual above the gate until it was removed, each named
    notes: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()  # rows of an approximate or lossy op
    departures: tuple[Departure, ...] = ()  # modules that compute something else, as allowed
    departed: Mapping[str, float] = field(default_factory=dict)  # by output: how far it is moved by all of them

    @property
    def verdict(self) -> str:
        """refuted where a pass ran and differs; proven where all that ran passed, in float64 at least; adapted where
        rows are approximate or modules depart as allowed; else ambiguous: it ran, and that showed nothing."""
        if any(p.status == "failed" and p.differs for p in self.passes):
            return "refuted"
        judged = [p for p in self.passes if p.name.endswith("/float64") and p.status == "passed"]
        if not judged or any(p.status == "failed" for p in self.passes):
            return "ambiguous"
        return "adapted" if self.adapted or self.departures else "proven"

    @property
    def message(self) -> str:
        """What a person should know first: where they differ, or why nothing was shown. Empty when it is proven."""
        if self.divergence is not None:
            return str(self.divergence)
        bad = [p for p in self.passes if p.status == "failed"] or [p for p in self.passes if p.status == "not run"]
        return "" if self.verdict in ("proven", "adapted") or not bad else f"{bad[0].name}: {bad[0].why}"

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a plan keeps of it."""
        return tuple(self._sentences())

    def _sentences(self) -> Iterator[str]:
        for p in self.passes:
            yield str(p)
        yield from self.departures_said()
        for output, where in self.surface.items():
            yield f"{output} is computed at {where}"
        for cause in self.causes:
            yield f"under the gate once one cause is removed: {cause}"
        if self.storage:
            yield f"storing the values in the target's types costs {self.storage:.1e}"
        yield from self.not_exercised
        yield from self.notes

    def departures_said(self) -> Iterator[str]:
        """In words: by what is allowed, which modules depart, and how far."""
        for allowed in dict.fromkeys(d.allowed for d in self.departures):
            several = [d for d in self.departures if d.allowed == allowed]
            worst = max(several, key=lambda d: d.drift)
            count = f" ({len(several)} modules)" if len(several) > 1 else ""
            most = f"up to {worst.drift:.1e} (in {worst.module})" if len(several) > 1 else f"{worst.drift:.1e}"
            place = worst.reference or "its forward"
            yield (
                f"departs as allowed: {allowed}{count}: what it gives differs by {most} from what the reference has in "
                f"its place, in {place}; the rest is proven around it"
            )
        if self.departed:
            moved = ", ".join(f"{name} {power(value)}" for name, value in self.departed.items())
            yield f"by all departures together the outputs differ: {moved}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": self.verdict,
            "message": self.message,
            "passes": [p.as_dict() for p in self.passes],
            "not_exercised": list(self.not_exercised),
            "symmetries": list(self.symmetries),
            "storage": _finite(self.storage),
            "divergence": self.divergence.as_dict() if self.divergence is not None else None,
            "surface": dict(self.surface),
            "causes": list(self.causes),
            "notes": list(self.notes),
            "adapted": list(self.adapted),
            "departures": [d.as_dict() for d in self.departures],
            "departed": {name: _finite(value) for name, value in self.departed.items()},
        }

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from surgery import notebook

        return notebook.proof(self)

    def __str__(self) -> str:
        head = f"{self.verdict}: {self.message}" if self.message else self.verdict
        return "\n".join([head, *self._sentences()])


def power(value: float) -> str:
    """A residual or a gate, as a person reads it; one that is not finite is no number to be told."""
    return f"{value:.1e}" if math.isfinite(value) else "cannot be compared"


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") and value == value else None
