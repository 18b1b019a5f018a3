"""A norm with a gain and a bias, over one that has none."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.plan import Status
from tests.surgery.test_spellings import D, graft, refused, tokens


class Blocks(nn.Module):
    """Pre-norm blocks. norm: "full", "gain" (a gain alone), "bare" (neither), "bias" (a bias alone)."""

    def __init__(self, norm: str, eps: float = 1e-5, rms: bool = False) -> None:
        super().__init__()
        kinds: dict[str, dict[str, Any]] = {"full": {}, "gain": {"bias": False}, "bare": {"elementwise_affine": False}}
        if rms:
            made = [nn.RMSNorm(D, eps=eps, elementwise_affine=norm != "bare") for _ in range(4)]
        else:
            made = [nn.LayerNorm(D, eps=eps, **kinds.get(norm, kinds["bare"])) for _ in range(4)]
        self.norms = nn.ModuleList(made)
        self.shifts = nn.ParameterList(nn.Parameter(Tensor(D)) for _ in range(4 if norm == "bias" else 0))
        self.enter, self.leave = nn.Linear(D, D), nn.Linear(D, 3)
        self.mix = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def norm(self, i: int, x: Tensor) -> Tensor:
        x = self.norms[i](x)
        return x + self.shifts[i] if len(self.shifts) else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for i, mix in enumerate(self.mix):
            x = x + F.gelu(mix(self.norm(i, x)))
        return self.leave(self.norm(3, x))


def settled(report: surgery.Report, leaf: str) -> set[str]:
    rows = [row for row in report.rows if row.name.startswith("norms.") and row.name.endswith(leaf)]
    assert len(rows) == 4
    assert all(row.status in (Status.SYNTHESISED, Status.FILLED) for row in rows)
    return {row.op if row.op != "copy" else row.sources[0] for row in rows}


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("mine", ["full", "gain"])
def test_the_gain_of_a_norm_that_has_none(mine: str, rms: bool) -> None:
    report = graft(Blocks("bare", rms=rms), Blocks(mine, rms=rms), tokens)
    assert settled(report, ".weight") == {"ones"}
    if mine == "full" and not rms:
        assert settled(report, ".bias") == {"zeros"}


def test_a_bias_without_a_gain() -> None:
    report = graft(Blocks("bias"), Blocks("full"), tokens)
    assert settled(report, ".weight") == {"ones"}
    assert settled(report, ".bias") == {f"shifts.{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("source", "target"),
    [(Blocks("bare"), Blocks("full", eps=1e-3)), (Blocks("full"), Blocks("bare")), (Blocks("full"), Blocks("gain"))],
)
def test_no_gain_makes_up_for_another_function(source: Blocks, target: Blocks) -> None:
    refused(source, target, tokens)
