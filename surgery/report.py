"""What a graft did, for the person and for their optimizer: verdict, accounting, proof, parameter groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.expr import Call, kind, names
from surgery.fold import folded
from surgery.ops import did_you_mean
from surgery.plan import Plan, Row, Status

if TYPE_CHECKING:
    from torch import nn

    from surgery.proof import Proof

DROPPED = "dropped"
_PRETRAINED = frozenset({Status.FILLED, Status.SYNTHESISED, Status.CONSTANT, Status.KEPT})


class Verdict(StrEnum):
    """What is known of a graft, best first."""

    PROVEN = "proven"  # the same function, by running both in float64
    ADAPTED = "adapted"  # proven but for the rows that an approximate or lossy op made, which are named
    CONSISTENT = "consistent"  # exactly one mapping fits; nothing was run
    AMBIGUOUS = "ambiguous"  # several mappings fit, and nothing told them apart
    REFUTED = "refuted"  # running showed another function

    @property
    def rank(self) -> int:
        """4 for proven down to 0 for refuted: `verdict.rank >= Verdict("adapted").rank`."""
        return len(Verdict) - 1 - list(Verdict).index(self)


@dataclass(frozen=True)
class ReportRow:
    """One target tensor, or one source tensor that was dropped."""

    name: str
    sources: tuple[str, ...]
    op: str  # the outermost op; "copy" for a tensor as it is; "" where nothing was computed
    kind: str  # exact, preserving, approximate or lossy; "" where nothing was computed
    status: str  # a plan's Status, or "dropped"
    expr: str = ""
    note: str = ""  # why it is new, constant, dropped ...; the tensor it is tied to

    @classmethod
    def of(cls, row: Row, plan: Plan, dtype_of: Callable[[str], str] | None = None) -> ReportRow:
        """The report of a plan's row; a tied one has sources, op and kind of the tensor it is tied to. With the
        source's types a cast is known to be exact or lossy."""
        note = row.note or (f"tied to {row.tied_to}" if row.tied_to is not None else "")
        expr = _root(plan, row).expr
        if expr is None:
            return cls(row.target, (), "", "", row.status.value, note=note)
        op = expr.op if isinstance(expr, Call) else "copy"
        return cls(row.target, names(expr), op, kind(expr, dtype_of), row.status.value, str(expr), note)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "sources": list(self.sources),
            "op": self.op,
            "kind": self.kind,
            "status": self.status,
            "expr": self.expr,
            "note": self.note,
        }


def _root(plan: Plan, row: Row) -> Row:
    """The row that gives the values, followed through ties; a circle of ties ends where it closes."""
    seen = {row.target}
    while row.tied_to is not None and row.tied_to in plan.by_target and row.tied_to not in seen:
        row = plan.by_target[row.tied_to]
        seen.add(row.target)
    return row


def _by_depth(
    model: nn.Module, parameters: list[nn.Parameter], lr: float, decay: float
) -> list[tuple[str, list[nn.Parameter], float]]:
    """(name, parameters, learning rate) for each depth of the stacks of repeated blocks."""
    if not 0 < decay <= 1:
        raise SurgeryError(f"layer_decay is {decay}, and it must be above 0 and at most 1")
    mine = set(parameters)
    named = [(name, p) for name, p in model.named_parameters() if p in mine]
    stacks: dict[str, set[int]] = {}  # the path of a list of blocks: the numbers in it
    for name, _ in named:
        for found in re.finditer(r"(?:^|\.)(\d+)\.", name):
            stacks.setdefault(name[: found.start(1)], set()).add(int(found.group(1)))
    # Of lists inside one another, the outer one counts; a list of a few unlike modules is no stack, but counts as one.
    outer = {s for s, numbers in stacks.items() if len(numbers) > 1}
    outer = {s for s in outer if not any(o != s and s.startswith(o) for o in outer)}
    if not outer:
        raise SurgeryError(
            "layer_decay needs repeated blocks, and the names of the pretrained parameters show none",
            hint="Leave layer_decay out, or give the blocks of the model a list of their own (nn.ModuleList).",
        )
    depth: dict[int, list[nn.Parameter]] = {}
    seen: set[str] = set()
    for name, parameter in named:
        stack = next((s for s in outer if name.startswith(s)), None)
        if stack is not None:
            seen.add(stack)
            steps = max(stacks[stack]) - int(name[len(stack) :].split(".")[0])
        else:  # what is registered before the first stack is below it
            steps = max(max(stacks[s]) for s in outer) + 1 if not seen else 0
        depth.setdefault(steps, []).append(parameter)
    return [
        (f"pretrained, {steps} below the output" if steps else "pretrained", found, lr * decay**steps)
        for steps, found in sorted(depth.items(), reverse=True)
    ]


def _another_model(message: str, name: str, known: set[str]) -> SurgeryError:
    return SurgeryError(
        f"{message}{did_you_mean(name, known)}",
        hint="Pass the module that was grafted, as it was then; wrap or extend it afterwards.",
    )


