"""Formats: which file is what, and a table of bad files, each with one clear message and a next step."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from surgery import checkpoint, formats, ops
from surgery.errors import CheckpointError, SurgeryError
from surgery.formats import Format
from surgery.memory import MemoryReader
from surgery.reader import Reader

DANGER = "danger.txt"


class Code:
    """Unpickling this would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {DANGER}",)


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: object = (2,), dtype: object = "F32", offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = save({"a": torch.ones(4), "b": torch.zeros(2, 2)})

BROKEN_SAFETENSORS = {
    "three bytes": (b"\xff\0\0", "too few for a safetensors file"),
    "header longer than the file": (GOOD[:40], "truncated: the header takes"),
    "data cut off": (GOOD[:-4], "truncated: 'b' ends at byte 32 of the data, the file has 28"),
    "data too long": (GOOD + b"1234", "4 bytes after the last tensor belong to no tensor"),
    "absurd header length": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "header is not JSON": (safetensors_bytes(b"{nonsense}"), "the header is not JSON"),
    "header is not UTF-8": (safetensors_bytes(b'{"\xff\xfe": 1}'), "the header is not JSON"),
    "header is a list": (safetensors_bytes([1]), "the header is not a JSON object"),
    "header nested without end": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "the header is not JSON"),
    "name twice": (
        safetensors_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "the header names 'a' twice",
    ),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'b' overlap those of 'a'"),
    "hole": (safetensors_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "belong to no tensor"),
    "negative offset": (safetensors_bytes({"a": entry(offsets=(-8, 0))}, bytes(8)), "is not a range"),
    "offsets backwards": (safetensors_bytes({"a": entry(offsets=(8, 0))}, bytes(8)), "is not a range"),
    "outside the file": (safetensors_bytes({"a": entry((200,), offsets=(0, 800))}, bytes(8)), "truncated"),
    "wrong byte count": (safetensors_bytes({"a": entry((3,))}, bytes(8)), "takes 12 bytes, its data_offsets give 8"),
    "shape overflows": (safetensors_bytes({"a": entry((2**62, 2**62))}, bytes(8)), "its data_offsets give 8"),
    "negative shape": (safetensors_bytes({"a": entry((-2, -1))}, bytes(8)), "is not a list of sizes"),
    "shape of text": (safetensors_bytes({"a": entry("2")}, bytes(8)), "is not a list of sizes"),
    "fractional shape": (safetensors_bytes({"a": entry((2.0,))}, bytes(8)), "is not a list of sizes"),
    "true as a size": (safetensors_bytes({"a": entry((True, 2))}, bytes(8)), "is not a list of sizes"),
    "unknown dtype": (safetensors_bytes({"a": entry(dtype="F31")}, bytes(8)), "unknown dtype 'F31'"),
    "no dtype": (safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "unknown dtype None"),
    "one offset": (safetensors_bytes({"a": entry(offsets=(8,))}, bytes(8)), "is not a pair of numbers"),
    "entry is a number": (safetensors_bytes({"a": 3}), "not a JSON object"),
    "half a byte": (safetensors_bytes({"a": entry((3,), "F4", (0, 1))}, bytes(1)), "takes None bytes"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "not a map from text to text"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_SAFETENSORS.values(), ids=BROKEN_SAFETENSORS.keys())
def test_broken_safetensors(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    if "twice" not in message:  # there the library keeps the last of the two
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_exactly_where_the_library_refuses_it(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(GOOD)
    header_end = 8 + int.from_bytes(GOOD[:8], "little")
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(32, 126) | st.integers(0, 255))
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, "pt") as file:
            expected = set(file.keys())
    except SafetensorError:
        with pytest.raises(CheckpointError):
            checkpoint.open(path)
        return
    try:
        assert set(checkpoint.open(path)) == expected
    except CheckpointError as error:
        assert "twice" in str(error)  # the library keeps the last of two equal names


