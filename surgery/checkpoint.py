"""A checkpoint: tensors by name, known from headers alone until one is read.

`open` takes a path or a mapping of tensors and gives a `Checkpoint`; what lies behind it, a file, shards, an archive or
memory, is the business of a `Reader`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import CheckpointError
from surgery.reader import Reader, Renamed, Span, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "Reader", "Span", "TensorInfo", "open"]

_CHUNK = 1 << 22


class Checkpoint(Mapping[str, TensorInfo]):
    """A mapping from tensor names to what is known of them without reading them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @property
    def source(self) -> str:
        """Where it came from, for messages: a path, or "<mapping>"."""
        return self._reader.source

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it stands on; none for tensors in memory."""
        return self._reader.files

    @property
    def metadata(self) -> Mapping[str, str]:
        """The text that the file carries beside its tensors. What a pickle holds there (arguments, sizes,
        hyper-parameters) is JSON, each under its key."""
        return self._reader.metadata

    @property
    def notes(self) -> tuple[str, ...]:
        """What was unwrapped or left out when it was opened, one sentence each."""
        return self._reader.notes

    def __getitem__(self, name: str) -> TensorInfo:
        return self._reader.infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.infos)

    def __len__(self) -> int:
        return len(self._reader.infos)

    def __contains__(self, name: object) -> bool:
        return name in self._reader.infos

    # Two checkpoints of one structure are not the same checkpoint, and none is a plain dict of its infos.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Checkpoint {self.source}: {len(self)} tensors>"

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor, or the part of it that `slices` cut out; of a file's first axis only the rows asked for are read.

        Where the file allows it, a view of the mapped file: writing into it changes the tensor and never the file.
        A tensor from memory shares its memory with the original.
        """
        self._check(name)
        return self._reader.read(name, slices)

    def span(self, name: str) -> Span | None:
        """Where the tensor's bytes lie in a local file; None where they do not lie there in one plain piece."""
        self._check(name)
        return self._reader.span(name)

    def view(self, names: Mapping[str, str] | Iterable[str]) -> Checkpoint:
        """A part of the checkpoint: of the names given, or as {new name: name}. Nothing is read."""
        if isinstance(names, str):
            raise CheckpointError(f"view takes several names, got the text {names!r}", hint=f"view([{names!r}])")
        renamed = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        for name in renamed.values():
            self._check(name)
        return Checkpoint(Renamed(self._reader, renamed))

    def noted(self, note: str) -> Checkpoint:
        """The same checkpoint with a further note."""
        noted = self.view(list(self))
        noted._reader.notes = (*self.notes, note)
        return noted

    def structure_hash(self) -> str:
        """sha256 over names, dtypes and shapes, whatever the order and the file format."""
        digest = hashlib.sha256()
        for name in sorted(self):
            info = self[name]
            digest.update(json.dumps([name, info.dtype, list(info.shape)], separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def content_hash(self, name: str) -> str:
        """sha256 of the tensor's bytes, row-major and little endian."""
        digest = hashlib.sha256()
        span = self.span(name)
        if span is None:
            digest.update(raw_bytes(self.read(name), f"{self.source}: {name!r}"))
        else:
            buffer = memoryview(bytearray(min(_CHUNK, span.nbytes)))
            for done in range(0, span.nbytes, _CHUNK):
                chunk = buffer[: span.nbytes - done]
                span.file.read_into(chunk, span.offset + done)
                digest.update(chunk)
        return digest.hexdigest()

    def _check(self, name: str) -> None:
        if name not in self._reader.infos:
            import difflib

            near = difflib.get_close_matches(str(name), list(self), n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {len(self)} tensors: {_first(self)}"
            raise CheckpointError(f"{self.source}: no tensor named {name!r}", hint=hint)


def open(source: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint, *, key: str | None = None) -> Checkpoint:
    """Open a checkpoint: headers only, nothing is read until it is asked for.

    `source` is a path: a .safetensors file, the index of a sharded checkpoint, a folder that holds one of these, what
    torch.save wrote (only tensors are ever loaded from it), an .npz, or a format that a plugin registered; or a
    mapping of tensors such as a state dict, which is not copied. A Checkpoint is given back as it is.

    Weights within a dict of other things are found, and `notes` says where; `key` names the entry that is meant where
    there are several, such as an average over training. What a wrapper around a whole model puts before every name
    (`module.`, `_orig_mod.`) is left out. What lies beside the tensors is in `metadata`, as JSON. Raises
    CheckpointError where it is no checkpoint, is damaged, or could mean more than one.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        from surgery.memory import MemoryReader

        return Checkpoint(MemoryReader(source, key=key))
    if not isinstance(source, (str, os.PathLike)):
        hint = "Pass a path or a mapping of tensors."  # type: ignore[unreachable]
        if hasattr(source, "state_dict"):
            hint = "Pass its weights: surgery.open(model.state_dict())."
        raise CheckpointError(f"a {type(source).__name__} is not a checkpoint", hint=hint)
    if not os.fspath(source):
        raise CheckpointError("the path of the checkpoint is empty", hint="Give the path of a checkpoint.")
    from surgery.formats import open_path

    return Checkpoint(open_path(Path(source), key))


def raw_bytes(tensor: Tensor, what: str) -> memoryview:
    """A dense tensor's bytes, row-major; without a copy where they lie so in memory already."""
    import torch

    if tensor.is_meta:
        raise CheckpointError(f"{what} is on the meta device, so it has no bytes", hint="Load its values first.")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # Of one element or none, any stride counts as contiguous, and only a stride of 1 can be viewed as bytes.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data


def _first(names: Iterable[str]) -> str:
    shown: list[str] = []
    for name in names:
        if len(shown) == 3:
            return ", ".join(shown) + " ..."
        shown.append(name)
    return ", ".join(shown)
