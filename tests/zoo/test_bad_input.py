"""Bad input of a graft: each gives one clear message with the next step, the right status, and leaves nothing behind.

In a process of its own, as a person runs it: stdout, stderr and status together; and once more with --json.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import tiny_bert
from tests.zoo.conftest import Done, Zoo, bert_tensors, safetensors

pytest.importorskip("transformers")

MARK = "\x1e"
ONE = "from torch import nn\n\nclass One(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
ONE += "        self.w = nn.Linear(4, 4)\n"


@dataclass(frozen=True)
class Case:
    """What is typed, beside which files, and what has to be said."""

    said: str  # in the message
    step: str  # in the hint
    file: str = tiny_bert.MINE
    ref: str = "file:tiny#encoder"
    more: tuple[str, ...] = ()
    target: str = "mine.py"
    status: int = 2
    online: bool = False
    environ: dict[str, str] = field(default_factory=dict)


CASES = {
    "no such file": Case("there is no file mien.py", "did you mean mine.py?", target="mien.py"),
    "a folder": Case("tiny is a folder", "mymodel.py", target="tiny"),
    "not Python": Case("is not a Python file", "zoo graft REF mymodel.py", target="tiny/config.json"),
    "no module in it": Case("mine.py defines no nn.Module", "define a class", file="from torch.nn import Linear\n"),
    "two modules": Case(
        "2 modules that could be meant: One, Two",
        "mine.py:Two",
        file=ONE + "\n\n" + ONE[ONE.index("class") :].replace("One", "Two"),
    ),
    "no such class": Case("Taggr is not defined there", "did you mean Tagger?", target="mine.py:Taggr"),
    "arguments needed": Case("Layer in mine.py needs dim, heads, inner", "--set dim=... --set", target="mine.py:Layer"),
    "an argument it lacks": Case("has no argument deph", "did you mean depth?", more=("--set", "deph=3")),
    "an argument without a value": Case("NAME=VALUE", "--set hidden=384", more=("--set", "depth")),
    "fit that does not suffice": Case(
        "needs the argument wings, and config.json does not say",
        "--set wings=...",
        file=ONE.replace("__init__(self)", "__init__(self, wings)"),
        more=("--fit",),
    ),
    "a syntax error": Case("mine.py:3: SyntaxError", "correct it", file="import torch\n\nclass Mine(:\n"),
    "an import that raises": Case(
        "it does not run: ValueError: not today at mine.py:2", "-v", file="x = 1\nraise ValueError('not today')\n"
    ),
    "an import that is missing": Case(
        "No module named 'no_such_thing'", "install no_such_thing", file="import no_such_thing\n"
    ),
    "a script that exits": Case(
        "it does not run: SystemExit: 0 at mine.py:2", "__main__", file="import sys\nsys.exit(0)\n"
    ),
    "a constructor that raises": Case(
        "making One raised: ZeroDivisionError: division by zero at mine.py:7", "-v", file=ONE + "        1 / 0\n"
    ),
    "inputs that are open": Case(
        "forward(ids, speaker) does not say what speaker should be",
        "def example():\n    ids = torch.randint(40, (2, 12))\n    speaker = ...\n    return ids, speaker",
        file=ONE + "    def forward(self, ids, speaker):\n        return ids\n",
    ),
    "inputs that do not fit": Case(
        "forward raised on x int64 [2, 12]: RuntimeError",
        "def example():",
        file=ONE + "    def forward(self, x):\n        return self.w(x)\n",
    ),
    "an example that raises": Case(
        "example() raised: KeyError: 'x' at mine.py:51",
        "-v",
        file=tiny_bert.MINE + "\ndef example():\n    return {}['x']\n",
    ),
    "an example of nothing": Case(
        "example() gave int, and not inputs",
        "return a tensor",
        file=tiny_bert.MINE + "\ndef example():\n    return 3\n",
    ),
    "no such example": Case("mine.py defines no exampel", "def exampel()", more=("--example", "mine.py:exampel")),
    "an example that is not named": Case("--example takes FILE:FUNC", "mine.py:example", more=("--example", "mine.py")),
    "no such submodule": Case("Tagger has no module wrod", "did you mean word?", more=("--into", "wrod")),
    "no folder for the output": Case("there is no folder out", "mkdir -p out", more=("-o", "out/x.safetensors")),
    "an output of another kind": Case("only so", "x.safetensors", more=("-o", "x.pt")),
    "someone's file in the way": Case("no graft wrote it", "another name", more=("-o", "tiny/model.safetensors")),
    "an unknown entry": Case('no entry is called "bret-encoder"', "did you mean bert-encoder", ref="bret-encoder"),
    "an unknown part": Case('has no part "decoder"', "embeddings, encoder", ref="bert#decoder"),
    "no such checkpoint": Case("there is no file nowhere.pt", "relative paths", ref="file:nowhere.pt"),
    "a truncated checkpoint": Case("truncated.safetensors", "", ref="file:truncated.safetensors"),
    "a corrupt checkpoint": Case("corrupt.safetensors", "", ref="file:corrupt.safetensors"),
    "a pickle with code": Case("code.pt", "", ref="file:code.pt"),
    "no configuration": Case("no config.json", "--static", ref="file:alone/model.safetensors#encoder"),
    "no network": Case("could not be reached", "", ref="bert-encoder", status=3, online=True),
    "offline": Case("", "", ref="bert-encoder", status=3),
    "no such plan": Case(
        "there is no plan nowhere.graft.toml", "zoo graft writes one", more=("--plan", "nowhere.graft.toml")
    ),
    "a plan that is none": Case("tiny/config.json: not TOML", "", more=("--plan", "tiny/config.json")),
    "someone else's weights to start from": Case(
        "is not of this module: it lacks", "--set", more=("--init", "tiny/model.safetensors")
    ),
}


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch TRAPPED",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_bert.save(folder)
    return folder


def lay_out(zoo: Zoo, saved: Path, case: Case) -> None:
    tiny, alone = zoo.cwd / "tiny", zoo.cwd / "alone"
    for folder in (tiny, alone):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (tiny / "config.json").write_bytes((saved / "config.json").read_bytes())
    good = safetensors(bert_tensors())
    (zoo.cwd / "truncated.safetensors").write_bytes(good[:-7])
    (zoo.cwd / "corrupt.safetensors").write_bytes(b"\xff" * 64)
    (zoo.cwd / "code.pt").write_bytes(pickle.dumps({"w": Trap()}))
    (zoo.cwd / "mine.py").write_text(case.file)
    if case.online:
        zoo.online("http://127.0.0.1:9")


def both(zoo: Zoo, *arguments: str) -> tuple[Done, Done]:
    """What the command does, and what it does with --json: in one process, which has to import torch only once."""
    code = f"""
