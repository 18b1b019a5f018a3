"""Residual by depth: for each module of the target, how far its output is from what the reference has there.

The proof compares outputs; this looks inside, for a report. A module's output is paired with the reference's in one of
two ways: by value, where the same numbers (up to layout) come out of a module of the reference; else through the plan,
where the module's own tensors say which modules of the reference it stands for, so that a fused projection is compared
with the three that it was made of. What neither pairs is left out and counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import GraftError, PlanError
from surgery.expr import Call as Op
from surgery.expr import Expr, Name, evaluate, names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.checkpoint import Checkpoint
    from surgery.judge import Judge
    from surgery.plan import Plan
    from surgery.probe import Probe
    from surgery.running import Call

_MATCH = 1e-9
_ALONG = frozenset({"cat", "slice", "interleave", "deinterleave", "take"})  # on axis 0: a layer's outputs follow suit


@dataclass(frozen=True)
class Point:
    """One call of one module of the target; `at` is its place in the order in which calls end.

    `residual` is max |ours - theirs| / max |theirs| against the reference in float64; `own` is the same of the
    reference itself, run in the type of the pass (0 in float64). Both may be infinite: not a number on one side.
    """

    at: int
    module: str  # of the target; "" for the whole
    reference: str  # the module or modules of the reference
    residual: float
    own: float = 0.0


@dataclass(frozen=True)
class Depth:
    """One pass on one input. `modules` are those of the target, a call each, in the order in which calls end; `points`
    are of those whose output has a counterpart."""

    name: str  # "cpu/float64"
    input: str
    points: tuple[Point, ...]
    modules: tuple[str, ...] = ()
    why: str = ""  # why there are no points, where it could not be run


@dataclass(frozen=True)
class _Pair:
    """Output `out` of the target's call number `at`; and how to have the reference's from its calls."""

    at: int
    out: int
    module: str
    reference: str
    expected: Callable[[Sequence[Call]], Tensor]


def by_depth(
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint,
    target: nn.Module,
    plan: Plan,
    *,
    probe: Probe,
    passes: Iterable[str] = ("cpu/float64", "cpu/float32"),
    rules: Iterable[object] = (),
    into: str = "",
    on: str = "",
) -> tuple[Depth, ...]:
    """The residual of every module that can be paired, in each of `passes`, on the proof input of the label `on`; on
    the first one where that is empty, or no input's.

    Changes nothing. Each pass runs both sides once and holds what their modules return. A pass that cannot be run says
    why. GraftError and PlanError as surgery.verify raises them; SurgeryError for a pass that does not parse.
    """
    from surgery.checkpoint import open as open_checkpoint
    from surgery.graft import _relative, _rules, _submodule, infos
    from surgery.judge import Judge, untouched_generators
    from surgery.passes import parse
    from surgery.prepared import Prepared

    wanted = [parse(name) for name in dict.fromkeys(passes)]
    module = _submodule(target, into)
    with untouched_generators():
        made = Prepared.of(open_checkpoint(source), probe, _rules(plan, rules))
        relative = _relative(plan, module, into)
        relative.check(made.base, infos(module))
        assert made.probe is not None
        judge = Judge(made.source, module, made.inward(relative), made.probe)
        x = next((x for x in judge.inputs if x[0] == on), judge.inputs[0])
        theirs, ours = _run(judge, None, x)
        pairs = _pairs(judge, theirs, ours)
        exact = [pair.expected(theirs) for pair in pairs]
        return tuple(_depth(judge, each, x, pairs, exact, ours) for each in wanted)


def _run(judge: Judge, wanted: Any, on: tuple[str, Any]) -> tuple[list[Call], list[Call]]:
    """The calls of both sides on a proof input: of float64 twins, or of copies in the type of a pass."""
    from surgery.passes import outputs
    from surgery.running import build

    label, x = on
    surfaced = judge.probe.run_target is None
    theirs: list[Call] = []
    ours: list[Call] = []
    if wanted is None:
        judge.reference_side.outputs(judge.reference_twin(), x, label, calls=theirs)
        judge.target_side.outputs(judge.target_twin(new=surfaced), x, label, calls=ours)
    else:
        values = {**judge.new, **judge.values}
        reference = build(judge.probe.reference, {}, wanted.device, wanted.dtype)
        outputs(judge.reference_side, reference, x, label, wanted, theirs)
        target = build(judge.target, values, wanted.device, wanted.dtype)
        outputs(judge.target_side, target, x, label, wanted, ours)
    return theirs, ours


def _depth(
    judge: Judge,
    wanted: Any,
    on: tuple[str, Any],
    pairs: Sequence[_Pair],
    exact: Sequence[Tensor],
    twins: Sequence[Call],
) -> Depth:
    import torch

    from surgery import surface
    from surgery.passes import unavailable

    label = on[0]
    why = unavailable(wanted) or ("inside of a compiled program there is nothing to see" if wanted.compiled else "")
    if why:
        return Depth(wanted.name, label, (), why=why)
    theirs: Sequence[Call] | None = None
    ours = twins
    if wanted.dtype is not torch.float64 or wanted.device != judge.device:
        try:
            theirs, ours = _run(judge, wanted, on)
        except GraftError as error:
            return Depth(wanted.name, label, (), why=str(error))
        if [call.module for call in ours] != [call.module for call in twins]:
            return Depth(wanted.name, label, (), why="other modules were called than in float64")
    points = []
    for pair, value in zip(pairs, exact, strict=True):
        got = ours[pair.at].out[pair.out].cpu()
        try:
            own = surface.residual(value, pair.expected(theirs).cpu(), anywhere=False) if theirs is not None else 0.0
        except (IndexError, StopIteration):
            own = surface.INF  # the reference took another way in this type
        residual = surface.residual(value, got, anywhere=True)
        points.append(Point(pair.at, pair.module, pair.reference, residual, own))
    return Depth(wanted.name, label, tuple(points), tuple(call.module for call in twins))


def _pairs(judge: Judge, theirs: Sequence[Call], ours: Sequence[Call]) -> list[_Pair]:
    """What of the target's calls has a counterpart: by value, else through the plan."""
    from surgery import surface
    from surgery.mapper.record import FingerprintIndex, fingerprint

    flat = [(at, out, t) for at, call in enumerate(theirs) for out, t in enumerate(call.out)]
    index = FingerprintIndex((i, fingerprint(t)) for i, (_, _, t) in enumerate(flat))
    stands_for = _standing_for(judge)
    holders = {expr.name: live.rpartition(".")[0] for live, expr in judge.links.items() if isinstance(expr, Name)}
    seen: dict[str, int] = {}
    by_value: list[_Pair] = []
    by_plan: list[_Pair] = []
    for at, call in enumerate(ours):
        turn = seen[call.module] = seen.get(call.module, -1) + 1
        out = next((i for i, t in enumerate(call.out) if t.is_floating_point() and t.numel()), None)
        if out is None:
            continue
        got = call.out[out]
        expr, width = stands_for.get(call.module, (None, 0))
        holding = {} if expr is None else {name: holders.get(name) for name in names(expr)}
        hits = [i for i in index.find(fingerprint(got), 1e-9) if flat[i][2].numel() == got.numel()]
        if hits:
            # Of modules that return one value: the one that the plan names, else the first, which is the innermost.
            best = next((i for i in hits if theirs[flat[i][0]].module in holding.values()), hits[0])
            reference = theirs[flat[best][0]].module
            by_value.append(_Pair(at, out, call.module, reference, _at(flat[best][0], flat[best][1])))
        elif expr is not None and None not in holding.values() and (isinstance(expr, Name) or got.shape[-1] == width):
            expected = _through(expr, {name: str(module) for name, module in holding.items()}, turn)
            try:
                fits = expected(theirs).numel() == got.numel()
            except (PlanError, StopIteration, IndexError, RuntimeError):
                fits = False  # its outputs do not lie as its weights do
            if fits:
                reference = ", ".join(dict.fromkeys(map(str, holding.values())))
                by_plan.append(_Pair(at, out, call.module, reference, expected))
    last = max((pair.at for pair in by_value), default=-1)
    # What differs on the way to something that is right is no counterpart: the same is computed in another way.
    kept = [
        pair
        for pair in by_plan
        if pair.at > last
        or surface.residual(pair.expected(theirs), ours[pair.at].out[pair.out], anywhere=True) <= _MATCH
    ]
    return sorted([*by_value, *kept], key=lambda pair: pair.at)


