"""The language of a plan's rows: expressions over source tensor names.

    h.0.attn.weight                                         a tensor as it is
    cat(h.{i}.q.weight, h.{i}.k.weight, axis=0)             an op over tensors, with its parameters
    "odd name (1)"                                          a name that is not a plain word, in double quotes

`{i}` in a name stands for a number that `substitute` fills in; `{i+1}`, `{2*i}` and `{2*i-1}` for one reckoned from it.
Expressions are immutable, hashable and canonical: parameters stand in declared order with defaults filled in, so that
two spellings of one meaning are equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from surgery import ops
from surgery.errors import PlanError
from surgery.ops import Kind, Shape, Value
from surgery.ops.constant import cast_is_exact

if TYPE_CHECKING:
    from torch import Tensor

# A plain word: what may stand without quotes. Inside braces, arithmetic on an index is part of the word.
_WORD = re.compile(r"(?:[A-Za-z0-9_.:/-]|\{[A-Za-z0-9_*+-]*\})+")
_NUMBER = re.compile(r"[+-]?(?:inf|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)(?![A-Za-z0-9_.:/{}-])", re.ASCII)
_KEYWORD = re.compile(r"([A-Za-z_]\w*)\s*=\s*", re.ASCII)
_SPACE = re.compile(r"\s*")
_INDEX = re.compile(r"\{(?:(\d{1,9})\*)?([A-Za-z_]\w*)([+-]\d{1,9})?\}", re.ASCII)
_DEEPEST = 64  # nesting that no plan needs and the interpreter's stack still bears


@dataclass(frozen=True)
class Name:
    """A source tensor, as it is."""

    name: str

    def __str__(self) -> str:
        return _spell_name(self.name)


@dataclass(frozen=True)
class Call:
    """An op applied to expressions. Building one checks op, number of arguments and parameters (PlanError)."""

    op: str
    args: tuple[Expr, ...] = ()
    params: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        # Frozen, so the canonical form is set past the guard, once, before anybody can hash it.
        object.__setattr__(self, "params", ops.get(self.op).bind(len(self.args), self.params))

    def __str__(self) -> str:
        shown = [str(arg) for arg in self.args]
        for (name, value), param in zip(self.params, ops.get(self.op).params, strict=True):
            if not (param.quiet and value == param.default):
                shown.append(f"{name}={ops.spell(value)}")
        return f"{self.op}({', '.join(shown)})"


Expr: TypeAlias = Name | Call


def call(op: str, *args: Expr | str, **params: Value | list[int]) -> Call:
    """Builds a Call as it is written: `call("cat", "q.weight", "k.weight", axis=0)`. A text is a tensor name."""
    given = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in params.items())
    return Call(op, tuple(Name(arg) if isinstance(arg, str) else arg for arg in args), given)


def _spell_name(name: str) -> str:
    plain = _WORD.fullmatch(name) and not _NUMBER.fullmatch(name)
    return name if plain else json.dumps(name, ensure_ascii=False)


def parse(text: str) -> Expr:
    """The expression that the text spells, or a PlanError that points at the place."""
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def whole(self) -> Expr:
        expr = self.expression(0)
        self.space()
        if self.at < len(self.text):
            extra = ", a closing parenthesis too many" if self.peek() == ")" else ""
            raise self.error(f"nothing more is expected after {expr}{extra}")
        return expr

    def expression(self, depth: int) -> Expr:
        self.space()
        if depth > _DEEPEST:
            raise self.error(f"more than {_DEEPEST} ops within each other")
        start = self.at
        if self.peek() == '"':
            return Name(self.quoted())
        if number := _NUMBER.match(self.text, self.at):
            raise self.error(
                f"{number[0]} is a number where a tensor is expected",
                hint=f'parameters are written name=value; a tensor of that name is written "{number[0]}"',
            )
        word = self.word("a tensor name or an op")
        self.space()
        if self.peek() != "(":
            return Name(word)
        opened = self.at
        self.at += 1
        args, params = self.arguments(word, opened, depth)
        try:
            return Call(word, args, params)
        except PlanError as error:
            raise self.error(str(error), at=start, hint=error.hint) from None

    def arguments(self, op: str, opened: int, depth: int) -> tuple[tuple[Expr, ...], tuple[tuple[str, Value], ...]]:
        args: list[Expr] = []
        params: list[tuple[str, Value]] = []
        while True:
            self.space()
            if self.peek() == ")":
                self.at += 1
                return tuple(args), tuple(params)
            if name := self.keyword():
                params.append((name, self.value(name)))
            elif params:
                raise self.error(f"{op}: a tensor after a parameter; tensors come first")
            else:
                args.append(self.expression(depth + 1))
            self.space()
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != ")":
                if self.at >= len(self.text):
                    raise self.error(f"the parenthesis that {op} opens is not closed", at=opened)
                raise self.error(f"{op}: a comma or a closing parenthesis is expected here")

    def keyword(self) -> str | None:
        found = _KEYWORD.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[1]

    def value(self, name: str) -> Value:
        if self.peek() == '"':
            return self.quoted()
        if self.peek() == "(":
            opened, items = self.at, list[int]()
            self.at += 1
            while True:
                self.space()
                if self.peek() == ")":
                    self.at += 1
                    return tuple(items)
                if self.at >= len(self.text):
                    raise self.error(f"the list of {name} is not closed", at=opened)
                item = self.number(name)
                if not isinstance(item, int):
                    raise self.error(f"{name}: a list holds whole numbers, not {item!r}")
                items.append(item)
                self.space()
                if self.peek() == ",":
                    self.at += 1
                elif self.peek() not in (")", ""):
                    raise self.error(f"{name}: a comma or a closing parenthesis is expected here")
        return self.number(name)

    def number(self, name: str) -> int | float:
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            raise self.error(f'{name}: a number, a list such as (2, 3) or a text such as "F32" is expected here')
        if len(found[0]) > 40:
            raise self.error(f"{name}: a number of {len(found[0])} characters")
        self.at = found.end()
        return int(found[0]) if re.fullmatch(r"[+-]?\d+", found[0]) else float(found[0])

    def quoted(self) -> str:
        opened = self.at
        try:
            # Lenient of tabs and line ends in a name, which JSON wants escaped: a name may hold them.
            text, self.at = json.JSONDecoder(strict=False).raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise self.error(f"the quoted text does not read: {error.msg}", at=opened) from None
        return str(text)

    def word(self, wanted: str) -> str:
        found = _WORD.match(self.text, self.at)
        if found is None:
            got = repr(self.peek()) if self.peek() else "the end"
            hint = 'a tensor name with other characters is written in double quotes: "name"' if self.peek() else ""
            raise self.error(f"{wanted} is expected here, not {got}", hint=hint)
        self.at = found.end()
        return found[0]

    def space(self) -> None:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def error(self, message: str, *, at: int | None = None, hint: str = "") -> PlanError:
        position = self.at if at is None else at
        line = self.text.count("\n", 0, position)
        column = position - (self.text.rfind("\n", 0, position) + 1)
        text = self.text.split("\n")[line] if self.text else ""
        start = max(0, column - 60)  # a window, for a row may be thousands of characters long
        return PlanError(
            f"{message}\n    {text[start : start + 100]}\n    {' ' * (column - start)}^ column {column + 1}", hint=hint
        )


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and all within it, outermost first, left to right."""
    yield expr
    if isinstance(expr, Call):
        for arg in expr.args:
            yield from walk(arg)


