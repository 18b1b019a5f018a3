"""Two recorded runs side by side: which activations occur in both, where they part, and what a change would do.

Activations are paired by value, up to layout, so that models which cut, fuse or order their tensors in other ways
compare. One that occurs on one side only is no divergence where something after it occurs on both: a fused projection
occurs nowhere in a model that has three. What is left are the values from which an output is reached through nothing
that both have; the first of them is where the two part. A change is tried by running the rest of the tape again.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery import surface, twin
from surgery.mapper.record import MOVES, RANDOM, FingerprintIndex, Node, Ref, Tape, fingerprint

MATCH = 1e-9
BUDGET = 40_000  # operators that looking for one cause may run again
SOON = 12  # operators within which a weight must show that it is the right one
WINDOW = 90  # operators that a trial runs again, at most
_SPLITS = ("split", "split_with_sizes", "slice", "select", "unbind")
NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm")
SOFTMAX = ("_softmax", "_safe_softmax", "_log_softmax")
_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)


def caller() -> tuple[str, int]:
    """Where in the person's program an operator is called: the innermost line that is neither torch's nor ours."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH, "<")):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)


def named(target: nn.Module, module: str, file: str, line: int, *, short: bool = False) -> str:
    """A module in the person's words: its path, and its class and line where they are known. `short`: no class."""
    try:
        kind = "" if short else type(target.get_submodule(module)).__name__
    except AttributeError:
        kind = ""
    at = f"{Path(file).name}:{line}" if file else ""
    told = ", ".join(t for t in (kind, at) if t)
    return f"{module or 'the module itself'} ({told})" if told else module or "the module itself"


def op_name(node: Node) -> str:
    """aten.view.default -> view."""
    schema = getattr(node.op, "_schema", None)
    return str(schema.name).split("::")[1] if schema is not None else str(node.op)


class Untold(Exception):
    """A value that a trial needs was not kept."""


# What a change raises that does not fit the values it meets. A trial that fails is no cause, and never an error.
UNFIT = (Untold, RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError)


@dataclass
class Edit:
    """A change of a recorded run: other values in place of some, other operators in place of some, by number."""

    leaves: dict[int, Tensor] = field(default_factory=dict)
    ops: dict[int, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.leaves or self.ops)

    def with_(self, other: Edit) -> Edit:
        return Edit({**self.leaves, **other.leaves}, {**self.ops, **other.ops})


@dataclass
class Run:
    """One side: its tape, and by value whether the other side has it too (None: it says nothing)."""

    tape: Tape
    outputs: list[int]
    both: list[bool | None] = field(default_factory=list)
    barred: set[int] = field(default_factory=set)  # values that depend on new tensors
    twins: dict[int, list[int]] = field(default_factory=dict)  # the other side's values that equal this one
    fused: dict[int, bool] = field(default_factory=dict)  # whether a value is several in one, where it was asked for

    @cached_property
    def index(self) -> FingerprintIndex:
        values = enumerate(self.tape.values)
        return FingerprintIndex((vid, v.fingerprint) for vid, v in values if v.data and vid not in self.barred)

    def data_inputs(self, index: int) -> list[int]:
        return [v for v in self.tape.nodes[index].inputs if self.tape.values[v].data]

    def held(self, vid: int, depth: int = 0) -> Tensor:
        """What a value was; made again where it was not kept. Raises Untold."""
        value = self.tape.values[vid]
        if value.tensor is not None:
            return twin.lift(value.tensor)
        if value.node < 0 or depth > 64:
            raise Untold(vid)
        node = self.tape.nodes[value.node]
        out = call(node, lambda v: self.held(v, depth + 1))
        return out[value.out]

    def root(self, vid: int) -> int:
        """The value that this one is a relayout of, or else begins from: first inputs, a few operators back."""
        for _ in range(16):
            value = self.tape.values[vid]
            if value.node < 0 or not self.tape.nodes[value.node].inputs:
                break
            vid = self.tape.nodes[value.node].inputs[0]
        return vid

    def before(self, vids: Iterable[int], limit: int, *, data: bool | None = None) -> list[int]:
        """The nodes that these values are made by, nearest first. `data`: only those that do (not) depend on inputs."""
        found: list[int] = []
        todo, seen = sorted(vids, reverse=True), set(vids)
        while todo and len(found) < limit:
            vid = todo.pop(0)
            value = self.tape.values[vid]
            if value.node < 0 or (data is not None and value.data is not data):
                continue
            if value.node not in found:
                found.append(value.node)
            for v in self.tape.nodes[value.node].inputs:
                if v not in seen:
                    seen.add(v)
                    todo.append(v)
            todo.sort(reverse=True)
        return found

    def after(self, vids: Iterable[int], limit: int) -> list[int]:
        """The nodes that consume these values, and what consumes theirs, first ones first."""
        todo = set(vids)
        found: set[int] = set()
        nodes: set[int] = {c for v in todo for c in self.tape.consumers[v]}
        while nodes and len(found) < limit:
            first = min(nodes)
            nodes.discard(first)
            found.add(first)
            nodes |= {c for o in self.tape.nodes[first].outs if o >= 0 for c in self.tape.consumers[o]} - found
        return sorted(found)


