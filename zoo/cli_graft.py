"""`zoo plan` and `zoo graft`: weights into a person's own module, and the proof of it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo import account, passing
from zoo.cli import command, host_for
from zoo.errors import NO, ZooError
from zoo.out import Out

if TYPE_CHECKING:
    from torch import nn

    import surgery
    from surgery.residuals import Depth
    from zoo.attempts import Attempt
    from zoo.resolving import Source
    from zoo.target import Target

_REQUIRE = ("proven", "adapted", "consistent")
_FILING = ("to_file", "invert", "dtype", "shard_size")  # the fields of zoo.to_file.Filing


@dataclass(frozen=True)
class Asked:
    """The options that say what is grafted into what."""

    ref: str
    file: str
    part: str | None
    revision: str | None
    sets: tuple[str, ...]
    fit: bool
    seed: int
    example: str | None
    into: str
    init: str | None
    plan: str | None
    static: bool
    accept: int | None
    require: str
    why: bool
    rules: str | None = None
    layers: str | None = None
    tokenizer: str | None = None
    donor: str | None = None
    shrink: bool = False
    allowed: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()  # to be run beside float64
    devices: tuple[str, ...] = ()  # "cuda", "cuda/bfloat16": where a pass must have passed
    blockwise: bool | None = None


def _asks(function: Callable[..., Any], *, required: bool = True, passes: bool = False) -> Callable[..., Any]:
    """The arguments and options of plan and graft, gathered in one `Asked`. `passes`: with those that say how both
    sides are run as well."""

    @click.argument("ref")
    @click.argument("file", metavar="FILE[:CLASS]" if required else "[FILE[:CLASS]]", required=required, default="")
    @click.option("--part", help="The same as REF#PART.")
    @click.option("--revision", help="The same as REF@REVISION.")
    @click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="An argument of your class; repeatable.")
    @click.option("--fit", is_flag=True, help="Take the arguments that the checkpoint's config.json has.")
    @click.option("--seed", default=0, show_default=True, help="Of the random weights that stay: those of new tensors.")
    @click.option("--example", metavar="FILE:FUNC", help="Where inputs for forward come from; else example() in FILE.")
    @click.option("--into", default="", metavar="PATH", help="Graft into this submodule, as in encoder.text.")
    @click.option("--init", metavar="OWN.safetensors", help="Start from your own weights; what stays is kept, not new.")
    @click.option("--plan", metavar="PLAN.graft.toml", help="Apply this plan, edited or not; nothing is searched.")
    @click.option("--rules", metavar="FILE", help="What you want otherwise, a rule a line: see zoo graft in the docs.")
    @click.option("--layers", metavar="0,2,4", help="Keep these blocks of the source and leave the others out.")
    @click.option("--shrink", is_flag=True, help="Make the source as narrow as your module, by evenly chosen units.")
    @click.option("--tokenizer", metavar="PATH", help="Your own (tokenizer.json, vocab.txt): rows are found by token.")
    @click.option("--donor", metavar="REF", help="A model that knows tokens which the source does not: rows by OMP.")
    @click.option("--static", is_flag=True, help="Run nothing: names, shapes and structure only. Proves nothing.")
    @click.option("--accept", type=click.IntRange(1), metavar="N", help="Where it is ambiguous, take candidate N.")
    @click.option(
        "--allow-different",
        "allowed",
        multiple=True,
        metavar="MODULE",
        help="This module of yours (a glob) departs on purpose: prove the rest around it; repeatable.",
    )
    @click.option("--why", is_flag=True, help="Show every row, with its evidence.")
    @click.option(
        "--blockwise/--no-blockwise",
        "blockwise",
        default=None,
        help="In little memory. Else where both models do not fit in float64.",
    )
    @wraps(function)
    def wrapped(out: Out, **options: Any) -> Any:
        wants = options.pop("require", None) or ()
        options |= _required(wants) if passes else {"require": wants or "consistent"}
        if passes:
            options["passes"] = passing.wanted(
                options.pop("on"), options["devices"], options.pop("compiled"), machine=False
            )
        own = {name: options.pop(name) for name in ("output", "force", "html", *_FILING) if name in options}
        return function(out, Asked(**options), **own)

    return _with_passes(wrapped) if passes else _LEAST(wrapped)


_LEAST = click.option("--require", type=click.Choice(_REQUIRE), help="The least verdict to accept; else consistent.")


def _with_passes(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--compile", "compiled", is_flag=True, help="Through torch.compile as well, both sides."),
        click.option(
            "--require",
            multiple=True,
            metavar="VERDICT|DEVICE[/DTYPE]",
            help=f"The least verdict to accept ({', '.join(_REQUIRE)}); or: the answer is no where this was not run "
            "and passed, as in cuda; repeatable.",
        ),
        click.option(
            "--on", multiple=True, metavar="DEVICE/DTYPE", help="Run it so as well, as in cuda/bfloat16; repeatable."
        ),
    ):
        function = option(function)
    return function


def _required(wants: tuple[str, ...]) -> dict[str, Any]:
    """What --require says: the least verdict, and the devices and types that a pass must have passed on."""
    verdicts = [each for each in wants if each in _REQUIRE]
    if len(set(verdicts)) > 1:
        raise click.UsageError(f"--require names {' and '.join(dict.fromkeys(verdicts))}, and one verdict is the least")
    devices = tuple(each for each in wants if each not in _REQUIRE)
    return {"require": verdicts[0] if verdicts else "consistent", "devices": devices}


@command("plan", "Show where each tensor of your module would come from, and prove it. Writes nothing.")
@_asks
def plan(out: Out, asked: Asked) -> int:
    job = _prepare(out, asked, parking=Path(tempfile.gettempdir()))
    _wait(out, job)
    report, job = _operate(job, asked, force=False)
    _tell(out, job, asked, report, [])
    good = _accepted(report, job, asked, force=False)
    if good:
        out.hint(f"zoo graft {asked.ref} {asked.file} writes the weights")
    else:
        _remedies(out, job, asked, report)
    return 0 if good else NO


@command("graft", "Fill your module with pretrained weights, prove it, and write them beside it.")
@partial(_asks, required=False, passes=True)
@click.option("-o", "--output", metavar="OUT.safetensors", help="Where to; the plan is written beside it.")
@click.option("--force", is_flag=True, help="Write although the answer is no.")
@click.option("--html", metavar="REPORT.html", help="Write the report as a page too, whatever the answer is.")
@click.option("--to-file", is_flag=True, help="From file to file, filling no model; with --plan FILE may be left out.")
@click.option("--invert", metavar="LIKE", help="The way back: REF is what --plan wrote, LIKE has what it read.")
@click.option("--dtype", type=click.Choice(("BF16", "F16", "F32", "F64"), case_sensitive=False), help="Cast to it.")
@click.option("--shard-size", metavar="2GB", help="Split what is written, and write an index.")
def graft(out: Out, asked: Asked, output: str | None, force: bool, html: str | None, **filing: Any) -> int:
    from zoo import to_file, written

    files = to_file.Filing(**filing)
    files.check(asked, output)
    if asked.static and asked.passes:
        raise click.UsageError(f"{asked.passes[0]} was asked for, and --static runs nothing")
    weights = written.destination(output, asked.file)
    written.check_free(weights, asked.plan, shards=files.shard_size is not None)
    if files.to_file and asked.plan is not None:
        if html is not None:
            raise ZooError("--html shows a proof, and --to-file with --plan runs nothing", hint="leave out one of them")
        if asked.passes:
            raise ZooError(
                f"{asked.passes[0]} was asked for, and --to-file with --plan runs nothing", hint="leave out one of them"
            )
        return to_file.convert(out, asked, files, weights, force=force)
    page = _page_for(html)
    job = _prepare(out, asked, parking=weights.parent)
    # From file to file the same is written, and nothing is held.
    to_be_filed = files.to_file or job.little
    job = replace(job, fill=not to_be_filed)
    _wait(out, job)
    report, job = _operate(job, asked, force=force)
    good = _accepted(report, job, asked, force=force)
    wrote: list[Path] = []
    if good and to_be_filed:
        report, wrote = to_file.written_by(asked, files, job.source, report, job.target.model, weights)
    elif good:
        wrote = written.write(job.target.model, report.plan, weights, verdict=str(report.verdict))
    if page is not None:
        _write_page(page, job, report, asked.into, wrote=wrote, passes=asked.passes)
    _tell(out, job, asked, report, wrote)
    if page is not None:
        out.note(f"the report is {page}")
    if good and wrote[0] == weights:
        name = weights.name if weights.parent == Path() else weights
        out.hint(f'model.load_state_dict(safetensors.torch.load_file("{name}"))')
    elif not good:
        _remedies(out, job, asked, report)
    return 0 if good else NO


# ---------------------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Job:
    """Both sides, and how they are run."""

    source: Source
    target: Target
    ways: Callable[[], Iterator[Attempt]]  # to run both; they are tried in turn
    notes: tuple[str, ...] = ()
    plan: surgery.Plan | None = None  # the one to apply, where one was given
    way: Attempt | None = None  # the one that it went, once it is done
    chosen: str = ""  # that of several candidates the one was applied that --accept names
    fill: bool = True  # in memory; else what is written goes from file to file
    little: bool = False  # memory: what is there of the target is in a file


def _prepare(out: Out, asked: Asked, given: surgery.Plan | None = None, *, parking: Path | None = None) -> Job:
    """Everything that can be wrong with what was asked is found here, the person's own file first. `parking`: where the
    values of a module that is too large for memory may lie meanwhile."""
    from zoo import api, attempts, resolving, target

    target.split(asked.file)
    given = _given(asked.plan) if asked.plan is not None else given
    host = host_for(out)
    host.pick(asked.ref)
    made = None if asked.fit else target.load(asked.file, sets=asked.sets, seed=asked.seed)
    hub = api.make_hub(host, quiet=not out.progress)
    source = resolving.resolve(asked.ref, part=asked.part, revision=asked.revision, of=host, hub=hub)
    for passed in source.located.passed_over:
        out.note(f"passed over {passed}")
    if made is None:
        made = target.load(asked.file, sets=asked.sets, config=source.config, seed=asked.seed)
    for note in made.notes:
        out.note(note)
    little = not asked.static and _little(made.model, asked.blockwise)
    held: surgery.Checkpoint | None = None
    if asked.init is not None:
        from zoo import written

        held = written.start_from(made.model, asked.init, mapped=little)
    if little and held is None and parking is not None:
        held = _parked(out, made.model, parking)
    if asked.into:
        attempts.submodule(made.model, asked.into)
    run = not asked.static and source.probe is not None
    ways = partial(
        attempts.attempts,
        source,
        made.model,
        example=target.example_of(made, asked.example) if run else None,
        into=asked.into,
        where=f"{made.file}: {made.name}",
        static=asked.static,
        arguments=made.arguments,
        rules=_rules(asked),
        plan=given,
        tokenizer=asked.tokenizer,
        donor=asked.donor,
        shrink=asked.shrink,
    )
    notes: tuple[str, ...] = ()
    if asked.static:
        notes = ("nothing was run, as --static asks",)
    elif not run:
        notes = (f"{source.unrunnable()}; nothing was run",)

    def tried() -> Iterator[Attempt]:
        from surgery import machine, parked

        with _offers_static(), machine.giving_back(little):
            for way in ways():
                if little and held is not None:
                    parked.hold(made.model, held)  # it was run, to see which inputs it takes
                yield way

    return Job(source, made, tried, notes, given, little=little)


def _little(model: nn.Module, asked: bool | None) -> bool:
    """Would the module and a reference of its size in float64 be more than there is room for?"""
    from surgery import machine

    return not machine.fits(model, model) if asked is None else asked


def _parked(out: Out, model: nn.Module, folder: Path) -> surgery.Checkpoint | None:
    from surgery import parked

    try:
        return parked.park(model, folder)
    except OSError as error:
        out.note(f"your module stays in memory, beside the source: {folder} takes no file of its size ({error})")
        return None


def _wait(out: Out, job: Job) -> None:
    """On a terminal, what takes its time: of a large model, minutes."""
    if out.progress:
        out.note("proving the plan ..." if job.plan is not None else "looking for the mapping, and proving it ...")


def _rules(asked: Asked) -> tuple[object, ...]:
    from surgery import rules

    found: list[object] = list(rules.read(asked.rules)) if asked.rules is not None else []
    if asked.layers is not None:
        stack, colon, numbers = asked.layers.rpartition(":")
        try:
            keep = [int(number) for number in numbers.split(",")]
        except ValueError:
            raise ZooError(
                f"--layers takes numbers with commas between them, and got {asked.layers!r}",
                hint="as in --layers 0,2,4; where there are several stacks, --layers encoder.layer:0,2,4",
            ) from None
        found.append(rules.select_layers(keep, stack=stack if colon else ""))
    return tuple(found)


def _given(path: str) -> surgery.Plan:
    import surgery

    if not Path(path).is_file():
        raise ZooError(
            f"there is no plan {path}", kind="file", hint="zoo graft writes one beside the weights: NAME.graft.toml"
        )
    return surgery.Plan.load(path)


@contextlib.contextmanager
def _offers_static() -> Iterator[None]:
    try:
        yield
    except ZooError as error:
        if error.kind == "extra":
            error.hint += "; or --static, which runs nothing and proves nothing"
        raise


def _operate(job: Job, asked: Asked, *, force: bool) -> tuple[surgery.Report, Job]:
    """The graft, in memory, and the job with what is to be said of the way it went. An answer that is no comes back as
    its report; anything else that is wrong is raised."""
    import surgery
    from zoo.grafting import best_of

    needed = surgery.Verdict(asked.require)
    chosen = ""
    with _running(job.target):
        report, way = best_of(job.ways(), lambda way: _graft(job, asked, way, job.plan, asked.require), needed)
        if asked.accept is not None and report.candidates:
            if asked.accept > len(report.candidates):
                raise ZooError(
                    f"there are {len(report.candidates)} candidates, and --accept asks for number {asked.accept}"
                )
            candidate = report.candidates[asked.accept - 1]
            chosen = f"--accept {asked.accept} chose among {len(report.candidates)} mappings that fit"
            candidate = replace(candidate, notes=(*candidate.notes, chosen))  # kept in the plan's file
            report = _graft(job, asked, way, candidate, "refuted" if force else "ambiguous")
        elif force and report.verdict.rank < needed.rank:
            report = _graft(job, asked, way, job.plan, "refuted")
    return report, replace(job, notes=(*job.notes, *way.notes), way=way, chosen=chosen)


def _graft(job: Job, asked: Asked, way: Attempt, given: surgery.Plan | None, least: str) -> surgery.Report:
    import surgery
    from zoo.grafting import operate

    try:
        return operate(
            job.source,
            job.target.model,
            way,
            plan=given,
            into=asked.into,
            require=least,
            fill=job.fill,
            allow_different=asked.allowed,
            passes=asked.passes if way.probe is not None else (),
            blockwise=job.little or asked.blockwise,
        )
    except surgery.GraftError as error:
        if error.report is None:
            raise
        return replace(error.report, plan=job.source.stamped(error.report.plan))


@contextlib.contextmanager
def _running(target: Target) -> Iterator[None]:
    """While a person's forward runs: what it prints goes to stderr, what it raises is said with its line."""
    import traceback

    from surgery import SurgeryError
    from zoo.target import FAULTS, theirs

    home = str(target.file.resolve().parent)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # torch says this whenever oneDNN is switched off and on again, on machines without the GPU it speaks of.
            warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
            yield
    except (SurgeryError, ZooError):
        raise
    except FAULTS as error:
        if any(frame.filename.startswith(home) for frame in traceback.extract_tb(error.__traceback__)):
            raise theirs("forward raised", target.file, error) from error
        raise


