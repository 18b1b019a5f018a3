"""Where two programs part: the target's module and line, the reference's module, and the cause.

Both runs are recorded and paired by value (surgery.pairing). What follows the first difference inherits it: a cause is
tried there, on the target's run, with what both sides have fed in (surgery.causes, surgery.wrong_weights), and claimed
only where it removes the difference; what differs then is an error of its own. A target whose run cannot be recorded is
looked at module by module instead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.module import _forward_unimplemented
from torch.utils._pytree import tree_map

from surgery import attribution, nearby, structure, surface, wrong_weights
from surgery.causes import causes, tried
from surgery.errors import GraftError
from surgery.expr import Name, names
from surgery.mapper.record import FingerprintIndex, Tape, fingerprint, record
from surgery.pairing import MATCH, SOFTMAX, UNFIT, Edit, Found, Pair, Place, Run, caller, cuts, named, op_name
from surgery.proof import Divergence
from surgery.running import Call, Side, all_tensors

if TYPE_CHECKING:
    from surgery.judge import Judge

SECONDS = 120.0  # that looking for the cause may take, where operators are slow
FURTHER = 4  # places that are named beside the first


def diverge(judge: Judge, at: int) -> Divergence:
    """The first divergence on the input of this number."""
    try:
        found = _recorded(judge, at)
    except (GraftError, *UNFIT):
        found = None  # a run that no tape holds: its modules are compared instead
    return replace(found or _by_modules(judge, at), input=judge.inputs[at][0])


def _recorded(judge: Judge, at: int) -> Divergence | None:
    surfaced = judge.probe.run_target is None
    theirs_tape = _tape(judge, judge.reference_side, judge.reference_twin(), at, set(judge.links))
    ours_tape = _tape(judge, judge.target_side, judge.target_twin(new=surfaced), at, set(judge.values))
    on_reference, on_target = _precise(judge, theirs_tape, ours_tape)
    if on_reference:  # what float32 left in a table is not what is looked for
        twin = judge.reference_twin(on_reference)
        theirs_tape = _tape(judge, judge.reference_side, twin, at, set(judge.links))
    if on_target:
        twin = judge.target_twin(None, on_target, new=surfaced)
        ours_tape = _tape(judge, judge.target_side, twin, at, set(judge.values))
    theirs = Run(theirs_tape, theirs_tape.outputs())
    ours = Run(ours_tape, ours_tape.outputs())
    if surfaced:
        ours.barred = ours_tape.depending(set(judge.new)) | ours_tape.inside()
    pair = Pair(ours, theirs)
    if surfaced:
        ours.outputs = pair.sinks(ours)
    ours.outputs = [*ours.outputs, *ours_tape.fed()]  # around a departure, what goes into it is compared too
    place = _place(pair)
    if place is None:
        return None
    stores = wrong_weights.stores_of(
        judge.values, all_tensors(judge.probe.reference), lambda n: n in judge.links and n in theirs_tape.params
    )
    modules = dict(judge.target.named_modules())
    place.leaves = frozenset(n for n, m in modules.items() if not list(m.children()))
    place.silent = frozenset(n for n, m in modules.items() if type(m).forward is _forward_unimplemented)
    place.chains = {
        n: f"{n}.{next(iter(m._modules), '')}".lstrip(".")
        for n, m in modules.items()
        if type(m).forward is nn.Sequential.forward
    }
    place.until = time.monotonic() + SECONDS
    cause = _heads(judge, place, at) or _cause(place, stores)
    label = judge.inputs[at][0]
    return _told(judge, place, cause, label)


def _precise(judge: Judge, theirs: Tape, ours: Tape) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Of each side, the constants and tables that it stores in float32 and the other computes; no weights."""
    moved = {id(t) for n, t in all_tensors(judge.probe.reference).items() if n in judge.links}
    filled = {id(t) for n, t in all_tensors(judge.target).items() if n in judge.values or n in judge.new}
    reference, target = judge.probe.reference, judge.target
    return (
        attribution.scalars(reference, moved) | attribution.tables(reference, moved, ours),
        attribution.scalars(target, filled) | attribution.tables(target, filled, theirs),
    )


