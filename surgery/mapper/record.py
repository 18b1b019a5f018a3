"""What a run shows: a tape of documented operators, recorded from a float64 twin.

The recorder is a TorchDispatchMode. It writes one node per aten operator, functional (an in-place update becomes a new
value of the tensor and of every live alias of it) and canonical (see canon.py). Float values get a fingerprint that
does not depend on layout.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from surgery import twin
from surgery.mapper.canon import CANON
from surgery.mapper.masks import HUGE as HUGE
from surgery.mapper.tape import NEAR as NEAR
from surgery.mapper.tape import Fingerprint as Fingerprint
from surgery.mapper.tape import FingerprintIndex as FingerprintIndex
from surgery.mapper.tape import Node as Node
from surgery.mapper.tape import Ref as Ref
from surgery.mapper.tape import Replaced as Replaced
from surgery.mapper.tape import Tape as Tape
from surgery.mapper.tape import Value as Value
from surgery.mapper.tape import fingerprint as fingerprint
from surgery.mapper.tape import same as same

aten = torch.ops.aten


def overlay(old: Tensor, new: Tensor, at: Tensor, take: Tensor) -> Tensor:
    """`old` with its elements `at` replaced by the elements `take` of `new` (flat positions).

    An in-place write as an alias sees it.
    """
    out = old.clone().reshape(-1)
    out[at.to(out.device)] = new.reshape(-1)[take.to(new.device)].to(out.dtype)
    return out.reshape(old.shape)


# Operators that give weights back in another layout.
MOVES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "select",
        "slice", "split", "split_with_sizes", "unbind", "clone", "_to_copy", "detach", "alias",
    }
)  # fmt: skip
# Those of them that keep every element.
PERMUTING = MOVES - {"expand", "select", "slice", "split", "split_with_sizes", "unbind"}
MEETS = ("mm", "bmm", "convolution", "mul", "div")  # where weights may meet a known factor
WINDOW = (24, 96)  # values after which it is seen what a value is for: at least, and at most
ROOM = 1 << 25  # bytes that those between the two may hold
MULTIPLIED = frozenset({aten.mm.default, aten.bmm.default})
RANDOM = ("rand", "bernoulli", "normal", "dropout", "multinomial", "exponential", "uniform", "poisson")
# Operators whose result, or its shape, Python reads.
SYNC = frozenset({aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default})


class _Touch(TorchFunctionMode):
    """Python that reads a tensor's values without an operator: noted, since what follows may depend on them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy) and args and isinstance(args[0], Tensor):
            self.recorder.sync(args[0])
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records on a Tape what runs inside; use `record()`."""

    def __init__(
        self,
        keep: int,
        sizes: frozenset[int] | None = None,
        spare: bool = False,
        tables: bool = False,
        made_up: bool = False,
        wanted: Callable[[Fingerprint], bool] | None = None,
        lines: Callable[[], tuple[str, int]] | None = None,
        within: range | None = None,
    ) -> None:
        super().__init__()
        self.made_up = made_up
        self.lines = lines
        self.tables = tables  # do constants that weights multiply count as inputs?
        self.tape = Tape()
        self.ids: Any = WeakIdKeyDictionary()
        self.storages: dict[int, list[weakref.ref[Tensor]]] = {}
        self.windows: Any = WeakIdKeyDictionary()  # what would be a view of a parameter, were it not lifted: a copy
        self.scales: Any = WeakIdKeyDictionary()  # products of data and weights: what they are made of
        self.differences: Any = WeakIdKeyDictionary()  # a value that is x * scale - shift: those, and their numbers
        self.pairs: Any = WeakIdKeyDictionary()  # complex values: the real ones that they were made of
        self.stack: list[str] = []
        self.budget = keep  # bytes of activations that may be held
        self.sizes = sizes
        self.wanted = wanted
        self.within = within
        self.spare = spare
        self.held: dict[int, list[int]] = {}  # values whose tensors share their memory with what the program holds
        self.recent: deque[tuple[int, int]] = deque()  # values that may be let go, and their bytes
        self.room = ROOM

    # -- values -------------------------------------------------------------------------------------------------------
    def add(self, t: Tensor, value: Value, *, moved: bool = False, like: Value | None = None) -> int:
        """Number a value. `moved`: weights in another layout, of which nothing need be kept. `like`: a value of the
        same elements, and so the same fingerprint."""
        vid = len(self.tape.values)
        told = (self.sizes is None or t.numel() in self.sizes) and not moved
        if value.origin == "node" and (value.data or value.weights) and told:
            value.fingerprint = fingerprint(t) if like is None else like.fingerprint
        f = value.fingerprint
        told = told and (self.wanted is None or (f is not None and self.wanted(f)))
        told = told and (self.within is None or vid in self.within)
        if value.origin != "param" and (not t.is_floating_point() or told):
            self._hold(t, vid, value)
        self.tape.values.append(value)
        self.tape.consumers.append([])
        self.ids[t] = vid
        if not isinstance(t, twin.Lifted) and t.numel():
            self.storages.setdefault(t.untyped_storage()._cdata, []).append(weakref.ref(t))
        return vid

    def _hold(self, t: Tensor, vid: int, value: Value) -> None:
        """Keep what a value was; it is copied only when the program writes into its memory."""
        if isinstance(t, twin.Lifted):
            value.tensor = twin.lift(t)
            return
        key = t.untyped_storage()._cdata
        if key not in self.held:
            size = t.untyped_storage().nbytes() if t.is_floating_point() else 0
            if size > self.budget:
                return
            self.budget -= size
        value.tensor = t.detach()
        self.held.setdefault(key, []).append(vid)
        if self.spare and t.is_floating_point() and value.origin == "node":
            self.recent.append((vid, t.numel() * t.element_size()))
            self.room -= self.recent[-1][1]
            while len(self.recent) > WINDOW[1] or (len(self.recent) > WINDOW[0] and self.room < 0):
                first, size = self.recent.popleft()
                self.room += size
                self._let_go(first)

    def _let_go(self, vid: int) -> None:
        """Of a value that only its fingerprint speaks for, the tensor need not be held: it can be made again."""
        value = self.tape.values[vid]
        if value.tensor is None or self._needed(vid):
            return
        key = value.tensor.untyped_storage()._cdata
        sharing = [v for v in self.held.get(key, ()) if v != vid]
        if sharing:
            self.held[key] = sharing
        else:
            self.budget += value.tensor.untyped_storage().nbytes()
            self.held.pop(key, None)
        value.tensor = None

    def _needed(self, vid: int) -> bool:
        """Is it the known factor of a product or a scale, or an addend that is no product itself?"""
        value = self.tape.values[vid]
        if not self.tape.consumers[vid]:
            return True
        added = barred = False
        for c in self.tape.consumers[vid]:
            node = self.tape.nodes[c]
            name = _name(node.op)
            if name in MEETS and any(v != vid and self._weight(v) for v in node.inputs):
                return True
            if name in MOVES or name in ("cat", "constant_pad_nd", "expand"):
                if any(self._needed(o) for o in node.outs if o >= 0):
                    return True
            elif name in ("add", "sub", "neg", "sum"):
                added = True
            else:
                barred = True
        made = _name(self.tape.nodes[value.node].op)
        return added and (barred or made not in (*MEETS, "add", "sub", *MOVES))

    def _weight(self, vid: int) -> bool:
        v = self.tape.values[vid]
        return v.weights and not v.data

    def vid(self, t: Tensor) -> int:
        """The number of a tensor; one that no recorded operator made is a constant of this program."""
        found = self.ids.get(t)
        if found is None and (pairs := self.paired(t)) is not None:
            found = self.ids[t] = self.vid(self.call(aten.view_as_complex.default, pairs))
        if found is None:
            real = twin.lift(t)
            found = self.add(t, Value(tuple(t.shape), real.dtype, "const"))
            self.tape.values[found].tensor = real.detach().clone()
        return int(found)

    def weights_only(self, t: Tensor) -> bool:
        value = self.tape.values[self.vid(t)]
        return value.weights and not value.data

    def weights_free(self, t: Tensor) -> bool:
        return not self.tape.values[self.vid(t)].weights

    def scaled(self, t: Tensor) -> tuple[Tensor, Tensor] | None:
        """(x, w) where t was made as x * w, and w is made of weights alone; None where one of them was written into."""
        x, w, *vids = self.scales.get(t, (None, None))
        return (x, w) if x is not None and [self.vid(t), self.vid(x), self.vid(w)] == vids else None

    def _note_scale(self, args: Sequence[Any], out: Tensor) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        values = [self.tape.values[self.vid(a)] for a in tensors]
        if [v.data for v in values].count(True) == 1 and any(v.weights and not v.data for v in values):
            x, w = tensors if values[0].data else reversed(tensors)
            self.scales[out] = (x, w, self.vid(out), self.vid(x), self.vid(w))

    def note_pairs(self, x: Tensor) -> Tensor:
        """The complex value that pairs of real ones are. It is written down where an operator needs it as such."""
        z: Tensor = twin.call(aten.view_as_complex.default, (x,), {})
        self.pairs[z] = (x, self.vid(x))
        return z

    def paired(self, z: Tensor) -> Tensor | None:
        """The pairs of real numbers that a complex value was made of."""
        x, vid = self.pairs.get(z, (None, -1)) if z not in self.ids else (None, -1)
        if x is not None and self.vid(x) != vid:
            raise NotRecordable("complex numbers are written into as real ones")
        return x

    def note_shifted(self, t: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor) -> None:
        parts = (x, scale, shift)
        self.differences[t] = (self.vid(t), parts, [None if p is None else self.vid(p) for p in parts])

    def shifted(self, t: Tensor) -> tuple[Tensor, Tensor | None, Tensor] | None:
        vid, parts, vids = self.differences.get(t, (None, (), []))
        if vid is None or vid != self.vid(t) or vids != [None if p is None else self.vid(p) for p in parts]:
            return None  # one of them was written into since: it is another value now
        x, scale, shift = parts
        return x, scale, shift

    def sync(self, t: Tensor) -> None:
        """Python reads the values of t: remember them, a replay must come to the same."""
        vid = self.vid(t)
        node = Node("sync", (Ref(vid),), {"saw": twin.lift(t).detach().clone()}, (), self.where(), (vid,))
        self.tape.consumers[vid].append(len(self.tape.nodes))
        self.tape.nodes.append(node)

    def replace(self, t: Tensor, value: Tensor, call: tuple[str, int, int], since: int) -> None:
        """`value` goes on in place of `t`, which a call of a module gave. `call`: the module's path, and as which of
        its calls and of the tensors in it; `since`: the number of nodes before it. To be called while nothing is
        recorded."""
        own, nodes = self.vid(t), range(since, len(self.tape.nodes))
        inside = {o for n in nodes for o in self.tape.nodes[n].outs}
        used = [v for n in nodes for v in self.tape.nodes[n].inputs]
        taken = (v for v in dict.fromkeys([*used, own]) if v not in inside and self.tape.values[v].data)
        leaf = Value(tuple(value.shape), value.dtype, "input", data=True, weights=True)
        leaf.fingerprint = fingerprint(value)
        given = self.add(value, leaf)
        leaf.tensor = value.detach().clone()
        end = len(self.tape.nodes)
        self.tape.replaced.append(Replaced(*call, tuple(taken), own, given, (since, end)))

    def where(self) -> str:
        return self.stack[-1] if self.stack else ""

    # -- calls --------------------------------------------------------------------------------------------------------
    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one operator on real tensors and write it down."""
        refs: list[int] = []

        def ref(x: Any) -> Any:
            if isinstance(x, Tensor):
                refs.append(self.vid(x))
                return Ref(refs[-1])
            return twin.lift(x) if isinstance(x, torch.dtype) else x

        rargs, rkwargs = twin.mapped(ref, args), {k: twin.mapped(ref, v) for k, v in kwargs.items()}
        data = any(self.tape.values[v].data for v in refs)
        weights = any(self.tape.values[v].weights for v in refs)
        made_up = self.made_up and data and weights and op in MULTIPLIED
        out: Any = _made_up(*args) if made_up else twin.call(op, args, kwargs)
        index = len(self.tape.nodes)
        outs = []
        name = _name(op)
        if self.tables and name in MEETS[:3] and weights and not all(self.tape.values[v].weights for v in refs):
            data = True
        random = name.lstrip("_").startswith(RANDOM)
        window = _is_view(op) and (isinstance(args[0], twin.Lifted) or args[0] in self.windows)
        for i, t in enumerate(out if isinstance(out, (tuple, list)) else (out,)):
            if isinstance(t, Tensor):
                if window:
                    self.windows[t] = True
                origin = "const" if random else "node"
                if (known := self.ids.get(t)) is not None:  # an operator that returned its own argument
                    outs.append(int(known))
                    continue
                value = Value(tuple(t.shape), t.dtype, origin, node=index, out=i, data=data, weights=weights)
                like = self.tape.values[refs[0]] if name in PERMUTING and len(refs) == 1 else None
                if like is not None and (like.origin == "param" or math.prod(like.shape) != t.numel()):
                    like = None
                outs.append(self.add(t, value, moved=weights and not data and name in MOVES, like=like))
                if random:
                    self.tape.values[outs[-1]].tensor = t.detach().clone()
            else:
                outs.append(-1)
        for v in set(refs):
            self.tape.consumers[v].append(index)
        self.tape.nodes.append(Node(op, rargs, rkwargs, tuple(outs), self.where(), tuple(dict.fromkeys(refs))))
        if self.lines is not None:
            self.tape.lines[index] = self.lines()
        if op is aten._local_scalar_dense.default:
            self.tape.nodes[-1].kwargs = {**rkwargs, "saw": out}
        if op is aten.mul.Tensor and len(refs) == 2:
            self._note_scale(args, out)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default or func is aten.lift_fresh.default or func is aten.alias.default:
            kwargs = {}
        if func._schema.is_mutable:
            return self._mutate(func, args, kwargs)
        canon = CANON.get(func)
        if canon is not None:
            return canon(self, *args, **kwargs)
        return self.call(func, *args, **kwargs)

    def _mutate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An in-place operator: record the functional one, write the result, renumber the tensor and its aliases."""
        written = [
            (i, a.name)
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        i, name = written[0]
        t = args[i] if i < len(args) else kwargs[name]
        base = func._schema.name.split("::")[1]
        packet = getattr(aten, base.removesuffix("_"), None) if name != "out" else None
        if packet is None or len(written) != 1 or not isinstance(t, Tensor):
            if name == "out" and isinstance(t, Tensor) and len(written) == 1:
                packet = getattr(aten, base)
                kwargs = {k: v for k, v in kwargs.items() if k != "out"}
            else:
                raise NotRecordable(f"{func} writes in place in a way that has no functional form")
        overload = _out_free(packet, func) if name == "out" else _functional(packet, func)
        kwargs = {**_defaults(func, overload, len(args)), **kwargs}
        if torch.Tag.inplace_view in func.tags:  # only the strides change, no value does
            vid = self.vid(self.call(overload, *args, **kwargs))
            func(*args, **kwargs)
            self.ids[t] = vid
            return t
        canon = CANON.get(overload)
        new = canon(self, *args, **kwargs) if canon else self.call(overload, *args, **kwargs)
        if new.shape != t.shape:
            new = self.call(aten.expand.default, new, list(t.shape))
        if isinstance(t, twin.Lifted) and t not in self.windows:  # the stand-in changes, the person's tensor does not
            t.stored = new.clone()
            self.ids[t] = self.vid(new)
            return t
        if t in self.windows and not torch.equal(new, twin.lift(t)):
            raise NotRecordable(f"{func} writes into a view of a parameter, which must not change while a model runs")
        alive = [a for w in self.storages.get(t.untyped_storage()._cdata, []) if (a := w()) is not None]
        aliases = [a for a in alive if a is not t and a in self.ids]
        at = _positions(t) if aliases else torch.zeros(0)
        for alias in aliases:
            mine = _positions(alias)
            hit = torch.isin(mine, at)
            if bool(hit.any()):
                where = torch.nonzero(hit).flatten()
                order = torch.argsort(at)
                take = order[torch.searchsorted(at[order], mine[where])]
                old, vnew = self.vid(alias), self.vid(new)
                out = overlay(alias, new, where, take)
                self.ids[alias] = self._note(overlay, (Ref(old), Ref(vnew), where, take), out, (old, vnew))
        vnew = self.vid(new)
        for v in self.held.pop(t.untyped_storage()._cdata, ()):
            held = self.tape.values[v].tensor
            self.tape.values[v].tensor = held.clone() if held is not None else None
        t.copy_(new)
        self.ids[t] = vnew
        if new in self.differences:
            self.differences[t] = self.differences[new]
        return t

    def _note(self, op: Any, args: tuple[Any, ...], out: Tensor, refs: tuple[int, ...]) -> int:
        index = len(self.tape.nodes)
        data = any(self.tape.values[v].data for v in refs)
        weights = any(self.tape.values[v].weights for v in refs)
        vid = self.add(out, Value(tuple(out.shape), out.dtype, "node", node=index, data=data, weights=weights))
        for v in set(refs):
            self.tape.consumers[v].append(index)
        self.tape.nodes.append(Node(op, args, {}, (vid,), self.where(), refs))
        return vid


class NotRecordable(Exception):
    """The program does something that a tape cannot hold."""


_NAMES: dict[Any, str] = {}


def _name(op: Any) -> str:
    """aten.view.default -> view; asked for at every call."""
    found = _NAMES.get(op)
    if found is None:
        found = _NAMES[op] = str(op._schema.name).split("::")[1] if hasattr(op, "_schema") else str(op)
    return found


def _made_up(a: Tensor, b: Tensor) -> Tensor:
    """In place of a product: numbers that are not one and the same, so that norms and maxima of them are ordinary."""
    shape = (*a.shape[:-1], b.shape[-1])
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64, device=a.device).view(shape)


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _functional(packet: Any, func: Any) -> Any:
    """The overload of a functional operator that takes what the in-place one takes (transpose_ -> transpose.int)."""
    if func._overloadname in packet.overloads():
        return getattr(packet, func._overloadname)
    want = [str(a.type) for a in func._schema.arguments]
    for o in packet.overloads():
        if [str(a.type) for a in getattr(packet, o)._schema.arguments] == want:
            return getattr(packet, o)
    raise NotRecordable(f"{func} has no functional form")


def _defaults(func: Any, overload: Any, given: int) -> dict[str, Any]:
    """What the in-place operator has a default for and the functional one asks for (p of bernoulli_), beyond the first
    `given` arguments."""
    asked = {a.name for a in overload._schema.arguments if not a.has_default_value()}
    rest = func._schema.arguments[given:]
    return {a.name: a.default_value for a in rest if a.has_default_value() and a.name in asked}


def _out_free(packet: Any, func: Any) -> Any:
    names = [a.name for a in func._schema.arguments if a.name != "out"]
    for o in packet.overloads():
        cand = getattr(packet, o)
        if [a.name for a in cand._schema.arguments] == names:
            return cand
    raise NotRecordable(f"{func} has no form without out=")


def _positions(t: Tensor) -> Tensor:
    """The places in its storage that each element of t occupies."""
    base = torch.zeros((), dtype=torch.int64)
    for n, s in zip(t.shape, t.stride(), strict=True):
        base = base.unsqueeze(-1) + torch.arange(n) * s
    return base.reshape(-1) + t.storage_offset()


@contextmanager
def _paths(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the dotted path of the running module on top of `stack`. The module is a twin: its hooks are ours."""

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, m in module.named_modules():
        handles.append(m.register_forward_pre_hook(lambda _m, _a, name=name: stack.append(name)))
        handles.append(m.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def record(
    fn: Callable[[nn.Module, Any], Any],
    module: nn.Module,
    x: Any,
    *,
    keep: int = 1 << 31,
    sizes: frozenset[int] | None = None,
    weights: set[str] | None = None,
    spare: bool = False,
    returned: list[Tensor] | None = None,
    tables: bool = False,
    made_up: bool = False,
    wanted: Callable[[Fingerprint], bool] | None = None,
    lines: Callable[[], tuple[str, int]] | None = None,
    within: range | None = None,
) -> Tape:
    """Run fn(twin of module, x) in float64 and return its tape. `keep`: bytes of activations that may be held.

    `module` must be a twin (see surgery.twin): its tensors are Lifted stand-ins, and hooks may be put on it. `weights`:
    the state-dict names that count as weights (all of them); the others are constants of the program. `sizes`: how many
    elements an activation must have to get a fingerprint and be held (any number); what a replay starts from is held
    anyway. `spare`: of activations that no sum of weights refers to, keep the fingerprint only.
    `returned`: a list that takes the tensors which fn gave, with their graph: the twin's tensors that require a
    gradient are followed. `tables`: what is computed by multiplying constants with weights counts as data. `made_up`:
    of products of data and weights, give any numbers; for who wants the operators and not their values. `wanted`:
    hold only activations of which it says so. `within`: hold only activations of these numbers. `lines`: what tells,
    when an operator is called, the file and line of the program that calls it.
    """
    rec = Recorder(keep, sizes, spare, tables, made_up, wanted, lines, within)
    tape = rec.tape
    buffers = dict(module.named_buffers(remove_duplicate=False))
    own = dict(module.named_parameters(remove_duplicate=False)) | buffers
    state = module.state_dict(keep_vars=True)
    x = tree_map(twin.lift, x)
    with twin.math_only():
        for name, t in own.items():
            if t is None or name not in state:
                continue
            vid = rec.ids.get(t)
            if vid is None:
                weight = t.is_floating_point() and (weights is None or name in weights)
                v = Value(tuple(t.shape), twin.lift(t.dtype), "param" if weight else "const", name=name, weights=weight)
                vid = rec.add(t, v)
                # A parameter is not copied; a buffer is held as it is now, before the program writes into it.
                if isinstance(t, twin.Lifted):
                    v.tensor = t.stored if weight else twin.lift(t)
                else:
                    v.tensor = t.detach().clone() if name in buffers else t.detach()
            if tape.values[vid].origin == "param":
                tape.params[name] = int(vid)
        for t in tree_iter(x):
            if isinstance(t, Tensor) and t not in rec.ids:
                vid = rec.add(t, Value(tuple(t.shape), t.dtype, "input", data=True, fingerprint=fingerprint(t)))
                tape.values[vid].tensor = t.detach().clone()
        with twin.LiftConstants(), _Touch(rec), _paths(module, rec.stack), rec:
            with torch.enable_grad() if returned is not None else contextlib.nullcontext():
                out = fn(module, x)
            tape.result = tree_map(lambda t: Ref(rec.vid(t)) if isinstance(t, Tensor) else t, out)
        if returned is not None:
            returned += [t for t in tree_iter(out) if isinstance(t, Tensor)]
        for t in tree_iter(out):
            if isinstance(t, Tensor) and (value := tape.values[rec.vid(t)]).tensor is None and (spare or keep):
                value.tensor = twin.lift(t).detach()
    return tape
