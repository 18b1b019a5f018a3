"""Kernels for other inputs: another number of channels, spectrograms, video; and norms folded into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import PlanError
from surgery.ops.arithmetic import compute
from surgery.ops.registry import Example, Op, Param, Shape, Step, Steps, register, show
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
        if shape[1] % base:  # a multiple is a space-to-depth stem
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


def _spectrogram_shape(shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    if len(shape) != 4 or not shape[1]:
        raise PlanError(f"a patch kernel has the shape width x channels x rows x columns, not {show(shape)}")
    return (shape[0], 1, *shape[2:])


def _spectrogram(tensors: Sequence[Tensor]) -> Tensor:
    """A kernel over patches of an image, [width, channels, rows, columns], for spectrograms, which have one channel:
    the sum over the channels.

    Rule: AST (Gong et al., arXiv 2104.01778), section 2.2.
    """
    return compute(lambda kernel: kernel.sum(dim=1, keepdim=True), *tensors)


register(
    Op(
        "spectrogram_patch",
        "approximate",
        (1, 1),
        (),
        _spectrogram_shape,
        _spectrogram,
        partners="Positions: spectrogram_pos_embed, for the grid of frequency and time that the strides make.",
        example=Example("spectrogram_patch(proj.weight)", {"proj.weight": (768, 3, 16, 16)}),
    )
)


def _inflate_shape(shapes: Sequence[Shape], *, frames: int, how: str) -> Shape:
    (shape,) = shapes
    if len(shape) != 4:
        raise PlanError(f"a kernel over images has the shape out x in x rows x columns, not {show(shape)}")
    if frames < 1:
        raise PlanError(f"frames={frames} has to be 1 or more")
    if how not in ("mean", "centre"):
        raise PlanError(f'how="{how}" is none of mean, centre')
    return (*shape[:2], frames, *shape[2:])


def _inflate(tensors: Sequence[Tensor], *, frames: int, how: str) -> Tensor:
    """A kernel over images, [out, in, rows, columns], for video: [out, in, frames, rows, columns]. how="mean" repeats
    it over time divided by `frames`; "centre" has it on the frame frames // 2 and zeros elsewhere. The function is
    the same on a video that stands still, away from padding in time.

    Rule: I3D (Carreira and Zisserman, arXiv 1705.07750); the centre: ViViT (Arnab et al., arXiv 2103.15691).
    """
    (kernel,) = tensors
    if how == "centre":
        video = kernel.new_zeros((*kernel.shape[:2], frames, *kernel.shape[2:]))
        video[:, :, frames // 2] = kernel
        return video
    return compute(lambda k: k.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames, kernel)


def _deflate(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    frames, middle = params["frames"], params["frames"] // 2
    cut = Step("slice", {"axis": 2, "start": middle, "stop": middle + 1})
    flat = Step("reshape", {"shape": shapes[0]})
    return [(cut, flat) if params["how"] == "centre" else (cut, flat, Step("scale", {"by": float(frames)}))]


register(
    Op(
        "inflate_2d_to_3d",
        "preserving",
        (1, 1),
        (Param("frames", int), Param("how", str, "mean", quiet=True)),
        _inflate_shape,
        _inflate,
        inverse=_deflate,
        partners="Positions: one table for each frame, repeated; norms and biases stay.",
        example=Example("inflate_2d_to_3d(w, frames=2)", {"w": [[[[1.0, 3.0]]]]}),
    )
)

_EPS = Param("eps", float, 1e-5)


def _per_channel(shapes: Sequence[Shape], names: Sequence[str], channels: int) -> None:
    for number, (name, shape) in enumerate(zip(names, shapes, strict=True), start=2):
        if shape != (channels,):
            raise PlanError(
                f"argument {number}, {name}, has shape {show(shape)} where {channels} channels come out of the kernel"
            )


def _check_eps(eps: float) -> None:
    if not eps >= 0:
        raise PlanError(f"eps={eps} has to be 0 or more")


def _bn_shape(shapes: Sequence[Shape], *, eps: float, transposed: int) -> Shape:
    kernel, *rest = shapes
    _check_eps(eps)
    if transposed not in (0, 1):
        raise PlanError(f"transposed={transposed} is neither 1, yes, nor 0, no")
    if len(kernel) < 2:
        raise PlanError(f"a kernel has the shape out x in x ..., not {show(kernel)}")
    _per_channel(rest, ("the gain", "the running variance"), kernel[transposed])
    return kernel


def _bn_fold(tensors: Sequence[Tensor], *, eps: float, transposed: int) -> Tensor:
    """The weight of a convolution or linear map, [out, in, ...], with the norm after it folded in: bn_fold(weight,
    norm.weight, norm.running_var). transposed=1 for a transposed convolution, [in, out, ...]. The function is the same
    in eval mode. Its bias: bn_fold_bias. A norm without gain has ones(shape=(out,)).

    Rule: torch.nn.utils.fusion.fuse_conv_bn_weights.
    """

    def fold(kernel: Tensor, gain: Tensor, variance: Tensor) -> Tensor:
        from torch.nn.utils.fusion import fuse_conv_bn_weights

        return fuse_conv_bn_weights(kernel, None, variance, variance, eps, gain, None, bool(transposed))[0].detach()

    return compute(fold, *tensors)


def _bn_bias_shape(shapes: Sequence[Shape], *, eps: float) -> Shape:
    _check_eps(eps)
    bias, *rest = shapes
    if len(bias) != 1:
        raise PlanError(f"a bias has one axis, not the shape {show(bias)}")
    _per_channel(rest, ("the gain", "the norm's bias", "the running mean", "the running variance"), bias[0])
    return bias


def _bn_fold_bias(tensors: Sequence[Tensor], *, eps: float) -> Tensor:
    """The bias of a convolution or linear map with the norm after it folded in: bn_fold_bias(bias, norm.weight,
    norm.bias, norm.running_mean, norm.running_var), each of [out]. A convolution without bias has zeros(shape=(out,)).

    Rule: torch.nn.utils.fusion.fuse_conv_bn_weights.
    """

    def fold(bias: Tensor, gain: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        from torch.nn.utils.fusion import fuse_conv_bn_weights

        kernel = gain.unsqueeze(1)  # its own fold is not asked for
        return fuse_conv_bn_weights(kernel, bias, mean, variance, eps, gain, beta)[1].detach()

    return compute(fold, *tensors)


register(
    Op(
        "bn_fold",
        "preserving",
        (3, 3),
        (_EPS, Param("transposed", int, 0, quiet=True)),
        _bn_shape,
        _bn_fold,
        partners="The bias takes bn_fold_bias, and the norm itself is gone; its count of batches is dropped.",
        example=Example("bn_fold(w, gain, var, eps=0.0)", {"w": [[1.0], [1.0]], "gain": [2.0, 3.0], "var": [4.0, 1.0]}),
    )
)
register(
    Op(
        "bn_fold_bias",
        "preserving",
        (5, 5),
        (_EPS,),
        _bn_bias_shape,
        _bn_fold_bias,
        partners="The weight takes bn_fold.",
        example=Example(
            "bn_fold_bias(b, gain, beta, mean, var, eps=0.0)",
            {"b": [3.0], "gain": [2.0], "beta": [0.5], "mean": [1.0], "var": [4.0]},
        ),
    )
)
