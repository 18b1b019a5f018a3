"""The largest gradient in each line, against gradients that are formed in full."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import gradients, twin
from surgery.gradients import Deferred, pulled


def lines(g: Tensor) -> list[Tensor]:
    if g.ndim < 2:
        return [g.abs().reshape(-1)]
    return [g.abs().amax([a for a in range(g.ndim) if a != axis]) for axis in range(g.ndim)]


def agrees(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient of a matrix counts as large, and blocks are of a few rows."""
    monkeypatch.setattr(gradients, "LARGE", 1)
    monkeypatch.setattr(gradients, "BLOCK", 20)


class Tied(nn.Module):
    """A table that is looked up and is the head as well; a matrix that is used twice; one that lies turned."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.one = nn.Linear(12, 12)
        self.turned = nn.Parameter(torch.randn(14, 12).t())
        self.back = nn.Linear(14, 12)
        self.kernel = nn.Conv1d(12, 12, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.one(x).relu()
        x = x + self.one(x).relu()
        x = x + self.back((x @ self.turned).relu())
        x = x + self.kernel(x.transpose(1, 2)).transpose(1, 2)
        return F.linear(x, self.table.weight)


@pytest.mark.usefixtures("small")
def test_as_if_they_were_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 20, (2, 5))
    plain = Tied().double()
    plain.load_state_dict(model.state_dict())
    weight = torch.randn(2, 5, 30, dtype=torch.float64)
    (plain(ids) * weight).sum().backward()
    formed: list[tuple[int, ...]] = []
    dense = Deferred.dense
    monkeypatch.setattr(Deferred, "dense", lambda self: formed.append(tuple(self.shape)) or dense(self))
    ours = twin.twin(model)
    leaves = dict(enumerate(p.requires_grad_() for p in ours.parameters()))
    with torch.enable_grad(), twin.lifted(), torch.enable_grad():
        total = (ours(ids) * weight).sum()
        found = pulled(total, leaves)
    assert found is not None
    assert formed == []  # none had to be
    for i, p in enumerate(plain.parameters()):
        assert p.grad is not None
        agrees(found[i], lines(p.grad))
    assert all(leaf.grad is None for leaf in leaves.values())


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 6), st.integers(0, 12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_lines_of_sums(n: int, m: int, k: int, looked_up: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    rows = ((torch.randint(0, n, (looked_up,), generator=g), drawn(looked_up, m)),)
    for products in ((), ((drawn(n, k), drawn(k, m)),), ((drawn(n, k), drawn(k, m)), (drawn(n, 2), drawn(2, m)))):
        made = Deferred((n, m), products, rows)
        agrees(made.largest(), lines(made.dense()))


def test_an_operator_that_needs_the_elements_gets_them() -> None:
    a, b = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    made = Deferred((6, 5), ((a, b),))
    torch.testing.assert_close(made * 2 + 1, a @ b * 2 + 1)
    torch.testing.assert_close((made.t() + made.t()).dense(), 2 * (a @ b).t())
