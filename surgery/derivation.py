"""What rules do: to a checkpoint, of which they make another, and to a plan.

Rules that change tensors (resize, derive, select_layers, merge_lora) make a derived checkpoint, which is then mapped
and proven; rules that leave tensors alone (drop, init) act on the plan that was found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from surgery import ops
from surgery.beside import prefixes
from surgery.errors import PlanError
from surgery.expr import Call, Expr, Name, names, parse, substituted
from surgery.rules import Derive, Drop, Init, MergeLora, Resize, Rule, RuleError, SelectLayers, Transplant, Without

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint
    from surgery.plan import Plan


# -- what they do to a checkpoint -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Derivation:
    """What rules make of a checkpoint: each tensor as an expression over it, and why some are left out."""

    rows: Mapping[str, Expr]
    why: Mapping[str, str]
    selected: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (stack, the layers kept), in turn
    notes: tuple[str, ...] = ()
    adapted: frozenset[str] = frozenset()  # tensors that a change of the body made, where it is not the same function

    @property
    def changes(self) -> bool:
        return any(expr != Name(name) for name, expr in self.rows.items()) or bool(self.why)


def derivation(source: Checkpoint, rules: Sequence[Rule]) -> Derivation:
    """What the rules make of the source, in the order in which they stand, adapters first: they speak of the source as
    it is. RuleError where one does not fit."""
    beside = prefixes(rules)
    rows: dict[str, Expr] = {name: Name(name) for name in source if not name.startswith(beside)}
    why: dict[str, str] = {}
    selected: list[tuple[str, tuple[int, ...]]] = []
    notes: list[str] = []
    for rule in sorted(rules, key=lambda rule: not isinstance(rule, MergeLora)):
        if isinstance(rule, Derive):
            rows[rule.name] = substituted(_known(rule, rows), rows)
        elif isinstance(rule, Resize):
            for name in _matching(rule, rule.pattern, rows, "the source"):
                rows[name] = Call(rule.op, (rows[name],), rule.params)
        elif isinstance(rule, Without):
            rows.pop(rule.name)
            why[rule.name] = rule.why
        elif isinstance(rule, MergeLora):
            from surgery import lora

            rows, gone, note = lora.merge(rule, rows, source)
            why.update(gone)
            notes.append(note)
        elif isinstance(rule, Transplant):
            from surgery import donor

            if any(isinstance(other, Transplant) and other is not rule for other in rules):
                raise RuleError(f"{rule}: two rules give the source another vocabulary", hint="Leave one of them.")
            made = donor.transplanted(rule, rows, source)
            rows = {**rows, **made.rows}
            why.update(made.why)
            notes.append(made.said)
        elif isinstance(rule, SelectLayers):
            stack, count = _stack(rule, rows)
            rows, gone = _selected(rule, stack, count, rows)
            why.update(gone)
            selected.append((stack, rule.keep))
            kept = ", ".join(map(str, rule.keep))
            notes.append(f"of the {count} blocks of {stack} those numbered {kept} are kept, as asked for")
    return Derivation(rows, why, tuple(selected), tuple(notes))


def _known(rule: Derive, rows: Mapping[str, Expr]) -> Expr:
    try:
        expr = parse(rule.expression)
    except PlanError as error:
        raise RuleError(f"{rule}: {error}", hint=error.hint or "An expression as a row of a plan has it.") from None
    for name in names(expr):
        if name not in rows:
            raise RuleError(f"{rule}: the source has no tensor {name}{ops.did_you_mean(name, set(rows))}")
    return expr


def _matching(rule: Rule, pattern: str, names: Iterable[str], where: str) -> list[str]:
    known = list(names)
    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found:
        raise RuleError(
            f"{rule}: {where} has no tensor that {pattern} matches{ops.did_you_mean(pattern, set(known))}",
            hint="A pattern is a glob over names, as in encoder.layer.*.bias.",
        )
    return found


_NUMBERED = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


def stacks(names: Iterable[str]) -> dict[str, int]:
    """{what precedes the number: how many blocks} for the outermost stacks of two blocks and more.

    >>> stacks(["h.0.q.weight", "h.0.k.0.w", "h.1.q.weight", "h.1.k.0.w", "norm.weight"])
    {'h': 2}
    """
    found: dict[str, set[int]] = {}
    for name in names:
        place = _NUMBERED.search(name)
        if place is not None:
            found.setdefault(name[: place.start()].rstrip("."), set()).add(int(place[1]))
    return {at: len(numbers) for at, numbers in found.items() if len(numbers) > 1 and max(numbers) == len(numbers) - 1}


def _stack(rule: SelectLayers, rows: Mapping[str, Expr]) -> tuple[str, int]:
    known = stacks(rows)
    shown = ", ".join(f"{at} ({count} blocks)" for at, count in known.items())
    if rule.stack:
        fits = {at: count for at, count in known.items() if at == rule.stack}
        if not fits:
            hint = f"There are {shown}." if known else "It has no numbered blocks."
            raise RuleError(f"{rule}: the source has no stack of blocks {rule.stack}", hint=hint)
    else:
        # Short lists of unlike things, such as the layers of a head, are no stack to select from.
        fits = {at: count for at, count in known.items() if _alike(at, count, rows)} or known
    if len(fits) != 1:
        what = f"{len(fits)} stacks of blocks: {shown}" if fits else "no numbered blocks"
        hint = f'Name the one that is meant: stack="{next(iter(fits))}".' if fits else ""
        raise RuleError(f"{rule}: the source has {what}", hint=hint)
    ((at, count),) = fits.items()
    beyond = [n for n in rule.keep if n >= count]
    if beyond:
        raise RuleError(f"{rule}: {at} has {count} blocks, numbered 0 to {count - 1}, and {beyond[0]} is asked for")
    return at, count


def _alike(at: str, count: int, rows: Mapping[str, Expr]) -> bool:
    inside: dict[int, set[str]] = {i: set() for i in range(count)}
    for name in rows:
        split = _split(name, at)
        if split is not None and split[0] < count:
            inside[split[0]].add(split[1])
    return inside[count - 1] <= inside[0] and len(inside[count - 1]) > 1


def _split(name: str, stack: str) -> tuple[int, str] | None:
    """(number, rest) of a tensor in a stack; None of any other."""
    prefix = f"{stack}." if stack else ""
    if not name.startswith(prefix):
        return None
    number, _, rest = name[len(prefix) :].partition(".")
    return (int(number), rest) if number.isdigit() and rest else None


def _selected(
    rule: SelectLayers, stack: str, count: int, rows: Mapping[str, Expr]
) -> tuple[dict[str, Expr], dict[str, str]]:
    """The rows with the layers renumbered, and why the tensors of the others are left out."""
    first: dict[str, Expr] = {}
    inside: dict[int, dict[str, Expr]] = {i: {} for i in range(count)}
    last: dict[str, Expr] = {}
    for name, expr in rows.items():
        split = _split(name, stack)
        if split is None:
            (last if any(inside.values()) else first)[name] = expr
        else:
            inside[split[0]][split[1]] = expr
    common = set.intersection(*(set(each) for each in inside.values()))
    only = next(((i, rest) for i, each in inside.items() for rest in each if rest not in common), None)
    if only is not None and only[0] not in rule.keep:
        raise RuleError(
            f"{rule}: block {only[0]} of {stack} holds {stack}.{only[0]}.{only[1]}, which the others do not have",
            hint=f"Keep block {only[0]} as well.",
        )
    prefix = f"{stack}." if stack else ""
    kept = {f"{prefix}{new}.{rest}": e for new, old in enumerate(rule.keep) for rest, e in inside[old].items()}
    gone = {
        e.name: f"block {i} of {stack} is left out, as asked for"
        for i, each in inside.items()
        if i not in rule.keep
        for e in each.values()
        if isinstance(e, Name)
    }
    return {**first, **kept, **last}, gone


# -- what they do to a plan -------------------------------------------------------------------------------------------
def set_aside(plan: Plan, rules: Sequence[Rule], source: Iterable[str], target: Iterable[str]) -> Plan:
    """The plan with the rows that `drop` and `init` speak of turned new; what they would have been stays in the row,
    so that the rest can be proven around them."""
    from surgery.plan import Dropped, Status

    known_source, known_target = list(source), list(target)
    dropped = {
        name: rule.why
        for rule in rules
        if isinstance(rule, Drop)
        for name in _matching(rule, rule.pattern, known_source, "the source")
    }
    left = {
        name: rule.why
        for rule in rules
        if isinstance(rule, Init)
        for name in _matching(rule, rule.pattern, known_target, "the target")
    }
    if not dropped and not left:
        return plan
    rows = []
    for row in plan.rows:
        why = left.get(row.target) or next((dropped[name] for name in row.sources if name in dropped), "")
        if why and row.expr is not None:
            row = replace(row, status=Status.NEW, expr=None, aside=row.expr, note=f"as asked for: {why}")
        elif why and row.status in (Status.TIED, Status.CONSTANT) and row.target in left:
            raise RuleError(
                f"init({ops.spell(row.target)}): it is {row.status}" + (f" to {row.tied_to}" if row.tied_to else ""),
                hint=f"Name {row.tied_to} instead." if row.tied_to else "Leave it out of the rule.",
            )
        rows.append(row)
    used = {name for row in rows for name in row.sources}
    if plan.used and not used:
        raise RuleError(
            f"nothing of the source is left: {' and '.join(str(r) for r in rules if isinstance(r, (Drop, Init)))}",
            hint="Drop less, or leave less of the target new.",
        )
    aside = {name: row for row in rows for name in row.set_aside}
    reasons = {drop.source: drop.reason for drop in plan.dropped} | {
        name: f"as asked for: {why}" for name, why in dropped.items()
    }
    for name in aside:
        if name not in used:
            reasons.setdefault(name, f"{aside[name].target} {aside[name].note.replace('as asked for', 'is new')}")
    gone = tuple(Dropped(name, reason) for name, reason in reasons.items() if name not in used)
    candidates = tuple(set_aside(each, rules, known_source, known_target) for each in plan.candidates)
    changed = replace(
        plan, rows=tuple(rows), dropped=gone, candidates=candidates, verdict=None, verdict_for=None, proven=()
    )
    return changed if plan.verdict in (None, "stale") else changed.with_verdict(str(plan.verdict), proven=plan.proven)


def brought_back(plan: Plan) -> Plan:
    """The plan with the rows that rules set aside filled after all: what is proven."""
    from surgery.plan import Dropped, Status

    if not any(row.aside is not None for row in plan.rows):
        return plan
    rows = tuple(
        replace(row, status=Status.FILLED, expr=row.aside, aside=None) if row.aside is not None else row
        for row in plan.rows
    )
    used = {name for row in rows for name in row.sources}
    dropped = tuple(Dropped(d.source, d.reason) for d in plan.dropped if d.source not in used)
    return replace(plan, rows=rows, dropped=dropped, verdict=None, verdict_for=None, proven=())
