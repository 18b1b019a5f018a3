"""The float64 twin: the same program, evaluated as if it had been written in float64 throughout.

`module.double()` is not that: a norm that casts to float32 inside crashes or rounds, and a float32 constant stays
one. A twin is a structural clone of the module (its tensors stand in their place as `Lifted`, which say that they are
float64 and are converted where an operation consumes them, so that no second copy of the weights is held), run under
`lifted()`, a pair of modes that turn every lower-precision cast, factory and constant into float64. The person's own
module is never touched: its training flag, hooks, buffers, dtype and device stay as they are, also after a failure.

Sources: torch.utils._python_dispatch (modes, wrapper subclasses); torch.nn.attention (math form of the attention).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# What is raised to float64.
LOW = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})
_FACTORIES = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


class Lifted(Tensor):
    """A tensor of lower precision that says it is float64.

    Its bytes stay where they are; an operation converts them on use.
    """

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor) -> Lifted:
        out: Lifted = Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=torch.float64,
            device=stored.device,
            requires_grad=False,
        )
        out.stored = stored
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Lifted({tuple(self.shape)}, from {self.stored.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return call(func, args, kwargs or {})


class Made(Tensor):
    """A tensor that is computed anew whenever an operation consumes it, and held nowhere."""

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], like: Tensor, device: torch.device) -> Made:
        """`like` has the shape, strides and type of what `make` gives on `device`; it is not kept."""
        out: Made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, requires_grad=False
        )
        out.make = make
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Made({tuple(self.shape)}, {self.dtype})"

    def formed(self) -> Tensor:
        return self.make().detach()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        one = args[0] if args else None
        if isinstance(one, Made) and func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Made(one.make, one, one.device)
        if isinstance(one, Made) and func in TURNS:
            like = torch.empty_strided(tuple(one.shape), one.stride(), dtype=one.dtype, device="meta")
            return Made(lambda: func(one.formed(), *args[1:]), func(like, *args[1:]), one.device)
        return func(*mapped(formed, args), **{k: mapped(formed, v) for k, v in (kwargs or {}).items()})


def formed(x: Any) -> Any:
    """A tensor that is made on use, with its values; anything else as it is."""
    return x.formed() if isinstance(x, Made) else x


def lift(x: Any) -> Any:
    """A lower-precision tensor as float64, a low dtype as torch.float64, anything else as it is."""
    if isinstance(x, Lifted):
        return formed(x.stored).detach().to(torch.float64)
    x = formed(x)
    if isinstance(x, Tensor):
        return x.to(torch.float64) if x.dtype in LOW else x
    if isinstance(x, torch.dtype) and x in LOW:
        return torch.float64
    return x


def mapped(f: Callable[[Any], Any], x: Any) -> Any:
    """f on every leaf of an operator's arguments, which are plain lists and tuples at most: cheaper than a pytree."""
    if type(x) in (list, tuple):
        return type(x)(mapped(f, y) for y in x)
    return f(x)


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator on lifted operands. Rows looked up in a table are lifted, the table is not."""
    if func in LOOKUPS and isinstance(args[0], Tensor) and all(not isinstance(a, Lifted) for a in args[1:]):
        table = args[0].stored.detach() if isinstance(args[0], Lifted) else args[0]
        return lift(func(table, *args[1:], **kwargs))
    if func in TURNS and isinstance(args[0], Lifted):
        return Lifted(func(args[0].stored.detach(), *args[1:], **kwargs))
    if func is torch.ops.aten.mm.default and args[1].numel() > SCRATCH and (w := _low(args[1])) is not None:
        return _mm_in_parts(lift(args[0]), formed(w))
    if func is GROUPED and args[0].ndim == 2:
        return _grouped_mm(*args, **kwargs)
    if func in PRODUCTS:
        return func(*_raised(args), **{k: mapped(lift, v) for k, v in kwargs.items()})
    return func(*mapped(lift, args), **{k: mapped(lift, v) for k, v in kwargs.items()})


class _Scratch(threading.local):
    buffer: Tensor | None = None


_scratch = _Scratch()
SCRATCH = 1 << 23  # elements at most


def scratch(n: int) -> Tensor | None:
    """float64 memory of n elements that was used before, until it is asked for again; None where that would be much.

    Of fresh memory, the first touch of its pages costs more than most arithmetic on it.
    """
    if n > SCRATCH:
        return None
    if _scratch.buffer is None or _scratch.buffer.numel() < n:
        _scratch.buffer = torch.empty(n, dtype=torch.float64)
    return _scratch.buffer[:n]


def _low(x: Any) -> Tensor | None:
    """What an operand of lower precision is stored as."""
    if isinstance(x, Lifted):
        return x.stored.detach()
    return x.detach() if isinstance(x, Tensor) and x.dtype in LOW else None


def _raised(args: Any) -> list[Any]:
    """The operands of a product, lifted: the largest into memory that the next product uses again."""
    low = [_low(x) for x in args]
    at = max(range(len(low)), key=lambda i: 0 if (t := low[i]) is None else t.numel())
    stored = low[at]
    n = 0 if stored is None else stored.numel()
    if stored is None or not 0 < n <= SCRATCH or stored.device.type != "cpu":
        return [mapped(lift, x) for x in args]
    flat = scratch(n)
    assert flat is not None
    strides = stored.stride()
    order = sorted(range(stored.ndim), key=lambda a: -strides[a])  # as it lies in memory
    back = sorted(range(stored.ndim), key=order.__getitem__)
    wide = flat.view([stored.shape[a] for a in order]).permute(back).copy_(stored)
    return [wide if i == at else mapped(lift, x) for i, x in enumerate(args)]


LOOKUPS = frozenset(
    {torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default}
)
# What they give shares no memory with what goes in.
PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default, torch.ops.aten.convolution.default,
    }
)  # fmt: skip
# A matrix turned for a product stays in the type that it is stored in: autograd keeps it.
TURNS = frozenset({torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default})


# Of experts, each with rows of its own; a kernel that has no float64.
GROUPED: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


def _grouped_mm(x: Any, w: Any, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Rows offs[n - 1] to offs[n] of x times w[n]; rows behind the last are zeros, where the kernel writes nothing. Of
    a matrix w, as in the gradient of that: columns of x times the rows of w so numbered, a matrix for each n."""
    rows, made, at = lift(x), lift(w), 0
    ends = offs.tolist()
    grouped = made.ndim == 3
    shape = (rows.shape[0], made.shape[2]) if grouped else (len(ends), rows.shape[0], made.shape[1])
    out = rows.new_zeros(shape)
    for n, end in enumerate(ends):
        if grouped:
            out[at:end] = rows[at:end] @ made[n]
        else:
            out[n] = rows[:, at:end] @ made[at:end]
        at = end
    return out


