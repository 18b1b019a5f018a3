"""A plan with nothing run: what names, shapes, documented module types and structure settle, and nothing more.

It ends "consistent" where exactly one mapping fits, and "ambiguous" where anything is left open: two tensors whose
names do not tell them apart, a square matrix that may want a transpose, a fused tensor whose order nobody documents, a
source tensor that nothing uses though a forward pass would. The diagnosis then lists what is open.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from surgery.expr import Call, Expr, Name, call
from surgery.mapper.names import Roles
from surgery.mapper.static_match import Answer, Pair, Question, Relayout, agree, assign, roles_in_place, stacks, ways
from surgery.mapper.static_units import Index, Path, Shape, Side, Slot, Unit, read
from surgery.plan import Dropped, Plan, Row, Stamp, Status

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.checkpoint import Checkpoint, TensorInfo

_SHOWN = 6  # open questions in a diagnosis; the rest is counted
_PLANS = 4  # whole plans that are offered

# What a model may have beside its body: it can be left new in the target, or unused of the source.
_ASIDE = {("part", "head"), ("part", "pooler"), ("part", "scale"), ("part", "bias"), ("table", "mask")}


def find(source: Checkpoint, target: nn.Module, *, kept: frozenset[str] = frozenset()) -> Plan:
    """The plan that names, shapes and structure settle: "consistent", or "ambiguous" with what is open in `diagnosis`
    and, where whole plans can be built, up to four of them in `candidates`. kept: target names whose values may stay as
    they are where the source does not fill them."""
    return _Finder(source, target, kept).plan()


def suggest(
    name: str, shape: Shape, rows: Mapping[str, Expr], source: Mapping[str, TensorInfo]
) -> tuple[Expr, str] | None:
    """A source tensor for one that a run did not reach, from where its neighbours came: (expression, why). Only where
    the nearest neighbours have the same names in both, and so spell out one tensor that no row uses, of this shape."""
    used = {e.name for e in rows.values() if isinstance(e, Name)}
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        scope = path[:depth]
        prefix = ".".join(scope) + "." if scope else ""
        spelled: Counter[str] = Counter()
        contrary = 0
        for other, expr in rows.items():
            if not other.startswith(prefix) or other == name:
                continue
            tail = other[len(prefix) :]
            if not isinstance(expr, Name):
                contrary += 1  # its neighbours are laid out otherwise
            elif expr.name == tail or expr.name.endswith(f".{tail}"):
                spelled[expr.name[: len(expr.name) - len(tail)]] += 1
            else:
                contrary += 1
        if not spelled and not contrary:
            continue
        if contrary or len(spelled) != 1:
            return None
        (theirs,) = spelled
        found = theirs + ".".join(path[depth:])
        if found in source and found not in used and tuple(source[found].shape) == tuple(shape):
            beside = prefix.rstrip(".") or "the whole"
            return Name(found), f"all else of {beside} has the same names in both; not reached by the run"
        return None
    return None


@dataclass
class _Built:
    """Pairs as rows: expressions by target tensor, and evidence."""

    exprs: dict[str, Expr] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)


class _Finder:
    def __init__(self, source: Checkpoint, target: nn.Module, kept: frozenset[str]) -> None:
        self.source, self.module, self.kept = source, target, kept
        from surgery.running import own_tensors

        self.own = {n: t.detach() for n, t in own_tensors(target).items()}
        self.ties = _ties(self.own)
        self.buffers = {n for n, _ in target.named_buffers(remove_duplicate=False)}
        self.open: list[str] = []
        self.instead: list[list[Pair]] = []
        self.turned: list[tuple[Pair, Relayout]] = []

    def plan(self) -> Plan:
        from surgery import dtypes

        floats = {
            n: tuple(t.shape)
            for n, t in self.own.items()
            if n not in self.ties and (t.is_floating_point() or n.endswith("num_batches_tracked"))
        }
        theirs = {
            n: tuple(i.shape)
            for n, i in self.source.items()
            if dtypes.torch_dtype(i.dtype).is_floating_point or n.endswith("num_batches_tracked")
        }
        mine, them = read(floats, self.module), read(theirs)
        self.values = _Values(self.source)
        found = stacks(mine, them)
        pairs: list[Pair] = []
        for stack, candidates in found.open:
            said = " or ".join(_shown(c) for c in candidates[:3]) or "no stack of the source fits it block by block"
            self.open.append(f"{_shown(stack)}: {said}")
        order: dict[Path, dict[Index, Index]] = {(): {(): ()}}
        for stack, (other, answer) in found.chosen.items():
            order[stack] = dict(zip(mine.stacks[stack], them.stacks[other], strict=True))
            pairs += self._settle(answer)
        self._check_nesting({s: o for s, (o, _) in found.chosen.items()}, order)
        chosen = {s: o for s, (o, _) in found.chosen.items()}
        single = self._singles(mine, them, chosen)
        pairs += self._settle(single)
        new = self._unfilled(single, pairs)
        dropped_stacks = [s for s in them.stacks if s not in chosen.values()]
        self._unused(single, them, list(chosen.values()), dropped_stacks, pairs)
        if not pairs:
            self.open.append("nothing of the target could be filled")
        self._turns(pairs)
        return self._assemble(pairs, order, new)

    # -- what stands once ---------------------------------------------------------------------------------------------
    def _singles(self, mine: Side, them: Side, chosen: Mapping[Path, Path]) -> Answer:
        """The units outside of repeated blocks."""
        target, source = mine.in_stack.get((), []), them.in_stack.get((), [])
        roles_t, roles_s = roles_in_place(target), roles_in_place(source)
        for u in target:
            roles_t[id(u)] = self._inherited(u, roles_t[id(u)], mine, them, chosen)
        pairs = []
        alike = sorted(".".join(u.inner) for u in target) == sorted(".".join(u.inner) for u in source)
        for t in target:
            for s in source:
                fit = ways(t, s, {(): ()})
                score = agree(t, s, roles_t[id(t)], roles_s[id(s)], alike=alike) if fit else None
                if fit is None or score is None:
                    continue
                if score <= 0 and (t.raw or (t.is_matrix and len(set(t.shape())) == 1)):
                    continue  # that the shapes agree says little of a bare tensor or a square matrix
                pairs.append(Pair(t, s, fit[0], score, fit[1]))
        return assign(target, source, pairs)

    def _inherited(self, unit: Unit, roles: Roles, mine: Side, them: Side, chosen: Mapping[Path, Path]) -> Roles:
        """What stands beside one tower's blocks belongs to that tower, whatever the other side calls it."""
        scope = unit.path[:-1]
        while True:
            near = [s for s in mine.stacks if s[: len(scope)] == scope]
            if near or not scope:
                break
            scope = scope[:-1]
        if not near or any(s not in chosen for s in near):
            return roles
        said = [dict(them.in_stack[chosen[s]][0].roles) for s in near]
        out = dict(roles)
        for question in ("tower", "side"):
            answers = {r.get(question, "") for r in said}
            if question not in out and len(answers) == 1 and "" not in answers:
                out[question] = answers.pop()
        return out

    def _settle(self, answer: Answer) -> list[Pair]:
        for q in answer.questions:
            first = q.candidates[0]
            others = [
                (c, i) for c, i in zip(q.candidates[1:], q.instead, strict=True) if not self._same_values(first, c)
            ]
            if others:
                self._ask(q, [c for c, _ in others])
                self.instead += [i for _, i in others]
        return answer.pairs

    def _ask(self, q: Question, others: list[Unit]) -> None:
        few = [str(c) for c in (q.candidates[0], *others)][:4]
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        self.open.append(f"{q.target}: {' or '.join(few)}{more}")

    def _same_values(self, a: Unit, b: Unit) -> bool:
        """Whether two units hold equal tensors, so that either is right."""
        ta, tb = list(a.tensors()), list(b.tensors())
        return len(ta) == len(tb) and all(
            x[:2] == y[:2] and x[2].shape == y[2].shape and self.values.equal(x[2].name, y[2].name)
            for x, y in zip(ta, tb, strict=True)
        )

    # -- what is left -------------------------------------------------------------------------------------------------
    def _unfilled(self, single: Answer, pairs: Iterable[Pair]) -> dict[str, tuple[Status, str]]:
        """Units of the target that nothing fills: a head may be new, a buffer is the target's own; else it is open."""
        out: dict[str, tuple[Status, str]] = {}
        filled = [p.target for p in pairs]
        for u in single.unfilled:
            names = [s.name for _, _, s in u.tensors()]
            if all(n in self.kept for n in names):
                out |= dict.fromkeys(names, (Status.NEW, "to be kept"))
            elif all(n in self.buffers for n in names):
                out |= dict.fromkeys(names, (Status.CONSTANT, "the target's own constant"))
            elif _aside(u) and not _half(u, filled) and not any(_could_be(u, s) for s in single.unused):
                out |= dict.fromkeys(names, (Status.NEW, "the source has nothing like it"))
            else:
                self.open.append(f"{u}: nothing in the source fits by shape and name")
        return out

    def _unused(self, single: Answer, them: Side, used: list[Path], dropped: list[Path], pairs: Iterable[Pair]) -> None:
        """What of the source is left though a forward pass would use it makes the mapping doubtful."""
        filled = [p.source for p in pairs]
        tied = {tuple(self.own[n].shape) for n in self.ties}
        for u in single.unused:
            if any(self._same_values(u, f) for f in filled if f.shape() == u.shape()):
                continue
            if u.shape() in tied and u.is_matrix:
                self.open.append(f"{u}: the target ties a tensor of this shape, and the source holds another value")
                continue
            if (_aside(u) and not _half(u, filled)) or _is_projection(u):
                continue
            if any(self._computed(slot) for _, _, slot in u.tensors()):
                continue
            if not self._elsewhere(u, them, used, dropped):
                self.open.append(f"{u} of the source: nothing uses it")

    def _computed(self, slot: Slot) -> bool:
        """Whether the target holds these values by itself, in a buffer that no state dict has: a table of sines."""
        import torch

        for name, t in self.module.named_buffers():
            if name in self.own or tuple(t.shape) != slot.shape or t.is_meta or t.numel() < 2 or len(t.shape) < 2:
                continue
            if torch.allclose(t.detach().to("cpu", torch.float64), self.source.read(slot.name).to(torch.float64)):
                return True
        return False

    def _elsewhere(self, u: Unit, them: Side, used: list[Path], dropped: list[Path]) -> bool:
        """Whether a unit belongs with blocks that are not used either."""
        said = [dict(them.in_stack[s][0].roles) for s in used]
        for question in ("tower", "side"):
            answer = u.roles.get(question)
            if answer is not None and said and all(r.get(question) not in (None, answer) for r in said):
                return True
        scope = u.path[:-1]
        while True:
            near = [s for s in (*used, *dropped) if s[: len(scope)] == scope]
            if near or not scope:
                break
            scope = scope[:-1]
        return any(s in dropped for s in near)

    def _check_nesting(self, chosen: Mapping[Path, Path], order: Mapping[Path, dict[Index, Index]]) -> None:
        """Stacks within stacks must number their blocks alike: one block of the target comes from one block."""
        for inner, outer in ((a, b) for a in chosen for b in chosen if a != b and a[: len(b)] == b):
            depth = sum("{" in c for c in outer)
            theirs = sum("{" in c for c in chosen[outer])
            if chosen[inner][: len(chosen[outer])] != chosen[outer]:
                continue
            for i, j in order[inner].items():
                expected = order[outer].get(i[:depth])
                if expected is not None and j[:theirs] != expected:
                    self.open.append(f"{_shown(inner)}: its blocks do not lie in the source as those around them do")
                    break

    # -- transposes ---------------------------------------------------------------------------------------------------
    def _turns(self, pairs: Iterable[Pair]) -> None:
        """Settle what shapes leave open: a square matrix lies as the others of its block do, where these agree."""
        known: dict[tuple[Path, str], set[Relayout]] = defaultdict(set)
        everywhere: dict[str, set[Relayout]] = defaultdict(set)
        pairs = list(pairs)
        for p in pairs:
            if len(p.ways) == 1 and _turnable(p.target) and p.ways != ("reshape",):
                known[p.target.stack, p.target.family].add(p.ways[0])
                everywhere[p.target.family].add(p.ways[0])
        for p in pairs:
            self._doubtful(p)
            if len(p.ways) == 1:
                continue
            t, s = p.target, p.source
            one_table = "table" in t.roles and t.roles["table"] == s.roles.get("table")
            if (t.oriented and s.oriented) or one_table:
                p.ways = ("same",)
            elif t.raw or s.raw:
                self._turn_open(p)
            else:
                near = known.get((t.stack, t.family)) or everywhere.get(t.family) or set()
                if len(near) == 1 and near <= set(p.ways):
                    p.ways = tuple(near)
                else:
                    self._turn_open(p)

    def _turn_open(self, p: Pair) -> None:
        said = " or ".join(
            "as it is" if w == "same" else "transposed" if w == "transpose" else f"axes {w}" for w in p.ways
        )
        self.open.append(f"{p.target}: {p.source}, {said}")
        self.turned += [(p, w) for w in p.ways if w != p.ways[0]]
        p.ways = p.ways[:1]

    def _doubtful(self, p: Pair) -> None:
        """A norm of a type of its own, with a gain alone, may add one to it."""
        t = p.target
        if t.is_norm and not t.kind and "B" not in t.first:
            self.open.append(f"{t}: {p.source} as it is, or less one ({t.family.rpartition('.')[2]} does not say)")

    # -- rows ---------------------------------------------------------------------------------------------------------
    def _assemble(
        self, pairs: list[Pair], order: Mapping[Path, dict[Index, Index]], new: Mapping[str, tuple[Status, str]]
    ) -> Plan:
        base = self._whole(self._built(pairs, order), new)
        if not self.open:
            return base.with_verdict("consistent")
        candidates: list[Plan] = []
        if not any(r.status is Status.NEW and r.target not in new for r in base.rows):
            candidates = [base]
            for instead in self.instead:
                swap = {id(p.target): p for p in instead}
                candidates.append(self._whole(self._built([swap.get(id(p.target), p) for p in pairs], order), new))
            for pair, way in self.turned:
                other = Pair(pair.target, pair.source, (way,), pair.score, pair.zero_bias)
                candidates.append(self._whole(self._built([other if p is pair else p for p in pairs], order), new))
            distinct = {c.rows_hash: c for c in candidates}
            candidates = [c.with_verdict("consistent") for c in list(distinct.values())[:_PLANS]]
            if len(candidates) == 1:
                candidates = []
        more = f"; and {len(self.open) - _SHOWN} more" if len(self.open) > _SHOWN else ""
        diagnosis = "names and shapes leave open: " + "; ".join(self.open[:_SHOWN]) + more
        return replace(base, diagnosis=diagnosis, candidates=tuple(candidates)).with_verdict("ambiguous")

    def _built(self, pairs: Iterable[Pair], order: Mapping[Path, dict[Index, Index]]) -> _Built:
        out = _Built()
        fused: dict[str, dict[int, Expr]] = defaultdict(dict)
        for p in pairs:
            for index, member in p.target.members.items():
                theirs = p.source.members[order[p.target.stack][index]]
                for role, slot in member.items():
                    if role == "N" and role not in theirs:
                        continue
                    if role == "B" and role not in theirs:
                        exprs: dict[str, Expr] = {slot.name: call("zeros", shape=slot.shape)}
                    else:
                        exprs = _exprs(slot, theirs[role], p.ways[0] if role == "W" else "same")
                    for name, expr in exprs.items():
                        if slot.part is not None:
                            fused[name][slot.part] = expr
                        else:
                            out.exprs[name] = expr
                        out.evidence[name] = f"{p.source} by name and shape"
        for name, parts in fused.items():
            if len(parts) == 3:
                out.exprs[name] = _fuse([parts[i] for i in range(3)])
        return out

    def _whole(self, built: _Built, new: Mapping[str, tuple[Status, str]]) -> Plan:
        from surgery import dtypes
        from surgery.memory import info_of

        rows = []
        for name, t in self.own.items():
            shape, dtype = tuple(t.shape), dtypes.name_of(t.dtype)
            if name in self.ties:
                rows.append(Row(name, Status.TIED, None, shape, dtype, tied_to=self.ties[name]))
            elif name in built.exprs:
                expr = built.exprs[name]
                made = isinstance(expr, Call) and expr.op in ("zeros", "norm_except")
                status = Status.SYNTHESISED if made else Status.FILLED
                rows.append(Row(name, status, expr, shape, dtype, evidence=built.evidence.get(name, "")))
            elif name in new:
                rows.append(Row(name, new[name][0], None, shape, dtype, note=new[name][1]))
            elif not t.is_floating_point():
                rows.append(Row(name, Status.CONSTANT, None, shape, dtype, note="an integer table of the target's own"))
            else:
                rows.append(Row(name, Status.NEW, None, shape, dtype, note="open: names and shapes do not settle it"))
        used = {n for r in rows for n in r.sources}
        dropped = [Dropped(n, "the target has no place for it") for n in self.source if n not in used]
        return Plan(
            rows=tuple(rows),
            dropped=tuple(dropped),
            source=Stamp.of(self.source, self.source.source),
            target=Stamp.of({n: info_of(t) for n, t in self.own.items()}, type(self.module).__name__),
        )


