"""The glue between names and surgery: an entry's part becomes a checkpoint and a runnable reference, then a graft.

Both `zoo.graft` and the command line go through here; neither knows how a reference is made or fed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.entry import Entry, Part, PartProbe, Pick
from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import nn

    import surgery
    from surgery.proof import Proof
    from surgery.rules import Rule
    from zoo.adapting import Change
    from zoo.host import Host
    from zoo.hub import Hub
    from zoo.sources import Located

_ALL = "the whole model"
_NEAR = 1e-3  # relative: a difference that has a cause of its own, and is no other value


@dataclass
class Source:
    """A reference to weights, resolved: the tensors that were asked for, and what is known of running them."""

    located: Located
    whole: surgery.Checkpoint
    checkpoint: surgery.Checkpoint  # the part of it that was asked for
    config: Mapping[str, Any]
    entry: Entry | None  # None where the checkpoint was not recognised
    part: Part | None
    _hashes: Future[dict[str, str]] | None = field(default=None, repr=False)

    @property
    def ref(self) -> str:
        return str(self.located.pick.reference)

    @property
    def probe(self) -> str | None:
        """The import string of what runs it."""
        if self.part is not None:
            return self.part.probe
        return self.entry.probe if self.entry is not None else None

    def reference(self) -> PartProbe | None:
        """The reference, ready to run; None where nobody knows how to run this. A missing extra is an error."""
        from zoo.api import needs

        if self.probe is None:
            return None
        assert self.entry is not None  # whoever names a probe
        with needs(self.entry.requires):
            made = imported(self.probe)(self.checkpoint, self.config)
        if not isinstance(made, PartProbe):
            raise ZooError(f"{self.probe} gave a {type(made).__name__}, and not a zoo.PartProbe", kind="plugin")
        return made

    def hashing(self) -> Future[dict[str, str]]:
        """The sha256 of the files of weights, being computed beside whatever else is done."""
        if self._hashes is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
            self._hashes = pool.submit(_hashes, self.located)
            pool.shutdown(wait=False)
        return self._hashes

    def unrunnable(self) -> str:
        """Why there is no reference."""
        if self.entry is None:
            return f"{self.ref} was not recognised, so there is no reference to run"
        return f"{self.entry.name} has no reference for {self.part.name if self.part else _ALL}"

    def stamped(self, plan: surgery.Plan) -> surgery.Plan:
        """The plan with where its source came from: revision, and the sha256 of the files."""
        stamp = replace(
            plan.source,
            description=f"{self.ref} from {self.located.source}",
            revision=self.located.commit,
            files=self.hashing().result(),
        )
        return replace(plan, source=stamp)


def resolve(
    ref: str,
    *,
    part: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    of: Host | None = None,
    hub: Hub | None = None,
) -> Source:
    """The weights behind a reference, pulled if need be."""
    from zoo import api

    of = of or api.host()
    located = api.fetch(ref, part=part, revision=revision, offline=offline, of=of, hub=hub)
    whole = api.open_whole(located, of)
    config = located.config
    entry, wanted = _recognised(located.pick, of, config, whole)
    checkpoint = whole
    if located.pick.reference.part is not None:
        checkpoint = whole.view(of.part_tensors(located.pick, config, whole))
    return Source(located, whole, checkpoint, config, entry, wanted)


def _recognised(
    chosen: Pick, of: Host, config: Mapping[str, Any], tensors: Mapping[str, surgery.TensorInfo]
) -> tuple[Entry | None, Part | None]:
    """The entry and part that say how to run it; by recognition where the reference names none."""
    if chosen.entry.parts or chosen.entry.probe:
        return chosen.entry, chosen.part
    found = of.recognise(config, tensors)
    best = [recognition for recognition in found if recognition.matched == found[0].matched]
    if len(best) != 1:
        return None, None
    entry = of.find(best[0].entry)
    wanted = chosen.reference.part
    return entry, entry.part(wanted) if wanted is not None else None


def _hashes(located: Located) -> dict[str, str]:
    known = located.checked or {}
    found = {}
    for path in _weights(located):
        if path.name in known:
            found[path.name] = known[path.name]
        else:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _weights(located: Located) -> list[Path]:
    if not located.weights.name.endswith(".index.json"):
        return [located.weights]
    from zoo.hub import shards_of

    return [located.weights, *(located.weights.parent / name for name in shards_of(located.weights))]


def imported(text: str) -> Callable[..., Any]:
    """What an import string names. A module that is missing is told from one that lacks the name."""
    module, _, name = text.partition(":")
    found = getattr(import_module(module), name, None)
    if not callable(found):
        raise ZooError(f"{module} has no function {name}", kind="plugin", hint="zoo plugins check NAME looks closer")
    return found


# ---------------------------------------------------------------------------------------------------- the probe


def probe_for(
    part: PartProbe, model: nn.Module, *, example: Any = None, into: str = "", where: str = "the target"
) -> tuple[surgery.Probe, tuple[str, ...]]:
    """How surgery runs both sides, and what is to be said of the inputs."""
    import surgery
    from zoo.inputs import gather

    grafted = model
    if into:
        grafted = submodule(model, into)
        example = _arriving(model, grafted, example) if example is not None else None
        where = f"{where}, {into}"
    found = gather(grafted, part, example=example, where=where)
    call = found.call
    made = surgery.Probe(
        part.reference,
        lambda module, x: part.run(module, call.read(x)),
        None,
        list(found.xs),
        outputs=part.outputs,
        labels=found.labels,
    )
    return made, found.notes


@dataclass(frozen=True)
class Attempt:
    """One way to graft: with the entry's own reference, or with its model in the sizes of the target.

    rules: those that this way needs; what was asked for, and what follows from the sizes.
    """

    probe: surgery.Probe | None
    notes: tuple[str, ...] = ()
    change: Change | None = None
    runnable: PartProbe | None = None  # what the probe runs
    rules: tuple[Rule, ...] = ()
    narrowed: str = ""  # what is to be said where the probe answers for a piece of what the part's own answers for


def attempts(
    source: Source,
    model: nn.Module,
    *,
    example: Any = None,
    into: str = "",
    where: str = "the target",
    static: bool = False,
    arguments: Mapping[str, Any] | None = None,
    rules: Any = (),
    plan: surgery.Plan | None = None,
    tokenizer: Any = None,
    shrink: bool = False,
) -> Iterator[Attempt]:
    """The ways to try, in turn: where the target has other sizes than the source, those that it seems to want come
    first, and last those that answer for a piece of the outputs. A way whose reference cannot be built, or whose inputs
    the target does not take, is passed over and said.

    arguments: those that the target was made with. plan: one that is given; what it resized, is. tokenizer: the
    target's, by whose tokens rows of the vocabulary are chosen. shrink: the source is made as narrow as the target.
    """
    from surgery.rules import checked
    from zoo.adapting import by_token, changes, derived, making, narrower, of_plan, remade

    grafted = submodule(model, into) if into else model
    own, said = checked(rules), ""
    if tokenizer is not None:
        chosen, said = by_token(source, tokenizer, grafted)
        own = (*own, *chosen)
    elif plan is not None:
        own = (*own, *(rule for rule in checked(plan.rules) if rule not in own))
        own = (*own, *of_plan(plan, but=remade(source, own)))
    spoken = (f"vocabulary by token: {said}",) if said else ()
    runnable = None if static else source.reference()
    passed: list[str] = []
    wide: list[Attempt] = []
    if shrink:
        if runnable is None:
            raise ZooError("--shrink runs the source, to see what shares a width, and --static runs nothing")
        own = (*own, narrower(source, runnable, grafted, arguments))
    ways: Iterable[Change] = changes(source, grafted, _seen(grafted, runnable, example, into), arguments, own)
    if runnable is None:
        try:
            ways = list(ways)
        except ZooError as error:  # nothing is to be run, so what would run it may be missing
            if error.kind != "extra":
                raise
            ways = ()
            passed.append(f"other sizes were not tried: {error}")
    for change in ways:
        change = replace(change, notes=spoken)
        if runnable is None:
            yield Attempt(None, change=change, rules=(*change.rules, *own))
            continue
        try:
            resized = change.reference()
            assert resized is not None  # the same probe as of the entry's own
            probe, notes = probe_for(resized, model, example=example, into=into, where=where)
        except ZooError as error:
            if error.kind not in ("file", "weights"):
                raise
            passed.append(f"not possible as {change}: {error}")
            continue
        wide.append(Attempt(probe, notes, change, resized, (*change.rules, *own)))
        yield wide[-1]
    if runnable is None:
        yield Attempt(None, (*spoken, *passed), rules=own)
        return
    if making(own):
        runnable = derived(source, own).reference()
        assert runnable is not None
    probe, notes = probe_for(runnable, model, example=example, into=into, where=where)
    wide.append(Attempt(probe, (*spoken, *notes, *passed), None, runnable, own))
    yield wide[-1]
    for way in wide:
        assert way.runnable is not None  # a way that runs something
        for less in way.runnable.narrower:
            probe, _ = probe_for(less, model, example=example, into=into, where=where)
            said = f"answered for {', '.join(less.outputs)} only: the target does not show {_words(way.runnable)}"
            yield replace(way, probe=probe, narrowed=said)


def _words(part: PartProbe) -> str:
    return ", ".join(part.outputs) or "all that the part answers for"


def _seen(grafted: nn.Module, runnable: PartProbe | None, example: Any, into: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the standard inputs, as an example of the target has them."""
    from zoo.inputs import shown

    if runnable is None or example is None or into:
        return {}
    return shown(grafted, runnable, example)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        from zoo.errors import did_you_mean

        names = [name for name, _ in model.named_modules() if name]
        hint = did_you_mean(path, names) or f"its modules are {', '.join(n for n in names if '.' not in n)}"
        raise ZooError(f"{type(model).__name__} has no module {path}", kind="unknown", hint=hint) from None