def names(expr: Expr) -> tuple[str, ...]:
    """The source tensors, each once, in the order in which they are first read."""
    return tuple(dict.fromkeys(part.name for part in walk(expr) if isinstance(part, Name)))


def rename(expr: Expr, to: Callable[[str], str] | Mapping[str, str]) -> Expr:
    """The expression with its tensor names changed; a mapping leaves the names that it does not hold."""
    if isinstance(expr, Name):
        return Name(to(expr.name) if callable(to) else to.get(expr.name, expr.name))
    return Call(expr.op, tuple(rename(arg, to) for arg in expr.args), expr.params)


def substituted(expr: Expr, rows: Mapping[str, Expr]) -> Expr:
    """The expression with expressions in place of the tensors that `rows` names."""
    if isinstance(expr, Name):
        return rows.get(expr.name, expr)
    return Call(expr.op, tuple(substituted(arg, rows) for arg in expr.args), expr.params)


def substitute(expr: Expr, values: Mapping[str, int]) -> Expr:
    """The expression with `{i}`, `{i+1}`, `{2*i}` ... filled in; an index that `values` does not hold stays."""
    return rename(expr, lambda name: fill(name, values))


def fill(text: str, values: Mapping[str, int]) -> str:
    """The text with its indices filled in. An index reckoned below zero is a PlanError: no tensor is numbered so."""

    def number(found: re.Match[str]) -> str:
        factor, index, offset = found[1], found[2], found[3]
        if index not in values:
            return found[0]
        result = int(factor or 1) * values[index] + int(offset or 0)
        if result < 0:
            raise PlanError(f"{found[0]} in {text} is {result} where {index} is {values[index]}")
        return str(result)

    return _INDEX.sub(number, text)


def indices(text: str) -> tuple[str, ...]:
    """The index variables of a name, each once: ("i", "j") of "stage.{i}.block.{j+1}"."""
    return tuple(dict.fromkeys(found[2] for found in _INDEX.finditer(text)))


