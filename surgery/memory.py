"""Tensors that are already in memory: a state dict, or what a torch file gave. Nothing is copied.

A state dict often lies inside another one, beside an optimizer's state and an epoch number. `state_dict_in` finds it,
and says what it left out; where more than one could be meant, it asks rather than picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import dtypes
from surgery.errors import CheckpointError
from surgery.reader import Reader, TensorInfo, check_slices

if TYPE_CHECKING:
    from torch import Tensor

# Keys under which people keep the weights in a dict with other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 8


class MemoryReader(Reader):
    """`source` names where the tensors came from, `holder` the expression that gives the dict, for hints."""

    def __init__(
        self, content: Mapping[Any, Any], *, source: str = "<mapping>", files: tuple[Path, ...] = (), holder: str = ""
    ) -> None:
        self.source = source
        self.files = files
        self._tensors, self.notes = state_dict_in(content, source, holder or "the mapping")
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


def state_dict_in(content: object, source: str, holder: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a state dict, unwrapped where it lies inside another dict; and notes on what was passed by."""
    inside, notes = "", []
    while True:
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{source}: holds {_described(content)}, not a dict of tensors", hint=_not_a_dict_hint(content, holder)
            )
        tensors = {key: value for key, value in content.items() if _is_tensor(value)}
        if tensors:
            break
        key = _wrapper(content, source, holder + inside)
        others = {name: value for name, value in content.items() if name != key}
        notes.append(f"The weights are under {key!r}" + (f"; not read: {_listed(others)}." if others else "."))
        content, inside = content[key], f"{inside}[{key!r}]"
    odd = [key for key in tensors if not isinstance(key, str)]
    if odd:
        raise CheckpointError(
            f"{source}: the name of a tensor is {odd[0]!r}, not text",
            hint="Name the tensors by text, as in a module's state_dict().",
        )
    left = {key: value for key, value in content.items() if key not in tensors}
    if left:
        notes.append(f"Not tensors, and left out: {_listed(left)}.")
    return tensors, tuple(notes)


def _wrapper(content: Mapping[Any, Any], source: str, holder: str) -> Any:
    """The key of the one dict inside that holds tensors. CheckpointError where there is none, or a choice."""
    holding = [key for key, value in content.items() if _holds_tensors(value)]
    known = [key for key in holding if key in _WRAPPERS]
    found = known or holding
    if all(content[key] is content[found[0]] for key in found[1:]) and found:
        return found[0]
    if not found:
        what = f"entries: {_listed(content)}" if content else "it is empty"
        raise CheckpointError(f"{source}: no tensors in it ({what})", hint=_no_tensors_hint(content))
    raise CheckpointError(
        f"{source}: {len(found)} dicts of tensors in it: {', '.join(repr(key) for key in found[:_SHOWN])}",
        hint=f"Choose one, and pass it as a mapping: surgery.open({holder}[{found[0]!r}]).",
    )


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _holds_tensors(value: object) -> bool:
    """Whether a dict holds a tensor at its top, or is one of the known wrappers around such a dict."""
    if not isinstance(value, Mapping):
        return False
    return any(_is_tensor(item) for item in value.values()) or any(
        _holds_tensors(value[key]) for key in _WRAPPERS if key in value
    )


def _listed(items: Mapping[Any, Any]) -> str:
    shown = [f"{key} ({_described(value)})" for key, value in list(items.items())[:_SHOWN]]
    more = len(items) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _described(value: object) -> str:
    if isinstance(value, Mapping) and _holds_tensors(value):
        return f"a dict of {len(value)} tensors"
    return type(value).__name__


def _no_tensors_hint(content: Mapping[Any, Any]) -> str:
    if any(type(value).__module__ == "numpy" for value in content.values()):
        return "These are numpy arrays. Make them tensors: {name: torch.from_numpy(a) for name, a in arrays.items()}."
    return "A checkpoint maps names to tensors, as a module's state_dict() does."


def _not_a_dict_hint(content: object, holder: str) -> str:
    if hasattr(content, "state_dict"):
        return f"Pass its weights: surgery.open({holder}.state_dict())."
    return "A checkpoint maps names to tensors, as a module's state_dict() does."
