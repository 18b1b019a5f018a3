"""The float64 twin: the same function without the roundings, and the person's module as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from surgery import twin


class Rounding(nn.Module):
    """What models do that makes .double() crash or round: casts, float32 constants, an in-place update, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6))
        self.register_buffer("table", torch.arange(6) * 0.1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + torch.tensor(1e-6, dtype=torch.float32))
        y += torch.full((6,), 1 / 3, dtype=torch.float32)
        return (self.scale * y.to(x.dtype)) * torch.arange(6, dtype=torch.float32).add(0.1)


def by_hand(module: Rounding, x: Tensor) -> Tensor:
    y = x.double() @ module.linear.weight.double().T + module.linear.bias.double()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return module.scale.double() * (y + 1 / 3) * (torch.arange(6, dtype=torch.float64) + 0.1)


def test_casts_and_constants_are_lifted() -> None:
    torch.manual_seed(0)
    module, x = Rounding(), torch.randn(4, 6)
    with torch.no_grad():
        exact = by_hand(module, x)
        got = twin.run(lambda m, x: m(x), twin.twin(module), x)
        plain = module(x)
    assert got.dtype == torch.float64
    assert float((got - exact).abs().max()) < 1e-14
    assert float((plain - exact).abs().max()) > 1e-9  # the test would see a rounding


def test_values_stand_in_place_unrounded() -> None:
    module, x = Rounding(), torch.randn(4, 6)
    third = torch.full((6,), 1 / 3, dtype=torch.float64)
    got = twin.run(lambda m, x: m(x), twin.twin(module, {"scale": third}), x)
    module.scale.data = third
    with torch.no_grad():
        assert float((got - by_hand(module, x)).abs().max()) < 1e-14


def test_ties_stay_ties_and_the_module_is_untouched() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    module.train()
    before = {name: (t, t.detach().clone()) for name, t in module.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    copy = twin.twin(module)
    assert copy[2].weight is copy[0].weight
    assert not copy.training
    twin.run(lambda m, x: m(x), copy, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert module.training
    assert module[1].training
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in module.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert torch.equal(t, before[name][1])
        assert t.requires_grad


def test_globals_are_restored_after_a_failure() -> None:
    def fails(module: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("no")

    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="no"):
        twin.run(fails, twin.twin(nn.Linear(2, 2)), torch.randn(1, 2))
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_the_exact_gelu_of_the_encoder_layer() -> None:
    """nn.TransformerEncoderLayer's fast path computes exact GELU whatever it was told; the twin does not take it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU("tanh"), batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    got = twin.run(lambda m, x: m(x), twin.twin(layer), x)
    slow = layer.train()
    for m in slow.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    slow.self_attn.dropout = 0.0
    with torch.no_grad():
        assert float((slow(x) - got).abs().max()) < 1e-5
    assert math.isfinite(float(got.sum()))


def test_a_product_with_a_matrix_that_is_raised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "SCRATCH", 40)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(9, 23, bias=False).to(dtype)
        x = torch.randn(4, 9)
        got = twin.run(lambda m, x: m(x), twin.twin(linear), x)
        torch.testing.assert_close(got, x.double() @ linear.weight.detach().double().t())


def test_memory_that_is_used_again_holds_no_result() -> None:
    """Two products one after the other: the second's weights go where the first's were."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Conv1d(2, 4, 3))
    kept: list[Tensor] = []

    def run(module: nn.Module, x: Tensor) -> Tensor:
        for layer in module:
            x = layer(x)
            kept.append(x)
        return x

    x = torch.randn(2, 2, 5)
    twin.run(run, twin.twin(net), x)
    expected = x.double()
    for layer, got in zip(net.double(), kept, strict=True):
        expected = layer(expected)
        torch.testing.assert_close(got, expected.detach())
