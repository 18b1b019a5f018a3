"""surgery.diff: what is the same, renamed, changed or absent, and what is read to know it."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.diff import Diff, Difference, diff


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def only(found: Diff) -> Difference:
    (row,) = found.rows
    return row


def test_the_same() -> None:
    tensors = {"a": seeded(3, 4), "b": torch.tensor(3), "empty": torch.zeros(0, 2)}
    found = diff(tensors, {name: tensors[name].clone() for name in reversed(tensors)})
    assert found.same
    assert found.counts == {"same": 3}
    assert diff({"a": seeded(3)}, {"a": seeded(3)}).as_dict()["same"] is True


def test_a_change_is_measured() -> None:
    a, b = seeded(50, 7), seeded(50, 7)
    b[3, 2] += 0.5
    row = only(diff({"w": a}, {"w": b}))
    delta = (b.double() - a.double()).norm()
    assert (row.status, row.elements) == ("changed", 1)
    assert row.relative == pytest.approx(float(delta / a.double().norm()), rel=1e-12)
    assert row.largest == pytest.approx(0.5, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 400),
    pair=st.sampled_from(
        [
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float32),
            (torch.float64, torch.float16),
            (torch.int64, torch.int32),
            (torch.complex64, torch.complex64),
        ]
    ),
    seed=st.integers(0, 9),
)
def test_measures_agree_with_torch(count: int, pair: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    a, b = ((10 * seeded(count, seed=s)).to(dtype) for s, dtype in zip((seed, seed + 1), pair, strict=True))
    row = only(diff({"w": a}, {"w": b}))
    wide = torch.complex128 if a.is_complex() else torch.float64
    delta = b.to(wide) - a.to(wide)
    if row.status == "same":
        assert not delta.any()
        return
    assert row.retyped == (pair[0] is not pair[1])
    assert row.elements == int((delta != 0).sum())
    assert row.relative is not None
    if a.to(wide).norm():
        assert row.relative == pytest.approx(float(delta.norm() / a.to(wide).norm()), rel=1e-9)


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = seeded(1000, 3), seeded(1000, 3, seed=1)
    whole = only(diff({"w": a}, {"w": b}))
    monkeypatch.setattr("surgery.diff._CHUNK", 256)
    cut = only(diff({"w": a}, {"w": b}))
    assert (cut.elements, cut.largest) == (whole.elements, whole.largest)
    assert cut.relative == pytest.approx(whole.relative, rel=1e-12)


def test_a_cast_is_named() -> None:
    row = only(diff({"w": seeded(9)}, {"w": seeded(9).bfloat16()}))
    assert (row.status, row.retyped, row.reshaped) == ("changed", True, False)
    assert row.relative is not None
    assert 0 < row.relative < 1e-2
    exact = only(diff({"w": torch.ones(3)}, {"w": torch.ones(3, dtype=torch.float16)}))
    assert (exact.status, exact.relative, exact.elements, exact.notes) == ("changed", 0.0, 0, ())


def test_other_shapes_are_not_measured() -> None:
    row = only(diff({"w": seeded(4, 6)}, {"w": seeded(4, 7)}))
    assert (row.status, row.reshaped, row.relative) == ("changed", True, None)
    same_bytes = only(diff({"w": seeded(4, 6)}, {"w": seeded(4, 6).reshape(24)}))
    assert same_bytes.notes == ("the same bytes in another shape",)


@pytest.mark.parametrize(
    ("one", "two", "elements", "largest"),
    [
        ([1.0, math.nan], [1.0, 2.0], 1, math.inf),
        ([1.0, math.inf], [2.0, math.inf], 1, 1.0),
        ([0.0, 0.0], [0.0, 1.0], 1, 1.0),
        ([0.0, 1.0], [-0.0, 1.0], 0, 0.0),
    ],
)
def test_numbers_that_are_none(one: list[float], two: list[float], elements: int, largest: float) -> None:
    row = only(diff({"w": torch.tensor(one)}, {"w": torch.tensor(two)}))
    assert (row.elements, row.largest) == (elements, largest)
    said = row.as_dict()
    assert said["largest"] is None or math.isfinite(said["largest"])
    assert said["relative"] is None or math.isfinite(said["relative"])


def test_renamed_by_bytes() -> None:
    a = {"x.q.weight": seeded(4, 4), "x.k.weight": seeded(4, 4, seed=1), "gone": seeded(2)}
    b = {"y.k.weight": a["x.k.weight"], "y.q.weight": a["x.q.weight"], "come": seeded(3)}
    found = diff(a, b)
    assert {(row.left, row.right) for row in found.of("renamed")} == {
        ("x.q.weight", "y.q.weight"),
        ("x.k.weight", "y.k.weight"),
    }
    assert [row.left for row in found.of("left")] == ["gone"]
    assert [row.right for row in found.of("right")] == ["come"]
    assert not found.same


def test_equal_contents_pair_by_how_their_names_end() -> None:
    zeros = torch.zeros(64)
    a = {"one.norm.bias": zeros, "one.lin.bias": zeros}
    b = {"two.lin.bias": zeros, "two.norm.bias": zeros}
    rows = diff(a, b).of("renamed")
    assert {(row.left, row.right) for row in rows} == {
        ("one.norm.bias", "two.norm.bias"),
        ("one.lin.bias", "two.lin.bias"),
    }
    assert all(row.notes == ("one of 2 with these bytes",) for row in rows)


@pytest.mark.parametrize("shape", [(5, 8), (8, 8), (3, 4, 7)])
def test_transposed_under_another_name_and_under_its_own(shape: tuple[int, ...]) -> None:
    w = seeded(*shape)
    axes = tuple(reversed(range(len(shape))))
    turned = w.permute(axes).contiguous()
    assert only(diff({"w": w}, {"v": turned})).axes == axes
    own = only(diff({"w": w}, {"w": turned}))
    assert (own.status, own.axes) == ("changed", axes)
    turned[1, 1] += 1
    assert {row.status for row in diff({"w": w}, {"v": turned}).rows} == {"left", "right"}


def test_swapped_tensors_are_named() -> None:
    q, k = seeded(6, 6), seeded(6, 6, seed=1)
    found = diff({"q": q, "k": k}, {"q": k, "k": q})
    assert {row.name: row.notes for row in found.rows} == {"q": ("now what k was",), "k": ("now what q was",)}


def test_ties() -> None:
    w = seeded(9, 4)
    tied = {"in": w, "out": w, "zero": torch.zeros(5), "nought": torch.zeros(5)}
    apart = {**tied, "out": w + 1, "zero": torch.zeros(5), "nought": torch.zeros(5)}
    found = diff(tied, apart)
    assert found.left_ties == (("in", "out"),)
    assert found.right_ties == ()
    once = diff(tied, {"in": w, "zero": torch.zeros(5), "nought": torch.zeros(5)})
    assert [(row.name, row.notes) for row in once.of("left")] == [("out", ("tied to in, which both have",))]


@pytest.mark.parametrize("ending", ["safetensors", "pt", "npz"])
def test_formats_compare(tmp_path: Path, ending: str) -> None:
    tensors = {"a": seeded(3, 4), "b": seeded(5)}
    save_file(tensors, tmp_path / "a.safetensors")
    other = tmp_path / f"b.{ending}"
    if ending == "safetensors":
        save_file(tensors, other)
    elif ending == "pt":
        torch.save(tensors, other)
    else:
        import numpy

        numpy.savez_compressed(other, **{name: t.numpy() for name, t in tensors.items()})
    assert diff(tmp_path / "a.safetensors", other).same


def test_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on one side only, and has no partner of its size, is not read past its ends; nothing is hashed."""
    save_file({"a": seeded(100, 100), "same": seeded(7)}, tmp_path / "a.safetensors")
    save_file({"b": seeded(90, 100), "same": seeded(7)}, tmp_path / "b.safetensors")

    def never(self: object, name: str) -> str:
        raise AssertionError(name)

    monkeypatch.setattr(surgery.Checkpoint, "content_hash", never)
    read: list[int] = []
    from surgery.reader import LocalFile

    real = LocalFile.read_into

    def counted(self: LocalFile, buffer: memoryview, offset: int) -> None:
        read.append(len(buffer))
        real(self, buffer, offset)

    left, right = surgery.open(tmp_path / "a.safetensors"), surgery.open(tmp_path / "b.safetensors")
    monkeypatch.setattr(LocalFile, "read_into", counted)
    assert diff(left, right).counts == {"same": 1, "left": 1, "right": 1}
    assert sum(read) < 1000


def test_memory_is_constant(tmp_path: Path) -> None:
    """Of a tensor of 64 MB, compared, hashed and measured, never more than a few chunks are held."""
    big = torch.zeros(4096, 4096)
    big[0] = 1
    changed = big.clone()
    changed[7, 7] = 3
    save_file({"w": big, "old": changed}, tmp_path / "a.safetensors")
    save_file({"w": changed, "new": big}, tmp_path / "b.safetensors")
    left, right = surgery.open(tmp_path / "a.safetensors"), surgery.open(tmp_path / "b.safetensors")
    tracemalloc.start()
    try:
        found = diff(left, right)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.counts == {"changed": 1, "left": 1, "right": 1}
    assert peak < 40e6


def test_unreadable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(surgery.CheckpointError):
        diff(tmp_path / "nothing.safetensors", {"a": seeded(2)})