# ---------------------------------------------------------------------------------------------------- the answer


def _rank(verdict: str) -> int:
    from surgery import Verdict

    return Verdict(verdict).rank


def _accepted(report: surgery.Report, job: Job, asked: Asked, *, force: bool) -> bool:
    if force or (job.chosen and str(report.verdict) == "ambiguous"):
        return True
    return report.verdict.rank >= _rank(asked.require) and not _unmet(report, asked)


def _unmet(report: surgery.Report, asked: Asked) -> list[str]:
    """What is required of passes, and was not met."""
    if report.proof is None:
        return [f"{name} is required, and nothing was run" for name in asked.devices]
    return list(passing.unmet(report.proof, asked.devices))


def _tell(out: Out, job: Job, asked: Asked, report: surgery.Report, wrote: list[Path]) -> None:
    thing: Mapping[str, Any] = {
        **report.as_dict(),
        "ref": job.source.ref,
        "source": job.source.located.where,
        "target": str(job.target),
        "notes": [*report.plan.notes, *job.notes],
        "required": list(asked.devices),
        "unmet": _unmet(report, asked),
        "wrote": [str(path) for path in wrote],
    }

    def human() -> str:
        head = out.style(f"{job.source.ref} -> {job.target}", "bold")
        good = _accepted(report, job, asked, force=bool(wrote))
        width = account.terminal_width()
        lines = [head, f"from {job.source.located.where}", ""]
        if good or asked.why:
            lines.append(account.render(report, why=asked.why, width=width))
            lines += account.wrapped([f"  {note}" for note in job.notes], width)
        lines.append(out.style(account.verdict(report, chosen=job.chosen), "green" if good else "red"))
        unmet = [f"  {each}" for each in _unmet(report, asked)]
        lines += account.wrapped([*account.reasons(report), *unmet, *account.candidates(report)], width)
        if not (good or asked.why):  # what the answer rests on, also where it is no
            lines += account.wrapped([f"  {note}" for note in job.notes], width)
        lines += [account.counts(report)] if report.rows else []
        lines += [f"{'wrote' if i == 0 else '     '} {path}" for i, path in enumerate(wrote)]
        return "\n".join(lines)

    out.data(thing, human, lambda: str(wrote[0]) if wrote else str(report.verdict))


