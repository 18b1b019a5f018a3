"""Which unit of the source fills which unit of the target, by shapes and words; and whether anything else could.

A pair is possible where some exact relayout brings shapes together and no word contradicts. Among the possible
assignments the best by shared meaning is taken, and it counts as settled only where every other one is worse by MARGIN:
so that what is left open is known by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from surgery.mapper.names import Roles, claims, says_out
from surgery.mapper.static_units import Index, Path, Shape, Side, Slot, Unit

MARGIN = 1.0  # one shared meaning more than any other assignment has
_SAME_ANSWER, _SAME_NAME, _SAME_WORD = 2.0, 3.0, 1.0
_MOST = 64  # units in one open question; beyond, names settle nothing

# How a source tensor becomes the target's: "same", "transpose", "reshape", or an order of its axes.
Relayout = str | tuple[int, ...]


@dataclass
class Pair:
    target: Unit
    source: Unit
    ways: tuple[Relayout, ...]  # for the weight; more than one where shapes do not tell
    score: float
    zero_bias: bool = False


@dataclass
class Question:
    """Units of the target and what could fill them, where more than one assignment is as good."""

    target: Unit
    candidates: list[Unit]
    instead: list[list[Pair]] = field(default_factory=list)  # for each candidate after the first: the pairs that change


@dataclass
class Answer:
    pairs: list[Pair] = field(default_factory=list)
    score: float = 0.0
    questions: list[Question] = field(default_factory=list)
    unfilled: list[Unit] = field(default_factory=list)  # of the target
    unused: list[Unit] = field(default_factory=list)  # of the source


# -- one pair ---------------------------------------------------------------------------------------------------------
def ways(target: Unit, source: Unit, order: dict[Index, Index]) -> tuple[tuple[Relayout, ...], bool] | None:
    """The relayouts that fit all members, and whether a bias is to be made of zeros; None where none fits."""
    if {order.get(i) for i in target.members} != set(source.members):
        return None
    found: set[Relayout] | None = None
    zero = False
    for index, mine in target.members.items():
        theirs = source.members[order[index]]
        if mine.keys() - {"N"} != theirs.keys() - {"N"}:
            # A bias that the source does not have is zero; everything else must be there.
            if mine.keys() - theirs.keys() - {"N"} != {"B"} or theirs.keys() - mine.keys() - {"N"}:
                return None
            zero = True
        for role, slot in mine.items():
            if role not in ("W", "N") and role in theirs and theirs[role].shape != slot.shape:
                return None
        if "W" not in mine:
            continue
        fits = set(_relayouts(target, mine["W"], theirs["W"]))
        found = fits if found is None else found & fits
        if not found:
            return None
    return tuple(sorted(found or {"same"}, key=str)), zero


def _relayouts(unit: Unit, mine: Slot, theirs: Slot) -> Iterable[Relayout]:
    a, b = mine.shape, theirs.shape
    if (mine.gain is not None or theirs.gain is not None) and a != b:
        return
    if mine.gain and theirs.gain and mine.gain_shape != theirs.gain_shape:
        return
    if len(a) == 2 and len(b) == 2:
        if a == b:
            yield "same"
        if a == b[::-1] and unit.kind not in ("Embedding", "RNN") and mine.gain is None:
            yield "transpose"
    elif a == b:
        yield "same"
        if len(a) > 2 and not unit.kind and not unit.raw:
            yield from (
                d for d in itertools.permutations(range(len(b))) if _permuted(b, d) == a and d != (0, 1, 2, 3)[: len(b)]
            )
    elif _long(a) == _long(b) and mine.gain is None and theirs.gain is None:
        yield "reshape"
    elif sorted(a) == sorted(b) and len(a) > 2 and not unit.kind:
        yield from (d for d in itertools.permutations(range(len(b))) if _permuted(b, d) == a)


def _permuted(shape: Shape, dims: tuple[int, ...]) -> Shape:
    return tuple(shape[d] for d in dims)


def _long(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def agree(target: Unit, source: Unit, mine: Roles, theirs: Roles, *, alike: bool) -> float | None:
    """How much two units' names say the same; None where they contradict. `alike`: the names of the two blocks are
    the same throughout, so that a name means the same in both."""
    for question in mine.keys() & theirs.keys():
        if mine[question] != theirs[question]:
            return None
    if target.raw != source.raw and target.is_norm != source.is_norm and len(target.shape()) == 1:
        return None  # a norm's weight, and a bare vector
    if mine.get("projection") == "fused" and not (alike and target.inner == source.inner):
        return None  # in which order, and how interleaved, no name says
    if target.is_norm and target.kind in ("Norm", "BatchNorm", "") and not _same_norm(target, source):
        return None
    score = _SAME_ANSWER * len(mine.keys() & theirs.keys())
    if target.stack and target.inner == source.inner and alike:
        score += _SAME_NAME
    if not (target.is_norm and target.stack):  # within blocks, norms are told by what they norm and by nothing else
        score += _SAME_WORD * len(target.rest & source.rest)
        if not (target.is_norm and target.numbers):
            score += _SAME_WORD * len(target.numbered & source.numbered)
        if not target.stack and target.path[-1] == source.path[-1] and not (target.is_norm and target.numbers):
            score += _SAME_WORD / 2
    return score


def _same_norm(target: Unit, source: Unit) -> bool:
    """Batch norms have running statistics, others do not."""
    return ("M" in target.first) == ("M" in source.first)


# -- roles in their place ---------------------------------------------------------------------------------------------
def roles_in_place(units: Sequence[Unit]) -> dict[int, Roles]:
    """The roles of units, with what their neighbours say: the output matrix beside query, key and value, and norms
    numbered 1 and 2."""
    out = {id(u): dict(u.roles) for u in units}
    scopes: dict[Path, set[str]] = {}
    for u in units:
        p = u.roles.get("projection")
        if p is not None:
            scopes.setdefault(u.path[:-1], set()).add(p)
    for u in units:
        mine = out[id(u)]
        if not u.is_matrix or "projection" in mine or mine.get("sublayer") == "feedforward" or "table" in mine:
            continue
        near = any(
            {"query", "key", "value"} <= scopes.get(u.path[:n], set()) for n in (len(u.path) - 1, len(u.path) - 2)
        )
        if says_out(u.words) and (near or mine.get("sublayer") in ("self", "cross")):
            mine["projection"] = "output"
            mine.pop("feedforward", None)
    for u in units:
        if out[id(u)].get("feedforward") and out[id(u)].get("projection"):
            out[id(u)].pop("feedforward")
    return out


def _norm_keys(units: Sequence[Unit]) -> dict[int, tuple[frozenset[str], tuple[int, ...]]] | None:
    """How each norm of a block is called, apart from words of form; None where two are called alike."""
    keys = {}
    for u in units:
        answers, rest, numbers = claims(u.words)
        keys[id(u)] = (rest | {f"{q}={a}" for q, a in answers if q in ("order", "sublayer")}, numbers)
    return keys if len(set(keys.values())) == len(keys) else None


def _outer(units: Sequence[Unit]) -> frozenset[str]:
    """The words that all units of a block share: they come from the path to it."""
    return frozenset.intersection(*(u.rest for u in units)) if units else frozenset()


# -- a block against a block ------------------------------------------------------------------------------------------
def block(target: Sequence[Unit], source: Sequence[Unit], order: dict[Index, Index]) -> Answer | None:
    """The units of one stack against those of another; None where they do not fit one to one."""
    if len(target) != len(source) or len(target) > _MOST:
        return None
    mine, theirs = roles_in_place(target), roles_in_place(source)
    alike = sorted(".".join(u.inner) for u in target) == sorted(".".join(u.inner) for u in source)
    numbered = _numbered_alike(target, source, alike)
    pairs: list[Pair] = []
    for t in target:
        for s in source:
            fit = ways(t, s, order)
            score = agree(t, s, mine[id(t)], theirs[id(s)], alike=alike) if fit else None
            if fit is None or score is None:
                continue
            if t.is_norm and (id(t), id(s)) in numbered:
                score += _SAME_ANSWER
            pairs.append(Pair(t, s, fit[0], score, fit[1]))
    answer = assign(target, source, pairs)
    return answer if not answer.unfilled and not answer.unused else None


def _numbered_alike(target: Sequence[Unit], source: Sequence[Unit], alike: bool) -> set[tuple[int, int]]:
    """Norms that are called alike, where both blocks have the same set of at most two such names. The same number says
    nothing where the sets differ: the second norm is the feed-forward's in one library, the cross-attention's in
    another."""
    a, b = [u for u in target if u.is_norm], [u for u in source if u.is_norm]
    if len(a) != len(b) or (len(a) > 2 and not alike):
        return set()
    if alike:
        return {(id(t), id(s)) for t in a for s in b if t.inner == s.inner}
    outer_a, outer_b = _outer(target), _outer(source)
    ka, kb = _norm_keys(a), _norm_keys(b)
    if ka is None or kb is None:
        return set()
    na = {k: (w - outer_a, n) for k, (w, n) in ka.items()}
    nb = {k: (w - outer_b, n) for k, (w, n) in kb.items()}
    if set(na.values()) != set(nb.values()):
        return set()
    return {(i, j) for i, x in na.items() for j, y in nb.items() if x == y}


# -- assignments ------------------------------------------------------------------------------------------------------
def assign(target: Sequence[Unit], source: Sequence[Unit], pairs: Sequence[Pair]) -> Answer:
    """The best assignment, and for each unit what else could fill it within the margin."""
    answer = Answer()
    by = {(id(p.target), id(p.source)): p for p in pairs}
    used: set[int] = set()
    for ts, ss in _components(target, source, pairs):
        if not ss:
            answer.unfilled += ts
            continue
        table = [[by[id(t), id(s)].score if (id(t), id(s)) in by else None for s in ss] for t in ts]
        best = _best(table) if max(len(ts), len(ss)) <= _MOST else None
        if best is None:
            answer.unfilled += ts
            continue
        total = sum(table[i][j] or 0.0 for i, j in enumerate(best))
        answer.score += total
        for i, j in enumerate(best):
            answer.pairs.append(by[id(ts[i]), id(ss[j])])
            used.add(id(ss[j]))
            others = _others(table, i, best, total)
            if others:
                instead = [[by[id(ts[r]), id(ss[c])] for r, c in enumerate(o) if c != best[r]] for o in others]
                answer.questions.append(Question(ts[i], [ss[j], *(ss[o[i]] for o in others)], instead))
    answer.unused = [s for s in source if id(s) not in used]
    return answer


def _others(table: list[list[float | None]], i: int, best: list[int], total: float) -> list[list[int]]:
    """Assignments within the margin that give row i another column: the best one for each such column."""
    found = []
    for j, score in enumerate(table[i]):
        if score is None or j == best[i]:
            continue
        rest = [[s if c != j else None for c, s in enumerate(row)] for r, row in enumerate(table) if r != i]
        other = _best(rest)
        if other is None:
            continue
        worth = score + sum(rest[r][c] or 0.0 for r, c in enumerate(other))
        if worth > total - MARGIN + 1e-9:
            found.append([*other[:i], j, *other[i:]])
    return found


def _components(
    target: Sequence[Unit], source: Sequence[Unit], pairs: Sequence[Pair]
) -> Iterable[tuple[list[Unit], list[Unit]]]:
    """The parts of the question that have nothing to do with each other."""
    root: dict[int, int] = {id(u): id(u) for u in (*target, *source)}

    def find(x: int) -> int:
        while root[x] != x:
            root[x] = root[root[x]]
            x = root[x]
        return x

    for p in pairs:
        root[find(id(p.target))] = find(id(p.source))
    parts: dict[int, tuple[list[Unit], list[Unit]]] = {}
    for t in target:
        parts.setdefault(find(id(t)), ([], []))[0].append(t)
    for s in source:
        parts.setdefault(find(id(s)), ([], []))[1].append(s)
    return [part for part in parts.values() if part[0]]


def _best(table: list[list[float | None]]) -> list[int] | None:
    """The assignment of every row to a column of its own with the largest sum; None where there is none. The Hungarian
    method, by shortest augmenting paths."""
    rows, columns = len(table), len(table[0]) if table else 0
    if rows > columns:
        return None
    never = 1e9
    cost = [[never if x is None else -x for x in row] for row in table]
    u, v = [0.0] * (rows + 1), [0.0] * (columns + 1)
    match, way = [0] * (columns + 1), [0] * (columns + 1)
    for i in range(1, rows + 1):
        match[0], j0 = i, 0
        least, seen = [float("inf")] * (columns + 1), [False] * (columns + 1)
        while True:
            seen[j0] = True
            i0, delta, j1 = match[j0], float("inf"), 0
            for j in range(1, columns + 1):
                if not seen[j]:
                    now = cost[i0 - 1][j - 1] - u[i0] - v[j]
                    if now < least[j]:
                        least[j], way[j] = now, j0
                    if least[j] < delta:
                        delta, j1 = least[j], j
            for j in range(columns + 1):
                if seen[j]:
                    u[match[j]] += delta
                    v[j] -= delta
                else:
                    least[j] -= delta
            j0 = j1
            if match[j0] == 0:
                break
        while j0:
            match[j0], j0 = match[way[j0]], way[j0]
    out = [0] * rows
    for j in range(1, columns + 1):
        if match[j]:
            out[match[j] - 1] = j - 1
    return None if any(table[i][j] is None for i, j in enumerate(out)) else out


# -- stacks against stacks --------------------------------------------------------------------------------------------
@dataclass
class Stacks:
    """Which stack of the source fills which of the target."""

    chosen: dict[Path, tuple[Path, Answer]]
    open: list[tuple[Path, list[Path]]]  # stacks that nothing fills (no candidates), or that several could fill


def stacks(target: Side, source: Side) -> Stacks:
    fits: dict[Path, dict[Path, Answer]] = {}
    for t, ti in target.stacks.items():
        fits[t] = {}
        for s, si in source.stacks.items():
            if len(ti) != len(si):
                continue
            answer = block(target.in_stack[t], source.in_stack[s], dict(zip(ti, si, strict=True)))
            if answer is not None:
                fits[t][s] = answer
    names = [t for t in fits if fits[t]]
    columns = list(source.stacks)
    table = [[fits[t][s].score if s in fits[t] else None for s in columns] for t in names]
    best = _best(table) if names else []
    out = Stacks({}, [(t, list(fits[t])) for t in fits if not fits[t]])
    if best is None:
        out.open += [(t, list(fits[t])) for t in names]
        return out
    total = sum(table[i][j] or 0.0 for i, j in enumerate(best))
    for i, j in enumerate(best):
        out.chosen[names[i]] = (columns[j], fits[names[i]][columns[j]])
        others = _others(table, i, best, total)
        if others:
            out.open.append((names[i], [columns[j], *(columns[o[i]] for o in others)]))
    return out
