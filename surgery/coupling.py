"""The groups of coupled axes of a model: what has to change together when one width changes.

    coupled(model, example)                  # every group, found from the dataflow of one run, never from names
    coupled(model, example).find("h.0.mlp")  # the widths that lie within that module

A group is one space of units (surgery.unit_spaces): the hidden width, the neurons of one MLP, the heads of one
attention. Its members are all tensor axes that carry these units, alone or as a factor (heads times head width) or in
several pieces (a fused qkv carries the heads three times). Tied tensors are members under every name.

Sources: Fang et al., arXiv 2301.12900 (groups of parameters that structural pruning must cut together).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from surgery import twin
from surgery.errors import SurgeryError
from surgery.mapper.record import NotRecordable, Tape, record
from surgery.probe import Probe
from surgery.unit_flow import flow
from surgery.unit_spaces import Space, describe, factors, find, fix, leaves, pieces
from surgery.unit_step import Flow, Role

KERNEL = "it is a side of the kernel"


@dataclass(frozen=True)
class Member:
    """One axis of one tensor that carries the units of a group. `times`: in how many places of the axis; `layout`: all
    that the axis carries, such as "heads*head_dim + heads*head_dim"; `roles`: how the program uses the axis ("out",
    "in", "add", "scale", "rows"; see surgery.unit_step.Use)."""

    tensor: str
    axis: int
    times: int
    layout: str
    roles: frozenset[Role]


@dataclass(frozen=True, eq=False)
class Group:
    """Axes that change together.

    name: hidden, inner, heads, query_heads, head_dim, group_width, vocabulary, positions, input, output, kernel
        or unused.
    marks: what operators do with the units, and in which modules ("norm", "mean", "softmax", "dot", "sum", "lookup",
        "position", "attention", "groups", "input", "output", "residual"); "fixed" with the reason.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    marks: Mapping[str, tuple[str, ...]]
    space: Space

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors, each once."""
        return tuple(dict.fromkeys(member.tensor for member in self.members))

    @property
    def producers(self) -> tuple[Member, ...]:
        """The axes along which these units are made: rows of a projection, an embedding's width."""
        return tuple(m for m in self.members if "out" in m.roles)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The axes along which a product sums over these units."""
        return tuple(m for m in self.members if "in" in m.roles)

    @property
    def normed(self) -> bool:
        """Does a norm or a mean reduce over these units?"""
        return "norm" in self.marks or "mean" in self.marks

    @property
    def refusal(self) -> str:
        """Why no rule can change these units, or nothing."""
        if "fixed" in self.marks:
            return self.marks["fixed"][0]
        if "input" in self.marks:
            return "the input has this size"
        if "lookup" in self.marks or "position" in self.marks:
            return "they are looked up by number"
        return ""

    def within(self, module: str) -> bool:
        """Do all members lie in that module?"""
        return all(fnmatch.fnmatchcase(tensor, f"{module}.*") for tensor in self.tensors) if module else True

    def __str__(self) -> str:
        few = ", ".join(f"{m.tensor}[{m.axis}]" for m in self.members[:4])
        more = f" and {len(self.members) - 4} more" if len(self.members) > 4 else ""
        return f"{self.name} of {self.size}: {few}{more}"


@dataclass(frozen=True, eq=False)
class Coupling:
    """All groups of a model, and the run that they were found in."""

    model: nn.Module
    run: Callable[[nn.Module, Any], Any]
    x: Any  # what it was run on
    flow: Flow
    groups: tuple[Group, ...]

    @property
    def tape(self) -> Tape:
        """The recorded run."""
        return self.flow.tape

    @property
    def unknown(self) -> tuple[str, ...]:
        """Operators that have no rule, with their modules: what they touch is fixed."""
        return tuple(dict.fromkeys(self.flow.unknown))

    @cached_property
    def by_space(self) -> Mapping[Space, Group]:
        return {find(group.space): group for group in self.groups}

    def spaces(self, tensor: str) -> list[Space]:
        """What the axes of a tensor carry."""
        return self.flow.axes[self.tape.params[tensor]]

    def names(self, vid: int) -> list[str]:
        """The state-dict names of a parameter; several where it is tied."""
        return [name for name, value in self.tape.params.items() if value == vid]

    def ties(self) -> list[list[str]]:
        """The names of each tensor that has more than one."""
        several = [self.names(vid) for vid in dict.fromkeys(self.tape.params.values())]
        return [names for names in several if len(names) > 1]

    def find(self, where: str | Group | None = None, *names: str) -> tuple[Group, ...]:
        """The groups of these names ("inner", "heads", ...; any) that lie wholly within a module: `where` is its dotted
        path, with * for any text, or the name of a group for all groups of that name.

        SurgeryError where there is none, with what there is."""
        if isinstance(where, Group):  # of another run, perhaps: what it is here
            same = tuple(group for group in self.groups if group.members == where.members)
            if not same:
                raise SurgeryError(f"this model has no group {where}", hint="Take the groups from coupled(model, ...).")
            return same
        known = {group.name for group in self.groups}
        pool = [group for group in self.groups if not names or group.name in names]
        if where in known and (not names or where in names):
            return tuple(group for group in pool if group.name == where)
        found = tuple(group for group in pool if group.within(where or ""))
        if not found:
            paths = [path for path, _ in self.model.named_modules() if path]
            close = difflib.get_close_matches(where or "", [*paths, *known], n=3, cutoff=0.5)
            listed = ", ".join(str(group) for group in pool[:6]) or "there is none in this model"
            wanted = f"group {' or '.join(names)}" if names else "group"
            raise SurgeryError(
                f"no {wanted} lies within {where!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""),
                hint=f"Name a module, with * for any text, or a group. Of groups there are: {listed}.",
            )
        return found


def runner(example: Any) -> tuple[Callable[[nn.Module, Any], Any], Any]:
    """(how a model is run, on what): a Probe's reference and first input, or a model's arguments: a tensor, a tuple, or
    a dict of keyword arguments."""
    if isinstance(example, Probe):
        return example.run_reference, example.search_input()

    def call(module: nn.Module, x: Any) -> Any:
        if isinstance(x, dict):
            return module(**x)
        return module(*x) if isinstance(x, (tuple, list)) else module(x)

    return call, example


def coupled(model: nn.Module, example: Any) -> Coupling:
    """The groups of coupled axes of `model`, from one run in float64 on `example`: a Probe, or the model's arguments (a
    tensor, a tuple, or a dict of keyword arguments). The model is not changed.

    SurgeryError where the run cannot be recorded."""
    run, x = runner(example)
    try:
        tape = record(run, twin.twin(model), x)
    except NotRecordable as error:
        raise SurgeryError(f"the model's dataflow cannot be recorded: {error}") from error
    return seen(model, run, x, tape)


def seen(model: nn.Module, run: Callable[[nn.Module, Any], Any], x: Any, tape: Tape) -> Coupling:
    """The groups of a run that was recorded."""
    traced = flow(tape)
    for name, vid in tape.params.items():
        if not tape.consumers[vid]:
            for space in traced.axes[vid]:
                fix(space, f"{name} is not reached by the run")
    return Coupling(model, run, x, traced, tuple(_groups(traced)))


def _groups(traced: Flow) -> Iterator[Group]:
    tape = traced.tape
    carried: dict[Space, dict[tuple[int, int], int]] = {}
    for vid in dict.fromkeys(tape.params.values()):
        for axis, space in enumerate(traced.axes[vid]):
            for leaf in leaves(space):
                places = carried.setdefault(find(leaf), {})
                places[vid, axis] = places.get((vid, axis), 0) + 1
    roles: dict[tuple[int, int], set[Role]] = {}
    for use in traced.uses:
        roles.setdefault((use.param, use.axis), set()).add(use.role)
    inside = _within(traced, carried)
    label = {leaf: _name_of(leaf, inside) for leaf in carried}
    for leaf, places in carried.items():
        members = tuple(
            Member(name, axis, times, describe(traced.axes[vid][axis], label), frozenset(roles.get((vid, axis), ())))
            for (vid, axis), times in places.items()
            for name in tape.params
            if tape.params[name] == vid
        )
        marks = {what: tuple(where) for what, where in leaf.marks.items()}
        yield Group(label[leaf], leaf.size, members, marks, leaf)


def _within(traced: Flow, carried: Mapping[Space, Mapping[tuple[int, int], int]]) -> dict[Space, str]:
    """The spaces that stand within a head or a group: "query_heads", of which several share one key and value head,
    "head_dim", "group_width"."""
    out: dict[Space, str] = {}
    for places in carried.values():
        for vid, axis in places:
            for piece in pieces(traced.axes[vid][axis]):
                heads = groups = False
                for factor in factors(piece):
                    for leaf in leaves(factor):
                        if heads:
                            out[find(leaf)] = "query_heads" if "attention" in leaf.marks else "head_dim"
                        elif groups:
                            out[find(leaf)] = "group_width"
                    heads = heads or any("attention" in leaf.marks for leaf in leaves(factor))
                    groups = groups or any("groups" in leaf.marks for leaf in leaves(factor))
    return out


def _name_of(leaf: Space, inside: Mapping[Space, str]) -> str:
    marks = leaf.marks
    if leaf in inside:
        return inside[leaf]
    if any("not reached" in why for why in marks.get("fixed", ())):
        return "unused"
    if "attention" in marks:
        return "heads"
    if any(why.startswith(KERNEL) for why in marks.get("fixed", ())):
        return "kernel"
    for what, name in (("lookup", "vocabulary"), ("position", "positions")):
        if what in marks:
            return name
    if "softmax" in marks and "dot" in marks:
        return "positions"
    if "residual" in marks or "norm" in marks or "mean" in marks:
        return "hidden"
    if "input" in marks or any(why.startswith("a constant") for why in marks.get("fixed", ())):
        return "input"
    return "output" if "output" in marks else "inner"
