"""What the proof's inputs reached: equal outputs say nothing of weights that had no part in them.

The target's recorded run is replayed with gradients: an element whose gradient is zero for every input had no part.
Where whole segments of a tensor had none although they were read, they are perturbed, and the replay shows what
cancels them: a softmax that a key bias shifts evenly is a symmetry, true for every input; a mask or a dead branch is
a gap in the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery import twin
from surgery.expr import Call, Expr, Name, evaluate, kind, names, walk
from surgery.mapper.record import HUGE, Node, Ref, Tape
from surgery.plan import Row
from surgery.reader import TensorInfo
from surgery.running import perturbed

QUIET = 1e-12  # of the largest gradient of all: below it is what float64 leaves of a sum that cancels
SHOWN = 1e-9  # relative; a value that moves by less than this has not moved
GROUP = 1 << 30  # bytes of weights that are raised to float64 at a time
FAITHFUL = 1e-10  # a replay that differs from the run by more is not a replay of it
_SOFTMAX = ("_softmax", "_log_softmax", "_safe_softmax")
_NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm")


class NotFaithful(Exception):
    """A replay does not come to the recorded values."""


def backward_slice(tape: Tape, vids: Iterable[int]) -> list[int]:
    """The nodes that these values need, in order."""
    need, nodes = set(vids), []
    for index in range(len(tape.nodes) - 1, -1, -1):
        node = tape.nodes[index]
        if need.intersection(node.outs) and node.op != "sync":
            nodes.append(index)
            need.update(node.inputs)
    return nodes[::-1]


def replay(tape: Tape, nodes: list[int], leaves: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The values of these nodes, with `leaves` in place of what the tape holds."""
    known: dict[int, Tensor] = dict(leaves)

    def value(x: object) -> object:
        if not isinstance(x, Ref):
            return x
        if x.vid not in known:
            held = tape.values[x.vid].tensor
            if held is None:
                raise NotFaithful(f"value {x.vid} was not kept")
            known[x.vid] = twin.lift(held)
        return known[x.vid]

    for index in nodes:
        node = tape.nodes[index]
        if all(tape.values[o].origin == "const" for o in node.outs if o >= 0):
            continue  # drawn at random in the run: the tape keeps what was drawn
        args, kwargs = tree_map(value, node.args), tree_map(value, node.kwargs)
        out = node.op(*args, **kwargs)
        for vid, t in zip(node.outs, out if isinstance(out, (tuple, list)) else (out,), strict=True):
            if vid >= 0 and vid not in leaves:
                known[vid] = t
    return known


@dataclass
class Exercise:
    """Gathered over all proof inputs. `hit`: elements with a gradient, by name; `read`: tensors that the outputs'
    computation consumed."""

    source: Mapping[str, TensorInfo]
    rows: Mapping[str, Row]
    values: Mapping[str, Tensor]
    hit: dict[str, Tensor] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    cancelled: dict[str, dict[int, str]] = field(default_factory=dict)  # name: segment: by what, for every input
    moved: dict[str, set[int]] = field(default_factory=dict)  # name: segments that perturbing showed to matter
    _segments: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def add(self, tape: Tape, outputs: list[int]) -> None:
        """What one run exercised, seen from these output values."""
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
                self.hit[name] = torch.ones(value.shape, dtype=torch.bool)
        floats = [v for v in outputs if tape.values[v].dtype.is_floating_point or tape.values[v].dtype.is_complex]
        with twin.math_only():
            self._gradients(tape, nodes, floats, names_of)
            self._silent(tape, nodes, floats, names_of)

    def _gradients(self, tape: Tape, nodes: list[int], outputs: list[int], names_of: Mapping[int, list[str]]) -> None:
        grads: dict[int, Tensor] = {}
        for group in _groups({vid: tape.values[vid].tensor for vid in names_of}):
            with torch.enable_grad():
                leaves = {vid: t.detach().to(torch.float64).clone().requires_grad_() for vid, t in group.items()}
                known = replay(tape, nodes, leaves)
                total = _projection(tape, outputs, known)
            if total is not None and total.requires_grad:
                found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                grads.update({vid: g.abs() for vid, g in zip(leaves, found, strict=True) if g is not None})
        top = max((float(g.max()) for g in grads.values() if g.numel()), default=0.0)
        for vid, g in grads.items():
            hit = g > QUIET * top if top > 0 else torch.zeros_like(g, dtype=torch.bool)
            for name in names_of[vid]:
                self.hit[name] = hit | self.hit[name] if name in self.hit else hit

    def _silent(self, tape: Tape, nodes: list[int], outputs: list[int], names_of: Mapping[int, list[str]]) -> None:
        """Perturb what was read without a trace, and look at where the trace ends."""
        silent: list[tuple[int, str, int, Tensor]] = []
        for vid, several in names_of.items():
            name = several[0]
            for number, lines in self.segments(name):
                whole = self.hit.get(name)
                if self.cancelled.get(name, {}).get(number) or number in self.moved.get(name, ()):
                    continue  # known already; that no gradient reaches it holds here too
                if whole is None or not bool(torch.atleast_1d(whole)[lines].any()):
                    silent.append((vid, name, number, lines))
        if not silent:
            return
        base = replay(tape, nodes, {})
        together = _perturbed_leaves(tape, silent)
        moved = replay(tape, nodes, together)
        if _changed_any(outputs, base, moved):
            for item in silent[:64]:
                alone = replay(tape, nodes, _perturbed_leaves(tape, [item]))
                if _changed_any(outputs, base, alone):
                    self.moved.setdefault(item[1], set()).add(item[2])
                else:
                    self._cancelled_by(tape, nodes, base, alone, item)
            return
        for item in silent:
            self._cancelled_by(tape, nodes, base, moved, item)

    def _cancelled_by(
        self,
        tape: Tape,
        nodes: list[int],
        base: dict[int, Tensor],
        moved: dict[int, Tensor],
        item: tuple[int, str, int, Tensor],
    ) -> None:
        vid, name, number, _ = item
        ends = _ends(tape, nodes, base, moved, vid)
        why = "" if not ends else _symmetry(tape, ends, base, moved)
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
        return any(bool(h.any()) for h in self.hit.values()) or bool(self.moved)

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
            hit = self.hit.get(name)
            if hit is None:
                hit = torch.zeros(value.shape, dtype=torch.bool)
            gap, symmetric = self._lines(name, hit.cpu())
            gaps += gap
            symmetries += symmetric
        return gaps, symmetries

    def _lines(self, name: str, hit: Tensor) -> tuple[list[str], list[str]]:
        hit = hit.reshape(1) if hit.ndim == 0 else hit
        symmetries: list[str] = []
        missing = torch.zeros(hit.shape[0], dtype=torch.bool)
        rows_hit = hit.reshape(hit.shape[0], -1).any(1)
        segments = self.segments(name)
        for number, lines in segments:
            if not bool(rows_hit[lines].any()):
                why = self.cancelled.get(name, {}).get(number, "")
                if number in self.moved.get(name, ()):
                    continue
                part = name if len(segments) == 1 else f"{name}[{int(lines[0])}:{int(lines[-1]) + 1}]"
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
        for axis in range(1, hit.ndim):
            line = hit.movedim(axis, 0).reshape(hit.shape[axis], -1).any(1)
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


