"""Kernels for other inputs: another number of channels, spectrograms, video; and norms folded into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import PlanError
from surgery.ops.registry import Example, Op, Param, Shape, register, show
from surgery.ops.resize import floating, is_double

if TYPE_CHECKING:
    from torch import Tensor


def _channels_shape(shapes: Sequence[Shape], *, to: int, base: int) -> Shape:
    (shape,) = shapes
    if len(shape) < 3:
        raise PlanError(f"a kernel has the shape out x in x ..., not {show(shape)}; a linear map is reshaped first")
    if to < 1 or base < 1:
        raise PlanError(f"to={to} and base={base} count channels: 1 or more")
    if to == base:
        if shape[1] != base:
            raise PlanError(f"a kernel of shape {show(shape)} takes {shape[1]} channels, not base={base}")
        return shape
    if to == 1:
        if shape[1] > base and shape[1] % base:
            raise PlanError(
                f"the {shape[1]} channels of a kernel of shape {show(shape)} are no multiple of base={base}",
                hint=f"base={shape[1]} says that the pretrained input has {shape[1]} channels",
            )
        return (shape[0], shape[1] // base if shape[1] > base else 1, *shape[2:])
    if shape[1] != base:
        raise PlanError(
            f"a kernel of shape {show(shape)} takes {shape[1]} channels, and only one that takes base={base} can be "
            f"tiled to {to}",
            hint=f"base={shape[1]} says that the pretrained input has {shape[1]} channels",
        )
    return (shape[0], to, *shape[2:])


def _channels(tensors: Sequence[Tensor], *, to: int, base: int) -> Tensor:
    """The first kernel of a network, [out, in, ...], for inputs of `to` channels where it was trained on `base`. One
    channel: the sum, so that a grey image computes as it did with three equal channels. More: the channels repeated
    in order, cut, and scaled by base / to.

    Rule: timm.models.adapt_input_conv, in float32, cast back.
    """
    kernel = floating(tensors[0], "adapt_input_channels")
    if to == base:
        return kernel
    if not kernel.numel():
        return kernel.new_zeros(_channels_shape([tuple(kernel.shape)], to=to, base=base))
    if not is_double(kernel):
        from timm.models import adapt_input_conv

        flat = adapt_input_conv(to, kernel.reshape(*kernel.shape[:2], -1, 1), base)  # it knows images only
        return flat.reshape(kernel.shape[0], flat.shape[1], *kernel.shape[2:])
    if to == 1:
        groups = max(kernel.shape[1] // base, 1)  # a space-to-depth stem holds the channels of each of its pixels
        return kernel.reshape(kernel.shape[0], groups, -1, *kernel.shape[2:]).sum(dim=2)
    tiled = kernel.repeat(1, -(-to // base), *[1] * (kernel.dim() - 2))[:, :to]
    return tiled * (base / to)


register(
    Op(
        "adapt_input_channels",
        "approximate",
        (1, 1),
        (Param("to", int), Param("base", int, 3, quiet=True)),
        _channels_shape,
        _channels,
        partners="Normalisation of the input: the mean and deviation of the new channels are the person's to give.",
        example=Example("adapt_input_channels(conv1.weight, to=1)", {"conv1.weight": [[[[1.0]], [[2.0]], [[4.0]]]]}),
    )
)
