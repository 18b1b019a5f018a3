"""The tree that `zoo show` prints: parts, folding, counts."""

from __future__ import annotations

from surgery import TensorInfo
from zoo.entry import Entry, Part, Source
from zoo.show import Section, render, sections, totals, tree


def info(*shape: int, dtype: str = "F32") -> TensorInfo:
    count = 1
    for extent in shape:
        count *= extent
    return TensorInfo(shape, dtype, count * 4)


def names(tensors: dict[str, TensorInfo]) -> dict[str, int]:
    return {name: times for node in tree(tensors) for name, _, times in node.tensors()}


def test_equal_blocks_fold() -> None:
    tensors = {f"layer.{i}.{name}": info(2) for i in range(12) for name in ("a.w", "b.w")}
    assert names(tensors) == {"layer.{0..11}.a.w": 12, "layer.{0..11}.b.w": 12}


def test_blocks_of_other_shape_or_dtype_stay_apart() -> None:
    shapes = [info(2), info(2), info(3), info(2, dtype="F16"), info(2, dtype="F16")]
    tensors = {f"layer.{i}.w": shape for i, shape in enumerate(shapes)}
    assert names(tensors) == {"layer.{0..1}.w": 2, "layer.2.w": 1, "layer.{3..4}.w": 2}


def test_a_gap_in_the_numbers_ends_a_run() -> None:
    assert names({f"{i}.w": info(1) for i in (0, 1, 3)}) == {"{0..1}.w": 2, "3.w": 1}


def test_numbers_sort_as_numbers() -> None:
    assert names({f"b.{i}": info(1) for i in (10, 0, 9, 1)}) == {"b.{0..1}": 2, "b.{9..10}": 2}


def test_blocks_within_blocks() -> None:
    tensors = {f"s.{i}.b.{j}.w": info(2) for i in range(2) for j in range(3)}
    assert names(tensors) == {"s.{0..1}.b.{0..2}.w": 6}
    assert tree(tensors)[0].parameters == 12


def test_a_name_that_is_tensor_and_prefix() -> None:
    assert names({"a": info(1), "a.b": info(2)}) == {"a": 1, "a.b": 1}


def test_integers_are_not_parameters() -> None:
    tensors = {"ids": info(5, dtype="I64"), "w": info(5), "h": info(5, dtype="BF16"), "mask": info(5, dtype="BOOL")}
    assert totals(tensors)["parameters"] == 10
    assert "buffer" in render([Section("", tree(tensors), tensors)])


def test_each_tensor_stands_under_its_smallest_part() -> None:
    entry = Entry(
        "net",
        tags={"x": (Source("hub", "o/r"),)},
        default_tag="x",
        parts=(Part("embeddings", {"": ("emb.*",)}), Part("encoder", {"": ("emb.*", "enc.*")})),
    )
    tensors = {"emb.w": info(2), "enc.0.w": info(3), "enc.1.w": info(3), "extra": info(7)}
    found = {section.name: section for section in sections(tensors, entry)}
    assert {name: section.parameters for name, section in found.items()} == {
        "embeddings": 2,
        "encoder": 8,
        "(other)": 7,
    }
    assert found["encoder"].shared == ("embeddings",)
    assert [name for node in found["encoder"].nodes for name, *_ in node.tensors()] == ["enc.{0..1}.w"]
    text = render(list(found.values()))
    assert "encoder (with embeddings)" in text
    assert "enc.{0..1}.w" in text
    assert "6 (2 x 3)" in text


def test_without_an_entry_it_is_one_tree() -> None:
    assert render(sections({"w": info(2, 3)}, None)) == "w  F32 [2, 3]  6"
