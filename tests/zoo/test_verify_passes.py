"""zoo verify: on which devices and in which types, what is required, and what is said of each pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_bert
from tests.zoo.conftest import Done, calling
from zoo import cli

pytest.importorskip("transformers")

REF = "file:tiny#encoder"
Run = Callable[..., Done]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("verified")
    tiny_bert.save(made / "tiny")
    (made / "mine.py").write_text(tiny_bert.MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        assert cli.main(["graft", REF, "mine.py", "-q"]) == 0
    return made


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(folder)

    return calling(capsys, "verify", REF, "mine.py")


def passes(done: Done) -> dict[str, Any]:
    return {each["name"]: each for each in done.json["proof"]["passes"]}


def test_what_the_machine_has(run: Run) -> None:
    """Without --on: the CPU in three types, and each accelerator that is there."""
    done = run("--json")
    found = passes(done)
    assert done.status == 0
    assert list(found)[:3] == ["cpu/float64", "cpu/float32", "cpu/bfloat16"]
    assert {each["status"] for each in found.values()} == {"passed"}
    assert any(name.startswith("cuda") for name in found) == torch.cuda.is_available()
    ran = found["cpu/bfloat16"]["details"]
    assert {"seconds", "peak_bytes", "tf32", "deterministic", "sdpa", "compile", "gates", "norm"} <= set(ran)
    assert (done.json["required"], done.json["unmet"]) == ([], [])


def test_each_pass_has_a_line(run: Run) -> None:
    done = run("--on", "cpu/float32")
    lines = done.out.splitlines()
    assert (done.status, lines[-1]) == (0, "proven")
    at = next(i for i, line in enumerate(lines) if line.startswith("pass "))
    assert lines[at].split() == ["pass", "time", "peak", "memory", "ran", "with"]
    assert lines[at + 1].startswith("cpu/float64  passed")
    assert lines[at + 2].startswith("cpu/float32  passed")
    assert lines[at + 2].endswith("TF32 off; deterministic algorithms off")


@NO_GPU
@pytest.mark.parametrize("required", ["cuda", "cuda/bfloat16"])
def test_what_is_required_and_not_there(run: Run, required: str) -> None:
    done = run("--on", "cpu/float32", "--require", required, "--json")
    assert done.status == 1
    assert done.json["proof"]["verdict"] == "proven"
    assert passes(done)["cuda/bfloat16"]["status"] == "not run"
    assert f"{required} is required, and cuda/bfloat16 was not run: no CUDA device" in done.json["unmet"]
    assert "no CUDA device" in done.json["message"]
    told = run("--on", "cpu/float32", "--require", required)
    assert told.status == 1
    assert told.out.splitlines()[-1].startswith(f"unmet: {required} is required, and cuda/")


@GPU
def test_what_is_required_and_there(run: Run) -> None:
    done = run("--require", "cuda", "--json")
    assert (done.status, done.json["unmet"]) == (0, [])


def test_what_is_required_and_passes(run: Run) -> None:
    done = run("--on", "cpu/float32", "--require", "cpu", "--require", "cpu/bfloat16", "--json")
    assert (done.status, done.json["unmet"]) == (0, [])
    assert list(passes(done)) == ["cpu/float64", "cpu/float32", "cpu/bfloat16"]


@pytest.mark.parametrize("wrong", [("--on", "cpu/float31"), ("--require", "quantum"), ("--require", "cpu/float31")])
def test_what_is_no_pass(run: Run, wrong: tuple[str, str]) -> None:
    done = run(*wrong)
    assert (done.status, done.out) == (2, "")
    assert wrong[1] in done.err


def test_compile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the pass that is not compiled; by a backend that makes no code, as a compiler takes its time."""
    from surgery import passes as engine

    monkeypatch.setattr(engine, "INDUCTOR", "aot_eager")
    done = run("--on", "cpu/float32", "--compile", "--json")
    found = passes(done)
    assert (done.status, list(found)) == (0, ["cpu/float64", "cpu/float32", "cpu/float32+compile"])
    made = found["cpu/float32+compile"]
    assert made["status"] == "passed", made["why"]
    assert made["details"]["compile"]["backend"] == "aot_eager"
    refused = run("--on", "cpu/float64", "--compile")
    assert (refused.status, "--on cpu/float32" in refused.err) == (2, True)


def test_a_compile_that_is_not_possible_is_not_run(run: Run) -> None:
    name = "cpu/float32+compile:nobodys"
    done = run("--on", name, "--require", name, "--json")
    assert done.status == 1
    assert passes(done)[name]["status"] == "not run"
    assert "torch.compile has no backend nobodys" in done.json["unmet"][0]


def test_blockwise(run: Run) -> None:
    done = run("--on", "cpu/float64", "--blockwise")
    assert (done.status, done.out.splitlines()[-1]) == (0, "proven")
    assert "block by block" in done.out
    assert "block by block" not in run("--on", "cpu/float64", "--no-blockwise").out
