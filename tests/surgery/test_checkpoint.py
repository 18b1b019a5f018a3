"""Checkpoints: what is known without reading, what a read costs, views, hashes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from surgery import checkpoint, dtypes
from surgery.checkpoint import TensorInfo, raw_bytes
from surgery.errors import CheckpointError
from surgery.plan import structure_hash

DTYPES = [
    "BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64", "C64",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
]  # fmt: skip


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, also where == says no (NaN) or does not exist (float8)."""
    return left.dtype == right.dtype and left.shape == right.shape and raw_bytes(left, "") == raw_bytes(right, "")


def some(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    kind = dtypes.torch_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)
    size = int(np.prod(shape)) * kind.itemsize
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), generator=generator, dtype=torch.uint8)
    return raw.view(kind).reshape(shape)


def as_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "m.safetensors")
    return folder / "m.safetensors"


def as_torch(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "m.pt")
    return folder / "m.pt"


def as_legacy_torch(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "m.bin", _use_new_zipfile_serialization=False)
    return folder / "m.bin"


def as_npz(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    np.savez(folder / "m.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return folder / "m.npz"


def as_compressed_npz(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    np.savez_compressed(folder / "m.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return folder / "m.npz"


def as_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def as_mapping(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


WAYS = [as_safetensors, as_torch, as_legacy_torch, as_npz, as_compressed_npz, as_shards, as_mapping]


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_the_same_checkpoint(way: Callable[..., object], tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "odd": torch.tensor([True, False, True]),
        "a name/with spaces:0": torch.arange(6, dtype=torch.int64).reshape(1, 2, 3),
        "half": torch.ones(3, dtype=torch.float16),
    }
    opened = checkpoint.open(way(tmp_path, tensors))
    assert set(opened) == set(tensors)
    assert len(opened) == len(tensors)
    assert opened["matrix"] == TensorInfo((7, 5), "F32", 140)
    assert opened["empty"] == TensorInfo((0, 4), "F32", 0)
    assert opened["scalar"] == TensorInfo((), "F64", 8)
    reference = checkpoint.open(tensors)
    assert opened.structure_hash() == reference.structure_hash()
    for name, tensor in tensors.items():
        assert same(opened.read(name), tensor)
        assert opened.content_hash(name) == reference.content_hash(name)
        assert opened.content_hash(name) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    cut = (slice(2, 5), slice(None, None, 2))
    assert torch.equal(opened.read("matrix", cut), tensors["matrix"][cut])
    assert torch.equal(opened.read("matrix", (slice(-3, 100, 2),)), tensors["matrix"][-3:100:2])
    assert opened.read("matrix", (slice(5, 2),)).shape == (0, 5)
    assert opened.read("empty", (slice(0, 3), slice(1, 2))).shape == (0, 1)
    assert torch.equal(opened.read("scalar", ()), tensors["scalar"])


@pytest.mark.parametrize("way", [as_safetensors, as_torch, as_shards, as_mapping])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(way: Callable[..., object], dtype: str, tmp_path: Path) -> None:
    tensor = some(dtype, (3, 5))
    opened = checkpoint.open(way(tmp_path, {"x": tensor}))
    assert opened["x"] == TensorInfo((3, 5), dtype, 15 * tensor.element_size())
    assert same(opened.read("x"), tensor)
    assert same(opened.read("x", (slice(1, 3),)), tensor[1:3])


def test_packed_four_bit_floats_keep_the_shape_that_the_file_states(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.uint8).reshape(4, 3).view(torch.float4_e2m1fn_x2)
    save_file({"x": tensor}, tmp_path / "m.safetensors")
    opened = checkpoint.open(tmp_path / "m.safetensors")
    assert opened["x"] == TensorInfo((4, 6), "F4", 12) == checkpoint.open({"x": tensor})["x"]
    assert same(opened.read("x"), tensor)


def test_a_type_that_torch_lacks_is_listed_and_hashed_and_refused_only_when_read(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    opened = checkpoint.open(tmp_path / "m.safetensors")
    assert opened["x"] == TensorInfo((4,), "F6_E2M3", 3)
    assert opened.content_hash("x") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(CheckpointError, match="has no type for F6_E2M3"):
        opened.read("x")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    cuts=st.lists(st.slices(5).filter(lambda cut: (cut.step or 1) > 0), max_size=3).map(tuple),
    way=st.sampled_from([as_safetensors, as_npz, as_mapping]),
)
def test_slices_are_those_of_torch(
    shape: tuple[int, ...], cuts: tuple[slice, ...], way: Callable[..., object], tmp_path: Path
) -> None:
    tensor = some("I32", shape)
    opened = checkpoint.open(way(tmp_path, {"pad": some("BOOL", (3,)), "x": tensor}))
    if len(cuts) > len(shape):
        with pytest.raises(CheckpointError, match="slices for a tensor of shape"):
            opened.read("x", cuts)
    else:
        assert same(opened.read("x", cuts), tensor[cuts])


@pytest.mark.parametrize("cuts", [(slice(None, None, -1),), [slice(0, 1)], (0,)])
def test_impossible_slices_are_refused(cuts: object, tmp_path: Path) -> None:
    for source in (as_safetensors(tmp_path, {"x": torch.ones(3)}), {"x": torch.ones(3)}):
        with pytest.raises(CheckpointError, match="slices"):
            checkpoint.open(source).read("x", cuts)  # type: ignore[arg-type]


def test_structure_imports_no_torch(tmp_path: Path) -> None:
    as_safetensors(tmp_path, {"a.b": torch.ones(2, 3), "c": torch.ones(1)})
    (tmp_path / "sharded").mkdir()
    as_shards(tmp_path / "sharded", {"a": torch.ones(2, 3), "c": torch.ones(1)})
    np.savez(tmp_path / "m.npz", a=np.ones((2, 3)))
    script = f"""
import sys
from surgery import checkpoint
for source in ({str(tmp_path / "m.safetensors")!r}, {str(tmp_path / "sharded")!r}, {str(tmp_path / "m.npz")!r}):
    opened = checkpoint.open(source)
    name = next(iter(opened))
    part = opened.view({{"new": name for name in opened}})
    print(len(opened), opened.structure_hash(), opened.content_hash(name), opened.span(name), part)
    if not source.endswith("npz"):
        assert "numpy" not in sys.modules
assert "torch" not in sys.modules and "safetensors" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_read_maps_the_file_and_writing_into_it_leaves_the_file_alone(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path, {"x": torch.zeros(4, 4)})
    before = path.read_bytes()
    opened = checkpoint.open(path)
    first, second = opened.read("x"), opened.read("x", (slice(1, 2),))
    assert second.data_ptr() == first[1].data_ptr()
    first += 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("unaligned", [0, 1])
def test_slicing_reads_only_what_is_asked_for(unaligned: int, tmp_path: Path) -> None:
    """A file of 4 GiB, sparse on disk, whose rows are read in no time and memory."""
    rows = 1 << 20
    header = json.dumps({"x": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
    header += b" " * (-len(header) % 8 + unaligned)
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 4096)
    opened = checkpoint.open(path)
    assert opened.read("x", (slice(rows - 2, rows), slice(0, 3))).tolist() == [[0.0] * 3] * 2


def test_unaligned_tensors_are_copied_row_by_row(tmp_path: Path) -> None:
    data = torch.arange(6, dtype=torch.float32).reshape(3, 2)
    header = json.dumps(
        {
            "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "x": {"dtype": "F32", "shape": [3, 2], "data_offsets": [1, 25]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\7" + data.numpy().tobytes())
    opened = checkpoint.open(path)
    assert torch.equal(opened.read("x"), data)
    assert torch.equal(opened.read("x", (slice(1, 3), slice(0, 1))), data[1:3, 0:1])


def test_a_file_replaced_after_opening_is_still_the_file_that_was_opened(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path, {"x": torch.zeros(4)})
    opened = checkpoint.open(path)
    save_file({"x": torch.ones(4)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    assert opened.read("x").tolist() == [0.0] * 4


def test_tensors_outlive_their_checkpoint(tmp_path: Path) -> None:
    tensor = checkpoint.open(as_safetensors(tmp_path, {"x": torch.ones(1000)})).read("x")
    (tmp_path / "m.safetensors").unlink()
    assert tensor.sum() == 1000


def test_metadata_and_files(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    opened = checkpoint.open(str(tmp_path / "m.safetensors"))
    assert opened.metadata == {"format": "pt"}
    assert opened.files == (tmp_path / "m.safetensors",)
    assert opened.source == str(tmp_path / "m.safetensors")
    assert opened.notes == ()
    assert "m.safetensors: 1 tensors" in repr(opened)
    assert opened != checkpoint.open(tmp_path / "m.safetensors")


def test_views_rename_and_choose_lazily(tmp_path: Path) -> None:
    opened = checkpoint.open(
        as_safetensors(tmp_path, {"a.x": torch.ones(2), "a.y": torch.zeros(3), "b": torch.ones(1)})
    )
    part = opened.view(name for name in opened if name.startswith("a."))
    assert set(part) == {"a.x", "a.y"}
    renamed = part.view({"x": "a.x", "also x": "a.x"})
    assert list(renamed) == ["x", "also x"]
    assert renamed["x"] == opened["a.x"]
    assert torch.equal(renamed.read("also x", (slice(0, 1),)), torch.ones(1))
    assert renamed.content_hash("x") == opened.content_hash("a.x")
    assert renamed.span("x") == opened.span("a.x")
    assert renamed.files == opened.files
    with pytest.raises(CheckpointError, match=r"no tensor named 'a\.z'") as caught:
        opened.view(["a.z"])
    assert "a.x" in caught.value.hint
    with pytest.raises(CheckpointError, match="several names"):
        opened.view("b")
    with pytest.raises(CheckpointError, match="no tensor named"):
        renamed.read("a.x")
    with pytest.raises(KeyError):
        opened["a.z"]


def test_a_checkpoint_passes_through() -> None:
    opened = checkpoint.open({"x": torch.ones(1)})
    assert checkpoint.open(opened) is opened


def test_a_mapping_is_not_copied() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = nn.Parameter(torch.ones(2))
    tensors = {
        "whole": base,
        "strided": base.t(),
        "shared": base[1],
        "parameter": parameter,
        "meta": torch.empty(5, 6, dtype=torch.bfloat16, device="meta"),
        "conj": torch.view_as_complex(torch.ones(2, 2)).conj(),
    }
    opened = checkpoint.open(tensors)
    assert opened.source == "<mapping>"
    assert opened.files == ()
    assert opened.read("whole").data_ptr() == base.data_ptr()
    assert opened.read("strided").data_ptr() == base.data_ptr()
    assert opened.read("parameter").data_ptr() == parameter.data_ptr()
    assert not opened.read("parameter").requires_grad
    assert opened["strided"] == TensorInfo((4, 3), "F32", 48)
    assert opened["meta"] == TensorInfo((5, 6), "BF16", 60)
    assert opened.read("meta").is_meta
    assert opened.content_hash("strided") == hashlib.sha256(base.t().contiguous().numpy().tobytes()).hexdigest()
    assert opened.content_hash("conj") == checkpoint.open({"x": tensors["conj"].resolve_conj()}).content_hash("x")
    with pytest.raises(CheckpointError, match="meta device"):
        opened.content_hash("meta")


def test_structure_hash_depends_on_names_dtypes_and_shapes_alone() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        return checkpoint.open(tensors).structure_hash()

    one = digest(a=torch.ones(2, 3), b=torch.ones(1))
    assert one == digest(b=torch.zeros(1), a=torch.zeros(2, 3))
    assert one == structure_hash(checkpoint.open({"a": torch.ones(2, 3), "b": torch.ones(1)})), "a plan's own hash"
    assert one != digest(a=torch.ones(3, 2), b=torch.ones(1))
    assert one != digest(a=torch.ones(2, 3).half(), b=torch.ones(1))
    assert one != digest(a=torch.ones(2, 3), c=torch.ones(1))


@pytest.mark.parametrize("source", [3, None, "", nn.Linear(2, 2)])
def test_what_is_no_checkpoint_is_said(source: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(source)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_and_quantized_tensors_are_listed_and_refused_when_read() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    opened = checkpoint.open({"sparse": torch.eye(3).to_sparse(), "quantized": quantized})
    assert opened["sparse"].shape == (3, 3)
    assert opened["quantized"].dtype == "qint8"
    with pytest.raises(CheckpointError, match="sparse_coo tensor"):
        opened.read("sparse")
    with pytest.raises(CheckpointError, match="quantized tensor"):
        opened.read("quantized")
