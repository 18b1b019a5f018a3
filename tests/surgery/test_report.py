"""The report: accounting, JSON, and groups for an optimizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import SurgeryError
from surgery.expr import parse
from surgery.plan import Dropped, Plan, Row, Status
from surgery.report import Report, Verdict


class Model(nn.Module):
    """An encoder whose embedding is tied to its output, a head of its own, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(2, 2))


def plan(model: nn.Module, **status: Status) -> Plan:
    """Filled but for the head; other ends by name, dots as underscores."""
    rows = []
    for name, tensor in model.state_dict().items():
        end = status.get(name.replace(".", "_"), Status.NEW if name.startswith("head") else Status.FILLED)
        expr = parse(f"transpose(s.{name})") if end in (Status.FILLED, Status.SYNTHESISED) else None
        tied = "embed.weight" if end is Status.TIED else None
        rows.append(Row(name, end, expr, tuple(tensor.shape), "F32", tied_to=tied))
    return Plan(tuple(rows), (Dropped("s.pooler", "the target has none"),), symmetries=("key bias",))


def grouped(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


PARTED = {"pretrained": {"embed.weight", "norm.weight", "norm.bias"}, "new": {"head.weight", "head.bias"}}


def report(model: nn.Module, **status: Status) -> Report:
    return Report.of(
        plan(model, out_weight=Status.TIED, mask=Status.CONSTANT) if not status else plan(model, **status), "proven"
    )


def test_pretrained_and_new_parameters_are_apart_each_once() -> None:
    model = Model()
    groups = report(model).param_groups(model, lr=1e-5, new_lr=1e-3)
    assert grouped(model, groups) == PARTED
    assert [group["lr"] for group in groups] == [1e-5, 1e-3]
    assert all("weight_decay" not in group for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    torch.optim.AdamW(groups)
    assert [group["lr"] for group in report(model).param_groups(model, lr=1e-5)] == [1e-5, 1e-5]


def test_decay_is_for_matrices() -> None:
    model = Model()
    groups = report(model).param_groups(model, lr=1e-5, decay=0.1)
    assert grouped(model, groups) == {
        "pretrained": {"embed.weight"},
        "pretrained, no decay": {"norm.weight", "norm.bias"},
        "new": {"head.weight"},
        "new, no decay": {"head.bias"},
    }
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    torch.optim.AdamW(groups)


def test_freeze_leaves_the_new_ones_and_turns_gradients_off() -> None:
    model = Model()
    groups = report(model).param_groups(model, lr=1e-5, new_lr=1e-3, freeze=True)
    assert grouped(model, groups) == {"new": PARTED["new"]}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == PARTED["new"]
    # thawing: the groups are whole again
    model.requires_grad_(True)
    assert grouped(model, report(model).param_groups(model, lr=1e-5)) == PARTED


@pytest.mark.parametrize("end", [Status.KEPT, Status.CONSTANT, Status.SYNTHESISED])
def test_what_is_not_new_is_pretrained(end: Status) -> None:
    model = Model()
    groups = report(model, norm_weight=end).param_groups(model, lr=1.0)
    assert grouped(model, groups) == PARTED


def test_a_tied_parameter_is_pretrained_where_any_of_its_names_is() -> None:
    model = Model()
    for status in ({"out_weight": Status.NEW}, {"embed_weight": Status.NEW, "out_weight": Status.FILLED}):
        assert grouped(model, report(model, **status).param_groups(model, lr=1.0)) == PARTED
    new = report(model, embed_weight=Status.NEW, out_weight=Status.TIED)
    assert "embed.weight" in grouped(model, new.param_groups(model, lr=1.0))["new"]


def test_another_model_is_refused_and_left_alone() -> None:
    model, other = Model(), Model()
    made = report(model)
    other.heda = nn.Linear(2, 2)
    with pytest.raises(
        SurgeryError, match=r"a parameter heda.weight, which the report does not know; did you mean head"
    ):
        made.param_groups(other, lr=1.0, freeze=True)
    assert all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(SurgeryError, match=r"the report speaks of mask, which the model does not have"):
        made.param_groups(model.head, lr=1.0)


def test_freezing_everything_is_refused() -> None:
    model = nn.Linear(2, 2)
    made = Report.of(plan(model), "proven")
    with pytest.raises(SurgeryError, match="nothing is left to train"):
        made.param_groups(model, lr=1.0, freeze=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_verdicts_are_texts_with_a_rank() -> None:
    assert str(Verdict.PROVEN) == "proven" == Verdict.PROVEN
    assert [verdict.value for verdict in sorted(Verdict, key=lambda v: -v.rank)] == [
        "proven",
        "adapted",
        "consistent",
        "ambiguous",
        "refuted",
    ]
    assert Verdict.REFUTED.rank == 0


def test_rows_say_where_each_tensor_comes_from() -> None:
    made = Report.of(
        Plan(
            (
                Row("a", Status.FILLED, parse('cast(s, dtype="F32")'), (2,), "F32"),
                Row("b", Status.TIED, None, (2,), "F32", tied_to="a"),
                Row("c", Status.FILLED, parse("t"), (2,), "F32"),
                Row("d", Status.NEW, None, (2,), "F32", note="a head"),
            ),
            (Dropped("u", "unused"),),
            diagnosis="look here",
        ),
        "consistent",
        dtype_of=lambda _: "BF16",
    )
    assert [(row.name, row.sources, row.op, row.kind, row.status, row.note) for row in made.rows] == [
        ("a", ("s",), "cast", "exact", "filled", ""),
        ("b", ("s",), "cast", "exact", "tied", "tied to a"),
        ("c", ("t",), "copy", "exact", "filled", ""),
        ("d", (), "", "", "new", "a head"),
        ("u", (), "", "", "dropped", "unused"),
    ]
    assert made.counts == {"filled": 2, "tied": 1, "new": 1, "dropped": 1}
    assert made.message == "look here"


def test_it_prints_short_and_dumps_whole() -> None:
    made = report(Model())
    assert str(made).splitlines() == [
        "proven: 3 filled, 1 tied, 1 constant, 2 new, 1 dropped",
        "new: head.weight, head.bias",
        "dropped: s.pooler",
        "any choice is right: key bias",
    ]
    whole = json.loads(json.dumps(made.as_dict()))
    assert whole["verdict"] == "proven"
    assert len(whole["rows"]) == 8
    assert whole["proof"] is None


class Deep(nn.Module):
    """A table, three blocks of two layers each, a norm, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 1)


def of(model: nn.Module, new: str) -> Report:
    return Report.of(plan(model, **{f"{new}_{end}": Status.NEW for end in ("weight", "bias")}), "proven")


def test_learning_rates_by_depth() -> None:
    model = Deep()
    groups = of(model, "head").param_groups(model, lr=1.0, new_lr=5.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.table.weight)] == 0.125
    assert [rates[id(b[1].weight)] for b in model.blocks] == [0.25, 0.5, 1.0]
    assert rates[id(model.norm.weight)] == 1.0
    assert rates[id(model.head.weight)] == 5.0
    assert len(rates) == len(list(model.parameters()))
    decayed = of(model, "head").param_groups(model, lr=1.0, layer_decay=0.5, decay=0.1)
    assert sum(len(group["params"]) for group in decayed) == len(rates)
    assert {group["weight_decay"] for group in decayed} == {0.0, 0.1}


def test_depth_needs_blocks() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(SurgeryError, match="repeated blocks"):
        of(model, "head").param_groups(model, lr=1.0, layer_decay=0.5)
    with pytest.raises(SurgeryError, match="above 0"):
        of(Deep(), "head").param_groups(Deep(), lr=1.0, layer_decay=1.5)


def test_a_symmetry_of_each_block_is_one_line() -> None:
    several = tuple(f"blocks.{i}.k.bias: the softmax cancels it" for i in range(3))
    report = Report.of(Plan((Row("a", Status.NEW, None, (1,), "F32"),), (), symmetries=several), "proven")
    said = "any choice is right: blocks.{i}.k.bias: the softmax cancels it (i = 0..2)"
    assert [line for line in str(report).splitlines() if "softmax" in line] == [said]
    assert said in report._repr_html_()


def test_a_class_is_no_module() -> None:
    class Own(nn.Module):
        pass

    for call in (surgery.plan, surgery.graft):
        with pytest.raises(surgery.GraftError, match="the target is the class Own") as caught:
            call({"a": torch.zeros(1)}, Own)  # type: ignore[operator]
        assert caught.value.hint == "Pass an instance, as in Own()."
