"""Scales that were folded into the weights before them, and folds that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.expr import kind, parse
from tests.surgery.test_norms import Norm, call, images, stirred

C = 6


def graft(source: nn.Module, target: nn.Module, inputs: Any = images) -> surgery.Report:
    source, target = stirred(source, 1), stirred(target, 2)
    report = surgery.graft(source.state_dict(), target, probe=surgery.Probe(source, call, call, inputs))
    with torch.no_grad():
        torch.testing.assert_close(target(inputs(7)), source(inputs(7)), rtol=1e-4, atol=1e-4)
    return report


class Convolutions(nn.Module):
    """Plain, depthwise, strided with a shortcut; each with a norm, or without one where it was folded away."""

    def __init__(self, norm: str = "", *, bias: bool = False, shift: bool = True) -> None:
        super().__init__()
        conv = lambda *a, **k: nn.Conv2d(*a, bias=shift if not norm else bias, **k)  # noqa: E731
        self.a, self.b = conv(3, C, 3), conv(C, C, 3, padding=1, groups=C)
        self.c, self.d = conv(C, C, 3, padding=1, stride=2), conv(C, C, 1, stride=2)
        self.norms = nn.ModuleList(Norm(norm) if norm else nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norms
        x = F.relu(n[0](self.a(x)))
        x = x + F.gelu(n[1](self.b(x)))
        return F.relu(n[2](self.c(x)) + n[3](self.d(x))).mean((2, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["library", "frozen", "written out"])
def test_norms_folded_into_convolutions(norm: str, bias: bool) -> None:
    report = graft(Convolutions(norm, bias=bias), Convolutions())
    assert report.verdict == "proven"
    exprs = {r.target: r.expr for r in report.plan.rows}
    assert all(e is not None and (kind(e) == "preserving" or "bias" in n) for n, e in exprs.items())
    assert all(parse(str(e)) == e for e in exprs.values())


def test_a_norm_is_not_folded_where_there_is_no_place_for_its_shift() -> None:
    with pytest.raises(surgery.GraftError):
        graft(Convolutions("library"), Convolutions(shift=False))


def test_a_plain_convolution_is_no_folded_one() -> None:
    with pytest.raises(surgery.GraftError):  # one norm cannot be had back from a kernel that holds it
        graft(Convolutions(), Convolutions("library"))


def vectors(seed: int) -> Tensor:
    return torch.randn(2, 5, C, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    """A layer scale behind each linear map; `how` says what is left of it."""

    def __init__(self, how: str, size: tuple[int, ...] = (C,)) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(C, 2 * C) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * C, C) for _ in range(2))
        if how != "folded":
            self.scale = nn.ParameterList(nn.Parameter(torch.ones(size)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for k in range(2):
            y = self.down[k](F.gelu(self.up[k](self.norm[k](x))))
            if self.how == "scaled":
                y = self.scale[k] * y
            elif self.how == "scaled before the bias":
                y = F.linear(F.gelu(self.up[k](self.norm[k](x))), self.down[k].weight) * self.scale[k]
                y = y + self.down[k].bias
            elif self.how == "scaled twice":
                y = y * self.scale[k] * self.scale[1 - k]
            elif self.how == "divided":
                y = y / self.scale[k]
            x = x + y
        return x.tanh()


@pytest.mark.parametrize("size", [(C,), (1,), ()])
@pytest.mark.parametrize("how", ["scaled", "scaled before the bias", "scaled twice", "divided"])
def test_layer_scales_folded_into_linear_maps(how: str, size: tuple[int, ...]) -> None:
    report = graft(Layer(how, size), Layer("folded"), vectors)
    assert report.verdict == "proven"
    rows = {r.target: str(r.expr) for r in report.plan.rows}
    assert rows["up.0.weight"] == "up.0.weight"
    if how == "scaled" and size == (C,):
        assert rows["down.0.weight"] == "mul(down.0.weight, reshape(scale.0, shape=(6, 1)))"
        assert rows["down.0.bias"] == "mul(down.0.bias, scale.0)"


def test_a_scale_for_each_place_is_no_scale_of_columns() -> None:
    with pytest.raises(surgery.GraftError):
        graft(Layer("scaled", (5, 1)), Layer("folded"), vectors)


class Pair(nn.Module):
    """A product of two gains, or one."""

    def __init__(self, two: bool) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(C))
        self.two = nn.Parameter(torch.ones(C)) if two else None
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.one if self.two is None else self.one * self.two
        return self.out(x.tanh() * gain).tanh()


def test_a_gain_from_a_product_of_gains() -> None:
    report = graft(Pair(two=True), Pair(two=False), vectors)
    assert report.verdict == "proven"
    assert {r.target: str(r.expr) for r in report.plan.rows}["one"] == "mul(one, two)"


def test_a_frozen_bias_is_no_constant_where_a_norm_went_into_it() -> None:
    target = Convolutions()
    for name, p in target.named_parameters():
        p.requires_grad_("bias" not in name)  # as torch.fx fuses them
    report = graft(Convolutions("library"), target)
    assert report.verdict == "proven"
    assert all(r.expr is not None for r in report.plan.rows)
