"""Convolutions that see the same windows, and tables that one side stores and the other computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.expr import evaluate
from surgery.mapper import find
from surgery.plan import Plan

IN, WIDTH, LENGTH = 4, 6, 11


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def call(module: nn.Module, x: Any) -> Any:
    return module(x)


def series(seed: int) -> Tensor:
    return torch.randn(3, IN, LENGTH, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return module.eval()


def plan_of(reference: nn.Module, target: nn.Module) -> Plan:
    shaken(reference), shaken(target)
    return find(surgery.open(reference.state_dict()), target, surgery.Probe(reference, call, call, series))


def solves(reference: nn.Module, target: nn.Module) -> Plan:
    plan = plan_of(reference, target)
    assert plan.verdict is None, plan.diagnosis
    state = reference.state_dict()
    made = {r.target: evaluate(r.expr, state.__getitem__) for r in plan.rows if r.expr is not None}
    target.load_state_dict({**target.state_dict(), **made})
    with torch.no_grad():
        torch.testing.assert_close(target(series(1)), reference(series(1)), rtol=1e-4, atol=1e-5)
    return plan


# -- windows ----------------------------------------------------------------------------------------------------------
class Causal(nn.Module):
    """Two dilated convolutions that see no future: `pad` the input at its start, or `chomp` the end of the output."""

    def __init__(self, how: str = "pad", groups: int = 1, dilation: int = 2, norm: bool = False) -> None:
        super().__init__()
        self.how, self.dilation = how, dilation
        a, b = nn.Conv1d(IN, 2 * IN, 3, groups=groups), nn.Conv1d(2 * IN, WIDTH, 3, dilation=dilation)
        if norm:
            a, b = (nn.utils.parametrizations.weight_norm(c) for c in (a, b))
        self.a, self.b = a, b
        if how == "chomp":
            self.a.padding, self.b.padding = (2,), (2 * dilation,)

    def forward(self, x: Tensor) -> Tensor:
        for conv, reach in ((self.a, 2), (self.b, 2 * self.dilation)):
            if self.how == "chomp":
                x = torch.relu(conv(x)[..., :-reach])
            else:
                pads = {"pad": (reach, 0), "future": (0, reach), "more": (reach + 1, 0)}[self.how]
                x = torch.relu(conv(F.pad(x, pads)))[..., :LENGTH]
        return x


@pytest.mark.parametrize("groups", [1, 2, IN])
def test_a_padded_input_and_a_cut_output_are_one_convolution(groups: int) -> None:
    solves(Causal("pad", groups), Causal("chomp", groups))


def test_a_cut_output_and_a_padded_input_are_one_convolution() -> None:
    solves(Causal("chomp"), Causal("pad"))


def test_weight_norm_with_its_default_axis_goes_into_plain_weights() -> None:
    plan = solves(Causal("pad", norm=True), Causal("chomp"))
    assert all("weight_norm" in str(r.expr) for r in plan.rows if r.target.endswith("weight"))


@pytest.mark.parametrize("other", [{"how": "future"}, {"how": "more"}, {"dilation": 1}, {"dilation": 3}])
def test_windows_elsewhere_are_refused(other: dict[str, Any]) -> None:
    assert plan_of(Causal(), Causal(**other)).verdict == "refuted"


class Up(nn.Module):
    """A transposed convolution that crops its output itself, or has it cropped."""

    def __init__(self, crop: int) -> None:
        super().__init__()
        self.crop, self.up = crop, nn.ConvTranspose1d(IN, WIDTH, 4, 2, padding=1 - crop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return torch.relu(y[..., self.crop : y.shape[-1] - self.crop])


def test_a_transposed_convolution_cropped_outside_and_inside() -> None:
    solves(Up(1), Up(0))
    solves(Up(0), Up(1))


# -- tables -----------------------------------------------------------------------------------------------------------
def waves(base: float) -> Tensor:
    at = torch.arange(LENGTH).float()[None, :] * (base ** (-torch.arange(WIDTH).float() / WIDTH))[:, None]
    return torch.sin(at)


class Placed(nn.Module):
    """Adds a table of sines: `stored` in float32, or computed as it runs."""

    def __init__(self, stored: str = "", base: float = 100.0) -> None:
        super().__init__()
        self.base, self.stored = base, stored
        self.embed, self.out = nn.Conv1d(IN, WIDTH, 1), nn.Conv1d(WIDTH, IN, 1)
        if stored:
            self.register_buffer("table", waves(base), persistent=stored == "kept")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.embed(x) + (self.table if self.stored else waves(self.base).to(x))))


@pytest.mark.parametrize("stored", ["kept", "made"])
def test_a_table_that_the_target_stores_and_the_reference_computes(stored: str) -> None:
    plan = solves(Placed(), Placed(stored))
    assert all(r.status.value == "constant" for r in plan.rows if r.target == "table")


def test_a_table_that_the_reference_stores_and_the_target_computes() -> None:
    solves(Placed("made"), Placed())


def test_a_table_that_differs_by_more_than_rounding_is_refused() -> None:
    assert plan_of(Placed(), Placed("made", 100.01)).verdict == "refuted"
    assert plan_of(Placed("made"), Placed(base=100.01)).verdict == "refuted"
