"""What computes as a changed body does where the class of the model does not take such a body.

Shared key and value heads: the class as it is, each head of a group reading the one that they share (torch's
parametrizations). Heads that are gone: the run of the class with these heads at zero is recorded, and its operators are
called again on tensors without them. Every such run is compared with the one that it was made from.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, stateless
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

from surgery import twin
from surgery.coupling import Coupling, Group, seen
from surgery.errors import SurgeryError
from surgery.mapper.record import SYNC, Node, Ref, Tape, _name, overlay, record
from surgery.proof import GATE
from surgery.running import all_tensors
from surgery.surface import relative
from surgery.unit_flow import box_of
from surgery.unit_spaces import Index, Space, find, index_of

_HELD = 16  # recorded runs that are kept for inputs seen before


@dataclass(frozen=True)
class StandIn:
    """A module that holds the tensors of a plan, and how it is run on an input: for proofs, not for use.

    names: of those that it holds under another name than the plan's target has, that name.
    """

    module: nn.Module
    run: Callable[[nn.Module, Any], Any]
    names: Mapping[str, str] = field(default_factory=dict)


# -- heads that share -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shared:
    """How an axis of a tensor goes from shared heads to as many as the class has.

    parts: those of the axis in order, each a length and whether it is one of `kv_heads` keys or values, which `times`
        heads read each. blocks: the class has the parts of each of so many heads beside each other.
    """

    axis: int
    kv_heads: int
    times: int
    parts: tuple[tuple[int, bool], ...]
    blocks: int = 1

    def spread(self, small: Tensor) -> Tensor:
        """The tensor as the class takes it."""
        out, at = list[Tensor](), 0
        for length, shared in self.parts:
            part = small.narrow(self.axis, at, length)
            at += length
            if shared:
                apart = part.unflatten(self.axis, (self.kv_heads, length // self.kv_heads)).unsqueeze(self.axis + 1)
                shape = list(apart.shape)
                shape[self.axis + 1] = self.times
                part = apart.expand(shape).flatten(self.axis, self.axis + 2)
            out.append(part)
        if self.blocks > 1:
            apart = [part.unflatten(self.axis, (self.blocks, part.shape[self.axis] // self.blocks)) for part in out]
            return torch.cat(apart, dim=self.axis + 1).flatten(self.axis, self.axis + 1)
        return torch.cat(out, dim=self.axis) if len(out) > 1 else out[0]


class _Spread(nn.Module):
    """A parametrization: the tensor that is held -> the one that the class uses."""

    def __init__(self, how: Shared) -> None:
        super().__init__()
        self.how = how

    def forward(self, small: Tensor) -> Tensor:
        return self.how.spread(small)


def sharing(coupling: Coupling, values: Mapping[str, Tensor], how: Mapping[str, Shared]) -> StandIn | None:
    """The model with these tensors held small, and used as its class has them. None where one of them is tied, or where
    it does not compute the same."""
    if any(len(names) > 1 and not how.keys().isdisjoint(names) for names in coupling.ties()):
        return None
    module = copy.deepcopy(coupling.model)
    names: dict[str, str] = {}
    for name, each in how.items():
        path, _, local = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(local)
        if old is None:
            return None
        small = values[name].detach().to(dtype=old.dtype, device=old.device).contiguous()
        owner._parameters[local] = nn.Parameter(small, old.requires_grad)
        parametrize.register_parametrization(owner, local, _Spread(each), unsafe=True)
        names[name] = f"{path}.parametrizations.{local}.original".lstrip(".")
    return StandIn(module, coupling.run, names)


# -- heads that are gone ----------------------------------------------------------------------------------------------
class _Holder(nn.Module):
    """A module of which only the tensors are left."""


class Rewritten(nn.Module):
    """The tensors of a model without some of its heads, under the names that the model has. It is run by `rerun`."""

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], programs: _Programs) -> None:
        super().__init__()
        self.programs = programs
        memo: dict[int, Tensor] = {}
        own = all_tensors(model)
        for name, t in own.items():
            value = values.get(name)
            if id(t) not in memo and value is not None and value.shape != t.shape:
                small = value.detach().to(dtype=t.dtype, device=t.device).contiguous()
                memo[id(t)] = nn.Parameter(small, t.requires_grad) if isinstance(t, nn.Parameter) else small
        _hold(self, model, memo, {})
        self.eval()


def _hold(into: nn.Module, model: nn.Module, memo: Mapping[int, Tensor], done: dict[int, nn.Module]) -> None:
    done[id(model)] = into
    for name, parameter in model._parameters.items():
        into._parameters[name] = None if parameter is None else memo.get(id(parameter), parameter)  # type: ignore[assignment]
    for name, buffer in model._buffers.items():
        persistent = name not in model._non_persistent_buffers_set
        into.register_buffer(name, None if buffer is None else memo.get(id(buffer), buffer), persistent=persistent)
    for name, child in model._modules.items():
        if child is not None and id(child) not in done:
            _hold(_Holder(), child, memo, done)
        into._modules[name] = None if child is None else done[id(child)]


@dataclass(frozen=True, eq=False)
class _Program:
    """One recorded run of the class, and what its values become."""

    tape: Tape
    chosen: Mapping[Space, Index]
    axes: Mapping[int, Sequence[Space]]
    inputs: tuple[int, ...]
    buffers: Mapping[int, str]  # constants that are buffers which no state dict holds

    def shape(self, vid: int) -> tuple[int, ...]:
        return tuple(len(index_of(space, self.chosen)) for space in self.axes[vid])

    def moves(self, vid: int) -> bool:
        return self.shape(vid) != self.tape.values[vid].shape


@dataclass(eq=False)
class _Programs:
    """The class without its tensors, which heads go, and its recorded runs. One for all copies of a stand-in."""

    bare: nn.Module
    run: Callable[[nn.Module, Any], Any]
    kept: Mapping[str, Mapping[int, tuple[int, Index]]]  # tensor -> axis -> (its old length, the places that stay)
    groups: Sequence[tuple[Group, Index]]
    known: dict[tuple[Any, ...], _Program] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Programs:
        return self

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What a stand-in holds, by the names that the class has; also where one is computed (parametrizations)."""
        out = {}
        for name in all_tensors(self.bare):
            path, _, local = name.rpartition(".")
            out[name] = getattr(module.get_submodule(path), local)
        return out

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as the class takes them, with zeros for the heads that are gone."""
        out = dict(tensors)
        for name, axes in self.kept.items():
            value = twin.lift(out[name]).detach() if _is_exact(out[name]) else out[name].detach()
            for axis, (length, index) in axes.items():
                shape = list(value.shape)
                shape[axis] = length
                value = value.new_zeros(shape).index_copy_(axis, torch.from_numpy(index).to(value.device), value)
            out[name] = value
        return {name: t.stored if isinstance(t, twin.Lifted) else t for name, t in out.items()}

    def program(self, module: nn.Module, x: Any) -> _Program:
        key = _key(x)
        if key is not None and key in self.known:
            return self.known[key]
        with _apart():
            tensors = self.tensors(module)
            made, pure = self._recorded(tensors, x)
            got = tree_leaves(_replayed(made, tensors, x))
            meant = [made.tape.values[vid].tensor for vid in made.tape.outputs()]
            out = [t for t in got if isinstance(t, Tensor)]
            for vid, a, b in zip(made.tape.outputs(), meant, out, strict=True):
                if a is None or made.moves(vid) or not _alike(a, twin.lift(b)):
                    raise SurgeryError(
                        "without these heads the reference computes something else than with these heads at zero",
                        hint="Build the reference without them yourself, and give it as the probe's.",
                    )
        if key is not None and pure:
            if len(self.known) >= _HELD:
                del self.known[next(iter(self.known))]
            self.known[key] = made
        return made

    def _recorded(self, tensors: Mapping[str, Tensor], x: Any) -> tuple[_Program, bool]:
        """The run on x, and whether it is the same for other weights."""
        clone = twin.twin(self.bare, self.whole(tensors))
        tape = record(self.run, clone, x, sizes=frozenset())
        coupling = seen(self.bare, self.run, x, tape)
        chosen: dict[Space, Index] = {}
        for group, index in self.groups:
            same = [each for each in coupling.groups if _places(each) == _places(group)]
            if len(same) != 1:
                raise SurgeryError(
                    f"{group}: on this input the reference runs otherwise",
                    hint="Give inputs on which it runs in one way, or build the reference yourself.",
                )
            chosen[find(same[0].space)] = index
        inputs = tuple(vid for vid, value in enumerate(tape.values) if value.origin == "input")
        looks = [node for node in tape.nodes if node.op == "sync" or node.op in SYNC]
        pure = not any(tape.values[vid].weights for node in looks for vid in node.inputs)
        axes = coupling.flow.axes
        return _Program(tape, chosen, axes, inputs, _buffers(tape, self.bare, tensors)), pure


def _places(group: Group) -> tuple[Any, ...]:
    return group.name, group.size, frozenset((m.tensor, m.axis, m.times) for m in group.members)


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    return not a.numel() or relative(a, b) <= GATE


def _buffers(tape: Tape, bare: nn.Module, tensors: Mapping[str, Tensor]) -> dict[int, str]:
    own = set(bare.state_dict(keep_vars=True))
    held = {name: twin.lift(t).detach() for name, t in tensors.items() if name not in own}
    out = {}
    for vid, value in enumerate(tape.values):
        if value.origin == "const" and not value.name and value.tensor is not None and value.tensor.numel() > 1:
            names = [name for name, t in held.items() if t.shape == value.shape and torch.equal(t, value.tensor)]
            if names:
                out[vid] = names[0]
    return out


def _key(x: Any) -> tuple[Any, ...] | None:
    """What tells inputs apart; None where that cannot be told."""
    told: list[Any] = []
    for leaf in tree_iter(x):
        if isinstance(leaf, Tensor):
            t = twin.lift(leaf).detach().to("cpu").contiguous()
            told.append((tuple(t.shape), t.dtype, hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy()).digest()))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            told.append(leaf)
        else:
            return None
    return tuple(told)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Out of sight of whatever records or lifts the run that goes on outside."""
    with contextlib.ExitStack() as stack:
        while _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(twin.math_only())
        yield