class _Values:
    """Which tensors of a checkpoint hold equal values; each is read at most once."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.hashes: dict[str, str] = {}

    def equal(self, a: str, b: str) -> bool:
        if a == b:
            return True
        ia, ib = self.source[a], self.source[b]
        if ia.shape != ib.shape or ia.dtype != ib.dtype:
            return False
        return self._hash(a) == self._hash(b)

    def _hash(self, name: str) -> str:
        if name not in self.hashes:
            self.hashes[name] = self.source.content_hash(name)
        return self.hashes[name]


# -- small things -----------------------------------------------------------------------------------------------------
def _exprs(slot: Slot, theirs: Slot, way: Relayout) -> dict[str, Expr]:
    """What fills a slot: its tensor, and its gain where the weight is stored as gain and direction."""
    value: Expr = Name(theirs.name)
    if theirs.part is not None:
        n = theirs.shape[0]
        value = call("slice", value, axis=0, start=theirs.part * n, stop=(theirs.part + 1) * n)
    if slot.gain and theirs.gain:
        return {slot.name: value, slot.gain: Name(theirs.gain)}
    if slot.gain:
        return {slot.name: value, slot.gain: call("norm_except", value, dim=_kept_axis(slot.gain_shape))}
    if theirs.gain:
        return {slot.name: call("weight_norm", Name(theirs.gain), value, dim=_kept_axis(theirs.gain_shape))}
    if way == "transpose":
        value = call("transpose", value)
    elif way == "reshape" or (way == "same" and slot.shape != theirs.shape):
        value = call("reshape", value, shape=slot.shape)
    elif way != "same":
        value = call("permute", value, dims=way)
    return {slot.name: value}


def _kept_axis(shape: Shape) -> int:
    """The axis that a weight-norm gain keeps; -1 for the norm of the whole."""
    return next((i for i, n in enumerate(shape) if n != 1), 0 if shape else -1)


def _fuse(parts: list[Expr]) -> Expr:
    """[query | key | value], which is the source's own tensor where the three are its blocks."""
    whole = {str(p.args[0]) for p in parts if isinstance(p, Call) and p.op == "slice"}
    starts = [dict(p.params).get("start") for p in parts if isinstance(p, Call) and p.op == "slice"]
    if len(whole) == 1 and len(starts) == 3 and starts == sorted(starts, key=lambda s: int(str(s))):
        first = parts[0]
        if isinstance(first, Call):
            return first.args[0]
    return call("cat", *parts, axis=0)