@dataclass(frozen=True)
class Report:
    """What a graft did. `str` of it is a few lines; `as_dict` is all of it."""

    verdict: Verdict
    plan: Plan
    rows: tuple[ReportRow, ...]  # one for each target tensor, then one for each dropped source tensor
    proof: Proof | None = None
    message: str = ""  # what a person should know first: why it is ambiguous or refuted, what was not run

    @classmethod
    def of(
        cls,
        plan: Plan,
        verdict: str,
        *,
        proof: Proof | None = None,
        message: str = "",
        dtype_of: Callable[[str], str] | None = None,
    ) -> Report:
        """The report of a plan. `dtype_of` gives the types of source tensors (see surgery.expr.kind)."""
        rows = [ReportRow.of(row, plan, dtype_of) for row in plan.rows]
        rows += [ReportRow(drop.source, (), "", "", DROPPED, note=drop.reason) for drop in plan.dropped]
        return cls(Verdict(verdict), plan, tuple(rows), proof, message or plan.diagnosis)

    @property
    def candidates(self) -> tuple[Plan, ...]:
        """The plans that nothing told apart, where the verdict is ambiguous."""
        return self.plan.candidates

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors ended in which way, those that occur."""
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in (*(s.value for s in Status), DROPPED) if found[status]}

    def param_groups(
        self,
        model: nn.Module,
        *,
        lr: float,
        new_lr: float | None = None,
        decay: float | None = None,
        layer_decay: float | None = None,
        freeze: bool = False,
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, pretrained and new parameters apart; each says which it is under "name".

        Pretrained parameters learn with `lr`, new ones with `new_lr` (or `lr`). A tied parameter is in one group, once,
        and counts as pretrained where any of its names is. `decay` is the weight decay of parameters with two axes or
        more; biases and norms then get none; left out, the optimizer's own default holds. `freeze` turns gradients
        of the pretrained parameters off and leaves these out. Groups without parameters are left out.

        `layer_decay` (0 < d <= 1) makes the learning rate of pretrained parameters smaller the farther they are from
        the output: in a stack of L repeated blocks, block i (from 0) learns with lr * d ** (L - 1 - i), what is
        registered before the stack with lr * d ** L, and what comes after it with lr (Clark et al. 2020, ELECTRA; Bao
        et al. 2021, BEiT). Raises SurgeryError where the pretrained parameters hold no repeated blocks.
        """
        pretrained, new = self._parted(model)
        if freeze and not new:
            raise SurgeryError(
                "every parameter of the model is pretrained, so that nothing is left to train with freeze=True",
                hint="Leave freeze out, or give the model a head of its own.",
            )
        if freeze:
            for parameter in pretrained:
                parameter.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        parts = [("pretrained", [] if freeze else pretrained, lr)]
        if layer_decay is not None and not freeze:
            parts = _by_depth(model, pretrained, lr, layer_decay)
        for name, parameters, rate in (*parts, ("new", new, lr if new_lr is None else new_lr)):
            if decay is None:
                groups.append({"name": name, "params": parameters, "lr": rate})
                continue
            wide = [parameter for parameter in parameters if parameter.dim() >= 2]
            flat = [parameter for parameter in parameters if parameter.dim() < 2]
            groups.append({"name": name, "params": wide, "lr": rate, "weight_decay": decay})
            groups.append({"name": f"{name}, no decay", "params": flat, "lr": rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def _parted(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The model's parameters, each once: those with pretrained values, and the new ones. The model must be the one
        that was grafted: every parameter reported, every reported tensor there."""
        rows = self.plan.by_target
        several_names: dict[nn.Parameter, list[str]] = {}  # parameters hash by identity: a tied one has several names
        for name, parameter in model.named_parameters(remove_duplicate=False):
            several_names.setdefault(parameter, []).append(name)
        known = {name for several in several_names.values() for name in several}
        known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        for name in rows:
            if name not in known:
                raise _another_model(f"the report speaks of {name}, which the model does not have", name, known)
        pretrained: list[nn.Parameter] = []
        new: list[nn.Parameter] = []
        for parameter, several in several_names.items():
            ends = {_root(self.plan, rows[name]).status for name in several if name in rows}
            if not ends:
                message = f"the model has a parameter {several[0]}, which the report does not know"
                raise _another_model(message, several[0], set(rows))
            (pretrained if ends & _PRETRAINED else new).append(parameter)
        return pretrained, new

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": self.verdict.value,
            "message": self.message,
            "counts": self.counts,
            "rows": [row.as_dict() for row in self.rows],
            "symmetries": list(self.plan.symmetries),
            "notes": list(self.plan.notes),
            "candidates": [
                {row.target: str(row.expr) for row in candidate.rows if row.expr is not None}
                for candidate in self.candidates
            ],
            "proof": self.proof.as_dict() if self.proof is not None else None,
        }

    def __str__(self) -> str:
        """Verdict, accounting, and what is new, adapted or dropped: what a person looks at first."""
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from surgery import notebook

        return notebook.report(self)

    def _lines(self) -> Iterator[str]:
        counted = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        yield f"{self.verdict}: {counted}" if counted else f"{self.verdict}"
        if self.message:
            yield self.message
        for title, rows in (
            ("adapted", [row for row in self.rows if row.kind in ("approximate", "lossy")]),
            ("new", [row for row in self.rows if row.status == Status.NEW]),
            ("dropped", [row for row in self.rows if row.status == DROPPED]),
        ):
            if rows:
                first = ", ".join(row.name for row in rows[:4])
                yield f"{title}: {first}{f' and {len(rows) - 4} more' if len(rows) > 4 else ''}"
        yield from folded([f"any choice is right: {symmetry}" for symmetry in self.plan.symmetries])