def _is_exact(t: Tensor) -> bool:
    return isinstance(t, (twin.Lifted, twin.Made)) or t.dtype == torch.float64


def without_heads(coupling: Coupling, values: Mapping[str, Tensor], groups: Mapping[Group, Index]) -> StandIn | None:
    """What computes as the model does without the heads that are not in the index of their group. `values`: the tensors
    that are left. None where the model's operators cannot be called so."""
    model = coupling.model
    chosen = {find(group.space): index for group, index in groups.items()}
    kept: dict[str, dict[int, tuple[int, Index]]] = {}
    for name, vid in coupling.tape.params.items():
        for axis, space in enumerate(coupling.flow.axes[vid]):
            index = index_of(space, chosen)
            if len(index) != find(space).size:
                kept.setdefault(name, {})[axis] = (find(space).size, np.ascontiguousarray(index))
    bare = twin.clone(
        model, lambda t: nn.Parameter(t.detach().to("meta"), False) if _is_parameter(t) else t.detach().to("meta")
    )
    module = Rewritten(model, values, _Programs(bare, coupling.run, kept, list(groups.items())))
    try:
        rerun(twin.twin(module), tree_map(twin.lift, coupling.x))
    except (SurgeryError, RuntimeError, ValueError, TypeError, IndexError):
        return None  # an operator that does not take these sizes, by whatever it says so
    return StandIn(module, rerun)