def call(node: Node, value: Callable[[int], Tensor]) -> list[Tensor]:
    """Run a recorded operator on other values."""

    def put(x: Any) -> Any:
        return value(x.vid) if isinstance(x, Ref) else x

    out = node.op(*tree_map(put, node.args), **tree_map(put, node.kwargs))
    return [twin.lift(t) for t in (out if isinstance(out, (tuple, list)) else (out,))]


def recalled(op: Any, args: Any, kwargs: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """The operator on what a run gives it, with the constants of `args` and `kwargs`."""

    def run(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        here = tree_map(lambda a, b: b if isinstance(a, Ref) else a, args, given, is_leaf=lambda x: isinstance(x, Ref))
        more = {k: named[k] if isinstance(v, Ref) else v for k, v in kwargs.items()}
        return op(*here, **more)

    return run


def cuts(t: Tensor) -> Iterator[list[Tensor]]:
    """Ways in which a fused output (query, key and value; gate and up) lies in its last axis or its channels, blocked
    or by head."""
    for axis in dict.fromkeys((t.ndim - 1, 1)) if t.ndim > 1 else ():
        n = t.shape[axis]
        for parts in (2, 3):
            for groups in (g for g in range(1, 65) if n and n % (g * parts) == 0):
                cut = t.movedim(axis, -1).reshape(*t.movedim(axis, -1).shape[:-1], groups, parts, n // (groups * parts))
                yield [cut[..., i, :] for i in range(parts)]


class Pair:
    """The target's run and the reference's."""

    def __init__(self, ours: Run, theirs: Run) -> None:
        self.ours, self.theirs = ours, theirs
        self.spent = 0  # operators that trials ran again
        self._judge(ours, theirs)
        self._judge(theirs, ours)
        wanted = set(theirs.outputs)
        for vid in ours.outputs:  # an output must be one there, and not merely occur on the way
            if ours.both[vid] and wanted and not wanted.intersection(ours.twins.get(vid, wanted)):
                ours.both[vid] = False

    def _judge(self, run: Run, other: Run) -> None:
        for vid, value in enumerate(run.tape.values):
            found: bool | None = None
            if value.data and value.fingerprint is not None and not self._drawn(run, vid):
                run.twins[vid] = self.equal(value.fingerprint, math.prod(value.shape), other)
                found = bool(run.twins[vid])
                if not found and value.weights and value.tensor is not None and self._fused(run, vid):
                    found = self.in_pieces(value.tensor, other)
            run.both.append(found)

    @staticmethod
    def _drawn(run: Run, vid: int) -> bool:
        """Is it noise, or memory that nothing was written to yet? What stands in it says nothing; what is made with it
        does."""
        node = run.tape.values[vid].node
        name = op_name(run.tape.nodes[node]).lstrip("_") if node >= 0 else ""
        return name.startswith(("empty", "new_empty", *RANDOM)) and "dropout" not in name

    def equal(self, f: Any, numel: int, other: Run) -> list[int]:
        return [v for v in other.index.find(f, MATCH) if math.prod(other.tape.values[v].shape) == numel]

    @staticmethod
    def _fused(run: Run, vid: int) -> bool:
        """May a value be several in one? It is cut later."""
        if vid not in run.fused:
            run.fused[vid] = Pair._cut_later(run, vid)
        return run.fused[vid]

    @staticmethod
    def _cut_later(run: Run, vid: int) -> bool:
        reached = [vid]
        for _ in range(5):
            consumers = [c for v in reached for c in run.tape.consumers[v]]
            names = [op_name(run.tape.nodes[c]) for c in consumers]
            if any(n in _SPLITS for n in names):
                return True
            reached = [
                o for c, n in zip(consumers, names, strict=True) if n in ("add", *MOVES) for o in run.tape.nodes[c].outs
            ]
        return False

    def in_pieces(self, t: Tensor, other: Run) -> bool:
        return bool(self.pieces(t, other))

    def pieces(self, t: Tensor, other: Run) -> list[int]:
        """The other side's values that this one is made of, where it is several in one."""
        for several in cuts(twin.lift(t)):
            found: list[int] = []
            for piece in several:
                f = fingerprint(piece)
                equal = self.equal(f, piece.numel(), other) if f is not None else []
                if not equal:
                    break
                found += equal
            else:
                return found
        return []

    def occurs(self, t: Tensor) -> bool | None:
        """Whether a tensor occurs in the reference's run; None where it says nothing."""
        f = fingerprint(t)
        return None if f is None else bool(self.equal(f, t.numel(), self.theirs))

    # -- where they part ----------------------------------------------------------------------------------------------
    def frontier(self, run: Run, both: Mapping[int, bool | None] | None = None) -> list[int]:
        """The nodes of a run whose inputs the other side has, and whose result it has not, nor anything between it and
        an output. `both`: other findings for some values, in a trial."""
        known = both or {}

        def state(vid: int) -> bool | None:
            return known[vid] if vid in known else run.both[vid]

        tape = run.tape
        lost = {v for v in run.outputs if tape.values[v].data and state(v) is not True}
        for index in range(len(tape.nodes) - 1, -1, -1):
            node = tape.nodes[index]
            if lost.intersection(node.outs):
                lost.update(v for v in run.data_inputs(index) if state(v) is not True)
        clean: set[int] = set()
        found = []
        for index, node in enumerate(tape.nodes):
            inputs = run.data_inputs(index)
            fine = all(v in clean or state(v) is True or tape.values[v].origin == "input" for v in inputs)
            for o in node.outs:
                if o < 0 or not tape.values[o].data:
                    continue
                if state(o) is True or (fine and state(o) is None):
                    clean.add(o)
                elif fine and o in lost and state(o) is False and index not in found:
                    found.append(index)
        return found

    def sinks(self, run: Run) -> list[int]:
        """Values that the reference has not and from which nothing but such values comes: for a target whose output is
        not compared."""
        found = []
        for vid in range(len(run.tape.values)):
            if run.both[vid] is False and vid not in run.barred:
                after = [o for c in run.tape.consumers[vid] for o in run.tape.nodes[c].outs if o >= 0]
                beside = not run.tape.consumers[vid] and run.tape.values[vid].out > 0  # a mean that a norm gives too
                if not beside and all(o in run.barred or run.both[o] is None for o in after):
                    found.append(vid)
        return found

    def origin(self, vid: int) -> int:
        """The value that this one is, before it was laid out in another way."""
        return self.source(self.ours, vid)

    @staticmethod
    def source(run: Run, vid: int) -> int:
        for _ in range(16):
            value = run.tape.values[vid]
            if value.node < 0 or op_name(run.tape.nodes[value.node]) not in MOVES:
                break
            inputs = run.data_inputs(value.node)
            if len(inputs) != 1:
                break
            vid = inputs[0]
        return vid

    def sharing(self, ours: int, theirs: int) -> int:
        """How many inputs a node of ours shares with one of theirs."""
        count = 0
        for v in self.ours.data_inputs(ours):
            mine = set(self.ours.twins.get(v, [])) | set(self.ours.twins.get(self.origin(v), []))
            for w in self.theirs.data_inputs(theirs):
                if w in mine or self.source(self.theirs, w) in mine:
                    count += 1
                    break
        return count

    # -- trying -------------------------------------------------------------------------------------------------------
    def rerun(self, edit: Edit, first: int = -1, window: int = WINDOW) -> dict[int, Tensor]:
        """The values that a change makes other, within the window; none where it spoils one before node `first`."""
        run = self.ours
        known: dict[int, Tensor] = dict(edit.leaves)
        nodes = {c for v in edit.leaves for c in run.tape.consumers[v]} | set(edit.ops)
        done: set[int] = set()
        while nodes and len(done) < window:
            index = min(nodes)
            nodes.discard(index)
            done.add(index)
            self.spent += 1
            node = run.tape.nodes[index]
            if op_name(node) == "sync" or op_name(node).lstrip("_").startswith(RANDOM):
                continue

            def value(vid: int) -> Tensor:
                return known[vid] if vid in known else run.held(vid)

            if index in edit.ops:
                args, kwargs = (
                    tree_map(lambda x: value(x.vid) if isinstance(x, Ref) else x, a) for a in (node.args, node.kwargs)
                )
                made = edit.ops[index](args, kwargs)
                out = [twin.lift(t) for t in (made if isinstance(made, (tuple, list)) else (made,))]
            else:
                out = call(node, value)
            for vid, t in zip(node.outs, out, strict=True):
                if vid >= 0 and vid not in edit.leaves:
                    was = run.tape.values[vid].tensor
                    if was is not None and was.shape == t.shape and torch.equal(twin.lift(was), t):
                        continue  # nothing follows from what is the same
                    known[vid] = t
                    if index < first and run.both[vid] and not self._fused(run, vid) and self.occurs(t) is False:
                        return {}
                    nodes |= set(run.tape.consumers[vid]) - done
        return known

    def mended(self, edit: Edit, first: int, soon: bool = False) -> bool:
        """Whether a change removes the divergence at node `first`: what is made of the changed values occurs in the
        reference, and where the two still part is further on. `soon`: it must occur within a few operators."""
        if not edit or (soon and not self._mended(edit, first, SOON)):
            return False
        return self._mended(edit, first, WINDOW)

    def _mended(self, edit: Edit, first: int, window: int) -> bool:
        try:
            with twin.math_only():
                known = self.rerun(edit, first, window)
                both = self.findings(known)
        except UNFIT:
            return False  # the changed program does not run: that is not the change
        run = self.ours
        # Something that the reference has and that was nowhere: a value that is merely passed on would not show that.
        shown = [v for v in known if both[v] is True and (v not in edit.leaves or v in run.outputs)]
        if not any(self._regained(v, known[v]) for v in shown):
            return False
        if window == SOON:
            return True
        left = self.frontier(run, both)
        if not left:
            return True
        if left[0] <= first:
            return False
        # What consumes a value that was put in place must agree too, else putting in the reference's own would do.
        direct = {c for v in edit.leaves if run.tape.values[v].data for c in self._consumers(v)} | set(edit.ops)
        return not direct.intersection(left)

    def _regained(self, vid: int, t: Tensor) -> bool:
        f = fingerprint(t)
        found = self.equal(f, t.numel(), self.theirs) if f is not None else []
        if not found and self.ours.both[vid] is False:
            return True  # it is there in pieces
        if vid in self.ours.outputs and self.ours.both[vid] is False and set(found) & set(self.theirs.outputs):
            return True
        return any(self.theirs.both[w] is not True for w in found)

    def _consumers(self, vid: int) -> Iterator[int]:
        for c in self.ours.tape.consumers[vid]:
            yield c
            if op_name(self.ours.tape.nodes[c]) in MOVES:
                for o in self.ours.tape.nodes[c].outs:
                    if o >= 0:
                        yield from self._consumers(o)

    def users(self, vid: int) -> Iterator[int]:
        """The nodes that consume a value, also in another layout."""
        return self._consumers(vid)

    def findings(self, known: Mapping[int, Tensor]) -> dict[int, bool | None]:
        """By changed value, whether the reference has it."""
        found: dict[int, bool | None] = {}
        for vid, t in known.items():
            if not self.ours.tape.values[vid].data:
                found[vid] = None
                continue
            found[vid] = self.occurs(t)
            if found[vid] is False and self.ours.tape.values[vid].weights and self._fused(self.ours, vid):
                found[vid] = self.in_pieces(t, self.theirs)
        return found

    def nearest(self, vid: int, among: Iterable[int]) -> tuple[float, int]:
        """(residual, node) of the closest of the reference's values of the same size, up to layout."""
        best, where = surface.INF, -1
        try:
            t = self.ours.held(vid)
        except Untold:
            return best, where
        for index in among:
            for o in self.theirs.tape.nodes[index].outs:
                value = self.theirs.tape.values[o] if o >= 0 else None
                if value is None or value.tensor is None or math.prod(value.shape) != t.numel() or not value.data:
                    continue
                if value.tensor.is_floating_point():
                    r = surface.residual(value.tensor, t)
                    if r < best:
                        best, where = r, index
        return best, where


@dataclass(frozen=True)
class Found:
    """A cause: its name, what to tell, the change, and where: a node, and the module where it is another one's."""

    cause: str
    said: str
    edit: Edit
    node: int
    module: str | None = None


@dataclass
class Place:
    """Where the two part: the first node of ours, the reference's that take the same, and what follows each."""

    pair: Pair
    first: int
    theirs: list[int]  # the reference's first nodes that we have not
    ours_after: list[int]
    theirs_after: list[int]
    leaves: frozenset[str] = frozenset()  # our modules that hold no others
    silent: frozenset[str] = frozenset()  # our modules that hold others and have no forward of their own (ModuleList)
    chains: Mapping[str, str] = field(default_factory=dict)  # a chain of what it holds (Sequential), and its first
    until: float = math.inf  # time.monotonic() after which nothing more is tried

    @property
    def node(self) -> Node:
        return self.pair.ours.tape.nodes[self.first]

    def ok(self, edit: Edit, soon: bool = False) -> bool:
        if self.pair.spent > BUDGET or time.monotonic() > self.until:
            return False
        return self.pair.mended(edit, self.first, soon)

    def left(self, edit: Edit) -> list[int]:
        """The nodes where the two still part with this change. All that follows it is run again: what lay beyond the
        window of a trial would still have its old values, and seem to part."""
        run, spent = self.pair.ours, self.pair.spent
        try:
            known = self.pair.rerun(edit, window=len(run.tape.nodes))
            return self.pair.frontier(run, self.pair.findings(known))
        except UNFIT:
            return []
        finally:
            self.pair.spent = spent  # that is no trial

    def giver(self, vid: int) -> str:
        """The module that decides what our first node takes: the caller of a module that holds no others, where the
        value comes from outside of it."""
        module = self.node.module
        inside = self.maker(vid).startswith(module)
        if inside or module not in self.leaves:
            return module
        return self.between(self.scope(module.rpartition(".")[0]), vid)

    def caller(self) -> str:
        """The module whose forward goes on with what our first node gives."""
        module = self.node.module
        return self.scope(module.rpartition(".")[0]) if module in self.leaves else module

    def scope(self, module: str) -> str:
        """The module whose forward runs what this one holds, where it has none of its own."""
        while module and module in self.silent:
            module = module.rpartition(".")[0]
        return module

    def between(self, module: str, vid: int) -> str:
        """Where a chain of modules passes on what one of them made, that one; unless it is a single operator."""
        if module not in self.chains:
            return module
        maker = self.maker(vid)
        start = f"{module}." if module else ""
        if not maker.startswith(start):
            first = self.chains[module]
            if not f"{self.node.module}.".startswith(f"{first}."):
                return module  # what was made under another name stands before it in the chain
            return self.between(self.scope(module.rpartition(".")[0]), vid) if module else module
        child = start + maker[len(start) :].split(".")[0]
        return module if child in self.leaves or child == module else self.between(child, vid)

    def maker(self, vid: int) -> str:
        """The module in whose forward a value was computed."""
        run = self.pair.ours
        made_by = run.tape.values[self.pair.origin(vid)].node
        return run.tape.nodes[made_by].module if made_by >= 0 else ""

    def adder(self, vid: int, other: int) -> str:
        """The module that would add two values: the innermost one in which both are computed, or the giver."""
        makers = [self.maker(vid).split("."), self.maker(other).split(".")]
        both = ".".join(os.path.commonprefix(makers))  # noqa: RUF071  of lists it compares name by name
        given = self.giver(vid)
        found = both if len(both) > len(given) and both.startswith(given) else given
        found = self.scope(found.rpartition(".")[0] if found in self.leaves else found)
        if found in self.chains or not self.maker(vid).startswith(found):
            whole = self._returner(vid, other)
            if whole:
                return whole
        return self.between(found, vid)

    def _returner(self, vid: int, other: int) -> str:
        """The outermost module that takes `other`, makes `vid` of it and gives it to another module."""
        run, taker = self.pair.ours, self.node.module
        found = ""
        path = self.maker(vid)
        while path and not f"{taker}.".startswith(f"{path}."):
            made_here = self.maker(other).startswith(path)
            takes = any(run.tape.nodes[c].module.startswith(path) for c in self.pair.users(other))
            if path not in self.leaves and path not in self.silent and path not in self.chains and takes:
                found = path if not made_here else found
            path = path.rpartition(".")[0]
        return found

    @staticmethod
    def normalises(run: Run, node: Node) -> bool:
        """Does a node normalise, or scale by what stored statistics give?"""
        free = [v for v in node.inputs if not run.tape.values[v].data]
        made = [op_name(run.tape.nodes[n]) for n in run.before(free, 12, data=False)]
        return op_name(node) in NORMS or any(n in ("sqrt", "rsqrt", "reciprocal") for n in (*made, op_name(node)))

    def named_like(self, value: Tensor) -> str:
        """Our parameter that holds these values, or an empty text."""
        run = self.pair.ours
        for name, vid in run.tape.params.items():
            t = run.tape.values[vid].tensor
            if t is not None and tuple(t.shape) == tuple(value.shape) and torch.equal(twin.lift(t), twin.lift(value)):
                return name
        return ""

    def results(self, nodes: list[int]) -> Iterator[tuple[int, int, Tensor]]:
        """(node, value, tensor) of the float results of our nodes that the reference has not."""
        run = self.pair.ours
        for index in nodes:
            for o in run.tape.nodes[index].outs:
                if o >= 0 and run.tape.values[o].data and run.both[o] is False:
                    try:
                        yield index, o, run.held(o)
                    except Untold:
                        continue
