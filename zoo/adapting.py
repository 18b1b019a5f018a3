"""A target of other sizes: which ones it wants, the reference that has them, and what the change costs.

The sizes are the entry's business (zoo.Sizes). Here they are tried: the checkpoint with its tensors resized and the
model of those sizes take the place of the checkpoint and its reference, and the graft is as ever. What was resized
stands in the plan's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.sizes import Body, Resized, Sizes, Value

if TYPE_CHECKING:
    from torch import Tensor, nn

    import surgery
    from surgery.rules import Rule
    from zoo.entry import PartProbe
    from zoo.grafting import Source

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

    def __str__(self) -> str:
        said = [f"{name} {_shown(self.before[name])} -> {_shown(value)}" for name, value in self.after.items()]
        return ", ".join(said)

    def reference(self) -> PartProbe | None:
        """The model of these sizes, holding the resized tensors."""
        return self.source.reference()

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
                moved = _moved(x, y)
                if moved is not None:
                    found[name] = max(found.get(name, 0.0), moved)
        return found


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
    sizes = _sizes(source)
    if sizes is None:
        return
    tried: list[Mapping[str, Value]] = []
    for wanted in sizes.wanted(Body.of(model, inputs, arguments)):
        after = {name: value for name, value in wanted.items() if value != sizes.values[name]}
        if not after or after in tried:
            continue
        tried.append(after)
        yield _change(source, sizes, after, rules)
        if len(tried) == _MOST:
            return


def _sizes(source: Source) -> Sizes | None:
    from zoo.api import needs
    from zoo.grafting import imported

    if source.entry is None or source.entry.sizes is None:
        return None
    with needs(source.entry.requires):
        found = imported(source.entry.sizes)(source.checkpoint, source.config)
    if found is not None and not isinstance(found, Sizes):
        raise ZooError(f"{source.entry.sizes} gave a {type(found).__name__}, and not zoo.Sizes", kind="plugin")
    return found


def _change(source: Source, sizes: Sizes, after: Mapping[str, Value], own: Sequence[Rule]) -> Change:
    from surgery.derived import derive
    from surgery.rules import Derive, derivation

    resized = sizes.resized({**sizes.values, **after})
    theirs = remade(source, own)
    rules = tuple(
        Derive(name, text, implied=True)
        for name, text in resized.rows.items()
        if name in source.checkpoint and name not in theirs
    )
    rows = derivation(source.checkpoint, (*rules, *making(own))).rows
    config = resized.configured(source.config)
    moved = replace(source, checkpoint=derive(source.checkpoint, rows), config=config)
    return Change(moved, rules, sizes.values, after, resized)


def derived(source: Source, rules: Sequence[Rule]) -> Source:
    """The source as a person's rules make its tensors; itself where they make none."""
    from surgery.derived import derive
    from surgery.rules import derivation

    if not making(rules):
        return source
    rows = derivation(source.checkpoint, making(rules)).rows
    return replace(source, checkpoint=derive(source.checkpoint, rows))


def making(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Those of a person's rules that make tensors for a reference of other sizes."""
    from surgery.rules import Derive, Resize

    return tuple(rule for rule in rules if isinstance(rule, (Derive, Resize)))


def remade(source: Source, rules: Sequence[Rule]) -> dict[str, Any]:
    """{tensor: expression} of what these rules make."""
    from surgery.expr import Name
    from surgery.rules import derivation

    rows = derivation(source.checkpoint, making(rules)).rows
    return {name: expr for name, expr in rows.items() if expr != Name(name)}


def noted(report: surgery.Report, change: Change, drift: Mapping[str, float]) -> surgery.Report:
    """The report, with the sizes and the drift said: on the whole, and of each row that was resized."""
    moved = ", ".join(f"{name} moves by {value:.1%}" for name, value in drift.items() if value > _ROUNDING)
    if not drift:
        cost = "what that costs cannot be compared"
    elif not moved:
        cost = "what both sizes take gives the same"
    else:
        cost = f"before any training, on the same thing at both sizes, {moved}"
    made = {rule.name for rule in change.rules if hasattr(rule, "name")}
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
