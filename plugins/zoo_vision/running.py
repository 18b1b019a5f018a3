"""What every reference of this plugin is fed with and filled by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import zoo

if TYPE_CHECKING:
    from surgery import Checkpoint

Inputs = Callable[[int, str], dict[str, Tensor]]
BATCH = 2
# Sides of images, for models that take any: where the parts of one can be told apart, and the sums are short.
SIZES = (33, 64, 96)


@dataclass(frozen=True)
class Built:
    """A model that may be cut and run: `build` makes it anew, with its head for that many classes.

    `at` turns a name of the model into the checkpoint's. `sizes` are the sides of the images it takes, least first;
    one where it takes no other. `bare` is one that was built without storage, where that was done already. `loads`: it
    comes with the checkpoint's values, which its library's own loader read. `tokens`: what stands before the patches'
    tokens in its features, as in ("class_token",).
    """

    build: Callable[[], nn.Module]
    features: Callable[[nn.Module, Tensor], Tensor]
    head: Callable[[nn.Module, Tensor], Tensor]
    sizes: tuple[int, ...]
    channels: int
    at: Callable[[str], str] = str
    classes: int = 0
    bare: nn.Module | None = None
    loads: bool = False
    tokens: tuple[str, ...] = ()


def filled(made: Built, checkpoint: Checkpoint, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The model with the checkpoint's values; `build` makes a piece of it instead."""
    model = zoo.unfilled(build or made.build)
    if made.loads:
        _plain_attention(model)
        return model.requires_grad_(False)
    fill(model, checkpoint, made.at)
    return model


def _plain_attention(module: nn.Module) -> None:
    each: Any
    for each in module.modules():
        if hasattr(each, "fused_attn"):
            each.fused_attn = False


def fill(module: nn.Module, checkpoint: Checkpoint, at: Callable[[str], str] = str) -> None:
    """zoo.fill, after plain operations were chosen for attention where the library offers a choice.

    A count of batches that the file does not have is let go: it has no part in what a model computes, and files of
    before 2018 lack it.
    """
    _plain_attention(module)
    for name, child in module.named_modules():
        path = f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        if isinstance(child, _NormBase) and at(path) not in checkpoint:
            child.num_batches_tracked = None
    zoo.fill(module, checkpoint, at)


def first_tokens(probe: zoo.PartProbe, names: Sequence[str]) -> zoo.PartProbe:
    """The probe of features [B, N, C], with the narrower ones that answer for the first tokens, each [B, C]: all that
    have a name, and the first alone. Many a model normalises no other token after its last block."""
    run = probe.run

    def less(count: int) -> zoo.PartProbe:
        def piece(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            (features,) = run(module, x)
            return tuple(features[:, i] for i in range(count))

        return replace(probe, run=piece, outputs=tuple(names[:count]))

    return replace(probe, narrower=tuple(less(count) for count in sorted({len(names), 1}, reverse=True) if names))


def pixel_inputs(sizes: tuple[int, ...], channels: int, width: int = 0) -> Inputs:
    """Images [B, C, H, W] of normally distributed values, as normalised ones are.

    One size: that is the only one there is (with a `width` of its own, where it is no square), and the batch differs.
    Else the sizes are (least, plain, longest): least is odd where it may be, and longest is wider than high, so that
    padding on one side shows.
    """

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        least, plain, longest = sizes if len(sizes) == 3 else (sizes[0],) * 3
        wide = width or longest if len(sizes) == 1 else longest + least
        shapes = {
            "plain": (BATCH, channels, plain, width or plain),
            "shortest": (1, channels, least, width or least),
            "longest": (1 if len(sizes) == 3 else BATCH + 1, channels, longest, wide),
        }
        if variant not in shapes:
            raise ValueError(f'no variant "{variant}"; there are {", ".join(shapes)}')
        return {"pixel_values": torch.randn(shapes[variant], generator=torch.Generator().manual_seed(seed))}

    return inputs


def hidden_inputs(shape: tuple[int, ...]) -> Inputs:
    """Features of images, each of that shape, for what stands on top."""

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        batch = {"plain": BATCH, "shortest": 1}[variant]
        return {"hidden_states": torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))}

    return inputs
