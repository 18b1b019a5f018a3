"""How both sides are run: what the search and the proof need of the outside world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Probe:
    """A runnable reference, and the inputs on which it and the target are compared.

    reference: nn.Module that holds the source's weights (checked by value before anything is claimed).
    run_reference, run_target: (module, x) -> Tensor or a tuple of Tensors, comparable on both sides. run_target may be
        None: then the target is called with x (a tensor, a tuple of arguments or a dict of keyword arguments) and the
        reference's outputs are looked for among the target's activations (the proof surface).
    inputs: a list of x (any pytree of tensors; the first searches, all others prove), or a callable seed -> x.
    outputs: names of the reference's outputs, for reports.
    labels: names of the inputs ("plain", "padded", ...), for reports.
    """

    reference: nn.Module
    run_reference: Callable[[nn.Module, Any], Any]
    run_target: Callable[[nn.Module, Any], Any] | None
    inputs: Sequence[Any] | Callable[[int], Any]
    outputs: tuple[str, ...] = field(default=(), kw_only=True)
    labels: tuple[str, ...] = field(default=(), kw_only=True)

    def search_input(self) -> Any:
        """The input that the search may look at; no proof uses it."""
        return self.inputs(0) if callable(self.inputs) else self.inputs[0]

    def proof_inputs(self) -> list[tuple[str, Any]]:
        """(label, x) of the inputs that only the proof sees. A list of one serves for both, and says so."""
        if callable(self.inputs):
            return [(f"seed {s}", self.inputs(s)) for s in (1, 2, 3)]
        xs = list(self.inputs)
        names = [self.labels[i] if i < len(self.labels) else f"input {i}" for i in range(len(xs))]
        if len(xs) == 1:
            return [(f"{names[0]} (also searched)", xs[0])]
        return list(zip(names, xs, strict=True))[1:]

    def call_target(self, module: nn.Module, x: Any) -> Any:
        """Run the target on x by run_target, or by calling it."""
        if self.run_target is not None:
            return self.run_target(module, x)
        if isinstance(x, dict):
            return module(**x)
        return module(*x) if isinstance(x, (tuple, list)) else module(x)
