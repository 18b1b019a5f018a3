"""A residual above the gate, although both compute the same: what float32 left behind, found by removing it.

Two causes are known, and each is tried, never assumed: a frozen number that one side stores in float32 (a scale of
d ** -0.5, the 1/n of a kernel that averages), and a table of constants that one side stores in float32 and the other
computes as it runs (sinusoids).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from surgery.mapper.record import Tape
from surgery.twin import LOW, tensors_of

_MOST = 1 << 16  # elements of a tensor that is looked at for one number
_ULPS = 4  # how far a table may be from the other side's, in units of its type's rounding


@cache
def _round_numbers() -> dict[float, float]:
    """float32 values of the numbers that people write, and these numbers in float64."""
    found: dict[float, float] = {}
    exact = [k / 10 for k in range(1, 100)] + [k / 100 for k in range(1, 100)]
    for n in range(2, 8193):
        exact += [n**-0.5, n**0.5, 1.0 / n, n**-0.25]
    for value in exact:
        found.setdefault(float(torch.tensor(value, dtype=torch.float32)), value)
    return found


def one_number(t: Tensor) -> bool:
    """Is it a single number, or one number all over?"""
    if t.numel() == 1 or t.is_meta or not 0 < t.numel() <= _MOST:
        return t.numel() == 1
    return bool((t == t.reshape(-1)[0]).all())


def scalars(module: nn.Module, used: set[int]) -> dict[int, Tensor]:
    """{id: value before rounding} of the single numbers that a module stores in float32 (once, or all over a tensor)
    and that no plan moves."""
    found = {}
    for t in tensors_of(module):
        if t.dtype == torch.float32 and id(t) not in used and not t.is_meta and one_number(t):
            stored = float(t.detach().reshape(-1)[0])
            value = _round_numbers().get(abs(stored))
            if value is not None and value != abs(stored):
                exact = value if stored > 0 else -value
                found[id(t)] = torch.full(t.shape, exact, dtype=torch.float64, device=t.device)
    return found


def tables(module: nn.Module, used: set[int], other: Tape) -> dict[int, Tensor]:
    """{id: value} of the tables of constants that `module` stores in low precision, as the other side computes them.

    used: ids of the tensors that are weights. A table takes part where the other side holds the same numbers up to
    rounding; where that side computed only its first rows, only these are replaced.
    """
    pool = [
        v.tensor.to(torch.float64)
        for v in other.values
        if not v.data
        and not v.weights
        and v.tensor is not None
        and v.tensor.is_floating_point()
        and v.tensor.numel() > 1
    ]
    found = {}
    for t in tensors_of(module):
        if id(t) in used or t.dtype not in LOW or t.numel() < 2 or t.is_meta:
            continue
        better = _better(t.detach().to("cpu", torch.float64), torch.finfo(t.dtype).eps, pool)
        if better is not None:
            found[id(t)] = better.reshape(t.shape).to(t.device)
    return found


def _better(table: Tensor, eps: float, pool: list[Tensor]) -> Tensor | None:
    flat = table.reshape([n for n in table.shape if n != 1])
    best: Tensor | None = None
    rows = 0
    for value in pool:
        v = value.cpu().reshape([n for n in value.shape if n != 1])
        if v.ndim != flat.ndim or v.shape[1:] != flat.shape[1:] or not rows < len(v) <= len(flat):
            continue
        part = flat[: len(v)]
        apart = float((part - v).abs().max())
        if 0 < apart <= _ULPS * eps * float(part.abs().max()):
            best, rows = flat.clone(), len(v)
            best[:rows] = v
    return best


def names_of(module: nn.Module, ids: Mapping[int, Tensor]) -> list[str]:
    """The tensors' names, for a sentence."""
    found: list[str] = []
    for path, m in module.named_modules():
        for attribute, t in [*m.__dict__.items(), *m._parameters.items(), *m._buffers.items()]:
            if isinstance(t, Tensor) and id(t) in ids:
                found.append(f"{path}.{attribute}" if path else attribute)
    return list(dict.fromkeys(found)) or [f"{len(ids)} tensors"]
