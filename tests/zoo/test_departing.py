"""zoo graft and zoo verify around a departure that is meant, and with further passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zoo as package
from tests import tiny_bert
from tests.zoo.conftest import Done
from zoo import cli, target

pytest.importorskip("transformers")

REF = "file:tiny#encoder"
Run = Callable[..., Done]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")

# The same, with an activation of the person's own in a module of its own.
_OWN = 'self.act = nn.GELU("tanh")\n        self.ln2 ='
DEPARTS = tiny_bert.MINE.replace("self.ln2 =", _OWN, 1).replace("F.gelu(self.up(x))", "self.act(self.up(x))")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("departs")
    tiny_bert.save(made / "tiny")
    (made / "mine.py").write_text(DEPARTS)
    (made / "same.py").write_text(tiny_bert.MINE)
    (made / "spoiled.py").write_text(
        DEPARTS.replace("self.ln = nn.LayerNorm(dim, eps=1e-12)", "self.ln = nn.LayerNorm(dim)")
    )
    return made


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(folder)

    def call(command: str, *arguments: str) -> Done:
        capsys.readouterr()
        status = cli.main([command, REF, *arguments])
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return call


def passes(done: Done) -> dict[str, Any]:
    return {each["name"]: each["status"] for each in done.json["proof"]["passes"]}


# -- departures -------------------------------------------------------------------------------------------------------
def test_graft_and_verify(run: Run, folder: Path) -> None:
    assert run("graft", "mine.py", "-o", "no.safetensors").status == 1
    done = run(
        "graft", "mine.py", "--allow-different", "layers.*.act", "-o", "a.safetensors", "--html", "a.html", "--json"
    )
    assert (done.status, done.json["verdict"]) == (0, "adapted")
    departures = done.json["proof"]["departures"]
    assert [d["module"] for d in departures] == ["layers.0.act", "layers.1.act"]
    assert all(d["allowed"] == "layers.*.act" and 0 < d["drift"] < 1e-3 for d in departures)
    assert done.json["proof"]["departed"].keys() == {"last_hidden_state"}
    model = target.load("mine.py").model
    model.load_state_dict(load_file("a.safetensors"))
    assert 'allow_different = [\n    "layers.*.act",\n]' in Path("a.graft.toml").read_text()
    page = Path("a.html").read_text()
    assert "departs as allowed: layers.*.act (2 modules)" in page
    assert "what is allowed to depart" in page
    told = run("verify", "mine.py", "--weights", "a.safetensors", "--on", "cpu/float32", "--compile")
    assert told.status == 0
    assert "departs as allowed: layers.*.act (2 modules)" in told.out
    assert "by all departures together the outputs differ: last_hidden_state" in told.out
    assert "around a departure nothing goes through torch.compile" in told.out
    assert told.out.splitlines()[-1] == "adapted"


def test_the_account_of_a_departure(run: Run) -> None:
    done = run("plan", "mine.py", "--allow-different", "layers.*.act")
    assert done.status == 0
    assert "adapted: the same function, but for what is allowed to depart" in done.out


def test_what_departs_beside_it_is_refused(run: Run, folder: Path) -> None:
    done = run("graft", "spoiled.py", "--allow-different", "layers.*.act", "-o", "s.safetensors", "--json")
    assert (done.status, done.json["verdict"], done.json["wrote"]) == (1, "refuted", [])
    assert done.json["proof"]["divergence"]["target_module"] == "ln"
    assert not (folder / "s.safetensors").exists()


def test_nothing_departs(run: Run) -> None:
    done = run("graft", "same.py", "--allow-different", "layers.*.ln?", "-o", "p.safetensors", "--json")
    assert (done.status, done.json["verdict"]) == (0, "proven")
    assert "layers.*.ln? is allowed to depart, and does not" in done.json["proof"]["notes"]


def test_verify_may_be_told(run: Run) -> None:
    assert run("graft", "same.py", "-o", "v.safetensors", "-q").status == 0
    refuted = run("verify", "mine.py", "--weights", "v.safetensors", "--on", "cpu/float64", "--json")
    assert (refuted.status, refuted.json["proof"]["verdict"]) == (1, "refuted")
    told = run(
        "verify", "mine.py", "--weights", "v.safetensors", "--on", "cpu/float64", "--allow-different", "*.act", "--json"
    )
    assert told.json["proof"]["verdict"] == "adapted"


def test_a_module_that_is_not_there(run: Run) -> None:
    done = run("graft", "mine.py", "--allow-different", "layers.*.acts", "-o", "x.safetensors")
    assert (done.status, done.out) == (2, "")
    assert "allow_different names layers.*.acts, which the target does not have; did you mean layers" in done.err


def test_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = target.load("mine.py").model
    example = (torch.arange(6).view(1, 6), torch.ones(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long))
    report = package.graft(
        REF, model, example=example, allow_different=["layers.*.act"], passes=["cpu/float32", "cuda/float32"]
    )
    assert report.verdict == "adapted"
    assert report.plan.allow_different == ("layers.*.act",)
    assert [p.name for p in report.proof.passes] == ["cpu/float64", "cpu/float32", "cuda/float32"]


# -- passes -----------------------------------------------------------------------------------------------------------
def test_passes_of_a_graft(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery import passes as engine

    assert list(passes(run("graft", "same.py", "-o", "b.safetensors", "--json"))) == ["cpu/float64"]
    monkeypatch.setattr(engine, "INDUCTOR", "aot_eager")
    wanted = ("--on", "cpu/float32", "--require", "cpu/bfloat16", "--require", "proven", "--compile")
    done = run("graft", "same.py", "-o", "c.safetensors", *wanted, "--json")
    assert done.status == 0
    names = ["cpu/float64", "cpu/float32", "cpu/bfloat16", "cpu/float32+compile", "cpu/bfloat16+compile"]
    assert passes(done) == dict.fromkeys(names, "passed")
    assert (done.json["required"], done.json["unmet"]) == (["cpu/bfloat16"], [])


@NO_GPU
def test_a_device_that_is_required_and_not_there(run: Run, folder: Path) -> None:
    done = run("graft", "same.py", "-o", "d.safetensors", "--require", "cuda", "--json")
    assert (done.status, done.json["verdict"], done.json["wrote"]) == (1, "proven", [])
    assert "cuda is required, and cuda/bfloat16 was not run: no CUDA device" in done.json["unmet"]
    assert not (folder / "d.safetensors").exists()
    told = run("graft", "same.py", "-o", "d.safetensors", "--require", "cuda")
    assert "cuda is required, and cuda/float32 was not run: no CUDA device" in told.out
    assert "nothing was written" in told.err
    forced = run("graft", "same.py", "-o", "d.safetensors", "--require", "cuda", "--force", "-q")
    assert (forced.status, (folder / "d.safetensors").exists()) == (0, True)


def test_a_pass_that_fails_refuses_the_graft(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery import passes as engine

    monkeypatch.setattr(engine, "FACTOR", 1e-9)
    monkeypatch.setattr(engine, "FLOOR", 1e-9)
    done = run("graft", "same.py", "-o", "e.safetensors", "--on", "cpu/bfloat16", "--json")
    assert (done.status, done.json["verdict"]) == (1, "refuted")
    assert done.json["message"].startswith("cpu/bfloat16: last_hidden_state differs by ")
    assert not (folder / "e.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--on", "cpu/float31"), "cpu/float31"),
        (("--require", "quantum"), "quantum"),
        (("--require", "proven", "--require", "adapted"), "proven and adapted"),
        (("--compile",), "--on cpu/float32"),
        (("--on", "cpu/float32", "--static"), "--static runs nothing"),
    ],
)
def test_what_cannot_be_asked(run: Run, options: tuple[str, ...], said: str) -> None:
    done = run("graft", "same.py", "-o", "f.safetensors", *options)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
