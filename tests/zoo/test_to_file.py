"""zoo graft --to-file: the same bytes as in memory; conversions without a Python file, and back; types, shards,
adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from tests import tiny_bert
from tests.zoo.conftest import Done, calling
from zoo import cli, target

transformers = pytest.importorskip("transformers")

REF = "file:tiny#encoder"
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a graft was run, in memory."""
    folder = tmp_path_factory.mktemp("grafted")
    tiny_bert.save(folder / "tiny")
    (folder / "mine.py").write_text(tiny_bert.MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["graft", REF, "mine.py", "-q"]) == 0
    return folder


@pytest.fixture
def folder(grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "work"
    shutil.copytree(grafted, work)
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return calling(capsys)


def bytes_of(*names: str) -> list[bytes]:
    return [Path(name).read_bytes() for name in names]


def test_the_same_bytes_as_in_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery import apply

    monkeypatch.setattr(apply, "write", None)  # no model is filled
    done = run("graft", REF, "mine.py", "--to-file", "-o", "files.safetensors", "--json")
    assert done.status == 0, done.err
    assert done.json["verdict"] == "proven"
    assert done.json["wrote"] == ["files.safetensors", "files.graft.toml"]
    weights, files = bytes_of("mine.safetensors", "files.safetensors")
    assert weights == files
    plan, same = bytes_of("mine.graft.toml", "files.graft.toml")
    assert plan == same
    done = run("verify", REF, "mine.py", "--weights", "files.safetensors")
    assert done.status == 0, done.err


def test_a_plan_that_is_given_runs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is built, for it has a head of its own; and nothing is searched or run."""
    monkeypatch.setattr(surgery, "graft", None)
    done = run("graft", REF, "mine.py", "--plan", "mine.graft.toml", "--to-file", "-o", "files.safetensors")
    assert done.status == 0, done.err
    assert "the plan was given: it was proven when it was made; nothing was run" in done.out
    weights, files = bytes_of("mine.safetensors", "files.safetensors")
    assert weights == files
    again = run("graft", REF, "mine.py", "--plan", "mine.graft.toml", "--to-file", "-o", "files.safetensors")
    assert again.status == 0, "what a graft wrote may be written over"


def test_what_the_plan_does_not_make_is_asked_for(run: Run) -> None:
    done = run("graft", REF, "--plan", "mine.graft.toml", "--to-file", "-o", "files.safetensors")
    assert done.status == 2
    assert "2 tensors do not come from file:tiny#encoder: tag.weight (new), tag.bias (new)" in done.err
    assert "--init" in done.err
    arguments = ("--plan", "mine.graft.toml", "--to-file", "-o", "files.safetensors", "--init", "mine.safetensors")
    done = run("graft", REF, *arguments)
    assert done.status == 0, done.err
    weights, files = bytes_of("mine.safetensors", "files.safetensors")
    assert weights == files


# -- from checkpoint to checkpoint ------------------------------------------------------------------------------------
@pytest.fixture
def layouts(folder: Path) -> Path:
    """A plan between two layouts of one model, and a file in the first."""
    from tests import pairs
    from tests.surgery.test_convert import bare_bert

    bert = bare_bert()
    save_file({k: t.clone() for k, t in bert.state_dict().items()}, "theirs.safetensors", metadata={"format": "pt"})

    class Whole(pairs.Encoder):
        """Without a head."""

        def __init__(self) -> None:
            super().__init__()
            del self.head

    report = surgery.graft("theirs.safetensors", Whole().eval(), probe=pairs.probe(bert), require="proven")
    report.plan.save("layout.graft.toml")
    return folder


def test_there_and_back_without_a_python_file(layouts: Path, run: Run) -> None:
    there = ("--plan", "layout.graft.toml", "--to-file")
    done = run("graft", "file:theirs.safetensors", *there, "-o", "ours.safetensors", "-q")
    assert (done.status, done.out) == (0, "ours.safetensors\n"), done.err
    assert "blocks.0.mix.qkv.weight" in surgery.open("ours.safetensors")
    back = ("--invert", "file:theirs.safetensors", "-o", "again.safetensors")
    done = run("graft", "file:ours.safetensors", *there, *back, "--json")
    assert done.status == 0, done.err
    assert done.json["verdict"] == "consistent"
    first, again = bytes_of("theirs.safetensors", "again.safetensors")
    assert first == again
    # the plan beside it is the inverse, and needs the first file no more
    plan = ("--plan", "again.graft.toml", "--to-file", "-o", "third.safetensors")
    done = run("graft", "file:ours.safetensors", *plan)
    assert done.status == 0, done.err
    third, theirs = load_file("third.safetensors"), load_file("theirs.safetensors")
    assert all(torch.equal(third[name], t) for name, t in theirs.items())


def test_what_cannot_be_inverted_is_named(run: Run, folder: Path) -> None:
    back = ("--plan", "mine.graft.toml", "--to-file", "--invert", "file:tiny", "-o", "back.safetensors")
    before = sorted(folder.iterdir())
    done = run("graft", "file:mine.safetensors", *back)
    assert done.status == 2
    assert "source tensors cannot be had back" in done.err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("dtype", ["BF16", "f16"])
def test_a_cast_is_said_in_the_rows(layouts: Path, run: Run, dtype: str) -> None:
    there = ("--plan", "layout.graft.toml", "--to-file", "--dtype", dtype, "-o", "half.safetensors")
    done = run("graft", "file:theirs.safetensors", *there, "--json")
    assert done.status == 0, done.err
    upper = dtype.upper()
    rows = {row["name"]: row for row in done.json["rows"]}
    assert rows["norm.weight"]["kind"] == "lossy"
    plan = surgery.Plan.load("half.graft.toml")
    assert str(plan["norm.weight"].expr) == f'cast(embeddings.LayerNorm.weight, dtype="{upper}")'
    assert any(f"cast to {upper}" in note for note in plan.notes)
    half, whole = load_file("half.safetensors"), load_file("theirs.safetensors")
    kind = {"BF16": torch.bfloat16, "F16": torch.float16}[upper]
    assert torch.equal(half["norm.weight"], whole["embeddings.LayerNorm.weight"].to(kind))
    assert {t.dtype for t in half.values()} == {kind}


def test_a_cast_of_a_graft(run: Run) -> None:
    done = run("graft", REF, "mine.py", "--to-file", "--dtype", "BF16", "-o", "half.safetensors")
    assert done.status == 0, done.err
    half, whole = load_file("half.safetensors"), load_file("mine.safetensors")
    assert all(torch.equal(half[name], t.bfloat16()) for name, t in whole.items())
    assert "before that it was proven" in done.out
    done = run("verify", REF, "mine.py", "--weights", "half.safetensors", "--json")
    assert (done.status, done.json["verdict"]) == (0, "adapted"), done.err


def test_shards_there_and_one_file_back(layouts: Path, run: Run) -> None:
    there = ("--plan", "layout.graft.toml", "--to-file", "--shard-size", "30KB")
    (layouts / "parts").mkdir()
    done = run("graft", "file:theirs.safetensors", *there, "-o", "parts/model.safetensors", "--json")
    assert done.status == 0, done.err
    assert done.json["wrote"][0] == "parts/model.safetensors.index.json"
    index = json.loads((layouts / "parts/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for shard in set(index["weight_map"].values()):
        assert "weightzoo" in surgery.open(layouts / "parts" / shard).metadata
    back = ("--plan", "layout.graft.toml", "--to-file", "--invert", "file:theirs.safetensors", "-o", "one.safetensors")
    done = run("graft", "file:parts", *back)
    assert done.status == 0, done.err
    first, one = bytes_of("theirs.safetensors", "one.safetensors")
    assert first == one
    done = run("graft", "file:theirs.safetensors", *there, "-o", "parts/model.safetensors")
    assert done.status == 2
    assert "shards are not written over or beside another checkpoint" in done.err
    done = run("graft", "file:theirs.safetensors", *there[:3], "--shard-size", "two", "-o", "x.safetensors")
    assert done.status == 2
    assert "number of bytes" in done.err
    assert not list(layouts.glob("*x.*"))


def test_weights_and_plan_are_both_there_or_none(layouts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from zoo import written

    before = sorted(layouts.iterdir())

    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    class Os:
        def __getattr__(self, name: str) -> Any:
            return failing if name == "replace" else getattr(os, name)

    monkeypatch.setattr(written, "os", Os())
    for size in (None, "30KB"):
        with pytest.raises(OSError, match="No space left"):
            written.write_to_file(
                surgery.open("theirs.safetensors"),
                surgery.Plan.load("layout.graft.toml"),
                Path("s.safetensors"),
                verdict="proven",
                base=None,
                like=None,
                shard_size=size,
            )
        assert sorted(layouts.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing argument 'FILE[:CLASS]'"),
        (("--to-file",), "Missing argument 'FILE[:CLASS]'"),
        (("--plan", "mine.graft.toml"), "Missing argument 'FILE[:CLASS]'"),
        (("--plan", "mine.graft.toml", "--to-file"), "-o says where to"),
        (("mine.py", "--dtype", "BF16"), "--dtype goes with --to-file"),
        (("mine.py", "--shard-size", "1GB"), "--shard-size goes with --to-file"),
        (("mine.py", "--to-file", "--invert", "file:tiny"), "--invert needs the --plan"),
        (("mine.py", "--to-file", "--plan", "mine.graft.toml", "--layers", "0"), "--layers says how to find a plan"),
        (("--to-file", "--plan", "none.toml", "-o", "x.safetensors"), "there is no plan none.toml"),
        (("--to-file", "--plan", "mine.graft.toml", "-o", "tiny"), "is a folder"),
        (("--to-file", "--plan", "mine.graft.toml", "-o", "x.bin"), "written as safetensors"),
    ],
)
def test_options_that_do_not_go_together(run: Run, folder: Path, arguments: tuple[str, ...], said: str) -> None:
    before = sorted(folder.iterdir())
    done = run("graft", REF, *arguments)
    assert done.status == 2
    assert said in done.err
    assert sorted(folder.iterdir()) == before


def test_a_file_that_no_graft_wrote_stays(layouts: Path, run: Run) -> None:
    there = ("--plan", "layout.graft.toml", "--to-file", "-o", "theirs.safetensors")
    before = Path("theirs.safetensors").read_bytes()
    done = run("graft", "file:theirs.safetensors", *there)
    assert done.status == 2
    assert "no graft wrote it" in done.err
    assert Path("theirs.safetensors").read_bytes() == before


def test_a_plan_that_was_refuted_is_not_run(layouts: Path, run: Run) -> None:
    plan = surgery.Plan.load("layout.graft.toml").with_verdict("refuted")
    plan.save("no.graft.toml")
    there = ("--plan", "no.graft.toml", "--to-file", "-o", "no.safetensors")
    done = run("graft", "file:theirs.safetensors", *there, "--json")
    assert (done.status, done.json["verdict"], done.json["wrote"]) == (1, "refuted", [])
    assert not Path("no.safetensors").exists()
    assert run("graft", "file:theirs.safetensors", *there, "--force").status == 0


def test_a_model_on_the_whole(run: Run) -> None:
    """What was written loads strictly into the module."""
    assert run("graft", REF, "mine.py", "--to-file", "-o", "files.safetensors").status == 0
    model = target.load("mine.py").model
    model.load_state_dict(load_file("files.safetensors"))


# -- adapters ---------------------------------------------------------------------------------------------------------
def test_an_adapter_is_merged_on_the_command_line(run: Run, folder: Path) -> None:
    """In memory and from file to file, to the same bytes; and verified."""
    from tests.surgery.test_lora import adapter, by_formula

    theirs = load_file("tiny/model.safetensors")
    names = [n.removesuffix(".weight") for n in theirs if n.endswith("attention.self.query.weight")]
    modules = {name: torch.nn.Linear(*reversed(theirs[f"{name}.weight"].shape)) for name in names}
    adapter(folder / "adapter", modules)
    Path("rules.txt").write_text('merge_lora("adapter/")\n')
    done = run("graft", REF, "mine.py", "--rules", "rules.txt", "-o", "memory.safetensors", "--json")
    assert (done.status, done.json["verdict"]) == (0, "proven"), done.err
    done = run("graft", REF, "mine.py", "--rules", "rules.txt", "--to-file", "-o", "files.safetensors")
    assert done.status == 0, done.err
    given = ("--plan", "memory.graft.toml", "--to-file", "-o", "given.safetensors")
    done = run("graft", REF, "mine.py", *given)
    assert done.status == 0, done.err
    memory, files, plan = bytes_of("memory.safetensors", "files.safetensors", "given.safetensors")
    assert memory == files == plan
    done = run("verify", REF, "mine.py", "--weights", "files.safetensors")
    assert done.status == 0, done.err
    whole = by_formula(theirs, folder / "adapter", 2.0)
    row = surgery.Plan.load("memory.graft.toml")
    target_name = next(r.target for r in row.rows if f"{names[0]}.weight" in r.sources)
    assert any(
        torch.allclose(part, whole[f"{names[0]}.weight"], rtol=1e-6, atol=1e-7)
        for part in load_file("memory.safetensors")[target_name].split(whole[f"{names[0]}.weight"].shape[0])
    )


def test_an_adapter_is_taken_out_again_on_the_command_line(layouts: Path, run: Run) -> None:
    """Within rounding, as the inverse says; what the adapter does not touch, bit for bit."""
    from tests import pairs
    from tests.surgery.test_convert import bare_bert
    from tests.surgery.test_lora import adapter, targets

    bert = bare_bert()
    adapter(layouts / "adapter", targets(bert))
    merge = surgery.rules.merge_lora("adapter/")
    model = pairs.Encoder().eval()
    del model.head
    report = surgery.graft("theirs.safetensors", model, probe=pairs.probe(bert), rules=[merge], require="proven")
    report.plan.save("merged.graft.toml")
    there = ("--plan", "merged.graft.toml", "--to-file")
    done = run("graft", "file:theirs.safetensors", *there, "-o", "ours.safetensors")
    assert done.status == 0, done.err
    done = run(
        "graft", "file:ours.safetensors", *there, "--invert", "file:theirs.safetensors", "-o", "back.safetensors"
    )
    assert done.status == 0, done.err
    theirs, back = load_file("theirs.safetensors"), load_file("back.safetensors")
    assert set(theirs) == set(back)
    merged = {f"{name}.weight" for name in targets(bert)}
    for name, tensor in theirs.items():
        if name in merged:
            torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(back[name], tensor), name
    plan = surgery.Plan.load("back.graft.toml")
    assert "an adapter is taken out again: within rounding, not bit for bit" in plan.notes
    # the inverse keeps the rule, and runs by itself
    done = run("graft", "file:ours.safetensors", "--plan", "back.graft.toml", "--to-file", "-o", "third.safetensors")
    assert done.status == 0, done.err
    third = load_file("third.safetensors")
    assert all(torch.equal(third[name], tensor) for name, tensor in back.items())
    (layouts / "adapter" / "adapter_model.safetensors").unlink()
    done = run("graft", "file:ours.safetensors", "--plan", "back.graft.toml", "--to-file", "-o", "no.safetensors")
    assert done.status == 2
    assert "is no adapter" in done.err


# -- rules that were edited in a plan ----------------------------------------------------------------------------------
def edited(plan: str, *changes: tuple[str, str]) -> None:
    """Change the rules that stand in a plan's file, and nothing else of it."""
    text = Path(plan).read_text()
    start = text.index("rules = [")
    end = text.index("]\n", text.index("\n", start))
    rules = text[start:end]
    for old, new in changes:
        assert old in rules
        rules = rules.replace(old, new)
    Path("edited.graft.toml").write_text(text[:start] + rules + text[end:])


def test_a_rule_that_leaves_tensors_new_may_be_edited(run: Run) -> None:
    Path("rules.txt").write_text('init("layers.1.down.*", why="trained anew")\n')
    assert run("graft", REF, "mine.py", "--rules", "rules.txt", "-o", "first.safetensors").status == 0
    edited("first.graft.toml", ("layers.1", "layers.0"))
    given = ("--plan", "edited.graft.toml", "--json")
    memory = run("graft", REF, "mine.py", *given, "-o", "memory.safetensors")
    assert (memory.status, memory.json["verdict"]) == (0, "adapted"), memory.err
    files = run("graft", REF, "mine.py", *given, "-o", "files.safetensors", "--to-file")
    assert (files.status, files.json["verdict"]) == (0, "consistent"), files.err
    assert "it was edited" in files.json["message"]
    for done in (memory, files):
        status = {row["name"]: row["status"] for row in done.json["rows"]}
        assert (status["layers.0.down.weight"], status["layers.1.down.weight"]) == ("new", "filled")
    one, two = load_file("memory.safetensors"), load_file("files.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("way", [(), ("--to-file",)])
def test_rows_do_not_follow_a_rule_that_makes_tensors(run: Run, folder: Path, way: tuple[str, ...]) -> None:
    sets = ("--set=depth=1",)
    assert run("graft", REF, "mine.py", *sets, "--layers", "1", "-o", "first.safetensors").status == 0
    edited("first.graft.toml", ("[1]", "[0]"))
    done = run("graft", REF, "mine.py", *sets, *way, "--plan", "edited.graft.toml", "-o", "second.safetensors")
    assert done.status == 2
    assert "the plan's rules make something else of that tensor" in done.err
    assert "zoo graft --rules FILE" in done.err
    assert not (folder / "second.safetensors").exists()


def test_an_adapter_that_is_not_there(run: Run) -> None:
    Path("rules.txt").write_text('merge_lora("nowhere/")\n')
    done = run("graft", REF, "mine.py", "--rules", "rules.txt", "-o", "x.safetensors")
    assert done.status == 2
    assert "nowhere is no adapter" in done.err
