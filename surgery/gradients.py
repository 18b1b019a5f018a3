"""The largest gradient in each line of each weight, of a graph walked back once.

A gradient of a matrix is as large as the matrix, and all that is asked of it is where it is zero. So it is never
formed: what the walk gives is kept as the product that it is (`Deferred`), and its lines are looked at some rows at a
time, in memory that is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from surgery import twin

aten = torch.ops.aten
LARGE = 1 << 16  # elements from which a gradient is not formed
BLOCK = 1 << 18  # elements of it that are looked at at once: they stay in the processor's cache
_SAME = frozenset({aten.detach.default, aten.alias.default, aten.clone.default})
_TURNED = frozenset({aten.t.default, aten.transpose.int})


class Deferred(Tensor):
    """A float64 matrix [n, m] that is a sum: of `products` ([n, k], [k, m]), and of `rows` (numbers [k], rows [k, m])
    that are added to those numbers. An operator that needs its elements gets them."""

    products: tuple[tuple[Tensor, Tensor], ...]
    rows: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        products: tuple[tuple[Tensor, Tensor], ...],
        rows: tuple[tuple[Tensor, Tensor], ...] = (),
        strides: tuple[int, ...] | None = None,
    ) -> Deferred:
        device = (products or rows)[0][1].device
        out: Deferred = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=torch.float64, device=device)
        out.products, out.rows = products, rows
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Deferred({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        one = args[0]
        if func in _SAME and isinstance(one, Deferred):
            return Deferred(tuple(one.shape), one.products, one.rows)
        if func in _TURNED and isinstance(one, Deferred) and not one.rows:
            return Deferred(tuple(one.shape)[::-1], tuple((b.t(), a.t()) for a, b in one.products))
        # Autograd lays a gradient out as its leaf is laid out.
        if func is aten.new_empty_strided.default and isinstance(one, Deferred) and tuple(args[1]) == tuple(one.shape):
            return Deferred(tuple(one.shape), one.products, one.rows, tuple(args[2]))
        if func is aten.copy_.default and all(isinstance(a, Deferred) for a in args[:2]):
            one.products, one.rows = args[1].products, args[1].rows
            return one
        if func is aten.add.Tensor and not kwargs and all(isinstance(a, Deferred) for a in args):
            other = args[1]
            return Deferred(tuple(one.shape), one.products + other.products, one.rows + other.rows)

        if isinstance(one, Deferred) and (more := _added(func, args, kwargs)) is not None:
            return Deferred(tuple(one.shape), one.products, (*one.rows, more))

        def formed(x: Any) -> Any:
            return x.dense() if isinstance(x, Deferred) else x

        if isinstance(one, Deferred) and func._schema.is_mutable:  # what is written into it is kept as rows
            dense = one.dense()
            twin.call(func, twin.mapped(formed, (dense, *args[1:])), kwargs)
            one.products, one.rows = (), ((torch.arange(len(dense), device=dense.device), dense),)
            return one
        return twin.call(func, twin.mapped(formed, args), {k: twin.mapped(formed, v) for k, v in kwargs.items()})

    def dense(self) -> Tensor:
        out = torch.zeros(tuple(self.shape), dtype=torch.float64, device=self.device)
        for a, b in self.products:
            out.addmm_(a, b)
        for at, more in self.rows:
            out.index_add_(0, at, more)
        return out

    def largest(self) -> list[Tensor]:
        """The largest absolute value in each row, and in each column."""
        n, m = self.shape
        rows = torch.zeros(n, dtype=torch.float64, device=self.device)
        columns = torch.zeros(m, dtype=torch.float64, device=self.device)
        if not self.products:  # of a table, few rows were looked up
            at = torch.cat([at for at, _ in self.rows])
            seen, place = torch.unique(at, return_inverse=True)
            some = torch.zeros(len(seen), m, dtype=torch.float64, device=self.device)
            some.index_add_(0, place, torch.cat([more for _, more in self.rows])).abs_()
            if len(seen):
                rows[seen], columns = some.amax(1), some.amax(0)
            return [rows, columns]
        step = max(1, min(n, BLOCK // max(1, m)))
        memory = torch.empty(step * m, dtype=torch.float64, device=self.device)
        (a, b), *others = self.products
        for first in range(0, n, step):
            last = min(n, first + step)
            block = memory[: (last - first) * m].view(last - first, m)
            torch.mm(a[first:last], b, out=block)
            for c, d in others:
                block.addmm_(c[first:last], d)
            for at, more in self.rows:
                here = (at >= first) & (at < last)
                block.index_add_(0, at[here] - first, more[here])
            block.abs_()
            rows[first:last] = block.amax(1)
            columns = torch.maximum(columns, block.amax(0))
        return [rows, columns]


def _alike(t: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Is what is made beside t, by these options, a plain float64 tensor where t is?"""
    return (
        kwargs.get("dtype") in (None, torch.float64)
        and t.dtype == torch.float64
        and kwargs.get("device") in (None, t.device)
        and kwargs.get("layout") in (None, torch.strided)
    )


