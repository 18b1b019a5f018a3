"""What a refusal says beside the first place: what still differs, and what draws at random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.proof import Divergence

WIDTH = 8


class Block(nn.Module):
    def __init__(self, drops: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.drops = drops

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x))))
        return x + (F.dropout(y, 0.5) if self.drops else y)


class Deep(nn.Module):
    """So many blocks that a trial does not run all of them again."""

    def __init__(self, *, offset: int = 0, drops: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(9, WIDTH))
        self.blocks = nn.ModuleList(Block(i in drops) for i in range(16))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places[self.offset : self.offset + x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x


def parted(target: nn.Module, *, surface: bool) -> Divergence:
    torch.manual_seed(0)
    theirs = Deep()
    with torch.no_grad():
        theirs.places.normal_()
    probe = surgery.Probe(
        reference=theirs,
        run_reference=lambda module, x: module(x),
        run_target=None if surface else lambda module, x: module(x),
        inputs=lambda seed: torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)),
    )
    plan = surgery.plan(theirs.state_dict(), Deep(), probe=probe)
    found = surgery.verify(theirs.state_dict(), target, plan, probe=probe).divergence
    assert found is not None
    return found


@pytest.mark.parametrize("surface", [False, True])
def test_what_lies_far_behind_a_cause_is_not_said_to_differ(surface: bool) -> None:
    found = parted(Deep(offset=1), surface=surface)
    assert (found.cause, found.further) == ("position offset", ())
    assert "once that is corrected" not in found.why


@pytest.mark.parametrize("surface", [False, True])
def test_dropout_that_a_function_draws_is_named_and_so_is_the_next_one(surface: bool) -> None:
    """What noise is made of says nothing by itself: it is memory that was not written to, and draws."""
    found = parted(Deep(drops=(3, 14)), surface=surface)
    assert (found.target_module, found.cause, found.further) == ("blocks.3", "dropout", ("blocks.14",))
    assert "once that is corrected, blocks.14 still differs)" in found.why
