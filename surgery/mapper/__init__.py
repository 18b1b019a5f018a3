"""The mapper: from a checkpoint and a target to a plan, by names, shapes and what running shows.

record, masks    what a run shows: a tape of operators; scores that are masked
canon, products    operators in one spelling
kinds, affine, terms, grid    values as sums of terms linear in the weights
parts, taps, taken    values, kernels and tables in pieces
coefficients, factors, tables    constants that weights must take, and weights that are products
rows, align, beside, unify, weighed, repeated, merged, spread    one sum over another
meeting    where and how a sum of the target meets the reference's
bound, invert    what is settled of a tensor; weights computed from weights
reference, hypothesis, repeat, search    the walk over the target's tape
render, completion     from numbered elements to expressions
names      words as evidence
static, static_units, static_match    where nothing can be run
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import GraftError
from surgery.plan import WITHOUT, Dropped, Plan, Row, Stamp, Status

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.checkpoint import Checkpoint
    from surgery.expr import Expr
    from surgery.mapper.hypothesis import Hypothesis
    from surgery.mapper.record import Tape
    from surgery.mapper.reference import Reference
    from surgery.probe import Probe


def find(
    source: Checkpoint,
    target: nn.Module,
    probe: Probe,
    *,
    kept: frozenset[str] = frozenset(),
    links: Mapping[str, Expr] | None = None,
    departing: tuple[str, ...] = (),
) -> Plan:
    """The plan that makes `target` compute what the probe's reference computes on the search input.

    kept: target names whose values stay as they are (an earlier graft's). Returns a plan without a verdict (the proof
    gives it), or one that says "refuted" and why in `diagnosis` where no mapping reproduces the reference's outputs.
    departing: modules of the target that compute something else on purpose; the mapping is looked for around them.
    Raises GraftError where the reference does not hold the source's weights, or a side fails to run.
    """
    from surgery import twin
    from surgery.link import link
    from surgery.mapper import names
    from surgery.mapper.record import record
    from surgery.mapper.reference import Reference
    from surgery.mapper.search import Search
    from surgery.mapper.tables import Tables

    def call_target(module: nn.Module, x: Any) -> Any:
        if not departing:
            return probe.call_target(module, x)
        from surgery.departure import cut_out

        with cut_out(module, departing):
            return probe.call_target(module, x)

    inputs = Tables()
    links = dict(links) if links is not None else link(probe.reference, source)
    x = probe.search_input()
    own = {n: t.detach() for n, t in target.state_dict(keep_vars=True).items()}
    floats = {n for n, t in own.items() if t.is_floating_point() and n not in kept}
    maybe = _maybe_constant(target)
    exact: dict[str, Tensor] = {}

    def refer(values: dict[str, Tensor]) -> Tape:
        mine = twin.twin(probe.reference, values)
        weights = set(links) - inputs.theirs
        return record(probe.run_reference, mine, x, weights=weights, spare=True, tables=inputs.any)

    def again(values: dict[str, Tensor], keep: int = 0, made_up: bool = False) -> Tape:
        sizes = None if keep else frozenset[int]()
        mine, weights = twin.twin(target, exact | values, written=not made_up), floats - inputs.mine
        return record(call_target, mine, x, weights=weights, keep=keep, sizes=sizes, tables=inputs.any, made_up=made_up)

    def blank() -> Tape:
        """The target's operators. Values that it is asked for as it runs are looked at in the search."""
        try:
            return again({}, made_up=True)
        except Exception:  # numbers that are made up may be such as the program refuses
            return again({})

    seen = _ran("reference", lambda: refer({}))
    _check_links(probe.reference, seen, links)
    exact |= _computed(target, {n for n in floats if n not in maybe}, seen)
    tape = _ran("target", blank)

    def searched(seen: Tape, tape: Tape) -> tuple[Hypothesis | None, Hypothesis]:
        reference, outputs = Reference(seen), seen.outputs()
        if not outputs:
            raise GraftError(
                "the probe's reference returned no tensor", hint="run_reference must return a Tensor or a tuple."
            )
        equal = _outputs_equal if probe.run_target is not None else _outputs_occur
        search = Search(
            tape,
            reference,
            own=own | exact,
            maybe_constant=maybe,
            prior=names.likeness,
            again=again,
            accept=equal(reference, outputs),
        )
        return search.run()

    won, best = searched(seen, tape)
    if won is None:
        better = _numbers(probe.reference, _maybe_constant(probe.reference))
        mine = _numbers(target, maybe)
        exact |= mine
        if _tables(probe.reference, set(links)):
            ran = _ran("target", lambda: again({}, keep=1 << 28))
            better |= _computed(probe.reference, set(links), ran)
        if better or mine:
            tape = _ran("target", blank) if mine else tape
            won, best = searched(_ran("reference", lambda: refer(better)), tape)
    if won is None and (inputs := Tables.of((target, tape), (probe.reference, seen))).any:
        won, _ = searched(_ran("reference", lambda: refer(better)), _ran("target", blank))
        if won is not None:
            won.constant |= {n: own[n].double() for n in inputs.mine}
            best = won
    return _plan(source, target, best, dict(links), own, kept, found=won is not None, departing=bool(departing))


