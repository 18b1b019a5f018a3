"""One function in another spelling: scales as convolutions, convolutions as taps, branches merged, tables looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import surgery
from surgery.expr import parse
from tests.surgery.test_norms import call, images

C, D, H, N = 6, 8, 2, 9


def series(seed: int) -> Tensor:
    return torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> Tensor:
    return torch.randn(3, N, D, generator=torch.Generator().manual_seed(seed))


def woken(module: nn.Module, seed: int) -> nn.Module:
    """Weights that no two tensors share by chance; buffers are constants here, and stay."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in module.parameters():
            t.copy_(torch.randn(t.shape, generator=g))
    return module.eval()


def graft(source: nn.Module, target: nn.Module, inputs: Callable[[int], Any]) -> surgery.Report:
    """Proven, and what the plan says is what it does."""
    source, target = woken(source, 1), woken(target, 2)
    report = surgery.graft(source.state_dict(), target, probe=surgery.Probe(source, call, call, inputs))
    assert report.verdict == "proven"
    for seed in (7, 8):
        with torch.no_grad():
            torch.testing.assert_close(target(inputs(seed)), source(inputs(seed)), rtol=1e-4, atol=1e-4)
    assert all(parse(str(r.expr)) == r.expr for r in report.plan.rows if r.expr is not None)
    return report


def refused(source: nn.Module, target: nn.Module, inputs: Callable[[int], Any]) -> None:
    source, target = woken(source, 1), woken(target, 2)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises(surgery.GraftError):
        surgery.graft(source.state_dict(), target, probe=surgery.Probe(source, call, call, inputs))
    assert all(torch.equal(t, before[n]) for n, t in target.state_dict().items())


