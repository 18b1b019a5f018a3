"""What an op is, and the table of them.

An op is one tensor operation with a published rule: which shapes it takes and gives (`infer`, without reading a byte),
what it computes (`apply`), and how much of the source survives it (`kind`):

    exact         a relayout: every bit survives, and another exact op gives it back
    preserving    the function is the same in real arithmetic; float64 holds it to 1e-12
    approximate   the function changes a little, by a published rule
    lossy         something of the source is gone
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from surgery.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Value: TypeAlias = int | float | str | tuple[int, ...]
Kind: TypeAlias = Literal["exact", "preserving", "approximate", "lossy"]

KINDS: tuple[Kind, ...] = ("exact", "preserving", "approximate", "lossy")  # best first

_EXAMPLES: dict[type, str] = {int: "a whole number", float: "a number", str: "a quoted text", tuple: "a list as (2, 3)"}


@dataclass(frozen=True)
class Param:
    """A keyword parameter of an op. Without a default it must be given; a quiet one is printed only when it differs
    from its default."""

    name: str
    type: type[int] | type[float] | type[str] | type[tuple[int, ...]]
    default: Value | None = None
    quiet: bool = False

    def coerce(self, value: object, op: str) -> Value:
        """The value in its one canonical type, or a PlanError that says what is expected."""
        if isinstance(value, list):
            value = tuple(value)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        right = isinstance(value, self.type) and not isinstance(value, bool)
        if right and isinstance(value, tuple):
            right = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        if right and isinstance(value, float):
            right = value == value  # a NaN equals nothing, so no plan that held one could equal itself
        if not right:
            raise PlanError(f"{op}: parameter {self.name} takes {_EXAMPLES[self.type]}, not {value!r}")
        return value  # type: ignore[return-value]  # narrowed by self.type, which mypy cannot follow


@dataclass(frozen=True)
class Step:
    """One step back: an op applied to the result, or to what the step before gave. `beside` are further arguments, by
    their place among those of the op that is undone: `lora_unmerge(result, b, a)` is Step("lora_unmerge", (1, 2))."""

    op: str
    params: Mapping[str, Value] = field(default_factory=dict)
    beside: tuple[int, ...] = ()


Steps: TypeAlias = tuple[Step, ...]
# For each argument the steps that give it back, or None where the result does not hold it.
Inverse: TypeAlias = Callable[[Sequence[Shape], Mapping[str, Any]], Sequence[Steps | None]]


@dataclass(frozen=True)
class Example:
    """A worked example for the reference: a row and what it reads. A tuple is a shape, nested lists are values; the
    result is computed where the page is written."""

    row: str
    reads: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """One registered operation. `infer(shapes, **params)` and `apply(tensors, **params)` take the positional arguments
    as one sequence; the docstring of `apply` states the rule and where it was published. `inverse(shapes, params)`
    says how the arguments are had back from the result; `partners` which other tensors have to change with this one."""

    name: str
    kind: Kind
    arity: tuple[int, int | None]  # fewest and most tensors; None: any number
    params: tuple[Param, ...]
    infer: Callable[..., Shape]
    apply: Callable[..., Tensor]
    inverse: Inverse | None = None
    partners: str = ""
    example: Example | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PlanError(f"{self.name!r} cannot name an op: names are words such as cat or rope_permute")
        if self.kind not in KINDS:
            raise PlanError(f"op {self.name}: kind {self.kind!r} is none of {', '.join(KINDS)}")

    @property
    def rule(self) -> str:
        """What the op does and where that is published."""
        return inspect.getdoc(self.apply) or ""

    @property
    def signature(self) -> str:
        """How the op is written in a plan, for messages and the reference: `cat(a, ..., axis=0)`."""
        fewest, most = self.arity
        shown = ["a", "b", "c", "d"][:fewest] if fewest <= 4 else ["a", "..."]
        if most != fewest:
            shown.append("...")
        for param in self.params:
            shown.append(param.name if param.default is None else f"{param.name}={spell(param.default)}")
        return f"{self.name}({', '.join(shown)})"

    def bind(self, tensors: int, given: Sequence[tuple[str, object]]) -> tuple[tuple[str, Value], ...]:
        """The parameters in declared order with defaults filled in: one spelling for one meaning."""
        fewest, most = self.arity
        if tensors < fewest or (most is not None and tensors > most):
            wanted = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
            plural = "" if fewest == 1 and most in (1, None) else "s"
            raise PlanError(f"{self.name} takes {wanted} tensor{plural}, not {tensors}: {self.signature}")
        values: dict[str, object] = {}
        known = {param.name for param in self.params}
        for name, value in given:
            if name not in known:
                raise PlanError(f"{self.name} has no parameter {name}: {self.signature}{did_you_mean(name, known)}")
            if name in values:
                raise PlanError(f"{self.name}: parameter {name} is given twice")
            values[name] = value
        bound: list[tuple[str, Value]] = []
        for param in self.params:
            if param.name in values:
                bound.append((param.name, param.coerce(values[param.name], self.name)))
            elif param.default is not None:
                bound.append((param.name, param.default))
            else:
                raise PlanError(f"{self.name} needs its parameter {param.name}: {self.signature}")
        return tuple(bound)

    def check(self, tensors: Sequence[Tensor], **params: Value) -> int:
        """Applies the op and undoes it; gives the number of arguments that came back, 0 where there is no inverse.
        Those of an exact op have to come back bit for bit, those of another within 1e-12 of the largest element of
        the arguments, all of which should be float64 then. A PlanError says which argument did not, or that the
        result is not of the shape that `infer` foretold."""
        import torch

        bound = dict(self.bind(len(tensors), tuple(params.items())))
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        result, foretold = self.apply(tensors, **bound), self.infer(shapes, **bound)
        if tuple(result.shape) != foretold:
            raise PlanError(f"{self.name} gave shape {show(tuple(result.shape))} where {show(foretold)} was foretold")
        came_back = 0
        for number, steps in enumerate(self.inverse(shapes, bound) if self.inverse else ()):
            if steps is None:
                continue
            value = result
            for step in steps:
                op, beside = get(step.op), [tensors[other] for other in step.beside]
                value = op.apply([value, *beside], **dict(op.bind(1 + len(beside), tuple(step.params.items()))))
            before = tensors[number]
            if self.kind == "exact":
                right = value.dtype == before.dtype and value.shape == before.shape and _bits(value) == _bits(before)
            else:
                largest = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
                right = value.shape == before.shape and torch.allclose(value, before, rtol=0, atol=1e-12 * largest)
            if not right:
                raise PlanError(f"{self.name}: argument {number + 1} of shape {show(shapes[number])} did not come back")
            came_back += 1
        return came_back


def _bits(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


_OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds an op to the table. Registering the same object again is harmless; another of the same name is an error,
    for a plan must mean one thing."""
    known = _OPS.get(op.name)
    if known is not None and known != op:
        raise PlanError(
            f"op {op.name} is registered twice: by {known.apply.__module__} and by {op.apply.__module__}",
            hint="rename one of them, or switch one plugin off",
        )
    _OPS[op.name] = op
    return op


