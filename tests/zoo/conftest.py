"""How the tests run the face: as a person does, in a process of its own; stdout, stderr and status together."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer

ON_DISK = Path(__file__).resolve().parents[1] / "plugins" / "on_disk"
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as the one JSON object that it has to be."""
        thing = json.loads(self.out)
        assert isinstance(thing, dict)
        return thing


def calling(capsys: pytest.CaptureFixture[str], *first: str) -> Callable[..., Done]:
    """The command line in this process, each time with these arguments first: quicker where nothing is isolated."""
    from zoo import cli

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        status = cli.main([*first, *arguments])
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return call


class Zoo:
    """The command line, with a cache and an environment of its own."""

    def __init__(self, home: Path, cwd: Path) -> None:
        self.home, self.cwd = home, cwd
        self.environ = {**os.environ, "HF_HOME": str(home)}

    def online(self, endpoint: str) -> Zoo:
        self.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        return self

    def plugins(self, *names: str) -> Zoo:
        """Add plugins from tests/plugins/on_disk to what is installed."""
        paths = [str(ON_DISK / name) for name in names]
        paths += filter(None, [self.environ.get("PYTHONPATH")])
        self.environ["PYTHONPATH"] = os.pathsep.join(paths)
        return self

    def __call__(self, *arguments: str, **environ: str) -> Done:
        return self.python("import sys; from zoo.cli import main; sys.exit(main())", *arguments, **environ)

    def python(self, code: str, *arguments: str, **environ: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**self.environ, **environ},
            cwd=self.cwd,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    @property
    def cached(self) -> list[str]:
        """The names of the files that snapshots in the cache hold."""
        return sorted(path.name for path in self.home.glob("hub/*/snapshots/*/*"))


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    return Zoo(tmp_path / "home", tmp_path / "work")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file with these dtypes and shapes, all zeros; written by hand, so that no test needs torch."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _WIDTH[dtype] * _product(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product


def bert_tensors(prefix: str = "", *, layers: int = 2, types: int = 2) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A tiny BERT, named as it is published."""
    width, wide = 4, 8
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "embeddings.word_embeddings.weight": ("F32", (10, width)),
        "embeddings.position_embeddings.weight": ("F32", (6, width)),
        "embeddings.token_type_embeddings.weight": ("F32", (types, width)),
        "embeddings.LayerNorm.weight": ("F32", (width,)),
    }
    for i in range(layers):
        for name in ("query", "key", "value"):
            found[f"encoder.layer.{i}.attention.self.{name}.weight"] = ("F32", (width, width))
        found[f"encoder.layer.{i}.intermediate.dense.weight"] = ("F32", (wide, width))
        found[f"encoder.layer.{i}.output.dense.weight"] = ("F32", (width, wide))
    found["pooler.dense.weight"] = ("F32", (width, width))
    found = {prefix + name: what for name, what in found.items()}
    if prefix:
        found["cls.predictions.bias"] = ("F32", (10,))
    return found


def bert_files(**more: bytes) -> dict[str, bytes]:
    """A repository as published: safetensors and a pickle of the same, configuration, tokenizer, and much else."""
    return {
        "config.json": b'{"model_type": "bert"}',
        "model.safetensors": safetensors(bert_tensors("bert.")),
        "pytorch_model.bin": b"a pickle that nobody should fetch",
        "tf_model.h5": b"nor this",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b'{"do_lower_case": true}',
        "vocab.txt": b"[PAD]\n",
        "README.md": b"# BERT",
        "onnx/model.onnx": b"nor that",
        **more,
    }
