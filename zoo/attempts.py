"""The ways to run a source beside a target: as it is, in the target's sizes, or for a piece of its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoo.entry import PartProbe
from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import nn

    import surgery
    from surgery.rules import Rule
    from zoo.adapting import Change
    from zoo.resolving import Source


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
    donor: str | None = None,
    shrink: bool = False,
) -> Iterator[Attempt]:
    """The ways to try, in turn: where the target has other sizes than the source, those that it seems to want come
    first, and last those that answer for a piece of the outputs. A way whose reference cannot be built, or whose inputs
    the target does not take, is passed over and said.

    arguments: those that the target was made with. plan: one that is given; what it resized, is. tokenizer: the
    target's, by whose tokens rows of the vocabulary are chosen. donor: the model that makes rows for tokens which the
    source does not know. shrink: the source is made as narrow as the target.
    """
    from surgery.rules import checked
    from zoo import remedies
    from zoo.adapting import by_token, changes, derived, making, narrower, of_plan, remade
    from zoo.donors import placed, rule_of

    grafted = submodule(model, into) if into else model
    own, said = checked(rules), ""
    if donor is not None:
        own = (*own, rule_of(tokenizer, donor))
    if plan is not None:
        own = (*own, *(rule for rule in checked(plan.rules) if rule not in own))
    own = placed(own, source, grafted)
    if tokenizer is not None and donor is None:
        chosen, said = by_token(source, tokenizer, grafted)
        own = (*own, *chosen)
    elif plan is not None:
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
        try:
            runnable = derived(source, own).reference()
        except ZooError as error:
            said_by = [str(rule) for rule in making(own) if not getattr(rule, "implied", False)]
            if error.kind not in ("file", "weights") or not said_by:
                raise
            raise ZooError(
                f"as {' and '.join(said_by)} makes it, no model of {source.ref} has these tensors: {error}",
                kind=error.kind,
                hint="; ".join(passed[:2]) or "give the rule the size that your module has",
            ) from error
        assert runnable is not None
    try:
        probe, notes = probe_for(runnable, model, example=example, into=into, where=where)
    except ZooError as error:
        error.hint = "; ".join([*remedies.fewer_tokens(source, grafted, own), error.hint])
        raise
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
