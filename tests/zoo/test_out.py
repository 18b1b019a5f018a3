"""The sink: what is said, where, in each mode; and the table from exceptions to exit statuses."""

from __future__ import annotations

import json

import pytest

import surgery
from zoo.errors import STATUS, ZooError
from zoo.out import Out, amount, explain, size, table

MODES = {"human": Out(), "json": Out(as_json=True), "quiet": Out(quiet=True)}


@pytest.mark.parametrize("mode", MODES)
def test_data_and_what_is_beside_it(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = MODES[mode]
    out.data({"answer": 42}, lambda: "the answer is 42", lambda: "42")
    out.note("by the way")
    out.hint("try this")
    out.warn("careful")
    said = capsys.readouterr()
    if mode == "human":
        assert said.out == "the answer is 42\n"
        assert said.err == "by the way\nhint: try this\nwarning: careful\n"
    elif mode == "json":
        assert json.loads(said.out) == {"answer": 42}
        assert said.err == "warning: careful\n"
    else:
        assert said.out == "42\n"
        assert said.err == "warning: careful\n"


@pytest.mark.parametrize("mode", MODES)
def test_failure(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = MODES[mode].fail(ZooError("it is gated", kind="gated", hint="accept the terms"))
    said = capsys.readouterr()
    assert status == 3
    if mode == "json":
        expected = {"error": "gated", "message": "it is gated", "hint": "accept the terms", "exit": 3}
        assert (json.loads(said.out), said.err) == (expected, "")
    else:
        assert (said.out, said.err) == ("", "error: it is gated\nhint: accept the terms\n")


TABLE = [
    (ZooError("x", kind="closed"), "closed", 1),
    (ZooError("x", kind="unknown"), "unknown", 2),
    (ZooError("x", kind="network"), "network", 3),
    (surgery.CheckpointError("x"), "checkpoint", 2),
    (surgery.PlanError("x"), "plan", 2),
    (surgery.GraftError("x"), "refused", 1),
    (FileNotFoundError(2, "No such file", "a.pt"), "file", 2),
    (KeyboardInterrupt(), "interrupted", 130),
    (ZeroDivisionError("x"), "bug", 70),
]


@pytest.mark.parametrize(("error", "kind", "status"), TABLE)
def test_the_table(error: BaseException, kind: str, status: int) -> None:
    assert explain(error)[:2] == (kind, status)


def test_every_kind_has_a_status() -> None:
    assert set(STATUS.values()) == {1, 2, 3}
    for kind, status in STATUS.items():
        assert ZooError("x", kind=kind).status == status


def test_a_defect_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError("oh")
    except ZeroDivisionError as error:
        assert Out().fail(error) == 70
    said = capsys.readouterr().err
    assert "defect of weightzoo: ZeroDivisionError: oh" in said
    assert "Traceback" in said


def test_no_colour_into_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    Out().warn("careful")
    assert "\x1b" not in capsys.readouterr().err


def test_colour_on_a_terminal_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Out().style("x", "bold", Terminal()) == "\x1b[1mx\x1b[0m"  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert Out().style("x", "bold", Terminal()) == "x"  # type: ignore[arg-type]


def test_words_for_numbers() -> None:
    assert [amount(n) for n in (7, 1540, 22713216, 7_000_000_000)] == ["7", "1.54K", "22.7M", "7B"]
    assert [size(n) for n in (7, 1540, 90868376)] == ["7 B", "1.54 kB", "90.9 MB"]
    assert table([("a", "bb"), ("ccc", "")], header=("X", "Y")) == "X    Y\na    bb\nccc"