def infer(expr: Expr, shape_of: Callable[[str], Shape]) -> Shape:
    """The shape of the result, reading nothing. A PlanError names op, arguments and their shapes."""
    if isinstance(expr, Name):
        try:
            return tuple(shape_of(expr.name))
        except KeyError:
            raise PlanError(f"the source has no tensor {expr}") from None
    shapes = tuple(infer(arg, shape_of) for arg in expr.args)
    try:
        return ops.get(expr.op).infer(shapes, **dict(expr.params))
    except PlanError as error:
        listed = [f"\n    {arg}: {ops.show(shape)}" for arg, shape in zip(expr.args, shapes, strict=True)]
        text = str(expr)
        short = text if len(text) <= 400 else f"{text[:300]} ... {text[-40:]}"  # the map of a vocabulary fills pages
        raise PlanError(f"{expr.op}: {error}\n  in {short}{''.join(listed)}", hint=error.hint) from None


def evaluate(expr: Expr, read: Callable[[str], Tensor]) -> Tensor:
    """The value. Each op computes in the type of what it reads (see surgery.ops.arithmetic), so float64 in is float64
    throughout. The result may be a view of what `read` gave, or that itself: treat it as read-only."""
    if isinstance(expr, Name):
        return read(expr.name)
    return _applied(expr, [evaluate(arg, read) for arg in expr.args])


def evaluate_unrounded(expr: Expr, read: Callable[[str], Tensor], lift: Callable[[Tensor], Tensor]) -> Tensor:
    """The value before it is stored: relayouts in the type of what they read, arithmetic after `lift`, which raises to
    float64. An op whose published rule changes the function (approximate, lossy) computes in the type that is stored,
    as the rule's own library does, and its result is raised: every evaluation of it gives the same numbers."""
    if kind(expr) == "exact":
        return evaluate(expr, read)
    if isinstance(expr, Name):
        return lift(read(expr.name))
    if ops.get(expr.op).kind in ("approximate", "lossy") and expr.op != "cast":
        return lift(evaluate(expr, read))
    return _applied(expr, [lift(evaluate_unrounded(arg, read, lift)) for arg in expr.args])


def _applied(expr: Call, tensors: list[Tensor]) -> Tensor:
    here = next((t.device for t, arg in zip(tensors, expr.args, strict=True) if names(arg)), None)
    if here is not None:  # constants are made on the CPU and follow the tensors that were read
        tensors = [t if names(arg) else t.to(here) for t, arg in zip(tensors, expr.args, strict=True)]
    return ops.get(expr.op).apply(tensors, **dict(expr.params))


def undone(expr: Expr, result: Expr | str, shape_of: Callable[[str], Shape]) -> dict[str, Expr]:
    """The source tensors that the value of `expr` gives back, each as an expression over `result`, which holds that
    value: of cat(q, k, axis=0) in w the slices of w that are q and k. A tensor that an op does not give back is left
    out; one that is asked for beside the result (the factors of a merged adapter) stands as itself."""
    whole = Name(result) if isinstance(result, str) else result
    if isinstance(expr, Name):
        return {expr.name: whole}
    op = ops.get(expr.op)
    if op.inverse is None:
        return {}
    found: dict[str, Expr] = {}
    shapes = tuple(infer(arg, shape_of) for arg in expr.args)
    for arg, steps in zip(expr.args, op.inverse(shapes, dict(expr.params)), strict=True):
        if steps is not None and names(arg):
            back = whole
            for step in steps:
                back = Call(step.op, (back, *(expr.args[n] for n in step.beside)), tuple(step.params.items()))
            for name, value in undone(arg, back, shape_of).items():
                found.setdefault(name, value)
    return found


def kind(expr: Expr, dtype_of: Callable[[str], str] | None = None) -> Kind:
    """The worst kind among the ops. A cast is exact or lossy by the type of what it reads: with `dtype_of` (as
    safetensors spells types) that is known; without, a cast to anything but float64 counts as lossy."""
    return _kind(expr, dtype_of)[0]


def _kind(expr: Expr, dtype_of: Callable[[str], str] | None) -> tuple[Kind, str | None]:
    """The kind, and the type of the result where it is known."""
    if isinstance(expr, Name):
        return "exact", dtype_of(expr.name) if dtype_of else None
    below = [_kind(arg, dtype_of) for arg in expr.args]
    dtypes = {dtype for _, dtype in below}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    own = ops.get(expr.op).kind
    if expr.op == "cast":
        to = str(dict(expr.params)["dtype"])
        own, dtype = "exact" if cast_is_exact(dtype, to) else "lossy", to
    return max((own, *(k for k, _ in below)), key=ops.KINDS.index), dtype
