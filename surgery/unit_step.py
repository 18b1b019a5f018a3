"""One step of the walk over a recorded run: what is known of the values, and the operators that go unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.mapper.record import Node, Ref, Tape, _name
from surgery.unit_spaces import Space, fix, unify

Origin = frozenset[tuple[int, int]]  # (value of a parameter, its axis)
Role = Literal["out", "in", "add", "scale", "rows"]
NONE: Origin = frozenset()


@dataclass(frozen=True)
class Use:
    """How an operator meets one axis of a parameter: it makes these units ("out"), sums over them ("in"), adds to
    them, scales them, or is looked up by them ("rows")."""

    param: int
    axis: int
    role: Role
    node: int
    data: int = -1  # the value that it meets


@dataclass
class Flow:
    """The spaces of every value of a run, and every use of a parameter."""

    tape: Tape
    axes: dict[int, list[Space]] = field(default_factory=dict)
    origins: dict[int, list[Origin]] = field(default_factory=dict)  # of values made of parameters alone
    uses: list[Use] = field(default_factory=list)
    made: set[int] = field(default_factory=set)  # activations of constants: an LSTM's first state, a bias of positions
    grouped: dict[str, Space] = field(default_factory=dict)  # how many groups a convolution has, by module
    unknown: list[str] = field(default_factory=list)  # operators without a rule, with their modules

    def weights_only(self, vid: int) -> bool:
        value = self.tape.values[vid]
        return value.weights and not value.data and vid not in self.made

    def constant(self, vid: int) -> bool:
        value = self.tape.values[vid]
        return not value.weights and not value.data


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _words("""
    add sub rsub mul div pow sqrt rsqrt reciprocal exp exp2 expm1 log log1p log2 tanh sigmoid logit gelu silu mish relu
    relu6 elu selu celu leaky_relu _prelu_kernel hardtanh hardswish hardsigmoid softplus softsign clamp clamp_min
    clamp_max neg abs sign where masked_fill eq ne lt le gt ge minimum maximum _to_copy clone alias detach lift_fresh
    fill sin cos tan atan erf erfc floor ceil round trunc remainder fmod floor_divide bitwise_and bitwise_or
    bitwise_not bitwise_xor logical_and logical_or logical_not logical_xor isnan isinf isfinite nan_to_num square
    contiguous log_sigmoid_forward threshold addcmul addcdiv lerp copy atan2 native_dropout zeros_like ones_like
    full_like empty_like sinh cosh hardshrink softshrink
