"""What the proof's inputs reached: equal outputs say nothing of weights that had no part in them.

The target's recorded run is replayed with gradients: an element whose gradient is zero for every input had no part.
Where whole segments of a tensor had none although they were read, they are perturbed, and the replay shows what
cancels them: a softmax that a key bias shifts evenly is a symmetry, true for every input; a mask or a dead branch is
a gap in the inputs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery import segments, twin
from surgery.expr import Call, Expr, Name, evaluate, kind, names, walk
from surgery.gradients import pulled
from surgery.mapper.record import HUGE, Node, Ref, Tape
from surgery.plan import Row
from surgery.reader import TensorInfo
from surgery.running import perturbed

QUIET = 1e-12  # of the largest gradient of all: below it is what float64 leaves of a sum that cancels
SHOWN = 1e-9  # relative; a value that moves by less than this has not moved
RUNS = 96  # runs that looking at perturbed segments may cost, for an input; what is left then counts as not exercised
ROWS = 1 << 20  # elements that are perturbed at a time
FAITHFUL = 1e-10  # a replay that differs from the run by more is not a replay of it
_SOFTMAX = ("_softmax", "_log_softmax", "_safe_softmax")
_NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm")


class NotFaithful(Exception):
    """A replay does not come to the recorded values."""


def unused_masks(inputs: Sequence[tuple[str, Any]], target: nn.Module, called: bool) -> list[str]:
    """Masks that hide nothing on any input: what the target does with them was not seen."""
    found: dict[str, list[Tensor]] = {}
    parameters: list[str] = []
    if called:
        parameters = [p for p in inspect.signature(target.forward).parameters if p != "self"]
    for _, x in inputs:
        items: list[tuple[str, Any]] = []
        if isinstance(x, Mapping):
            items = list(x.items())
        elif isinstance(x, (tuple, list)):
            # Positional arguments are the first of forward's; what is left over goes into *args.
            items = list(zip(parameters[: len(x)], x[: len(parameters)], strict=True)) if called else []
        elif called and parameters:
            items = [(parameters[0], x)]
        for name, t in items:
            if isinstance(t, Tensor) and "mask" in str(name).lower() and t.numel():
                found.setdefault(str(name), []).append(t)
    idle = [n for n, ts in found.items() if all(bool((t == t.flatten()[0]).all()) for t in ts)]
    idle += [p for p in parameters if "mask" in p.lower() and p not in found]
    return [f"{name}: mask not exercised: it hides nothing on any proof input" for name in idle]


def backward_slice(tape: Tape, vids: Iterable[int]) -> list[int]:
    """The nodes that these values need, in order."""
    need, nodes = set(vids), []
    for index in range(len(tape.nodes) - 1, -1, -1):
        node = tape.nodes[index]
        if need.intersection(node.outs) and node.op != "sync":
            nodes.append(index)
            need.update(node.inputs)
    return nodes[::-1]


def replay(
    tape: Tape, nodes: list[int], leaves: Mapping[int, Tensor], keep: Iterable[int] | None = None
) -> dict[int, Tensor]:
    """The values of these nodes, with `leaves` in place of what the tape holds. `keep`: the values asked for (all);
    others are let go of once nothing needs them."""
    known: dict[int, Tensor] = dict(leaves)
    last = _last_uses(tape, nodes, keep) if keep is not None else {}

    def value(x: object) -> object:
        if not isinstance(x, Ref):
            return x
        if x.vid in known:
            return known[x.vid]
        held = tape.values[x.vid].tensor
        if held is None:
            raise NotFaithful(f"value {x.vid} was not kept")
        # Raised to float64 where it is used.
        return twin.Lifted(held) if held.dtype in twin.LOW or isinstance(held, twin.Made) else held

    for index in nodes:
        node = tape.nodes[index]
        if all(tape.values[o].origin == "const" for o in node.outs if o >= 0):
            continue  # drawn at random in the run: the tape keeps what was drawn
        args, kwargs = tree_map(value, node.args), tree_map(value, node.kwargs)
        out = node.op(*args, **kwargs)
        for vid, t in zip(node.outs, out if isinstance(out, (tuple, list)) else (out,), strict=True):
            if vid >= 0 and vid not in leaves:
                known[vid] = t if isinstance(t, twin.Lifted) else twin.lift(t)  # a turned weight keeps its graph
        for vid in last.get(index, ()):
            known.pop(vid, None)
    return known


def _last_uses(tape: Tape, nodes: list[int], keep: Iterable[int]) -> dict[int, list[int]]:
    """For each node, the values that nothing after it needs."""
    seen, out = set(keep), {}
    for index in reversed(nodes):
        node = tape.nodes[index]
        done = {v for v in (*node.inputs, *node.outs) if v >= 0 and v not in seen}
        seen |= done
        out[index] = [v for v in done if tape.values[v].origin == "node"]
    return out


Item = tuple[int, str, int, Tensor]  # of a value: its number, its name, a segment's number and lines
Live = tuple[Mapping[str, Tensor], list[Tensor]]  # a twin's tensors by name, and what it returned, with its graph


@dataclass
class Exercise:
    """Gathered over all proof inputs. `hit`: for each tensor and each of its axes, the lines with a gradient; `read`:
    tensors that the outputs' computation consumed."""

    source: Mapping[str, TensorInfo]
    rows: Mapping[str, Row]
    values: Mapping[str, Tensor]
    hit: dict[str, list[Tensor]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    cancelled: dict[str, dict[int, str]] = field(default_factory=dict)  # name: segment: by what, for every input
    moved: dict[str, set[int]] = field(default_factory=dict)  # name: segments that perturbing showed to matter
    untold: str = ""  # why it cannot be told what the inputs reached
    in_pieces: bool = False  # gradients a piece of the run at a time, in little memory
    _segments: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def open(self) -> list[str]:
        """The tensors of which not every line has had a part."""
        return [
            n
            for n, v in self.values.items()
            if v.is_floating_point() and v.numel() and not (n in self.hit and all(bool(h.all()) for h in self.hit[n]))
        ]

    def add(self, tape: Tape, outputs: list[int], live: Live | None = None) -> None:
        """What one run exercised, seen from these output values. `live`: the run's own graph, where it has one; else
        the tape is run again."""
        nodes = backward_slice(tape, outputs)
        inside = {vid for index in nodes for vid in tape.nodes[index].inputs} | set(outputs)
        names_of: dict[int, list[str]] = {}
        constants = {v.name: vid for vid, v in enumerate(tape.values) if v.origin == "const" and v.name}
        for name, value in self.values.items():
            vid = tape.params.get(name)
            if vid is not None and vid in inside:
                names_of.setdefault(vid, []).append(name)
                self.read.add(name)
            elif not value.is_floating_point() and constants.get(name) in inside:  # no gradient tells of integers
                self.read.add(name)
                self.hit[name] = [torch.ones(n, dtype=torch.bool) for n in (value.shape or (1,))]
        floats = [v for v in outputs if tape.values[v].dtype.is_floating_point or tape.values[v].dtype.is_complex]
        wanted = set(self.open())
        names_of = {vid: several for vid, several in names_of.items() if wanted.intersection(several)}
        if names_of:
            with twin.math_only():
                self._gradients(tape, nodes, floats, names_of, live)
                self._silent(tape, nodes, floats, names_of)

    def _gradients(
        self, tape: Tape, nodes: list[int], outputs: list[int], names_of: Mapping[int, list[str]], live: Live | None
    ) -> None:
        tops: dict[int, list[Tensor]] | None = None
        with torch.enable_grad():
            if live is not None:
                own, returned = live
                leaves = {vid: own[several[0]] for vid, several in names_of.items() if own[several[0]].requires_grad}
                tops = pulled(_projection(tape, [], {}, returned), leaves)
            if tops is None:
                leaves = {
                    vid: twin.lifted_tensor(t, written=False).requires_grad_()
                    for vid in names_of
                    if (t := tape.values[vid].tensor) is not None
                }
                if self.in_pieces:
                    again = partial(replay, tape)
                    total = partial(_projected, tape, outputs)
                    tops = segments.pulled(tape, nodes, outputs, leaves, again, total)
                else:
                    known = replay(tape, nodes, leaves, keep=outputs)
                    tops = pulled(_projection(tape, outputs, known, []), leaves) or {}
        top = max((float(lines[0].max()) for lines in tops.values()), default=0.0)
        for vid, lines in tops.items():
            hit = [m > QUIET * top if top > 0 else torch.zeros_like(m, dtype=torch.bool) for m in lines]
            for name in names_of[vid]:
                before = self.hit.get(name)
                self.hit[name] = hit if before is None else [a | b for a, b in zip(before, hit, strict=True)]

    def _silent(self, tape: Tape, nodes: list[int], outputs: list[int], names_of: Mapping[int, list[str]]) -> None:
        """Perturb what was read without a trace, and look at where the trace ends."""
        silent: list[Item] = []
        for vid, several in names_of.items():
            name = several[0]
            hit = self.hit.get(name)
            for number, lines in self.segments(name):
                if self.cancelled.get(name, {}).get(number) or number in self.moved.get(name, ()):
                    continue  # known already; that no gradient reaches it holds here too
                if hit is None or not bool(hit[0][lines].any()):
                    silent.append((vid, name, number, lines))
        if not silent:
            return
        groups = [silent]
        for _ in range(RUNS):
            if not groups:
                return
            group = groups.pop()
            try:
                whys = followed(tape, nodes, outputs, group)
            except Rerouted:
                whys = None if len(group) > 1 else {(group[0][1], group[0][2]): ""}
            if whys is not None:
                self._cancelled(whys)
            elif len(group) == 1:
                self.moved.setdefault(group[0][1], set()).add(group[0][2])
            else:
                groups += [group[len(group) // 2 :], group[: len(group) // 2]]

    def _cancelled(self, whys: Mapping[tuple[str, int], str]) -> None:
        for (name, number), why in whys.items():
            said = self.cancelled.setdefault(name, {})
            said[number] = said.get(number, "") or why  # an input of one token shows nothing, for or against

    def segments(self, name: str) -> list[tuple[int, Tensor]]:
        """The segments of a tensor along its first axis: (number, the rows), each filled by one run of one index
        map."""
        if name not in self._segments:
            value, row = self.values[name], self.rows.get(name)
            n = value.shape[0] if value.ndim else 1
            ids = segment_ids(row.expr if row is not None else None, n, self.source)
            self._segments[name] = [(int(i), torch.nonzero(ids == i).flatten()) for i in ids.unique()]
        return self._segments[name]

    @property
    def any(self) -> bool:
        """Whether any filled element had a part in the outputs."""
        return any(bool(h[0].any()) for h in self.hit.values()) or bool(self.moved)

    def findings(self) -> tuple[list[str], list[str]]:
        """(not exercised, symmetries), in words, in the order of the rows."""
        gaps: list[str] = []
        symmetries: list[str] = []
        done: set[int] = set()
        for name, value in self.values.items():
            if id(value) in done or not value.numel():
                continue
            done.add(id(value))
            if name not in self.read:
                gaps.append(f"{name}: filled, not exercised: what was compared does not depend on it")
                continue
            hit = self.hit.get(name) or [torch.zeros(n, dtype=torch.bool) for n in (value.shape or (1,))]
            gap, symmetric = self._lines(name, hit)
            gaps += gap
            symmetries += symmetric
        return gaps, symmetries

    def _lines(self, name: str, hit: list[Tensor]) -> tuple[list[str], list[str]]:
        symmetries: list[str] = []
        rows_hit = hit[0]
        missing = torch.zeros(len(rows_hit), dtype=torch.bool)
        parts = self.segments(name)
        for number, lines in parts:
            if not bool(rows_hit[lines].any()):
                why = self.cancelled.get(name, {}).get(number, "")
                if number in self.moved.get(name, ()):
                    continue
                part = name if len(parts) == 1 else f"{name}[{int(lines[0])}:{int(lines[-1]) + 1}]"
                if why:
                    symmetries.append(f"{part}: {why}")
                else:
                    missing[lines] = True
                continue
            at = torch.nonzero(rows_hit[lines]).flatten()
            # Between two exercised rows of one index map, the map speaks for the rows.
            missing[lines[: int(at[0])]] = True
            missing[lines[int(at[-1]) + 1 :]] = True
        count, total = int(missing.sum()), len(missing)
        if count == total and total > 1:
            return [f"{name}: filled, not exercised: it has no influence on what was compared"], symmetries
        gaps = [f"{name}: filled, not exercised: {count} of {total} rows"] if count else []
        for axis, line in enumerate(hit[1:], 1):
            if bool(line.any()) and not bool(line.all()):
                at = torch.nonzero(line).flatten()
                outside = int(at[0]) + len(line) - 1 - int(at[-1])
                if outside:
                    gaps.append(f"{name}: filled, not exercised: {outside} of {len(line)} along axis {axis}")
        return gaps, symmetries


def segment_ids(expr: Expr | None, n: int, source: Mapping[str, TensorInfo]) -> Tensor:
    """For each of n indices of the first axis, the segment that it belongs to: a run in which the expression takes
    source elements at one step. A tensor that is no mere relayout is one segment."""
    one = torch.zeros(n, dtype=torch.int64)
    if n < 2 or expr is None or isinstance(expr, Name) or not _pure_layout(expr):
        return one
    offset, numbers = 0, {}
    for name in names(expr):
        size = math.prod(source[name].shape)
        numbers[name] = torch.arange(offset, offset + size).reshape(source[name].shape)
        offset += 2 * size + 7  # so that no step within a tensor leads into the next one
    keys = evaluate(expr, numbers.__getitem__)
    if not keys.numel():
        return one
    first = keys.reshape(n, -1)[:, 0].tolist()
    ids, number, start = [0], 0, 0
    for i in range(1, n):
        if i - start > 1 and first[i] - first[i - 1] != first[start + 1] - first[start]:
            number, start = number + 1, i
        ids.append(number)
    return torch.tensor(ids)


def _pure_layout(expr: Expr) -> bool:
    return kind(expr) == "exact" and all(names(e) and e.op != "neg" for e in walk(expr) if isinstance(e, Call))


def _projection(tape: Tape, outputs: list[int], known: Mapping[int, Tensor], returned: list[Tensor]) -> Tensor | None:
    """One number that depends on every element of every output: of a replay, or as returned."""
    total: Tensor | None = None
    for vid in outputs:
        y = known.get(vid)
        held = tape.values[vid].tensor
        if y is not None and held is not None and not _equal(y.detach(), twin.lift(held)):
            raise NotFaithful(f"value {vid}")
    for i, y in enumerate([*(known[v] for v in outputs if v in known), *returned]):
        if not y.numel() or not (y.is_floating_point() or y.is_complex()):
            continue
        y = torch.view_as_real(y) if y.is_complex() else y
        y = torch.where(torch.isfinite(y), y, 0.0)
        g = torch.Generator().manual_seed(i)
        weight = torch.rand(y.shape, generator=g, dtype=torch.float64).to(y.device) + 0.5
        sign = torch.randint(0, 2, y.shape, generator=g).to(y.device) * 2 - 1
        part = (y * weight * sign).sum() / y.detach().abs().max().clamp_min(1e-300)
        total = part if total is None else total + part
    return total


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = torch.nan_to_num(a), torch.nan_to_num(b.to(a.device))
    top = float(b.abs().max()) if b.numel() else 0.0
    return not b.numel() or float((a - b).abs().max()) <= FAITHFUL * max(top, 1e-300)


def _projected(tape: Tape, outputs: list[int], known: Mapping[int, Tensor]) -> Tensor | None:
    return _projection(tape, outputs, known, [])


def _perturbed_leaf(held: Tensor, vid: int, items: list[Item]) -> Tensor:
    """A weight with these segments changed, to the same values each time; some rows at a time."""
    now = twin.lift(held).detach().clone()
    for _, _, number, lines in items:
        seed = 7919 * vid + number
        if now.ndim == 0:
            return perturbed(now, seed).to(now.device)
        step = max(1, ROWS * len(now) // max(1, now.numel()))
        for at in range(0, len(lines), step):
            some = lines[at : at + step]
            now[some] = perturbed(now[some], seed + at).to(now.device)
    return now


def _apart(a: Tensor, b: Tensor) -> bool:
    """Do they differ? Some rows at a time: of a weight in float64, every step makes another copy."""
    if not a.is_floating_point():
        return not torch.equal(a, b)
    x, y = (twin.formed(t.stored if isinstance(t, twin.Lifted) else t).reshape(-1, *t.shape[1:]) for t in (a, b))
    top = difference = 0.0
    step = max(1, ROWS * len(x) // max(1, x.numel()))
    for at in range(0, len(x) if x.numel() else 0, step):
        p, q = twin.lift(x[at : at + step]), twin.lift(y[at : at + step])
        # A masked score is no measure of the others.
        p, q = torch.where(p.abs() < HUGE, p, 0.0), torch.where(q.abs() < HUGE, q, 0.0)
        top, difference = max(top, float(p.abs().max())), max(difference, float((p - q).abs().max()))
    return difference > SHOWN * max(top, 1e-300)


class Rerouted(NotFaithful):
    """What was perturbed chooses which way the run goes, as a router of experts does: other tokens reach other
    operators, so the run that was recorded cannot be followed with it."""


def followed(tape: Tape, nodes: list[int], outputs: list[int], items: list[Item]) -> dict[tuple[str, int], str] | None:
    """Perturb these segments together and follow what moves, side by side with the run as it was, holding only what is
    still needed: for each segment, by what every trace of it is cancelled for any input, or an empty text where one
    just ends. None where an output moves. Rerouted where the run would have gone another way."""
    marks: dict[int, set[tuple[str, int]]] = {}
    leaves: dict[int, list[Item]] = {}
    for item in items:
        if tape.values[item[0]].tensor is not None:
            leaves.setdefault(item[0], []).append(item)
        marks.setdefault(item[0], set()).add((item[1], item[2]))
    ends: dict[tuple[str, int], set[str]] = {}
    known: dict[int, Tensor] = {}
    other: dict[int, Tensor] = {}
    last = _last_uses(tape, nodes, outputs)

    def held(vid: int) -> Tensor:
        if vid not in known:
            t = tape.values[vid].tensor
            if t is None:
                raise NotFaithful(f"value {vid} was not kept")
            return twin.lifted_tensor(t, written=False)  # raised to float64 where it is used
        return known[vid]

    def changed_leaf(vid: int) -> Tensor:
        """Made when it is used: of all weights at once it would be the model again, in float64."""
        t = tape.values[vid].tensor
        assert t is not None  # else it was left out
        return _perturbed_leaf(t, vid, leaves[vid])

    for index in nodes:
        node = tape.nodes[index]
        if all(tape.values[o].origin == "const" for o in node.outs if o >= 0):
            continue  # drawn at random in the run: the tape keeps what was drawn
        for vid, t in _outs(node, lambda x: held(x.vid) if isinstance(x, Ref) else x):
            known[vid] = t
        into = [v for v in node.inputs if v in other or v in leaves]
        if into:
            moved = {v: other[v] if v in other else changed_leaf(v) for v in into}

            def value(x: object, moved: Mapping[int, Tensor] = moved) -> object:
                if not isinstance(x, Ref):
                    return x
                return moved[x.vid] if x.vid in moved else held(x.vid)

            fresh = dict(_outs(node, value))
            if any(t.shape != known[vid].shape for vid, t in fresh.items()):
                raise Rerouted
            changed = {vid: t for vid, t in fresh.items() if _apart(known[vid], t)}
            other.update(changed)
            whose = set().union(*(marks[v] for v in into))
            if changed:
                for vid in changed:
                    marks[vid] = whose
            else:
                why = _why(node, {v: held(v) for v in node.inputs}, moved)
                for who in whose:
                    ends.setdefault(who, set()).add(why)
        for vid in last.get(index, ()):
            known.pop(vid, None)
            other.pop(vid, None)
    if any(v in other for v in outputs):
        return None
    told = {}
    for _, name, number, _ in items:
        said = ends.get((name, number), set())
        told[name, number] = "" if "" in said else " and ".join(sorted(said))
    return told


def _outs(node: Node, value: Callable[[object], object]) -> Iterator[tuple[int, Tensor]]:
    args, kwargs = tree_map(value, node.args), tree_map(value, node.kwargs)
    out = node.op(*args, **kwargs)
    for vid, t in zip(node.outs, out if isinstance(out, (tuple, list)) else (out,), strict=True):
        if vid >= 0:
            yield vid, t


def _why(node: Node, base: Mapping[int, Tensor], moved: Mapping[int, Tensor]) -> str:
    """By what an operator cancels the change of what goes into it, for any input; or an empty text."""
    op = getattr(node.op, "__name__", str(node.op)).split(".")[0]
    vid = next(v for v in node.inputs if v in moved)
    before, after = base[vid], moved[vid]
    if op in _SOFTMAX:
        dim = node.args[1] if isinstance(node.args[1], int) else -1
        seen = torch.softmax(before, dim) > 1e-6
        shift = torch.nan_to_num(after - before)
        several = seen.sum(dim, keepdim=True) > 1
        if bool((several & (shift.abs().amax(dim, keepdim=True) > 0)).any()):
            return "the softmax cancels it"
        return ""  # one key only: every weight before it is cancelled, and for this input alone
    if op in _NORMS:
        return "the normalisation after it cancels it"
    if op == "sub" and len(node.inputs) > 1 and all(v in moved for v in node.inputs):
        return "it cancels in a difference"
    return ""
