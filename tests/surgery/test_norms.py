"""Norms by stored statistics in all their spellings, and one that only looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.mapper.record import record
from surgery.twin import twin

C = 6


def call(module: nn.Module, x: Any) -> Any:
    return module(x)


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that no two tensors share by chance."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=g) + 0.3 if "var" in name else torch.randn(t.shape, generator=g))
    return module.eval()


def spread(t: Tensor) -> Tensor:
    return t[:, None, None]


class Norm(nn.Module):
    """One function; `how` says in which order a person multiplies."""

    def __init__(self, how: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.how, self.eps = how, eps
        self.gain, self.shift = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        g, b, m, v, eps = self.gain, self.shift, self.mean, self.var, self.eps
        if self.how == "frozen":
            s = (v + eps).rsqrt() * g
            return x * spread(s) + spread(b - m * s)
        if self.how == "frozen, shift first":
            s = g / (v + eps).sqrt()
            return spread(b) + (spread(s) * x - spread(s * m))
        if self.how == "written out":
            return (x - spread(m)) / torch.sqrt(spread(v) + eps) * spread(g) + spread(b)
        if self.how == "gain first":
            return spread(g * torch.rsqrt(v + eps)) * (x - spread(m)) + spread(b)
        if self.how == "in place":
            y = x - spread(m)
            return y.mul_(spread((v + eps).rsqrt())).mul_(spread(g)).add_(spread(b))
        if self.how == "other deviation":
            return (x - spread(m)) / (torch.sqrt(spread(v)) + eps) * spread(g) + spread(b)
        return F.batch_norm(x, m, v, g, b, False, 0.0, eps)


class Net(nn.Module):
    def __init__(self, how: str = "library", eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, C, 3, bias=bias), nn.Conv2d(C, C, 3, bias=bias)
        self.n1, self.n2, self.n3 = Norm(how, eps), Norm(how, eps), Norm(how, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n1(self.a(x)))
        x = x + self.n2(self.b(F.pad(x, [1, 1, 1, 1])))
        return F.gelu(self.n3(x)).mean((2, 3))


def graft(source: nn.Module, target: nn.Module, inputs: Callable[[int], Any] = images) -> surgery.Report:
    return surgery.graft(source.state_dict(), target, probe=surgery.Probe(source, call, call, inputs))


SPELLINGS = ("library", "frozen", "frozen, shift first", "written out", "gain first", "in place")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mine", SPELLINGS)
@pytest.mark.parametrize("theirs", SPELLINGS[:1] + SPELLINGS[2:4])
def test_a_norm_in_one_spelling_is_found_in_another(theirs: str, mine: str, bias: bool) -> None:
    source, target = stirred(Net(theirs, bias=bias), 1), stirred(Net(mine, bias=bias), 2)
    assert graft(source, target).verdict == "proven"
    state = source.state_dict()
    for name, t in target.state_dict().items():
        assert torch.equal(t, state[name]), name


@pytest.mark.parametrize("bias", [False, True])  # with one, the norm might be folded before the target's own
@pytest.mark.parametrize("mine", [*SPELLINGS, "other deviation"])
@pytest.mark.parametrize("theirs", ["library", "written out"])
def test_no_statistic_is_bent_to_make_up_for_another_epsilon(theirs: str, mine: str, bias: bool) -> None:
    source, target = stirred(Net(theirs), 1), stirred(Net(mine, eps=1e-3, bias=bias), 2)
    with pytest.raises(surgery.GraftError):
        graft(source, target)


def test_a_value_that_was_written_into_is_no_difference_any_more() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m, self.s = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = x - self.m
            x.zero_()
            return y * self.s

    module, x = Overwritten(), torch.randn(4, C, dtype=torch.float64)
    tape = record(call, twin(module), x)
    value = tape.values[tape.outputs()[0]].tensor
    assert value is not None
    torch.testing.assert_close(value, (x - module.m.double()) * module.s.double())