# -- a scale as a depthwise convolution -------------------------------------------------------------------------------
class Scaled(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 1), how
        size = {"gamma": (C,), "rows": (1, C, 1, 1)}.get(how, (C, 1, 3, 3) if how == "wide" else (C, 1, 1, 1))
        self.s = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x))
        y = F.gelu(self.b(x))
        if self.how == "gamma":
            return F.relu(x + (y.permute(0, 2, 3, 1) * self.s).permute(0, 3, 1, 2))
        if self.how == "rows":
            return F.relu(x + self.s * y)
        if self.how == "strided":
            return F.relu(x[..., ::2, ::2] + F.conv2d(y, self.s, stride=2, groups=C))
        return F.relu(x + F.conv2d(y, self.s, padding=self.s.shape[-1] // 2, groups=C))


@pytest.mark.parametrize(("a", "b"), [("conv", "gamma"), ("rows", "conv"), ("conv", "conv")])
def test_a_scale_as_a_depthwise_convolution(a: str, b: str) -> None:
    graft(Scaled(a), Scaled(b), images)


@pytest.mark.parametrize("how", ["wide", "strided"])
def test_a_depthwise_convolution_that_is_no_scale(how: str) -> None:
    refused(Scaled(how), Scaled("gamma"), images)


# -- taps -------------------------------------------------------------------------------------------------------------
class Causal(nn.Module):
    """Two causal convolutions over [batch, time, channel]; `how` says how they are spelled."""

    def __init__(self, how: str, dilation: int = 2, k: int = 3) -> None:
        super().__init__()
        self.how, self.d, self.k = how, dilation, k
        if how in ("taps", "taps backwards", "ahead"):
            self.kernels = nn.ParameterList(torch.zeros(k, i, D) for i in (4, D))
            self.biases = nn.ParameterList(torch.zeros(D) for _ in range(2))
        else:
            padding = dilation * (k - 1) if how != "left" else 0
            made = [nn.Conv1d(i, D, k, dilation=dilation, padding=padding) for i in (4, D)]
            self.convs = nn.ModuleList(weight_norm(c) if how == "normed" else c for c in made)

    def layer(self, i: int, x: Tensor) -> Tensor:
        reach, n = self.d * (self.k - 1), x.shape[1]
        if self.how == "left":
            return self.convs[i](F.pad(x.mT, (reach, 0))).mT
        if self.how in ("chomped", "normed"):
            return self.convs[i](x.mT)[..., :-reach].mT
        x = F.pad(x, (0, 0, 0, reach) if self.how == "ahead" else (0, 0, reach, 0))
        order = range(self.k) if self.how != "taps backwards" else range(self.k - 1, -1, -1)
        return sum((x[:, j * self.d : j * self.d + n] @ self.kernels[i][j] for j in order), self.biases[i])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(1, self.layer(0, x).relu()).tanh()


@pytest.mark.parametrize("a", ["chomped", "normed", "left"])
@pytest.mark.parametrize("b", ["taps", "taps backwards"])
def test_a_convolution_written_out_tap_by_tap(a: str, b: str) -> None:
    graft(Causal(a), Causal(b), series)


@pytest.mark.parametrize("a", ["taps", "taps backwards"])
@pytest.mark.parametrize("b", ["chomped", "left"])
def test_taps_as_one_convolution(a: str, b: str) -> None:
    graft(Causal(a), Causal(b), series)


@pytest.mark.parametrize("target", [Causal("ahead"), Causal("taps", dilation=1), Causal("taps", k=2)])
def test_taps_that_stand_elsewhere(target: Causal) -> None:
    refused(Causal("chomped"), target, series)


# -- branches merged --------------------------------------------------------------------------------------------------
class Branches(nn.Module):
    """Branches that are added up, or averaged; merged: one kernel, as large as the largest."""

    def __init__(self, sizes: tuple[int, ...], how: str = "sum") -> None:
        super().__init__()
        self.how = how
        self.first = nn.ModuleList(nn.Conv2d(3, C, k, padding=k // 2) for k in sizes)
        self.second = nn.ModuleList(nn.Conv2d(C, C, (1, k), padding=(0, k // 2)) for k in sizes)

    def together(self, branches: Any, x: Tensor) -> Tensor:
        if self.how == "mean":
            return torch.stack([f(x) for f in branches], -1).mean(-1)
        if self.how == "of two":
            return branches[0](x) + sum(f(x.roll(1, -1)) for f in list(branches)[1:])
        out = branches[0](x)
        for f in list(branches)[1:]:
            out = out + f(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.together(self.second, F.gelu(self.together(self.first, x))).tanh()


class Twice(nn.Module):
    """Two Linears of one input, or one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.maps, self.last = nn.ModuleList(nn.Linear(D, D) for _ in range(n)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(sum(f(x) for f in self.maps).tanh())


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("sizes", [(1, 3, 5), (3, 1), (3, 3)])
def test_branches_merged_into_one_kernel(how: str, sizes: tuple[int, ...]) -> None:
    graft(Branches(sizes, how), Branches((max(sizes),)), images)


def test_two_linears_of_one_input_merged() -> None:
    graft(Twice(2), Twice(1), tokens)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Branches((1, 5)), Branches((3,))),  # no place for all of the largest
        (Branches((3, 1), "of two"), Branches((3,))),  # not of one input
    ],
)
def test_branches_that_are_not_one_kernel(source: Branches, target: Branches) -> None:
    refused(source, target, images)


# -- tables -----------------------------------------------------------------------------------------------------------
G = 3  # positions lie on a grid of G x G


def relative() -> tuple[Tensor, Tensor]:
    """(the coordinates of every offset, which offset lies between two positions)."""
    at = torch.stack(torch.meshgrid(torch.arange(G), torch.arange(G), indexing="ij"), -1).reshape(-1, 2)
    apart = at[:, None] - at + G - 1
    every = torch.arange(2 * G - 1) - G + 1
    table = torch.stack(torch.meshgrid(every, every, indexing="ij"), -1).reshape(-1, 2)
    return table.float() / G, apart[..., 0] * (2 * G - 1) + apart[..., 1]


class Biased(nn.Module):
    """Attention with a bias of positions: stored, looked up in a table, or made from coordinates by a network."""

    def __init__(self, how: str, persistent: bool = False, power: float = 1.0) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        table, index = relative()
        self.index = index
        if how == "whole":
            self.bias = nn.Parameter(torch.zeros(H, N, N))
        elif how == "table":
            self.table = nn.Parameter(torch.zeros(len(table), H))
        elif how == "turned":
            self.table = nn.Parameter(torch.zeros(H, len(table)))
        else:
            self.mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, H, bias=False))
            self.coordinates = nn.Buffer(table.sign() * table.abs() ** power, persistent=persistent)

    def positions(self) -> Tensor:
        if self.how == "whole":
            return self.bias
        if self.how == "table":
            return self.table[self.index].permute(2, 0, 1)
        if self.how == "turned":
            return self.table[:, self.index]
        return 4 * torch.sigmoid(self.mlp(self.coordinates)[self.index.reshape(-1)].reshape(N, N, H).permute(2, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT * (D // H) ** -0.5 + self.positions()
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).tanh()


@pytest.mark.parametrize("how", ["table", "turned"])
def test_a_table_looked_up_once(how: str) -> None:
    report = graft(Biased(how), Biased("whole"), tokens)
    assert "take(table, index=" in {r.target: str(r.expr) for r in report.plan.rows}["bias"]


def test_biases_that_come_from_no_table() -> None:
    refused(Biased("whole"), Biased("table"), tokens)


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_network_that_makes_biases_from_coordinates(theirs: bool, mine: bool) -> None:
    graft(Biased("network", theirs), Biased("network", mine), tokens)


@pytest.mark.parametrize("power", [1.1, 1 + 1e-6])
def test_a_network_over_other_coordinates(power: float) -> None:
    refused(Biased("network"), Biased("network", power=power), tokens)


# -- constants --------------------------------------------------------------------------------------------------------
class Average(nn.Module):
    """What is left of a series without its moving average; by pooling, or by a kernel that is a constant."""

    def __init__(self, how: str, n: int = 5) -> None:
        super().__init__()
        self.how, self.n = how, n
        self.a, self.b = nn.Linear(4, D), nn.Linear(D, D)
        if how != "pool":
            self.weigh = nn.Buffer(torch.full((1, 1, n), 1 / n), persistent=how == "stored")

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mT
        padded = F.pad(x, (self.n // 2, self.n // 2), mode="replicate")
        if self.how == "pool":
            trend = F.avg_pool1d(padded, self.n, 1)
        else:
            trend = F.conv1d(padded.flatten(0, 1)[:, None], self.weigh)[:, 0].unflatten(0, x.shape[:2])
        return self.b((x - trend).mT).tanh()


@pytest.mark.parametrize(("a", "b"), [("stored", "pool"), ("pool", "stored"), ("pool", "made"), ("made", "pool")])
def test_a_moving_average_as_a_constant_kernel(a: str, b: str) -> None:
    graft(Average(a), Average(b), series)


@pytest.mark.parametrize("by", [1 + 1e-6, 1.1])
def test_a_kernel_that_is_no_average(by: float) -> None:
    source = Average("stored")
    source.weigh.mul_(by)
    refused(source, Average("pool"), series)
    source.weigh.copy_(torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1]))
    refused(source, Average("pool"), series)


class Chosen(nn.Module):
    """Attention of which some scores are reckoned first, to sort the queries; `scale`: what the scores are times."""

    def __init__(self, sort: bool, scale: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.sort, self.scale = sort, scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if not self.sort:
            return self.out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)).tanh()
        order = (q @ k[:, :, ::2].mT).amax(-1).argsort(-1)
        q = q.gather(2, order[..., None].expand(q.shape))
        y = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.out(y.gather(2, order.argsort(-1)[..., None].expand(y.shape)).transpose(1, 2).flatten(2)).tanh()


@pytest.mark.parametrize(("a", "b"), [(False, True), (True, False), (True, True)])
def test_scores_reckoned_twice(a: bool, b: bool) -> None:
    graft(Chosen(a, 0.5), Chosen(b, 0.5), tokens)


def test_scores_under_another_scale() -> None:
    refused(Chosen(False, 0.5), Chosen(True, 0.25), tokens)


class Scored(nn.Module):
    """Two towers and a temperature; `first`: where the temperature stands."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Linear(6, 4, bias=False), nn.Linear(5, 4, bias=False), first
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        a, b = (nn.functional.normalize(t, dim=-1) for t in (self.a(x[0]), self.b(x[1])))
        if self.first == "left":
            return self.scale.exp() * a @ b.t()
        if self.first == "right":
            return a @ (self.scale.exp() * b.t())
        return self.scale.exp() * (a @ b.t())


@pytest.mark.parametrize("theirs", ["left", "right", "last"])
@pytest.mark.parametrize("mine", ["left", "right", "last"])
def test_a_scale_of_one_element_commutes_with_a_product(theirs: str, mine: str) -> None:
    torch.manual_seed(0)
    reference, own = Scored(theirs), Scored(mine)
    own.load_state_dict({n: torch.randn_like(t) for n, t in own.state_dict().items()})
    with torch.no_grad():
        reference.scale.fill_(0.3)

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(3, 6, generator=g), torch.randn(4, 5, generator=g)

    def run(module: nn.Module, x: Any) -> Tensor:
        return module(x)

    probe = surgery.Probe(reference, run, run, inputs)
    report = surgery.graft(reference.state_dict(), own, probe=probe, require="proven")
    assert report.verdict == "proven"


class Tokens(nn.Module):
    """A norm over all tokens, of which a head of its own takes the first two."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(12, 3) if head else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.mix(x).tanh())
        return y if self.head is None else self.head(y[:, :2].flatten(1))


def test_a_part_of_a_value_that_only_a_new_head_reads() -> None:
    torch.manual_seed(0)
    reference, own = Tokens(head=False), Tokens(head=True)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.2 * torch.randn_like(p))

    def inputs(seed: int) -> Tensor:
        return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed))

    probe = surgery.Probe(reference, lambda m, x: m(x), None, inputs)
    report = surgery.graft(reference.state_dict(), own, probe=probe, require="proven")
    assert report.verdict == "proven"
    assert torch.equal(own.norm.weight, reference.norm.weight)
