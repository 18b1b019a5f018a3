"""What a change of a model's body gives: a plan, the edited module, what kind of change it is, and what it did.

The module is a copy of the person's: same classes, other parameters, and the whole numbers that its modules keep of
their sizes set to the new ones. Which numbers these are is told by the dataflow and confirmed by running; where no
choice of them makes the model run, there is no module, and the plan alone is for a body that the person builds.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from surgery import twin
from surgery.checkpoint import TensorInfo
from surgery.coupling import Coupling, Group
from surgery.dtypes import name_of
from surgery.errors import SurgeryError
from surgery.expr import Expr, Name, call, evaluate_unrounded, infer, names
from surgery.mapper.record import MOVES, Tape, _name, record
from surgery.ops import Kind, Value
from surgery.plan import Dropped, Plan, Row, Stamp, Status
from surgery.running import own_tensors
from surgery.stand_in import StandIn
from surgery.surface import relative
from surgery.unit_spaces import Index, Space, factors, find, index_of, leaves, pieces

TRIES = 48  # choices of a module's numbers that are run at most


@dataclass(frozen=True)
class Reshaped:
    """A model of another size.

    plan: rows over the tensors of the model as it was; runs from file to file (surgery.write).
    module: the edited copy, or None where the body has to be built by hand (`notes` say why).
    kind: preserving (confirmed by running in float64 wherever there is a module), approximate, or lossy.
    drift: the largest relative change of an output on the example, before any training, in float64; None where
        nothing could be run or the outputs cannot be compared.
    groups: what was changed.
    stand_in: where there is no module, what computes the same, for a proof.
    """

    plan: Plan
    module: nn.Module | None
    kind: Kind
    drift: float | None
    groups: tuple[Group, ...] = ()
    notes: tuple[str, ...] = field(default=())
    stand_in: StandIn | None = field(default=None, repr=False)

    def __str__(self) -> str:
        drift = "not run" if self.drift is None else f"drift {self.drift:.1e}"
        return f"{self.kind}, {drift}" + "".join(f"\n  {note}" for note in self.notes)


# --- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of the units of one space: `index`, the old unit that each new one is, and the op of surgery.ops
    that says so: widen, shrink_width or prune_heads, with its parameters."""

    index: Index
    op: str
    params: Mapping[str, Value]


def indices(changes: Mapping[Space, Change]) -> dict[Space, Index]:
    """The positions alone."""
    return {space: change.index for space, change in changes.items()}


def changed(expr: Expr, space: Space, changes: Mapping[Space, Change], axis: int, *, share: bool) -> Expr:
    """The expression with the changes of the units that its axis carries: heads whole, fused parts each. `share`:
    repeated units are divided by how often they are."""
    space = find(space)
    parts = pieces(space)
    if not any(find(leaf) in changes for leaf in leaves(space)):
        return expr
    first = [find(factor) for factor in factors(parts[0])]
    if all([find(factor) for factor in factors(part)] == first for part in parts[1:]):
        return _changed_product(expr, first, len(parts), changes, axis, share)
    out, at = list[Expr](), 0
    for part in parts:
        piece = call("slice", expr, axis=axis, start=at, stop=at + part.size)
        out.append(changed(piece, part, changes, axis, share=share))
        at += part.size
    return call("cat", *out, axis=axis)


def _changed_product(
    expr: Expr, parts: Sequence[Space], left: int, changes: Mapping[Space, Change], axis: int, share: bool
) -> Expr:
    """One factor after the other: those before it count as fused parts, those behind it make its unit."""
    for at, factor in enumerate(parts):
        inner = [find(piece) for piece in pieces(factor)]
        unit = math.prod(part.size for part in parts[at + 1 :])
        if find(inner[0]) in changes and all(piece is inner[0] for piece in inner):
            change, count = changes[inner[0]], left * len(inner)
            expr = _applied(expr, change, axis, unit, count, share)
            left = count * len(change.index)
        elif any(find(leaf) in changes for leaf in leaves(factor)):
            raise SurgeryError(
                f"axis {axis} of {expr}: units that lie within other units in uneven pieces have no rule",
                hint="Change the heads, or another width.",
            )
        else:
            left *= factor.size
    return expr