def _ties(own: Mapping[str, Tensor]) -> dict[str, str]:
    """Second names of a tensor -> the name that tells most: the one that says which table it is, else the first."""
    from surgery.mapper.names import claims

    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, t in own.items():
        if t.numel():
            where = id(t) if t.is_meta else t.data_ptr()
            groups[(where, tuple(t.shape), t.stride(), t.dtype)].append(name)
    out: dict[str, str] = {}
    for names in groups.values():
        if len(names) > 1:
            first = next((n for n in names if "table" in dict(claims(tuple(n.split("."))[:-1] or (n,))[0])), names[0])
            out |= {n: first for n in names if n != first}
    return out


def _aside(unit: Unit) -> bool:
    return any((q, a) in _ASIDE for q, a in unit.roles.items()) and "projection" not in unit.roles


def _half(unit: Unit, others: Iterable[Unit]) -> bool:
    """Whether another unit of the same head is filled: then this one is needed too."""
    part = unit.roles.get("part")
    return part == "head" and any(
        o.roles.get("part") == part and o.roles.get("tower") == unit.roles.get("tower") for o in others
    )


def _could_be(unit: Unit, other: Unit) -> bool:
    """Whether one could be the other laid out anew: as many elements, and no word against it."""
    if any(unit.roles[q] != other.roles[q] for q in unit.roles.keys() & other.roles.keys()):
        return False
    return math.prod(unit.shape()) == math.prod(other.shape()) and "W" in unit.first


def _turnable(unit: Unit) -> bool:
    return unit.kind != "Embedding" and "W" in unit.first and len(unit.shape()) >= 2 and not unit.raw


def _is_projection(unit: Unit) -> bool:
    """The matrix at the end of a tower, into a space that is shared with another."""
    last = unit.path[-1]
    return (
        not unit.stack
        and unit.is_matrix
        and "tower" in unit.roles
        and (last == "proj" or last.endswith("_projection"))
        and not unit.rest
    )


def _shown(stack: Path) -> str:
    return ".".join(stack)