import sys
from zoo.cli import main
first = main(sys.argv[1:])
for stream in (sys.stdout, sys.stderr):
    stream.write({MARK!r})
    stream.flush()
second = main([*sys.argv[1:], "--json"])
print({MARK!r} + f"{{first}} {{second}}")
"""
    done = zoo.python(code, *arguments)
    out, told, statuses = done.out.split(MARK)
    err, noise = done.err.split(MARK)
    first, second = map(int, statuses.split())
    return Done(first, out, err), Done(second, told, noise)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(zoo: Zoo, saved: Path, name: str) -> None:
    case = CASES[name]
    lay_out(zoo, saved, case)
    before = {path: path.read_bytes() for path in zoo.cwd.rglob("*") if path.is_file()}
    arguments = ("graft", case.ref, case.target, *case.more)
    done, told = both(zoo, *arguments)
    assert (done.status, done.out) == (case.status, "")
    *notes, last = done.err.split("error: ")
    assert len(notes) == 1, done.err
    message, _, hint = last.partition("hint: ")
    assert case.said in message
    assert "\n" not in message.rstrip("\n")
    assert hint.strip(), "there is a next step"
    assert case.step in hint
    assert "Traceback" not in done.err
    assert (told.status, told.json["exit"], told.err) == (case.status, case.status, "")
    assert case.said in told.json["message"]
    assert {path: path.read_bytes() for path in zoo.cwd.rglob("*") if path.is_file()} == before
    assert zoo.cached == []
