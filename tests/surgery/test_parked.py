"""A module whose values lie in a mapped file: the same module, in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery import parked

MAPS = Path("/proc/self/maps")


def file_of(t: torch.Tensor) -> str:
    """The file whose map a tensor's bytes lie in, or an empty text."""
    at = t.data_ptr()
    for line in MAPS.read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= at < last:
            return name[0] if name and name[0].startswith("/") else ""
    return ""


class Odd(nn.Module):
    """Tied, shared, small, turned and half-width tensors, and a buffer that is written into."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.word, self.head = nn.Embedding(300, 64), nn.Linear(64, 300, bias=False)
        self.head.weight = self.word.weight
        whole = torch.randn(40_000)
        self.a, self.b = nn.Parameter(whole[:20_000]), nn.Parameter(whole[20_000:])
        self.turned = nn.Parameter(torch.randn(200, 100).t())
        self.small, self.narrow = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(40_001).half())
        self.register_buffer("count", torch.zeros(20_000))


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not show its maps")
def test_it_is_the_same_module(tmp_path: Path) -> None:
    module = Odd()
    before = {n: (t, t.detach().clone(), t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()}
    held = parked.park(module, tmp_path)
    assert not list(tmp_path.iterdir())
    for name, t in module.state_dict(keep_vars=True).items():
        was, value, grad = before[name]
        assert t is was
        assert t.requires_grad is grad
        assert torch.equal(t, value)
        assert bool(file_of(t)) == (name in ("word.weight", "head.weight", "narrow", "count")), name
    assert module.head.weight is module.word.weight
    with torch.no_grad():
        module.count.add_(1)
        module.word.weight.mul_(2)
    parked.hold(module, held)
    assert all(torch.equal(t, before[n][1]) for n, t in module.state_dict().items())


def test_only_what_fits_is_taken(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    file = tmp_path / "a.safetensors"
    save_file(
        {
            "0.weight": torch.ones(5, 4),
            "0.bias": torch.ones(4),  # another shape
            "1.weight": torch.ones(6, 5).half(),  # another type
        },
        file,
    )
    kept = file.read_bytes()
    bias = module[0].bias.detach().clone()
    assert parked.hold(module, surgery.open(file)) == {"0.weight"}
    assert torch.equal(module[0].weight, torch.ones(5, 4))
    assert torch.equal(module[0].bias, bias)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert file.read_bytes() == kept


def test_a_folder_that_takes_nothing(tmp_path: Path) -> None:
    module = nn.Linear(300, 300)
    at = module.weight.data_ptr()
    with pytest.raises(OSError, match="nowhere"):
        parked.park(module, tmp_path / "nowhere")
    assert module.weight.data_ptr() == at
