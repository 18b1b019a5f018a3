"""The glue between names and surgery: a source, a way to run it, and a graft that answers for what the target has.

Both `zoo.graft` and the command line go through here; neither knows how a reference is made or fed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo.attempts import Attempt, attempts
from zoo.errors import ZooError
from zoo.resolving import Source, resolve

if TYPE_CHECKING:
    from torch import nn

    import surgery
    from surgery.proof import Proof

_NEAR = 1e-3  # relative: a difference that has a cause of its own, and is no other value


def operate(
    source: Source,
    model: nn.Module,
    attempt: Attempt,
    *,
    plan: surgery.Plan | None = None,
    into: str = "",
    require: str = "consistent",
    fill: bool = True,
    allow_different: Sequence[str] = (),
    passes: Sequence[str] = (),
    blockwise: bool | None = None,
) -> surgery.Report:
    """surgery.graft, for a reference that may answer for more than the target has.

    A whole model gives a pooled vector as well; a target without a pooler is proven on the rest. An output is let go
    only where all that it alone depends on was dropped. Without `fill` the model stays as it was.
    """
    import surgery

    source.hashing()
    try:
        report = surgery.graft(
            source.checkpoint,
            model,
            probe=attempt.probe,
            plan=plan,
            rules=attempt.rules,
            into=into,
            require=require,
            fill=fill,
            allow_different=allow_different,
            passes=passes,
            blockwise=blockwise,
        )
    except surgery.GraftError as error:
        report = _on_the_rest(source, model, attempt, error, into, require, fill, passes, blockwise)
    report = _costed(source, attempt, report)
    if attempt.narrowed:
        report = replace(report, plan=replace(report.plan, notes=(*report.plan.notes, attempt.narrowed)))
    return replace(report, plan=source.stamped(report.plan))


def _costed(source: Source, attempt: Attempt, report: surgery.Report) -> surgery.Report:
    """The report with what another size costs, where it was given one."""
    if attempt.change is None or report.verdict.rank < 2:
        return report
    from zoo.adapting import noted

    before = source.reference() if attempt.runnable is not None else None
    drift = attempt.change.drift(before, attempt.runnable) if before is not None and attempt.runnable else {}
    return noted(report, attempt.change, drift)


def _on_the_rest(
    source: Source,
    model: nn.Module,
    attempt: Attempt,
    error: surgery.GraftError,
    into: str,
    require: str,
    fill: bool,
    passes: Sequence[str],
    blockwise: bool | None,
) -> surgery.Report:
    """The graft again by the plan that was found, proven on the outputs that the target has; or the error."""
    import surgery

    report, probe = error.report, attempt.probe
    if report is None or probe is None or report.proof is None:
        raise error
    held = attempt.change.source if attempt.change is not None else source
    kept, gone = outputs_left(held.checkpoint, probe, report.plan, report.proof)
    if not kept:
        raise error
    less, found = with_outputs(probe, kept), replace(report.plan, diagnosis="")
    again = surgery.graft(
        source.checkpoint,
        model,
        probe=less,
        plan=found,
        rules=attempt.rules,
        into=into,
        require=require,
        fill=fill,
        passes=passes,
        blockwise=blockwise,
    )
    note = f"{', '.join(gone)}: not computed by the target; nothing that only this depends on was grafted"
    return replace(again, plan=replace(again.plan, notes=(*again.plan.notes, note)))


def with_outputs(probe: surgery.Probe, kept: tuple[str, ...]) -> surgery.Probe:
    """The same probe, answering for fewer outputs."""
    run, at = probe.run_reference, [probe.outputs.index(name) for name in kept]
    return replace(probe, run_reference=lambda module, x: tuple(run(module, x)[i] for i in at), outputs=kept)


def outputs_left(
    checkpoint: surgery.Checkpoint, probe: surgery.Probe, plan: surgery.Plan, proof: Proof
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(outputs that were proven, outputs that the target does not have); both empty where it is not so simple."""
    ran = proof.passes[0]
    kept = tuple(name for name, residual in ran.residuals.items() if residual <= ran.gate)
    gone = tuple(name for name in ran.residuals if name not in kept)
    if not kept or not gone or set(ran.residuals) != set(probe.outputs):
        return (), ()
    depends = _dependences(checkpoint, probe)
    alone = set().union(*(depends[name] for name in gone)) - set().union(*(depends[name] for name in kept))
    dropped = {drop.source for drop in plan.dropped}
    return (kept, gone) if alone and alone <= dropped else ((), ())


