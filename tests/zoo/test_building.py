"""Modules made without random values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_what_a_library_puts_in_the_place_of_torchs_draws_nothing() -> None:
    """transformers calls torch's functions by its own; memory that nothing draws into is not touched."""
    transformers = pytest.importorskip("transformers")
    drawn: list[int] = []
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
                drawn.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    def build() -> nn.Module:
        with Seen():
            return transformers.BertModel(config)

    zoo.unfilled(build)
    assert drawn == []
    build()
    assert drawn
