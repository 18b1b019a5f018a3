"""plan, graft, verify: find a mapping, prove it, apply it atomically.

The order is plan -> account -> stage -> prove -> write. Nothing of the target changes before the verdict is known, so
that a refusal leaves it as it was, and so does an exception.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint import open as open_checkpoint
from surgery.errors import GraftError, PlanError, SurgeryError
from surgery.plan import Plan, Row, Stamp, Status
from surgery.prepared import Prepared, uncast
from surgery.probe import Probe
from surgery.proof import Proof
from surgery.report import Report, Verdict

if TYPE_CHECKING:
    from torch import Tensor, nn

    Source = str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint

KEPT = "filled by an earlier graft"


def plan(
    source: Source,
    target: nn.Module,
    *,
    probe: Probe | None = None,
    rules: Iterable[object] = (),
    into: str = "",
    kept: Iterable[str] = (),
    allow_different: Sequence[str] = (),
) -> Plan:
    """Find the mapping; change nothing. `into` names a submodule to graft into, to which the plan's rows are relative.
    `kept` names tensors of `target` that hold values worth keeping, such as a checkpoint that was loaded before; what
    an earlier graft filled counts as such by itself. They are kept where the source does not fill them, and not
    called new. Where several mappings fit, the verdict is "ambiguous" and `candidates` holds them. `allow_different`:
    see `graft`."""
    from surgery.judge import untouched_generators

    module = _submodule(target, into)
    departing = _departing(module, allow_different, into)
    with untouched_generators():
        made = Prepared.of(open_checkpoint(source), probe, rules)
        found = _find(made.source, module, made.probe, _inside(kept, into, target), departing)
        return _allowing(made.outward(found, infos(module)), allow_different)


def graft(
    source: Source,
    target: nn.Module,
    *,
    probe: Probe | None = None,
    plan: Plan | None = None,
    rules: Iterable[object] = (),
    into: str = "",
    require: str = "consistent",
    allow_different: Sequence[str] = (),
    kept: Iterable[str] = (),
    fill: bool = True,
    passes: Sequence[str] = (),
    blockwise: bool | None = None,
) -> Report:
    """Plan (unless a plan is given), prove where there is a probe, and write the values into `target`.

    The report speaks of all of `target`'s tensors, by their full names, also with `into`. A verdict below `require`
    raises a GraftError that carries the report, and leaves the target as it was: values, types, device, flags, hooks.
    Tensors on the meta device are assigned; others are copied into, so that ties and optimizers hold. With
    `fill=False` all is done but that: the target stays as it was, and the report's plan is for surgery.write.

    `allow_different` names modules of the target (by path; globs) that compute something else on purpose. The rest is
    proven around them: what goes into them must occur in the reference, and with the reference's own activation in
    place of what they give, everything after must too. The verdict is then "adapted", and report.proof.departures says
    how far each of them is from the reference; what was filled inside of one is listed, and not proven. A SurgeryError
    where a name fits no module, or one that is never called.

    `passes` ("device/type"): how both sides are run as well once the float64 proof has passed, as by `verify`. One that
    fails refutes the graft; one that cannot run is listed as not run.

    `blockwise`: as of `verify`; the plan is searched for in little memory too.
    """
    from surgery import apply, machine
    from surgery.judge import untouched_generators

    needed = _verdict(require)
    _parsed(passes)
    if passes and probe is None:
        raise GraftError("without a probe nothing is run, and passes were asked for", hint="Give a probe.")
    module = _submodule(target, into)
    allowed = _allowed(plan, allow_different)
    departing = _departing(module, allowed, into)
    kept = frozenset(kept)
    inside = _inside(kept, into, target)
    with untouched_generators():
        made = Prepared.of(open_checkpoint(source), probe, _rules(plan, rules))
        little = bool(blockwise)
        if blockwise is None and made.probe is not None:
            little = not machine.fits(made.probe.reference, module)
        if plan is None:
            with machine.giving_back(little):
                inner = _find(made.source, module, made.probe, inside, departing)
        else:
            given = _with_kept(_relative(plan, module, into), module, inside)
            given.check(made.base, infos(module))
            inner = made.inward(given)
        proof: Proof | None = None
        fits = plan is not None or inner.verdict != "ambiguous"
        if fits:
            inner.check(made.source, infos(module))
            inner, proof = _judged(
                made.source,
                module,
                inner,
                made.probe,
                given=plan is not None,
                departing=departing,
                passes=passes,
                blockwise=little or blockwise,
            )
        found = _allowing(made.outward(inner, infos(module)), allowed)
        if proof is not None:
            proof = made.proof(proof, found)
            if inner.verdict == "proven" and proof.verdict == "adapted":
                found = found.with_verdict("adapted", proven=found.proven)
        report = _report(found, proof, made.base, target, into, kept)
        if report.verdict.rank < needed.rank:
            raise _refusal(report, needed)
        if not fits:
            found.check(made.base, infos(module))
        if fill:
            apply.write(module, apply.stage(found, made.base, module))
            done = {r.target for r in found.rows if r.status in (Status.FILLED, Status.SYNTHESISED, Status.CONSTANT)}
            done |= {r.target for r in found.rows if r.tied_to in done}
            apply.remember(module, frozenset(done))
    return report


def verify(
    source: Source,
    target: nn.Module,
    plan: Plan,
    *,
    probe: Probe,
    passes: Sequence[str] = ("cpu/float64",),
    rules: Iterable[object] = (),
    into: str = "",
    blockwise: bool | None = None,
    allow_different: Sequence[str] = (),
) -> Proof:
    """Prove a plan again: what `target` would compute with it against the reference, in each of `passes`
    ("device/type"). Changes nothing. The float64 proof is always run; a pass whose device is not there is listed as
    not run. `rules`: where they are not those that the plan carries. `blockwise`: in little memory, a piece of the run
    at a time; None where both models in float64 would not fit into the memory that is free. `allow_different`: modules
    that may depart (see `graft`), beside those that the plan allows."""
    from surgery.departure import judge_of
    from surgery.judge import untouched_generators

    _parsed(passes)
    module = _submodule(target, into)
    relative = _relative(plan, module, into)
    departing = _departing(module, _allowed(plan, allow_different), into)
    with untouched_generators():
        made = Prepared.of(open_checkpoint(source), probe, _rules(plan, rules))
        relative.check(made.base, infos(module))
        assert made.probe is not None
        inner = made.inward(uncast(relative))
        judge = judge_of(made.source, module, inner, made.probe, departing=departing, blockwise=blockwise)
        proof = judge.prove(passes)
        return made.proof(proof, relative)


def infos(module: nn.Module) -> dict[str, TensorInfo]:
    """What a checkpoint of the module would hold."""
    from surgery.memory import info_of
    from surgery.running import own_tensors

    return {name: info_of(t) for name, t in own_tensors(module).items()}


# -- the steps --------------------------------------------------------------------------------------------------------
def _find(
    source: Checkpoint, module: nn.Module, probe: Probe | None, kept: frozenset[str], departing: Mapping[str, str]
) -> Plan:
    from surgery import mapper
    from surgery.apply import filled
    from surgery.mapper import static

    if probe is None:
        mapped = static.find(source, module, kept=kept | filled(module))
    else:
        mapped = mapper.find(source, module, probe, departing=tuple(departing))
    found = _with_kept(mapped, module, kept)
    if not found.source.structure:
        found = replace(found, source=Stamp.of(source, source.source), verdict_for=None)
    if not found.target.structure:
        found = replace(found, target=Stamp.of(infos(module), type(module).__name__), verdict_for=None)
    return found


def _judged(
    source: Checkpoint,
    module: nn.Module,
    found: Plan,
    probe: Probe | None,
    *,
    given: bool,
    departing: Mapping[str, str],
    passes: Sequence[str],
    blockwise: bool | None = None,
) -> tuple[Plan, Proof | None]:
    """The plan with the verdict that running gives; without a probe, the one that it has."""
    if probe is not None:
        from surgery.departure import judge_of

        judge = judge_of(source, module, found, probe, departing=departing, blockwise=blockwise)
        proof = judge.prove(passes, anyway=False)
        symmetries = dict.fromkeys((*found.symmetries, *proof.symmetries))
        stamped = replace(
            found,
            source=replace(found.source, structure=source.structure_hash()),
            target=Stamp.of(infos(module), found.target.description or type(module).__name__),
        )
        if found.verdict == "refuted" and not given and proof.verdict not in ("proven", "adapted"):
            # The search found no mapping; the proof of the best one shows where they part, if it shows anything.
            return stamped.with_verdict("refuted", proven=proof.sentences), proof
        return stamped.with_verdict(proof.verdict, proven=proof.sentences, symmetries=tuple(symmetries)), proof
    if given and found.verdict_on(source, infos(module)) not in ("ambiguous", "refuted"):
        # Nothing was run now, whatever was proven when the plan was made: the target's code may have changed since.
        said = found.verdict_on(source, infos(module))
        past = f"it was {said} when it was made; " if said not in (None, "stale", "consistent") else ""
        note = f"the plan was given: {past}it was checked, and nothing was run"
        return replace(found, notes=(*found.notes, note)).with_verdict("consistent"), None
    return found, None


def _report(
    found: Plan, proof: Proof | None, source: Checkpoint, target: nn.Module, into: str, kept: frozenset[str]
) -> Report:
    message = proof.message if proof is not None else ""
    if found.verdict == "refuted" and found.diagnosis and message:
        message = f"{found.diagnosis}; {message}"
    if not message and proof is None and found.verdict == "consistent":
        message = "nothing was run: the mapping fits names, shapes and structure"
    full = _full(found, target, into, kept) if into else found
    return Report.of(
        full, found.verdict or "ambiguous", proof=proof, message=message, dtype_of=lambda name: source[name].dtype
    )


def _refusal(report: Report, needed: Verdict) -> GraftError:
    hints = {
        Verdict.AMBIGUOUS: "Give a probe, or choose one of report.candidates and pass it as plan=.",
        Verdict.REFUTED: "See report.proof.divergence; allow_different=[MODULE] where that is meant; "
        "require='refuted' writes the values all the same.",
        Verdict.CONSISTENT: "Give a probe: only running can prove it.",
        Verdict.ADAPTED: "Rows of an approximate op cannot be proven; require='adapted' takes them.",
    }
    why = f": {report.message}" if report.message else ""
    return GraftError(
        f"{report.verdict}, and {needed} is required{why}", hint=hints.get(report.verdict, ""), report=report
    )


def _allowed(plan: Plan | None, given: Sequence[str]) -> tuple[str, ...]:
    """The modules that may depart: those given, and those that the plan was made with."""
    return tuple(dict.fromkeys((*given, *(plan.allow_different if plan is not None else ()))))


def _departing(module: nn.Module, allowed: Sequence[str], into: str) -> dict[str, str]:
    if not allowed:
        return {}
    from surgery.departure import matched

    return matched(module, allowed, into)


def _allowing(found: Plan, allowed: Sequence[str]) -> Plan:
    """The plan with what may depart, and its verdict bound to that."""
    if found.allow_different == tuple(allowed):
        return found
    changed = replace(found, allow_different=tuple(allowed), verdict=None, verdict_for=None)
    return changed if found.verdict in (None, "stale") else changed.with_verdict(found.verdict, proven=found.proven)


# -- names ------------------------------------------------------------------------------------------------------------
def _submodule(target: nn.Module, into: str) -> nn.Module:
    if isinstance(target, type):
        raise GraftError(
            f"the target is the class {target.__name__}, and not a module of it",
            hint=f"Pass an instance, as in {target.__name__}().",
        )
    try:
        return target.get_submodule(into)
    except AttributeError:
        import difflib

        known = [name for name, _ in target.named_modules() if name]
        close = difflib.get_close_matches(into, known, n=3) or known[:3]
        raise GraftError(
            f"the target has no submodule {into}", hint=f"Did you mean {' or '.join(close)}?" if close else ""
        ) from None


def _inside(kept: Iterable[str], into: str, target: nn.Module) -> frozenset[str]:
    """The names relative to the submodule, of those tensors to keep that lie in it."""
    from surgery.running import own_tensors

    names = frozenset(kept)
    unknown = names - own_tensors(target).keys()
    if unknown:
        raise GraftError(
            f"kept names {min(unknown)}, which the target does not have", hint="Name tensors of its state dict."
        )
    prefix = f"{into}." if into else ""
    return frozenset(n.removeprefix(prefix) for n in names if n.startswith(prefix))


def _with_kept(found: Plan, module: nn.Module, named: frozenset[str]) -> Plan:
    """New rows that hold an earlier graft's values, or values that the person named, are kept."""
    from surgery.apply import filled

    before = filled(module)
    rows = tuple(
        replace(row, status=Status.KEPT, note=KEPT if row.target in before else "kept, as asked for")
        if row.status is Status.NEW and (row.target in before or row.target in named)
        else row
        for row in found.rows
    )
    if rows == found.rows:
        return found
    changed = replace(found, rows=rows, verdict=None, verdict_for=None)
    candidates = tuple(_with_kept(c, module, named) for c in found.candidates)
    changed = replace(changed, candidates=candidates)
    return changed if found.verdict in (None, "stale") else changed.with_verdict(found.verdict, proven=found.proven)