def _applied(expr: Expr, change: Change, axis: int, unit: int, parts: int, share: bool) -> Expr:
    total = parts * len(change.index) * unit
    if change.op == "prune_heads":
        return call("prune_heads", expr, axis=axis, parts=parts, **dict(change.params))
    more = {"share": int(share)} if change.op == "widen" else {}
    return call(change.op, expr, to=total, axis=axis, unit=unit, parts=parts, **more, **dict(change.params))


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """The headers of a state dict."""
    return {
        name: TensorInfo(tuple(t.shape), name_of(t.dtype), t.numel() * t.element_size()) for name, t in tensors.items()
    }


def plan_of(
    source: Mapping[str, TensorInfo],
    rows: Mapping[str, Expr],
    *,
    ties: Iterable[Sequence[str]] = (),
    why: Mapping[str, str] | None = None,
    dropped: str = "",
    description: str = "",
) -> Plan:
    """A plan of these rows. `ties`: names of one tensor, of which the first has a row; `why`: a row's evidence;
    `dropped`: the reason for what no row reads."""
    tied = {name: several[0] for several in ties for name in several[1:]}
    made: list[Row] = []
    for name, expr in rows.items():
        shape = infer(expr, lambda n: tuple(source[n].shape))
        read = next(iter(names(expr)), None)
        dtype = source[read].dtype if read else next((i.dtype for i in source.values()), "F32")
        if name in tied and tied[name] in rows:
            made.append(Row(name, Status.TIED, None, shape, dtype, tied_to=tied[name]))
        else:
            status = Status.FILLED if read else Status.SYNTHESISED
            made.append(Row(name, status, expr, shape, dtype, evidence=(why or {}).get(name, "")))
    used = {name for row in made for name in row.sources}
    same = {name: tied[name] for name in source if name in tied}
    left = [
        Dropped(name, f"it is tied to {same[name]}" if same.get(name) in used else dropped or "nothing is made from it")
        for name in source
        if name not in used
    ]
    target = {row.target: TensorInfo(row.shape, row.dtype, 0) for row in made}
    return Plan(tuple(made), tuple(left), Stamp.of(source, description), Stamp.of(target))