def _ran(side: str, run: Callable[[], Tape]) -> Tape:
    """Run one side; what it raises becomes the person's error, with the side named."""
    try:
        return run()
    except GraftError:
        raise
    except Exception as e:
        raise GraftError(
            f"the {side} failed to run on the probe's input: {type(e).__name__}: {e}",
            hint=f"Run the {side} on this input by itself, and correct the input (example()) or the module.",
        ) from e


def _computed(module: nn.Module, weights: set[str], other: Tape) -> dict[str, Tensor]:
    """The tables of constants that a module stores rounded and the other side computes as it runs, as computed there:
    the search compares values more closely than float32 rounds. (The proof tries the same, and says so.)"""
    from surgery import attribution

    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    found = attribution.tables(module, {id(t) for n, t in named.items() if n in weights}, other)
    return {n: found[id(t)] for n, t in named.items() if id(t) in found}


def _numbers(module: nn.Module, constants: set[str]) -> dict[str, Tensor]:
    """Constants that are one number all over, which a module stores rounded (a kernel that averages), as they were
    before."""
    from surgery import attribution

    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    found = attribution.scalars(module, {id(t) for n, t in named.items() if n not in constants})
    return {n: found[id(t)] for n, t in named.items() if id(t) in found}


def _tables(module: nn.Module, weights: set[str]) -> bool:
    """Does a module hold a table that is no weight?"""
    return any(
        n not in weights and t.is_floating_point() and t.numel() > 1
        for n, t in module.named_buffers(remove_duplicate=False)
    )


def _check_links(reference: nn.Module, tape: Tape, links: Mapping[str, Expr]) -> None:
    """Every parameter that the reference's run consumed must be one of the checkpoint's."""
    parameters = {n for n, _ in reference.named_parameters(remove_duplicate=False)}
    missing = [
        v.name
        for vid, v in enumerate(tape.values)
        if v.origin == "const" and v.name in parameters and v.name not in links and tape.consumers[vid]
    ]
    if missing:
        few = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise GraftError(
            f"the reference runs with tensors that the checkpoint does not hold: {few}",
            hint="Load the checkpoint into the reference first; a proof about other weights proves nothing.",
        )


def _maybe_constant(target: nn.Module) -> set[str]:
    """Tensors that may be constants of the target: float buffers, and frozen parameters among trainable ones."""
    out = {n for n, _ in target.named_buffers(remove_duplicate=False)}
    parameters = dict(target.named_parameters(remove_duplicate=False))
    if any(p.requires_grad for p in parameters.values()):
        out |= {n for n, p in parameters.items() if not p.requires_grad}
    return out


