"""surgery.graft: all or nothing, by name, into the tensors that are there."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import surgery
from surgery import apply, mapper
from surgery.plan import Dropped, Plan, Row, Status
from tests import pairs


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return pairs.bert()


def right(reference: nn.Module, target: nn.Module, **changes: Any) -> surgery.Report:
    source = reference.state_dict()
    given = {"plan": pairs.plan(source, target), "probe": pairs.probe(reference), **changes}
    return surgery.graft(source, target, **given)


class Marked(nn.Parameter):
    """A parameter class of somebody's own."""


class Snapshot:
    """All that a graft must leave alone when it refuses."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = {
            n: (t, t.detach().clone(), t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()
        }
        self.flags = {n: m.training for n, m in module.named_modules()}
        self.dicts = {n: {k: id(v) for k, v in vars(m).items()} for n, m in module.named_modules()}
        self.hooks = {n: list(m._forward_hooks) for n, m in module.named_modules()}
        self.random = torch.get_rng_state(), random.getstate()

    def check(self, module: nn.Module) -> None:
        for n, t in module.state_dict(keep_vars=True).items():
            was, value, grad = self.tensors[n]
            assert t is was
            assert t.dtype == value.dtype
            assert torch.equal(t.nan_to_num(), value.nan_to_num())
            assert t.requires_grad == grad
        self.check_frame(module)

    def check_frame(self, module: nn.Module) -> None:
        assert {n: m.training for n, m in module.named_modules()} == self.flags
        assert {n: {k: id(v) for k, v in vars(m).items()} for n, m in module.named_modules()} == self.dicts
        assert {n: list(m._forward_hooks) for n, m in module.named_modules()} == self.hooks
        assert torch.equal(torch.get_rng_state(), self.random[0])
        assert random.getstate() == self.random[1]


def prepared(target: nn.Module) -> nn.Module:
    """A module in the middle of somebody's work."""
    target.train()
    target.blocks[0].eval()
    target.norm.requires_grad_(False)
    target.head.register_forward_hook(lambda *_: None)
    return target


# -- writing ----------------------------------------------------------------------------------------------------------
def test_values_are_written_in_place(bert: nn.Module) -> None:
    target = prepared(pairs.Encoder())
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    head, before = target.head.weight.detach().clone(), Snapshot(target)
    report = right(bert, target)
    assert report.verdict == "proven"
    before.check_frame(target)
    for name, t in target.state_dict(keep_vars=True).items():
        assert t is before.tensors[name][0]
        assert t.requires_grad == before.tensors[name][2]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in target.parameters()}
    assert torch.equal(target.head.weight, head)
    query = bert.state_dict()["encoder.layer.1.attention.self.query.weight"]
    assert torch.equal(target.blocks[1].mix.qkv.weight[: pairs.WIDTH], query)
    with torch.no_grad():
        x = pairs.inputs(7)
        got = target.eval().encode(*x)
        assert float((got - pairs.run_bert(bert, x)).abs().max()) < 1e-5
    assert report.proof is not None
    assert report.plan.verdict == "proven"
    assert report.plan.proven
    assert any("softmax" in s for s in report.plan.symmetries)


def test_the_source_is_never_shared(bert: nn.Module) -> None:
    """Training the target must not change what it was grafted from, on the meta device least of all."""
    with torch.device("meta"):
        target = pairs.Encoder()
    source = {n: t.clone() for n, t in bert.state_dict().items()}
    copies = {n: t.clone() for n, t in source.items()}
    surgery.graft(source, target, plan=pairs.plan(source, target), probe=pairs.probe(bert))
    with torch.no_grad():
        for p in target.parameters():
            if not p.is_meta:
                p.add_(1.0)
    assert all(torch.equal(t, copies[n]) for n, t in source.items())


def test_types_of_the_target_hold(bert: nn.Module) -> None:
    target = pairs.Encoder().to(torch.bfloat16)
    report = right(bert, target)
    assert report.verdict == "proven"
    assert report.proof is not None
    assert report.proof.storage > 1e-4
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}


