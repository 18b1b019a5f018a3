"""The plan of a graft: for each target tensor, where its values come from; for each unused source tensor, why.

A plan is data. It reads no tensor and changes none; it can be written to a file, edited by hand, and applied again
without searching (surgery.plan_file). The law of accounting is `Plan.check`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from surgery.errors import PlanError
from surgery.expr import Call, Expr, Name, infer, names
from surgery.ops import show

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint, TensorInfo

STALE = "stale"
_SHOWN = 8  # problems listed in one message; the rest is counted


class _Problem(NamedTuple):
    """What is wrong; and a name to look for among those that are known, which is done only where it is shown."""

    text: str
    name: str = ""
    known: Iterable[str] = ()


class Status(StrEnum):
    """How a target tensor ends. There is no other way."""

    FILLED = "filled"  # from the source, by an expression
    TIED = "tied"  # one tensor with another target name
    SYNTHESISED = "synthesised"  # by a rule: a zero bias the source does not have, a weight-norm gain
    CONSTANT = "constant"  # the target's own value, right as it is: a mask, a frozen scale
    KEPT = "kept"  # loaded before, by an earlier graft
    NEW = "new"  # freshly initialised, named as such


_FLOATS = ("BF16", "F16", "F32", "F64")
_COMPUTED = (Status.FILLED, Status.SYNTHESISED)


@dataclass(frozen=True)
class Row:
    """One target tensor, and where its values come from."""

    target: str
    status: Status
    expr: Expr | None
    shape: tuple[int, ...]
    dtype: str
    evidence: str = ""  # why this mapping, in a sentence
    alternatives: tuple[str, ...] = ()  # mappings that were refuted: "expression: by what"
    tied_to: str | None = None
    note: str = ""  # why it is new, constant, kept ...
    aside: Expr | None = None  # what a rule kept a new tensor from being; the rest is proven with it in place

    def __post_init__(self) -> None:
        # frozen, so the canonical types are set past the guard
        object.__setattr__(self, "status", Status(self.status))
        object.__setattr__(self, "shape", tuple(int(length) for length in self.shape))
        object.__setattr__(self, "alternatives", tuple(self.alternatives))
        if (self.expr is not None) != (self.status in _COMPUTED):
            wanted = "needs an expression" if self.expr is None else "has no expression"
            raise PlanError(f"row {self.target}: a {self.status} tensor {wanted}")
        if (self.tied_to is not None) != (self.status is Status.TIED):
            wanted = "names the tensor it is tied to" if self.tied_to is None else "is tied to none"
            raise PlanError(f"row {self.target}: a {self.status} tensor {wanted}")
        if self.aside is not None and self.status is not Status.NEW:
            raise PlanError(f"row {self.target}: a {self.status} tensor has nothing set aside")

    @property
    def sources(self) -> tuple[str, ...]:
        """The source tensors that it reads."""
        return names(self.expr) if self.expr is not None else ()

    @property
    def set_aside(self) -> tuple[str, ...]:
        """The source tensors that it would read but for a rule."""
        return names(self.aside) if self.aside is not None else ()


WITHOUT = "the target has no place for it, and computes the same without it"  # of a tensor that the reference uses


@dataclass(frozen=True)
class Dropped:
    """A source tensor that nothing uses, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Stamp:
    """What a plan was made for: a description for people, and hashes that tell whether it still is the same."""

    description: str = ""
    structure: str = ""  # sha256 over names, dtypes and shapes
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict, hash=False)  # name: sha256

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, TensorInfo],
        description: str = "",
        revision: str | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Stamp:
        """The stamp of a checkpoint, or of a target's tensors."""
        return cls(description, structure_hash(tensors), revision, dict(files or {}))