def _remedies(out: Out, job: Job, asked: Asked, report: surgery.Report) -> None:
    from zoo import remedies

    if str(report.verdict) == "refuted" and not (asked.rules or asked.layers or asked.shrink or asked.plan):
        for each in remedies.of(job.source, job.target.model, report):
            out.hint(each)
    if str(report.verdict) == "ambiguous" and report.candidates:
        out.hint("nothing was written; --accept N takes a candidate")
    elif asked.accept is not None and str(report.verdict) == "ambiguous":
        out.hint("nothing was written: there is no candidate that --accept could take; --why shows what is open")
    elif str(report.verdict) in ("ambiguous", "refuted"):
        out.hint(f"nothing was written; --why shows what was found, {_meant(report)}--force writes it all the same")
    elif report.verdict.rank < _rank(asked.require):
        out.hint(f"nothing was written: {report.verdict} is less than {asked.require}, which is required")
    elif _unmet(report, asked):
        out.hint("nothing was written; without --require of a device it is, or --force writes it all the same")


def _meant(report: surgery.Report) -> str:
    """What to type where the two part on purpose."""
    parted = report.proof.divergence if report.proof is not None else None
    known = parted is not None and parted.target_module and not report.plan.allow_different
    return f'--allow-different "{parted.target_module}" where it is meant, ' if parted and known else ""


