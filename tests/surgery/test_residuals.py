"""Residual by depth: which modules are compared with which, and where a difference begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.plan import Plan
from surgery.residuals import by_depth


class Theirs(nn.Module):
    """A block with three projections of its own, and a head."""

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8, eps=eps)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.out(self.a(x).tanh() * self.b(x).sigmoid() + self.c(x)))
        return self.last(x)


class Mine(nn.Module):
    """The same with one projection for all three."""

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.abc, self.mix, self.ln, self.head = (
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.LayerNorm(8, eps=eps),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.abc(x).chunk(3, -1)
        return self.head(self.ln(x + self.mix(a.tanh() * b.sigmoid() + c)))


def probe(theirs: nn.Module) -> surgery.Probe:
    return surgery.Probe(
        reference=theirs,
        run_reference=lambda module, x: module(x),
        run_target=lambda module, x: module(x),
        inputs=lambda seed: torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)) * 1e-2,
    )


@pytest.fixture(scope="module")
def grafted() -> tuple[Theirs, Plan]:
    torch.manual_seed(0)
    theirs = Theirs().eval()
    return theirs, surgery.plan(theirs.state_dict(), Mine(), probe=probe(theirs))


def points(depth: Any) -> dict[str, Any]:
    return {point.module: point for point in depth.points}


def test_every_module_is_compared_a_fused_one_with_all_that_it_was_made_of(grafted: tuple[Theirs, Plan]) -> None:
    theirs, plan = grafted
    exact, single = by_depth(theirs.state_dict(), Mine(), plan, probe=probe(theirs))
    assert exact.modules == ("abc", "mix", "ln", "head", "")
    found = points(exact)
    assert {name: point.reference for name, point in found.items()} == {
        "abc": "a, b, c",
        "mix": "out",
        "ln": "norm",
        "head": "last",
        "": "last",
    }
    assert all(point.residual <= 1e-12 for point in found.values())
    assert (single.name, single.why) == ("cpu/float32", "")
    assert all(1e-9 < point.residual < 1e-5 for point in single.points)
    assert all(0 < point.own < 1e-5 for point in single.points)


def test_a_difference_begins_where_it_is_made(grafted: tuple[Theirs, Plan]) -> None:
    theirs, plan = grafted
    (exact,) = by_depth(theirs.state_dict(), Mine(eps=1e-5), plan, probe=probe(theirs), passes=["cpu/float64"])
    found = points(exact)
    assert max(found["abc"].residual, found["mix"].residual) <= 1e-12
    assert min(found["ln"].residual, found["head"].residual) > 1e-6


class Shifted(nn.Linear):
    """One more than a linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Pair(nn.Module):
    """Two linear maps; where the first gives one more than it should, that is taken away again."""

    def __init__(self, first: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.one, self.two = first(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two((self.one(x) - int(isinstance(self.one, Shifted))).tanh())


class Hides(nn.Module):
    """A sum over what the mask keeps; or, where it is forgotten, over all."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.first, self.last, self.forgets = nn.Linear(4, 4), nn.Linear(4, 2), forgets

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.first(x).tanh()
        return self.last(y if self.forgets else y * mask[..., None])


def test_two_that_part_on_one_input_only_are_compared_on_that_one() -> None:
    theirs, mine = Hides(False), Hides(True)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    some = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    asks = surgery.Probe(
        reference=theirs,
        run_reference=lambda module, given: module(*given),
        run_target=lambda module, given: module(*given),
        inputs=[(x, torch.ones(2, 3)), (x + 1, torch.ones(2, 3)), (x + 2, some)],
    )
    plan = surgery.plan(theirs.state_dict(), Hides(False), probe=asks)
    parted = surgery.verify(theirs.state_dict(), mine, plan, probe=asks).divergence
    assert parted is not None
    assert parted.as_dict()["input"] == parted.input != ""
    worst = {
        on: max(point.residual for point in by_depth(theirs.state_dict(), mine, plan, probe=asks, on=on)[0].points)
        for on in ("", parted.input)
    }
    assert worst[""] < 1e-12
    assert worst[parted.input] > 1e-3


def test_what_computes_the_same_in_another_way_is_no_difference() -> None:
    torch.manual_seed(0)
    theirs = Pair().eval()
    run = surgery.Probe(theirs, lambda m, x: m(x), lambda m, x: m(x), [torch.randn(4, 6) for _ in range(3)])
    plan = surgery.plan(theirs.state_dict(), Pair(), probe=run)
    (plain,) = by_depth(theirs.state_dict(), Pair(), plan, probe=run, passes=["cpu/float64"])
    assert set(points(plain)) == {"one", "two", ""}
    (other,) = by_depth(theirs.state_dict(), Pair(Shifted), plan, probe=run, passes=["cpu/float64"])
    assert set(points(other)) == {"two", ""}
    assert all(point.residual <= 1e-12 for point in other.points)


def test_a_pass_that_cannot_run_says_why(grafted: tuple[Theirs, Plan]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    theirs, plan = grafted
    (depth,) = by_depth(theirs.state_dict(), Mine(), plan, probe=probe(theirs), passes=["cuda/float16"])
    assert (depth.why, depth.points) == ("no CUDA device", ())


def test_nothing_is_changed(grafted: tuple[Theirs, Plan]) -> None:
    theirs, plan = grafted
    mine = Mine()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    state = torch.get_rng_state()
    by_depth(theirs.state_dict(), mine, plan, probe=probe(theirs))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
