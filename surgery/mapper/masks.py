"""Masked scores: how they are told from what is merely large."""

from __future__ import annotations

import torch
from torch import Tensor

HUGE = 5e3  # masked scores: -inf, the dtype's minimum and -1e9 stand for the same thing
GAP = 4.0  # how many times as large as what is no mask they are at least; large activations reach up to each other


def masked(x: Tensor) -> Tensor:
    """Which elements are masked scores: far below zero, and far from all others. What is not finite counts as such."""
    finite = torch.isfinite(x)
    low = -x[x <= -HUGE]
    if low.numel():
        rest = x[finite & (x > -HUGE)]
        top = rest.abs().max() if rest.numel() else rest.new_zeros(())
        sizes = torch.cat([top.reshape(1), low.sort().values])
        jumps = torch.nonzero(sizes[1:] >= GAP * sizes[:-1].cummax(0).values).flatten()
        if len(jumps):
            return ~finite | (x <= -sizes[1 + int(jumps[0])])
    return ~finite
