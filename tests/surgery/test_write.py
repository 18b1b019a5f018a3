"""Writing: a plan from file to file, and state dicts; whole or not at all."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from surgery import checkpoint
from surgery.errors import CheckpointError, PlanError, SurgeryError
from surgery.expr import parse
from surgery.plan import Dropped, Plan, Row, Status
from surgery.write import row_value, save, write

module = importlib.import_module("surgery.write")  # `surgery.write` itself is the function

SOURCE = {
    "h.q": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "h.k": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
    "wte": torch.randn(9, 4, generator=torch.Generator().manual_seed(2)),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(3)).half(),
    "steps": torch.arange(3),
    "flag": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "extra": torch.ones(2),
}
EXTRA = (Dropped("extra", "an example"),)


def row(target: str, expr: str | None, shape: tuple[int, ...], dtype: str = "F32", status: str = "filled") -> Row:
    return Row(target, Status(status), parse(expr) if expr else None, shape, dtype)


def tie(target: str, to: str, shape: tuple[int, ...]) -> Row:
    return Row(target, Status.TIED, None, shape, "F32", tied_to=to)


ROWS = (
    row("head.weight", None, (2, 4), status="new"),
    row("flag", "flag", (3,), "BOOL"),
    row("qk", "cat(h.q, h.k, axis=0)", (8, 6)),
    row("emb", "wte", (9, 4)),
    tie("lm_head", "emb", (9, 4)),
    row("turned", "transpose(h.q)", (6, 4)),
    tie("turned too", "turned", (6, 4)),
    row("bias", "zeros(shape=(7,))", (7,), status="synthesised"),
    row("half", "half", (5,), "F16"),
    row("half as float", "half", (5,)),
    row("steps", "steps", (3,), "I64"),
    row("none", "none", (0, 3)),
    row("scalar", "scalar", ()),
    row("mask", None, (2,), "BOOL", "constant"),
    row("old", None, (3,), "BF16", "kept"),
)
PLAN = Plan(ROWS, EXTRA)
BASE = {
    "head.weight": torch.full((2, 4), 7.0),
    "mask": torch.tensor([True, False]),
    "old": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
    "qk": torch.zeros(8, 6),
}


def expected() -> dict[str, torch.Tensor]:
    return {
        "head.weight": BASE["head.weight"],
        "flag": SOURCE["flag"],
        "qk": torch.cat([SOURCE["h.q"], SOURCE["h.k"]]),
        "emb": SOURCE["wte"],
        "lm_head": SOURCE["wte"],
        "turned": SOURCE["h.q"].t(),
        "turned too": SOURCE["h.q"].t(),
        "bias": torch.zeros(7),
        "half": SOURCE["half"],
        "half as float": SOURCE["half"].float(),
        "steps": SOURCE["steps"],
        "none": SOURCE["none"],
        "scalar": SOURCE["scalar"],
        "mask": BASE["mask"],
        "old": BASE["old"],
    }


def from_safetensors(folder: Path) -> object:
    save_file(SOURCE, folder / "source.safetensors")
    return folder / "source.safetensors"


def from_torch(folder: Path) -> object:
    torch.save(SOURCE, folder / "source.pt")
    return folder / "source.pt"


def from_npz(folder: Path) -> object:
    np.savez(folder / "source.npz", **{name: tensor.numpy() for name, tensor in SOURCE.items()})
    return folder / "source.npz"


def from_memory(folder: Path) -> object:
    return SOURCE


def from_open_checkpoint(folder: Path) -> object:
    return checkpoint.open(from_safetensors(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [from_safetensors, from_torch, from_npz, from_memory, from_open_checkpoint])
@pytest.mark.parametrize("base_in_file", [True, False])
def test_a_plan_from_file_to_file(source: Callable[[Path], object], base_in_file: bool, tmp_path: Path) -> None:
    base: object = BASE
    if base_in_file:
        save_file(BASE, tmp_path / "base.safetensors")
        base = tmp_path / "base.safetensors"
    out = write(source(tmp_path), PLAN, tmp_path / "out.safetensors", base=base)  # type: ignore[arg-type]
    assert out == tmp_path / "out.safetensors"
    written = load_file(out)
    wanted = expected()
    assert set(written) == set(wanted)
    for name, tensor in wanted.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    opened = checkpoint.open(out)
    for name in opened:
        span = opened.span(name)
        assert span is not None
        assert span.offset % opened.read(name).element_size() == 0, "aligned, so that it can be mapped"


def test_the_same_bytes_whatever_the_way_and_the_order_of_rows(tmp_path: Path) -> None:
    files = [write(from_safetensors(tmp_path), PLAN, tmp_path / "a.safetensors", base=BASE)]  # type: ignore[arg-type]
    files.append(write(from_safetensors(tmp_path), PLAN, tmp_path / "b.safetensors", base=BASE))  # type: ignore[arg-type]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("way", ["no call", "an error", "nothing copied", "half copied"])
def test_the_plain_copy_where_the_system_has_no_better(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, "copy_file_range", None)
    if real is None:
        pytest.skip("no copy_file_range here")

    def failing(*args: object, **options: object) -> int:
        raise OSError(errno.EXDEV, "cross-device link")

    def short(source: int, to: int, count: int, **options: int) -> int:
        if count <= 3:
            raise OSError(errno.EINVAL, "no")
        return real(source, to, 3, **options)

    if way == "no call":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        calls = {"an error": failing, "nothing copied": lambda *args, **options: 0, "half copied": short}
        monkeypatch.setattr(os, "copy_file_range", calls[way])
    monkeypatch.setattr(module, "_CHUNK", 7)
    source = from_safetensors(tmp_path)
    out = write(source, PLAN, tmp_path / "out.safetensors", base=BASE)  # type: ignore[arg-type]
    written = load_file(out)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected().items())


def test_identity_rows_never_pass_through_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    plan = Plan((row("x", "a", (3,)), row("y", "b", (2, 2))))

    def never(*args: object) -> None:
        raise AssertionError("a value was made")

    monkeypatch.setattr(module, "row_value", never)
    out = write(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
    assert torch.equal(load_file(out)["y"], tensors["b"])


def test_a_source_may_be_replaced_by_its_own_result(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "m.safetensors")
    plan = Plan((row("b", "a", (3,)), row("c", "neg(a)", (3,))))
    opened = checkpoint.open(tmp_path / "m.safetensors")
    write(opened, plan, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")["c"].tolist() == [0.0, -1.0, -2.0]
    assert opened.read("a").tolist() == [0.0, 1.0, 2.0]
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_metadata_is_written(tmp_path: Path) -> None:
    write({"a": torch.ones(1)}, Plan((row("a", "a", (1,)),)), tmp_path / "m.safetensors", metadata={"plan": "é"})
    assert checkpoint.open(tmp_path / "m.safetensors").metadata == {"format": "pt", "plan": "é"}


# --- errors: nothing is left behind, and what was there stays -------------------------------------------------------


def fails(
    folder: Path, source: object, plan: Plan, message: str, hint: str = "", error: type = PlanError, **options: object
) -> None:
    (folder / "out.safetensors").write_text("before")
    before = sorted(os.listdir(folder))
    with pytest.raises(error) as caught:
        write(source, plan, folder / "out.safetensors", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    if isinstance(caught.value, SurgeryError):
        assert hint in caught.value.hint
        assert caught.value.hint
    assert sorted(os.listdir(folder)) == before
    assert (folder / "out.safetensors").read_text() == "before"


def test_a_base_is_asked_for_by_name(tmp_path: Path) -> None:
    missing = "3 tensors do not come from the source, and no base was given: head.weight (new), mask (constant), old"
    fails(tmp_path, SOURCE, PLAN, missing, "base=model.state_dict()")
    part = {name: BASE[name] for name in ("mask", "old")}
    fails(tmp_path, SOURCE, PLAN, "<mapping> does not have them: head.weight (new)", "base", base=part)
    other = {**BASE, "mask": torch.ones(3, dtype=torch.bool)}
    fails(
        tmp_path, SOURCE, PLAN, "another shape in <mapping>: mask (3,), planned (2,)", "plan was made for", base=other
    )
    meta = {**BASE, "head.weight": BASE["head.weight"].to("meta")}
    fails(tmp_path, SOURCE, PLAN, "head.weight is on the meta device", "values", CheckpointError, base=meta)


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    a = {"a": torch.ones(3)}
    fails(tmp_path, a, Plan((row("x", "b", (3,)),)), "no tensor b")
    fails(tmp_path, a, Plan((row("x", "a", (4,)),)), "shape")
    fails(tmp_path, {**a, "b": torch.ones(1)}, Plan((row("x", "a", (3,)),)), "neither used nor dropped")
    fails(tmp_path, a, Plan((row("x", "a", (3,)), row("x", "a", (3,)))), "more than one row")
    fails(tmp_path, a, Plan((row("x", "a", (3,), "C128"),)), "safetensors has no type 'C128'", "F32")
    fails(tmp_path, a, Plan((row("x", "a", (3,), "float32"),)), "safetensors has no type 'float32'", "F32")


def test_types_change_only_by_rounding_or_by_the_plan(tmp_path: Path) -> None:
    steps = {"a": torch.tensor([1, 2**40])}
    fails(tmp_path, steps, Plan((row("x", "a", (2,), "I32"),)), "its value is I64", 'cast(..., dtype="I32")')
    fails(tmp_path, {"a": torch.ones(2)}, Plan((row("x", "a", (2,), "I64"),)), "its value is F32", "cast(")
    flags = {"a": torch.tensor([True, False])}
    out = write(flags, Plan((row("x", "a", (2,), "F32"),)), tmp_path / "m.safetensors")
    assert load_file(out)["x"].tolist() == [1.0, 0.0]
    out = write({"a": torch.ones(2) / 3}, Plan((row("x", "a", (2,), "BF16"),)), tmp_path / "m.safetensors")
    assert torch.equal(load_file(out)["x"], (torch.ones(2) / 3).bfloat16())


def test_arithmetic_is_done_in_float64_and_rounded_when_stored() -> None:
    a, b, c = (torch.tensor([value]).half() for value in (1000.0, 0.3, 1000.0))
    sources = {"a": a, "b": b, "c": c}
    value = row_value(row("x", "sub(add(a, b), c)", (1,), "F16"), sources.__getitem__, lambda name: "F16")
    assert value.dtype == torch.float16
    assert torch.equal(value, b)
    with pytest.raises(PlanError, match="no expression"):
        row_value(row("x", None, (1,), status="new"), sources.__getitem__, lambda name: "F16")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_put", full)
    plan = Plan((row("x", "a", (3,)),))
    fails(tmp_path, {"a": torch.ones(3)}, plan, "cannot be written: No space left", "df -h", CheckpointError)


def test_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "row_value", interrupted)
    plan = Plan((row("x", "a", (3,)),))
    fails(tmp_path, {"a": torch.ones(3)}, plan, "", error=KeyboardInterrupt)


def test_a_source_cut_short_while_it_is_copied(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3000)}, tmp_path / "m.safetensors")
    opened = checkpoint.open(tmp_path / "m.safetensors")
    os.truncate(tmp_path / "m.safetensors", 1000)
    plan = Plan((row("x", "a", (3000,)),))
    fails(tmp_path, opened, plan, "ends", "again", CheckpointError)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    plan = Plan((row("a", "a", (1,)),))
    (tmp_path / "folder.safetensors").mkdir()
    for out, message, hint in [
        ("m.bin", "only safetensors are written", "m.safetensors"),
        ("folder.safetensors", "a folder", "file"),
        ("gone/m.safetensors", "its folder does not exist", "mkdir -p"),
        (f"{'x' * 300}.safetensors", "cannot be written", "Nothing was left behind"),
    ]:
        for call in (lambda out: write({"a": torch.ones(1)}, plan, out), lambda out: save({"a": torch.ones(1)}, out)):
            with pytest.raises(CheckpointError) as caught:
                call(tmp_path / out)
            assert message in str(caught.value)
            assert hint in caught.value.hint
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_the_file_has_ordinary_rights(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    out = save({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    assert out.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_memory_stays_constant(tmp_path: Path) -> None:
    """160 MiB through copies and transposes, in far less memory than that."""
    tensors = {f"t{i}": torch.full((1024, 2048), float(i)) for i in range(20)}
    save_file(tensors, tmp_path / "in.safetensors")
    script = """