def _outputs_equal(reference: Reference, outputs: list[int]) -> Callable[[Hypothesis], bool]:
    def accept(h: Hypothesis) -> bool:
        mine = h.tape.outputs()
        if len(mine) != len(outputs):
            return False
        for i, j in zip(mine, outputs, strict=True):
            a, b = h.known(i), reference.known(j)
            if a is None or b is None or a.numel() != b.numel():
                return False
            if a.squeeze().shape != b.squeeze().shape:
                return False
            scale = float(b.abs().max()) if b.numel() else 0.0
            if not bool(((a.squeeze() - b.squeeze()).abs() <= 1e-9 * max(scale, 1e-300)).all()):
                return False
        return True

    return accept


def _outputs_occur(reference: Reference, outputs: list[int]) -> Callable[[Hypothesis], bool]:
    from surgery.mapper.record import fingerprint, same

    def accept(h: Hypothesis) -> bool:
        for j in outputs:
            b = reference.known(j)
            f = reference.tape.values[j].fingerprint
            if f is None or b is None:
                return False
            mine = (
                v
                for v, val in enumerate(h.tape.values)
                if val.data and val.weights and v not in h.tainted and math.prod(val.shape) == b.numel()
            )
            if not any(
                (t := h.known(v)) is not None and (g := fingerprint(t)) is not None and same(f, g) for v in mine
            ):
                return False
        return True

    return accept


def _plan(
    source: Checkpoint,
    target: nn.Module,
    h: Hypothesis,
    links: dict[str, Expr],
    own: dict[str, Tensor],
    kept: frozenset[str],
    *,
    found: bool,
    departing: bool = False,
) -> Plan:
    """The rows of a hypothesis, in the target's order, and what becomes of the rest of the source."""
    from surgery.dtypes import name_of
    from surgery.mapper.completion import complete
    from surgery.mapper.render import Renderer, Unrenderable
    from surgery.memory import info_of

    renderer = Renderer(h.reference, links)
    evidence = _evidence(h)
    rows: dict[str, Row] = {}
    unsettled: list[str] = []
    unrendered: list[str] = []
    ties = _ties(own)
    for name, t in own.items():
        shape, dtype = tuple(t.shape), name_of(t.dtype)
        vid = h.tape.params.get(name)
        label = h.tape.values[vid].name if vid is not None else name
        if name in ties:
            rows[name] = Row(name, Status.TIED, None, shape, dtype, tied_to=ties[name])
        elif name in kept:
            rows[name] = Row(name, Status.KEPT, None, shape, dtype, note="filled by an earlier graft")
        elif (bound := h.bound.get(label)) is not None:
            try:
                expr = renderer.bound(complete(bound, h.reference))
            except Unrenderable as e:
                unrendered.append(f"{name}: {e}")
                rows[name] = Row(name, Status.NEW, None, shape, dtype, note=f"open: {e}")
            else:
                status = Status.SYNTHESISED if _synthesised(expr) else Status.FILLED
                rows[name] = Row(name, status, expr, shape, dtype, evidence=evidence.get(label, ""))
        elif label in h.constant:
            rows[name] = Row(name, Status.CONSTANT, None, shape, dtype, note="the target's own constant")
        else:
            unsettled.append(name)
    exprs = {n: row.expr for n, row in rows.items() if row.expr is not None}
    if departing:
        from surgery.mapper import holes

        inside = holes.completed(h, target, unsettled, exprs, links, source)
        for name, expr in inside.items():
            t = own[name]
            rows[name] = Row(name, Status.FILLED, expr, tuple(t.shape), name_of(t.dtype), evidence=holes.INSIDE)
        unsettled = [name for name in unsettled if name not in inside]
        exprs |= inside
    for name in unsettled:
        rows[name] = row = _unsettled(name, own[name], exprs, source, h)
        if row.expr is not None:
            exprs[name] = row.expr
    used = {n for r in rows.values() for n in r.sources}
    diagnosis = "" if found else _diagnosis(h)
    if found and unrendered:
        diagnosis = "the mapping was found but has no expression for " + "; ".join(unrendered[:4])
    symmetries = []
    if h.swapped:
        symmetries.append(
            "addends of one sum (biases of one gate or kernel) could change places: any choice is the same"
        )
    if h.folds:
        symmetries.append(
            "a constant by which the reference multiplies a product of two values (scores of attention) is in the "
            "weights of one of the two: in those of the other it would be the same"
        )
    return Plan(
        rows=tuple(rows[name] for name in own),
        dropped=tuple(Dropped(n, _why_dropped(n, h, links)) for n in source if n not in used),
        source=Stamp.of(source, source.source),
        target=Stamp.of({n: info_of(t) for n, t in own.items()}, type(target).__name__),
        verdict="refuted" if diagnosis else None,
        symmetries=tuple(symmetries),
        diagnosis=diagnosis,
    )


