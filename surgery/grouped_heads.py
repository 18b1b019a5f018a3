"""From multi-head to grouped-query attention: queries stay, and neighbouring key and value heads become their mean.

Which rows make keys and which make values is found by trying: rows are disturbed, and it is seen whose product with
the queries, or with the attention's weights, changes. So a fused projection needs no naming convention.

Source: Ainslie et al., arXiv 2305.13245.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery import twin
from surgery.body import Reshaped, drift, infos, outputs, plan_of, resized, set_known, values_of
from surgery.coupling import Coupling, Group, coupled
from surgery.errors import SurgeryError
from surgery.expr import Expr, Name, call, evaluate_unrounded
from surgery.mapper.record import MOVES, Tape, _name, record, same
from surgery.proof import GATE
from surgery.running import own_tensors
from surgery.stand_in import Shared, sharing
from surgery.unit_spaces import factors, find, leaves, pieces
from surgery.unit_step import ELEMENTWISE

TRIES = 64  # choices of an attention's numbers that are run at most


@dataclass(frozen=True)
class _Attention:
    """The values of one attention: what its products multiply."""

    queries: int
    keys: int
    values: int
    scores: int  # what the softmax gives
    module: str


@dataclass(frozen=True)
class _Segment:
    """A stretch of one axis of a parameter; or of each of `blocks` equal pieces of it, where heads are fused one by
    one."""

    vid: int
    axis: int
    start: int
    stop: int
    blocks: int = 1

    @property
    def length(self) -> int:
        return (self.stop - self.start) * self.blocks

    def of(self, t: Tensor) -> Tensor:
        """A view of it."""
        apart = t.unflatten(self.axis, (self.blocks, t.shape[self.axis] // self.blocks))
        return apart.narrow(self.axis + 1, self.start, self.stop - self.start)

    def cut(self, expr: Expr, shape: tuple[int, ...]) -> Expr:
        """The expression of it."""
        if self.blocks == 1:
            return call("slice", expr, axis=self.axis, start=self.start, stop=self.stop)
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        apart = call("reshape", expr, shape=(*before, self.blocks, shape[self.axis] // self.blocks, *after))
        part = call("slice", apart, axis=self.axis + 1, start=self.start, stop=self.stop)
        return call("reshape", part, shape=(*before, self.length, *after))


def mha_to_gqa(model: nn.Module, example: Any, where: str | Group, *, kv_heads: int) -> Reshaped:
    """Attention with `kv_heads` key and value heads, each the mean of neighbouring ones; queries and output projection
    stay. Approximate: the drift is that of the model whose key and value heads are these means.

    where: a module ("layers.*.self_attn"), "heads", or a Group. The edited copy exists where the class can share key
    and value heads (Llama's can; GPT-2's cannot, and gets a plan alone).

    Rule: mean pooling, arXiv 2305.13245. SurgeryError where the heads do not divide, or where queries, keys and values
    are fused head by head.
    """
    coupling = coupled(model, example)
    groups = coupling.find(where, "heads")
    own = own_tensors(model)
    rows: dict[str, Expr] = {name: Name(name) for name in own}
    means: dict[str, Expr] = {}  # of the same shapes as now: each head the mean of its group
    roles: _Roles = {}
    for group in groups:
        if group.refusal:
            raise SurgeryError(f"{group} cannot be changed: {group.refusal}", hint="Name other modules.")
        if kv_heads < 1 or group.size % kv_heads:
            divisors = ", ".join(str(n) for n in range(1, group.size) if group.size % n == 0)
            raise SurgeryError(
                f"{group}: {group.size} heads do not divide into {kv_heads} groups", hint=f"It can be {divisors}."
            )
        for vid, axis in dict.fromkeys((coupling.tape.params[m.tensor], m.axis) for m in group.members):
            parts = _roles(coupling, group, vid, axis)
            if any(role != "queries" for _, role in parts):
                roles[vid] = (axis, group.size, parts)
                for name in coupling.names(vid):
                    rows[name] = means[name] = _pooled(rows[name], own[name].shape, axis, group.size, kv_heads, parts)
    tensors = infos({name: t.detach() for name, t in own.items()})
    why = dict.fromkeys(means, f"the mean of its group's heads, {kv_heads} groups")
    plan = plan_of(tensors, rows, ties=coupling.ties(), why=why, description=type(model).__name__)
    before = outputs(coupling, model)
    means_of: dict[str, Tensor] = {}
    shared: dict[str, Shared] = {}
    for name, expr in means.items():
        means_of[name] = evaluate_unrounded(expr, lambda n: own[n].detach(), twin.lift)
        shared[name] = _sharing(kv_heads, *roles[coupling.tape.params[name]])
    expected = outputs(coupling, model, {name: shared[name].spread(t) for name, t in means_of.items()})
    module, note = _edited(coupling, values_of(plan, model), expected, groups, kv_heads)
    found = Reshaped(plan, module, "approximate", drift(before, expected), groups, (note,) if note else ())
    stand_in = sharing(coupling, means_of, shared) if module is None else None
    if stand_in is None:
        return found
    unrounded = {stand_in.names[name]: t for name, t in means_of.items()}
    apart = drift(expected, outputs(coupling, stand_in.module, unrounded))
    return replace(found, stand_in=stand_in if apart is not None and apart <= GATE else None)


_Roles = dict[int, tuple[int, int, list[tuple["_Segment", str]]]]  # by parameter: axis, heads, what each part makes


def _pooled(
    expr: Expr, shape: tuple[int, ...], axis: int, heads: int, kv_heads: int, found: list[tuple[_Segment, str]]
) -> Expr:
    """The row of a tensor: its parts that make keys or values pooled; what was fused head by head in one block each."""
    parts: list[Expr] = []
    for segment, role in found:
        part = expr if len(found) == 1 else segment.cut(expr, tuple(shape))
        parts.append(part if role == "queries" else call("mha_to_gqa", part, heads=heads, groups=kv_heads, axis=axis))
    return parts[0] if len(parts) == 1 else call("cat", *parts, axis=axis)


def _sharing(kv_heads: int, axis: int, heads: int, found: list[tuple[_Segment, str]]) -> Shared:
    """How a pooled tensor is used at its old size: every head of a group reads the group's mean."""
    parts = tuple(
        (segment.length, False) if role == "queries" else (segment.length * kv_heads // heads, True)
        for segment, role in found
    )
    return Shared(axis, kv_heads, heads // kv_heads, parts, blocks=found[0][0].blocks)


# --- which rows are keys and values ----------------------------------------------------------------------------------


def _segments(coupling: Coupling, group: Group, vid: int, axis: int) -> list[_Segment]:
    """The fused parts of an axis, or of each head of it."""
    space = find(coupling.flow.axes[vid][axis])
    inner = [find(factor) for factor in factors(space)]
    if len(inner) == 2 and inner[0] is find(group.space) and len(pieces(inner[1])) > 1:
        ends = list(itertools.accumulate(piece.size for piece in pieces(inner[1])))
        starts = [0, *ends[:-1]]
        return [_Segment(vid, axis, a, b, group.size) for a, b in zip(starts, ends, strict=True)]
    sizes = [piece.size for piece in pieces(space)]
    if len(sizes) == 1 and (first := factors(space)) and len(pieces(first[0])) > 1:
        sizes = [piece.size * (space.size // first[0].size) for piece in pieces(first[0])]
    ends = list(itertools.accumulate(sizes))
    return [_Segment(vid, axis, end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _roles(coupling: Coupling, group: Group, vid: int, axis: int) -> list[tuple[_Segment, str]]:
    """(a part of the axis, "queries", "keys" or "values"); an axis that is none of these is left as queries are."""
    own = next(m for m in group.members if coupling.tape.params[m.tensor] == vid and m.axis == axis)
    found: list[tuple[_Segment, str]] = []
    for segment in _segments(coupling, group, vid, axis):
        role = "queries"
        if "in" not in own.roles:
            changed = _disturbed(coupling, segment, own.tensor)
            for attention in _attentions(coupling, group):
                hit = [what for what in ("queries", "keys", "values") if changed(getattr(attention, what))]
                if len(hit) > 1:
                    raise SurgeryError(
                        f"{own.tensor}: {' and '.join(hit)} are fused head by head along axis {axis}",
                        hint="Split the projection first.",
                    )
                if hit:
                    role = hit[0]
                if hit or changed(attention.scores):  # a bias of positions is added to what queries and keys give
                    break
        found.append((segment, role))
    if found[0][0].blocks > 1 and len({role for _, role in found}) == 1:  # one projection, whose heads are cut up later
        return [(_Segment(vid, axis, 0, coupling.tape.values[vid].shape[axis]), found[0][1])]
    return found


def _disturbed(coupling: Coupling, segment: _Segment, name: str) -> Callable[[int], bool]:
    """Which values of the run change when these rows do?"""
    value = twin.lift(own_tensors(coupling.model)[name].detach()).clone()
    part = segment.of(value)
    generator = torch.Generator().manual_seed(0)
    part += torch.randn(part.shape, generator=generator, dtype=part.dtype) * (0.1 + part.abs().mean())
    values = dict.fromkeys(coupling.names(segment.vid), value)
    again = record(coupling.run, twin.twin(coupling.model, values), coupling.x)

    def changed(vid: int) -> bool:
        before, after = coupling.tape.values[vid].fingerprint, again.values[vid].fingerprint
        return (before is None) != (after is None) or (
            before is not None and after is not None and not same(before, after)
        )

    return changed


def _attentions(coupling: Coupling, group: Group) -> list[_Attention]:
    """The attentions that run over these heads, first to last."""
    tape, flow = coupling.tape, coupling.flow
    found: list[_Attention] = []
    for node in tape.nodes:
        if _name(node.op) != "bmm" or not all(tape.values[vid].data for vid in node.inputs):
            continue
        weights, values = node.args[0].vid, node.args[1].vid
        softmax = _back(tape, weights, ("_softmax", "_safe_softmax"))
        if softmax is None:
            weights, values = values, weights
            softmax = _back(tape, weights, ("_softmax", "_safe_softmax"))
        if softmax is None or find(group.space) not in {find(leaf) for leaf in leaves(flow.axes[values][0])}:
            continue
        made = tape.nodes[tape.values[softmax].node]
        scores = _back(tape, made.args[0].vid, ("bmm",))
        if scores is None:
            continue
        product = tape.nodes[tape.values[scores].node]
        left, right = product.args[0].vid, product.args[1].vid
        last = made.args[1] % len(tape.values[softmax].shape) == len(tape.values[softmax].shape) - 1
        queries, keys = (left, right) if last else (right, left)
        found.append(_Attention(queries, keys, values, softmax, node.module))
    return found


def _back(tape: Tape, vid: int, wanted: tuple[str, ...]) -> int | None:
    """The value that this one was made from unit by unit and that an operator of these names gave."""
    seen: set[int] = set()
    todo = [vid]
    while todo:
        at = todo.pop()
        value = tape.values[at]
        if at in seen or value.node < 0 or not value.data:
            continue
        seen.add(at)
        node = tape.nodes[value.node]
        name = _name(node.op)
        if name in wanted:
            return at
        if name in MOVES or name in ELEMENTWISE:
            todo += node.inputs
    return None


# --- the edited module -----------------------------------------------------------------------------------------------


def _edited(
    coupling: Coupling,
    values: Mapping[str, Tensor],
    expected: list[Tensor],
    groups: tuple[Group, ...],
    kv_heads: int,
) -> tuple[nn.Module | None, str]:
    """A copy whose attentions share heads, as few of their numbers changed as make it compute what is expected."""
    base = resized(coupling.model, values)
    for _, each in base.named_modules():
        set_known(each, None, {})
    keys: dict[tuple[str, str, int, int], list[tuple[str, str, int]]] = {}
    for group in groups:
        shared = _shared(group, coupling)
        for attention in _attentions(coupling, group):
            module = base.get_submodule(attention.module)
            for name, old in vars(module).items():
                for was, new in ((shared, shared * group.size // kv_heads), (group.size, kv_heads)):
                    if isinstance(old, int) and not isinstance(old, bool) and old == was and not name.startswith("_"):
                        key = (re.sub(r"\d+", "#", attention.module), name, was, new)
                        keys.setdefault(key, []).append((attention.module, name, new))
    for picked in itertools.islice(_fewest(list(keys)), TRIES):
        module = copy.deepcopy(base)
        for key in picked:
            for path, name, new in keys[key]:
                setattr(module.get_submodule(path), name, new)
        try:
            got = outputs(coupling, module, values)
        except Exception:  # the person's own forward, with sizes that it may not bear: any error means no
            continue
        apart = drift(expected, got)
        if apart is not None and apart <= GATE:
            return module, ""
    return None, "this class has no attention that shares key and value heads: build one and use the plan"


def _shared(group: Group, coupling: Coupling) -> int:
    """How many queries share a key and value head now."""
    for each in coupling.groups:
        if each.name == "query_heads" and set(each.tensors) & set(group.tensors):
            return each.size
    return 1


def _fewest(keys: list[Any]) -> Iterator[tuple[Any, ...]]:
    for count in range(len(keys) + 1):
        yield from itertools.combinations(keys, count)