import resource
import torch
from surgery.expr import parse
from surgery.plan import Plan, Row, Status
from surgery.write import write

def row(index):
    expr, shape = (f"t{index}", (1024, 2048)) if index % 2 else (f"transpose(t{index})", (2048, 1024))
    return Row(f"x{index}", Status.FILLED, parse(expr), shape, "F32")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

small = {"t0": torch.ones(1024, 2048)}
write(small, Plan((row(0),)), "warm.safetensors")
before = peak()
write("in.safetensors", Plan(tuple(row(index) for index in range(20))), "out.safetensors")
assert peak() - before < 50, peak() - before
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)


# --- state dicts -----------------------------------------------------------------------------------------------------


def test_save_writes_shared_and_strided_tensors_under_every_name(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    tensors = {"flag": torch.tensor(True), "a": weight, "b": weight, "turned": weight.t(), "part": weight[1]}
    written = load_file(save(tensors, str(tmp_path / "m.safetensors"), metadata={"x": "y"}))
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.open(tmp_path / "m.safetensors").metadata == {"format": "pt", "x": "y"}


def test_save_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    for tensors, message in [
        ({"a": torch.ones(1), "n": 3}, "not tensors: n"),
        ({"state_dict": {"a": torch.ones(1)}}, "not tensors: state_dict"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "no type for C128"),
        ({"a": torch.ones(1, device="meta")}, "meta device"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({}, "no tensors"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            save(tensors, tmp_path / "m.safetensors")  # type: ignore[arg-type]
        assert message in str(caught.value)
        assert caught.value.hint
        assert os.listdir(tmp_path) == []


def test_writing_imports_no_torch_where_nothing_is_computed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    script = """
import sys
from surgery.expr import parse
from surgery.plan import Plan, Row, Status
from surgery.write import write
write("m.safetensors", Plan((Row("x", Status.FILLED, parse("a"), (3,), "F32"),)), "out.safetensors")
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    assert load_file(tmp_path / "out.safetensors")["x"].tolist() == [1.0, 1.0, 1.0]
