"""A checkpoint made from another by expressions: layers left out, tables resized, before anything is mapped.

What is mapped and proven is the derived checkpoint. `composed` and `decomposed` translate a plan between the two: the
plan that a person sees, and that is written to a file, reads the checkpoint as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery import dtypes
from surgery.checkpoint import Checkpoint, Reader, Span, TensorInfo
from surgery.errors import PlanError
from surgery.expr import Call, Expr, Name, call, evaluate, infer, names, substituted
from surgery.plan import Dropped, Plan, Row, Stamp, Status
from surgery.reader import check_slices

if TYPE_CHECKING:
    from torch import Tensor


class DerivedReader(Reader):
    """`rows` gives each tensor of the new checkpoint as an expression over the old one's. Nothing is read before it is
    asked for; what an op computed is kept, as it is asked for again and again."""

    def __init__(self, base: Checkpoint, rows: Mapping[str, Expr]) -> None:
        self.base, self.rows = base, dict(rows)
        self.source, self.files = base.source, base.files
        self.metadata, self.notes = base.metadata, base.notes
        self.infos = {name: _info(base, name, expr) for name, expr in self.rows.items()}
        self._made: dict[str, Tensor] = {}

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        expr = self.rows[name]
        if isinstance(expr, Name):
            return self.base.read(expr.name, slices)
        if name not in self._made:
            value = evaluate(expr, self.base.read)
            self._made[name] = value.to(dtypes.torch_dtype(self.infos[name].dtype)).contiguous()
        return self._made[name][check_slices(slices, self.infos[name].shape)] if slices else self._made[name]

    def span(self, name: str) -> Span | None:
        expr = self.rows[name]
        return self.base.span(expr.name) if isinstance(expr, Name) else None


def _info(base: Checkpoint, name: str, expr: Expr) -> TensorInfo:
    if isinstance(expr, Name):
        return base[expr.name]
    try:
        shape = infer(expr, lambda source: tuple(base[source].shape))
    except PlanError as error:
        raise PlanError(f"{name}: {error}", hint=error.hint) from None
    read = names(expr)
    dtype = base[read[0]].dtype if read else "F32"
    if isinstance(expr, Call) and expr.op == "cast":
        dtype = str(dict(expr.params)["dtype"])
    return TensorInfo(shape, dtype, math.prod(shape) * dtypes.torch_dtype(dtype).itemsize)


def derive(base: Checkpoint, rows: Mapping[str, Expr]) -> Checkpoint:
    """The checkpoint whose tensors are these expressions over `base`. PlanError where a shape does not fit."""
    return Checkpoint(DerivedReader(base, rows))


def composed(plan: Plan, base: Checkpoint, rows: Mapping[str, Expr], why: Mapping[str, str]) -> Plan:
    """A plan over the derived checkpoint, as one over `base`. A tensor of `base` that nothing reads any more is dropped
    for the reason in `why`, or for the one that the derived tensor was dropped for."""

    def row(each: Row) -> Row:
        return each if each.expr is None else _computed(each, _unfused(substituted(each.expr, rows), base))

    new = tuple(row(each) for each in plan.rows)
    used = {name for each in new for name in each.sources}
    reasons = {name: drop.reason for drop in plan.dropped for name in names(rows[drop.source])}
    dropped = [
        Dropped(name, why.get(name) or reasons.get(name) or "no tensor is made from it")
        for name in base
        if name not in used
    ]
    whole = replace(
        plan,
        rows=new,
        dropped=tuple(dropped),
        source=replace(plan.source, structure=Stamp.of(base).structure),
        candidates=tuple(composed(each, base, rows, why) for each in plan.candidates),
        verdict=None,
        verdict_for=None,
        proven=(),
    )
    return whole if plan.verdict is None else whole.with_verdict(plan.verdict, proven=plan.proven)


def _unfused(expr: Expr, base: Checkpoint) -> Expr:
    """The same expression, where a piece is cut out of tensors that were joined: out of the one that holds it."""
    if not isinstance(expr, Call):
        return expr
    expr = Call(expr.op, tuple(_unfused(arg, base) for arg in expr.args), expr.params)
    if expr.op != "slice":
        return expr
    (whole,), cut, along = expr.args, dict(expr.params), _axis(expr, base)
    if isinstance(whole, Call) and whole.op == "transpose" and not whole.params:
        plain = call("slice", *whole.args, **(cut | {"axis": 1 - along}))
        turned = _unfused(plain, base)
        return call("transpose", turned) if turned != plain else expr
    if not isinstance(whole, Call) or whole.op != "cat" or _axis(whole, base) != along:
        return expr
    for part, start, stop in _parts(whole, base):
        if (start, stop) == (cut["start"], cut["stop"]):
            return part
    return expr


def _axis(expr: Expr, base: Checkpoint) -> int:
    rank = len(infer(expr, lambda name: tuple(base[name].shape)))
    axis = dict(expr.params).get("axis", 0) if isinstance(expr, Call) else 0
    assert isinstance(axis, int)
    return axis % rank


def _parts(expr: Expr, base: Checkpoint) -> list[tuple[Expr, int, int]]:
    """What is joined, each with where it begins and ends; nothing where the expression joins nothing."""
    if not isinstance(expr, Call) or expr.op != "cat":
        return []
    out: list[tuple[Expr, int, int]] = []
    at, axis = 0, _axis(expr, base)
    for part in expr.args:
        length = infer(part, lambda name: tuple(base[name].shape))[axis]
        out.append((part, at, at + length))
        at += length
    return out


def _computed(row: Row, expr: Expr) -> Row:
    """The row with another expression: it is filled where that reads a tensor, and synthesised where it reads none."""
    return replace(row, expr=expr, status=Status.FILLED if names(expr) else Status.SYNTHESISED)


def decomposed(plan: Plan, base: Checkpoint, derived: Checkpoint, rows: Mapping[str, Expr]) -> Plan:
    """The inverse of `composed`: each row again over the derived tensors. A row that reads a tensor which the derived
    checkpoint holds in another form only is a PlanError: it does not belong to this derivation."""
    whole: dict[Expr, Expr] = {}
    spelled = [(name, each) for name, expr in rows.items() for each in (expr, _unfused(expr, base))]
    for name, expr in spelled:
        whole.setdefault(expr, Name(name))
    for name, expr in spelled:
        for part, start, stop in _parts(expr, base):
            whole.setdefault(part, call("slice", name, axis=_axis(expr, base), start=start, stop=stop))
    same = {name for name, expr in rows.items() if expr == Name(name)}

    def back(expr: Expr, target: str) -> Expr:
        if expr in whole:
            return Name(expr.name) if isinstance(expr, Name) and expr.name in same else whole[expr]
        if isinstance(expr, Name):
            raise PlanError(
                f"{target}: it reads {expr.name} as it is, and the plan's rules make something else of that tensor",
                hint="Rows do not follow a rule that was edited. Find them anew by it: zoo graft --rules FILE, "
                "or rules=[...] without a plan; or edit this row too.",
            )
        return Call(expr.op, tuple(back(arg, target) for arg in expr.args), expr.params)

    new = tuple(each if each.expr is None else _computed(each, back(each.expr, each.target)) for each in plan.rows)
    used = {name for each in new for name in each.sources}
    reasons = {drop.source: drop.reason for drop in plan.dropped}
    dropped = []
    for name in derived:
        if name not in used:
            said = next((reasons[each] for each in names(rows[name]) if each in reasons), "not read by the plan")
            dropped.append(Dropped(name, said))
    stamp = replace(plan.source, structure=Stamp.of(derived).structure)
    changed = replace(plan, rows=new, dropped=tuple(dropped), source=stamp, verdict=None, verdict_for=None, proven=())
    return changed if plan.verdict in (None, "stale") else changed.with_verdict(str(plan.verdict), proven=plan.proven)
