"""`zoo verify`: the proof of a graft again, from the files that it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from zoo import account, passing
from zoo.cli import command
from zoo.cli_graft import Asked, Job, _page_for, _prepare, _running, _write_page
from zoo.errors import NO, ZooError
from zoo.out import Out, size

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
@click.option(
    "--on",
    "on",
    multiple=True,
    metavar="DEVICE/DTYPE",
    help="Run it so as well, as in cuda/bfloat16; repeatable. Else all that this machine has.",
)
@click.option(
    "--require",
    "required",
    multiple=True,
    metavar="DEVICE[/DTYPE]",
    help="The answer is no where this was not run and passed, as in cuda; repeatable.",
)
@click.option("--compile", "compiled", is_flag=True, help="Through torch.compile as well, both sides.")
@click.option(
    "--blockwise/--no-blockwise",
    "blockwise",
    default=None,
    help="Raise the weights of one operator at a time to float64. Else where both models do not fit in float64.",
)
@click.option(
    "--allow-different",
    "allowed",
    multiple=True,
    metavar="MODULE",
    help="Prove the rest around this module of yours (a glob), beside those that the plan allows; repeatable.",
)
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
    on: tuple[str, ...],
    required: tuple[str, ...],
    compiled: bool,
    blockwise: bool | None,
    allowed: tuple[str, ...],
    html: str | None,
) -> int:
    from zoo import written

    page = _page_for(html)
    passes = passing.wanted(on, required, compiled, machine=True)
    path = written.destination(weights, file)
    made = written.read(path)
    written.check_into(made, into)
    asked = Asked(
        ref, file, part, revision, sets, fit, 0, example, into, str(path), None, False, None, "consistent", False,
        blockwise=blockwise,
    )  # fmt: skip
    job = _prepare(out, asked, made.plan)
    wrong = written.differences(made, job.source, job.target.model)
    if job.source.probe is None:
        raise ZooError(f"{job.source.unrunnable()}: there is nothing to verify with", kind="plugin")
    with _running(job.target):
        proof, way = _verified(job, made.plan, passes, into, job.little or blockwise, allowed)
    proven = proof.verdict in ("proven", "adapted")
    unmet = list(passing.unmet(proof, required))
    verdict = proof.verdict
    if proven and (wrong or unmet):  # what was run is the plan: its verdict is no answer to what was asked
        verdict = "differs" if wrong else "unmet"
    others = [each for each in wrong if each.startswith(written.OTHER_WEIGHTS)]
    if others and proven:
        wrong.append("what passed are the values that the plan gives")
    message = "; ".join([*wrong, *([proof.message] if proof.message else []), *unmet])
    good = proven and not wrong and not unmet
    thing = {
        "verdict": verdict,
        "rows": [],
        "proof": proof.as_dict(),
        "required": list(required),
        "unmet": unmet,
        "wrote": [],
        "message": message,
    }

    def human() -> str:
        lines = [f"{job.source.ref} -> {job.target}, weights {path}", *account.said(proof)]
        last = f"{verdict}: {message}" if message else verdict
        width = account.terminal_width()
        return "\n".join([*account.wrapped(lines, width), "", *_ran(proof, width), *account.wrapped([last], width)])

    if page is not None:
        from surgery import Report
        from zoo.to_file import beside

        held = beside(job.source.checkpoint, made.plan)
        report = Report.of(made.plan, proof.verdict, proof=proof, dtype_of=lambda name: held[name].dtype)
        done = replace(job, way=way)
        _write_page(page, done, report, into, passes=passes, verdict=verdict, message=message)
    out.data(thing, human, lambda: verdict)
    if page is not None:
        out.note(f"the report is {page}")
    if others:
        fresh = path.with_name(f"{path.stem}-as-planned{path.suffix}")
        out.hint(f"zoo graft {ref} {file} --plan {made.path} -o {fresh} writes what the plan gives, beside yours")
    elif wrong:
        out.hint(f"zoo graft {ref} {file} -o {path} --plan {made.path} applies the plan as it is, and verifies it")
    return 0 if good else NO


def _ran(proof: Proof, width: int | None) -> Iterator[str]:
    """What each pass took, and the settings that it ran under."""
    rows = [("pass", "", "time", "peak memory", "ran with")]
    for each in proof.passes:
        known = each.details
        seconds, memory = known.get("seconds"), known.get("peak_bytes")
        rows.append(
            (
                each.name,
                each.status,
                f"{seconds:.2f} s" if seconds is not None else "",
                size(memory) if memory is not None else "",
                "; ".join(_settings(known)) if each.status != "not run" else each.why,
            )
        )
    yield from account.fitted(rows, width)


def _settings(known: Mapping[str, Any]) -> Iterator[str]:
    if "lifted" in known:
        yield "casts lifted" + (", block by block" if known.get("blockwise") else "")
        return
    sdpa = known["sdpa"]
    if sdpa["reference"] == sdpa["target"]:
        yield f"attention {' and '.join(sdpa['target']) or 'not by SDPA'}"
    else:
        both = (f"{' and '.join(sdpa[side]) or 'not by SDPA'} ({side})" for side in ("reference", "target"))
        yield f"attention {', '.join(both)}"
    yield f"TF32 {'on' if known['tf32'] else 'off'}"
    yield f"deterministic algorithms {'on' if known['deterministic'] else 'off'}"
    made = known["compile"]
    if made is not None:
        breaks = sum(made["graph_breaks"].values())
        yield f"torch.compile by {made['backend']}, {sum(made['graphs'].values())} graphs, {breaks} breaks"


def _verified(
    job: Job,
    plan: surgery.Plan,
    passes: tuple[str, ...],
    into: str,
    blockwise: bool | None,
    allowed: tuple[str, ...],
) -> tuple[Proof, Attempt]:
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
        run = partial(
            surgery.verify,
            held,
            job.target.model,
            plan,
            passes=passes,
            rules=way.rules,
            into=into,
            blockwise=blockwise,
            allow_different=allowed,
        )
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
