"""A module's values in a mapped file, in place of memory: beside a large source there is no room for them twice.

What a graft fills is the source's, and what the module holds there is never looked at; what stays as it is is read from
the file when it is asked for. The module is the same one: its parameters are, with their ties, hooks and flags.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery import dtypes, twin
from surgery.checkpoint import Checkpoint, open, raw_bytes
from surgery.memory import info_of
from surgery.running import own_tensors
from surgery.safetensors_format import header_bytes

SMALL = 1 << 16  # bytes up to which a tensor stays in memory


def hold(module: nn.Module, tensors: Checkpoint) -> frozenset[str]:
    """Let the module's tensors be these of the same names: views of the mapped file, where it is one. Writing into them
    changes the module and never the file. Done again, they are as they were before anything was run, and the pages that
    a run read are no longer held.

    Gives the names of those that are now. A tensor stays as it is where the checkpoint has none of its name, shape and
    type; where it is not on the CPU or not row-major; and where it shares memory with another tensor of the module.
    """
    for span in [tensors.span(name) for name in tensors]:
        if span is not None:
            span.file.unmap()
    taken: dict[int, bool] = {}
    held: set[str] = set()
    alone = {id(t) for t in _alone(module)}
    for name, own in own_tensors(module).items():
        if id(own) not in taken:
            taken[id(own)] = id(own) in alone and _fits(own, tensors, name)
            if taken[id(own)]:
                own.data = tensors.read(name)
        if taken[id(own)]:
            held.add(name)
    return frozenset(held)


def park(module: nn.Module, folder: Path) -> Checkpoint:
    """Move the module's tensors into a file of `folder` that has no name any more, of which they are views then. Raises
    OSError where the file cannot be written; the module is then as it was."""
    alone = {id(t) for t in _alone(module)}
    moved: dict[str, Tensor] = {}
    for name, own in own_tensors(module).items():
        if id(own) in alone and own.nbytes > SMALL and info_of(own).dtype in dtypes.SAFETENSORS:
            alone.discard(id(own))  # tied tensors are one
            moved[name] = own.detach()
    ordered = dict(sorted(moved.items(), key=lambda item: -item[1].element_size()))  # so that each lies aligned
    with tempfile.TemporaryDirectory(prefix=".parked-", dir=folder, ignore_cleanup_errors=True) as home:
        path = Path(home, "values.safetensors")
        with path.open("wb") as file:
            file.write(header_bytes(((name, info_of(t)) for name, t in ordered.items()), {}))
            for name, t in ordered.items():
                file.write(raw_bytes(t, name))
        tensors = open(path)
        hold(module, tensors)
    return tensors


def _alone(module: nn.Module) -> Iterator[Tensor]:
    """The plain tensors in memory that are all of their storage, and share it with no other."""
    every = [t for t in twin.tensors_of(module) if t.layout == torch.strided and type(t) in (Tensor, nn.Parameter)]
    every = [t for t in every if t.device.type == "cpu" and not t.is_quantized]
    used = Counter(t.untyped_storage().data_ptr() for t in every)
    for t in every:
        storage = t.untyped_storage()
        if used[storage.data_ptr()] == 1 and storage.nbytes() == t.nbytes and t.is_contiguous():
            yield t


def _fits(own: Tensor, tensors: Checkpoint, name: str) -> bool:
    if name not in tensors:
        return False
    wanted, there = info_of(own), tensors[name]
    return (wanted.dtype, tuple(wanted.shape)) == (there.dtype, tuple(there.shape))