def test_meta_parameters_are_assigned(bert: nn.Module) -> None:
    with torch.device("meta"):
        target = pairs.Encoder()
        target.extra = nn.ModuleList([nn.Embedding(pairs.VOCAB, pairs.WIDTH)])
    target.tokens.weight = Marked(target.tokens.weight, requires_grad=False)
    target.tokens.weight.note = "mine"  # type: ignore[attr-defined]
    target.extra[0].weight = target.tokens.weight
    source = bert.state_dict()
    plan = pairs.plan(source, target)
    tied = replace(plan["extra.0.weight"], status=Status.TIED, tied_to="tokens.weight", note="")
    plan = replace(plan, rows=tuple(tied if r.target == tied.target else r for r in plan.rows))
    report = surgery.graft(source, target, plan=plan, probe=pairs.probe(bert))
    assert report.verdict == "proven"
    weight = target.tokens.weight
    assert type(weight) is Marked
    assert weight.note == "mine"
    assert not weight.requires_grad
    assert target.extra[0].weight is weight
    assert torch.equal(weight, source["embeddings.word_embeddings.weight"])
    assert isinstance(target.norm.weight, nn.Parameter)
    assert target.norm.weight.requires_grad
    assert target.head.weight.is_meta  # new: the person initialises it


# -- refusing ---------------------------------------------------------------------------------------------------------
def test_a_refused_graft_leaves_everything(bert: nn.Module) -> None:
    target = prepared(pairs.Encoder(eps=1e-5))
    before = Snapshot(target)
    said = r"refuted, and consistent is required: norm \(LayerNorm, pairs.py:\d+\): eps is 1e-05, the source has 1e-12"
    with pytest.raises(surgery.GraftError, match=said) as caught:
        right(bert, target)
    before.check(target)
    report = caught.value.report
    assert report is not None
    assert report.verdict == "refuted"
    assert report.proof is not None
    assert report.proof.divergence is not None
    assert caught.value.hint


def test_require(bert: nn.Module) -> None:
    target = pairs.Encoder(eps=1e-5)
    assert right(bert, target, require="refuted").verdict == "refuted"
    assert torch.equal(target.tokens.weight, bert.state_dict()["embeddings.word_embeddings.weight"])
    assert right(bert, pairs.Encoder(), probe=None).verdict == "consistent"
    fresh = pairs.Encoder()
    before = Snapshot(fresh)
    with pytest.raises(surgery.GraftError, match="consistent, and proven is required") as caught:
        right(bert, fresh, probe=None, require="proven")
    assert "Give a probe" in caught.value.hint
    before.check(fresh)
    with pytest.raises(surgery.SurgeryError, match="is no verdict"):
        right(bert, fresh, require="certain")


def test_a_write_that_fails_is_undone(bert: nn.Module) -> None:
    """The last tensor cannot be written: the ones before it are put back."""
    target = prepared(pairs.Encoder())
    target.blocks[1].norm2.bias = nn.Parameter(torch.zeros(1).expand(pairs.WIDTH))
    before = Snapshot(target)
    with pytest.raises(surgery.GraftError, match=r"blocks.1.norm2.bias could not be written"):
        right(bert, target)
    before.check(target)


def test_an_interrupted_write_is_undone(bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(own: object, staged: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(apply, "_check_aliases", interrupted)
    for target in (prepared(pairs.Encoder()), pairs.Encoder().to("meta")):
        before = {n: (t, t.detach().clone()) for n, t in target.state_dict(keep_vars=True).items()}
        with pytest.raises(KeyboardInterrupt):
            right(bert, target)
        for n, t in target.state_dict(keep_vars=True).items():
            assert t is before[n][0]
            assert t.is_meta or torch.equal(t, before[n][1])


def test_shared_memory_with_two_values_is_refused() -> None:
    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.zeros(6)
            self.a, self.b = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])

    target = Overlapping()
    source = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    with pytest.raises(surgery.GraftError, match="shares memory with"):
        surgery.graft(source, target, plan=pairs.plan_of(source, target, {"a": "a", "b": "b"}))
    assert not target.a.any()
    assert not target.b.any()


def test_values_that_overflow_are_refused() -> None:
    target = nn.Linear(2, 2, bias=False).half()
    source = {"w": torch.full((2, 2), 1e6)}
    with pytest.raises(surgery.GraftError, match="weight: 4 values of w overflow float16"):
        surgery.graft(source, target, plan=pairs.plan_of(source, target, {"weight": "w"}))


def test_a_plan_that_does_not_fit_is_refused(bert: nn.Module) -> None:
    source, target = bert.state_dict(), pairs.Encoder()
    plan, other = pairs.plan(source, target), pairs.plan(source, pairs.Encoder(classes=4))
    before = Snapshot(target)
    for broken in (replace(plan, rows=plan.rows[1:]), replace(plan, dropped=()), other):
        with pytest.raises(surgery.PlanError, match="does not fit"):
            surgery.graft(source, target, plan=broken, probe=pairs.probe(bert))
    before.check(target)


