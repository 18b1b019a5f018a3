"""plan, graft and verify on a tiny BERT: what they write, what they say, and when they say no."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
import zoo as package
from tests import tiny_bert
from tests.zoo.conftest import Done, Zoo, calling
from zoo import account, cli, target

pytest.importorskip("transformers")

REF = "file:tiny#encoder"
Run = Callable[..., Done]


@dataclass(frozen=True)
class Grafted:
    """A folder in which a graft was run, what it printed, and the model that the weights are from."""

    folder: Path
    done: dict[str, Any]
    reference: Any


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> Grafted:
    folder = tmp_path_factory.mktemp("grafted")
    reference = tiny_bert.save(folder / "tiny")
    (folder / "mine.py").write_text(tiny_bert.MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        import contextlib
        import io

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert cli.main(["graft", REF, "mine.py", "--json"]) == 0
    return Grafted(folder, json.loads(out.getvalue()), reference)


@pytest.fixture
def folder(grafted: Grafted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    work = tmp_path / "work"
    shutil.copytree(grafted.folder, work)
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process and that folder."""

    return calling(capsys)


# ---------------------------------------------------------------------------------------------------- yes


def test_json(grafted: Grafted) -> None:
    done = grafted.done
    assert {"verdict", "rows", "proof", "wrote", "message"} <= set(done)
    assert (done["verdict"], done["wrote"]) == ("proven", ["mine.safetensors", "mine.graft.toml"])
    rows = {row["name"]: row for row in done["rows"]}
    assert rows["layers.1.wkv.weight"]["op"] == "cat"
    assert rows["tag.weight"]["status"] == "new"
    assert done["proof"]["passes"][0]["inputs"] == ["plain", "padded", "shortest", "longest"]
    assert done["proof"]["passes"][0]["residuals"]["last_hidden_state"] < 1e-12