def _mm_in_parts(x: Tensor, w: Tensor) -> Tensor:
    """x @ w for a w so large (the vocabulary's) that it is raised some columns at a time."""
    out = x.new_empty(x.shape[0], w.shape[1])
    step = max(1, SCRATCH // max(1, w.shape[0]))
    for at in range(0, w.shape[1], step):
        part = w[:, at : at + step]
        out[:, at : at + step] = torch.mm(*_raised((x, part)))
    return out


class LiftCasts(TorchDispatchMode):
    """Raises every operand, cast and factory of lower precision to float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class LiftConstants(TorchFunctionMode):
    """`torch.tensor(0.1, dtype=torch.float32)` rounds before any operator runs: give it float64 to begin with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("dtype") in LOW:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that the modules hold: parameters, buffers, and plain attributes (also in lists and dicts)."""
    seen: set[int] = set()

    def walk(x: Any, depth: int) -> Iterator[Tensor]:
        if isinstance(x, Tensor):
            if id(x) not in seen:
                seen.add(id(x))
                yield x
        elif depth and isinstance(x, dict):
            for v in x.values():
                yield from walk(v, depth - 1)
        elif depth and isinstance(x, (list, tuple)):
            for v in x:
                yield from walk(v, depth - 1)

    for m in module.modules():
        for k, v in vars(m).items():
            if k != "_modules":
                yield from walk(v, 3)


def clone(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """A structural copy of `module` in eval mode in which each tensor x is `replace(x)`; ties stay ties."""
    memo: dict[int, Any] = {}
    keep: list[Tensor] = []  # ids in the memo must stay alive while copying
    for t in tensors_of(module):
        memo[id(t)] = new = replace(t)
        keep += [t, new]
    with torch.no_grad():
        return copy.deepcopy(module, memo).eval()


def lifted_tensor(t: Tensor, *, written: bool) -> Tensor:
    """The stand-in of one tensor in a twin. `written`: a forward pass may write into it (a buffer), so it is a copy."""
    if written:
        return t.detach().to(torch.float64 if t.dtype in LOW else t.dtype, copy=True)
    return Lifted(t.detach()) if t.dtype in LOW or isinstance(t, Made) else t.detach()


def twin(module: nn.Module, values: Mapping[str, Tensor] | None = None, *, written: bool = True) -> nn.Module:
    """The float64 twin of `module`; `values` (by state-dict name, any float dtype) stand in for its own tensors.
    `written`: buffers are copies, into which the program may write by any operator."""
    put: dict[int, Tensor] = {}
    if values:
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for name, v in values.items():
            put[id(own[name])] = v
    return clone(
        module, lambda t: lifted_tensor(put.get(id(t), t), written=written and not isinstance(t, nn.Parameter))
    )


@functools.cache
def _keep_freed_memory() -> None:
    """glibc gives memory of more than 128 KiB back to the system when it is freed, until a larger piece was: from then
    on pieces up to that size are used again. Activations of a run are of that size, and touching fresh pages costs more
    than the arithmetic (malloc(3), M_MMAP_THRESHOLD)."""
    torch.empty((1 << 25) - (1 << 12), dtype=torch.uint8)


@contextlib.contextmanager
def math_only() -> Iterator[None]:
    """Documented operators only, and no gradients.

    Attention in its math form, no fused encoder fast path, no vendor RNN kernels.
    """
    _keep_freed_memory()
    fast = torch.backends.mha.get_fastpath_enabled()
    dtype = torch.get_default_dtype()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if torch.backends.cudnn.is_available():
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(torch.float64)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def lifted(mode: TorchDispatchMode | None = None) -> Iterator[None]:
    """Inside, whatever runs on a twin runs in float64. `mode` may replace LiftCasts (the recorder is such a mode)."""
    with math_only(), LiftConstants(), mode if mode is not None else LiftCasts():
        yield


def run(fn: Callable[[nn.Module, Any], Any], module: nn.Module, x: Any) -> Any:
    """`fn(module, x)` on a twin, with x's floats in float64."""
    with lifted():
        return fn(module, tree_map(lift, x))