def structure_hash(tensors: Mapping[str, TensorInfo]) -> str:
    """sha256 over sorted names, dtypes and shapes: equal to Checkpoint.structure_hash of the same tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(json.dumps([name, info.dtype, list(info.shape)], separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """For each target tensor one row; for each source tensor a use or a reason.

    A verdict is bound to the rows and to the structure of source and target (`verdict_for`). A plan with other rows
    that still carries it, by `dataclasses.replace` or by an edit of the file, reads "stale". `with_verdict` binds anew.
    """

    rows: tuple[Row, ...]
    dropped: tuple[Dropped, ...] = ()
    source: Stamp = Stamp()
    target: Stamp = Stamp()
    verdict: str | None = None
    symmetries: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    candidates: tuple[Plan, ...] = ()  # whole plans, where the evidence does not decide between them
    diagnosis: str = ""  # what stands in the way, where it is ambiguous or refuted
    proven: tuple[str, ...] = ()  # what running said, a sentence each
    verdict_for: str | None = None  # what the verdict is bound to; filled in where left out
    rules: tuple[str, ...] = ()  # what was asked for otherwise than the source has it, as a file of rules spells it
    allow_different: tuple[str, ...] = ()  # modules of the target that may depart, as globs

    def __post_init__(self) -> None:
        for name in ("rows", "dropped", "symmetries", "notes", "candidates", "proven", "rules", "allow_different"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.verdict is None:
            object.__setattr__(self, "verdict_for", None)
            return
        verdict = str(self.verdict)  # of an enum, its value
        if self.verdict_for is None:
            object.__setattr__(self, "verdict_for", self._binding(verdict))
        elif self.verdict_for != self._binding(verdict):
            verdict = STALE
            object.__setattr__(self, "verdict_for", self._binding(verdict))
            object.__setattr__(self, "proven", ())  # it was said of another plan
        object.__setattr__(self, "verdict", verdict)

    @cached_property
    def rows_hash(self) -> str:
        """sha256 over what the rows compute, whatever their order; evidence and notes are not part of it."""
        digest = hashlib.sha256()
        for row in sorted(self.rows, key=lambda row: row.target):
            value = row.tied_to if row.expr is None else str(row.expr)
            line = [row.target, row.status.value, value, row.dtype, list(row.shape)]
            if row.aside is not None:
                line.append(str(row.aside))
            digest.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def _binding(self, verdict: str) -> str:
        bound = [verdict, self.rows_hash, self.source.structure, self.target.structure, *self.rules]
        bound += [f"allow_different {pattern}" for pattern in self.allow_different]
        return hashlib.sha256(json.dumps(bound).encode()).hexdigest()

    def with_verdict(
        self, verdict: str, *, proven: Iterable[str] = (), symmetries: Iterable[str] | None = None
    ) -> Plan:
        """The same plan with a verdict bound to it as it now is."""
        return replace(
            self,
            verdict=verdict,
            verdict_for=None,
            proven=tuple(proven),
            symmetries=self.symmetries if symmetries is None else tuple(symmetries),
        )

    def verdict_on(self, source: Mapping[str, TensorInfo], target: Mapping[str, TensorInfo]) -> str | None:
        """The verdict as it holds for this source and target: "stale" where either has another structure."""
        same = (self.source.structure, self.target.structure) == (structure_hash(source), structure_hash(target))
        return self.verdict if same or self.verdict is None else STALE

    @cached_property
    def by_target(self) -> Mapping[str, Row]:
        """The rows by target name; a tensor with two rows is a PlanError."""
        found = {row.target: row for row in self.rows}
        if len(found) != len(self.rows):
            twice = [name for name, count in Counter(row.target for row in self.rows).items() if count > 1]
            raise PlanError(f"the plan has more than one row for {_few(twice)}", hint="Leave one row for each.")
        return found

    def __getitem__(self, target: str) -> Row:
        """The row of a target tensor."""
        row = self.by_target.get(target)
        if row is None:
            raise PlanError(f"the plan has no row for {target}{_near(target, self.by_target)}")
        return row

    @property
    def used(self) -> tuple[str, ...]:
        """The source tensors that rows read, each once, in order of use."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.sources))

    def check(self, source: Checkpoint | Mapping[str, TensorInfo], target: Mapping[str, TensorInfo]) -> None:
        """The law of accounting. Every source tensor is used, or dropped with a reason; every target tensor has exactly
        one row; every row gives the shape that the target has. Else a PlanError that lists what is wrong."""
        problems = [*self._target_problems(target), *self._row_problems(source), *self._source_problems(source)]
        if problems:
            more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            listed = "".join(f"\n  {text}{_near(name, known)}" for text, name, known in problems[:_SHOWN])
            raise PlanError(
                f"the plan does not fit: {len(problems)} problem{'s' * (len(problems) > 1)}{listed}{more}",
                hint="Edit these rows, or make the plan anew from this source and target with surgery.plan.",
            )

    def _target_problems(self, target: Mapping[str, TensorInfo]) -> Iterator[_Problem]:
        rows = self.by_target
        for name, row in rows.items():
            if name not in target:
                yield _Problem(f"the target has no tensor {name}, which a {row.status} row names", name, target)
            elif tuple(target[name].shape) != row.shape:
                yield _Problem(
                    f"{name}: the target has shape {show(tuple(target[name].shape))}, the plan {show(row.shape)}"
                )
        for name, info in target.items():
            if name not in rows:
                yield _Problem(f"target tensor {name}, shape {show(tuple(info.shape))}, has no row", name, rows)

    def _row_problems(self, source: Mapping[str, TensorInfo]) -> Iterator[_Problem]:
        for row in self.rows:
            if row.tied_to is not None:
                other = self.by_target.get(row.tied_to)
                if other is None:
                    yield _Problem(
                        f"{row.target} is tied to {row.tied_to}, which has no row", row.tied_to, self.by_target
                    )
                elif other.status is Status.TIED:
                    yield _Problem(f"{row.target} is tied to {row.tied_to}, which is tied itself: name {other.tied_to}")
                elif other.shape != row.shape:
                    yield _Problem(
                        f"{row.target}, shape {show(row.shape)}, is tied to {other.target}, shape {show(other.shape)}"
                    )
            if row.expr is None:
                continue
            unknown = [name for name in row.sources if name not in source]
            if unknown:
                yield from (
                    _Problem(f"{row.target}: the source has no tensor {name}", name, source) for name in unknown
                )
                continue
            try:
                shape = infer(row.expr, lambda name: tuple(source[name].shape))
            except PlanError as error:
                yield _Problem(f"{row.target}: {error}")
            else:
                if shape != row.shape:
                    yield _Problem(
                        f"{row.target}: {row.expr} gives shape {show(shape)}, the target has {show(row.shape)}"
                    )

    def _source_problems(self, source: Mapping[str, TensorInfo]) -> Iterator[_Problem]:
        used, dropped = set(self.used), Counter(drop.source for drop in self.dropped)
        for drop in self.dropped:
            if drop.source not in source:
                yield _Problem(
                    f"the source has no tensor {drop.source}, which is listed as dropped", drop.source, source
                )
            elif drop.source in used:
                yield _Problem(f"source tensor {drop.source} is both used and dropped")
            if not drop.reason.strip():
                yield _Problem(f"source tensor {drop.source} is dropped without a reason")
        yield from (
            _Problem(f"source tensor {name} is dropped {count} times") for name, count in dropped.items() if count > 1
        )
        for name, info in source.items():
            if name not in used and name not in dropped:
                yield _Problem(f"source tensor {name}, shape {show(tuple(info.shape))}, is neither used nor dropped")

    def inverted(self, source: Checkpoint | Mapping[str, TensorInfo], *, rounding: bool = False) -> Plan:
        """The plan that makes the source again from what this plan wrote, bit for bit, in the source's own types and in
        the order of its tensors. PlanError, which lists each tensor and why, where one of `source` cannot be had back:
        it was dropped, went through an op that is not exact, was stored in a type that does not hold it, or the rows
        hold only a part of it. A dropped tensor that is a copy of a used one comes back, where `source` has bytes to
        tell it by. What the target has beyond the source is dropped, and says so.

        `source` is what this plan reads: a checkpoint, or its names, shapes and types. With `rounding`, an adapter that
        a rule merged is taken out again, within rounding; the inverse then reads the adapter beside the result.
        """
        from surgery.inverted import inverted

        return inverted(self, source, rounding=rounding)

    def stored_as(self, dtype: str, source: Mapping[str, TensorInfo]) -> Plan:
        """The same plan with every floating-point tensor stored as `dtype` ("BF16", "F16", "F32", "F64"): a row that
        the cast changes says so by the op. The verdict was of other rows and is not kept; a note says which it was."""
        if dtype not in _FLOATS:
            raise PlanError(f"{dtype!r} is no type to store weights in", hint=f"One of {', '.join(_FLOATS)}.")

        def stored(row: Row) -> Row:
            if row.dtype not in _FLOATS or row.dtype == dtype:
                return row
            plain = isinstance(row.expr, Name) and source[row.expr.name].dtype == dtype
            if row.expr is None or plain:
                return replace(row, dtype=dtype)
            return replace(row, dtype=dtype, expr=Call("cast", (row.expr,), (("dtype", dtype),)))

        rows = tuple(stored(row) for row in self.rows)
        if rows == self.rows:
            return self
        was = f"; before that it was {self.verdict}" if self.verdict not in (None, STALE) else ""
        note = f"cast to {dtype} where it is written{was}"
        return replace(self, rows=rows, notes=(*self.notes, note), verdict=None, verdict_for=None, proven=())

    def __str__(self) -> str:
        """The plan as the file has it."""
        from surgery.plan_file import dumps

        return dumps(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as TOML, whole or not at all."""
        from surgery.plan_file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote and a person may have edited. After an edit the verdict is "stale"."""
        from surgery.plan_file import load

        return load(path)


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _near(name: str, known: Iterable[str]) -> str:
    """ "; did you mean x?" with the closest names that are there, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""