def get(name: str) -> Op:
    """The op of that name, or a PlanError with close matches."""
    op = _OPS.get(name)
    if op is None:
        raise PlanError(
            f"unknown op {name}{did_you_mean(name, _OPS)}",
            hint=f"the ops are {', '.join(sorted(_OPS))}; one that a plugin brings is known once the plugin is loaded",
        )
    return op


def registered() -> tuple[Op, ...]:
    """All ops, by name."""
    return tuple(_OPS[name] for name in sorted(_OPS))


def did_you_mean(name: str, known: Sequence[str] | set[str] | dict[str, Op]) -> str:
    """ "; did you mean x, y?" with the closest names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def spell(value: Value) -> str:
    """A parameter value as it is written in a plan."""
    if isinstance(value, tuple):
        return f"({value[0]},)" if len(value) == 1 else f"({', '.join(map(str, value))})"
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def show(shape: Shape) -> str:
    """A shape for a message: 768x3072, or "scalar"."""
    return "x".join(map(str, shape)) if shape else "scalar"


def axis_of(shape: Shape, axis: int) -> int:
    """The axis counted from the front; negative ones count from the end, as in torch."""
    if not -len(shape) <= axis < len(shape):
        raise PlanError(f"axis {axis} does not exist in a tensor of shape {show(shape)}")
    return axis % len(shape)