def _relative(plan: Plan, module: nn.Module, into: str) -> Plan:
    """A plan as it speaks of the submodule: a report's plan, whose rows have full names, is cut to it."""
    if not into:
        return plan
    names, prefix = infos(module).keys(), f"{into}."
    if all(row.target in names for row in plan.rows) or not any(row.target.startswith(prefix) for row in plan.rows):
        return plan
    rows = []
    for row in plan.rows:
        if not row.target.startswith(prefix):
            continue
        tied = row.tied_to
        if tied is not None and not tied.startswith(prefix):
            raise PlanError(
                f"{row.target} is tied to {tied}, outside of {into}",
                hint="Apply the plan to the whole module, without into.",
            )
        rows.append(replace(row, target=row.target.removeprefix(prefix), tied_to=tied and tied.removeprefix(prefix)))
    description = type(module).__name__
    return replace(plan, rows=tuple(rows), target=Stamp.of(infos(module), description), verdict=None, verdict_for=None)


def _full(found: Plan, target: nn.Module, into: str, kept: frozenset[str]) -> Plan:
    """The plan as it speaks of the whole module: full names, and what lies outside is kept, constant or new."""
    from surgery.apply import filled
    from surgery.running import own_tensors

    prefix = f"{into}."
    moved = {
        prefix + r.target: replace(r, target=prefix + r.target, tied_to=prefix + r.tied_to if r.tied_to else None)
        for r in found.rows
    }
    before, own = filled(target) | kept, own_tensors(target)
    inner = {id(own[name]): name for name in reversed(moved) if name in own and moved[name].tied_to is None}
    rows: list[Row] = []
    for name, info in infos(target).items():
        if name in moved:
            rows.append(moved[name])
            continue
        shape, dtype, note = tuple(info.shape), info.dtype, f"outside of {into}"
        if id(own[name]) in inner:
            rows.append(Row(name, Status.TIED, None, shape, dtype, tied_to=inner[id(own[name])]))
            continue
        inner[id(own[name])] = name
        if name in before:
            rows.append(Row(name, Status.KEPT, None, shape, dtype, note=f"{note}, kept"))
        elif own[name].is_floating_point():
            rows.append(Row(name, Status.NEW, None, shape, dtype, note=note))
        else:
            rows.append(Row(name, Status.CONSTANT, None, shape, dtype, note=note))
    stamp = Stamp.of(infos(target), type(target).__name__)
    candidates = tuple(_full(c, target, into, kept) for c in found.candidates)
    whole = replace(
        found, rows=tuple(rows), target=stamp, candidates=candidates, verdict=None, verdict_for=None, proven=()
    )
    if found.verdict is None:
        return whole
    return whole.with_verdict(found.verdict, proven=found.proven)


def _parsed(passes: Sequence[str]) -> None:
    """SurgeryError where one is no pass."""
    if passes:
        from surgery.passes import parse

        for name in passes:
            parse(name)


def _verdict(require: str) -> Verdict:
    try:
        return Verdict(require)
    except ValueError:
        raise SurgeryError(
            f"require={require!r} is no verdict", hint=f"One of {', '.join(v.value for v in Verdict)}."
        ) from None


def _rules(plan: Plan | None, given: Iterable[object]) -> tuple[object, ...]:
    """The rules that hold: those given, behind those that the plan was made with."""
    own = plan.rules if plan is not None else ()
    return (*given, *(rule for rule in own if rule not in {str(each) for each in given}))