def values_of(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """The values of all rows, in float64, by target name."""
    own = own_tensors(model)
    out: dict[str, Tensor] = {}
    for row in plan.rows:
        if row.expr is not None:
            with torch.no_grad():
                out[row.target] = evaluate_unrounded(row.expr, lambda n: own[n].detach(), twin.lift)
    for row in plan.rows:
        if row.tied_to is not None:
            out[row.target] = out[row.tied_to]
    return out


# --- running ---------------------------------------------------------------------------------------------------------


def outputs(coupling: Coupling, module: nn.Module, values: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """The outputs of a run on the example in float64, with these values in place of the module's own."""
    result = twin.run(coupling.run, twin.twin(module, values), coupling.x)
    return [twin.lift(t) for t in tree_iter(result) if isinstance(t, Tensor)]


def drift(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float | None:
    """The largest relative difference; None where the outputs are not comparable."""
    if len(expected) != len(got) or any(a.shape != b.shape for a, b in zip(expected, got, strict=True)):
        return None
    return max((relative(a, b) for a, b in zip(expected, got, strict=True) if a.is_floating_point()), default=0.0)


_Key = tuple[str, str, bool]  # module without numbers, attribute, is it certain that it is such a size?
_Choice = tuple[str, str, int | None, int]  # module, attribute, place in it, new value

# --- the edited module -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How the sizes that a module meets change: old -> the new ones, of which there may be several."""

    by_module: Mapping[str, Mapping[int, frozenset[int]]]

    @classmethod
    def of(cls, coupling: Coupling, chosen: Mapping[Space, Index]) -> Sizes:
        met: dict[str, dict[int, set[int]]] = {}
        flow = coupling.flow

        def meet(module: str, space: Space) -> None:
            for part in (space, *factors(space)):
                if find(part).size > 1:
                    new = len(index_of(part, chosen))
                    met.setdefault(module, {}).setdefault(find(part).size, set()).add(new)

        for node in flow.tape.nodes:
            for vid in (*node.inputs, *(out for out in node.outs if out >= 0)):
                for space in flow.axes.get(vid, ()):
                    meet(node.module, space)
        return cls({m: {old: frozenset(new) for old, new in sizes.items()} for m, sizes in met.items()})


def edited(
    coupling: Coupling,
    values: Mapping[str, Tensor],
    chosen: Mapping[Space, Index],
    accept: Callable[[list[Tensor]], bool],
    *,
    told: bool,
) -> tuple[nn.Module | None, str]:
    """A copy of the model that holds `values`, and what is to be said of it. `accept` judges its outputs in float64.
    `told`: the outputs tell right numbers from wrong; else every value on the way must have the size that is foreseen,
    and as few doubtful numbers are changed as that takes."""
    base = resized(coupling.model, values)
    _stretch_constants(base, coupling, chosen)
    choices = _numbers(base, coupling, Sizes.of(coupling, chosen), chosen)
    last = ""
    doubtful = [key for key in choices if not key[2]]
    for tries, flipped in enumerate(_fewest_first(list(choices))):
        if tries >= TRIES:
            break
        kept = flipped if told else flipped ^ frozenset(doubtful)
        module = copy.deepcopy(base)
        for key, several in choices.items():
            for path, name, at, new in several:
                if key not in kept:
                    _set(module.get_submodule(path), name, at, new)
        try:
            got = outputs(coupling, module, values)
        except Exception as error:  # the person's own forward, with sizes that it may not bear: any error means no
            last = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if accept(got) and (told or _as_foreseen(coupling, module, values, chosen)):
            left = [f"{choices[key][0][0] or 'the model'}.{key[1]}" for key in choices if key in kept and key[2]]
            return module, f"{', '.join(left)} stay as they were: the function depends on them" if left else ""
        last = "it runs, and its outputs are not what they must be"
    return None, (
        f"no copy of the model runs with these sizes ({last}): build the body yourself and use the plan, "
        "whose rows hold for any body with these shapes"
    )


def _stretch_constants(module: nn.Module, coupling: Coupling, chosen: Mapping[Space, Index]) -> None:
    """Buffers that no state dict holds, with the same value for every unit: zeros in place of a key bias."""
    saved, tape = own_tensors(module), coupling.tape
    met: dict[tuple[str, tuple[int, ...]], set[tuple[int, ...]]] = {}
    for node in tape.nodes:
        for vid in node.inputs:
            if tape.values[vid].origin == "const":
                new = tuple(len(index_of(space, chosen)) for space in coupling.flow.axes[vid])
                met.setdefault((node.module, tape.values[vid].shape), set()).add(new)
    for name, held in list(module.named_buffers(remove_duplicate=False)):
        path, _, local = name.rpartition(".")
        wanted = met.get((path, tuple(held.shape)), set()) if name not in saved else set()
        for axis, size in enumerate(next(iter(wanted)) if len(wanted) == 1 else ()):
            first = held.narrow(axis, 0, 1)
            if size != held.shape[axis] and bool((held == first).all()):
                held = first.repeat_interleave(size, dim=axis)
                module.get_submodule(path)._buffers[local] = held


def _as_foreseen(
    coupling: Coupling, module: nn.Module, values: Mapping[str, Tensor], chosen: Mapping[Space, Index]
) -> bool:
    """Does the copy run the same operators, and is every value as large as its units say?"""
    flow = coupling.flow
    again = record(coupling.run, twin.twin(module, values), coupling.x)

    def met(tape: Tape, size: Callable[[int], tuple[int, ...]]) -> list[tuple[str, list[tuple[int, ...]]]]:
        """What is computed from the inputs; that it is laid out anew on the way is nobody's business."""
        nodes = [node for node in tape.nodes if _name(node.op) not in MOVES]
        data = [(_name(n.op), [v for v in n.outs if v >= 0 and tape.values[v].data]) for n in nodes]
        return [(name, [size(vid) for vid in vids]) for name, vids in data if vids]

    foreseen = met(coupling.tape, lambda vid: tuple(len(index_of(space, chosen)) for space in flow.axes[vid]))
    return met(again, lambda vid: again.values[vid].shape) == foreseen


def _fewest_first(keys: Sequence[_Key]) -> Iterator[frozenset[_Key]]:
    """Choices of these: none, then any one, first of those that may be meant either way, then two ..."""
    doubtful = sorted(keys, key=lambda key: key[2])
    for count in range(len(keys) + 1):
        for kept in itertools.combinations(doubtful, count):
            yield frozenset(kept)


def resized(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model whose parameters and buffers hold `values`, in their own types; ties stay."""
    out = copy.deepcopy(model)
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, old in own_tensors(out).items():
            value = values.get(name)
            if value is None:
                continue
            path, _, local = name.rpartition(".")
            owner = out.get_submodule(path)
            new = made.get(id(old))
            if new is None:
                stored = value.detach().to(dtype=old.dtype, device=old.device, copy=True).contiguous()
                new = nn.Parameter(stored, old.requires_grad) if isinstance(old, nn.Parameter) else stored
                made[id(old)] = new
            holder: dict[str, Any] = owner._parameters if local in owner._parameters else owner._buffers
            holder[local] = new
    for several in zip(*(dict(m.named_modules(remove_duplicate=False)).items() for m in (model, out)), strict=True):
        (_, before), (_, after) = several
        for local, tensor in before._parameters.items():  # one that a state dict shows under another name only
            mine = after._parameters.get(local)
            if tensor is not None and mine is not None and id(mine) in made:
                after._parameters[local] = made[id(mine)]
    return out


def _set(module: nn.Module, name: str, at: int | None, value: int) -> None:
    if at is None:
        setattr(module, name, value)
        return
    held = getattr(module, name)
    items = [value if i == at else item for i, item in enumerate(held)]
    setattr(module, name, torch.Size(items) if isinstance(held, torch.Size) else type(held)(items))


def _numbers(
    module: nn.Module, coupling: Coupling, sizes: Sizes, chosen: Mapping[Space, Index]
) -> dict[_Key, list[_Choice]]:
    """The whole numbers that may be sizes which change, alike modules together. Those of known modules are set."""
    choices: dict[tuple[str, str], list[_Choice]] = {}
    doubtful: set[tuple[str, str]] = set()
    for path, each in module.named_modules():
        if set_known(each, coupling.flow.grouped.get(path), chosen):
            continue
        met = sizes.by_module.get(path, {})
        for name, value in list(vars(each).items()):
            if name.startswith("_"):
                continue
            several = value if isinstance(value, (tuple, list)) else None
            held = [(None, value)] if several is None else list(enumerate(several))
            for at, old in held:
                if not isinstance(old, int) or isinstance(old, bool):
                    continue
                for new in sorted(met.get(old, frozenset()) - {old}):
                    alike = (re.sub(r"\d+", "#", path), name)
                    choices.setdefault(alike, []).append((path, name, at, new))
                    doubtful |= {alike} if old in met[old] else set()
    return {(*alike, alike not in doubtful): several for alike, several in choices.items()}


def set_known(module: nn.Module, groups: Space | None, chosen: Mapping[Space, Index]) -> bool:
    """Modules whose sizes are those of their weight, by their documentation."""
    try:
        weight = getattr(module, "weight", None)
    except RuntimeError:  # it is computed from tensors that have another size now
        return False
    sizes = dict[str, Any]()
    if not isinstance(weight, Tensor):
        return False
    if isinstance(module, nn.Linear):
        sizes = {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    elif isinstance(module, nn.Embedding):
        sizes = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    elif isinstance(module, nn.modules.conv._ConvNd):
        count = module.groups if groups is None else len(index_of(groups, chosen))
        ins, outs = weight.shape[1] * count, weight.shape[0]
        sizes = {"in_channels": ins, "out_channels": outs, "groups": count}
        if module.transposed:
            sizes = {"in_channels": outs, "out_channels": ins, "groups": count}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sizes = {"num_features": weight.shape[0]}
    elif isinstance(module, nn.LayerNorm):
        sizes = {"normalized_shape": tuple(weight.shape)}
    elif isinstance(module, nn.GroupNorm):
        count = module.num_groups if groups is None else len(index_of(groups, chosen))
        sizes = {"num_channels": weight.shape[0], "num_groups": count}
    elif type(module).__name__ == "Conv1D" and weight.dim() == 2:  # transformers' transposed Linear
        sizes = {"nx": weight.shape[0], "nf": weight.shape[1]}
    else:
        return False
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)
    return True


def through(coupling: Coupling, chosen: Mapping[Space, Index], results: Sequence[Tensor]) -> list[Tensor]:
    """The outputs as they are to be where a changed axis is one of theirs: its units chosen or repeated alike."""
    out: list[Tensor] = []
    for vid, t in zip(coupling.tape.outputs(), results, strict=True):
        for axis, space in enumerate(coupling.flow.axes.get(vid, ())):
            index = index_of(space, chosen)
            if len(index) != t.shape[axis] or not np.array_equal(index, np.arange(len(index))):
                t = t.index_select(axis, torch.from_numpy(np.ascontiguousarray(index)))
        out.append(t)
    return out


def copied(names: Iterable[str]) -> dict[str, Expr]:
    """Rows that take each tensor as it is."""
    return {name: Name(name) for name in names}
