"""TorchScript archives, against what torch.jit.load makes of them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Block(nn.Module):
    maybe: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.GELU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
        self.register_buffer("seen", torch.arange(4.0))
        self.register_buffer("passing", torch.ones(4), persistent=False)
        self.plain = torch.full((4,), 0.5)  # attributes, which are no buffers
        self.maybe = torch.zeros(4)
        self.steps = [torch.ones(1)]
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.norm(x)) + self.seen + self.passing * self.plain + self.steps[0]
        maybe = self.maybe
        if maybe is not None:
            x = x + maybe
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleDict({"first": Block(), "second": Block()})
        self.again = self.blocks["first"]
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(3, 4).t()[:, 1])  # not contiguous
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.register_parameter("absent", None)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.again(x) * self.scale) + self.turned.sum()


class Pipe(nn.Module):
    """Without control flow, for the tracer; in half precision but for what is not."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
        self.tail = nn.Linear(2, 2)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x).float() + torch.tensor([1.0, 2.0])) * self.count


def archives() -> dict[str, Any]:
    torch.manual_seed(0)
    ids, x = torch.tensor([1, 2, 3]), torch.randn(3, 4)
    return {
        "scripted": lambda: torch.jit.script(Net().eval()),
        "scripted double": lambda: torch.jit.script(Net().double().eval()),
        "traced": lambda: torch.jit.trace(Net().eval(), ids),
        "half": lambda: torch.jit.script(Pipe(torch.float16)),
        "bfloat16": lambda: torch.jit.script(Pipe(torch.bfloat16)),
        "traced half": lambda: torch.jit.trace(Pipe(torch.bfloat16).eval(), x.bfloat16()),
        "lstm": lambda: torch.jit.script(nn.LSTM(3, 4, 2, bidirectional=True)),
        "transformer": lambda: torch.jit.script(nn.TransformerEncoderLayer(8, 2, batch_first=True)),
    }


@pytest.mark.parametrize("kind", archives())
def test_as_torch_loads_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    archives()[kind]().save(str(path))
    expected = torch.jit.load(str(path)).state_dict()
    opened = surgery.open(path)
    assert list(opened) == list(expected)
    for name, tensor in expected.items():
        found = opened.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found, tensor), name
        assert opened[name].shape == tuple(tensor.shape)
        assert opened[name].nbytes == tensor.numel() * tensor.element_size()
        if tensor.dim() and tensor.shape[0] > 1:
            assert torch.equal(opened.read(name, (slice(1, 2),)), tensor[1:2])
    assert opened.notes[0].startswith("A TorchScript archive")
    assert (opened.span("turned") is None) if "turned" in opened else True


def test_ties_share_their_bytes(tmp_path: Path) -> None:
    torch.jit.script(Net()).save(str(tmp_path / "m.pt"))
    opened = surgery.open(tmp_path / "m.pt")
    assert opened.span("embed.weight") == opened.span("head.weight")


def test_nothing_is_compiled_or_run_and_torch_is_not_imported(tmp_path: Path) -> None:
    """The program is one that no compiler would take, and opening needs no torch."""
    torch.jit.script(Pipe(torch.float32)).save(str(tmp_path / "good.pt"))
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "m.pt", "w") as bad:
        for member in good.infolist():
            content = good.read(member)
            if member.filename.endswith(".py"):
                content = content.replace(b"return", b"retrun").replace(b"torch.", b"os.system.")
            bad.writestr(member, content)
    with pytest.raises(RuntimeError):
        torch.jit.load(str(tmp_path / "m.pt"))
    code = "import sys, surgery; found = surgery.open(sys.argv[1]); print(len(found), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["9", "False"]
    assert torch.equal(surgery.open(tmp_path / "m.pt").read("count"), torch.tensor(3))


def test_a_compressed_archive_is_read_too(tmp_path: Path) -> None:
    torch.jit.script(Net()).save(str(tmp_path / "good.pt"))
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as z,
    ):
        for name in good.namelist():
            z.writestr(name, good.read(name))
    opened = surgery.open(tmp_path / "m.pt")
    assert opened.span("scale") is None
    for name, tensor in torch.jit.load(str(tmp_path / "good.pt")).state_dict().items():
        assert torch.equal(opened.read(name), tensor), name


def test_programs_from_before_buffers_were_listed(tmp_path: Path) -> None:
    torch.jit.script(nn.BatchNorm1d(3)).save(str(tmp_path / "good.pt"))
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "m.pt", "w") as old:
        for name in good.namelist():
            lines = good.read(name).splitlines(keepends=True)
            old.writestr(name, b"".join(line for line in lines if not line.startswith(b"  __buffers__")))
    assert list(surgery.open(tmp_path / "m.pt")) == list(nn.BatchNorm1d(3).state_dict())


@pytest.mark.parametrize("missing", ["code/__torch__", "data/0", "data.pkl"])
def test_what_is_missing_is_an_error(missing: str, tmp_path: Path) -> None:
    torch.jit.script(Pipe(torch.float32)).save(str(tmp_path / "good.pt"))
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "m.pt", "w") as z:
        for name in good.namelist():
            if f"/{missing}" not in name or name.endswith("Linear.py"):
                z.writestr(name, good.read(name))
    with pytest.raises(CheckpointError) as caught:
        surgery.open(tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in str(caught.value)
    assert caught.value.hint


def test_a_frozen_program_has_no_weights(tmp_path: Path) -> None:
    torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval())).save(str(tmp_path / "m.pt"))
    with pytest.raises(CheckpointError, match="without parameters") as caught:
        surgery.open(tmp_path / "m.pt")
    assert "frozen" in caught.value.hint


def test_an_archive_has_no_entries(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(CheckpointError, match="no entry 'ema'"):
        surgery.open(tmp_path / "m.pt", key="ema")
    assert os.listdir(tmp_path) == ["m.pt"]
