"""Puts defects into correct grafts, and measures what is said of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import running, surface
from surgery.expr import Name
from surgery.judge import Judge
from surgery.plan import Dropped, Stamp, Status
from tests.mutations import heldout_weights
from tests.mutations.defects import Damage, Slip, damages, slips
from tests.mutations.families import FAMILIES, Right, right

CHANGES = 1e-9  # relative to the largest output; less is no change of the function
GATES = (1e-3, 1e-4, 1e-5)
Defect = Slip | Damage


@dataclass(frozen=True)
class Outcome:
    """What was measured of one defect."""

    defect: Defect
    moved: float  # the lifted float64 twin's outputs, on the proof's inputs
    verdict: str
    module: str
    cause: str
    fix: str
    line: bool  # whether a file and line were named
    passes_gate: dict[float, bool]  # torch.allclose in float32 with this rtol and atol

    def __str__(self) -> str:
        right = self.verdict == "refuted" and self.located and self.named if self.changes else self.verdict == "proven"
        wanted = f" (wanted {self.defect.where}, {self.defect.causes})" if self.changes and not right else ""
        found = (
            f" at {self.module!r}: {self.cause!r}{wanted}: {self.fix}" if self.changes else ", which changes nothing"
        )
        return f"{'ok ' if right else 'BAD'} {self.defect.name}: {self.verdict}{found}"

    @property
    def changes(self) -> bool:
        return self.moved > CHANGES

    @property
    def located(self) -> bool:
        return any(self.module.startswith(w) if w.endswith(".") and w else self.module == w for w in self.defect.where)

    @property
    def named(self) -> bool:
        return self.cause in self.defect.causes


def all_defects(families: Iterable[str] = tuple(FAMILIES)) -> Iterator[Defect]:
    """Every slip and every damage of these families."""
    families = list(families)
    yield from (s for s in (*slips(), *heldout_weights.slips()) if s.family in families)
    for name in families:
        made = heldout_weights.damages if name in heldout_weights.HELDOUT else damages
        yield from made(name, right_values(right(name)))


def chosen(only: str = "", sample: int = 0, seed: int = 0, *, second: bool = False) -> list[Defect]:
    """Those whose name holds `only`; of them `sample` (0: all), drawn so that kinds come before repetitions of one.
    `second`: of the second set, else of the first."""
    whole = heldout_weights.HELDOUT if second else FAMILIES
    families = [f for f in whole if not only or f.startswith(only.split(" /")[0])] or list(whole)
    found = [d for d in all_defects(families) if only in d.name]
    if not sample:
        return found
    random.Random(seed).shuffle(found)
    nth: dict[str, int] = {}
    ranked = []
    for defect in found:
        nth[defect.kind] = nth.get(defect.kind, 0) + 1
        ranked.append((nth[defect.kind], defect))
    return [d for _, d in sorted(ranked, key=lambda r: r[0])][:sample]


def judged_of(defect: Defect) -> Outcome:
    """The outcome of one defect of a family."""
    return judged(right(defect.family), defect)


def right_values(graft: Right) -> dict[str, Tensor]:
    """What the plan puts into the target, unrounded."""
    values = running.unrounded(graft.plan, surgery.open(graft.source))
    return {n: v.detach() for n, v in values.items()}


def put_in(graft: Right, defect: Defect) -> tuple[nn.Module, dict[str, Tensor], surgery.Plan]:
    """(target, source, plan) with the defect. Damaged values stand in the source under names of their own, which the
    reference does not have."""
    if isinstance(defect, Slip):
        return graft.target(**defect.options), graft.source, graft.plan
    source = {**graft.source, **{f"damaged.{n}": v.contiguous() for n, v in defect.values.items()}}
    rows = tuple(
        replace(row, status=Status.FILLED, expr=Name(f"damaged.{row.target}"), tied_to=None)
        if row.target in defect.values
        else row
        for row in graft.plan.rows
    )
    opened = surgery.open(source)
    plan = replace(graft.plan, rows=rows, source=Stamp.of(opened))
    gone = tuple(Dropped(n, "damaged") for n in graft.plan.used if n not in plan.used)
    return graft.target(), source, replace(plan, dropped=plan.dropped + gone)


def judged(graft: Right, defect: Defect) -> Outcome:
    """Put one defect in and ask for a proof."""
    target, source, plan = put_in(graft, defect)
    probe = graft.probe
    proof = surgery.verify(source, target, plan, probe=probe)
    parted = proof.divergence
    expected, got = outputs(graft, graft.target(), graft.source, graft.plan), outputs(graft, target, source, plan)
    moved = max(surface.residual(a, b) for a, b in zip(expected, got, strict=True))
    return Outcome(
        defect,
        moved,
        proof.verdict,
        parted.target_module if parted is not None else "",
        parted.cause if parted is not None else "",
        (parted.fix or parted.why) if parted is not None else "",
        parted is not None and parted.line > 0,
        gates(graft, target, source, plan),
    )


def outputs(graft: Right, target: nn.Module, source: dict[str, Tensor], plan: surgery.Plan) -> list[Tensor]:
    """The target's, as a lifted float64 twin, on all inputs of the proof."""
    judge = Judge(surgery.open(source), target, plan, graft.probe)
    twin = judge.target_twin()
    return [t for label, x in judge.inputs for t in judge.target_side.outputs(twin, x, label)]


def gates(graft: Right, target: nn.Module, source: dict[str, Tensor], plan: surgery.Plan) -> dict[float, bool]:
    """Whether the float32 outputs of both sides pass torch.allclose on the same inputs."""
    values = running.unrounded(plan, surgery.open(source))
    plain = running.build(target, values, torch.device("cpu"), torch.float32)
    found = dict.fromkeys(GATES, True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _, x in graft.probe.proof_inputs():
            a, b = graft.probe.run_reference(graft.reference, x), graft.probe.call_target(plain, x)
            for gate in GATES:
                found[gate] &= a.shape == b.shape and torch.allclose(a, b, rtol=gate, atol=gate)
    return found


def described(outcomes: list[Outcome]) -> dict[str, Any]:
    """The figures."""
    count = [o for o in outcomes if o.changes]
    refuted = [o for o in count if o.verdict == "refuted"]
    return {
        "defects": len(outcomes),
        "kinds": len({o.defect.kind for o in outcomes}),
        "families": len({o.defect.family for o in outcomes}),
        "change the function": len(count),
        "refuted": len(refuted),
        "located": sum(o.located for o in refuted),
        "cause": sum(o.named and o.located for o in refuted),
        "line": sum(o.line for o in refuted),
        **{f"allclose {gate:g}": sum(not o.passes_gate[gate] for o in count) for gate in GATES},
    }