def test_a_probe_that_fails_is_no_static_answer(bert: nn.Module) -> None:
    target = pairs.Encoder()
    before = Snapshot(target)
    with pytest.raises(surgery.GraftError, match="the target could not be run"):
        right(bert, target, probe=pairs.probe(bert, run_target=lambda m, x: m.encode(x)))
    before.check(target)


# -- plans ------------------------------------------------------------------------------------------------------------
def test_a_saved_plan_is_applied_again(bert: nn.Module, tmp_path: Path) -> None:
    first = right(bert, pairs.Encoder())
    first.plan.save(tmp_path / "mine.graft.toml")
    plan = surgery.Plan.load(tmp_path / "mine.graft.toml")
    assert plan.verdict == "proven"
    save_file({n: t.contiguous() for n, t in bert.state_dict().items()}, tmp_path / "theirs.safetensors")
    target = pairs.Encoder()
    report = surgery.graft(tmp_path / "theirs.safetensors", target, plan=plan, probe=pairs.probe(bert))
    assert report.verdict == "proven"
    unrun = surgery.graft(tmp_path / "theirs.safetensors", pairs.Encoder(), plan=plan)
    assert unrun.verdict == "consistent"  # it is said what was run now, not what was proven once
    assert any("it was proven when it was made" in note for note in unrun.plan.notes)


