"""How a text model of transformers is run as a reference: built from its configuration, filled tensor by tensor, fed.

Nothing is loaded by transformers itself. Each parameter of the module takes the tensor of its name from the checkpoint,
under the two conversions that transformers makes on load as well (gamma and beta; the prefix of the body), and every
tensor of the checkpoint has to be used or known to be a buffer. What runs is then what the file holds, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import zoo

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery import Checkpoint

BATCH, LENGTH, PADDED_TO = 2, 12, 7

# LayerNorm's weight and bias as checkpoints of the first TensorFlow releases have them.
_OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_FILLS = {nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_}
_FILLS |= {Tensor.normal_, Tensor.uniform_}


class _Unfilled(TorchFunctionMode):
    """Modules are made without drawing random weights, which the checkpoint's are to replace; buffers are made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def configured(kind: type[PretrainedConfig], config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a checkpoint, as transformers reads it; attention in plain operations."""
    if not config:
        raise zoo.ZooError(
            "there is no config.json beside the weights, and without it no reference can be built",
            kind="weights",
            hint="put the model's config.json beside the weights; or graft with --static, which runs nothing",
        )
    made = kind.from_dict(dict(config))
    made._attn_implementation = "eager"
    return made


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """A module as `build` makes it, in eval mode and without random weights."""
    with torch.random.fork_rng(devices=[]), _Unfilled():
        return build().eval()


def fill(module: nn.Module, checkpoint: Checkpoint, at: Callable[[str], str] = str) -> None:
    """Give each tensor of the module the one of its name; `at` turns a name of the module into the checkpoint's.

    A tensor that one side has no account of is an error. Tied names may be missing: the file has such a tensor once.
    """
    own = module.state_dict()
    ties: Mapping[str, str] = getattr(module, "_tied_weights_keys", None) or {}
    spelled = {name: _spelled(at(name), checkpoint) for name in own}
    missing = [name for name, found in spelled.items() if found is None and spelled.get(ties.get(name, "")) is None]
    if missing:
        raise zoo.ZooError(
            f"{checkpoint.source} lacks {_few(at(name) for name in missing)}, which {type(module).__name__} has",
            kind="weights",
            hint="graft another part, or with --static, which runs nothing",
        )
    _account_for_the_rest(module, checkpoint, {found for found in spelled.values() if found is not None})
    tensors = {}
    for name in own:
        found = spelled[name] or spelled[ties[name]]
        assert found is not None  # else it would have been missing
        tensors[name] = checkpoint.read(found)
        if tensors[name].shape != own[name].shape:
            shapes = f"{list(tensors[name].shape)}, and by config.json it is {list(own[name].shape)}"
            raise zoo.ZooError(f"{checkpoint.source}: {found} has shape {shapes}", kind="weights")
    module.load_state_dict(tensors, assign=True)
    for name, tied_to in ties.items():
        if name in own and spelled[name] is None:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, module.get_parameter(tied_to))
    module.requires_grad_(False)


def _spelled(name: str, checkpoint: Checkpoint) -> str | None:
    if name in checkpoint:
        return name
    for new, old in _OLD.items():
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
        raise zoo.ZooError(
            f"{checkpoint.source} holds {_few(strange)}, for which {type(module).__name__} has no place",
            kind="weights",
            hint="graft another part, or with --static, which runs nothing",
        )


def _few(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


# ---------------------------------------------------------------------------------------------------- inputs

Inputs = Callable[[int, str], dict[str, Tensor]]


def token_inputs(config: PretrainedConfig, *, longest: int, types: int = 0, keep_out: int | None = None) -> Inputs:
    """Inputs for a model of token ids, by seed and variant.

    plain holds the first and the last row of the vocabulary; shortest is one token, longest fills the positions. padded
    hides the end of a sequence by its mask alone: the tokens there are ordinary ones, because some models count
    positions by them. `keep_out` is the id that does so, and it is never drawn.
    """
    vocabulary = int(config.vocab_size)
    allowed = torch.tensor([i for i in range(vocabulary) if i != keep_out])

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        shapes = {"plain": (BATCH, LENGTH), "padded": (BATCH, LENGTH), "shortest": (1, 1), "longest": (1, longest)}
        if variant not in shapes:
            raise ValueError(f'no variant "{variant}"; there are {", ".join(shapes)}')
        batch, length = shapes[variant]
        length = min(length, longest)
        draw = torch.Generator().manual_seed(seed)
        ids = allowed[torch.randint(0, len(allowed), (batch, length), generator=draw)]
        if variant in ("plain", "longest") and length > 1:
            ids[0, 0], ids[-1, -1] = allowed[0], allowed[-1]
        mask = torch.ones(batch, length, dtype=torch.long)
        if variant == "padded":
            mask[1:, PADDED_TO:] = 0
        found = {"input_ids": ids, "attention_mask": mask}
        if types > 1:
            found["token_type_ids"] = torch.randint(0, types, (batch, length), generator=draw)
        return found

    return inputs


def hidden_inputs(width: int) -> Inputs:
    """Inputs for what stands on top of an encoder: hidden states. They have no padding of their own."""

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        length = {"plain": LENGTH, "shortest": 1, "longest": 64}[variant]
        draw = torch.Generator().manual_seed(seed)
        return {"hidden_states": torch.randn(BATCH, length, width, generator=draw)}

    return inputs
