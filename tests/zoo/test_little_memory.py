"""With --blockwise, what a graft fills is in memory once, as pages of the source's file; and all else is the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery import nearby, parked
from surgery.judge import Judge
from tests import tiny_bert
from tests.surgery.test_parked import MAPS, file_of
from zoo import cli

pytest.importorskip("transformers")

REF = "file:tiny#encoder"
LARGE = 1024  # bytes of a tensor that counts, in a tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("little")
    tiny_bert.save(made / "tiny")
    (made / "mine.py").write_text(tiny_bert.MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        assert cli.main(["graft", REF, "mine.py", "-q"]) == 0
    return made


@pytest.fixture
def during(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[Any]]]:
    """Run a command, and look at what there is when its proof begins."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(parked, "SMALL", LARGE)

    def call(look: Callable[[Judge], Any], *arguments: str) -> tuple[int, list[Any]]:
        seen: list[Any] = []
        prove = Judge.prove

        def looked(self: Judge, *args: Any, **kwargs: Any) -> Any:
            seen.append(look(self))
            return prove(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Judge, "prove", looked)
            return cli.main([*arguments]), seen

    return call


def in_memory(judge: Judge) -> dict[str, int]:
    """Bytes of large float tensors that are alive: in memory of their own, and of them the target's; and in files."""
    gc.collect()
    own = {t.data_ptr() for t in judge.target.parameters()}
    found = {"memory": 0, "target": 0, "file": 0}
    seen: set[int] = set()
    for t in gc.get_objects():
        if not isinstance(t, torch.Tensor) or type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_meta:
            continue
        storage = t.untyped_storage()
        if not t.is_floating_point() or storage.nbytes() <= LARGE or storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        where = "file" if file_of(t) else "memory"
        found[where] += storage.nbytes()
        found["target"] += storage.nbytes() if where == "memory" and storage.data_ptr() in own else 0
    return found


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not show its maps")
def test_what_is_filled_is_not_in_memory_twice(during: Callable[..., tuple[int, list[Any]]]) -> None:
    verify = ("verify", REF, "mine.py", "--on", "cpu/float64", "-q")
    for command in (verify, ("graft", REF, "mine.py", "-o", "other.safetensors", "-q"), ("plan", REF, "mine.py", "-q")):
        status, (little,) = during(in_memory, *command, "--blockwise")
        assert status == 0
        assert little["target"] == 0, command
        assert little["file"] > 0
        status, (plain,) = during(in_memory, *command, "--no-blockwise")
        assert status == 0
        assert plain["target"] > 0  # so that the other is no accident
        assert little["memory"] <= plain["memory"] - plain["target"] // 2


def same_files(folder: Path, one: str, other: str) -> bool:
    """The same weights by the same plan, which says for itself how it was proven."""
    rows = [surgery.Plan.load(folder / f"{name}.graft.toml").rows for name in (one, other)]
    files = [(folder / f"{name}.safetensors").read_bytes() for name in (one, other)]
    return rows[0] == rows[1] and files[0] == files[1]


def test_the_same_is_written(during: Callable[..., tuple[int, list[Any]]], folder: Path) -> None:
    status, _ = during(lambda _: None, "graft", REF, "mine.py", "-o", "little.safetensors", "--blockwise", "-q")
    assert status == 0
    assert same_files(folder, "little", "mine")
    assert not list(folder.glob(".parked*"))


def test_it_starts_from_ones_own_weights(during: Callable[..., tuple[int, list[Any]]], folder: Path) -> None:
    start = ("graft", REF, "mine.py", "--init", "mine.safetensors", "-q")
    for name, how in (("a", "--blockwise"), ("b", "--no-blockwise")):
        assert during(lambda _: None, *start, "-o", f"{name}.safetensors", how)[0] == 0
    assert same_files(folder, "a", "b")
    # over the file that it is a view of
    assert during(lambda _: None, *start, "-o", "mine.safetensors", "--blockwise")[0] == 0
    assert (folder / "mine.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_where_they_part_is_told_from_a_piece_of_the_runs(
    during: Callable[..., tuple[int, list[Any]]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import json

    eps = tiny_bert.MINE.count("1e-12")
    assert eps
    (folder / "wrong.py").write_text(tiny_bert.MINE.replace("1e-12", "1e-5"))
    monkeypatch.setattr(nearby, "ROOM", 1 << 15)
    told = []
    for how in ("--blockwise", "--no-blockwise"):
        capsys.readouterr()
        status, _ = during(
            lambda _: None, "verify", REF, "wrong.py", "--weights", "mine.safetensors", "--json", "--on",
            "cpu/float64", how,
        )  # fmt: skip
        assert status == 1
        told.append(json.loads(capsys.readouterr().out)["proof"]["divergence"])
    assert told[0]["target_module"] == told[1]["target_module"]
    assert told[0]["cause"] == told[1]["cause"] == "eps"
