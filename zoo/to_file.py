"""`zoo graft --to-file`: a plan run from file to file. With a plan at hand no Python file is needed, nor a model.

What is written is what the same command writes without the flag, byte for byte; but no model is filled, and of the
tensors no more than one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.errors import NO, ZooError

if TYPE_CHECKING:
    import surgery
    from zoo.cli_graft import Asked
    from zoo.out import Out
    from zoo.resolving import Source

TYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Filing:
    """The options of going from file to file."""

    to_file: bool = False
    invert: str | None = None
    dtype: str | None = None
    shard_size: str | None = None

    def check(self, asked: Asked, output: str | None) -> None:
        """What can be wrong with the options together."""
        needless = {"--invert": self.invert, "--dtype": self.dtype, "--shard-size": self.shard_size}
        for option, value in needless.items():
            if value is not None and not self.to_file:
                raise click.UsageError(f"{option} goes with --to-file")
        converts = self.to_file and asked.plan is not None
        if not asked.file and not converts:
            raise click.UsageError(
                "Missing argument 'FILE[:CLASS]': it may be left out with --plan and --to-file only."
            )
        if not asked.file and output is None:
            raise click.UsageError("without FILE, -o says where to")
        if self.invert is not None and not converts:
            raise click.UsageError("--invert needs the --plan to invert")
        if self.invert is not None and self.dtype is not None:
            raise click.UsageError("--invert gives the tensors back in their own types, so --dtype does not go with it")
        if converts:
            given: dict[str, object] = {
                "--rules": asked.rules,
                "--layers": asked.layers,
                "--tokenizer": asked.tokenizer,
                "--donor": asked.donor,
                "--accept": asked.accept,
                "--shrink": asked.shrink or None,
                "--allow-different": asked.allowed or None,
            }
            for option, each in given.items():
                if each is not None:
                    raise click.UsageError(f"{option} says how to find a plan, and --plan gives one")


def convert(out: Out, asked: Asked, filing: Filing, weights: Path, *, force: bool) -> int:
    """The plan that was given, from file to file. Nothing is searched and nothing is run."""
    import surgery
    from zoo import api, resolving, written
    from zoo.cli import host_for
    from zoo.cli_graft import _given

    assert asked.plan is not None  # Filing.check
    given = _given(asked.plan)
    host = host_for(out)
    hub = api.make_hub(host, quiet=not out.progress)
    source = resolving.resolve(asked.ref, part=asked.part, revision=asked.revision, of=host, hub=hub)
    for passed in source.located.passed_over:
        out.note(f"passed over {passed}")
    like = None
    if filing.invert is not None:
        like = resolving.resolve(filing.invert, of=host, hub=hub).checkpoint
        given = _inverse(given, like)
    read = beside(source.checkpoint, given)
    edited = given.verdict == "stale"
    given = _ruled(given, source, read)
    made = {row.target: written.info(row) for row in given.rows}
    given.check(read, made)
    said = given.verdict_on(read, {name: made[name] for name in made})
    base = _base(asked, given)
    if said in ("ambiguous", "refuted") and not force:
        thing = {**_thing(source, None, [], f"the plan is {said}"), "verdict": said}
        out.data(thing, lambda: f"{said}: the plan says so", lambda: str(said))
        out.hint("nothing was written; --force writes it all the same")
        return NO
    verdict = str(said) if said in ("proven", "adapted", "ambiguous", "refuted") else "consistent"
    past = f"it was {said} when it was made" if said in ("proven", "adapted", "consistent") else "it fits the source"
    if edited or said == "stale":
        given = given.with_verdict("consistent")
        past = "it was edited, or is of another source, since it was made, and fits this one"
    source.hashing()
    plan = typed(source.stamped(given), filing.dtype, read)
    if plan.rows != given.rows:
        verdict = "consistent"
    wrote = written.write_to_file(
        read, plan, weights, verdict=verdict, base=base, like=like, shard_size=filing.shard_size
    )
    message = f"the plan was given: {past}; nothing was run"
    report = surgery.Report.of(plan, verdict, message=message, dtype_of=lambda name: read[name].dtype)
    _tell(out, asked, source, report, wrote)
    return 0


def _inverse(plan: surgery.Plan, like: surgery.Checkpoint) -> surgery.Plan:
    return plan.inverted(beside(like, plan), rounding=any(rule.startswith("merge_lora(") for rule in plan.rules))


def _ruled(plan: surgery.Plan, source: Source, read: surgery.Checkpoint) -> surgery.Plan:
    """An edited plan, by its rules as they stand now: what they drop or leave new is. PlanError where its rows are not
    those of its rules; what a change of the body makes of them is seen by running only, and is not looked at."""
    from surgery.derivation import brought_back, derivation, set_aside
    from surgery.derived import decomposed, derive
    from surgery.rules import Reshape, checked
    from zoo.donors import placed

    if plan.verdict != "stale" or not plan.rules:
        return plan
    rules = placed(checked(plan.rules), source)
    rows = derivation(read, rules).rows
    whole = brought_back(plan)
    if not any(isinstance(rule, Reshape) for rule in rules):
        decomposed(whole, read, derive(read, rows), rows)
    return set_aside(whole, rules, read, [row.target for row in plan.rows])


def beside(source: surgery.Checkpoint, plan: surgery.Plan) -> surgery.Checkpoint:
    """The source with the adapters that the plan merges beside it, and with the donor of its vocabulary."""
    from surgery.beside import joined
    from surgery.rules import checked
    from zoo.donors import placed

    return joined(source, placed(checked(plan.rules))) if plan.rules else source


def typed(plan: surgery.Plan, dtype: str | None, source: Mapping[str, surgery.TensorInfo]) -> surgery.Plan:
    """The plan with what it makes cast, where that was asked for."""
    return plan if dtype is None else plan.stored_as(dtype, source)


def _base(asked: Asked, plan: surgery.Plan) -> Any:
    """The values that the plan does not make: of the person's module, or of a file of theirs; None where it makes all.
    Only where there are such is the module built."""
    own = [row for row in plan.rows if row.expr is None and row.tied_to is None]
    if not own:
        return None
    if asked.file:
        from zoo import target, written

        made = target.load(asked.file, sets=asked.sets, seed=asked.seed)
        if asked.init is not None:
            written.start_from(made.model, asked.init)
        return made.model.state_dict()
    if asked.init is not None:
        import surgery

        return surgery.open(asked.init)
    shown = ", ".join(f"{row.target} ({row.status})" for row in own[:3])
    more = f" and {len(own) - 3} more" if len(own) > 3 else ""
    raise ZooError(
        f"{len(own)} tensors do not come from {asked.ref}: {shown}{more}",
        hint="name the FILE of the module that has them, or a file of its weights with --init",
    )


def _thing(source: Source, report: surgery.Report | None, wrote: list[Path], message: str) -> dict[str, Any]:
    found = {"verdict": None, "rows": [], "proof": None, "message": message} if report is None else report.as_dict()
    return {**found, "ref": source.ref, "source": source.located.where, "wrote": [str(path) for path in wrote]}


def _tell(out: Out, asked: Asked, source: Source, report: surgery.Report, wrote: list[Path]) -> None:
    from zoo import account

    def human() -> str:
        lines = [out.style(f"{source.ref} -> {wrote[0]}", "bold"), f"from {source.located.where}", ""]
        if asked.why:
            lines.append(account.render(report, why=True))
        lines += [out.style(str(report.verdict), "green"), *account.reasons(report), account.counts(report)]
        lines += [f"{'wrote' if i == 0 else '     '} {path}" for i, path in enumerate(wrote)]
        return "\n".join(lines)

    out.data(_thing(source, report, wrote, report.message), human, lambda: str(wrote[0]))


def written_by(
    asked: Asked, filing: Filing, source: Source, report: surgery.Report, model: Any, weights: Path
) -> tuple[surgery.Report, list[Path]]:
    """A plan that was found and proven, from file to file; the report with what was written."""
    from zoo import written

    read = beside(source.checkpoint, report.plan)
    plan = typed(report.plan, filing.dtype, read)
    verdict = str(report.verdict) if plan.rows == report.plan.rows else "consistent"
    wrote = written.write_to_file(
        read, plan, weights, verdict=verdict, base=model.state_dict(), like=None, shard_size=filing.shard_size
    )
    if plan.rows == report.plan.rows:
        return replace(report, plan=plan), wrote
    import surgery

    said = f"cast where it was written; before that it was {report.verdict}"
    return surgery.Report.of(
        plan, verdict, proof=report.proof, message=said, dtype_of=lambda name: read[name].dtype
    ), wrote
