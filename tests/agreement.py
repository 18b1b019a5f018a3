"""What tests of agreement share: tensors by seed, and an op's value with the shape that it foretold."""

from __future__ import annotations

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
