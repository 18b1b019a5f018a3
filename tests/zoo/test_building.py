"""Modules made without random values."""

from __future__ import annotations

import torch
from torch import nn

import zoo


def test_what_is_drawn_until_it_fits_ends() -> None:
    """trunc_normal_ of torch draws until all values lie within its bounds; whatever the memory held before."""

    def build() -> nn.Module:
        made = nn.Linear(3, 4)
        made.weight.data.fill_(1e9)
        nn.init.trunc_normal_(made.weight, std=0.02)
        return made

    before = torch.random.get_rng_state()
    module = zoo.unfilled(build)
    assert not module.training
    assert torch.equal(torch.random.get_rng_state(), before)