def _is_parameter(t: Tensor) -> bool:
    return isinstance(t, nn.Parameter)


def rerun(module: nn.Module, x: Any) -> Any:
    """Run a Rewritten: in float64 operator by operator without the heads that are gone; else the class with these heads
    at zero, which computes the same."""
    programs = module.programs
    assert isinstance(programs, _Programs)
    tensors = programs.tensors(module)
    if all(_is_exact(t) for t in tensors.values() if t.is_floating_point()):
        return _replayed(programs.program(module, x), tensors, x)
    with stateless._reparametrize_module(programs.bare, programs.whole(tensors)):
        return programs.run(programs.bare, x)


def _replayed(program: _Program, own: Mapping[str, Tensor], x: Any) -> Any:
    """The recorded operators on the tensors that are left."""
    tape = program.tape
    env: dict[int, Tensor] = {}
    leaves = list({id(t): t for t in tree_iter(x) if isinstance(t, Tensor)}.values())
    env.update(zip(program.inputs, leaves, strict=True))
    for vid, value in enumerate(tape.values):
        name = program.buffers.get(vid, value.name)
        if value.origin in ("param", "const") and name in own:
            env[vid] = own[name]
        elif value.origin == "const" and value.tensor is not None:
            env[vid] = _chosen(program, vid, value.tensor)
    last = {vid: index for index, node in enumerate(tape.nodes) for vid in node.inputs}
    kept = set(tape.outputs())
    for index, node in enumerate(tape.nodes):
        if node.op != "sync" and any(vid >= 0 and vid not in env for vid in node.outs):
            _called(program, node, env)
        for vid in node.inputs:
            if last[vid] == index and vid not in kept:
                env.pop(vid, None)
    return tree_map(lambda r: env[r.vid] if isinstance(r, Ref) else r, tape.result)


