"""Applying a plan to a module in memory: all values first, then all writes, or nothing.

Writes go into the existing storage, so that ties and optimizers hold; a tensor on the meta device has none and is
assigned a new one, of its own class, under every name that it has. An exception on the way puts back what was
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.errors import GraftError
from surgery.expr import evaluate_unrounded
from surgery.plan import Plan
from surgery.running import own_tensors
from surgery.twin import lift

# What grafts of this process have filled: by the module that owns the tensor, its local names. Kept beside the
# modules, not on them, and gone with them.
_FILLED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def stage(plan: Plan, source: Checkpoint, target: nn.Module) -> dict[str, Tensor]:
    """The values of the computed rows, in the target's types and places, each with bytes of its own."""
    own = own_tensors(target)
    staged: dict[str, Tensor] = {}
    for row in plan.rows:
        if row.expr is None:
            continue
        mine = own[row.target]
        value = evaluate_unrounded(row.expr, source.read, lift)
        device = torch.device("cpu") if mine.is_meta else mine.device
        stored = torch.empty(mine.shape, dtype=mine.dtype, device=device).copy_(value)
        if mine.is_floating_point() and torch.finfo(mine.dtype).max < torch.finfo(torch.bfloat16).max:
            lost = torch.isfinite(value).to(device) & ~torch.isfinite(stored)
            if bool(lost.any()):
                raise GraftError(
                    f"{row.target}: {int(lost.sum())} values of {row.expr} overflow {str(mine.dtype).split('.')[-1]}",
                    hint="Give the target a type of wider range, such as bfloat16 or float32.",
                )
        staged[row.target] = stored
    return staged


@dataclass
class _Assigned:
    owner: nn.Module
    local: str
    before: Tensor


def write(target: nn.Module, staged: dict[str, Tensor]) -> None:
    """Put the staged values into the target; all, or none and a GraftError. `staged` is used up: it holds the target's
    old values afterwards."""
    own = own_tensors(target)
    shared = {name for names in _sharing(own, staged) for name in names}
    copied: list[tuple[Tensor, Tensor]] = []  # (the target's tensor, its old values)
    assigned: list[_Assigned] = []
    at = ""
    try:
        with torch.no_grad():
            for at, value in staged.items():
                mine = own[at]
                if mine.is_meta:
                    _assign(target, mine, value, assigned)
                    continue
                old = mine.detach().clone()
                copied.append((mine, old))
                mine.copy_(value)
                if at not in shared and type(old) is Tensor:  # it makes room for the old value: no third copy of all
                    value.copy_(old)
                    copied[-1] = (mine, value)
                    del old
            _check_aliases(own, staged)
    except BaseException as error:
        _restore(copied, assigned)
        if isinstance(error, (RuntimeError, TypeError, ValueError)):
            raise GraftError(
                f"{at} could not be written: {error}",
                hint="The target is as it was. Its tensors must be writable in place.",
            ) from error
        raise


def _restore(copied: list[tuple[Tensor, Tensor]], assigned: list[_Assigned]) -> None:
    with torch.no_grad():
        for mine, old in reversed(copied):
            if not _same_bits(mine, old):  # what refused the write was not changed by it
                mine.copy_(old)
        for a in reversed(assigned):
            _put(a.owner, a.local, a.before)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b)) or bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def _sharing(own: Mapping[str, Tensor], staged: Mapping[str, Tensor]) -> list[list[str]]:
    """The tensors that share memory without being one."""
    by_storage: dict[int, list[str]] = {}
    for name in staged:
        t = own[name]
        if not t.is_meta and type(t.data) is Tensor:
            by_storage.setdefault(t.untyped_storage().data_ptr(), []).append(name)
    return [names for names in by_storage.values() if len(names) > 1]


def _check_aliases(own: Mapping[str, Tensor], staged: Mapping[str, Tensor]) -> None:
    """Of tensors that share memory a later write may have undone an earlier one."""
    for names in _sharing(own, staged):
        for name in names:
            if own[name].numel() and not _same_bits(own[name].detach(), staged[name]):
                others = ", ".join(n for n in names if n != name)
                raise ValueError(f"it shares memory with {others}, and the plan gives them different values")


def _assign(target: nn.Module, mine: Tensor, value: Tensor, assigned: list[_Assigned]) -> None:
    """A tensor with bytes in place of one on the meta device, wherever that one stands."""
    if isinstance(mine, nn.Parameter):
        new: Tensor = Tensor._make_subclass(type(mine), value, mine.requires_grad)
        new.__dict__.update(mine.__dict__)
    else:
        new = value.requires_grad_(mine.requires_grad)
    for owner in target.modules():
        for holder in (owner._parameters, owner._buffers):
            for local, held in list(holder.items()):
                if held is mine:
                    assigned.append(_Assigned(owner, local, mine))
                    _put(owner, local, new)


def _put(owner: nn.Module, local: str, value: Tensor) -> None:
    holder: dict[str, Any] = owner._parameters if local in owner._parameters else owner._buffers
    holder[local] = value


def filled(target: nn.Module) -> frozenset[str]:
    """The names of the tensors that earlier grafts of this process filled."""
    return frozenset(
        f"{path}.{local}" if path else local
        for path, module in target.named_modules(remove_duplicate=False)
        for local in _FILLED.get(module, ())
    )


def remember(target: nn.Module, names: frozenset[str]) -> None:
    """Note that these tensors hold a graft's values."""
    for name in names:
        path, _, local = name.rpartition(".")
        _FILLED.setdefault(target.get_submodule(path), set()).add(local)
