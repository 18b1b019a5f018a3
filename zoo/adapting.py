"""A target of other sizes: which ones it wants, the reference that has them, and what the change costs.

The sizes are the entry's business (zoo.Sizes). Here they are tried: the checkpoint with its tensors resized and the
model of those sizes take the place of the checkpoint and its reference, and the graft is as ever. What was resized
stands in the plan's rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.sizes import LABELS, Body, Resized, Sizes, Value

if TYPE_CHECKING:
    from torch import Tensor, nn

    import surgery
    from surgery.rules import Rule
    from zoo.entry import PartProbe
    from zoo.resolving import Source

VOCABULARY = "vocabulary"
_TOKENS = re.compile(r"word|tok|vocab|wte|shared|embed", re.IGNORECASE)
_OTHER_TABLES = re.compile(r"pos|place|wpe|where|type|segment|kind", re.IGNORECASE)
_INNER = ("intermediate_size", "ffn", "ffn_dim", "d_ff", "inner", "mlp_dim", "wide", "dim_feedforward", "n_inner")
_ROUNDING = 1e-4  # what float32 alone does to an output
_MOST = 4  # ways of reading a target's sizes that are tried


@dataclass(frozen=True)
class Change:
    """A source in other sizes: the rules that make its tensors, and how its model is built and compared."""

    source: Source
    rules: tuple[Rule, ...]
    before: Mapping[str, Value]
    after: Mapping[str, Value]  # of those that changed
    resized: Resized
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = [
            _labels(value) if name == LABELS else f"{name} {_shown(self.before[name])} -> {_shown(value)}"
            for name, value in self.after.items()
        ]
        return ", ".join([*said, *self.notes])

    def reference(self) -> PartProbe | None:
        """The model of these sizes, holding the resized tensors."""
        return self.source.reference()

    def _of_kept(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs for the labels that both have, in one order, where labels were chosen."""
        index, own = self.after.get(LABELS), self.before.get(LABELS)
        if not isinstance(index, tuple) or not isinstance(own, tuple):
            return x, y
        if (x.shape[-1], y.shape[-1]) != (len(own), len(index)):
            return x, y
        kept = [place for place, row in enumerate(index) if row >= 0]
        return x[..., [index[place] for place in kept]], y[..., kept]

    def drift(self, before: PartProbe, after: PartProbe) -> dict[str, float]:
        """By output: how far it moves where both models see the same thing, before any training; relative, the worst
        of two inputs. Outputs of another length are compared by their mean over it."""
        import torch

        found: dict[str, float] = {}
        if self.resized.alike is None:
            return found
        for seed in (1, 2):
            old, new = self.resized.alike(seed)
            with torch.no_grad():
                a, b = before.run(before.reference, old), after.run(after.reference, new)
            for name, x, y in zip(before.outputs, a, b, strict=True):
                moved = _moved(*self._of_kept(x, y))
                if moved is not None:
                    found[name] = max(found.get(name, 0.0), moved)
        return found


def _labels(index: Value) -> str:
    assert isinstance(index, tuple)
    made = index.count(-1)
    return f"labels by name: {len(index) - made} kept" + (f", {made} new" if made else "")


def _shown(value: Value) -> str:
    if isinstance(value, int):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))


def _moved(a: Tensor, b: Tensor) -> float | None:
    """The relative distance of two outputs; None where they have no axes in common."""
    if a.shape != b.shape:
        if a.dim() != b.dim() or a.dim() < 3 or a.shape[0] != b.shape[0]:
            return None
        features = -1 if a.shape[-1] == b.shape[-1] else 1
        others = [axis for axis in range(1, a.dim()) if axis != features % a.dim()]
        a, b = a.mean(others), b.mean(others)
        if a.shape != b.shape:
            return None
    size = float(a.double().norm())
    return float((a.double() - b.double()).norm()) / size if size else None


