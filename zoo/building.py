"""How a plugin makes a reference: a module built without values, and filled with a checkpoint's, tensor by tensor.

Nothing is loaded by the module's library itself. Each tensor of the module takes the one of its name from the
checkpoint, and every tensor of the checkpoint has to be used or known to be a buffer. What runs is then what the file
holds, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.errors import ZooError

if TYPE_CHECKING:
    from surgery import Checkpoint

_DRAWS = ["normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "kaiming_normal_"]
_DRAWS += ["xavier_normal_", "orthogonal_"]
_FILLS = {getattr(nn.init, name) for name in _DRAWS} | {Tensor.uniform_}
_NONE: Mapping[str, str] = {}


class _Unfilled(TorchFunctionMode):
    """Modules are made without drawing random weights, which the checkpoint's are to replace; buffers are made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.normal_:
            # To its mean: torch's trunc_normal_ draws again until every value lies within its bounds.
            return args[0].fill_(args[1] if len(args) > 1 else (kwargs or {}).get("mean", 0.0))
        # A library may have put its own in the place of torch's (transformers does): it is what is called then.
        if func in _FILLS or ((name := getattr(func, "__name__", "")) in _DRAWS and func is getattr(nn.init, name)):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def unfilled(build: Callable[[], nn.Module]) -> nn.Module:
    """A module as `build` makes it, in eval mode; its random weights are not drawn, its buffers are made."""
    with torch.random.fork_rng(devices=[]), _Unfilled():
        return build().eval()


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    at: Callable[[str], str] = str,
    *,
    spellings: Mapping[str, str] = _NONE,
    spare: Iterable[str] = (),
) -> None:
    """Give each tensor of the module the one of its name; `at` turns a name of the module into the checkpoint's.

    `spellings`: other ends of names ("LayerNorm.weight": "LayerNorm.gamma"). `spare`: tensors of the checkpoint that
    the module may do without (another part's). A tensor that one side has no account of is a ZooError. Tied names may
    be missing: the file has such a tensor once.
    """
    own = module.state_dict()
    ties: Mapping[str, str] = getattr(module, "_tied_weights_keys", None) or {}
    spelled = {name: _spelled(at(name), checkpoint, spellings) for name in own}
    missing = [name for name, found in spelled.items() if found is None and spelled.get(ties.get(name, "")) is None]
    if missing:
        raise ZooError(
            f"{checkpoint.source} lacks {_few(at(name) for name in missing)}, which {type(module).__name__} has",
            kind="weights",
            hint="graft another part, or with --static, which runs nothing",
        )
    _account_for_the_rest(module, checkpoint, {found for found in spelled.values() if found is not None} | set(spare))
    tensors = {}
    for name in own:
        found = spelled[name] or spelled[ties[name]]
        assert found is not None  # else it would have been missing
        tensors[name] = checkpoint.read(found)
        if tensors[name].shape != own[name].shape:
            shapes = f"{list(tensors[name].shape)}, and by config.json it is {list(own[name].shape)}"
            raise ZooError(f"{checkpoint.source}: {found} has shape {shapes}", kind="weights")
    module.load_state_dict(tensors, assign=True)
    for name, tied_to in ties.items():
        if name in own and spelled[name] is None:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, module.get_parameter(tied_to))
    module.requires_grad_(False)


def _spelled(name: str, checkpoint: Checkpoint, spellings: Mapping[str, str]) -> str | None:
    if name in checkpoint:
        return name
    for new, old in spellings.items():
        if name.endswith(new) and name.removesuffix(new) + old in checkpoint:
            return name.removesuffix(new) + old
    return None


def _account_for_the_rest(module: nn.Module, checkpoint: Checkpoint, used: set[str]) -> None:
    """A tensor that the module has no use for means another model, unless it is a buffer that older releases saved."""
    buffers = {name.rpartition(".")[2]: value for name, value in module.named_buffers()}
    strange = []
    for name in checkpoint:
        if name in used:
            continue
        known = buffers.get(name.rpartition(".")[2])
        if known is None or not torch.equal(checkpoint.read(name).reshape(-1), known.reshape(-1)):
            strange.append(name)
    if strange:
        raise ZooError(
            f"{checkpoint.source} holds {_few(strange)}, for which {type(module).__name__} has no place",
            kind="weights",
            hint="graft another part, or with --static, which runs nothing",
        )


def _few(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