def test_an_ambiguous_plan_shows_its_candidates(bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    target = pairs.Encoder()
    plan = pairs.plan(bert.state_dict(), target)
    split = replace(plan, candidates=(plan, plan), diagnosis="two mappings fit").with_verdict("ambiguous")
    monkeypatch.setattr(mapper, "find", lambda *_, **__: split)
    before = Snapshot(target)
    with pytest.raises(surgery.GraftError, match="ambiguous, and consistent is required: two mappings fit") as caught:
        surgery.graft(bert.state_dict(), target, probe=pairs.probe(bert))
    before.check(target)
    assert caught.value.report is not None
    assert len(caught.value.report.candidates) == 2
    chosen = caught.value.report.candidates[1]
    assert surgery.graft(bert.state_dict(), target, plan=chosen, probe=pairs.probe(bert)).verdict == "proven"


def test_plan_changes_nothing(bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    target = prepared(pairs.Encoder())
    plan = pairs.plan(bert.state_dict(), target)

    def find(*_: object, **__: object) -> Plan:
        torch.rand(3)
        return plan

    monkeypatch.setattr(mapper, "find", find)
    before = Snapshot(target)
    assert surgery.plan(bert.state_dict(), target, probe=pairs.probe(bert)).rows == plan.rows
    before.check(target)
    with pytest.raises(surgery.SurgeryError, match="not a rule: 'resize'"):
        surgery.plan(bert.state_dict(), target, rules=["resize"])


# -- into, kept -------------------------------------------------------------------------------------------------------
class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"left": pairs.Encoder(), "right": pairs.Encoder()})
        self.join = nn.Linear(6, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def test_into_a_submodule_and_what_is_kept(bert: nn.Module) -> None:
    both, other = Both(), pairs.bert(seed=3)
    right_before = both.towers["right"].tokens.weight.detach().clone()
    first = surgery.graft(
        bert.state_dict(),
        both,
        into="towers.left",
        plan=pairs.plan(bert.state_dict(), both.towers["left"]),
        probe=pairs.probe(bert),
    )
    status = {row.name: row.status for row in first.rows}
    assert first.verdict == "proven"
    assert status["towers.left.tokens.weight"] == "filled"
    assert status["towers.right.tokens.weight"] == "new"
    assert status["steps"] == "constant"
    assert torch.equal(both.towers["right"].tokens.weight, right_before)

    second = surgery.graft(
        other.state_dict(),
        both,
        into="towers.right",
        plan=pairs.plan(other.state_dict(), both.towers["right"]),
        probe=pairs.probe(other),
    )
    status = {row.name: row.status for row in second.rows}
    assert second.verdict == "proven"
    assert status["towers.left.tokens.weight"] == "kept"
    assert status["towers.left.head.weight"] == "new"
    assert status["towers.right.tokens.weight"] == "filled"
    groups = second.param_groups(both, lr=1e-5, new_lr=1e-3)
    new = {id(p) for g in groups if g["name"] == "new" for p in g["params"]}
    heads = [both.join, both.towers["left"].head, both.towers["right"].head]
    assert new == {id(p) for head in heads for p in head.parameters()}

    again = Both()  # a report's plan has full names, and can be applied again with the same `into`
    report = surgery.graft(other.state_dict(), again, into="towers.right", plan=second.plan, probe=pairs.probe(other))
    assert report.verdict == "proven"
    assert torch.equal(again.towers["right"].tokens.weight, both.towers["right"].tokens.weight)
    proof = surgery.verify(other.state_dict(), again, second.plan, probe=pairs.probe(other), into="towers.right")
    assert proof.verdict == "proven"


def test_kept_by_name(bert: nn.Module) -> None:
    """Weights that were loaded before are kept where the source has nothing, and count as pretrained."""
    target = pairs.Encoder()
    report = right(bert, target, kept=list(target.state_dict()))
    status = {row.name: row.status for row in report.rows}
    assert status["head.weight"] == "kept"
    assert status["tokens.weight"] == "filled"
    with pytest.raises(surgery.GraftError, match="kept names nothing.here"):
        right(bert, pairs.Encoder(), kept=["nothing.here"])


def test_what_was_filled_is_remembered_beside_the_module(bert: nn.Module) -> None:
    target = pairs.Encoder()
    attributes = {n: set(vars(m)) for n, m in target.named_modules()}
    right(bert, target)
    assert {n: set(vars(m)) for n, m in target.named_modules()} == attributes
    assert "blocks.0.mix.qkv.weight" in apply.filled(target)
    assert "head.weight" not in apply.filled(target)
    assert not apply.filled(copy.deepcopy(target))
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


def test_unknown_submodules(bert: nn.Module) -> None:
    with pytest.raises(surgery.GraftError, match="no submodule towers.lft") as caught:
        surgery.graft(bert.state_dict(), Both(), into="towers.lft")
    assert "towers.left" in caught.value.hint
    with pytest.raises(surgery.SurgeryError, match="allow_different names nothing"):
        right(bert, pairs.Encoder(), allow_different=["nothing"])


# -- rows of every kind -----------------------------------------------------------------------------------------------
class Rows(nn.Module):
    """Tied tensors, a bias that the source lacks, a constant of its own, a buffer that is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.out = nn.Linear(4, 11)
        self.out.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("by", torch.tensor(0.5))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out((self.embed(ids) - self.mean) * self.by)


class Theirs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 11))
        self.register_buffer("center", torch.randn(4))

    def forward(self, ids: Tensor) -> Tensor:
        return ((self.table.T[ids] - self.center) * 0.5) @ self.table


def test_rows_of_every_kind() -> None:
    torch.manual_seed(0)
    theirs, mine = Theirs(), Rows()
    source = theirs.state_dict()
    plan = pairs.plan_of(
        source, mine, {"embed.weight": "transpose(table)", "mean": "center", "out.bias": "zeros(shape=(11,))"}
    )
    changes = {
        "out.weight": {"status": Status.TIED, "tied_to": "embed.weight", "note": ""},
        "out.bias": {"status": Status.SYNTHESISED},
        "by": {"status": Status.CONSTANT},
    }
    rows: tuple[Row, ...] = tuple(replace(r, **changes.get(r.target, {})) for r in plan.rows)  # type: ignore[arg-type]
    plan = replace(plan, rows=rows)
    probe = surgery.Probe(
        theirs,
        lambda m, x: m(x),
        lambda m, x: m(x),
        lambda seed: torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(seed)),
    )
    report = surgery.graft(source, mine, plan=plan, probe=probe)
    assert report.verdict == "proven"
    assert report.counts == {"filled": 2, "tied": 1, "synthesised": 1, "constant": 1}
    assert mine.out.weight is mine.embed.weight
    assert torch.equal(mine.embed.weight, source["table"].T)
    assert not mine.out.bias.any()
    ids = torch.arange(11)[None]
    with torch.no_grad():
        assert torch.allclose(mine(ids), theirs(ids), atol=1e-5)


def test_dropped_rows_are_reported(bert: nn.Module) -> None:
    report = right(bert, pairs.Encoder())
    dropped = {row.name: row.note for row in report.rows if row.status == "dropped"}
    assert dropped == {f"pooler.dense.{leaf}": "the target has no place for it" for leaf in ("weight", "bias")}
    assert Dropped("pooler.dense.bias", "the target has no place for it") in report.plan.dropped