""")
FACTORIES = _words("arange ones zeros full empty scalar_tensor linspace eye new_zeros new_ones new_empty new_full")
SPATIAL = _words("""
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_nearest_exact2d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
""")


class Step:
    """One operator call."""

    def __init__(self, flow: Flow, index: int, node: Node) -> None:
        self.flow, self.index, self.node = flow, index, node
        self.name = _name(node.op) if hasattr(node.op, "_schema") else getattr(node.op, "__name__", str(node.op))
        self.where = f"{self.name} in {node.module or 'the model'}"
        self.outs = [vid for vid in node.outs if vid >= 0]
        product = self.name in ("mm", "bmm", "convolution") and any(map(flow.constant, node.inputs))
        if (product and any(map(flow.weights_only, node.inputs))) or not flow.made.isdisjoint(node.inputs):
            flow.made.update(self.outs)
        self.mixed = bool(self.outs) and not flow.weights_only(self.outs[0]) and not flow.constant(self.outs[0])
        self.inputs = list(node.inputs)

    # -- helpers ------------------------------------------------------------------------------------------------------
    def shape(self, vid: int) -> tuple[int, ...]:
        return self.flow.tape.values[vid].shape

    def axes(self, vid: int) -> list[Space]:
        return self.flow.axes[vid]

    def origins(self, vid: int) -> list[Origin]:
        return self.flow.origins.get(vid) or [NONE] * len(self.shape(vid))

    def give(self, axes: Sequence[Space], origins: Sequence[Origin] | None = None, out: int = 0) -> None:
        if out >= len(self.outs):
            return
        vid = self.outs[out]
        have = list(axes)
        if [space.size for space in have] != list(self.shape(vid)):
            raise AssertionError(f"{self.where}: axes {[s.size for s in have]} for shape {self.shape(vid)}")
        self.flow.axes[vid] = have
        if origins is not None and self.flow.weights_only(vid):
            self.flow.origins[vid] = list(origins)

    def use(self, vid: int, axis: int, role: Role, data: int = -1) -> None:
        if not (self.mixed and self.flow.weights_only(vid)):
            return
        for param, own in sorted(self.origins(vid)[axis]):
            self.flow.uses.append(Use(param, own, role, self.index, data))

    def mark(self, spaces: Sequence[Space], what: str) -> None:
        for space in spaces:
            if space.size > 1:
                space.mark(what, self.node.module or "the model")

    def arg(self, at: int, name: str, default: Any = None) -> Any:
        if at < len(self.node.args):
            return self.node.args[at]
        return self.node.kwargs.get(name, default)

    def one(self) -> int:
        """The value that the operator is about."""
        first = self.node.args[0]
        assert isinstance(first, Ref)
        return first.vid

    # -- the rules ----------------------------------------------------------------------------------------------------
    def run(self) -> None:
        rule: Callable[[], None] | None
        if not self.outs:
            return
        if self.name in ELEMENTWISE:
            rule = self.elementwise
        elif not self.inputs or self.name in FACTORIES:
            rule = self.factory
        elif self.name in SPATIAL:
            rule = self.spatial
        else:
            rule = getattr(self, "op_" + self.name.strip("_"), None)
        if rule is None:
            self.unknown()
        else:
            rule()
        for out, vid in enumerate(self.outs):
            if vid not in self.flow.axes:  # a further output that no rule speaks of
                self.give([Space(size) for size in self.shape(vid)], out=out)

    def unknown(self) -> None:
        """No rule: whatever goes in or comes out is fixed."""
        carried = any(not self.flow.constant(vid) for vid in self.inputs)
        if carried:
            self.flow.unknown.append(self.where)
        for vid in self.inputs:
            for space in self.axes(vid) if carried else ():
                fix(space, f"no rule for {self.where}")
        for out, vid in enumerate(self.outs):
            new = [Space(size) for size in self.shape(vid)]
            for space in new if carried else ():
                fix(space, f"no rule for {self.where}")
            origin = frozenset().union(*(o for v in self.inputs for o in self.origins(v)))
            self.give(new, [origin] * len(new), out)

    def factory(self) -> None:
        self.give([Space(size) for size in self.shape(self.outs[0])])

    def elementwise(self) -> None:
        shape = self.shape(self.outs[0])
        new: list[Space | None] = [None] * len(shape)
        origins: list[Origin] = [NONE] * len(shape)
        refs = list(self.node.inputs)
        for vid in refs:
            offset = len(shape) - len(self.shape(vid))
            for axis, space in enumerate(self.axes(vid)):
                at = axis + offset
                if space.size != shape[at] or space.size == 1:
                    continue
                self._meet_constant(vid, axis)
                held = new[at]
                if held is None:
                    new[at] = space
                else:
                    unify(held, space, self.where)
                origins[at] = origins[at] | self.origins(vid)[axis]
                self.use(vid, axis, "scale" if self.name in ("mul", "div") else "add")
        full = [space if space is not None else Space(size) for space, size in zip(new, shape, strict=True)]
        streams = self.name == "add" and len(refs) == 2 and all(self.flow.tape.values[vid].data for vid in refs)
        if streams and not self._made_above(refs[0]) & self._made_above(refs[1]):
            self.mark(full, "residual")
        self.give(full, origins)
        for out in range(1, len(self.outs)):
            if self.shape(self.outs[out]) == shape:
                self.give(full, origins, out)

    def _made_above(self, vid: int, depth: int = 8) -> set[int]:
        """The values that it was made from unit by unit, without weights: x + x**3 joins no two streams."""
        value = self.flow.tape.values[vid]
        out = {vid}
        if value.node >= 0 and depth:
            node = self.flow.tape.nodes[value.node]
            inner = [v for v in node.inputs if self.flow.tape.values[v].data]
            if _name(node.op) in ELEMENTWISE and not any(self.flow.weights_only(v) for v in node.inputs):
                for v in inner:
                    out |= self._made_above(v, depth - 1)
        return out

    def _meet_constant(self, vid: int, axis: int) -> None:
        """A constant that is not the same for all units of an axis holds them where they are."""
        if not self.flow.constant(vid) or all(self.flow.constant(v) for v in self.outs):
            return
        value = self.flow.tape.values[vid]
        t = value.tensor
        if t is not None and t.numel() and bool((t == t.narrow(axis, 0, 1)).all()):
            return
        fix(self.axes(vid)[axis], f"a constant of the program has a value for each ({self.where})")

    def spatial(self) -> None:
        """Pooling, padding and resampling of positions; batch and channels go through."""
        vid = self.one()
        old = self.axes(vid)
        kept = len(old) - int(next((d for d in "123" if d + "d" in self.name), "2"))
        for space in old[kept:]:
            fix(space, f"neighbours are put together ({self.where})")
        for out, result in enumerate(self.outs):
            self.give([*old[:kept], *(Space(size) for size in self.shape(result)[kept:])], out=out)
