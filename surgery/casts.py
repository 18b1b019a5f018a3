"""Casts to a type of fewer digits inside a program: the float64 proof lifts them, what runs in float32 pays for them.

A cast is found by running the target as it is, in float32, and is told by its module and line. What it costs, and
whether it is why a pass fails, is measured: by the same run with the cast left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from surgery import surface
from surgery.errors import GraftError
from surgery.pairing import caller, named
from surgery.running import Side, all_tensors, build, watched

if TYPE_CHECKING:
    from surgery.judge import Judge

MOST = 4  # places whose cost is told apart


@dataclass(frozen=True)
class Cast:
    """One line of a program that casts, in one module."""

    module: str
    file: str
    line: int
    dtype: torch.dtype

    @property
    def place(self) -> tuple[str, int, torch.dtype]:
        return self.file, self.line, self.dtype


Lift = Callable[[Cast], bool]


class _Casting(TorchDispatchMode):
    """Notes the casts of what runs inside, and leaves out those that are to be lifted."""

    def __init__(self, stack: Sequence[str], lift: Lift) -> None:
        super().__init__()
        self.stack, self.lift = stack, lift
        self.found: dict[Cast, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and _loses(args[0].dtype, kwargs.get("dtype")):
            cast = Cast(self.stack[-1] if self.stack else "", *caller(), kwargs["dtype"])
            self.found[cast] = None
            if self.lift(cast):
                kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
        return func(*args, **kwargs)


def _loses(has: torch.dtype, gets: torch.dtype | None) -> bool:
    """Has the second type fewer digits than the first?"""
    if gets is None or not has.is_floating_point or not gets.is_floating_point:
        return False
    return torch.finfo(gets).eps > torch.finfo(has).eps


def watching(side: Side, lift: Lift, found: dict[Cast, None]) -> Side:
    """A side that runs without the casts of which `lift` says so; all of them are put into `found`."""

    def run(module: nn.Module, x: Any) -> Any:
        stack: list[str] = []
        with watched(module, None, stack), _Casting(stack, lift) as mode:
            out = side.run(module, x)
        found.update(mode.found)
        return out

    return replace(side, run=run)


def notes(judge: Judge) -> Iterator[str]:
    """What the target casts, on its smallest input, and what that costs in float32; nothing where it casts nothing."""
    try:
        yield from _notes(judge)
    except GraftError:
        return  # it does not run in float32: no cast of its can be told


def _notes(judge: Judge) -> Iterator[str]:
    label, x = min(judge.inputs, key=lambda i: sum(t.numel() for t in tree_iter(i[1]) if isinstance(t, Tensor)))
    if judge.blockwise:  # a copy in float32 would be held; the twin is not
        found: dict[Cast, None] = {}
        watching(judge.target_side, lambda _: False, found).outputs(judge.target_twin(), x, label)
        for of in _by_place(found):
            yield f"{told(judge, of)}: lifted in the proof"
        return
    found = {}
    plain = build(judge.target, {**_whole(judge), **judge.values}, judge.device, torch.float32)
    x = tree_map(lambda t: t.to(torch.float32) if isinstance(t, Tensor) and t.is_floating_point() else t, x)

    def outputs(lift: Lift) -> list[Tensor]:
        devices = [judge.device] if judge.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return watching(judge.target_side, lift, found).outputs(plain, x, label, exact=False)

    was = outputs(lambda _: False)
    if not found:
        return
    exact = outputs(lambda _: True)
    places = _by_place(found)
    for of in places[:MOST]:
        now = was if len(places) == 1 else outputs(lambda c, place=of[0].place: c.place != place)  # type: ignore[misc]
        cost = max((surface.residual(a, b) for a, b in zip(exact, now, strict=True)), default=0.0)
        if cost:
            yield f"{told(judge, of)}: lifted in the proof; it costs {cost:.0e}"
    if len(places) > MOST:
        cost = max((surface.residual(a, b) for a, b in zip(exact, was, strict=True)), default=0.0)
        yield f"{len(places)} lines of the target cast to fewer digits: lifted in the proof; all cost {cost:.0e}"


def _whole(judge: Judge) -> dict[str, Tensor]:
    """Values for what is new and has none."""
    own = all_tensors(judge.target)
    return {n: t for n, t in judge.new.items() if n in own and own[n].is_meta}


def _by_place(found: dict[Cast, None]) -> list[list[Cast]]:
    grouped: dict[Any, list[Cast]] = {}
    for cast in found:
        grouped.setdefault(cast.place, []).append(cast)
    return list(grouped.values())


def told(judge: Judge, of: Sequence[Cast]) -> str:
    """In the person's words: where it is, and to which type."""
    first, more = of[0], len({c.module for c in of}) - 1
    others = f" and {more} more module{'s' if more > 1 else ''}" if more else ""
    where = named(judge.target, first.module, first.file, first.line, short=True)
    return f"{where}{others} cast{'' if more else 's'} to {str(first.dtype).removeprefix('torch.')}"


def blamed(judge: Judge, found: dict[Cast, None], passes: Callable[[Lift], bool]) -> list[list[Cast]]:
    """The casts without which a pass passes, by line; none where leaving out all of them does not help."""
    places = _by_place(found)
    if not places or not passes(lambda _: True):
        return []
    for of in places:
        if passes(lambda c, place=of[0].place: c.place == place):  # type: ignore[misc]
            return [of]
    return places