def _chosen(program: _Program, vid: int, value: Tensor) -> Tensor:
    for axis, space in enumerate(program.axes[vid]):
        index = index_of(space, program.chosen)
        if len(index) != value.shape[axis]:
            value = value.index_select(axis, torch.from_numpy(np.ascontiguousarray(index)))
    return value


def _called(program: _Program, node: Node, env: dict[int, Tensor]) -> None:
    def put(x: Any) -> Any:
        return env[x.vid] if isinstance(x, Ref) else x

    moved = any(program.moves(vid) for vid in (*node.inputs, *node.outs) if vid >= 0)
    if node.op is overlay:
        found: Any = _overlaid(program, node, env)
    else:
        op, args, kwargs = node.op, list(node.args), {k: v for k, v in node.kwargs.items() if k != "saw"}
        if moved:
            op, args, kwargs = _sized(program, node, kwargs)
        if op in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            op = torch.ops.aten.reshape.default  # strides need not be the recorded run's
        found = op(*twin.mapped(put, args), **{k: twin.mapped(put, v) for k, v in kwargs.items()})
    outs = list(found) if isinstance(found, (tuple, list)) else [found]
    for vid, t in zip(node.outs, outs, strict=True):
        if vid >= 0:
            if moved and tuple(t.shape) != program.shape(vid):
                raise SurgeryError(f"{_name(node.op)} in {node.module}: {tuple(t.shape)}, not {program.shape(vid)}")
            env[vid] = t


def _sized(program: _Program, node: Node, kwargs: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """An operator and its arguments, whole numbers that are sizes as they are now."""
    args, name = list(node.args), _name(node.op)
    out = next(vid for vid in node.outs if vid >= 0)
    for at, argument in enumerate(node.op._schema.arguments):
        if argument.name in ("size", "shape") and at < len(args):
            args[at] = list(program.shape(out))
        elif argument.name in ("size", "shape") and argument.name in kwargs:
            kwargs[argument.name] = list(program.shape(out))
    if name in ("slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"):
        first = args[0].vid
        at = 1 if name in ("slice", "select") else 2
        dim = (args[at] if len(args) > at else kwargs.pop("dim", 0)) % len(program.axes[first])
        index = index_of(program.axes[first][dim], program.chosen)
        if name == "slice":
            size = program.tape.values[first].shape[dim]
            start, stop = slice(args[2] if len(args) > 2 else None, args[3] if len(args) > 3 else None).indices(size)[
                :2
            ]
            args[1:4] = [dim, int(np.searchsorted(index, start)), int(np.searchsorted(index, stop))]
        elif name == "select":
            size = program.tape.values[first].shape[dim]
            place = np.searchsorted(index, args[2] % size)
            if place == len(index) or index[place] != args[2] % size:
                raise SurgeryError(f"select in {node.module} takes a unit that is gone")
            args[2] = int(place)
        else:
            sizes = [program.shape(vid)[dim] for vid in node.outs]
            return torch.ops.aten.split_with_sizes.default, [args[0], sizes, dim], {}
    return node.op, args, kwargs


def _overlaid(program: _Program, node: Node, env: Mapping[int, Tensor]) -> Tensor:
    """A write in place: all of the tensor, or a box of it."""
    old, new = node.args[0].vid, node.args[1].vid
    at, take = node.args[2], node.args[3]
    values = program.tape.values
    if not any(program.moves(vid) for vid in (old, new)):
        return overlay(env[old], env[new], at, take)
    whole = at.numel() == math.prod(values[old].shape) and torch.equal(at, take)
    if whole and torch.equal(at, torch.arange(at.numel())):
        return env[new].reshape(env[old].shape).clone()
    box = box_of(values[old].shape, at, take)
    if box is None:
        raise SurgeryError(f"a write in place in {node.module} has no form in other sizes")
    out = env[old].clone()
    spot = out
    for axis, (start, stop) in enumerate(box):
        index = index_of(program.axes[old][axis], program.chosen)
        start, stop = int(np.searchsorted(index, start)), int(np.searchsorted(index, stop))
        spot = spot.narrow(axis, start, stop - start)
    spot.copy_(env[new])
    return out
