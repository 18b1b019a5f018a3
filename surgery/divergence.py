"""Where two programs part: the first module of the target whose inputs occur in the reference and whose output does
not.

Activations are paired by value, up to layout, so that fused and split models compare. A module whose output does not
occur is no divergence as long as something after it does: a fused projection occurs nowhere in a model that has
three. So the search begins after the last output that does occur. Likely causes are tried, not guessed: each is
removed and the model run again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import surface
from surgery.errors import GraftError
from surgery.expr import Name, names
from surgery.mapper.record import FingerprintIndex, Tape, fingerprint
from surgery.proof import Divergence
from surgery.running import Call

if TYPE_CHECKING:
    from surgery.judge import Judge

EPS = (1e-12, 1e-8, 1e-6, 1e-5, 1e-3)
EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps", "norm_eps")
_MATCH = 1e-9
_TRIALS = 48  # runs that looking for the cause may cost


@dataclass
class _Pairing:
    """What the reference computed on one input, to be looked up by value."""

    tape: Tape
    index: FingerprintIndex

    @classmethod
    def of(cls, tape: Tape) -> _Pairing:
        return cls(tape, FingerprintIndex((vid, v.fingerprint) for vid, v in enumerate(tape.values)))

    def occurs(self, t: Tensor) -> bool | None:
        """Whether a tensor occurs in the reference; None where it says nothing (integers, constants)."""
        f = fingerprint(t)
        if f is None:
            return None
        return any(math.prod(self.tape.values[v].shape) == t.numel() for v in self.index.find(f, _MATCH)) or any(
            all(self.index.find(fingerprint(piece), _MATCH) for piece in pieces) for pieces in _cuts(t)
        )

    def nearest(self, t: Tensor) -> tuple[float, str]:
        """(residual, module) of the closest activation of the same size."""
        best, where = surface.INF, ""
        sizes = [
            v
            for v in self.tape.values
            if v.data and v.origin == "node" and v.tensor is not None and _size(v) == t.numel()
        ]
        for v in sizes:
            if v.tensor is not None and v.tensor.is_floating_point():
                r = surface.residual(v.tensor, t) if v.tensor.squeeze().shape == t.squeeze().shape else surface.INF
                if r < best:
                    best, where = r, self.tape.nodes[v.node].module
        return best, where


def _cuts(t: Tensor) -> Iterator[list[Tensor]]:
    """Ways in which a fused output (query, key and value; gate and up) lies in its last axis, blocked or by head."""
    n = t.shape[-1] if t.ndim > 1 else 0
    for parts in (2, 3):
        for groups in (g for g in range(1, 65) if n and n % (g * parts) == 0):
            cut = t.reshape(*t.shape[:-1], groups, parts, n // (groups * parts))
            yield [cut[..., i, :] for i in range(parts)]


def _size(v: Any) -> int:
    return math.prod(v.shape)


@dataclass(frozen=True)
class _Parting:
    """The first call that differs, by its place in the order of completion."""

    at: int
    module: str
    inside: bool  # its inputs occur in the reference, so that it is the module itself
    out: Tensor | None
    given: list[Tensor]


def diverge(judge: Judge, at: int) -> Divergence:
    """The first divergence on the input of this number."""
    label = judge.inputs[at][0]
    theirs_called: list[Call] = []
    try:
        pairing = _Pairing.of(judge.record_reference(at, theirs_called))
    except GraftError as error:
        return Divergence("", "", surface.INF, f"the two differ on {label}; where is unknown: {error}")

    def calls(edit: Callable[[nn.Module], None] | None = None, around: Any = None) -> list[Call]:
        twin = judge.target_twin(new=judge.probe.run_target is None)
        if edit is not None:
            edit(twin)
        made: list[Call] = []
        with around if around is not None else nullcontext():
            judge.target_side.outputs(twin, judge.inputs[at][1], label, calls=made)
        return made

    parting = _parting(pairing, calls())
    if parting is None:
        return Divergence("", "", surface.INF, f"the outputs differ on {label}, in what is done after the last module")
    name = parting.module or "the module itself"
    residual, theirs = pairing.nearest(parting.out) if parting.out is not None else (surface.INF, "")
    near = f"; the nearest activation of the reference, in {theirs or 'its forward'}, differs by {residual:.1e}"
    near = near if residual < 1.0 else ""
    for cause, said, edit, around in itertools.islice(_causes(judge.target, parting.module), _TRIALS):
        try:
            after = _parting(pairing, calls(edit, around))
        except GraftError:
            continue  # the trial does not run: it is not the cause
        if after is None or after.at > parting.at:
            return Divergence(
                parting.module, theirs, residual, f"{said} ({label}: the outputs part there{near})", cause
            )
    twins = _counterparts(judge, parting.module)
    fed = [c.given for c in theirs_called if c.module in twins]
    if parting.inside and fed and not any(_same_inputs(parting.given, given) for given in fed):
        caller = parting.module.rpartition(".")[0]
        why = (
            f"{caller or 'the module itself'}: what its forward gives to {name} is not what the reference gives to "
            f"{' or '.join(sorted(twins))}, on {label}{near}"
        )
        return Divergence(caller, theirs, residual, why)
    if parting.inside:
        why = f"{name}: its inputs occur in the reference and its output does not, on {label}{near}"
    else:
        why = f"{name}: its forward computes something that the reference does not, on {label}{near}"
    return Divergence(parting.module, theirs, residual, why)


def _counterparts(judge: Judge, module: str) -> set[str]:
    """The reference's modules that hold what the plan puts into this one's own tensors, taken over as they are."""
    live: dict[str, list[str]] = {}
    for name, expr in judge.links.items():
        if isinstance(expr, Name):
            live.setdefault(expr.name, []).append(name)
    rows = [r for r in judge.plan.rows if r.target.rpartition(".")[0] == module and isinstance(r.expr, Name)]
    return {n.rpartition(".")[0] for r in rows for n in live.get(str(r.expr and names(r.expr)[0]), ())}


def _same_inputs(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        any(a.numel() == b.numel() and surface.residual(b, a, anywhere=True) <= _MATCH for b in theirs)
        for a in ours
        if a.is_floating_point()
    )


def _parting(pairing: _Pairing, calls: list[Call]) -> _Parting | None:
    seen: list[bool | None] = []
    for call in calls:
        judged = [r for t in call.out if (r := pairing.occurs(t)) is not None]
        seen.append(all(judged) if judged else None)
    last = max((i for i, ok in enumerate(seen) if ok), default=-1)
    for i in range(last + 1, len(calls)):
        if seen[i] is not False:
            continue
        given = [r for t in calls[i].given if (r := pairing.occurs(t)) is not None]
        out = next((t for t in calls[i].out if pairing.occurs(t) is False), None)
        if all(given):
            return _Parting(i, calls[i].module, True, out, calls[i].given)
        # Something was done to its input on the way: in the forward of the module that calls it.
        strange = next((t for t in calls[i].given if pairing.occurs(t) is False), None)
        return _Parting(i, calls[i].module.rpartition(".")[0], False, strange, [])
    return None


def _causes(target: nn.Module, module: str) -> Iterator[tuple[str, str, Callable[[nn.Module], None] | None, Any]]:
    """(cause, what to tell, an edit of the twin, a context to run it in)."""
    near = {
        name: m
        for name, m in target.named_modules()
        if name == module or name.startswith(f"{module}." if module else "")
    }
    for name, m in near.items():
        for attribute in EPS_NAMES:
            has = getattr(m, attribute, None)
            if not isinstance(has, float):
                continue
            for eps in EPS:
                if eps != has:
                    said = f"{name}: {attribute} is {has:g}, the source has {eps:g}"
                    yield "eps", said, _setter(name, attribute, eps), None
    for name, m in near.items():
        has = getattr(m, "approximate", None)
        if isinstance(m, nn.GELU) and has in ("none", "tanh"):
            other = "none" if has == "tanh" else "tanh"
            said = f'{name}: its GELU is approximate="{has}", the source has "{other}"'
            yield "gelu", said, _setter(name, "approximate", other), None
    said = f"{module or 'its forward'}: its GELU is of the other kind (tanh in place of exact, or the reverse)"
    yield "gelu", said, None, _other_gelu()


def _setter(name: str, attribute: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda twin: setattr(twin.get_submodule(name), attribute, value)


class _OtherGelu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.gelu:
            kwargs["approximate"] = "none" if kwargs.get("approximate", "none") == "tanh" else "tanh"
        return func(*args, **kwargs)


@contextmanager
def _other_gelu() -> Iterator[None]:
    with _OtherGelu():
        yield