def _tape(judge: Judge, side: Side, twin: nn.Module, at: int, weights: set[str]) -> Tape:
    label, x = judge.inputs[at]
    x = tree_map(lambda t: t.to(judge.device) if isinstance(t, Tensor) else t, x)
    with side.failures(twin, label):
        return record(side.run, twin, x, weights=weights, lines=caller, within=nearby.held(judge, at, side))


def _place(pair: Pair) -> Place | None:
    """The first place that is one in both runs; else the first of ours."""
    ours, theirs = pair.frontier(pair.ours), pair.frontier(pair.theirs)
    if not ours:
        return None
    shared = {i: [t for t in theirs if pair.sharing(i, t)] for i in ours[:24]}
    first = next((i for i in ours[:24] if shared[i]), ours[0])
    for i in [i for i in ours[:24] if i < first]:
        if first in pair.ours.after([o for o in pair.ours.tape.nodes[i].outs if o >= 0], 40) and (
            s := _beside(pair, i)
        ):
            first, shared[i] = i, s
            break
    their_first = sorted(shared.get(first, []), key=lambda t: -pair.sharing(first, t)) or theirs[:4]
    after = pair.ours.after([o for o in pair.ours.tape.nodes[first].outs if o >= 0], 80)
    outs = [o for t in their_first for o in pair.theirs.tape.nodes[t].outs if o >= 0]
    return Place(pair, first, their_first, [first, *after], [*their_first, *pair.theirs.after(outs, 120)])


def _beside(pair: Pair, index: int) -> list[int]:
    """The reference's nodes that take the same as ours and make of it what we have not. They are no frontier where a
    sum of what they make occurs, by chance or by algebra."""
    run, other = pair.ours, pair.theirs
    same = {w for v in run.data_inputs(index) for w in run.twins.get(pair.origin(v), [])}
    nodes = sorted({c for w in same for c in other.tape.consumers[w]})
    return [c for c in nodes if any(o >= 0 and other.both[o] is False for o in other.tape.nodes[c].outs)][:4]


def _cause(place: Place, stores: wrong_weights.Stores) -> Found | None:
    """The first change that removes the divergence, and better one after which the module computes what the reference
    does: else it is one of several things."""

    def all_of() -> Iterator[Found]:
        yield from tried(wrong_weights.near(place, stores))
        yield from causes(place)
        yield from tried(wrong_weights.far(place, stores))
        yield from tried(structure.instead(place))

    partial: Found | None = None
    module = place.node.module
    for found in all_of():
        left = place.left(found.edit)
        if left and found.cause.startswith("missing ") and _consumes(place, left[0]):
            continue  # what it makes occurs in the reference, by chance: what takes it does not
        if not left or place.pair.ours.tape.nodes[left[0]].module != module:
            return found
        if found.cause != "scale" and not found.cause.startswith("extra"):  # what is left out may stand elsewhere
            partial = partial or found
    return partial


def _consumes(place: Place, node: int) -> bool:
    """Does this node take what our first node gives, in whatever layout?"""
    run = place.pair.ours
    return any(place.pair.origin(v) in run.tape.nodes[place.first].outs for v in run.data_inputs(node))


def _heads(judge: Judge, place: Place, at: int) -> Found | None:
    """Another number of heads than the reference's softmax has, found by running the target with that number."""
    ours, theirs = (
        [s for i in after[:60] if op_name(run.tape.nodes[i]) in SOFTMAX and len(s := _shape(run, i)) == 4]
        for run, after in ((place.pair.ours, place.ours_after), (place.pair.theirs, place.theirs_after))
    )
    if not ours or not theirs or ours[0][1] == theirs[0][1]:
        return None
    has, wants = ours[0][1], theirs[0][1]
    module = place.node.module
    for attribute, value in vars(judge.target.get_submodule(module)).items():
        if type(value) is not int or value != has:
            continue
        twin = judge.target_twin(new=judge.probe.run_target is None)
        setattr(twin.get_submodule(module), attribute, wants)
        try:
            tape = _tape(judge, judge.target_side, twin, at, set(judge.values))
        except GraftError:
            continue  # it does not run with that number: that is not all of it
        run = Run(tape, tape.outputs())
        if judge.probe.run_target is None:
            run.barred = tape.depending(set(judge.new))
        pair = Pair(run, Run(place.pair.theirs.tape, place.pair.theirs.outputs))
        if judge.probe.run_target is None:
            run.outputs = pair.sinks(run)
        left = pair.frontier(run)
        if not left or (left[0] > place.first and tape.nodes[left[0]].module != module):
            said = f"{attribute} is {has}, the source has {wants} heads"
            return Found("number of heads", said, Edit(), place.first, module)
    return None