def _groups(tensors: Mapping[int, Tensor | None]) -> Iterable[dict[int, Tensor]]:
    group: dict[int, Tensor] = {}
    size = 0
    for vid, t in tensors.items():
        if t is None:
            continue
        need = 8 * t.numel()
        if group and size + need > GROUP:
            yield group
            group, size = {}, 0
        group[vid] = t
        size += need
    if group:
        yield group


def _projection(tape: Tape, outputs: list[int], known: Mapping[int, Tensor]) -> Tensor | None:
    """One number that depends on every element of every output."""
    total: Tensor | None = None
    for i, vid in enumerate(outputs):
        y = known.get(vid)
        if y is None:
            continue
        held = tape.values[vid].tensor
        if held is not None and not _equal(y.detach(), held):
            raise NotFaithful(f"value {vid}")
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


def _perturbed_leaves(tape: Tape, items: list[tuple[int, str, int, Tensor]]) -> dict[int, Tensor]:
    leaves: dict[int, Tensor] = {}
    for vid, _, number, lines in items:
        held = tape.values[vid].tensor
        if held is None:
            continue
        now = leaves.get(vid, twin.lift(held).detach()).clone()
        new = perturbed(now, 7919 * vid + number).to(now.device)
        if now.ndim == 0:
            now = new
        else:
            now[lines] = new[lines]
        leaves[vid] = now
    return leaves


def _moved(vid: int, base: Mapping[int, Tensor], moved: Mapping[int, Tensor]) -> bool:
    a, b = base.get(vid), moved.get(vid)
    if a is None or b is None or a is b:
        return False
    if not a.is_floating_point():
        return not torch.equal(a, b)
    a, b = (torch.where(t.abs() < HUGE, t, 0.0) for t in (a, b))  # a masked score is no measure of the others
    top = float(a.abs().max()) if a.numel() else 0.0
    return bool(a.numel()) and float((a - b).abs().max()) > SHOWN * max(top, 1e-300)


def _changed_any(outputs: list[int], base: Mapping[int, Tensor], moved: Mapping[int, Tensor]) -> bool:
    return any(_moved(vid, base, moved) for vid in outputs)


def _ends(
    tape: Tape, nodes: list[int], base: Mapping[int, Tensor], moved: Mapping[int, Tensor], vid: int
) -> list[tuple[Node, int]]:
    """(node, input) where the change of `vid` goes in and none comes out."""
    changed = {vid}
    ends = []
    for index in nodes:
        node = tape.nodes[index]
        into = [v for v in node.inputs if v in changed]
        if not into:
            continue
        out = [o for o in node.outs if o >= 0 and _moved(o, base, moved)]
        if out:
            changed.update(out)
        else:
            ends.append((node, into[0]))
    return ends


def _symmetry(tape: Tape, ends: list[tuple[Node, int]], base: Mapping[int, Tensor], moved: Mapping[int, Tensor]) -> str:
    """By what every trace is cancelled for any input, or an empty text where one of them just ends."""
    said = set()
    for node, vid in ends:
        op = getattr(node.op, "__name__", str(node.op)).split(".")[0]
        before, after = base.get(vid), moved.get(vid)
        if before is None or after is None:
            return ""
        if op in _SOFTMAX:
            dim = node.args[1] if isinstance(node.args[1], int) else -1
            seen = torch.softmax(before, dim) > 1e-6
            shift = torch.nan_to_num(after - before)
            several = seen.sum(dim, keepdim=True) > 1
            if not bool((several & (shift.abs().amax(dim, keepdim=True) > 0)).any()):
                return ""  # one key only: every weight before it is cancelled, and for this input alone
            said.add("the softmax cancels it")
        elif op in _NORMS:
            said.add("the normalisation after it cancels it")
        elif op == "sub" and len(node.inputs) > 1 and all(_moved(v, base, moved) for v in node.inputs):
            said.add("it cancels in a difference")
        else:
            return ""
    return " and ".join(sorted(said))