def _added(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """The rows that an operator adds to its first operand, and their numbers; None where it does something else."""
    if kwargs:
        return None
    if func is aten.index_add.default and args[1] in (0, -2):
        at, rows = args[2], args[3]
    elif func is aten.index_put.default and len(args) > 3 and args[3] and len(args[1]) == 1:
        at, rows = args[1][0], args[2]
    else:
        return None
    if at is None or at.dtype != torch.int64 or any(type(t) is not Tensor for t in (at, rows)):
        return None
    shape = (*at.shape, args[0].shape[1])
    return at.reshape(-1) % args[0].shape[0], rows.expand(shape).reshape(-1, shape[-1])


class Deferring(TorchDispatchMode):
    """Keeps large gradients of matrices as the products that they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.mm.default and all(type(a) is Tensor and a.dtype == torch.float64 for a in args):
            a, b = args  # no weights among them, as in the gradient of what they were multiplied with
            if a.shape[0] * b.shape[1] >= LARGE and a.shape[1] < min(a.shape[0], b.shape[1]):
                return Deferred((a.shape[0], b.shape[1]), ((a, b),))
        if func is aten.embedding_dense_backward.default and not args[4] and args[0].dtype == torch.float64:
            grad, ids, n, padding = args[:4]
            at, rows = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
            if n * rows.shape[1] >= LARGE:
                kept = at != padding
                return Deferred((n, rows.shape[1]), (), ((at[kept], rows[kept]),))
        if func is aten.new_zeros.default and len(args[1]) == 2 and _alike(args[0], kwargs or {}):
            n, m = args[1]
            if n * m >= LARGE:
                none = torch.empty(0, dtype=torch.int64, device=args[0].device)
                return Deferred((n, m), (), ((none, args[0].new_empty((0, m))),))
        return twin.call(func, args, kwargs or {})


def pulled(total: Tensor | None, leaves: Mapping[int, Tensor]) -> dict[int, list[Tensor]] | None:
    """For each leaf and each of its axes, the largest gradient of `total` in each line. A leaf's gradient is looked at
    as soon as it is there and not kept. None where the graph cannot be walked back: the program wrote into what it had
    used."""
    found: dict[int, list[Tensor]] = {}
    if total is None or not total.requires_grad or not leaves:
        return found

    def looked(vid: int) -> Callable[[Tensor], None]:
        def look(leaf: Tensor) -> None:
            assert leaf.grad is not None
            found[vid] = largest(leaf.grad.detach())
            leaf.grad = None

        return look

    handles = [leaf.register_post_accumulate_grad_hook(looked(vid)) for vid, leaf in leaves.items()]
    try:
        with Deferring():
            torch.autograd.backward([total], inputs=list(leaves.values()))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None
    finally:
        for h in handles:
            h.remove()
    return found


def largest(g: Tensor) -> list[Tensor]:
    """For each axis, the largest absolute value in each line."""
    if isinstance(g, Deferred):
        return [t.cpu() for t in g.largest()]
    if g.ndim < 2:
        return [g.abs().reshape(-1).cpu()]
    flat = g.reshape(g.shape[0], -1)
    rows = torch.maximum(flat.amax(1), -flat.amin(1))
    some = torch.nonzero(rows).flatten()
    if len(some) < len(rows) // 2:  # of a table, few rows were looked up
        g = g.index_select(0, some)
    return [rows.cpu()] + [
        g.abs().amax([a for a in range(g.ndim) if a != axis]).cpu()
        if g.numel()
        else torch.zeros(g.shape[axis], dtype=g.dtype)
        for axis in range(1, g.ndim)
    ]