def _dependences(checkpoint: surgery.Checkpoint, probe: surgery.Probe) -> dict[str, set[str]]:
    """For each output of the reference, the tensors of the checkpoint that it depends on: those with a gradient."""
    import torch

    from surgery.expr import names
    from surgery.link import link

    linked = link(probe.reference, checkpoint)
    live = {name: value for name, value in probe.reference.named_parameters() if name in linked}
    wanted = {name: value.requires_grad for name, value in live.items()}
    found: dict[str, set[str]] = {}
    try:
        for value in live.values():
            value.requires_grad_(True)
        with torch.enable_grad():
            outputs = probe.run_reference(probe.reference, probe.search_input())
            for name, output in zip(probe.outputs, outputs, strict=True):
                grads = torch.autograd.grad(
                    output.double().square().sum(), list(live.values()), allow_unused=True, retain_graph=True
                )
                reached = [key for key, grad in zip(live, grads, strict=True) if grad is not None]
                found[name] = {source for key in reached for source in names(linked[key])}
    finally:
        for name, value in live.items():
            value.requires_grad_(wanted[name])
    return found


def graft(
    ref: str,
    target: nn.Module,
    *,
    part: str | None = None,
    example: Any = None,
    probe: surgery.Probe | None = None,
    plan: surgery.Plan | None = None,
    rules: Any = (),
    tokenizer: Any = None,
    donor: str | None = None,
    into: str = "",
    require: str = "consistent",
    allow_different: Sequence[str] = (),
    passes: Sequence[str] = (),
    blockwise: bool | None = None,
) -> surgery.Report:
    """Fill `target` with the weights behind `ref`, and prove it. The model changes only if the verdict is good enough.

    `example` is what the target's forward takes (a tensor, a tuple or a dict by name), where its parameters' names do
    not say; `probe` replaces the entry's own reference; `into` grafts into a submodule. `rules` say what is wanted
    otherwise than the source has it (surgery.rules). `tokenizer` is the target's own (an object of tokenizers or
    transformers, or a path): then rows of the vocabulary are found by token, and not by number. `donor` is a reference
    to another model: tokens that the source does not know, and the donor does, get rows by orthogonal matching pursuit;
    the tokenizer is then a path, or left out where it is the donor's own. `allow_different` names modules of the target
    (by path; globs) that compute something else on purpose: the rest is proven around them. `passes`
    ("cuda/bfloat16"): how both sides are run as well, beside float64.
    `blockwise`: in little memory; None where both models in float64 would not fit into the memory that is free.
    """
    import surgery
    from zoo.target import checked_example

    if isinstance(target, type):
        raise ZooError(
            f"the target is the class {target.__name__}, and not a module of it",
            hint=f"pass an instance, as in {target.__name__}()",
        )
    source = resolve(ref, part=part)

    def run(way: Attempt) -> surgery.Report:
        return operate(
            source,
            target,
            way,
            plan=plan,
            into=into,
            require=require,
            allow_different=allow_different,
            blockwise=blockwise,
            passes=passes,
        )

    if probe is not None:
        from zoo.donors import placed

        return run(Attempt(probe, rules=placed(surgery.rules.checked(rules), source, target)))
    given = None if example is None else checked_example(example, "example")
    ways = attempts(
        source,
        target,
        example=given,
        into=into,
        where=type(target).__name__,
        rules=rules,
        plan=plan,
        tokenizer=tokenizer,
        donor=donor,
    )
    errors: list[surgery.GraftError] = []

    def tried(way: Attempt) -> surgery.Report:
        try:
            return run(way)
        except surgery.GraftError as error:
            if error.report is None:
                raise
            errors.append(error)
            return error.report

    report, _ = best_of(ways, tried, surgery.Verdict(require))
    for error in errors:
        if error.report is report:
            raise error
    return report


def _nearly(report: surgery.Report) -> bool:
    """Whether all outputs occur in the target but for a small difference, such as another epsilon makes."""
    if report.proof is None or not report.proof.passes:
        return False
    residuals = report.proof.passes[0].residuals
    return bool(residuals) and all(residual < _NEAR for residual in residuals.values())


def best_of(
    ways: Iterator[Attempt], run: Callable[[Attempt], surgery.Report], needed: surgery.Verdict
) -> tuple[surgery.Report, Attempt]:
    """The first report that is good enough, with the way it was reached; else the best one. `run` gives the report also
    where the answer is no, and raises what is wrong with the input."""
    import surgery

    best: tuple[surgery.Report, Attempt] | None = None
    last: Exception | None = None
    try:
        for way in ways:
            if way.narrowed and best is not None and _nearly(best[0]):
                break  # it shows all, and that is not right: a piece of it would be no answer
            try:
                report = run(way)
            except surgery.PlanError as error:  # a plan that was made in other sizes
                last = error
                continue
            except surgery.GraftError:
                if best is None:
                    raise
                continue
            if report.verdict.rank >= needed.rank:
                return report, way
            if best is None or (report.verdict.rank, _nearly(report)) > (best[0].verdict.rank, _nearly(best[0])):
                best = report, way
    except ZooError:  # the last way, that of the source's own sizes, cannot be run: what a size gave says more
        if best is None:
            raise
    if best is None:
        assert last is not None  # there always is a way
        raise last
    return best
