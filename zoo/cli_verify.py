"""`zoo verify`: the proof of a graft again, from the files that it wrote."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from zoo import account
from zoo.cli import command
from zoo.cli_graft import Asked, Job, _page_for, _prepare, _running, _write_page
from zoo.errors import NO, ZooError
from zoo.out import Out

if TYPE_CHECKING:
    import surgery
    from surgery.proof import Proof
    from zoo.attempts import Attempt


@command("verify", "Run the proof again, from the files that a graft wrote.")
@click.argument("ref")
@click.argument("file", metavar="FILE[:CLASS]")
@click.option("--part", help="The same as REF#PART.")
@click.option("--revision", help="The same as REF@REVISION.")
@click.option("--weights", metavar="OUT.safetensors", help="The weights, with their plan beside them; else FILE's.")
@click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="An argument of your class; repeatable.")
@click.option("--fit", is_flag=True, help="Take the arguments that the checkpoint's config.json has.")
@click.option("--example", metavar="FILE:FUNC", help="Where inputs for forward come from; else example() in FILE.")
@click.option("--into", default="", metavar="PATH", help="The submodule that was grafted into.")
@click.option("--on", "passes", multiple=True, metavar="DEVICE/DTYPE", help="As in cuda/bfloat16; repeatable.")
@click.option("--html", metavar="REPORT.html", help="Write what it says as a page too, whatever the answer is.")
def verify(
    out: Out,
    ref: str,
    file: str,
    part: str | None,
    revision: str | None,
    weights: str | None,
    sets: tuple[str, ...],
    fit: bool,
    example: str | None,
    into: str,
    passes: tuple[str, ...],
    html: str | None,
) -> int:
    from zoo import written

    page = _page_for(html)
    path = written.destination(weights, file)
    made = written.read(path)
    asked = Asked(
        ref, file, part, revision, sets, fit, 0, example, into, str(path), None, False, None, "consistent", False
    )
    job = _prepare(out, asked, made.plan)
    wrong = written.differences(made, job.source, job.target.model)
    if job.source.probe is None:
        raise ZooError(f"{job.source.unrunnable()}: there is nothing to verify with", kind="plugin")
    with _running(job.target):
        proof, way = _verified(job, made.plan, passes or ("cpu/float64",), into)
    good = not wrong and proof.verdict in ("proven", "adapted")
    verdict = proof.verdict if good or proof.verdict not in ("proven", "adapted") else "differs"
    message = "; ".join([*wrong, *([proof.message] if proof.message else [])])
    thing = {"verdict": verdict, "rows": [], "proof": proof.as_dict(), "wrote": [], "message": message}

    def human() -> str:
        lines = [f"{job.source.ref} -> {job.target}, weights {path}", *account.said(proof)]
        lines.append(f"{verdict}: {message}" if message else verdict)
        return "\n".join(account.wrapped(lines, account.terminal_width()))

    if page is not None:
        from surgery import Report

        report = Report.of(
            made.plan, proof.verdict, proof=proof, dtype_of=lambda name: job.source.checkpoint[name].dtype
        )
        done = replace(job, way=way)
        _write_page(page, done, report, into, passes=passes, verdict=verdict, message=message)
    out.data(thing, human, lambda: verdict)
    if page is not None:
        out.note(f"the report is {page}")
    if wrong:
        out.hint(f"zoo graft {ref} {file} -o {path} --plan {made.path} applies the plan as it is, and verifies it")
    return 0 if good else NO


def _verified(job: Job, plan: surgery.Plan, passes: tuple[str, ...], into: str) -> tuple[Proof, Attempt]:
    """The proof of a plan, by the way it was made; and that way."""
    import surgery
    from zoo.grafting import outputs_left, with_outputs

    last: surgery.PlanError | None = None
    first: tuple[Proof, Attempt] | None = None
    for way in job.ways():
        assert way.probe is not None
        if way.narrowed and way.narrowed not in plan.notes:
            continue  # the plan was proven for more than that
        held = job.source.checkpoint
        run = partial(surgery.verify, held, job.target.model, plan, passes=passes, rules=way.rules, into=into)
        try:
            proof = run(probe=way.probe)
        except surgery.PlanError as error:  # it was made in other sizes
            last = error
            continue
        kept, _ = outputs_left(way.change.source.checkpoint if way.change else held, way.probe, plan, proof)
        proof = run(probe=with_outputs(way.probe, kept)) if kept else proof
        if proof.verdict in ("proven", "adapted"):
            return proof, way
        first = first or (proof, way)
    if first is not None:
        return first
    assert last is not None  # there always is a way
    raise last