def test_an_empty_safetensors_file_is_a_checkpoint_of_nothing(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    assert len(checkpoint.open(tmp_path / "m.safetensors")) == 0


def zip_of(**members: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return write


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def cut(write: Callable[[Path], object], keep: float) -> Callable[[Path], None]:
    def cut_file(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return cut_file


def saved(content: object, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


OLD = {"_use_new_zipfile_serialization": False}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>404</title></head></html>"

# file name, what writes it, what the message says, what the hint says
BAD: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "empty": ("m.safetensors", raw(b""), "the file is empty", "again"),
    "empty, of torch": ("m.bin", raw(b""), "the file is empty", "again"),
    "lfs pointer": ("m.safetensors", raw(LFS), "a git-lfs pointer", "git lfs pull"),
    "lfs pointer, of torch": ("pytorch_model.bin", raw(LFS), "a git-lfs pointer", "git lfs pull"),
    "web page": ("m.safetensors", raw(PAGE), "a web page", "address of the file itself"),
    "error in XML": ("m.pt", raw(b'<?xml version="1.0"?><Error/>'), "a web page", "address of the file itself"),
    "text": ("m.safetensors", raw(b"Entry not found\n"), "it begins: 'Entry not found'", "download"),
    "text, of torch": ("m.bin", raw("Größe".encode() * 900), "a text file", "download"),
    "config": ("config.json", raw(b'{"hidden_size": 3}'), "JSON, not a checkpoint", "index"),
    "noise": ("m.dat", raw(bytes(range(128, 256)) * 9), "not a checkpoint in any format known", "file "),
    "noise, of torch": ("m.bin", raw(bytes(range(128, 256)) * 9), "not written by torch.save", "file "),
    "gguf": ("m.gguf", raw(b"GGUF\3\0\0\0" + bytes(99)), "a GGUF file", "safetensors"),
    "hdf5": ("m.h5", raw(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file", "np.savez"),
    "npy": ("m.npy", lambda path: np.save(path, np.ones(3)), "a single numpy array", "np.savez"),
    "gzip": ("m.pt.gz", raw(b"\x1f\x8b\x08" + bytes(99)), "gzip", "gunzip"),
    "tar": ("m.tar", raw(bytes(257) + b"ustar" + bytes(300)), "a tar archive", "tar xf"),
    "zip of files": ("m.zip", zip_of(**{"a.txt": b"a"}), "not a checkpoint in any format", "file "),
    "zip of files, of torch": ("m.pt", zip_of(**{"a.txt": b"a"}), "without a data.pkl", "unpack"),
    "cut torch zip": ("m.pt", cut(saved({"x": torch.ones(999)}), 0.6), "truncated: a zip", "again"),
    "cut old torch": ("m.pt", cut(saved({"x": torch.ones(999)}, **OLD), 0.6), "torch cannot load it", "again"),
    "cut npz": ("m.npz", cut(lambda path: np.savez(path, x=np.ones(999)), 0.6), "not a readable .npz", "again"),
    "npz of objects": (
        "m.npz",
        lambda path: np.savez(path, x=np.array([Code()], dtype=object)),
        "'x' is an array of Python objects",
        "np.savez",
    ),
    "npz of text": ("m.npz", lambda path: np.savez(path, x=np.array(["a"])), "no arrays of numbers", ""),
    "code": ("m.pt", saved({"x": torch.ones(1), "y": Code()}), "would call posix.system", "Do not load it"),
    "code, old": ("m.pt", saved({"x": torch.ones(1), "y": Code()}, **OLD), "would call posix.system", "safetensors"),
    "code, protocol 4": ("m.pt", saved([Code()], pickle_protocol=4), "would call posix.system", "safetensors"),
    "code, plain pickle": ("m.bin", raw(pickle.dumps(Code())), "would call posix.system", "safetensors"),
    "code, pickle of text": ("m.ckpt", raw(pickle.dumps(Code(), 0)), "would call posix.system", "safetensors"),
    "two classes": (
        "m.bin",
        raw(pickle.dumps({"args": argparse.Namespace(a=1), "p": Path("a")})),
        "would call argparse.Namespace, pathlib.PosixPath",
        "safetensors",
    ),
    "a class, and no tensors": ("m.pt", saved({"args": argparse.Namespace(a=1)}), "no tensors in it (", "names to"),
    "plain pickle of data": ("m.bin", raw(pickle.dumps({"a": 1})), "not written by torch.save", "file "),
    "tensor alone": ("m.pt", saved(torch.ones(3)), "holds Tensor, not a dict", "names to tensors"),
    "no tensors": ("m.pt", saved({"epoch": 3, "opt": {"lr": 0.1}}), "no tensors in it (entries: epoch (int)", "names"),
    "empty dict": ("m.pt", saved({}), "no tensors in it (it is empty)", "names to tensors"),
    "several": (
        "m.pt",
        saved({"student": {"x": torch.ones(1)}, "teacher": {"x": torch.ones(1)}}),
        "2 dicts of tensors in it: 'student', 'teacher'",
        ".pt\", key='student')",
    ),
    "numbers as names": ("m.pt", saved({0: torch.ones(1)}), "the name of a tensor is 0", "state_dict()"),
}


@pytest.mark.parametrize(("name", "write", "message", "hint"), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_bad_file(
    name: str,
    write: Callable[[Path], object],
    message: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    write(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name], "it was run, or something was left behind"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("m.pt", saved({"state_dict": {"a": torch.ones(4, 3), "b": torch.zeros(5).half()}, "epoch": 1})),
        ("m.bin", saved({"a": torch.ones(4, 3), "b": torch.zeros(5).half()}, **OLD)),
        ("m.npz", lambda path: np.savez(path, a=np.ones((3, 4)), b=np.zeros(3))),
        ("m.npz", lambda path: np.savez_compressed(path, a=np.ones((3, 4)), b=np.zeros(3))),
    ],
    ids=["torch", "old torch", "npz", "compressed npz"],
)
def test_damage_is_read_past_or_refused_and_nothing_else(
    name: str, write: Callable[[Path], object], tmp_path: Path
) -> None:
    """Bytes changed at random, and files cut short: libraries raise a dozen things, callers meet one."""
    path = tmp_path / name
    write(path)
    good = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        content = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content))] = chance.choice([chance.randrange(256), 0, 255])
        path.write_bytes(content if chance.random() < 0.8 else content[: chance.randrange(len(content))])
        try:
            opened = checkpoint.open(path)
            for tensor in opened:
                opened.read(tensor)
        except CheckpointError as error:
            refused += 1
            assert error.hint
            assert "\n" not in str(error)
    assert refused


def test_torchscript_without_a_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match="a TorchScript archive that cannot be read"):
        checkpoint.open(tmp_path / "m.pt")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "link.pt").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe.pt")
    for path, message, hint in [
        (tmp_path / "modle.safetensors", "no such file", "Did you mean model.safetensors?"),
        (tmp_path / "nowhere" / "m.pt", "no such file", "Check the path"),
        (tmp_path / "link.pt", "a link to a file that is not there", "ls -l"),
        (tmp_path / "pipe.pt", "not a regular file", ""),
        ("https://example.org/m.safetensors", "not a local file", "Download"),
        ("a\0b", "a null byte", ""),
        ("x" * 300, "no such file", "Check the path"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.open(path)
        assert message in str(caught.value)
        assert hint in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="no permission"):
        checkpoint.open(tmp_path / "m.safetensors")


# --- torch files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "anything"])
def test_a_nested_state_dict_is_unwrapped_and_said(key: str, tmp_path: Path) -> None:
    content = {key: {"module.x": torch.ones(2)}, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    torch.save(content, tmp_path / "m.pt")
    opened = checkpoint.open(tmp_path / "m.pt")
    assert list(opened) == ["x"]
    assert opened.notes == (
        f"The weights are under {key!r}; not read: epoch (int), optimizer (dict).",
        "Every name began with 'module.', which is left out: it is of torch's DataParallel, and of no model.",
    )
    assert checkpoint.open(content).notes == opened.notes


def test_two_wrappers_and_what_lies_beside(tmp_path: Path) -> None:
    opened = checkpoint.open({"model": {"state_dict": {"x": torch.ones(1), "version": 3}}, "ema": {"x": torch.ones(1)}})
    assert list(opened) == ["x"]
    assert opened.notes == (
        "The weights are under 'model'; not read: ema (a dict of 1 tensors).",
        "An average of the weights over training is under 'ema'; for that one: surgery.open(MAPPING['ema']).",
        "The weights are under 'state_dict'.",
        "Not tensors, and left out: version (int).",
    )
    with pytest.raises(CheckpointError, match="2 dicts of tensors in it: 'model', 'state_dict'"):
        checkpoint.open({"model": {"x": torch.ones(1)}, "state_dict": {"x": torch.ones(1)}})


def test_numpy_values_are_not_taken_for_tensors() -> None:
    with pytest.raises(CheckpointError, match="no tensors in it") as caught:
        checkpoint.open({"x": np.ones(1)})
    assert "torch.from_numpy" in caught.value.hint


def test_a_module_state_dict_with_metadata_and_ties(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    state = collections.OrderedDict(a=weight, b=weight, c=weight.detach()[1:])
    torch.save(state, tmp_path / "m.pth")
    opened = checkpoint.open(tmp_path / "m.pth")
    assert opened.read("a").data_ptr() == opened.read("b").data_ptr()
    assert torch.equal(opened.read("c"), weight[1:])


def test_torch_tensors_are_mapped_and_the_file_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"x": torch.zeros(1000)}, path)
    before = path.read_bytes()
    checkpoint.open(path).read("x").add_(1)
    assert path.read_bytes() == before


# --- npz -------------------------------------------------------------------------------------------------------------


def test_npz_of_every_make(tmp_path: Path) -> None:
    arrays = {
        "big endian": np.arange(6, dtype=">f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "double complex": np.ones(2, dtype=np.complex128),
        "params/w": np.arange(4, dtype=np.uint16),
        "bfloat16": torch.tensor([1.0, -2.5]).bfloat16().view(torch.uint16).numpy().view("V2"),
        "label": np.array(["cat", "dog"]),
    }
    for save_as in (np.savez, np.savez_compressed):
        save_as(tmp_path / "m.npz", **arrays)
        opened = checkpoint.open(tmp_path / "m.npz")
        assert set(opened) == set(arrays) - {"label"}
        for name in ("big endian", "fortran", "double complex", "params/w"):
            assert np.array_equal(opened.read(name).numpy(), arrays[name])
        assert opened["big endian"].dtype == "F32"
        assert opened["double complex"].dtype == "C128"
        assert opened.read("bfloat16").tolist() == [1.0, -2.5]
        assert opened["bfloat16"].dtype == "BF16"
        left, halves = opened.notes
        assert "label (<U3)" in left
        assert "BF16" in halves
        assert "bfloat16" in halves


def test_npz_stored_arrays_have_spans(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=np.arange(1000, dtype=np.float32), y=np.ones((0, 3)))
    opened = checkpoint.open(tmp_path / "m.npz")
    span = opened.span("x")
    assert span is not None
    assert span.file.bytes(span.offset, span.nbytes) == np.arange(1000, dtype=np.float32).tobytes()
    np.savez_compressed(tmp_path / "c.npz", x=np.ones(1000))
    assert checkpoint.open(tmp_path / "c.npz").span("x") is None


def test_npz_with_a_damaged_array_is_refused_when_it_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "m.npz", x=np.random.default_rng(0).random(5000))
    content = bytearray((tmp_path / "m.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="m.npz"):
        checkpoint.open(tmp_path / "m.npz").read("x")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz_naming_an_array_twice(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=np.ones(1))
    with zipfile.ZipFile(tmp_path / "m.npz", "a") as archive:
        archive.writestr("x.npy", archive.read("x.npy"))
    with pytest.raises(CheckpointError, match="'x' is in the archive twice"):
        checkpoint.open(tmp_path / "m.npz")


# --- shards and folders ----------------------------------------------------------------------------------------------


def index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


def test_shards_of_torch_files_and_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(2), "extra": torch.zeros(1)}, tmp_path / "part" / "two.bin")
    path = index(tmp_path, {"a": "one.bin", "b": "part/two.bin"}, "pytorch_model.bin.index.json")
    for source in (path, tmp_path):
        opened = checkpoint.open(source)
        assert set(opened) == {"a", "b"}
        assert opened.read("b").shape == (2,)
        assert opened.files == (path, tmp_path / "one.bin", tmp_path / "part" / "two.bin")
        assert "In a file but not in the index, and left out: extra (part/two.bin)." in opened.notes


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_prefix_is_told_from_all_shards(wrapped: bool, tmp_path: Path) -> None:
    """In one of them every name may begin with what is a name of the model's own."""
    second = "module.b" if wrapped else "head.b"
    torch.save({"module.a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({second: torch.zeros(2)}, tmp_path / "2.bin")
    weight_map = {"module.a": "1.bin", second: "2.bin"}
    (tmp_path / "m.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened = checkpoint.open(tmp_path / "m.bin.index.json")
    assert list(opened) == (["a", "b"] if wrapped else ["module.a", "head.b"])
    assert [opened.read(name)[0].item() for name in opened] == [1, 0]
    assert len(opened.notes) == wrapped


def test_shards_that_are_links_out_of_the_folder_as_in_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "blobs" / "4d7a")
    (tmp_path / "snapshot" / "model-1.safetensors").symlink_to("../blobs/4d7a")
    index(tmp_path / "snapshot", {"a": "model-1.safetensors"})
    assert checkpoint.open(tmp_path / "snapshot").read("a").tolist() == [1.0]


BAD_INDEX: dict[str, tuple[object, str]] = {
    "missing file": ({"a": "one.safetensors", "b": "two.safetensors"}, "1 of 2 files of the checkpoint are missing"),
    "absent tensor": ({"a": "one.safetensors", "z": "one.safetensors"}, "z (one.safetensors)"),
    "up": ({"a": "../one.safetensors"}, "outside its folder: '../one.safetensors'"),
    "up and down": ({"a": "x/../../one.safetensors"}, "outside its folder"),
    "absolute": ({"a": "/etc/passwd"}, "outside its folder"),
    "backslash": ({"a": "..\\one.safetensors"}, "outside its folder"),
    "drive": ({"a": "C:one.safetensors"}, "outside its folder"),
    "itself": ({"a": "model.safetensors.index.json"}, "names another index"),
    "number": ({"a": 3}, "gives 3 as the file of 'a'"),
    "list": (["a"], "no weight_map"),
    "nothing": ({}, "no weight_map"),
}


@pytest.mark.parametrize(("weight_map", "message"), BAD_INDEX.values(), ids=BAD_INDEX.keys())
def test_bad_index(weight_map: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    path = index(tmp_path / "in", weight_map)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(path)
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"weight_map": {"a": "x", "a": "y"}}', "'a' twice"), ("{}", "no weight_map")],
)
def test_index_that_is_no_index(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(tmp_path)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"one\.safetensors: a git-lfs pointer"):
        checkpoint.open(index(tmp_path, {"a": "one.safetensors"}))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "other.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state_0.pth"], "pytorch_model.bin"),
        (["diffusion_pytorch_model.safetensors", "x.npz"], "diffusion_pytorch_model.safetensors"),
        (["best.ckpt"], "best.ckpt"),
        (["x.npz"], "x.npz"),
    ],
)
def test_the_checkpoint_of_a_folder(names: list[str], chosen: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        if name.endswith("safetensors"):
            save_file({name: torch.ones(1)}, tmp_path / name)
        elif name.endswith("npz"):
            np.savez(tmp_path / name, **{name: np.ones(1)})
        else:
            torch.save({name: torch.ones(1)}, tmp_path / name)
    opened = checkpoint.open(tmp_path)
    assert list(opened) == [chosen]
    assert opened.files == (tmp_path / chosen,)
    passed = [name for name in names if name != chosen and name not in ("training_args.bin", "optimizer.pt")]
    for name in passed:
        if not name.startswith("rng_state"):
            assert name in opened.notes[-1]


def test_folders_without_an_answer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it holds no files"):
        checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it holds config\.json"):
        checkpoint.open(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="no index"):
        checkpoint.open(tmp_path)
    for name in ("one.pt", "two.ckpt"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 checkpoints in it: one\.pt, two\.ckpt") as caught:
        checkpoint.open(tmp_path)
    assert str(tmp_path / "one.pt") in caught.value.hint


# --- a plugin's formats ----------------------------------------------------------------------------------------------


def open_words(path: Path) -> dict[str, torch.Tensor]:
    return {word: torch.ones(len(word)) for word in path.read_text().split()[1:]}


def sniff_words(path: Path, head: bytes) -> bool:
    return head.startswith(b"WORDS")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_registered", {})


@pytest.mark.usefixtures("registry")
def test_a_registered_format(tmp_path: Path) -> None:
    (tmp_path / "m.words").write_text("WORDS a bcd")
    with pytest.raises(CheckpointError, match="a text file"):
        checkpoint.open(tmp_path / "m.words")
    words = Format("words", (".words",), sniff_words, open_words)
    formats.register(words)
    formats.register(words)
    for source in (tmp_path / "m.words", tmp_path):
        opened = checkpoint.open(source)
        assert {name: info.shape for name, info in opened.items()} == {"a": (1,), "bcd": (3,)}
        assert opened.files == (tmp_path / "m.words",)
    with pytest.raises(SurgeryError, match="registered already"):
        formats.register(Format("words", (".words",), sniff_words, lambda path: {}))
    with pytest.raises(SurgeryError, match="registered already"):
        formats.register(Format("torch", (".pt",), sniff_words, open_words))


@pytest.mark.usefixtures("registry")
def test_a_format_may_give_a_reader_of_its_own_or_be_an_import_string(tmp_path: Path) -> None:
    (tmp_path / "m.words").write_text("WORDS a")

    def reader(path: Path) -> Reader:
        return MemoryReader(open_words(path), source="words of " + path.name)

    formats.register(Format("words", (".words",), sniff_words, reader))
    assert checkpoint.open(tmp_path / "m.words").source == "words of m.words"


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("opener", "message"),
    [
        ("nowhere_at_all:open", "cannot be imported"),
        ("surgery.formats", "not an import string"),
        ("surgery.formats:nothing", "cannot be imported"),
        (lambda path: 3, "gave a int"),
    ],
)
def test_a_format_that_cannot_be_opened(opener: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.words").write_text("WORDS a")
    formats.register(Format("words", (".words",), sniff_words, opener))
    with pytest.raises(SurgeryError, match=message):
        checkpoint.open(tmp_path / "m.words")


def test_ops_are_registered_where_ops_are_kept() -> None:
    formats.register(ops.get("cat"))
    formats.register("surgery.ops.layout:cat" if hasattr(ops.layout, "cat") else ops.get("cat"))
    with pytest.raises(SurgeryError, match="neither a checkpoint format nor an op"):
        formats.register(3)


def test_formats_import_neither_torch_nor_numpy() -> None:
    script = "import sys, surgery.formats; assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_tensor_compared_with_a_file_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.reader.CHUNK", 16)
    held = {
        "a": torch.randn(5, 7),
        "b": torch.randn(9).to(torch.bfloat16),
        "c": torch.arange(3),
        "d": torch.empty(0, 4),
    }
    save_file(held, tmp_path / "a.safetensors")
    opened = checkpoint.open(tmp_path / "a.safetensors")
    for name, t in held.items():
        span = opened.span(name)
        assert span is not None
        assert span.equals(opened[name], t)
        assert not span.equals(opened[name], t.reshape(1, *t.shape))
        if t.numel():
            other = t.clone()
            other.reshape(-1)[-1] += 1
            assert not span.equals(opened[name], other)
    span = opened.span("b")
    assert span is not None
    assert span.equals(opened["b"], held["b"].float())  # once it is cast to the file's type
    turned = held["a"].t().contiguous().t()
    span = opened.span("a")
    assert span is not None
    assert span.equals(opened["a"], turned)
