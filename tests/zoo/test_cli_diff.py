"""`zoo diff`: its answer in each mode, and its exit status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.zoo.conftest import Done, Zoo, calling
from zoo import account
from zoo.out import table

Run = Callable[..., Done]


def blocks(seed: int = 0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {
        f"layer.{i}.{name}.weight": torch.randn(6, 4 + len(name), generator=make) for i in range(3) for name in "ab"
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    return calling(capsys, "diff")


def test_the_same(run: Run) -> None:
    save_file(blocks(), "a.safetensors")
    torch.save(blocks(), "b.pt")
    done = run("file:a.safetensors", "file:b.pt")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "same: all 6 tensors, byte for byte"
    assert run("file:a.safetensors", "file:b.pt", "-q").out == "same\n"


def test_what_differs(run: Run) -> None:
    a = blocks() | {"old": torch.ones(3), "half": torch.full((4,), 0.1)}
    b = {name.replace("layer", "h"): tensor for name, tensor in blocks().items()}
    b["h.1.a.weight"] = b["h.1.a.weight"].T.contiguous()
    b |= {"half": torch.full((4,), 0.1).bfloat16()}
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    done = run("file:a.safetensors", "file:b.safetensors")
    assert done.status == 1
    assert [" ".join(line.split()) for line in done.out.splitlines()[2:]] == [
        "renamed, same values: 6 tensors",
        "layer.{i}.a.weight -> h.{i}.a.weight F32 [6, 5]",
        "layer.{j}.b.weight -> h.{j}.b.weight F32 [6, 5]",
        "layer.1.a.weight -> h.1.a.weight F32 [6, 5] -> [5, 6] transposed",
        "with i = 0, 2, j = 0..2",
        "changed: 1 tensor",
        "half F32 -> BF16 [4] relative 9.8e-04, largest 9.8e-05, 4 of 4 elements",
        "only in A: 1 tensor",
        "old F32 [3]",
        "differs: 6 renamed, 1 changed, 1 only in A",
    ]
    assert run("file:a.safetensors", "file:b.safetensors", "-q").out == "differs\n"


def test_json(run: Run) -> None:
    save_file({"w": torch.zeros(2)}, "a.safetensors")
    save_file({"w": torch.ones(2)}, "b.safetensors")
    done = run("file:a.safetensors", "file:b.safetensors", "--json")
    assert (done.status, done.json["same"], done.json["counts"]) == (1, False, {"changed": 1})
    assert done.json["left"]["ref"] == "file:a.safetensors"
    (row,) = done.json["rows"]
    assert (row["relative"], row["largest"], row["elements"]) == (None, 1.0, 2)  # of nothing, it is infinitely more


def test_what_is_not_finite_is_counted_and_not_measured(run: Run) -> None:
    save_file({"w": torch.ones(4)}, "a.safetensors")
    save_file({"w": torch.tensor([1.0, float("nan"), 2.0, 1.0])}, "b.safetensors")
    done = run("file:a.safetensors", "file:b.safetensors")
    assert "w  F32 [4]  2 of 4 elements; 1 is not finite on one side\n" in done.out
    assert "inf" not in done.out


def test_a_path_that_is_typed_as_a_name(run: Run) -> None:
    save_file(blocks(), "a.safetensors")
    for typed in ("a.safetensors", "./a.safetensors", "."):
        done = run(typed, "file:a.safetensors")
        assert (done.status, done.out) == (2, "")
        assert f"hint: for what lies here under that name, type file:{typed}\n" in done.err


def test_a_tie_that_is_gone_is_named(run: Run) -> None:
    w = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    save_file({"in": w, "out": w.clone()}, "a.safetensors")
    save_file({"in": w, "out": w + 1}, "b.safetensors")
    assert (
        "tied in A, by equal bytes, and not in B:\n  in = out\n" in run("file:a.safetensors", "file:b.safetensors").out
    )


def test_many_changes_are_cut_and_the_largest_stand_first(run: Run) -> None:
    save_file({f"w{i}": torch.ones(2) for i in range(40)}, "a.safetensors")
    save_file({f"w{i}": torch.ones(2) * (1 + i / 100) for i in range(40)}, "b.safetensors")
    done = run("file:a.safetensors", "file:b.safetensors")
    lines = [line.split() for line in done.out.splitlines()[4:]]
    assert lines[0][0] == "w39"
    assert "... and 15 more; --all shows all" in done.out
    whole = run("file:a.safetensors", "file:b.safetensors", "--all")
    assert "more" not in whole.out
    assert "w1 " in whole.out


@pytest.mark.parametrize(
    ("other", "said"), [("file:nothing.safetensors", "there is no file"), ("nothing-like-it", "no entry")]
)
def test_bad_input(run: Run, other: str, said: str) -> None:
    save_file(blocks(), "a.safetensors")
    done = run("file:a.safetensors", other)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert run(other, "file:a.safetensors", "--json").json["exit"] == 2


def test_the_same_files_compare_without_torch(zoo: Zoo) -> None:
    for name in ("a", "b"):
        save_file(blocks(), zoo.cwd / f"{name}.safetensors")
    done = zoo.python(
        "import sys; from zoo.cli import main; s = main(); print('torch' in sys.modules); sys.exit(s)",
        *("diff", "file:a.safetensors", "file:b.safetensors", "-q"),
    )
    assert (done.status, done.out) == (0, "same\nFalse\n"), done.err


def test_on_a_narrow_terminal_what_a_row_says_last_stands_below_it() -> None:
    rows = [("a.name", "F32 [3]", "short"), ("another.name", "F32 [30, 40]", "relative 1.0e+00, largest 2.0e+00")]
    assert list(account.fitted(rows, 40)) == [
        "a.name        F32 [3]       short",
        "another.name  F32 [30, 40]",
        "    relative 1.0e+00, largest 2.0e+00",
    ]
    assert list(account.fitted(rows, None)) == table(rows).splitlines()
