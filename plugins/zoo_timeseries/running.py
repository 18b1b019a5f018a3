"""How a time-series model of transformers is built as a reference, and what it is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import zoo

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery import Checkpoint

Inputs = Callable[[int, str], dict[str, Tensor]]


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


def prefix(checkpoint: Checkpoint) -> str:
    """What precedes the body's tensors: `model.` where there is a head, nothing where there is none."""
    return "model." if any(name.startswith(("model.encoder.", "model.decoder.")) for name in checkpoint) else ""


def drawn(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Inputs:
    """Standard-normal inputs of these shapes, by variant and name."""

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        if variant not in shapes:
            raise ValueError(f'no variant "{variant}"; there are {", ".join(shapes)}')
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=draw) for name, shape in shapes[variant].items()}

    return inputs


def edges(shape: tuple[int, ...], seed: int) -> Tensor:
    """A batch of series [4, length, channels] that are ends of what a model meets: constant (by a number that a sum
    keeps exactly), zero, very large, very small."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((4, *shape[1:]), generator=draw)
    x[0] = torch.tensor(2.0).pow(1 + seed % 4)
    x[1] = 0.0
    x[2] *= 1e4
    x[3] *= 1e-4
    return x


class StaysDouble(TorchFunctionMode):
    """`x.float()` leaves a double as it is: transformers' auto-correlation makes a buffer with it, which is meant for
    half precision, and breaks when all else is double."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