def _shape(run: Run, index: int) -> tuple[int, ...]:
    return run.tape.values[run.tape.nodes[index].outs[0]].shape


def _told(judge: Judge, place: Place, cause: Found | None, label: str) -> Divergence:
    pair, first = place.pair, place.first
    node = pair.ours.tape.nodes[cause.node if cause is not None else first]
    module = node.module if cause is None or cause.module is None else cause.module
    module = module.partition(".parametrizations")[0]  # the person's module, and not what torch puts into it
    out = next((o for o in pair.ours.tape.nodes[first].outs if o >= 0), -1)
    residual, near = pair.nearest(out, dict.fromkeys([*place.theirs_after[:60]])) if out >= 0 else (surface.INF, -1)
    theirs_at = near if near >= 0 else (place.theirs[0] if place.theirs else -1)
    theirs = pair.theirs.tape.nodes[theirs_at].module if theirs_at >= 0 else ""
    file, line = pair.ours.tape.lines.get(cause.node if cause is not None else first, ("", 0))
    where = named(judge.target, module, file, line)
    nearly = f"; the nearest activation of the reference, in {theirs or 'its forward'}, differs by {residual:.1e}"
    nearly = nearly if residual < 1.0 else ""
    if cause is None:
        said = f"{where}: what it computes here the reference does not, from inputs that both have"
        return Divergence(module, theirs, residual, f"{said} (on {label}{nearly})", "", file, line)
    fix = f"{where}: {cause.said}"
    further = _further(place, cause) if cause.edit else ()
    differ = "differs" if len(further) == 1 else "differ"
    also = f"; once that is corrected, {', '.join(further)} still {differ}" if further else ""
    why = f"{fix} ({label}: the outputs part there{nearly}{also})"
    return Divergence(module, theirs, residual, why, cause.cause, file, line, fix, further)


def _further(place: Place, cause: Found) -> tuple[str, ...]:
    """Where the two part once this cause is removed: errors of their own, not inherited ones."""
    nodes = place.pair.ours.tape.nodes
    modules = dict.fromkeys(nodes[i].module or "the module itself" for i in place.left(cause.edit))
    return tuple(modules)[:FURTHER]


# -- module by module, where a run cannot be recorded -----------------------------------------------------------------
@dataclass
class _Pairing:
    """What the reference computed on one input, to be looked up by value."""

    tape: Tape
    index: FingerprintIndex

    @classmethod
    def of(cls, tape: Tape) -> _Pairing:
        return cls(tape, FingerprintIndex((vid, v.fingerprint) for vid, v in enumerate(tape.values)))

    def occurs(self, t: Tensor) -> bool | None:
        """Whether a tensor occurs in the reference; None where it says nothing (integers, constants)."""
        f = fingerprint(t)
        if f is None:
            return None
        return any(math.prod(self.tape.values[v].shape) == t.numel() for v in self.index.find(f, MATCH)) or any(
            all(self.index.find(fingerprint(piece), MATCH) for piece in pieces) for pieces in cuts(t)
        )

    def nearest(self, t: Tensor) -> tuple[float, str]:
        """(residual, module) of the closest activation of the same size."""
        best, where = surface.INF, ""
        sizes = [
            v
            for v in self.tape.values
            if v.data and v.origin == "node" and v.tensor is not None and _size(v) == t.numel()
        ]
        for v in sizes:
            if v.tensor is not None and v.tensor.is_floating_point():
                r = surface.residual(v.tensor, t) if v.tensor.squeeze().shape == t.squeeze().shape else surface.INF
                if r < best:
                    best, where = r, self.tape.nodes[v.node].module
        return best, where