def _ties(own: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that have an earlier name: they share their first byte and their layout."""
    first: dict[tuple[Any, ...], str] = {}
    ties: dict[str, str] = {}
    for name, t in own.items():
        if t.numel():
            key = (id(t) if t.is_meta else t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
            if first.setdefault(key, name) != name:
                ties[name] = first[key]
    return ties


def _synthesised(expr: Expr) -> bool:
    from surgery.expr import names, walk

    return not names(expr) or any(getattr(e, "op", "") == "norm_except" for e in walk(expr))


def _evidence(h: Hypothesis) -> dict[str, str]:
    out: dict[str, str] = {}
    for c in h.choices:
        way = "the only one that fits" if c.of == 1 else f"the one of {c.of} that the reference's activations bear out"
        where = f" at {c.module}" if c.module else ""
        for t, s in zip(c.weights, c.sources, strict=True):
            if t not in out:
                out[t] = f"reads the same input as {s}{where}: {way}"
    return out


def _unsettled(name: str, t: Tensor, rows: Mapping[str, Expr], source: Checkpoint, h: Hypothesis) -> Row:
    """A tensor that the run did not settle: from where its neighbours come, or a constant, or new."""
    from surgery.dtypes import name_of
    from surgery.mapper.static import suggest

    shape, dtype = tuple(t.shape), name_of(t.dtype)
    vid = h.tape.params.get(name)
    reached = vid is not None and bool(h.tape.consumers[vid])
    if not reached and (found := _beside(name, shape, rows, source) or suggest(name, shape, rows, source)):
        return Row(name, Status.FILLED, found[0], shape, dtype, evidence=found[1])
    if not t.is_floating_point():
        return Row(name, Status.CONSTANT, None, shape, dtype, note="an integer table of the target's own")
    note = "nothing in the reference corresponds to it" if reached else "not reached by the part that was run"
    return Row(name, Status.NEW, None, shape, dtype, note=note)


def _beside(name: str, shape: tuple[int, ...], rows: Mapping[str, Expr], source: Checkpoint) -> tuple[Expr, str] | None:
    """The source's tensor of this leaf name beside the one that a tensor of the same module comes from."""
    from surgery.expr import Name

    module, _, leaf = name.rpartition(".")
    for other, expr in rows.items():
        if other.rpartition(".")[0] == module and isinstance(expr, Name):
            theirs = expr.name.rpartition(".")[0]
            candidate = f"{theirs}.{leaf}" if theirs else leaf
            if candidate in source and source[candidate].shape == shape:
                return Name(candidate), f"beside {other} in both; not reached by the run"
    return None


def _why_dropped(name: str, h: Hypothesis, links: dict[str, Expr]) -> str:
    from surgery.expr import names

    ref = h.reference.tape
    live = [n for n, e in links.items() if name in names(e)]
    vids = [ref.params[n] for n in live if n in ref.params]
    if not vids:
        return "the reference does not hold it as a weight"
    if not any(ref.consumers[v] for v in vids):
        return "not part of what was run"
    return WITHOUT


def _diagnosis(h: Hypothesis) -> str:
    where = h.parted or h.stuck
    at = f" at {where}" if where else ""
    return f"no mapping of these weights makes the target compute the reference's outputs; they part{at}"