def test_the_weights_load_strictly_and_compute_the_same(grafted: Grafted) -> None:
    model = target.load(str(grafted.folder / "mine.py")).model
    model.load_state_dict(load_file(grafted.folder / "mine.safetensors"))
    found: list[torch.Tensor] = []
    model.layers[-1].register_forward_hook(lambda *got: found.append(got[-1]))
    ids = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(5))
    mask, kinds = torch.ones_like(ids), ids % 2
    mask[1, 7:] = 0
    with torch.no_grad():
        model(ids, mask, kinds)
        expected = grafted.reference(input_ids=ids, attention_mask=mask, token_type_ids=kinds).last_hidden_state
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_the_plan_says_where_it_is_from(grafted: Grafted) -> None:
    plan = surgery.Plan.load(grafted.folder / "mine.graft.toml")
    assert plan.verdict == "proven"
    assert plan.source.description == "file:tiny#encoder from file:tiny"
    assert list(plan.source.files) == ["model.safetensors"]
    with safe_open(grafted.folder / "mine.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "weightzoo": "grafted; proven"}


def test_a_saved_plan_is_applied_without_searching(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bytes; and the account of it reads well."""
    from surgery import mapper

    monkeypatch.setattr(mapper, "find", None)
    done = run("graft", REF, "mine.py", "--plan", "mine.graft.toml", "-o", "again.safetensors")
    assert done.status == 0, done.err
    assert done.err == (
        "Tagger of mine.py: the only one that no other module there uses (1)\n"
        'hint: model.load_state_dict(safetensors.torch.load_file("again.safetensors"))\n'
    )
    lines = done.out.splitlines()
    assert lines[0] == "file:tiny#encoder -> Tagger in mine.py"
    assert any(
        "layers.{i}.wkv.weight" in line and "cat(encoder.layer.{i}.attention.self.{key, value}.weight, axis=0)" in line
        for line in lines
    )
    assert "  with i = 0..1" in lines
    assert any(line.startswith("new: 2 tensors") for line in lines)
    assert lines[-4:] == [
        "proven: the same function, by running both in float64",
        "33 grafted, 2 new",
        "wrote again.safetensors",
        "      again.graft.toml",
    ]
    assert max(map(len, lines)) < 160
    assert (folder / "again.safetensors").read_bytes() == (folder / "mine.safetensors").read_bytes()


def test_plan_writes_nothing(run: Run, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = run("plan", REF, "mine.py", "--plan", "mine.graft.toml", "-q")
    assert (done.status, done.out, done.err) == (0, "proven\n", "")
    assert sorted(folder.rglob("*")) == before


def test_a_whole_model_is_proven_on_what_the_target_has(run: Run, folder: Path) -> None:
    tiny_bert.save(folder / "whole", "BertForPreTraining")
    done = run("graft", "file:whole", "mine.py", "-o", "whole.safetensors", "--json")
    assert (done.status, done.json["verdict"]) == (0, "proven")
    assert list(done.json["proof"]["passes"][0]["residuals"]) == ["last_hidden_state"]
    assert any("pooler_output, prediction_logits" in note for note in done.json["notes"])
    assert run("verify", "file:whole", "mine.py", "--weights", "whole.safetensors", "-q").out == "proven\n"


def test_two_towers(run: Run, folder: Path) -> None:
    """One after the other into one file; what the first filled is kept, and does not lower the verdict."""
    tiny_bert.save(folder / "other", seed=1)
    (folder / "pair.py").write_text(tiny_bert.PAIR)
    first = run("graft", REF, "pair.py", "--into", "left", "--json")
    assert (first.status, first.json["counts"]) == (0, {"filled": 33, "new": 39})
    second = run("graft", "file:other#encoder", "pair.py", "--into", "right", "--init", "pair.safetensors", "--json")
    assert (second.status, second.json["counts"]) == (0, {"filled": 33, "kept": 33, "new": 6})
    tensors = load_file("pair.safetensors")
    for side, name in (("left", "tiny"), ("right", "other")):
        source = load_file(folder / name / "model.safetensors")
        assert torch.equal(tensors[f"{side}.word.weight"], source["embeddings.word_embeddings.weight"])
    done = run("verify", "file:other#encoder", "pair.py", "--into", "right", "-q")
    assert (done.status, done.out) == (0, "proven\n")
    done = run("verify", REF, "pair.py", "--into", "left")
    assert (done.status, done.out) == (2, "")
    assert "pair.graft.toml fills nothing in left" in done.err
    assert "an -o of its own" in done.err


def test_init_keeps_a_trained_head(run: Run, folder: Path) -> None:
    own = {name: tensor + 1 for name, tensor in load_file("mine.safetensors").items()}
    save_file(own, "own.safetensors")
    done = run(
        "graft",
        REF,
        "mine.py",
        "--init",
        "own.safetensors",
        "--plan",
        "mine.graft.toml",
        "-o",
        "out.safetensors",
        "--json",
    )
    assert (done.status, done.json["counts"]) == (0, {"filled": 33, "kept": 2})
    assert torch.equal(load_file("out.safetensors")["tag.weight"], own["tag.weight"])


def test_the_library(grafted: Grafted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grafted.folder)
    model = target.load("mine.py").model
    plan = surgery.Plan.load("mine.graft.toml")
    report = package.graft("file:tiny", model, part="encoder", plan=plan)
    assert (report.verdict, report.plan.source.revision) == ("proven", None)
    groups = report.param_groups(model, lr=1e-4, new_lr=1e-3)
    assert [group["name"] for group in groups] == ["pretrained", "new"]
    with pytest.raises(package.ZooError, match="not inputs for forward"):
        package.graft(REF, model, example=3)


# ---------------------------------------------------------------------------------------------------- no


def test_another_function_is_refuted(run: Run, folder: Path) -> None:
    (folder / "wrong.py").write_text(tiny_bert.MINE.replace("F.gelu(", "F.gelu(approximate='tanh', input="))
    before = sorted(folder.rglob("*"))
    done = run("graft", REF, "wrong.py")
    assert done.status == 1
    assert "refuted: it ran, and computes something else" in done.out
    assert "first divergence: layers.0" in done.out
    assert "differs by" in done.out
    assert "nothing was written" in done.err
    assert len(done.out.splitlines()) < 10
    told = run("graft", REF, "wrong.py", "--json", "--plan", "mine.graft.toml")
    assert (told.status, told.json["verdict"], told.json["wrote"]) == (1, "refuted", [])
    assert "GELU" in told.json["proof"]["divergence"]["why"]
    assert sorted(folder.rglob("*")) == before
    forced = run("graft", REF, "wrong.py", "--plan", "mine.graft.toml", "--force", "-q")
    assert (forced.status, forced.out) == (0, "wrong.safetensors\n")
    assert surgery.Plan.load("wrong.graft.toml").verdict == "refuted"


def test_what_is_required(run: Run, folder: Path) -> None:
    """Without running, a given plan is at most consistent."""
    done = run(
        "graft", REF, "mine.py", "--static", "--plan", "mine.graft.toml", "--require", "proven", "-o", "x.safetensors"
    )
    said = "proven" if done.status == 0 else "less than proven, which is required"
    assert said in done.out + done.err
    assert (folder / "x.safetensors").exists() == (done.status == 0)


def test_verify(run: Run, folder: Path) -> None:
    done = run("verify", REF, "mine.py", "--on", "cpu/float32", "--on", "cuda/bfloat16")
    assert (done.status, done.out.splitlines()[-1]) == (0, "proven")
    assert "cpu/float32: passed" in done.out
    if not torch.cuda.is_available():
        assert "cuda/bfloat16: not run: no CUDA device" in done.out


def test_verify_finds_other_weights(run: Run, folder: Path) -> None:
    tensors = load_file("mine.safetensors")
    tensors["layers.0.wo.weight"][0, 0] += 1e-6
    save_file(tensors, "mine.safetensors")
    done = run("verify", REF, "mine.py")
    last = done.out.splitlines()[-1]
    assert done.status == 1
    assert last.startswith("differs: the weights are not what the plan gives: layers.0.wo.weight (relative ")
    assert last.endswith("; what passed are the values that the plan gives")
    # What is advised does not write over weights that may have been trained since.
    assert "-o mine-as-planned.safetensors" in done.err


def test_verify_says_how_other_weights_differ_the_most_first(run: Run, folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file("mine.safetensors").items()}
    tensors["layers.0.wo.weight"] *= -1
    tensors["layers.1.wo.weight"][0, 0] = float("nan")
    save_file(tensors, "mine.safetensors")
    last = run("verify", REF, "mine.py", "--on", "cpu/float32").out.splitlines()[-1]
    said = "layers.1.wo.weight (BF16, not F32; not finite on one side), "
    said += "layers.0.wo.weight (BF16, not F32; relative 2.0e+00), "
    assert last.startswith(f"differs: the weights are not what the plan gives: {said}")


def test_weights_of_another_module(run: Run, folder: Path) -> None:
    tensors = load_file("mine.safetensors")
    shape = list(tensors["layers.0.wo.weight"].shape)
    tensors["layers.0.wo.weight"] = torch.zeros(3, 2)
    save_file(tensors, "mine.safetensors")
    done = run("verify", REF, "mine.py")
    assert (done.status, done.out) == (2, "")
    said = f"layers.0.wo.weight is [3, 2] there, and {shape} in the module"
    assert f"error: mine.safetensors is not of this module: {said}\n" in done.err


SQUARE = """
import torch
from torch import nn


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x):
        return x @ self.w
"""


def test_a_candidate_that_a_person_chose_is_not_called_the_only_one(run: Run, folder: Path) -> None:
    (folder / "square.py").write_text(SQUARE)
    weight = torch.randn(4, 4)
    save_file({"w.weight": weight}, "square_source.safetensors")
    asked = ("graft", "file:square_source.safetensors", "square.py")
    refused = run(*asked)
    assert (refused.status, "candidate 2 (--accept 2)" in refused.out) == (1, True)
    assert "was not recognised, so there is no reference to run; nothing was run" in refused.out
    done = run(*asked, "--accept", "2")
    assert done.status == 0
    assert "as others do; --accept 2 chose among 2 mappings that fit; nothing was run" in done.out
    assert "one mapping fits" not in done.out
    assert "--accept 2 chose among 2 mappings" in (folder / "square.graft.toml").read_text()
    assert torch.equal(load_file("square.safetensors")["w"], weight.T)


def test_where_there_is_no_candidate_none_is_accepted(run: Run, folder: Path) -> None:
    """Nothing fits: that is not several mappings, and what is initialised at random is not written."""
    (folder / "square.py").write_text(SQUARE)
    save_file({"a": torch.randn(4, 4), "b": torch.randn(4, 4)}, "square_source.safetensors")
    done = run("graft", "file:square_source.safetensors", "square.py", "--accept", "1")
    assert (done.status, "ambiguous: it is not settled what becomes what" in done.out) == (1, True)
    assert "there is no candidate that --accept could take" in done.err
    assert not (folder / "square.safetensors").exists()


def test_verify_finds_an_edited_plan(run: Run, folder: Path) -> None:
    path = folder / "mine.graft.toml"
    key, value = (f"encoder.layer.{{i}}.attention.self.{name}.weight" for name in ("key", "value"))
    swapped = path.read_text().replace(f"{key}, {value}", f"{value}, {key}")
    assert swapped != path.read_text()
    path.write_text(swapped)
    done = run("verify", REF, "mine.py", "--json")
    assert (done.status, "changed after it was verified" in done.json["message"]) == (1, True)
    # Nor is it written over by a graft that was not asked to apply it.
    refused = run("graft", REF, "mine.py")
    assert (refused.status, "was edited by hand" in refused.err) == (2, True)
    assert path.read_text() == swapped


def test_verify_finds_another_source(run: Run, folder: Path) -> None:
    tiny_bert.save(folder / "tiny", seed=1)
    done = run("verify", REF, "mine.py")
    assert done.status == 1
    assert "model.safetensors of file:tiny#encoder is not the file that was grafted" in done.out


def test_verify_without_files(run: Run, folder: Path) -> None:
    (folder / "mine.graft.toml").unlink()
    done = run("verify", REF, "mine.py")
    assert (done.status, "there is no file mine.graft.toml" in done.err) == (2, True)


def test_a_missing_extra(zoo: Zoo, grafted: Grafted) -> None:
    """Exit 2 with the pip install; --static goes without."""
    shutil.copytree(grafted.folder, zoo.cwd, dirs_exist_ok=True)
    code = "import sys; sys.modules['transformers'] = None; from zoo.cli import main; sys.exit(main())"
    done = zoo.python(code, "graft", REF, "mine.py", "-o", "x.safetensors")
    assert (done.status, done.out) == (2, "")
    assert 'hint: pip install "weightzoo[text]"; or --static' in done.err
    static = zoo.python(code, "graft", REF, "mine.py", "-o", "x.safetensors", "--static", "--plan", "mine.graft.toml")
    assert static.status == 0, static.err
    assert "nothing was run, as --static asks" in static.out


def test_both_files_or_none(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rename fails: the plan that was there before is there again."""
    import os

    from zoo import written

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    real, calls = os.replace, []

    def fails(source: Any, destination: Any) -> None:
        if Path(destination).name == "mine.safetensors":
            calls.append(destination)
            raise PermissionError(13, "Permission denied", str(destination))
        real(source, destination)

    monkeypatch.setattr(written.os, "replace", fails)
    done = run("graft", REF, "mine.py", "--plan", "mine.graft.toml", "--seed", "1")
    assert (done.status, calls) == (2, [Path("mine.safetensors")])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------------------------------------- the account


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat(a.q.weight, a.k.weight, axis=0)", "cat(a.{q, k}.weight, axis=0)"),
        ("add(cat(a.q.w, a.k.w, axis=0), b.w)", "add(cat(a.{q, k}.w, axis=0), b.w)"),
        ("cat(a.q, b.k, axis=0)", "cat(a.q, b.k, axis=0)"),
        ("cat(h.{i}.q, h.{i}.k)", "cat(h.{i}.{q, k})"),
        ("transpose(a.w)", "transpose(a.w)"),
        ("reshape(a.w, shape=(1, 2))", "reshape(a.w, shape=(1, 2))"),
        ("cat(a.w, a.w, axis=0)", "cat(a.w, a.w, axis=0)"),
    ],
)
def test_names_that_share_most(text: str, shown: str) -> None:
    assert account.braced(text) == shown