# ---------------------------------------------------------------------------------------------------- the page


def _page_for(path: str | None) -> Path | None:
    """Where the page is to be, checked before anything is done."""
    if path is None:
        return None
    from zoo import html

    return html.check_free(path)


def _write_page(
    path: Path,
    job: Job,
    report: surgery.Report,
    into: str,
    *,
    wrote: list[Path] | None = None,
    passes: tuple[str, ...] = (),
    verdict: str = "",
    message: str = "",
) -> None:
    from zoo import html, to_file

    depth, why = _depth(job, report, into, passes)
    told = html.Told(
        job.source.ref,
        job.source.located.where,
        str(job.target),
        to_file.beside(job.source.checkpoint, report.plan),
        notes=job.notes,
        depth=depth,
        no_depth=why,
        wrote=tuple(map(str, wrote or ())),
        into=into,
        verdict="" if verdict == str(report.verdict) else verdict,
        message=message,
        chosen=job.chosen,
    )
    html.write(path, html.page(report, told))


def _depth(job: Job, report: surgery.Report, into: str, passes: tuple[str, ...]) -> tuple[tuple[Depth, ...], str]:
    """What the modules inside compute against the reference; or why that is not known."""
    import surgery
    from surgery.residuals import by_depth

    if job.way is None or job.way.probe is None:
        return (), "Nothing was run."
    wanted = ("cpu/float64", *passes) if passes else ("cpu/float64", "cpu/float32")
    parted = report.proof.divergence if report.proof is not None else None
    try:
        with _running(job.target):
            found = by_depth(
                job.source.checkpoint,
                job.target.model,
                report.plan,
                probe=job.way.probe,
                passes=wanted,
                rules=job.way.rules,
                into=into,
                on=parted.input if parted is not None else "",
            )
    except (surgery.GraftError, surgery.PlanError) as error:  # of an ambiguous plan, whose rows may be incomplete
        return (), f"It could not be measured: {error}"
    return found, ""
