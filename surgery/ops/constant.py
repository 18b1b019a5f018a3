"""Values that a rule gives and no source tensor holds, and the change of a tensor's type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.dtypes import SAFETENSORS, torch_dtype
from surgery.errors import PlanError
from surgery.ops.registry import Example, Op, Param, Shape, register, show

if TYPE_CHECKING:
    from torch import Tensor

_SHAPE = Param("shape", tuple)

# What each type holds without loss.
_HOLDS: dict[str, frozenset[str]] = {
    "F64": frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I32", "I16", "I8", "U8", "BOOL"}),
    "F32": frozenset({"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I16", "I8", "U8", "BOOL"}),
    "F16": frozenset({"F16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"}),
    "BF16": frozenset({"BF16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"}),
    "I64": frozenset({"I64", "I32", "I16", "I8", "U8", "BOOL"}),
    "I32": frozenset({"I32", "I16", "I8", "U8", "BOOL"}),
    "I16": frozenset({"I16", "I8", "U8", "BOOL"}),
}


def cast_is_exact(source: str | None, dtype: str) -> bool:
    """Whether every value of the source's type has its equal in `dtype`. An unknown source is taken for one that
    has not, except that float64 holds every float."""
    if source is None:
        return dtype == "F64"
    return source == dtype or source in _HOLDS.get(dtype, frozenset())


def _constant_shape(_: Sequence[Shape], *, shape: tuple[int, ...], value: float = 0.0) -> Shape:
    del value
    if any(length < 0 for length in shape):
        raise PlanError(f"shape={shape} cannot be: lengths are 0 or more")
    return shape


def _zeros(_: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    """Zeros: a bias that the target has and the source leaves out. In float64, as all constants: whoever stores it
    rounds once.

    Rule: torch.zeros.
    """
    import torch

    return torch.zeros(shape, dtype=torch.float64)


def _ones(_: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    """Ones: the gain of a norm that has none.

    Rule: torch.ones.
    """
    import torch

    return torch.ones(shape, dtype=torch.float64)


def _full(_: Sequence[Tensor], *, shape: tuple[int, ...], value: float) -> Tensor:
    """One number everywhere; inf and -inf are numbers too.

    Rule: torch.full.
    """
    import torch

    return torch.full(shape, value, dtype=torch.float64)


register(
    Op("zeros", "exact", (0, 0), (_SHAPE,), _constant_shape, _zeros, example=Example("zeros(shape=(2,))")),
)
register(
    Op("ones", "exact", (0, 0), (_SHAPE,), _constant_shape, _ones, example=Example("ones(shape=(2,))")),
)
register(
    Op(
        "full",
        "exact",
        (0, 0),
        (_SHAPE, Param("value", float)),
        _constant_shape,
        _full,
        example=Example("full(shape=(2, 1), value=-inf)"),
    )
)


def _normal_shape(_: Sequence[Shape], *, shape: tuple[int, ...], std: float, seed: int) -> Shape:
    if not 0 <= std < float("inf"):
        raise PlanError(f"std={std} has to be 0 or more, and finite")
    if not 0 <= seed < 2**63:
        raise PlanError(f"seed={seed} is no seed: 0 to 2^63 - 1")
    return _constant_shape(_, shape=shape)


def _normal(_: Sequence[Tensor], *, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Numbers drawn from a normal distribution about 0: the router of a mixture of experts, a head's new weight. The
    same for the same seed, whatever was drawn before. In float64, as all constants.

    Rule: torch.nn.init.normal_ with a generator of its own; 0.02 is the deviation of GPT-2 and BERT.
    """
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std


register(
    Op(
        "normal",
        "exact",
        (0, 0),
        (_SHAPE, Param("std", float, 0.02), Param("seed", int, 0)),
        _normal_shape,
        _normal,
        example=Example("normal(shape=(8, 768))"),
    )
)


def _dirac_shape(_: Sequence[Shape], *, shape: tuple[int, ...]) -> Shape:
    if len(shape) not in (2, 3, 4, 5) or min(shape) < 1:
        raise PlanError(f"shape={shape} is no kernel: 2 to 5 axes, out x in x ..., each of 1 or more")
    if any(length % 2 == 0 for length in shape[2:]):
        raise PlanError(f"a kernel of shape {show(shape)} has no middle: the lengths from the third on have to be odd")
    return shape


def _dirac(_: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    """The kernel that gives its input back: a linear map [out, in] or a convolution [out, in, ...] of odd lengths with
    "same" padding. In float64, as all constants.

    Rule: torch.nn.init.dirac_ and eye_; the layer that Net2DeeperNet inserts (Chen et al., arXiv 1511.05641).
    """
    import torch

    kernel = torch.zeros(shape, dtype=torch.float64)
    return torch.nn.init.dirac_(kernel) if len(shape) > 2 else torch.nn.init.eye_(kernel)


register(
    Op(
        "dirac",
        "exact",
        (0, 0),
        (_SHAPE,),
        _dirac_shape,
        _dirac,
        partners="The bias beside it is zeros, a norm after it does nothing, and the activation is idempotent (ReLU).",
        example=Example("dirac(shape=(2, 2))"),
    )
)


def _cast_shape(shapes: Sequence[Shape], *, dtype: str) -> Shape:
    if dtype not in SAFETENSORS:
        raise PlanError(f'dtype "{dtype}" is none of {", ".join(sorted(SAFETENSORS))}')
    return shapes[0]


def _cast(tensors: Sequence[Tensor], *, dtype: str) -> Tensor:
    """Changes the type, rounding to nearest even. Exact where the new type holds every value of the old one, else
    lossy.

    Rule: torch.Tensor.to; IEEE 754 rounding.
    """
    return tensors[0].to(torch_dtype(dtype))


register(
    Op(
        "cast",
        "lossy",
        (1, 1),
        (Param("dtype", str),),
        _cast_shape,
        _cast,
        example=Example('cast(w, dtype="BF16")', {"w": [1.0, 3.1415927]}),
    )
)
