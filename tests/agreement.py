"""What tests of agreement share: tensors by seed, and an op's value with the shape that it foretold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from surgery import ops
from surgery.expr import call, evaluate, infer

SEEDS = st.integers(0, 1000)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(op: str, *tensors: Tensor, **params: ops.Value) -> Tensor:
    """The op's value, after `infer` foretold its shape; in the type of its first tensor."""
    read = {f"t{n}": tensor for n, tensor in enumerate(tensors)}
    expr = call(op, *read, **params)
    foretold = infer(expr, lambda name: tuple(read[name].shape))
    result = evaluate(expr, read.__getitem__)
    assert tuple(result.shape) == foretold
    assert result.dtype == tensors[0].dtype
    return result


@dataclass
class Met:
    """One op beside one reference implementation, over all that was tried in this process."""

    shapes: set[tuple[int, ...]] = field(default_factory=set)  # of results
    dtypes: set[str] = field(default_factory=set)
    tried: int = 0
    exact: int = 0  # bit for bit
    worst: float = 0.0  # of the others: the largest difference, in parts of the largest number


MET: dict[tuple[str, str], Met] = {}  # by op and reference; benchmarks/agreement.py prints them


def agree(op: str, reference: str, mine: Tensor, theirs: Tensor, *, within: float = 0.0) -> None:
    """Assert that the op's value is the reference implementation's: bit for bit, or `within` so much (absolute and
    relative) where the two compute in different orders or types."""
    met = MET.setdefault((op, reference), Met())
    met.shapes.add(tuple(mine.shape))
    met.dtypes.add(str(mine.dtype).removeprefix("torch."))
    met.tried += 1
    if torch.equal(mine, theirs):
        met.exact += 1
        return
    if within == 0.0:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(mine, theirs, rtol=within, atol=within)
    top = float(theirs.abs().max())
    met.worst = max(met.worst, float((mine.double() - theirs.double()).abs().max()) / (top or 1.0))
