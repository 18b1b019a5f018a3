"""Rows of embeddings and heads for other tokens and other labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import PlanError
from surgery.ops.registry import Example, Op, Param, Shape, Step, register, show
from surgery.ops.resize import floating, is_double

if TYPE_CHECKING:
    from torch import Tensor

SEED = Param("seed", int, 0)
_SPREAD = 1e-9  # the covariance of new rows in that of the old


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise PlanError(f"seed={seed} is no seed: 0 to 2^63 - 1")


def made_rows(old: Tensor, count: int, seed: int) -> Tensor:
    """`count` new rows for a table [tokens, width] or a bias [tokens], drawn about the mean of the old ones, in their
    type. Computed in float32, or float64 for float64, on the CPU, so that a seed means the same everywhere."""
    import torch
    from torch.distributions import MultivariateNormal, constraints

    # copied from another device in its own type first: rounding must not depend on where it lies
    rows = old.detach().cpu()
    rows = rows if is_double(rows) else rows.to(torch.float32)
    with torch.random.fork_rng(devices=[]):
        # the distribution draws from the default generator only
        torch.default_generator.manual_seed(seed)
        if rows.dim() == 1:
            deviation = rows.std() if rows.numel() > 1 else torch.zeros((), dtype=rows.dtype)
            made = torch.empty(count, dtype=rows.dtype).normal_(float(rows.mean()), _SPREAD * float(deviation))
        else:
            mean = rows.mean(dim=0)
            centred = rows - mean
            covariance = _SPREAD * (centred.T @ centred / rows.shape[0])
            if rows.shape[1] and bool(constraints.positive_definite.check(covariance).all()):
                made = MultivariateNormal(mean, covariance_matrix=covariance).sample((count,))
            else:  # fewer rows than the width, say: no density, so the mean itself
                made = mean.expand(count, -1)
    return made.to(old.dtype).to(old.device)


def _resize_shape(shapes: Sequence[Shape], *, to: int, seed: int) -> Shape:
    (shape,) = shapes
    _check_seed(seed)
    if len(shape) not in (1, 2):
        raise PlanError(f"a table has the shape tokens x width, its bias that of tokens; not {show(shape)}")
    if to < 1:
        raise PlanError(f"to={to} is no number of tokens: 1 or more")
    if to > shape[0] == 0:
        raise PlanError(f"a table of shape {show(shape)} has no rows to make new ones from")
    return (to, *shape[1:])


def _resize(tensors: Sequence[Tensor], *, to: int, seed: int) -> Tensor:
    """An embedding or a head, [tokens, width], or its bias, [tokens], for `to` tokens that keep their numbers: the
    rows both have are copied; new ones are drawn from the normal distribution with the mean of the old rows and 1e-9
    of their covariance. One seed, the same rows: an embedding and a head that were equal stay so.

    Rule: transformers' resize_token_embeddings with mean_resizing (Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models", 2021); the same numbers as after torch.manual_seed(seed).
    """
    import torch

    table = floating(tensors[0], "vocab_resize")
    if to <= table.shape[0]:
        return table[:to]
    return torch.cat((table, made_rows(table, to - table.shape[0], seed)))


register(
    Op(
        "vocab_resize",
        "approximate",
        (1, 1),
        (Param("to", int), SEED),
        _resize_shape,
        _resize,
        inverse=lambda shapes, params: [
            (Step("slice", {"axis": 0, "start": 0, "stop": shapes[0][0]}),)
            if 0 < shapes[0][0] <= params["to"]
            else None
        ],
        partners="The embedding, the head over the same tokens and the head's bias change together, with one seed.",
        example=Example("vocab_resize(wte.weight, to=50264, seed=0)", {"wte.weight": (50257, 768)}),
    )
)