def _at(call: int, out: int) -> Callable[[Sequence[Call]], Tensor]:
    return lambda calls: calls[call].out[out]


def _through(expr: Expr, modules: Mapping[str, str], turn: int) -> Callable[[Sequence[Call]], Tensor]:
    """What the modules that these tensors belong to return, put together as the plan puts their rows."""

    def expected(calls: Sequence[Call]) -> Tensor:
        def output(name: str) -> Tensor:
            of_module = [call for call in calls if call.module == modules[name]]
            return next(t for t in of_module[turn].out if t.is_floating_point())

        if isinstance(expr, Name):
            return output(expr.name)
        return evaluate(expr, lambda name: output(name).movedim(-1, 0).flatten(1)).movedim(0, -1)

    return expected


def _standing_for(judge: Judge) -> dict[str, tuple[Expr, int]]:
    """For a module of the target, the expression that makes its outputs of the reference's, and how many there are:
    that of its bias, or of its weight, as far as that only joins, cuts or orders whole rows. A module whose tensors
    are of several modules of the reference each stands for none of them."""
    found: dict[str, tuple[Expr, int]] = {}
    several: set[str] = set()
    rows = sorted(judge.plan.rows, key=lambda row: len(row.shape) != 1)  # a bias has one axis: that of the outputs
    for row in rows:
        module = row.target.rpartition(".")[0]
        if row.expr is None:
            continue
        if module in found and _owners(found[module][0]) != _owners(row.expr):
            several.add(module)
        expr = _by_rows(row.expr)
        if module not in found and expr is not None and row.shape:
            found[module] = expr, row.shape[0]
    return {module: made for module, made in found.items() if module not in several}


def _owners(expr: Expr) -> set[str]:
    return {name.rpartition(".")[0] for name in names(expr)}


def _by_rows(expr: Expr) -> Expr | None:
    if isinstance(expr, Name):
        return expr
    if expr.op in ("transpose", "cast") and len(expr.args) == 1:
        # Of a matrix that is stored the other way round, what follows still is the axis of the outputs.
        return _by_rows(expr.args[0]) if isinstance(expr.args[0], Name) else None
    if expr.op not in _ALONG or dict(expr.params).get("axis", 0) != 0:
        return None
    args = [_by_rows(arg) for arg in expr.args]
    if any(arg is None for arg in args):
        return None
    return Op(expr.op, tuple(arg for arg in args if arg is not None), expr.params)
