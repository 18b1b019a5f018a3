"""What rules make of a source and of its reference, before anything is mapped; and plans there and back.

    source  --rules-->  derived source  --mapper, judge-->  plan  --outward-->  plan over the source

The reference that runs must hold the derived source. Blocks that a rule leaves out are taken out of it here; for
tensors of another size the caller gives a reference that was built so.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery import rules as rules_of
from surgery.beside import joined
from surgery.checkpoint import Checkpoint
from surgery.derivation import Derivation, brought_back, derivation, set_aside
from surgery.derived import composed, decomposed, derive
from surgery.errors import GraftError, SurgeryError
from surgery.expr import Call, Name, evaluate, kind, names, substituted
from surgery.plan import STALE, Plan
from surgery.rules import Reshape, Rule, RuleError

if TYPE_CHECKING:
    from torch import nn

    from surgery.body import Reshaped
    from surgery.expr import Expr
    from surgery.probe import Probe
    from surgery.proof import Proof


_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Prepared:
    """A source, and what is mapped in its place."""

    base: Checkpoint
    source: Checkpoint  # what is mapped: the derived one, or the base itself
    probe: Probe | None
    rules: tuple[Rule, ...]
    made: Derivation | None  # None where no rule changes a tensor

    @classmethod
    def of(cls, base: Checkpoint, probe: Probe | None, rules: Iterable[object]) -> Prepared:
        """RuleError where a rule does not fit the source."""
        given = rules_of.checked(rules)
        adapted = any(isinstance(rule, rules_of.MergeLora) for rule in given)
        base = joined(base, given)
        made = derivation(base, given)
        reshapes = [rule for rule in given if isinstance(rule, Reshape)]
        if not made.changes and not reshapes:
            return cls(base, base, probe, given, None)
        source = derive(base, made.rows)
        if probe is not None and adapted:
            probe = replace(probe, reference=with_adapters(probe.reference, base, given))
        if probe is not None and made.selected:
            before = derive(base, derivation(base, [r for r in given if not _selects(r)]).rows)
            module = probe.reference
            for stack, keep in made.selected:
                module = without_blocks(module, before, stack, keep)
            probe = replace(probe, reference=module)
        for rule in reshapes:
            probe, made = reshaped(source, probe, made, rule)
            source = derive(base, made.rows)
        return cls(base, source, probe, given, made)

    @property
    def said(self) -> tuple[str, ...]:
        """The rules as a plan keeps them: those that follow from the sizes of the target are found anew."""
        return tuple(str(rule) for rule in self.rules if not getattr(rule, "implied", False))

    def outward(self, plan: Plan, target: Iterable[str]) -> Plan:
        """A plan over what is mapped, as the person sees it."""
        if self.made is not None:
            plan = composed(plan, self.base, self.made.rows, self.made.why)
            plan = replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *self.made.notes))))
        plan = set_aside(plan, self.rules, self.base, target)
        return _ruled(plan, self.said)

    def inward(self, plan: Plan) -> Plan:
        """A plan over the source, as it is mapped and proven: with what rules set aside in its place."""
        plan = brought_back(plan)
        return _ruled(plan if self.made is None else decomposed(plan, self.base, self.source, self.made.rows), ())

    def proof(self, proof: Proof, plan: Plan) -> Proof:
        """The proof of the derived source, as one of the source: rows that an op changed are adapted, and so are those
        that a rule left new."""

        def dtype_of(name: str) -> str:
            return self.base[name].dtype

        changed = [
            row.target
            for row in plan.rows
            if row.expr is not None and kind(row.expr, dtype_of) in ("approximate", "lossy")
        ]
        changed += [row.target for row in plan.rows if row.aside is not None]
        adapted = self.made.adapted if self.made is not None else frozenset[str]()
        copies = Counter(row.expr for row in plan.rows if row.expr is not None)
        as_is = {
            row.target
            for row in plan.rows
            if row.expr is not None and copies[row.expr] == 1 and kind(row.expr, dtype_of) == "exact"
        }
        made = (row for row in self.inward(plan).rows if adapted.intersection(row.sources))
        changed += [row.target for row in made if row.target not in as_is]
        return replace(proof, adapted=tuple(dict.fromkeys((*proof.adapted, *changed))))


def uncast(plan: Plan) -> Plan:
    """The plan before its rows were cast to another floating-point type; itself where none was. That is what a proof is
    about, which names the casts that lose bits as adapted."""
    rows = tuple(
        replace(row, expr=row.expr.args[0])
        if isinstance(row.expr, Call) and row.expr.op == "cast" and dict(row.expr.params)["dtype"] in _FLOATS
        else row
        for row in plan.rows
    )
    return plan if rows == plan.rows else replace(plan, rows=rows, verdict=None, verdict_for=None, proven=())


def _ruled(plan: Plan, rules: tuple[str, ...]) -> Plan:
    """The plan with these rules, and its verdict bound to them; a stale one stays stale."""
    if plan.rules == rules:
        return plan
    changed = replace(plan, rules=rules, verdict=None, verdict_for=None)
    if plan.verdict is None:
        return changed
    if plan.verdict == STALE:
        return replace(changed, verdict=STALE, verdict_for="")
    return changed.with_verdict(plan.verdict, proven=plan.proven)


def _selects(rule: Rule) -> bool:
    return isinstance(rule, rules_of.SelectLayers)


_RESHAPES = {
    "clone_width": "surgery.widths:clone_width",
    "dense_to_moe": "surgery.experts:dense_to_moe",
    "insert_identity_blocks": "surgery.depth:insert_identity_blocks",
    "mha_to_gqa": "surgery.grouped_heads:mha_to_gqa",
    "prune_heads": "surgery.widths:prune_heads",
    "shrink": "surgery.widths:shrink_width",
    "widen": "surgery.widths:widen",
}


def reshaped(source: Checkpoint, probe: Probe | None, made: Derivation, rule: Reshape) -> tuple[Probe, Derivation]:
    """The probe with the reference that the rule makes, or what stands in for it where its class does not take such a
    body; and what its tensors are made of, in the reference's own names.

    RuleError without a probe, or where nothing runs that computes so."""
    from surgery.link import link

    if probe is None:
        raise RuleError(f"{rule}: what it touches is seen by running", hint="Give a probe; --static cannot do it.")
    links = link(probe.reference, source)
    found = _reshape(rule, probe)
    module, run, called = found.module, probe.run_reference, {}
    if module is None and found.stand_in is not None:
        module, run, called = found.stand_in.module, found.stand_in.run, dict(found.stand_in.names)
    if module is None:
        why = "; ".join(found.notes) or "the reference cannot be built so"
        raise RuleError(f"{rule}: {why}", hint="The plan alone is made by the function of that name in surgery.")
    rows: dict[str, Expr] = {}
    for row in found.plan.rows:
        held = found.plan[row.tied_to] if row.tied_to is not None else row
        if held.expr is not None and all(name in links for name in names(held.expr)):
            rows[called.get(row.target, row.target)] = substituted(substituted(held.expr, links), made.rows)
    before = {group.name: group.size for group in found.groups}
    said = ", ".join(f"{name} {before.get(name, '?')} -> {size}" for name, size in rule.sizes) or str(rule)
    drift = "" if found.drift is None else f"; before any training its outputs move by {found.drift:.1%}"
    notes = (*made.notes, f"as asked for: {said}; {found.kind}{drift}", *found.notes)
    adapted = made.adapted | (_changed(rows, links, made) if found.kind in ("approximate", "lossy") else set())
    probe = replace(probe, reference=module, run_reference=run)
    return probe, replace(made, rows=rows, notes=notes, adapted=adapted)


def _changed(rows: Mapping[str, Expr], links: Mapping[str, Expr], made: Derivation) -> set[str]:
    """The tensors that are no plain copies of what was there, or of which there are more copies than there were."""
    before = Counter(substituted(expr, made.rows) for expr in links.values())
    now = Counter(rows.values())
    return {name for name, expr in rows.items() if now[expr] > before[expr]}


def _reshape(rule: Reshape, probe: Probe) -> Reshaped:
    import importlib

    module, _, name = _RESHAPES[rule.word].partition(":")
    function = getattr(importlib.import_module(module), name)
    where = [rule.where or dict(rule.sizes)] if rule.where or rule.sizes else []
    try:
        found: Reshaped = function(probe.reference, probe, *where, **dict(rule.params))
    except SurgeryError as error:
        raise RuleError(f"{rule}: {error}", hint=error.hint) from error
    return found


# -- the reference ----------------------------------------------------------------------------------------------------
def with_adapters(reference: nn.Module, base: Checkpoint, rules: Sequence[Rule]) -> nn.Module:
    """The reference with the adapters merged: a copy of it, where it holds the weights of the source as it was; itself
    where it holds the merged ones already. That it holds either is checked as of any reference."""
    from torch import no_grad

    from surgery.link import link
    from surgery.running import own_tensors

    rows = derivation(base, [rule for rule in rules if isinstance(rule, rules_of.MergeLora)]).rows
    changed = {name for name, expr in rows.items() if expr != Name(name)}
    before = base.view(list(rows))
    links = {live: expr for live, expr in link(reference, before).items() if changed.intersection(names(expr))}
    if not links:
        return reference
    merged, copied = derive(base, rows), copy.deepcopy(reference)
    own = own_tensors(copied)
    with no_grad():
        for live, expr in links.items():
            own[live].copy_(evaluate(expr, merged.read))
    return copied


def without_blocks(reference: nn.Module, source: Checkpoint, stack: str, keep: Sequence[int]) -> nn.Module:
    """The reference with only these blocks of a stack of the source, in this order. Its tensors are shared, not copied.

    The list of blocks is found by the values it holds, whatever it is called. GraftError where there is none.
    """
    from surgery.link import link

    found = _lists(link(reference, source), stack)
    if not found:
        raise GraftError(
            f"the reference has no list of blocks that holds {stack} of the source",
            hint="Give a probe whose reference has only the blocks that are kept, and derive the tensors.",
        )
    tensors = {id(t): t for t in itertools.chain(reference.parameters(), reference.buffers())}
    copied = copy.deepcopy(reference, dict(tensors))
    for path in found:
        _keep(copied, path, keep)
    return copied


def _lists(links: Mapping[str, Expr], stack: str) -> list[str]:
    """The paths of modules whose child number i holds block i of the stack, for every i."""
    inside = re.compile(rf"{re.escape(stack)}\.(\d+)\." if stack else r"(\d+)\.")
    seen: dict[str, dict[int, set[int]]] = {}
    for live, expr in links.items():
        numbers = {int(found[1]) for name in names(expr) if (found := inside.match(name))}
        if len(numbers) != 1:
            continue
        for place in re.finditer(r"(?:^|(?<=\.))(\d+)(?=\.)", live):
            at = live[: place.start()].rstrip(".")
            seen.setdefault(at, {}).setdefault(int(place[1]), set()).update(numbers)
    return [at for at, blocks in seen.items() if len(blocks) > 1 and all(b == {i} for i, b in blocks.items())]


def _keep(module: nn.Module, path: str, keep: Sequence[int]) -> None:
    from torch import nn

    held = module.get_submodule(path)
    blocks = list(held.children())
    chosen = [blocks[i] for i in keep]
    new: nn.Module
    if isinstance(held, nn.ModuleList):
        new = nn.ModuleList(chosen)
    elif type(held) is nn.Sequential:
        new = nn.Sequential(*chosen)
    else:
        raise GraftError(
            f"{path} of the reference is a {type(held).__name__}, from which no blocks can be left out",
            hint="Give a probe whose reference has only the blocks that are kept.",
        )
    new.train(held.training)
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, new)
