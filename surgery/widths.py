"""Other widths for a model: every tensor that shares the dimension changes with it.

    widen(model, example, "h.*.mlp", to=4096)                 # the neurons of these MLPs, repeated at random
    clone_width(model, example, times=2)                      # every width, uniformly
    shrink_width(model, example, {"hidden": 384, "heads": 6})
    prune_heads(model, example, "h.3.attn", heads=[0, 5])
    mha_to_gqa(model, example, "layers.*.self_attn", kv_heads=2)

`model` is an nn.Module and is not changed; `example` its arguments (a tensor, a tuple, a dict) or a Probe. Each returns
a surgery.body.Reshaped: a plan, the edited copy, the kind and the drift. Whether a change preserves the function is
decided by structure (does a norm reduce over the axis?) and confirmed by running in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery import twin
from surgery.body import (
    Change,
    Reshaped,
    changed,
    drift,
    edited,
    indices,
    infos,
    outputs,
    plan_of,
    through,
    values_of,
)
from surgery.coupling import Coupling, Group, coupled
from surgery.errors import SurgeryError
from surgery.expr import Expr, Name, call
from surgery.mapper.record import MOVES, _name
from surgery.ops import Kind, Value
from surgery.ops.width import evenly, replicas
from surgery.plan import Plan
from surgery.proof import GATE
from surgery.running import own_tensors
from surgery.stand_in import without_heads
from surgery.unit_spaces import Index, Space, find, index_of

Where = str | Group | Mapping[Any, int]  # of a module, the name of a group, or a Group, the size


# --- the changes -----------------------------------------------------------------------------------------------------


def widen(
    model: nn.Module, example: Any, where: Where, *, to: int | None = None, seed: int = 0, uniform: bool = False
) -> Reshaped:
    """More units: old ones are repeated at random (`uniform`: each equally often), and the weights that leave them are
    divided by the number of replicas.

    where: a module ("h.*.mlp": all widths within it), the name of a group ("hidden", "inner", "heads"), a Group, or
        {either: size}. Heads are repeated whole. to: the new size. Preserving on axes that no norm reduces over, and
        with `uniform` on those too; approximate else.

    Rule: Net2WiderNet (Chen et al., arXiv 1511.05641). SurgeryError where nothing is found, where the units cannot be
    changed, or `to` is smaller.
    """
    coupling = coupled(model, example)
    spread = "even" if uniform else "random"
    changes: dict[Space, Change] = {}
    groups = _targets(coupling, where, to, ("inner", "heads", "hidden"))
    for group, size in groups:
        if size < group.size:
            raise SurgeryError(f"{group}: {size} units are fewer", hint="Use shrink_width to take units away.")
        if uniform and size % group.size:
            raise SurgeryError(
                f"{group}: {size} units are no multiple of {group.size}, so not each can be repeated equally often",
                hint=f"Widen to {group.size * (size // group.size + 1)}, or leave out uniform.",
            )
        index = np.array(replicas(group.size, size, seed, spread))
        changes[find(group.space)] = Change(index, "widen", {"seed": 0 if uniform else seed, "spread": spread})
    return _repeated(coupling, [group for group, _ in groups], changes)


def clone_width(model: nn.Module, example: Any, *, times: int = 2, where: str | Group | None = None) -> Reshaped:
    """Every width `times` as large: W.repeat(n0, n1) / n1, biases and norms repeated, head width as it was. Preserving,
    norms included. A tied output embedding keeps its tie: the norm before it is divided instead.

    where: as of widen; left out, the hidden width, every MLP's and every attention's heads.

    Rule: HyperCloning (Samragh et al., arXiv 2409.12903). SurgeryError as of widen.
    """
    if times < 1:
        raise SurgeryError(f"times={times}: a width can be cloned 1 or more times", hint="Use shrink_width for fewer.")
    coupling = coupled(model, example)
    names = ("hidden", "inner", "heads")
    groups = (
        [group for name in names for group in coupling.groups if group.name == name]
        if where is None
        else list(coupling.find(where, *names))
    )
    for group in groups:
        _changeable(group)
    changes = {
        find(group.space): Change(np.tile(np.arange(group.size), times), "widen", {"spread": "even"})
        for group in groups
    }
    return _repeated(coupling, groups, changes)


def shrink_width(model: nn.Module, example: Any, where: Where, *, to: int | None = None) -> Reshaped:
    """Fewer units, evenly chosen: every (t/s)th where that is whole, else round(linspace(0, t - 1, s)). Heads stay
    whole, fused projections are cut each, tied tensors stay tied. Lossy.

    where, to: as of widen. Rule: weight selection (Xu et al., arXiv 2311.18823). SurgeryError as of widen.
    """
    coupling = coupled(model, example)
    changes: dict[Space, Change] = {}
    groups = _targets(coupling, where, to, ("inner", "heads", "hidden"))
    for group, size in groups:
        if not 0 < size <= group.size:
            raise SurgeryError(f"{group}: {size} units cannot be chosen from {group.size}", hint="Use widen for more.")
        changes[find(group.space)] = Change(np.array(evenly(group.size, size)), "shrink_width", {})
    return _chosen(coupling, [group for group, _ in groups], changes)


def prune_heads(model: nn.Module, example: Any, where: str | Group, *, heads: Sequence[int]) -> Reshaped:
    """The attention without these heads: their rows of q, k and v and their columns of the output projection go. Where
    queries share key and value heads, a head is one of those with its queries. Lossy; preserving where the output
    projection's columns are zero.

    SurgeryError where a number is no head, or none would be left.
    """
    coupling = coupled(model, example)
    groups = list(coupling.find(where, "heads"))
    changes: dict[Space, Change] = {}
    for group in groups:
        _changeable(group)
        wrong = [head for head in heads if not 0 <= head < group.size]
        if wrong or len(set(heads)) >= group.size:
            what = f"{wrong[0]} is none of them" if wrong else "one has to stay"
            raise SurgeryError(f"{group}: {what}", hint=f"Heads count from 0 to {group.size - 1}.")
        kept = np.array([head for head in range(group.size) if head not in set(heads)])
        params: dict[str, Value] = {"heads": group.size, "drop": tuple(sorted(set(heads)))}
        changes[find(group.space)] = Change(kept, "prune_heads", params)
    found = _chosen(coupling, groups, changes)
    if found.module is not None or not _summed_only(groups):
        return found
    index = {group: changes[find(group.space)].index for group in groups}
    return replace(found, stand_in=without_heads(coupling, values_of(found.plan, model), index))


# --- what they share -------------------------------------------------------------------------------------------------


def _changeable(group: Group) -> None:
    if group.refusal:
        raise SurgeryError(
            f"{group} cannot be changed: {group.refusal}", hint="Name other modules, or give the body another way."
        )


def _targets(coupling: Coupling, where: Where, to: int | None, names: tuple[str, ...]) -> list[tuple[Group, int]]:
    if isinstance(where, Mapping):
        found = [(group, size) for each, size in where.items() for group in coupling.find(each, *names)]
    elif to is None:
        raise SurgeryError("to which size?", hint="Give to=..., or {name: size} in place of a name.")
    else:
        found = [(group, to) for group in coupling.find(where, *names)]
    for group, _ in found:
        _changeable(group)
    return list({find(group.space): (group, size) for group, size in found}.values())


@dataclass
class _Shares:
    """The axes (parameter, axis) that are divided by how often a unit is repeated."""

    axes: set[tuple[int, int]]
    notes: list[str]


def _shares(coupling: Coupling, chosen: Mapping[Space, Index]) -> _Shares:
    """Every axis that a product sums over. One that is also looked up or made elsewhere (a tied embedding) cannot be
    divided: then the gain and bias before that product are, where they lead to nothing else."""
    flow = coupling.flow
    ins = {(use.param, use.axis) for use in flow.uses if use.role == "in"}
    others = {(use.param, use.axis) for use in flow.uses if use.role != "in"}
    out = _Shares(set(ins - others), [])
    for key in sorted(ins & others):
        vid, axis = key
        index = index_of(flow.axes[vid][axis], chosen)
        if len(np.unique(index)) == len(index):
            continue
        names = " = ".join(coupling.names(vid))
        for use in flow.uses:
            if (use.param, use.axis) == key and use.role == "in":
                before = _affine_before(coupling, use.data, use.node)
                if before is None:
                    raise SurgeryError(
                        f"{names}: axis {axis} is summed over in {flow.tape.nodes[use.node].module} and used otherwise "
                        "too, and no gain stands before that product that could be divided in its place",
                        hint="Untie the two before this change.",
                    )
                out.axes |= before
                listed = ", ".join(dict.fromkeys(coupling.names(vid)[0] for vid, _ in sorted(before)))
                out.notes.append(f"{names} stay tied: {listed} are divided in their place")
    return out


def _affine_before(coupling: Coupling, vid: int, node: int) -> set[tuple[int, int]] | None:
    """The axes of the gain and bias that make a value which only this product reads."""
    tape, flow = coupling.tape, coupling.flow
    found: set[tuple[int, int]] = set()
    given = set(tape.outputs())
    while True:
        value = tape.values[vid]
        if value.node < 0 or vid in given or tape.consumers[vid] != [node]:
            return None
        node = value.node
        made = tape.nodes[node]
        name = _name(made.op)
        data = [v for v in made.inputs if tape.values[v].data]
        uses = [use for use in flow.uses if use.node == node]
        if len(data) != 1:
            return None
        if uses:
            if name not in ("add", "mul") or any(tape.consumers[use.param] != [node] for use in uses):
                return None
            found |= {(use.param, use.axis) for use in uses}
            if name == "mul":
                return found
        elif not (name in MOVES or (name in ("mul", "div") and len(made.inputs) == 1)):
            return None
        vid = data[0]


def _rows(coupling: Coupling, changes: Mapping[Space, Change], shares: set[tuple[int, int]]) -> dict[str, Expr]:
    rows: dict[str, Expr] = {}
    for name in own_tensors(coupling.model):
        expr: Expr = Name(name)
        vid = coupling.tape.params.get(name, -1)
        spaces = coupling.flow.axes[vid] if vid >= 0 else []
        cloned = _cloned(spaces, changes, [(vid, axis) in shares for axis in range(len(spaces))])
        if cloned is not None:
            rows[name] = call("clone_width", expr, **cloned)
            continue
        for axis, space in enumerate(spaces):
            expr = changed(expr, space, changes, axis, share=(vid, axis) in shares)
        rows[name] = expr
    return rows


def _cloned(spaces: Sequence[Space], changes: Mapping[Space, Change], shares: list[bool]) -> dict[str, Any] | None:
    """The parameters of clone_width, where all that happens to a tensor is that axes are tiled whole."""
    chosen = indices(changes)
    times: list[int] = []
    for space in spaces:
        index = index_of(space, chosen)
        count = len(index) // max(1, find(space).size)
        if not np.array_equal(index, np.tile(np.arange(find(space).size), count)):
            return None
        times.append(count)
    divided = [axis for axis, count in enumerate(times) if count > 1 and shares[axis]]
    if len(divided) > 1 or all(count == 1 for count in times):
        return None
    return {"times": tuple(times), "inputs": divided[0] if divided else -1 if len(times) > 1 else 1}


def _plan(coupling: Coupling, rows: Mapping[str, Expr], chosen: Mapping[Space, Index]) -> Plan:
    why = {}
    for group in coupling.groups:
        if find(group.space) in chosen:
            for tensor in group.tensors:
                why[tensor] = f"it carries {group.name}, {group.size} -> {len(chosen[find(group.space)])}"
    tensors = infos({name: t.detach() for name, t in own_tensors(coupling.model).items()})
    return plan_of(tensors, rows, ties=coupling.ties(), why=why, description=type(coupling.model).__name__)


def _repeated(coupling: Coupling, groups: list[Group], changes: Mapping[Space, Change]) -> Reshaped:
    """Units repeated, and the sums over them kept."""
    chosen = indices(changes)
    reasons = [reason for group in groups if (reason := _not_preserved(group, chosen[find(group.space)]))]
    shares = _shares(coupling, chosen)
    plan = _plan(coupling, _rows(coupling, changes, shares.axes), chosen)
    values = values_of(plan, coupling.model)
    before = outputs(coupling, coupling.model)
    expected = through(coupling, chosen, before)
    differs: list[float | None] = []

    def accept(got: list[Tensor]) -> bool:
        differs.append(drift(expected, got))
        return differs[-1] is not None and (bool(reasons) or differs[-1] <= GATE)

    module, note = edited(coupling, values, chosen, accept, told=not reasons)
    known = [d for d in differs if d is not None]
    if module is None and known and not reasons:
        raise SurgeryError(
            f"by its structure this change preserves the function, and the outputs differ by {min(known):.1e}",
            hint="Please report this model: a rule for one of its operators is wrong. Nothing was changed.",
        )
    kind: Kind = "approximate" if reasons else "preserving"
    if module is None and not reasons:
        note += "; that the function stays is told by its structure alone, for nothing could be run"
    notes = (*dict.fromkeys([*reasons, *shares.notes, *_unknown(coupling)]), *([note] if note else []))
    return Reshaped(plan, module, kind, differs[-1] if module is not None else None, tuple(groups), notes)


def _not_preserved(group: Group, index: Index) -> str:
    """Why repeating these units changes the function, or nothing."""
    counts = np.bincount(index, minlength=group.size)
    if counts.max() == 1:
        return ""
    for mark, what in (
        ("softmax", "a softmax runs"),
        ("dot", "a product of two activations sums"),
        ("sum", "a sum runs"),
    ):
        if mark in group.marks:
            return f"{group.name}: {what} over these units in {group.marks[mark][0]}"
    if group.normed and len(set(counts.tolist())) > 1:
        where = (*group.marks.get("norm", ()), *group.marks.get("mean", ()))[0]
        return f"{group.name}: {where} takes a mean over these units, and they are not repeated equally often"
    return ""


def _unknown(coupling: Coupling) -> list[str]:
    idle = dict.fromkeys(tensor for group in coupling.groups if group.name == "unused" for tensor in group.tensors)
    notes = [f"no rule for {what}: what it touches was left alone" for what in coupling.unknown]
    return notes + ([f"not reached by the run, and left as they are: {', '.join(idle)}"] if idle else [])


def _chosen(coupling: Coupling, groups: list[Group], changes: Mapping[Space, Change]) -> Reshaped:
    """Units left out. Where nothing but sums reads them, the result is the model as it was with their outgoing weights
    at zero, and that is what is confirmed."""
    chosen = indices(changes)
    plan = _plan(coupling, _rows(coupling, changes, set()), chosen)
    values = values_of(plan, coupling.model)
    before = outputs(coupling, coupling.model)
    plain = _summed_only(groups)
    masked = through(coupling, chosen, outputs(coupling, coupling.model, _masked(coupling, chosen)))
    expected = through(coupling, chosen, before)
    differs: list[float | None] = []

    def accept(got: list[Tensor]) -> bool:
        apart = drift(masked, got)
        differs.append(drift(expected, got))
        return apart is not None and (not plain or apart <= GATE)

    module, note = edited(coupling, values, chosen, accept, told=plain)
    notes = _unknown(coupling) + ([note] if note else [])
    if module is not None and plain:
        notes.append("it computes what the model computes with the outgoing weights of these units at zero")
    moved = differs[-1] if module is not None else drift(expected, masked) if plain else None
    same = plain and (drift(before, masked) or 0.0) <= GATE
    return Reshaped(plan, module, "preserving" if same else "lossy", moved, tuple(groups), tuple(notes))


def _summed_only(groups: Sequence[Group]) -> bool:
    """Does nothing but sums read these units?"""
    reducing = ("softmax", "dot", "sum", "norm", "mean", "max", "output")
    return all(mark not in group.marks for group in groups for mark in reducing)


def _masked(coupling: Coupling, chosen: Mapping[Space, Index]) -> dict[str, Tensor]:
    """The model's tensors with zeros along every summed axis where a unit is left out."""
    out: dict[str, Tensor] = {}
    sums = {(use.param, use.axis) for use in coupling.flow.uses if use.role == "in"}
    own = own_tensors(coupling.model)
    for vid, axis in sorted(sums):
        space = coupling.flow.axes[vid][axis]
        gone = np.setdiff1d(np.arange(find(space).size), index_of(space, chosen))
        if not len(gone):
            continue
        for name in coupling.names(vid):
            value = out.get(name)
            value = twin.lift(own[name].detach()).clone() if value is None else value
            out[name] = value.index_fill(axis, torch.from_numpy(gone), 0.0)
    return out
