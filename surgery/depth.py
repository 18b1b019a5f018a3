"""Other depths for a model: blocks left out, repeated, or put in so that the function stays.

    select_layers(model, example, "encoder.layer", layers=[0, 2, 4])
    stack_layers(model, example, "model.layers", [*range(0, 24), *range(8, 32)])
    insert_identity_blocks(model, example, "transformer.h", after=[3, 7])
    insert_identity_convolutions(model, example, "features.1")

A stack of blocks is a ModuleList, a Sequential or a numbered ModuleDict. Each returns a surgery.body.Reshaped. Which
projections write into the residual stream is found from the dataflow.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.body import Reshaped, drift, infos, outputs, plan_of, values_of
from surgery.coupling import Coupling, coupled
from surgery.errors import SurgeryError
from surgery.expr import Expr, Name, call
from surgery.mapper.record import MOVES, _name
from surgery.ops import Kind
from surgery.proof import GATE
from surgery.running import own_tensors

TRIES = 32  # choices of which numbers count the blocks that are run at most


def select_layers(model: nn.Module, example: Any, where: str, *, layers: Sequence[int]) -> Reshaped:
    """The blocks of these numbers, in this order, and no others. Lossy.

    Rule: as DistilBERT's initialisation (Sanh et al., arXiv 1910.01108). SurgeryError where a number is no block.
    """
    return _stacked(model, example, where, list(layers), "lossy")


def stack_layers(model: nn.Module, example: Any, where: str, order: Sequence[int]) -> Reshaped:
    """The blocks in this order, each as often as it is named: [0, 24) and [8, 32) of 32 make 48. Approximate.

    Rule: depth up-scaling (SOLAR, Kim et al., arXiv 2312.15166). SurgeryError where a number is no block.
    """
    return _stacked(model, example, where, list(order), "approximate")


def insert_identity_blocks(
    model: nn.Module, example: Any, where: str, *, after: Sequence[int], approximate: bool = False
) -> Reshaped:
    """A copy of each of these blocks behind it, with the projections that write into the residual stream at zero, so
    that it passes on what comes in. Preserving on pre-norm blocks (and on residual blocks that end in a ReLU which what
    comes in has passed already), confirmed by running.

    A block that ends in a norm, as BERT's do, does not pass on what comes in: that is refused, or with `approximate`
    done all the same, and the drift says what it costs.

    Rule: LLaMA Pro (Wu et al., arXiv 2401.02415); zeroed projections as of Net2DeeperNet (arXiv 1511.05641).
    SurgeryError where a number is no block, or a block cannot be made to pass on what comes in.
    """
    coupling = coupled(model, example)
    stack = _Stack.of(model, where)
    zeroed: dict[int, frozenset[str]] = {}
    for at in sorted(set(after)):
        stack.check(at)
        path = f"{where}.{stack.keys[at]}"
        found = _silenced(coupling, path, lenient=False)
        if found is None and not approximate:
            raise SurgeryError(
                f"{path} cannot be made to pass on what comes in: it does not end in a sum of that and its own work "
                "(a norm or a projection stands behind the sum, as in post-norm blocks)",
                hint="approximate=True puts it in all the same, and says how far the outputs move.",
            )
        found = found if found is not None else _silenced(coupling, path, lenient=True)
        if found is None:
            raise SurgeryError(f"{path} adds nothing to what comes in", hint="Name a stack of residual blocks.")
        zeroed[at] = found
    order = [each for at in range(len(stack.keys)) for each in ([at, at] if at in zeroed else [at])]
    copies = {new: zeroed[old] for new, old in enumerate(order) if new and order[new - 1] == old and old in zeroed}
    return _stacked(model, example, where, order, "approximate" if approximate else "preserving", copies)


def insert_identity_convolutions(model: nn.Module, example: Any, where: str) -> Reshaped:
    """Behind the activation at `where`, a convolution (a Linear, where it gives vectors) that passes on its input, and
    the activation once more. Preserving where the activation changes nothing the second time, as a ReLU, confirmed by
    running; else refused.

    Rule: Net2DeeperNet (Chen et al., arXiv 1511.05641); kernel of torch.nn.init.dirac_.
    """
    coupling = coupled(model, example)
    act = _submodule(model, where)
    shape = _shape_from(coupling, where)
    rank, width = len(shape) - 2, shape[1 if len(shape) > 2 else -1]
    if list(act.parameters()) or rank not in (0, 1, 2, 3):
        raise SurgeryError(f"{where} is no activation of a convolution or a projection", hint="Name a ReLU module.")
    own = own_tensors(model)
    like = next(t for t in own.values() if t.is_floating_point())
    conv: nn.Module
    if rank:
        made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](width, width, 3, padding=1)
        nn.init.dirac_(made.weight)
        conv = made
    else:
        linear = nn.Linear(width, width)
        nn.init.eye_(linear.weight)
        conv = linear
    assert isinstance(conv.bias, Tensor)
    assert isinstance(conv.weight, Tensor)
    nn.init.zeros_(conv.bias)
    conv.to(device=like.device, dtype=like.dtype).train(model.training)
    module = copy.deepcopy(model)
    _put(module, where, nn.Sequential(copy.deepcopy(act), conv, copy.deepcopy(act)))
    rows: dict[str, Expr] = {name: Name(name) for name in own}
    rows[f"{where}.1.weight"] = call("dirac", shape=tuple(conv.weight.shape))
    rows[f"{where}.1.bias"] = call("zeros", shape=(width,))
    plan = plan_of(infos({n: t.detach() for n, t in own.items()}), rows, ties=coupling.ties())
    moved = drift(outputs(coupling, model), outputs(coupling, module, values_of(plan, model)))
    if moved is None or moved > GATE:
        raise SurgeryError(
            f"{where} changes its own output when it is applied again: the outputs move by {moved}",
            hint="Net2DeeperNet holds for activations such as ReLU.",
        )
    return Reshaped(plan, module, "preserving", moved)


# --- stacks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """A container of numbered blocks."""

    path: str
    keys: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, path: str) -> _Stack:
        module = _submodule(model, path)
        keys = tuple(module._modules)
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or not keys:
            stacks = [
                p for p, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1
            ]
            raise SurgeryError(
                f"{path or 'the model'} is no stack of blocks, but a {type(module).__name__}",
                hint=f"Stacks in this model: {', '.join(stacks[:6]) or 'none'}.",
            )
        return cls(path, keys)

    def check(self, at: int) -> None:
        if not 0 <= at < len(self.keys):
            raise SurgeryError(f"{self.path} has no block {at}", hint=f"Its blocks are 0 to {len(self.keys) - 1}.")

    def key(self, at: int) -> str:
        """The name of the block at a place: as theirs, with another number."""
        first = self.keys[0]
        found = re.fullmatch(r"(.*?)(\d+)(\D*)", first)
        return f"{found[1]}{int(found[2]) + at}{found[3]}" if found else str(at)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        import difflib

        known = [p for p, _ in model.named_modules() if p]
        close = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
        raise SurgeryError(
            f"the model has no module {path}" + (f"; did you mean {' or '.join(close)}?" if close else ""),
            hint="Print the model to see its modules.",
        ) from None


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, local = path.rpartition(".")
    model.get_submodule(owner)._modules[local] = new


def _stacked(
    model: nn.Module,
    example: Any,
    where: str,
    order: list[int],
    kind: Kind,
    zeroed: Mapping[int, frozenset[str]] | None = None,
) -> Reshaped:
    """The model with its blocks in this order; `zeroed`: the tensors of a new block that are zero, by its place."""
    coupling = coupled(model, example)
    stack = _Stack.of(model, where)
    for at in order:
        stack.check(at)
    if not order:
        raise SurgeryError(f"{where}: no block would be left", hint="Name at least one.")
    own = own_tensors(model)
    rows: dict[str, Expr] = {}
    for name, tensor in own.items():
        if not name.startswith(f"{where}."):
            rows[name] = Name(name)
            continue
        key, _, rest = name.removeprefix(f"{where}.").partition(".")
        for new, old in enumerate(order):
            if stack.keys[old] == key:
                zero = rest in (zeroed or {}).get(new, ())
                row = call("zeros", shape=tuple(tensor.shape)) if zero else Name(name)
                rows[f"{where}.{stack.key(new)}.{rest}"] = row
    tensors = infos({name: t.detach() for name, t in own.items()})
    plan = plan_of(
        tensors, rows, ties=coupling.ties(), dropped="its block is left out", description=type(model).__name__
    )
    plan = replace(plan, rows=tuple(_typed(row, tensors, where) for row in plan.rows))
    values = values_of(plan, model)
    before = outputs(coupling, model)
    base = _restack(model, stack, order, values)
    module, got = _running(coupling, base, stack, len(order), values)
    moved = None if got is None else drift(before, got)
    if kind == "preserving" and (moved is None or moved > GATE):
        raise SurgeryError(
            f"{where}: by its structure the new blocks pass on what comes in, and the outputs move by {moved}",
            hint="Please report this model. Nothing was changed.",
        )
    note = () if module is not None else ("no copy of the model runs all blocks: build the body and use the plan",)
    return Reshaped(plan, module, kind, moved, (), note)


def _typed(row: Any, tensors: Mapping[str, Any], where: str) -> Any:
    """A row of zeros has the type of the others of the model."""
    floats = [info.dtype for name, info in tensors.items() if name.startswith(f"{where}.")]
    return replace(row, dtype=floats[0]) if row.status == "synthesised" and floats else row


def _restack(model: nn.Module, stack: _Stack, order: list[int], values: Mapping[str, Tensor]) -> nn.Module:
    module = copy.deepcopy(model)
    holder = module.get_submodule(stack.path)
    kept = {id(v): v for m in module.modules() for v in vars(m).values() if _shared(v)}  # a config, say, stays one
    blocks = [copy.deepcopy(holder._modules[stack.keys[old]], dict(kept)) for old in order]
    counts = _counters([holder._modules[key] for key in stack.keys])
    holder._modules.clear()
    for new, block in enumerate(blocks):
        assert block is not None
        for path, name in counts:
            setattr(block.get_submodule(path), name, new)
        holder._modules[stack.key(new)] = block
    with torch.no_grad():
        for name, tensor in own_tensors(module).items():
            if name.startswith(f"{stack.path}."):
                tensor.copy_(values[name])
    return module


def _shared(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type, dict))


def _counters(blocks: Sequence[nn.Module | None]) -> list[tuple[str, str]]:
    """The numbers by which every block knows its own place: (module within the block, attribute)."""
    first = blocks[0]
    if first is None or len(blocks) < 2:
        return []
    out = []
    for path, each in first.named_modules():
        for name, value in vars(each).items():
            if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
                places = [_attribute(block, path, name) for block in blocks]
                if places == list(range(len(blocks))):
                    out.append((path, name))
    return out


def _attribute(block: nn.Module | None, path: str, name: str) -> Any:
    try:
        return getattr(block.get_submodule(path), name, None) if block is not None else None
    except AttributeError:
        return None


def _running(
    coupling: Coupling, base: nn.Module, stack: _Stack, count: int, values: Mapping[str, Tensor]
) -> tuple[nn.Module | None, list[Tensor] | None]:
    """The copy in which every block runs, with as few of the numbers that may count blocks changed as that takes."""
    old = len(stack.keys)
    holders: list[tuple[str, bool, str]] = []  # module, is it in its config, attribute
    for path, each in base.named_modules():
        if stack.path.startswith(path) or not path:
            for inside, where in ((False, each), (True, getattr(each, "config", None))):
                found = vars(where) if where is not None and hasattr(where, "__dict__") else {}
                holders += [(path, inside, n) for n, v in found.items() if type(v) is int and v == old]
    unique = list({(inside, n) if inside else (path, n): (path, inside, n) for path, inside, n in holders}.values())
    subsets = itertools.chain.from_iterable(itertools.combinations(unique, n) for n in range(len(unique) + 1))
    for chosen in itertools.islice(subsets if count != old else iter([()]), TRIES):
        module = copy.deepcopy(base)
        for path, inside, name in chosen:
            owner = module.get_submodule(path)
            setattr(owner.config if inside else owner, name, count)
        calls: Counter[str] = Counter()
        try:
            got = _counted(coupling, module, stack, values, calls)
        except Exception:  # the person's own forward, with blocks that it may not bear: any error means no
            continue
        if len(calls) == count:
            return module, got
    return None, None


def _counted(
    coupling: Coupling, module: nn.Module, stack: _Stack, values: Mapping[str, Tensor], calls: Counter[str]
) -> list[Tensor]:
    """The outputs, and how often each block ran."""

    def run(m: nn.Module, x: Any) -> Any:
        hooks = []
        for key, block in m.get_submodule(stack.path).named_children():
            hooks.append(block.register_forward_hook(lambda *_, key=key: calls.update([key])))
        try:
            return coupling.run(m, x)
        finally:
            for hook in hooks:
                hook.remove()

    return outputs(replace(coupling, run=run), module, values)


# --- what writes into the residual stream ----------------------------------------------------------------------------


def _silenced(coupling: Coupling, path: str, *, lenient: bool) -> frozenset[str] | None:
    """The block's tensors that are to be zero so that it passes on what comes in, by their names in the block; None
    where no choice does. `lenient`: norms and what belongs to them are looked through."""
    tape = coupling.tape
    inside = [i for i, node in enumerate(tape.nodes) if node.module == path or node.module.startswith(f"{path}.")]
    if not inside:
        return None
    own = set(inside)
    given = [
        vid
        for i in inside
        for vid in tape.nodes[i].outs
        if vid >= 0
        and tape.values[vid].data
        and (any(c not in own for c in tape.consumers[vid]) or vid in tape.outputs())
    ]
    walk = _Walk(coupling, own, lenient)
    results = [walk.stream(vid) for vid in given if tape.values[vid].fingerprint is not None]
    found = [each for each in results if each]
    if not found:
        return None
    names = [coupling.names(vid) for vid in sorted(set[int]().union(*found))]
    local = [name.removeprefix(f"{path}.") for several in names for name in several if name.startswith(f"{path}.")]
    return frozenset(local) if len(local) >= len(names) else None


@dataclass
class _Walk:
    """Back from a block's output along the sums of its residual stream."""

    coupling: Coupling
    own: set[int]
    lenient: bool

    def stream(self, vid: int) -> set[int] | None:
        """The parameters at whose zero this value is what came in."""
        tape, flow = self.coupling.tape, self.coupling.flow
        value = tape.values[vid]
        if value.node not in self.own:
            return set() if value.data else None
        node = tape.nodes[value.node]
        name = _name(node.op)
        data = [v for v in node.inputs if tape.values[v].data]
        if name in MOVES and len(data) == 1:
            return self.stream(data[0])
        if name == "add" and len(data) == 2:
            for kept, work in (data, data[::-1]):
                onward = self.stream(kept)
                silent = self.silent(work) if onward is not None else None
                if onward is not None and silent is not None:
                    return onward | silent
            return None
        if name == "relu":
            onward = self.stream(data[0])
            return onward if onward is not None and self._rectified(data[0]) else None
        weighed = len(data) == 1 and all(flow.weights_only(v) for v in node.inputs if v not in data)
        if self.lenient and (name == "native_layer_norm" or (name in ("add", "mul") and weighed)):
            return self.stream(data[0])
        return None

    def _rectified(self, vid: int) -> bool:
        """Did what comes in along the stream pass a ReLU before?"""
        tape = self.coupling.tape
        while tape.values[vid].node in self.own:
            node = tape.nodes[tape.values[vid].node]
            data = [v for v in node.inputs if tape.values[v].data]
            vid = next((v for v in data if self.stream(v) is not None), -1)
            if vid < 0:
                return False
        at = tape.values[vid].node
        return at >= 0 and _name(tape.nodes[at].op) in ("relu", "max_pool2d_with_indices")

    def _buffers(self, vids: set[int]) -> int:
        """How many of them are no parameters: statistics are left alone where a gain can be zero instead."""
        trained = {name for name, _ in self.coupling.model.named_parameters(remove_duplicate=False)}
        return sum(not trained & set(self.coupling.names(vid)) for vid in vids)

    def silent(self, vid: int) -> set[int] | None:
        """The parameters at whose zero this value is zero."""
        tape, flow = self.coupling.tape, self.coupling.flow
        value = tape.values[vid]
        if value.origin == "param":
            return {vid}
        if value.node not in self.own:
            return None
        node = tape.nodes[value.node]
        name = _name(node.op)
        if name in ("roll", "flip") or (name == "constant_pad_nd" and len(node.args) < 3):
            return self.silent(node.args[0].vid)
        if name in MOVES or name in ("relu", "gelu", "silu", "tanh", "neg", "dropout"):
            return self.silent(node.args[0].vid)
        if name in ("add", "sub") and len(node.inputs) == 2:
            each = [self.silent(v) for v in node.inputs]
            return None if None in each else set[int]().union(*(s for s in each if s is not None))
        if name in ("mul", "mm", "bmm", "convolution"):
            order = sorted(node.inputs[:2], key=lambda v: not flow.weights_only(v))
            choices = [s for v in order if (s := self.silent(v)) is not None]
            return min(choices, key=self._buffers) if choices else None
        if name == "div":
            return self.silent(node.args[0].vid)
        return None


def _shape_from(coupling: Coupling, path: str) -> tuple[int, ...]:
    """The shape of what a module gives."""
    shapes = [
        coupling.tape.values[vid].shape
        for node in coupling.tape.nodes
        if node.module == path
        for vid in node.outs
        if vid >= 0
    ]
    if not shapes:
        raise SurgeryError(f"{path} does not run on the example", hint="Name a module that does.")
    return shapes[-1]
