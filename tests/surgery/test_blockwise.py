"""A proof in little memory says the same as one of the whole run at once; and how much it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import exercise, gradients, machine, segments, twin
from surgery.judge import BLOCKWISE
from surgery.proof import Proof
from tests import pairs

BOTH = pytest.mark.parametrize("surface", [False, True], ids=["returned", "surface"])


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny model has many."""
    monkeypatch.setattr(segments, "PIECE", 1 << 13)
    monkeypatch.setattr(segments, "WINDOW", 4)
    monkeypatch.setattr(segments, "STATES", 1 << 12)
    monkeypatch.setattr(gradients, "LARGE", 256)
    monkeypatch.setattr(exercise, "ROWS", 100)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return pairs.bert()


def prove(reference: nn.Module, target: nn.Module, *, surface: bool, blockwise: bool, **changes: Any) -> Proof:
    source = reference.state_dict()
    plan = changes.pop("plan", None) or pairs.plan(source, target)
    probe = pairs.probe(reference, surface=surface, **changes)
    return surgery.verify(source, target, plan, probe=probe, blockwise=blockwise)


@BOTH
@pytest.mark.usefixtures("small_pieces")
def test_it_says_the_same(bert: nn.Module, surface: bool) -> None:
    whole = prove(bert, pairs.Encoder(), surface=surface, blockwise=False)
    pieces = prove(bert, pairs.Encoder(), surface=surface, blockwise=True)
    assert pieces.verdict == whole.verdict == "proven"
    assert pieces.not_exercised == whole.not_exercised
    assert pieces.symmetries == whole.symmetries
    assert pieces.surface == whole.surface
    assert pieces.passes[0].details["blockwise"] is True
    assert BLOCKWISE in pieces.notes
    assert BLOCKWISE not in whole.notes


@BOTH
@pytest.mark.usefixtures("small_pieces")
def test_a_near_miss_is_refuted(bert: nn.Module, surface: bool) -> None:
    for changes in ({"eps": 1e-5}, {"gelu": "tanh"}, {"scaled": False}):
        proof = prove(bert, pairs.Encoder(**changes), surface=surface, blockwise=True)  # type: ignore[arg-type]
        assert proof.verdict == "refuted"
        assert proof.divergence is not None


@BOTH
@pytest.mark.usefixtures("small_pieces")
def test_a_branch_that_is_dead_is_not_called_exercised(bert: nn.Module, surface: bool) -> None:
    """What a block computes has to reach the outputs, however the run is cut."""

    class Dead(pairs.Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(pairs.WIDTH, pairs.WIDTH)

        def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = super().encode(ids, mask)
            return x + 0 * self.extra(x)

    target = Dead()
    rows = {
        **pairs.expressions(target),
        "extra.weight": "pooler.dense.weight",
        "extra.bias": "pooler.dense.bias",
    }
    plan = pairs.plan_of(bert.state_dict(), target, rows)
    gaps = [
        prove(bert, target, surface=surface, blockwise=blockwise, plan=plan).not_exercised
        for blockwise in (False, True)
    ]
    assert gaps[0] == gaps[1]
    assert any(gap.startswith("extra.weight: filled, not exercised") for gap in gaps[1])


@pytest.mark.usefixtures("small_pieces")
def test_a_weight_that_is_used_in_two_pieces() -> None:
    """Its gradient is the sum of both: what cancels between them is no influence."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(16, 16)
            self.shared = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.shared
            for _ in range(20):
                y = self.one(y) - self.one(y) + y
            return y - self.shared

    torch.manual_seed(0)
    reference, target = Twice(), Twice()
    source = reference.state_dict()
    plan = pairs.plan_of(source, target, {name: name for name in source})
    probe = surgery.Probe(
        reference,
        lambda m, x: m(x),
        lambda m, x: m(x),
        lambda seed: torch.randn(40, 16, generator=torch.Generator().manual_seed(seed)),
    )
    found = [surgery.verify(source, target, plan, probe=probe, blockwise=b) for b in (False, True)]
    whole, pieces = ((each.not_exercised, each.verdict) for each in found)
    assert pieces == whole


def test_turned_weights_keep_their_graph(bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a surface the run is replayed; what is perturbed there is what softmax cancels, and no more."""
    followed: list[int] = []
    real = exercise.followed

    def counted(tape: Any, nodes: Any, outputs: Any, items: Any) -> Any:
        followed.append(len(items))
        return real(tape, nodes, outputs, items)

    monkeypatch.setattr(exercise, "followed", counted)
    prove(bert, pairs.Encoder(), surface=True, blockwise=False)
    assert sum(followed) <= 12
    assert len(followed) <= 4


def test_when_it_is_chosen(bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the memory that is free, and both models in float64."""
    target = pairs.Encoder()
    need = 8 * sum(p.numel() for m in (bert, target) for p in m.parameters())
    source = bert.state_dict()
    plan, probe = pairs.plan(source, target), pairs.probe(bert)
    for free, expected in ((need, False), (need - 1, True), (None, False)):
        monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
        proof = surgery.verify(source, target, plan, probe=probe)
        assert proof.passes[0].details["blockwise"] is expected
    assert surgery.verify(source, target, plan, probe=probe, blockwise=True).passes[0].details["blockwise"] is True


def test_what_is_free() -> None:
    free = machine.available_memory()
    if not Path("/proc/meminfo").exists():
        assert free is None
    else:
        assert free is not None
        assert 0 < free < 1 << 50


def test_a_value_that_is_made_on_use() -> None:
    made: list[int] = []

    def make() -> Tensor:
        made.append(1)
        return torch.arange(6.0).reshape(2, 3)

    value = twin.Made(make, torch.empty(2, 3, device="meta"), torch.device("cpu"))
    assert not made
    assert (tuple(value.shape), value.dtype, value.t().shape) == ((2, 3), torch.float32, (3, 2))
    assert not made  # nor by turning it
    assert torch.equal(value.t() + 0, make().t())
    assert torch.equal(twin.lift(value), make().double())
    assert torch.equal(
        twin.Lifted(value) @ torch.ones(3, 1, dtype=torch.float64), torch.tensor([[3.0], [12.0]]).double()
    )


def test_a_target_without_memory_of_its_own(bert: nn.Module) -> None:
    with torch.device("meta"):
        target = pairs.Encoder()
    source = bert.state_dict()
    rows = replace(pairs.plan(source, pairs.Encoder()))
    proof = surgery.verify(source, target, rows, probe=pairs.probe(bert), blockwise=True)
    assert proof.verdict == "proven", proof.message


def test_the_memory_that_it_takes(tmp_path: Path, root: Path) -> None:
    """The figure that benchmarks/proof_memory.py prints, of a stack of blocks small enough for a test."""
    if machine.available_memory() is None:
        pytest.skip("this system does not say what a process holds")
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "proof_memory.py"), "--one", "stack"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    import json

    found = json.loads(done.stdout.splitlines()[-1])
    assert found["verdict"] == "proven"
    assert found["peak_x"] <= 1.3 + 2 * found["block_float64_x"]