# ---------------------------------------------------------------------------------------------------- at a terminal


@pytest.mark.parametrize("columns", [80, 60])
def test_the_account_fits_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Without colour, and names are broken before a dot."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    done = run("graft", REF, "mine.py", "--plan", "mine.graft.toml", "-o", "again.safetensors")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in done.out
    if columns == 80:  # where only the last column is broken, its lines follow each other
        joined = "".join(line.strip() for line in lines)
        assert "encoder.layer.{i}.attention.output.LayerNorm.weight" in joined
    assert any(line.startswith("new: 2 tensors") for line in lines)


def test_what_is_adapted_has_a_place_of_its_own() -> None:
    from tests.zoo import large_report

    report, _ = large_report.make(1)
    said = account.render(report, width=80).splitlines()
    assert "adapted: 1 tensor, 461K parameters (by an approximate or lossy op)" in said
    assert any("pos.weight" in line for line in said[said.index(next(s for s in said if s.startswith("adapted"))) :])
    assert account.counts(report) == "13 grafted, 1 adapted, 1 made, 1 tied, 1 constant, 1 kept, 2 new, 2 dropped"
    assert max(map(len, said)) <= 80


def test_a_class_is_no_module() -> None:
    with pytest.raises(package.ZooError, match="the target is the class Linear") as caught:
        package.graft("bert-encoder", torch.nn.Linear)  # type: ignore[arg-type]
    assert caught.value.hint == "pass an instance, as in Linear()"
