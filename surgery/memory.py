"""Tensors that are already in memory: a state dict, or what a torch file gave. Nothing is copied.

A state dict often lies inside another one, beside an optimizer's state and an epoch number. `state_dict_in` finds it,
and says what it left out; where more than one could be meant, it asks rather than picks.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import dtypes
from surgery.errors import CheckpointError
from surgery.reader import Reader, Renamed, TensorInfo, check_slices
from surgery.restricted import Placeholder, plain
from surgery.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

# Keys under which people keep the weights in a dict with other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# Keys under which they keep an average over training beside the weights: in timm, BasicSR and others.
_AVERAGE = re.compile(r"(^|_)(ema|swa|averag\w*)(_|$)")
# Lightning's WeightAveraging puts the average in the place of the weights, and the weights here.
_CURRENT = "current_model_state"
# What wrappers put before every name: DataParallel and its distributed kin, and torch.compile.
_PREFIXES = {"module.": "torch's DataParallel", "_orig_mod.": "torch.compile"}
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, which also is a module around a module
# What only goes on with training; of no use to know a model by.
_TRAINING = re.compile(r"optim|sched|scaler|rng|random|loops|callback|_states?$")
_SHOWN = 8
_LEVELS = 8
_LONGEST = 1 << 16  # characters of JSON that are kept of one thing beside the tensors


class MemoryReader(Reader):
    """`source` names where the tensors came from; `holder` is how one of several dicts in it is had, for hints, with
    KEY for its key; `key` is the one that was asked for."""

    def __init__(
        self,
        content: Mapping[Any, Any],
        *,
        source: str = "<mapping>",
        files: tuple[Path, ...] = (),
        holder: str = "surgery.open(MAPPING[KEY])",
        key: str | None = None,
    ) -> None:
        self.source = source
        self.files = files
        found = state_dict_in(content, source, holder, key)
        self._tensors, self.notes, self.metadata = found.tensors, found.notes, found.metadata
        self.prefix = found.prefix
        self.infos = {name: info_of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        import torch

        tensor = self._tensors[name].detach()
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise CheckpointError(
                f"{self.source}: {name!r} is a {kind} tensor, and only dense ones can be read",
                hint=f"Convert it first: tensor.{'dequantize' if tensor.is_quantized else 'to_dense'}().",
            )
        return tensor[check_slices(slices, tensor.shape)] if slices else tensor


def info_of(tensor: Tensor) -> TensorInfo:
    """What a header would say of a tensor."""
    dtype = dtypes.name_of(tensor.dtype)
    shape = tuple(tensor.shape)
    if dtype == "F4" and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    return TensorInfo(shape, dtype, tensor.numel() * tensor.element_size())


@dataclass(frozen=True)
class Found:
    """The tensors of a state dict by name; notes on how they were found and what was passed by; what lay beside them,
    as JSON by its key; and what stood before every name."""

    tensors: dict[str, Any]
    notes: tuple[str, ...]
    metadata: dict[str, str]
    prefix: str


def state_dict_in(content: object, source: str, holder: str, chosen: str | None = None) -> Found:
    """The tensors of a state dict, unwrapped where it lies inside another dict, under the names that they have in the
    model: without what a wrapper around all of it put before them. `chosen` is the key of the one that is meant."""
    notes: list[str] = []
    beside: dict[str, str] = {}
    for _ in range(_LEVELS):
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{source}: holds {_described(content)}, not a dict of tensors", hint=_not_a_dict_hint(content, holder)
            )
        tensors = {key: value for key, value in content.items() if _is_tensor(value)}
        if tensors and chosen is None and not _only_beside(tensors, content):
            break
        key = _asked(content, chosen, source) if chosen is not None else _wrapper(content, source, holder)
        chosen = None
        others = {name: value for name, value in content.items() if name != key}
        notes.append(f"The weights are under {key!r}" + (f"; not read: {_listed(others)}." if others else "."))
        notes += _averages(key, others, holder)
        beside |= _kept(others)
        content, holder = content[key], holder.replace("KEY", f"{key!r}][KEY") if "[KEY]" in holder else ""
    else:
        raise CheckpointError(f"{source}: dicts within dicts, {_LEVELS} deep, and no tensors", hint=_SAVE)
    odd = [key for key in tensors if not isinstance(key, str)]
    if odd:
        raise CheckpointError(
            f"{source}: the name of a tensor is {_key_said(odd[0])}, not text",
            hint="Name the tensors by text, as in a module's state_dict().",
        )
    left = {key: value for key, value in content.items() if key not in tensors}
    if left:
        notes.append(f"Not tensors, and left out: {_listed(left)}.")
        beside |= _kept(left)
    prefix, said = wrapped_by(tensors)
    named = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return Found(named, (*notes, *said), beside, prefix)


def _only_beside(tensors: Mapping[Any, Any], content: Mapping[Any, Any]) -> bool:
    """Whether the tensors at the top are a few numbers beside the weights: fewer than a known wrapper holds."""
    inner = [value for key in _WRAPPERS if isinstance(value := content.get(key), Mapping)]
    return any(sum(map(_is_tensor, value.values())) > len(tensors) for value in inner)


def _wrapper(content: Mapping[Any, Any], source: str, holder: str) -> Any:
    """The key of the one dict inside that holds tensors. CheckpointError where there is none, or a choice."""
    holding = [key for key, value in content.items() if _holds_tensors(value)]
    known = [key for key in holding if key in _WRAPPERS]
    found = known or [key for key in holding if not _is_average(key) and key != _CURRENT] or holding
    if all(content[key] is content[found[0]] for key in found[1:]) and found:
        return found[0]
    if not found:
        what = f"entries: {_listed(content)}" if content else "it is empty"
        raise CheckpointError(f"{source}: no tensors in it ({what})", hint=_no_tensors_hint(content))
    raise CheckpointError(
        f"{source}: {len(found)} dicts of tensors in it: {', '.join(_key_said(key) for key in found[:_SHOWN])}",
        hint=f"Choose one: {holder.replace('KEY', repr(found[0]))}." if holder else _SAVE,
    )


def _asked(content: Mapping[Any, Any], key: str, source: str) -> str:
    if key not in content or not isinstance(content[key], Mapping):
        holding = [_key_said(other) for other, value in content.items() if _holds_tensors(value)]
        raise CheckpointError(
            f"{source}: no dict of tensors under {key!r}",
            hint=f"There is one under {', '.join(holding[:_SHOWN])}."
            if holding
            else "It holds the tensors themselves.",
        )
    return key


_SAVE = "Save the one that is meant by itself, where the file was made: torch.save(weights, FILE)."


def _is_average(key: object) -> bool:
    return isinstance(key, str) and _AVERAGE.search(key) is not None


def _averages(taken: Any, others: Mapping[Any, Any], holder: str) -> list[str]:
    """What to say of averages over training, which are other weights of the same model."""
    found = [key for key, value in others.items() if _is_average(key) and _holds_tensors(value)]
    said = [
        f"An average of the weights over training is under {key!r}"
        + (f"; for that one: {holder.replace('KEY', repr(key))}." if holder else ".")
        for key in found
        if not _is_average(taken)
    ]
    if _is_average(taken):
        said.append(f"These are an average of the weights over training: the file has it under {taken!r} alone.")
    if _CURRENT in others and taken == "state_dict":
        said.append(f"These are an average of the weights over training; the last ones are under {_CURRENT!r}.")
    return said


def _kept(items: Mapping[Any, Any]) -> dict[str, str]:
    """What can tell which model it is, as JSON: sizes, arguments, hyper-parameters."""
    found = {}
    for key, value in items.items():
        if isinstance(key, str) and not _TRAINING.search(key) and not _holds_tensors(value):
            text = json.dumps(plain(value))
            if len(text) <= _LONGEST:
                found[key] = text
    return found


_BEGAN = "Every name began with"


def wrapped_by(names: Iterable[str]) -> tuple[str, list[str]]:
    """What wrappers around the whole model put before every name, and a note on each of them."""
    every = list(names)
    rest = [name for name in every if name != _COUNTER]
    prefix, notes = "", []
    while rest and len(prefix) < len(rest[0]):
        found = next((word for word in _PREFIXES if rest[0].startswith(word, len(prefix))), None)
        if found is None or not all(name.startswith(prefix + found) and name != prefix + found for name in rest):
            break
        why = _PREFIXES[found]
        if len(rest) < len(every):
            why = f"torch's AveragedModel, whose counter {_COUNTER} is left out"
        notes.append(f"{_BEGAN} {found!r}, which is left out: it is of {why}, and of no model.")
        prefix += found
    return prefix, notes


def as_in_file(reader: Reader) -> Reader:
    """The reader with the names that stand in its file."""
    if not reader.prefix:
        return reader
    whole = Renamed(reader, {reader.prefix + name: name for name in reader.infos})
    whole.notes = tuple(note for note in reader.notes if not note.startswith(_BEGAN))
    return whole


def _is_tensor(value: object) -> bool:
    if isinstance(value, StoredTensor):
        return True
    torch = sys.modules.get("torch")  # where it was not imported, nothing is a tensor of it
    return torch is not None and isinstance(value, torch.Tensor)


def _holds_tensors(value: object, levels: int = _LEVELS) -> bool:
    """Whether a dict holds a tensor at its top, or is one of the known wrappers around such a dict."""
    if not isinstance(value, Mapping) or not levels:
        return False
    return any(_is_tensor(item) for item in value.values()) or any(
        _holds_tensors(value[key], levels - 1) for key in _WRAPPERS if key in value
    )


def _listed(items: Mapping[Any, Any]) -> str:
    shown = [f"{_key_said(key, quoted=False)} ({_described(value)})" for key, value in list(items.items())[:_SHOWN]]
    more = len(items) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _key_said(key: object, *, quoted: bool = True) -> str:
    if isinstance(key, str):
        return repr(key) if quoted else key
    return str(plain(key))[:60]


def _described(value: object) -> str:
    if isinstance(value, Mapping) and _holds_tensors(value):
        return f"a dict of {len(value)} tensors"
    if isinstance(value, StoredTensor):
        return "Tensor"
    return value.kind.rpartition(".")[2] if isinstance(value, Placeholder) else type(value).__name__


def _no_tensors_hint(content: Mapping[Any, Any]) -> str:
    if any(type(value).__module__ == "numpy" for value in content.values()):
        return "These are numpy arrays. Make them tensors: {name: torch.from_numpy(a) for name, a in arrays.items()}."
    return "A checkpoint maps names to tensors, as a module's state_dict() does."


def _not_a_dict_hint(content: object, holder: str) -> str:
    if hasattr(content, "state_dict"):
        return f"Pass its weights: surgery.open({holder}.state_dict())."
    return "A checkpoint maps names to tensors, as a module's state_dict() does."