def changes(
    source: Source,
    model: nn.Module,
    inputs: Mapping[str, tuple[int, ...]],
    arguments: Mapping[str, Any] | None = None,
    rules: Sequence[Rule] = (),
) -> Iterator[Change]:
    """The sizes that the model seems to want and the source does not have, likeliest first; none where they fit.
    A rule of the person's own that makes a tensor takes the place of the published one."""
    sizes = sizes_of(source)
    if sizes is None:
        return
    forced = _forced(source, sizes, rules)
    tried: list[Mapping[str, Value]] = []
    for wanted in [*islice(sizes.wanted(Body.of(model, inputs, arguments)), _MOST), {}]:
        after = {name: value for name, value in {**wanted, **forced}.items() if value != sizes.values[name]}
        if not after or after in tried:
            continue
        tried.append(after)
        yield _change(source, sizes, after, rules)


def _forced(source: Source, sizes: Sizes, rules: Sequence[Rule]) -> dict[str, Value]:
    """The vocabulary that a person's rules make."""
    own = sizes.values.get(VOCABULARY)
    theirs = remade(source, rules)
    if not isinstance(own, int) or not theirs:
        return {}
    made = _made(source, making(rules))
    lengths = {made[name].shape[0] for name in rows_of_tokens(sizes) if name in theirs}
    return {VOCABULARY: lengths.pop()} if len(lengths) == 1 else {}


def rows_of_tokens(sizes: Sizes) -> tuple[str, ...]:
    """The tensors that have a row for each token."""
    own = sizes.values.get(VOCABULARY)
    if not isinstance(own, int):
        return ()
    return tuple(sizes.resized({**sizes.values, VOCABULARY: own + 1}).rows)


def tables_of_tokens(source: Source) -> tuple[str, ...]:
    """Those that the source has; none where its family is not known, or has no sizes."""
    sizes = sizes_of(source)
    return tuple(name for name in (rows_of_tokens(sizes) if sizes is not None else ()) if name in source.checkpoint)


def tables_that_may_hold_tokens(model: nn.Module, source: Source) -> dict[str, int]:
    """{name: rows} of the target's tables of the source's width that are called as a vocabulary is; where none is, of
    those that are not called or long as another table is."""
    sizes, (first, *_) = sizes_of(source), tables_of_tokens(source)
    assert sizes is not None  # it has tables
    others = {value for name, value in sizes.values.items() if name != VOCABULARY}
    rows = Body.of(model).rows(source.checkpoint[first].shape[-1])
    plain = {name: count for name, count in rows.items() if not _OTHER_TABLES.search(name)}
    called = {name: count for name, count in plain.items() if _TOKENS.search(name)}
    return called or {name: count for name, count in plain.items() if count not in others}


def rows_for(model: nn.Module, source: Source, tokens: int) -> int:
    """The rows of a target's table of so many tokens: it may have more of them. ZooError where it has fewer."""
    found = tables_that_may_hold_tokens(model, source)
    if not found or tokens in found.values():
        return tokens
    larger = [count for count in found.values() if count > tokens]
    if not larger:
        name, count = max(found.items(), key=lambda each: each[1])
        raise ZooError(
            f"the tokenizer has {tokens:,} tokens, and {name} of the target {count:,} rows",
            kind="file",
            hint="give your module a row for each token, as in --set vocab_size=...",
        )
    return min(larger)


def by_token(source: Source, tokenizer: Any, model: nn.Module) -> tuple[tuple[Rule, ...], str]:
    """The rules that give each token of a person's tokenizer the row that it has in the source's, and how many were
    copied and made. `tokenizer`: what surgery.vocabulary.token_map takes; the source's lies beside its weights."""
    from surgery.rules import Derive
    from surgery.vocabulary import token_map

    sizes = sizes_of(source)
    names = tables_of_tokens(source)
    if sizes is None or not names:
        raise ZooError(
            f"{source.ref} has no table of tokens that is known, so a tokenizer says nothing of it", kind="unknown"
        )
    folder = source.located.weights.parent
    own = sizes.values[VOCABULARY]
    assert isinstance(own, int)
    found = token_map(folder, tokenizer, old_size=own)
    rows = rows_for(model, source, len(found.old))
    if rows != len(found.old):
        found = token_map(folder, tokenizer, old_size=own, new_size=rows)
    if not found.copied:
        raise ZooError(
            f"{tokenizer} and the tokenizer of {source.ref} share none of {len(found.old):,} tokens",
            kind="file",
            hint="nothing of the source's table would be left: is it a tokenizer of the same texts?",
        )
    rules = tuple(Derive(name, f'vocab_map({name}, rows="{found.rows}", seed=0)', implied=True) for name in names)
    return rules, str(found)