def _arriving(model: nn.Module, inner: nn.Module, example: Any) -> Any:
    """What reaches an inner module when the whole is called with its example; None where nothing does."""
    import torch

    from zoo.target import FAULTS

    arrived: list[Any] = []

    class Seen(Exception):
        """The inner module was reached; the rest of the run tells nothing more."""

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # By name where there are names, as forward may mix the two.
        arrived.append({**_by_name(inner, args), **kwargs} if kwargs else args)
        raise Seen

    handle = inner.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example) if isinstance(example, tuple) else model(example)
    except Seen:
        return arrived[0]
    except FAULTS:
        return None  # forward's parameter names are asked next, and what they leave open is said there
    finally:
        handle.remove()
    return None


def _by_name(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    import inspect

    return dict(inspect.signature(module.forward).bind_partial(*args).arguments)


# ---------------------------------------------------------------------------------------------------- the graft


def operate(
    source: Source,
    model: nn.Module,
    attempt: Attempt,
    *,
    plan: surgery.Plan | None = None,
    into: str = "",
    require: str = "consistent",
) -> surgery.Report:
    """surgery.graft, for a reference that may answer for more than the target has.

    A whole model gives a pooled vector as well; a target without a pooler is proven on the rest. An output is let go
    only where all that it alone depends on was dropped.
    """
    import surgery

    source.hashing()
    try:
        report = surgery.graft(
            source.checkpoint, model, probe=attempt.probe, plan=plan, rules=attempt.rules, into=into, require=require
        )
    except surgery.GraftError as error:
        report = _on_the_rest(source, model, attempt, error, into, require)
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
        source.checkpoint, model, probe=less, plan=found, rules=attempt.rules, into=into, require=require
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
    into: str = "",
    require: str = "consistent",
) -> surgery.Report:
    """Fill `target` with the weights behind `ref`, and prove it. The model changes only if the verdict is good enough.

    `example` is what the target's forward takes (a tensor, a tuple or a dict by name), where its parameters' names do
    not say; `probe` replaces the entry's own reference; `into` grafts into a submodule. `rules` say what is wanted
    otherwise than the source has it (surgery.rules). `tokenizer` is the target's own (an object of tokenizers or
    transformers, or a path): then rows of the vocabulary are found by token, and not by number.
    """
    import surgery
    from zoo.target import checked_example

    source = resolve(ref, part=part)
    if probe is not None:
        way = Attempt(probe, rules=surgery.rules.checked(rules))
        return operate(source, target, way, plan=plan, into=into, require=require)
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
    )
    errors: list[surgery.GraftError] = []

    def run(way: Attempt) -> surgery.Report:
        try:
            return operate(source, target, way, plan=plan, into=into, require=require)
        except surgery.GraftError as error:
            if error.report is None:
                raise
            errors.append(error)
            return error.report

    report, _ = best_of(ways, run, surgery.Verdict(require))
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
