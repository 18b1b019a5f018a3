"""The plan: rows, the binding of a verdict, and the law of accounting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from surgery.checkpoint import TensorInfo
from surgery.checkpoint import open as open_checkpoint
from surgery.errors import PlanError
from surgery.expr import parse
from surgery.plan import Dropped, Plan, Row, Stamp, Status, structure_hash


def info(*shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(shape, dtype, 0)


def filled(target: str, expr: str, *shape: int) -> Row:
    return Row(target, Status.FILLED, parse(expr), shape, "F32")


SOURCE = {"q": info(4, 8), "k": info(4, 8), "v": info(4, 8), "emb": info(10, 8), "mask": info(1, 1)}
TARGET = {"qkv": info(12, 8), "emb": info(10, 8), "out": info(10, 8), "head": info(3, 8)}
PLAN = Plan(
    (
        filled("qkv", "cat(q, k, v, axis=0)", 12, 8),
        filled("emb", "emb", 10, 8),
        Row("out", Status.TIED, None, (10, 8), "F32", tied_to="emb"),
        Row("head", Status.NEW, None, (3, 8), "F32", note="a head of three classes"),
    ),
    (Dropped("mask", "the target makes its own"),),
    Stamp.of(SOURCE, "source"),
    Stamp.of(TARGET, "target"),
)


def test_a_whole_plan_passes() -> None:
    PLAN.check(SOURCE, TARGET)
    assert PLAN["qkv"].sources == ("q", "k", "v")
    assert PLAN.used == ("q", "k", "v", "emb")


def with_row(target: str, row: Row | None) -> Plan:
    return replace(PLAN, rows=tuple(r for r in (row if r.target == target else r for r in PLAN.rows) if r is not None))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (with_row("head", None), "target tensor head, shape 3x8, has no row"),
        (replace(PLAN, rows=(*PLAN.rows, PLAN.rows[0])), "more than one row for qkv"),
        (with_row("head", filled("haed", "emb", 3, 8)), "the target has no tensor haed, .*; did you mean head"),
        (
            with_row("head", Row("head", Status.NEW, None, (4, 8), "F32")),
            "head: the target has shape 3x8, the plan 4x8",
        ),
        (
            with_row("emb", filled("emb", "transpose(emb)", 10, 8)),
            r"emb: transpose\(emb\) gives shape 8x10, the target has 10x8",
        ),
        (
            with_row("qkv", filled("qkv", "cat(q, emb)", 12, 8)),
            "source tensor k, shape 4x8, is neither used nor dropped",
        ),
        (with_row("qkv", filled("qkv", "cat(q, k, v, axis=2)", 12, 8)), "qkv: cat: axis 2 does not exist"),
        (with_row("emb", filled("emb", "embb", 10, 8)), "emb: the source has no tensor embb; did you mean emb"),
        (
            with_row("out", Row("out", Status.TIED, None, (10, 8), "F32", tied_to="embd")),
            "out is tied to embd, which has no row",
        ),
        (with_row("out", Row("out", Status.TIED, None, (10, 8), "F32", tied_to="out")), "which is tied itself"),
        (with_row("out", Row("out", Status.TIED, None, (10, 8), "F32", tied_to="head")), "is tied to head, shape 3x8"),
        (replace(PLAN, dropped=()), "source tensor mask, shape 1x1, is neither used nor dropped"),
        (replace(PLAN, dropped=(Dropped("mask", " "),)), "source tensor mask is dropped without a reason"),
        (replace(PLAN, dropped=(*PLAN.dropped, Dropped("q", "x"))), "source tensor q is both used and dropped"),
        (replace(PLAN, dropped=PLAN.dropped * 2), "source tensor mask is dropped 2 times"),
        (
            replace(PLAN, dropped=(*PLAN.dropped, Dropped("msk", "x"))),
            "the source has no tensor msk, .*; did you mean mask",
        ),
    ],
)
def test_the_law_of_accounting(plan: Plan, says: str) -> None:
    with pytest.raises(PlanError, match=says) as error:
        plan.check(SOURCE, TARGET)
    assert error.value.hint


def test_everything_wrong_is_said_at_once_and_a_long_list_is_cut() -> None:
    with pytest.raises(PlanError, match="9 problems") as error:
        Plan(()).check(SOURCE, TARGET)
    assert "and 1 more" in str(error.value)


def test_a_checkpoint_serves_as_source() -> None:
    tensors = {name: torch.zeros(i.shape) for name, i in SOURCE.items()}
    checkpoint = open_checkpoint(tensors)
    PLAN.check(checkpoint, TARGET)
    assert structure_hash(checkpoint) == checkpoint.structure_hash()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Row("a", Status.FILLED, None, (), "F32"), "a filled tensor needs an expression"),
        (lambda: Row("a", Status.NEW, parse("b"), (), "F32"), "a new tensor has no expression"),
        (lambda: Row("a", Status.TIED, None, (), "F32"), "a tied tensor names the tensor it is tied to"),
        (lambda: Row("a", Status.KEPT, None, (), "F32", tied_to="b"), "a kept tensor is tied to none"),
    ],
)
def test_a_row_that_contradicts_itself_cannot_be_built(build: object, says: str) -> None:
    assert callable(build)
    with pytest.raises(PlanError, match=says):
        build()


def test_a_verdict_holds_for_the_rows_it_was_given_for() -> None:
    proven = PLAN.with_verdict("proven", proven=["cpu/float64: hidden 1e-15"])
    assert (proven.verdict, proven.proven) == ("proven", ("cpu/float64: hidden 1e-15",))
    other = replace(proven, rows=(filled("qkv", "cat(k, q, v, axis=0)", 12, 8), *PLAN.rows[1:]))
    assert (other.verdict, other.proven) == ("stale", ())
    assert replace(other, rows=proven.rows).verdict == "stale"  # what became stale stays so until it is said anew
    assert other.with_verdict("consistent").verdict == "consistent"
    assert replace(proven, target=Stamp()).verdict == "stale"
    assert replace(proven, verdict="adapted").verdict == "stale"  # nobody promotes a verdict by hand


def test_evidence_order_and_description_do_not_touch_the_verdict() -> None:
    proven = PLAN.with_verdict("proven")
    assert replace(proven, rows=tuple(reversed(proven.rows))).verdict == "proven"
    assert replace(proven, rows=tuple(replace(row, evidence="x") for row in proven.rows)).verdict == "proven"
    assert replace(proven, source=replace(proven.source, description="another copy")).verdict == "proven"


def test_a_verdict_is_read_for_a_source_and_target() -> None:
    proven = PLAN.with_verdict("proven")
    assert proven.verdict_on(SOURCE, TARGET) == "proven"
    assert proven.verdict_on(SOURCE, {**TARGET, "head": info(5, 8)}) == "stale"
    assert PLAN.verdict_on(SOURCE, {}) is None


def test_asking_for_a_row_that_is_not_there() -> None:
    with pytest.raises(PlanError, match="no row for heat; did you mean head"):
        PLAN["heat"]
