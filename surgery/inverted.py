"""The way back: from what a plan wrote to what it read.

Each row is undone from its outermost op inwards. A value that several rows hold in parts (a fused projection that was
cut into three) is put together again once all its parts are known. What cannot be had back bit for bit is an error that
names it; nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery import dtypes, ops
from surgery.errors import PlanError
from surgery.expr import Call, Expr, Name, infer, kind, names, walk
from surgery.ops import Shape, axis_of
from surgery.ops.constant import cast_is_exact
from surgery.plan import Dropped, Plan, Row, Stamp, Status
from surgery.reader import TensorInfo

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint

_SHOWN = 8
_PARTS = ("slice", "deinterleave", "take")
_LONGEST = 1 << 18  # of an axis whose parts are put together by number
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def inverted(plan: Plan, source: Checkpoint | Mapping[str, TensorInfo], *, rounding: bool = False) -> Plan:
    """See Plan.inverted."""
    beside = frozenset(_adapters(plan, source))
    found = _Recovery(lambda name: tuple(source[name].shape), beside if rounding else frozenset(), rounding)
    for row in plan.rows:
        if row.expr is not None:
            found.add(row.expr, _Held(Name(row.target), frozenset({row.dtype})))
    rows: dict[str, Row] = {}
    lost: list[str] = []
    copies = _copies(plan, source)
    for name, info in source.items():
        if name in beside and rounding:
            continue
        held = found.known.get(Name(name))
        if held is not None and all(cast_is_exact(info.dtype, dtype) for dtype in held.through):
            rows[name] = Row(name, Status.FILLED, _typed(held, info.dtype), info.shape, info.dtype)
        elif name in copies:
            rows[name] = Row(name, Status.TIED, None, info.shape, info.dtype, tied_to=copies[name])
        elif info.numel == 0:
            empty: Expr = Call("zeros", (), (("shape", tuple(info.shape)),))
            typed = empty if info.dtype in _FLOATS else Call("cast", (empty,), (("dtype", info.dtype),))
            rows[name] = Row(name, Status.SYNTHESISED, typed, info.shape, info.dtype)
        else:
            lost.append(f"{name}: {_why(plan, name, source, held)}")
    # A copy of what is itself lost is lost with it.
    for name in [name for name, row in rows.items() if row.tied_to is not None and row.tied_to not in rows]:
        lost.append(f"{name}: a copy of {rows.pop(name).tied_to}")
    if lost:
        more = f"\n  ... and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise PlanError(
            f"the plan has no inverse: {len(lost)} of {len(source)} source tensors cannot be had back"
            + "".join(f"\n  {each}" for each in lost[:_SHOWN])
            + more,
            hint="Keep the source itself; or plan into a target that has a place for these tensors, in their type.",
        )
    return _plan(plan, source, rows, beside if rounding else frozenset(), found.rounded)


def _plan(
    plan: Plan,
    source: Checkpoint | Mapping[str, TensorInfo],
    rows: Mapping[str, Row],
    beside: frozenset[str],
    rounded: bool,
) -> Plan:
    used = {name for row in rows.values() for name in row.sources}
    dropped = [Dropped(row.target, _unused(row)) for row in plan.rows if row.target not in used]
    made = {row.target: _info(row) for row in plan.rows} | {name: source[name] for name in source if name in beside}
    dropped += [Dropped(name, "the adapter's own, and not read") for name in beside if name not in used]
    notes = ["the inverse of the plan " + (f"into {plan.target.description}" if plan.target.description else "given")]
    if rounded:
        notes.append("an adapter is taken out again: within rounding, not bit for bit")
    return Plan(
        tuple(rows.values()),
        tuple(dropped),
        Stamp.of(made, plan.target.description),
        Stamp.of({name: source[name] for name in rows}, plan.source.description),
        notes=tuple(notes),
        rules=tuple(rule for rule in plan.rules if beside and rule.startswith("merge_lora(")),
    )


def _unused(row: Row) -> str:
    if row.status is Status.TIED:
        return f"one tensor with {row.tied_to}"
    if row.status is Status.SYNTHESISED:
        return "made by a rule: the source had no such tensor"
    if row.status is Status.FILLED:
        return "what it holds is had from other tensors"
    return f"{row.status}: not from the source"


def _adapters(plan: Plan, source: Iterable[str]) -> Iterator[str]:
    """The names of tensors that merged adapters brought."""
    if any(rule.startswith("merge_lora(") for rule in plan.rules):
        from surgery.beside import prefixes
        from surgery.rules import MergeLora, checked

        starts = prefixes(rule for rule in checked(plan.rules) if isinstance(rule, MergeLora))
        yield from (name for name in source if name.startswith(starts))


def _info(row: Row) -> TensorInfo:
    return TensorInfo(row.shape, row.dtype, dtypes.nbytes(row.dtype, row.shape) or 0)


def _typed(held: _Held, dtype: str) -> Expr:
    """The value in the type it had: floats are rounded when stored, which loses nothing here; others are cast."""
    if held.through == {dtype} or {dtype, *held.through} <= _FLOATS:
        return held.expr
    return Call("cast", (held.expr,), (("dtype", dtype),))


def _copies(plan: Plan, source: Checkpoint | Mapping[str, TensorInfo]) -> dict[str, str]:
    """Dropped tensors that are, byte for byte, another one that is used: one tensor under two names. That can only be
    seen where there are bytes."""
    from surgery.checkpoint import Checkpoint

    if not isinstance(source, Checkpoint):
        return {}
    dropped = [drop.source for drop in plan.dropped if drop.source in source]
    found: dict[str, str] = {}
    hashes: dict[str, str] = {}

    def digest(name: str) -> str:
        if name not in hashes:
            hashes[name] = source.content_hash(name)
        return hashes[name]

    for name in dropped:
        alike = [
            other
            for other in plan.used
            if (source[other].dtype, source[other].shape) == (source[name].dtype, source[name].shape)
        ]
        same = next((other for other in alike if digest(other) == digest(name)), None)
        if same is not None:
            found[name] = same
    return found


def _why(plan: Plan, name: str, source: Mapping[str, TensorInfo], held: _Held | None) -> str:
    """Why a tensor cannot be had back."""
    if held is not None:
        worst = next(d for d in sorted(held.through) if not cast_is_exact(source[name].dtype, d))
        return f"stored as {worst}, which does not hold every {source[name].dtype}"
    reasons = {drop.source: drop.reason for drop in plan.dropped}
    if name in reasons:
        return f"dropped: {reasons[name]}"
    said = []
    for row in plan.rows:
        if row.expr is None or name not in row.sources:
            continue
        of = kind(row.expr, lambda each: source[each].dtype)
        if of == "exact":
            said.append(f"{row.target} holds a part of it, as {_short(row.expr)}")
        else:
            worst = next(
                part.op for part in walk(row.expr) if isinstance(part, Call) and ops.get(part.op).kind != "exact"
            )
            said.append(f"{row.target} is made by {worst}, which is {of}")
    return "; ".join(said[:2]) or "no row reads it"


def _short(expr: Expr) -> str:
    text = str(expr)
    return text if len(text) < 100 else f"{text[:90]} ..."


# -- undoing ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Held:
    """A value as an expression over the result, and the types in which it was stored on the way."""

    expr: Expr
    through: frozenset[str]

    def within(self, expr: Expr, *others: _Held) -> _Held:
        return _Held(expr, self.through.union(*(other.through for other in others)))


class _Recovery:
    """Values of the source that the result is known to hold: whole ones, and parts until they make a whole."""

    def __init__(self, shape_of: Callable[[str], Shape], beside: frozenset[str], rounding: bool) -> None:
        self.shape_of, self.beside, self.rounding = shape_of, beside, rounding
        self.known: dict[Expr, _Held] = {}
        self.parts: dict[Expr, list[tuple[Call, _Held]]] = {}
        self.rounded = False

    def add(self, expr: Expr, held: _Held) -> None:
        """The result holds the value of `expr`, by `held`: so it holds whatever that gives back."""
        if expr in self.known or not names(expr):
            return
        self.known[expr] = held
        if isinstance(expr, Name):
            return
        if expr.op == "cast":
            self.add(expr.args[0], _Held(held.expr, held.through | {str(dict(expr.params)["dtype"])}))
            return
        op = ops.get(expr.op)
        if op.kind != "exact":
            if not (self.rounding and op.kind == "preserving"):
                return
            self.rounded = True
        shapes = tuple(infer(arg, self.shape_of) for arg in expr.args)
        steps = op.inverse(shapes, dict(expr.params)) if op.inverse is not None else [None] * len(expr.args)
        for arg, back in zip(expr.args, steps, strict=True):
            if back is not None:
                value = held.expr
                for step in back:
                    others = [expr.args[n] for n in step.beside]
                    if not all(name in self.beside for other in others for name in names(other)):
                        break
                    value = Call(step.op, (value, *others), tuple(step.params.items()))
                else:
                    self.add(arg, held.within(value))
            elif expr.op in _PARTS:
                self.parts.setdefault(arg, []).append((expr, held))
                whole = _together(self.parts[arg], shapes[0])
                if whole is not None:
                    self.add(arg, whole)


def _together(parts: list[tuple[Call, _Held]], shape: Shape) -> _Held | None:
    """The value that these are parts of, where they make all of it."""
    for axis in range(len(shape)):
        along = [(part, held) for part, held in parts if axis_of(shape, int(_of(part)["axis"])) == axis]
        found = _interleaved(along, axis) or _joined(along, axis, shape[axis]) or _gathered(along, axis, shape[axis])
        if found is not None:
            return found
    return None


def _of(part: Call) -> dict[str, Any]:
    return dict(part.params)


def _interleaved(parts: list[tuple[Call, _Held]], axis: int) -> _Held | None:
    """All parts of one fusing by groups."""
    families: dict[tuple[Any, ...], dict[int, _Held]] = {}
    for part, held in parts:
        if part.op == "deinterleave":
            given = _of(part)
            key = (given["of"], given["groups"], given["widths"])
            families.setdefault(key, {})[int(given["index"])] = held
    for (of, groups, _), members in families.items():
        if len(members) == of:
            ordered = [members[n] for n in range(of)]
            expr = Call("interleave", tuple(each.expr for each in ordered), (("groups", groups), ("axis", axis)))
            return ordered[0].within(expr, *ordered[1:])
    return None


def _joined(parts: list[tuple[Call, _Held]], axis: int, size: int) -> _Held | None:
    """Slices that follow on one another, from the first to the last."""
    slices = [(_of(part)["start"], _of(part)["stop"], held) for part, held in parts if part.op == "slice"]
    at, chosen = 0, []
    while at < size:
        fits = [each for each in slices if each[0] <= at < each[1]]
        if not fits:
            return None
        start, stop, held = max(fits, key=lambda each: (each[0] == at, each[1]))
        expr: Expr = held.expr
        if start < at:
            expr = Call("slice", (expr,), (("axis", axis), ("start", at - start), ("stop", stop - start)))
        chosen.append(held.within(expr))
        at = stop
    return chosen[0].within(Call("cat", tuple(each.expr for each in chosen), (("axis", axis),)), *chosen[1:])


def _gathered(parts: list[tuple[Call, _Held]], axis: int, size: int) -> _Held | None:
    """Parts chosen by number, which are joined and put in order."""
    if not parts or size > _LONGEST:
        return None
    place: dict[int, int] = {}
    chosen: list[_Held] = []
    length = 0
    for part, held in parts:
        positions = _positions(part, size)
        if any(position not in place for position in positions):
            for at, position in enumerate(positions):
                place.setdefault(position, length + at)
            length += len(positions)
            chosen.append(held)
    if len(place) != size:
        return None
    index = tuple(place[n] for n in range(size))
    exprs = tuple(each.expr for each in chosen)
    joined = exprs[0] if len(exprs) == 1 else Call("cat", exprs, (("axis", axis),))
    return chosen[0].within(Call("take", (joined,), (("index", index), ("axis", axis))), *chosen[1:])


def _positions(part: Call, size: int) -> list[int]:
    """Which positions of the axis a part holds, in its order."""
    given = _of(part)
    if part.op == "slice":
        return list(range(given["start"], given["stop"]))
    if part.op == "take":
        return list(given["index"])
    widths = given["widths"] or (1,) * given["of"]
    length = size // given["groups"]
    unit = length // sum(widths)
    start, width = unit * sum(widths[: given["index"]]), unit * widths[given["index"]]
    return [group * length + start + n for group in range(given["groups"]) for n in range(width)]
