"""Canonical spellings: operators taken apart, so that every parameter meets one product or one sum of its own.

Operators that hide a parameter inside a larger computation (addmm, layer norm, batch norm, a convolution's bias) become
the documented arithmetic that they stand for, so that two libraries which spell the same function differently leave
comparable tapes. Each entry calls its parts through the recorder (`r.call`), which writes them down.

Sources: the operators' formulas in the documentation of torch.nn; PReLU: He et al. 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery import twin
from surgery.mapper import products

aten = torch.ops.aten


# Interpolations whose kernel is one at its centre and zero at every other pixel.
RESAMPLING = tuple(
    getattr(aten, name).default
    for name in (
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
        "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    )
)  # fmt: skip


class Recorder(Protocol):
    """What runs an operator and writes it down."""

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any: ...

    def weights_only(self, t: Tensor) -> bool:
        """Is t made of parameters alone?"""

    def weights_free(self, t: Tensor) -> bool:
        """Is t made without any parameter?"""

    def scaled(self, t: Tensor) -> tuple[Tensor, Tensor] | None:
        """(x, w) where t was made as x * w, x depends on the inputs and w is made of parameters alone."""

    def note_shifted(self, t: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor) -> None:
        """Remember that t is x * scale - shift, where scale (None: one) and shift are made of parameters alone."""

    def shifted(self, t: Tensor) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """(x, scale, shift) of a value that was noted so, as long as none of them was written into."""

    def note_pairs(self, x: Tensor) -> Tensor:
        """The complex value that pairs of real ones are; remembered, and written down only where that is needed."""

    def paired(self, z: Tensor) -> Tensor | None:
        """The pairs of real numbers that a complex value was made of."""


def _channel(x: Tensor, t: Tensor) -> list[int]:
    """The shape in which t, one value a channel, meets x."""
    shape = [1] * x.ndim
    shape[1] = t.numel()
    return shape


def _one_a_channel(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, *rest: Any) -> bool:
    """Does a convolution multiply every channel by a number of its own, and no more? One channel alone is a product."""
    groups = rest[-1]
    plain = all(n == 1 for n in stride) and not any(padding) and not any(rest[1])
    return plain and x.ndim == w.ndim and groups > 1 and x.shape[1] == groups == w.numel() and w.is_contiguous()


def _canon() -> dict[Any, Callable[..., Any]]:
    def addmm(r: Recorder, b: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        return _scaled_add(r, products.mm(r, x, w), b, beta, alpha)

    def addmv(r: Recorder, b: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        y = r.call(aten.squeeze.dim, r.call(aten.mm.default, x, r.call(aten.unsqueeze.default, w, 1)), 1)
        return _scaled_add(r, y, b, beta, alpha)

    def mv(r: Recorder, x: Any, w: Any) -> Any:
        return r.call(aten.squeeze.dim, r.call(aten.mm.default, x, r.call(aten.unsqueeze.default, w, 1)), 1)

    def dot(r: Recorder, a: Any, b: Any) -> Any:
        y = r.call(aten.mm.default, r.call(aten.unsqueeze.default, a, 0), r.call(aten.unsqueeze.default, b, 1))
        return r.call(aten.view.default, y, [])

    def baddbmm(r: Recorder, b: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        return _scaled_add(r, products.bmm(r, x, w), b, beta, alpha)

    def _scaled_add(r: Recorder, y: Any, b: Any, beta: Any, alpha: Any) -> Any:
        if alpha != 1:
            y = r.call(aten.mul.Tensor, y, alpha)
        if beta == 0:
            return y
        if beta != 1:
            b = r.call(aten.mul.Tensor, b, beta)
        return r.call(aten.add.Tensor, y, b)

    def affine(r: Recorder, y: Any, w: Any, b: Any, shape: list[int] | None) -> Any:
        for op, p in ((aten.mul.Tensor, w), (aten.add.Tensor, b)):
            if p is not None:
                y = r.call(op, y, p if shape is None else r.call(aten.view.default, p, shape))
        return y

    def layer_norm(r: Recorder, x: Any, shape: Any, w: Any, b: Any, eps: float) -> Any:
        y, mean, rstd = r.call(aten.native_layer_norm.default, x, shape, None, None, eps)
        return affine(r, y, w, b, None), mean, rstd

    def group_norm(r: Recorder, x: Any, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
        y, mean, rstd = r.call(aten.native_group_norm.default, x, None, None, n, c, hw, groups, eps)
        return affine(r, y, w, b, [1, c] + [1] * (x.ndim - 2)), mean, rstd

    def batch_norm_eval(r: Recorder, x: Any, w: Any, b: Any, mean: Any, var: Any, eps: float) -> Any:
        # As a scale and a shift (the frozen spelling): so it stays comparable where the norm was folded away.
        shape = _channel(x, mean)
        s = rsqrt(r, r.call(aten.add.Tensor, var, eps))
        s = s if w is None else r.call(aten.mul.Tensor, w, s)
        y = r.call(aten.mul.Tensor, x, r.call(aten.view.default, s, shape))
        t = r.call(aten.mul.Tensor, mean, s)
        if b is None:
            return r.call(aten.sub.Tensor, y, r.call(aten.view.default, t, shape))
        return r.call(aten.add.Tensor, y, r.call(aten.view.default, r.call(aten.sub.Tensor, b, t), shape))

    def batch_norm(
        r: Recorder, x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
    ) -> Any:
        if training or mean is None:  # statistics of the input itself
            y, m, s = r.call(aten.native_batch_norm.default, x, None, None, mean, var, training, momentum, eps)
            return affine(r, y, w, b, [1, x.shape[1]] + [1] * (x.ndim - 2)), m, s
        y = batch_norm_eval(r, x, w, b, mean, var, eps)
        return y, x.new_empty(0), x.new_empty(0)

    def batch_norm_legit(r: Recorder, x: Any, w: Any, b: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
        return batch_norm_eval(r, x, w, b, mean, var, eps), x.new_empty(0), x.new_empty(0)

    def convolution(r: Recorder, x: Any, w: Any, b: Any, *rest: Any) -> Any:
        if _one_a_channel(x, w, *rest):  # a scale, as some write it
            y = mul(r, x, r.call(aten.view.default, w, _channel(x, w)))
        else:
            y = r.call(aten.convolution.default, x, w, None, *rest)
        return y if b is None else r.call(aten.add.Tensor, y, r.call(aten.view.default, b, _channel(y, b)))

    def addcmul(r: Recorder, a: Any, b: Any, c: Any, *, value: Any = 1) -> Any:
        y = r.call(aten.mul.Tensor, b, c)
        return r.call(aten.add.Tensor, a, y if value == 1 else r.call(aten.mul.Tensor, y, value))

    def addcdiv(r: Recorder, a: Any, b: Any, c: Any, *, value: Any = 1) -> Any:
        y = r.call(aten.div.Tensor, b, c)
        return r.call(aten.add.Tensor, a, y if value == 1 else r.call(aten.mul.Tensor, y, value))

    def rsub(r: Recorder, a: Any, b: Any, alpha: Any = 1) -> Any:
        a = a if alpha == 1 else r.call(aten.mul.Tensor, a, alpha)
        return r.call(aten.add.Tensor, r.call(aten.neg.default, a), b)

    def sub(r: Recorder, a: Any, b: Any, *, alpha: Any = 1) -> Any:
        b = b if alpha == 1 else r.call(aten.mul.Tensor, b, alpha)
        y = r.call(aten.sub.Tensor, a, b)
        if _scaled_by(r, a, b):
            r.note_shifted(y, a, None, b)
        return y

    def pairs_of(r: Recorder, z: Any) -> Any:
        """A complex value as pairs of real ones."""
        return found if (found := r.paired(z)) is not None else r.call(aten.view_as_real.default, z)

    def view_as_complex(r: Recorder, x: Any) -> Any:
        return r.note_pairs(x)

    def view_as_real(r: Recorder, z: Any) -> Any:
        found = r.paired(z)
        return r.call(aten.view_as_real.default, z) if found is None else r.call(aten.clone.default, found)

    def turned(r: Recorder, y: Any, z: Any) -> Any:
        """A product of complex values, as that of their parts is spelled (positions that turn pairs)."""
        a, b, c, d = (r.call(aten.select.int, pairs_of(r, t), -1, i) for t in (y, z) for i in (0, 1))
        one = r.call(aten.sub.Tensor, r.call(aten.mul.Tensor, a, c), r.call(aten.mul.Tensor, b, d))
        two = r.call(aten.add.Tensor, r.call(aten.mul.Tensor, a, d), r.call(aten.mul.Tensor, b, c))
        return view_as_complex(r, stack(r, [one, two], -1))

    def mul(r: Recorder, a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_complex() and b.is_complex():
            return turned(r, a, b)
        for x, w in ((a, b), (b, a)):
            if _scaled_by(r, x, w) and (found := r.shifted(x)) is not None:
                # (x - m) * s, a norm by stored statistics written out: x * s - m * s, as batch_norm_eval has it
                x, s, m = found
                s, m = w if s is None else r.call(aten.mul.Tensor, s, w), r.call(aten.mul.Tensor, m, w)
                y = r.call(aten.sub.Tensor, r.call(aten.mul.Tensor, x, s), m)
                r.note_shifted(y, x, s, m)
                return y
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not r.weights_only(a) and not r.weights_only(b):
            for x, y in ((a, b), (b, a)):
                if (made := r.scaled(x)) is not None:  # (x * w) * y is (x * y) * w
                    return r.call(aten.mul.Tensor, r.call(aten.mul.Tensor, made[0], y), made[1])
        return r.call(aten.mul.Tensor, a, b)

    def _scaled_by(r: Recorder, x: Any, w: Any) -> bool:
        """Is x a value of the run, and w one that is made of parameters alone?"""
        if not isinstance(x, Tensor) or not isinstance(w, Tensor) or not w.is_floating_point():
            return False
        return r.weights_only(w) and not r.weights_only(x)

    def add(r: Recorder, a: Any, b: Any, *, alpha: Any = 1) -> Any:
        return r.call(aten.add.Tensor, a, b if alpha == 1 else r.call(aten.mul.Tensor, b, alpha))

    def embedding(r: Recorder, w: Any, ids: Any, *_: Any) -> Any:
        return r.call(aten.index.Tensor, w, [ids])

    def stack(r: Recorder, ts: Any, dim: int = 0) -> Any:
        dim = dim if dim >= 0 else dim + ts[0].ndim + 1
        return r.call(aten.cat.default, [r.call(aten.unsqueeze.default, t, dim) for t in ts], dim)

    def mean(r: Recorder, x: Any, dims: Any, keep: bool = False, *, dtype: Any = None) -> Any:
        dims = list(dims) if dims else list(range(x.ndim))
        n = math.prod(x.shape[d] for d in dims)
        return r.call(aten.div.Tensor, products.summed(r, x, dims, keep), n)

    def copy(r: Recorder, x: Any, y: Any, *_: Any) -> Any:
        y = y if isinstance(y, Tensor) else torch.as_tensor(y)
        y = r.call(aten.expand.default, y, list(x.shape))
        return y if y.dtype == x.dtype else r.call(aten._to_copy.default, y, dtype=x.dtype)

    def rsqrt(r: Recorder, x: Any) -> Any:
        return r.call(aten.reciprocal.default, r.call(aten.sqrt.default, x))

    def power(r: Recorder, x: Any, n: Any) -> Any:
        if n == 0.5:
            return r.call(aten.sqrt.default, x)
        if n == -0.5:
            return rsqrt(r, x)
        if n == -1:
            return r.call(aten.reciprocal.default, x)
        return r.call(aten.pow.Tensor_Scalar, x, n)

    def div(r: Recorder, x: Any, y: Any) -> Any:
        if isinstance(y, Tensor) and isinstance(x, Tensor) and y.is_floating_point() and r.weights_only(y):
            return mul(r, x, r.call(aten.reciprocal.default, y))  # one spelling for a scale by weights
        if isinstance(y, Tensor) and isinstance(x, Tensor) and (made := r.scaled(x)) is not None:
            return r.call(aten.mul.Tensor, r.call(aten.div.Tensor, made[0], y), made[1])  # the scale comes last
        return r.call(aten.div.Tensor, x, y)

    def counted(op: Any) -> Callable[..., Any]:
        """One spelling for the axis: counted from the front."""

        def made(r: Recorder, x: Any, axis: int, *rest: Any) -> Any:
            return r.call(op, x, axis % x.ndim if x.ndim else 0, *rest)

        return made

    def prelu(r: Recorder, x: Any, w: Any) -> Any:
        pos = r.call(aten.clamp_min.default, x, 0)
        neg = r.call(aten.clamp_max.default, x, 0)
        shape = _channel(x, w) if w.numel() > 1 and x.ndim > 1 else [1] * x.ndim
        return r.call(aten.add.Tensor, pos, r.call(aten.mul.Tensor, neg, r.call(aten.view.default, w, shape)))

    def fresh(r: Recorder, x: Any, size: Any, fill: Any, dtype: Any, device: Any) -> Any:
        dtype, device = x.dtype if dtype is None else dtype, x.device if device is None else device
        return r.call(aten.full.default, list(size), fill, dtype=dtype, device=device)

    def like(op: Any, fill: Any) -> Callable[..., Any]:
        """A tensor shaped like another holds nothing of it: the state that a recurrence starts from is no data."""

        def made(r: Recorder, x: Any, *args: Any, dtype: Any = None, device: Any = None, **rest: Any) -> Any:
            if not x.is_contiguous() or rest.get("layout") not in (None, torch.strided):
                return r.call(op, x, *args, dtype=dtype, device=device, **rest)
            return fresh(r, x, x.shape, args[0] if fill is None else fill, dtype, device)

        return made

    def new(fill: Any) -> Callable[..., Any]:
        def made(r: Recorder, x: Any, size: Any, *args: Any, dtype: Any = None, device: Any = None, **_: Any) -> Any:
            return fresh(r, x, size, args[0] if fill is None else fill, dtype, device)

        return made

    def resampled(op: Any) -> Callable[..., Any]:
        """To the size that it has: every sampling point is a pixel, whatever the kernel, and the image is itself."""

        def sample(r: Recorder, x: Any, size: Any, *rest: Any, **named: Any) -> Any:
            scales = [
                s for s in (*rest, *named.values()) if not isinstance(s, bool)
            ]  # the others say how corners align
            if list(size) == list(x.shape[2:]) and all(s is None or s == 1 for s in scales):
                return r.call(aten.clone.default, x)
            return r.call(op, x, size, *rest, **named)

        return sample

    return {
        **{op: resampled(op) for op in RESAMPLING},
        **{op: counted(op) for op in (aten._softmax.default, aten._log_softmax.default)},
        aten.zeros_like.default: like(aten.zeros_like.default, 0),
        aten.ones_like.default: like(aten.ones_like.default, 1),
        aten.full_like.default: like(aten.full_like.default, None),
        aten.new_zeros.default: new(0),
        aten.new_ones.default: new(1),
        aten.new_full.default: new(None),
        aten.addmm.default: addmm,
        aten.addmv.default: addmv,
        aten.mv.default: mv,
        aten.dot.default: dot,
        aten.baddbmm.default: baddbmm,
        aten.native_layer_norm.default: layer_norm,
        aten.native_group_norm.default: group_norm,
        aten.native_batch_norm.default: batch_norm,
        aten._native_batch_norm_legit_no_training.default: batch_norm_legit,
        aten.convolution.default: convolution,
        aten.addcmul.default: addcmul,
        aten.addcdiv.default: addcdiv,
        aten.rsub.Tensor: rsub,
        aten.rsub.Scalar: rsub,
        aten.sub.Tensor: sub,
        aten.mul.Tensor: mul,
        aten.add.Tensor: add,
        aten.embedding.default: embedding,
        aten.copy.default: copy,
        aten.rsqrt.default: rsqrt,
        aten.pow.Tensor_Scalar: power,
        aten.div.Tensor: div,
        aten.stack.default: stack,
        aten.mean.dim: mean,
        aten.mm.default: products.mm,
        aten.bmm.default: products.bmm,
        aten.sum.dim_IntList: products.summed,
        aten._prelu_kernel.default: prelu,
        aten.view_as_complex.default: view_as_complex,
        aten.view_as_real.default: view_as_real,
    }


CANON = _canon()
if twin.GROUPED is not None:
    CANON[twin.GROUPED] = products.grouped