def narrower(source: Source, runnable: PartProbe, model: nn.Module, arguments: Mapping[str, Any] | None) -> Rule:
    """The rule that makes the source as narrow as a target is. ZooError where its widths cannot be read off."""
    import surgery
    from surgery.coupling import coupled

    def one(name: str) -> int:
        sizes = {group.size for group in coupling.groups if group.name == name}
        if len(sizes) > 1 or (name == "hidden" and not sizes):
            raise _unshrinkable(source, f"the source has {len(sizes) or 'no'} widths called {name}")
        return sizes.pop() if sizes else 0

    run = surgery.Probe(runnable.reference, runnable.run, None, [runnable.inputs(0, runnable.variants[0])])
    coupling = coupled(runnable.reference, run)
    hidden, inner, heads = one("hidden"), one("inner"), one("heads")
    body = Body.of(model, None, arguments)
    vectors = Counter(shape[0] for shape in body.shapes.values() if len(shape) == 1)
    if not vectors:
        raise _unshrinkable(source, "the target has no vectors, by which its width could be told")
    to = vectors.most_common(1)[0][0]
    sizes = {"hidden": to} if to != hidden else {}
    if heads and to != hidden:
        if heads * to % hidden:
            raise _unshrinkable(
                source, f"its {heads} heads of {hidden // heads} stay whole, and {to} of {hidden} is no number of them"
            )
        sizes["heads"] = heads * to // hidden
    if inner:
        beside = {n for shape in body.shapes.values() if len(shape) == 2 and to in shape for n in shape}
        said = [n for n in body.words(*_INNER) if isinstance(n, int) and n in beside]
        alike = [n for n in (inner * to // hidden, inner) if n in beside]
        beside -= {to, 2 * to, 3 * to, *body.rows(to).values()}
        found = [*said, *alike, *sorted(beside, key=lambda n: -vectors[n])]
        if found and found[0] != inner:
            sizes["inner"] = found[0]
    if not sizes:
        raise _unshrinkable(source, "the target is as wide as the source")
    return surgery.rules.shrink(**sizes)


def _unshrinkable(source: Source, why: str) -> ZooError:
    hint = "say the widths yourself, in a file for --rules: shrink(hidden=384, inner=1536, heads=6)"
    return ZooError(f"{source.ref} cannot be shrunk by itself: {why}", kind="file", hint=hint)


def of_plan(plan: surgery.Plan, but: Container[str] = ()) -> tuple[Rule, ...]:
    """The rules that a plan's rows show: what an approximate op made of a source tensor, `but` of those that other
    rules make, or that belongs to a change of the body, which the plan's own rules ask for."""
    from surgery import ops
    from surgery.expr import Call, Expr, Name
    from surgery.rules import Derive, Reshape, checked

    asked = {rule.word for rule in checked(plan.rules) if isinstance(rule, Reshape)}
    found: dict[str, str] = {}

    def chain(expr: Expr) -> str:
        """The tensor at the end of a chain of ops that take one."""
        while isinstance(expr, Call) and len(expr.args) == 1:
            expr = expr.args[0]
        return expr.name if isinstance(expr, Name) else ""

    def walk(expr: Expr) -> None:
        if isinstance(expr, Name):
            return
        name = chain(expr)
        if ops.get(expr.op).kind == "approximate" and name and name not in but and expr.op not in asked:
            found.setdefault(name, str(expr))
            return
        for arg in expr.args:
            walk(arg)

    for row in plan.rows:
        if row.expr is not None:
            walk(row.expr)
    return tuple(Derive(name, text, implied=True) for name, text in found.items())


def sizes_of(source: Source) -> Sizes | None:
    """What the entry's plugin says of its sizes; None where it says nothing."""
    from zoo.api import needs
    from zoo.resolving import imported

    if source.entry is None or source.entry.sizes is None:
        return None
    with needs(source.entry.requires):
        found = imported(source.entry.sizes)(source.checkpoint, source.config)
    if found is not None and not isinstance(found, Sizes):
        raise ZooError(f"{source.entry.sizes} gave a {type(found).__name__}, and not zoo.Sizes", kind="plugin")
    return found


def _change(source: Source, sizes: Sizes, after: Mapping[str, Value], own: Sequence[Rule]) -> Change:
    from surgery.rules import Derive, Without

    resized = sizes.resized({**sizes.values, **after})
    theirs = remade(source, own)
    rules: tuple[Rule, ...] = tuple(
        Derive(name, text, implied=True)
        for name, text in resized.rows.items()
        if name in source.checkpoint and name not in theirs
    )
    rules += tuple(Without(name, "it only counts, and a model of other sizes counts anew") for name in resized.without)
    config = resized.configured(source.config)
    moved = replace(source, checkpoint=_made(source, (*rules, *making(own))), config=config)
    return Change(moved, rules, sizes.values, after, resized)


def derived(source: Source, rules: Sequence[Rule]) -> Source:
    """The source as a person's rules make its tensors; itself where they make none."""
    return replace(source, checkpoint=_made(source, making(rules))) if making(rules) else source


def _made(source: Source, rules: Sequence[Rule]) -> surgery.Checkpoint:
    """The checkpoint that rules make of the source's."""
    from surgery.beside import joined
    from surgery.derivation import derivation
    from surgery.derived import derive

    base = joined(source.checkpoint, rules)
    return derive(base, derivation(base, rules).rows)


def making(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Those of a person's rules that make tensors for a reference of other sizes."""
    from surgery.rules import Derive, Resize, Transplant

    return tuple(rule for rule in rules if isinstance(rule, (Derive, Resize, Transplant)))


def remade(source: Source, rules: Sequence[Rule]) -> dict[str, Any]:
    """{tensor: expression} of what these rules make."""
    from surgery.beside import joined
    from surgery.derivation import derivation
    from surgery.expr import Name

    rows = derivation(joined(source.checkpoint, making(rules)), making(rules)).rows
    return {name: expr for name, expr in rows.items() if expr != Name(name)}


def noted(report: surgery.Report, change: Change, drift: Mapping[str, float]) -> surgery.Report:
    """The report, with the sizes and the drift said: on the whole, and of each row that was resized."""
    from surgery.rules import Derive

    moved = ", ".join(f"{name} moves by {value:.1%}" for name, value in drift.items() if value > _ROUNDING)
    if not drift:
        cost = "what that costs cannot be compared"
    elif not moved:
        cost = "what both sizes take gives the same"
    else:
        cost = f"before any training, on the same thing at both sizes, {moved}"
    made = {rule.name for rule in change.rules if isinstance(rule, Derive)}
    rows = tuple(
        replace(row, note=f"{change}; {cost}") if not row.note and made.intersection(row.sources) else row
        for row in report.plan.rows
    )
    note = f"resized: {change}; {cost}"
    plan = replace(report.plan, notes=(*report.plan.notes, note), rows=rows)
    return replace(report, plan=plan, rows=_renoted(report, plan))


def _renoted(report: surgery.Report, plan: surgery.Plan) -> Any:
    notes = {row.target: row.note for row in plan.rows}
    return tuple(
        replace(row, note=notes[row.name]) if not row.note and notes.get(row.name) else row for row in report.rows
    )