def _size(v: Any) -> int:
    return math.prod(v.shape)


@dataclass(frozen=True)
class _Parting:
    """The first call that differs, by its place in the order of completion."""

    at: int
    module: str
    inside: bool  # its inputs occur in the reference, so that it is the module itself
    out: Tensor | None
    given: list[Tensor]


def _by_modules(judge: Judge, at: int) -> Divergence:
    label = judge.inputs[at][0]
    theirs_called: list[Call] = []
    try:
        pairing = _Pairing.of(judge.record_reference(at, theirs_called))
    except GraftError as error:
        return Divergence("", "", surface.INF, f"the two differ on {label}; where is unknown: {error}")

    twin = judge.target_twin(new=judge.probe.run_target is None)
    made: list[Call] = []
    judge.target_side.outputs(twin, judge.inputs[at][1], label, calls=made)
    parting = _parting(pairing, made)
    if parting is None:
        return Divergence("", "", surface.INF, f"the outputs differ on {label}, in what is done after the last module")
    name = parting.module or "the module itself"
    residual, theirs = pairing.nearest(parting.out) if parting.out is not None else (surface.INF, "")
    near = f"; the nearest activation of the reference, in {theirs or 'its forward'}, differs by {residual:.1e}"
    near = near if residual < 1.0 else ""
    twins = _counterparts(judge, parting.module)
    fed = [c.given for c in theirs_called if c.module in twins]
    if parting.inside and fed and not any(_same_inputs(parting.given, given) for given in fed):
        caller = parting.module.rpartition(".")[0]
        why = (
            f"{caller or 'the module itself'}: what its forward gives to {name} is not what the reference gives to "
            f"{' or '.join(sorted(twins))}, on {label}{near}"
        )
        return Divergence(caller, theirs, residual, why)
    if parting.inside:
        why = f"{name}: its inputs occur in the reference and its output does not, on {label}{near}"
    else:
        why = f"{name}: its forward computes something that the reference does not, on {label}{near}"
    return Divergence(parting.module, theirs, residual, why)


def _counterparts(judge: Judge, module: str) -> set[str]:
    """The reference's modules that hold what the plan puts into this one's own tensors, taken over as they are."""
    live: dict[str, list[str]] = {}
    for name, expr in judge.links.items():
        if isinstance(expr, Name):
            live.setdefault(expr.name, []).append(name)
    rows = [r for r in judge.plan.rows if r.target.rpartition(".")[0] == module and isinstance(r.expr, Name)]
    return {n.rpartition(".")[0] for r in rows for n in live.get(str(r.expr and names(r.expr)[0]), ())}


def _same_inputs(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        any(a.numel() == b.numel() and surface.residual(b, a, anywhere=True) <= MATCH for b in theirs)
        for a in ours
        if a.is_floating_point()
    )


def _parting(pairing: _Pairing, calls: list[Call]) -> _Parting | None:
    seen: list[bool | None] = []
    for call in calls:
        judged = [r for t in call.out if (r := pairing.occurs(t)) is not None]
        seen.append(all(judged) if judged else None)
    last = max((i for i, ok in enumerate(seen) if ok), default=-1)
    for i in range(last + 1, len(calls)):
        if seen[i] is not False:
            continue
        given = [r for t in calls[i].given if (r := pairing.occurs(t)) is not None]
        out = next((t for t in calls[i].out if pairing.occurs(t) is False), None)
        if all(given):
            return _Parting(i, calls[i].module, True, out, calls[i].given)
        # Something was done to its input on the way: in the forward of the module that calls it.
        strange = next((t for t in calls[i].given if pairing.occurs(t) is False), None)
        return _Parting(i, calls[i].module.rpartition(".")[0], False, strange, [])
    return None
