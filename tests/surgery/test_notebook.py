"""Report and Proof in a notebook: static, escaped, short."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import surgery
from surgery.expr import parse
from surgery.plan import Dropped, Plan, Row, Status
from surgery.proof import PassResult, Proof
from surgery.report import Report

ODD = "<script>alert('x')</script> & \"more\""


class Tags(HTMLParser):
    """Every element is closed by the element that opened it; which there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.met: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.met.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def read(html: str) -> Tags:
    found = Tags()
    found.feed(html)
    assert not found.open
    return found


def test_a_graft_and_its_proof() -> None:
    theirs, mine = nn.Linear(3, 2), nn.Linear(3, 2)
    probe = surgery.Probe(
        reference=theirs,
        run_reference=lambda module, x: module(x),
        run_target=lambda module, x: module(x),
        inputs=lambda seed: torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)),
    )
    report = surgery.graft(theirs.state_dict(), mine, probe=probe)
    shown = read(report._repr_html_())
    assert {"weight", "[2, 3]", "filled", "cpu/float64", "passed"} <= set(shown.text.splitlines())
    assert report.proof is not None
    assert "proven" in read(report.proof._repr_html_()).text


def test_names_are_text_and_blocks_are_folded() -> None:
    rows = [Row(f"b.{i}.w", Status.FILLED, parse(f"h.{i}.w"), (2,), "F32") for i in range(60)]
    rows += [Row(f"{'x' * i}{ODD}", Status.NEW, None, (2,), "F32", note=ODD) for i in range(40)]
    plan = Plan(tuple(rows), (Dropped(ODD, ODD),), symmetries=(ODD,))
    proof = Proof((PassResult("cpu/float64", "failed", ODD, {ODD: float("inf")}, differs=True),), notes=(ODD,))
    shown = read(Report.of(plan, "refuted", proof=proof, message=ODD)._repr_html_())
    assert "script" not in shown.met
    assert "b.{i}.w (i = 0..59)" in shown.text
    assert "... and 18 more rows" in shown.text
    assert "script" not in read(proof._repr_html_()).met


@pytest.mark.parametrize("verdict", ["ambiguous", "consistent"])
def test_without_a_proof(verdict: str) -> None:
    report = Report.of(Plan((Row("w", Status.NEW, None, (), "F32"),)), verdict)
    assert verdict in read(report._repr_html_()).text
