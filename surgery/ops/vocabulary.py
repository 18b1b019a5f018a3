"""Rows of embeddings and heads for other tokens and other labels."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import PlanError
from surgery.ops.registry import Example, Op, Param, Shape, Step, Steps, axis_of, register, show
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
    Pretrained Language Models", 2021); the numbers that its sampling draws after torch.manual_seed(seed).
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
        example=Example("vocab_resize(wte.weight, to=104, seed=0)", {"wte.weight": (100, 8)}),
    )
)


NEW = -1  # the old row of a token that has none
_ITEM = re.compile(r"\+(\d{1,9})|(\d{1,9})(?::(\d{1,9}))?", re.ASCII)


def spell_rows(old: Sequence[int]) -> str:
    """For each new row the old one or NEW, as vocab_map writes it: "0:3 +1 7" is (0, 1, 2, NEW, 7)."""
    items: list[str] = []
    start = 0
    while start < len(old):
        stop = start + 1
        step = 0 if old[start] == NEW else 1
        while stop < len(old) and old[stop] == old[stop - 1] + step and (old[stop] == NEW) == (old[start] == NEW):
            stop += 1
        count, first = stop - start, old[start]
        items.append(f"+{count}" if first == NEW else f"{first}" if count == 1 else f"{first}:{first + count}")
        start = stop
    return " ".join(items)


@functools.lru_cache(maxsize=32)
def read_rows(text: str) -> tuple[int, ...]:
    """What `spell_rows` wrote, or a PlanError that shows the item which does not read."""
    old: list[int] = []
    for item in text.split():
        found = _ITEM.fullmatch(item)
        if found is None or (found[3] and int(found[3]) <= int(found[2])):
            raise PlanError(
                f'rows: "{item[:40]}" is no item',
                hint='"7" is the old row 7, "0:100" the old rows 0 to 99, "+2" two new rows; spaces between',
            )
        if found[1]:
            old += [NEW] * int(found[1])
        else:
            old += range(int(found[2]), int(found[3] or int(found[2]) + 1))
        if len(old) > 2**26:
            raise PlanError("rows: more than 2^26 of them; no vocabulary is that large")
    return tuple(old)


def _map_shape(shapes: Sequence[Shape], *, rows: str, seed: int) -> Shape:
    (shape,) = shapes
    _check_seed(seed)
    if len(shape) not in (1, 2):
        raise PlanError(f"a table has the shape tokens x width, its bias that of tokens; not {show(shape)}")
    old = read_rows(rows)
    if not old:
        raise PlanError("rows names no row")
    if max(old) >= shape[0]:
        raise PlanError(f"rows names the old row {max(old)}, and a table of shape {show(shape)} has {shape[0]}")
    if not shape[0]:
        raise PlanError(f"a table of shape {show(shape)} has no rows to make new ones from")
    return (len(old), *shape[1:])


def _gathered(table: Tensor, old: Sequence[int], made: Tensor) -> Tensor:
    """The old rows in their places, the made ones in the others, in order."""
    import torch

    places = torch.tensor(old, dtype=torch.long, device=table.device)
    result = table.new_empty((len(old), *table.shape[1:]))
    result[places >= 0] = table[places[places >= 0]]
    result[places < 0] = made
    return result


def _map(tensors: Sequence[Tensor], *, rows: str, seed: int) -> Tensor:
    """An embedding or a head, [tokens, width], or its bias, [tokens], for another vocabulary. `rows` says for each new
    token where its row comes from: "7" the old row 7, "0:100" the old rows 0 to 99, "+2" two new rows, drawn about the
    mean of the old ones as vocab_resize draws them. surgery.vocabulary.token_map makes it from two tokenizers.

    Rule: copy by token string; new rows as transformers' mean_resizing.
    """
    table = floating(tensors[0], "vocab_map")
    old = read_rows(rows)
    count = old.count(NEW)
    return _gathered(table, old, made_rows(table, count, seed) if count else table[:0])


def _unmap(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    old = read_rows(params["rows"])
    place = {row: at for at, row in reversed(list(enumerate(old))) if row != NEW}
    if len(place) != shapes[0][0]:
        return [None]
    back = spell_rows([place[row] for row in range(shapes[0][0])])
    return [(Step("vocab_map", {"rows": back, "seed": params["seed"]}),)]


register(
    Op(
        "vocab_map",
        "approximate",
        (1, 1),
        (Param("rows", str), SEED),
        _map_shape,
        _map,
        inverse=_unmap,
        partners="The embedding, the head over the same tokens and the head's bias change together, with one map.",
        example=Example('vocab_map(w, rows="2 0:2")', {"w": [[0.0], [1.0], [2.0]]}),
    )
)


def _theirs(rows: str, donor_rows: str) -> tuple[int, ...]:
    """For each new token the donor's row, or NEW."""
    return read_rows(donor_rows) if donor_rows else tuple(range(len(read_rows(rows))))


def _omp_shape(shapes: Sequence[Shape], *, rows: str, k: int, donor_rows: str, seed: int) -> Shape:
    table, donor = shapes
    _check_seed(seed)
    if len(table) != 2 or len(donor) != 2:
        raise PlanError(
            f"argument 1 is the old table, old tokens x width, argument 2 the donor's, new tokens x its width; not "
            f"{show(table)} and {show(donor)}"
        )
    old = read_rows(rows)
    if not old:
        raise PlanError("rows names no row")
    theirs = _theirs(rows, donor_rows)
    if len(theirs) != len(old):
        raise PlanError(f"rows has {len(old)} tokens, and donor_rows {len(theirs)}")
    if max(theirs) >= donor[0]:
        what = f"donor_rows names row {max(theirs)}" if donor_rows else f"rows has {len(old)} tokens"
        raise PlanError(f"{what}, and the donor's table of shape {show(donor)} has {donor[0]}")
    if max(old) >= table[0]:
        raise PlanError(f"rows names the old row {max(old)}, and a table of shape {show(table)} has {table[0]}")
    both = list(zip(old, theirs, strict=True))
    shared = sum(ours != NEW and other != NEW for ours, other in both)
    by_pursuit = any(ours == NEW and other != NEW for ours, other in both)
    if not table[0] and (NEW, NEW) in both:
        raise PlanError(f"a table of shape {show(table)} has no rows to make new ones from")
    if by_pursuit and not 1 <= k <= min(shared, donor[1]):
        raise PlanError(
            f"k={k} atoms out of {shared} shared tokens in a donor space of width {donor[1]}: k is 1 to "
            f"{min(shared, donor[1])}"
        )
    return (len(old), table[1])


def _pursuit(targets: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each target [n, width] which k atoms [m, width] approximate it, and with which coefficients: [n, k] both."""
    import torch

    count, width = targets.shape
    basis = targets.new_zeros(count, k, width)
    picked = torch.zeros(count, k, dtype=torch.long, device=targets.device)
    free = torch.ones(count, atoms.shape[0], dtype=torch.bool, device=targets.device)
    residual = targets.clone()
    for step in range(k):
        fit = (residual @ atoms.T).abs().masked_fill(~free, -1.0)
        best = fit.argmax(dim=1)
        picked[:, step] = best
        free.scatter_(1, best.unsqueeze(1), False)
        direction = atoms[best]
        for _ in range(2):  # once more against what rounding left
            along = torch.einsum("nkw,nw->nk", basis[:, :step], direction)
            direction = direction - torch.einsum("nk,nkw->nw", along, basis[:, :step])
        norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        # an atom within the span of those before adds nothing, and its direction is rounding
        kept = norm > torch.finfo(norm.dtype).eps * width * torch.linalg.vector_norm(atoms[best], dim=1, keepdim=True)
        basis[:, step] = torch.where(kept, direction / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
        residual = residual - basis[:, step] * (basis[:, step] * residual).sum(dim=1, keepdim=True)
    chosen = atoms[picked].transpose(1, 2)
    driver = "gelsy" if targets.device.type == "cpu" else "gels"
    coefficients = torch.linalg.lstsq(chosen, targets.unsqueeze(2), driver=driver).solution.squeeze(2)
    return picked, coefficients


_BATCH = 256  # targets at once: the basis of each is k x width


def _omp(tensors: Sequence[Tensor], *, rows: str, k: int, donor_rows: str, seed: int) -> Tensor:
    """An embedding or a head for another vocabulary, with the help of a donor's table for that vocabulary:
    vocab_transplant_omp(table, donor, rows=...). Tokens that both have are copied (`rows` as in vocab_map). The row of
    another is approximated in the donor's space by k rows of shared tokens, and the same combination of the old rows
    of these tokens is its new row. `donor_rows`, in the same spelling, says which row of the donor's each new token
    has, where it is not the one of its own number; a token that neither knows is drawn about the mean of the old rows,
    by `seed`, as vocab_resize draws it. Computed in float32, or float64 where both tables are.

    Rule: orthogonal matching pursuit of mergekit's tokensurgeon (Goddard and Fernandes Neto, arXiv 2506.06607), k = 64.
    """
    import torch

    table, donor = (floating(tensor, "vocab_transplant_omp") for tensor in tensors)
    old = read_rows(rows)
    work = torch.float64 if is_double(table) and is_double(donor) else torch.float32
    places = torch.tensor(old, dtype=torch.long, device=table.device)
    theirs = torch.tensor(_theirs(rows, donor_rows), dtype=torch.long, device=table.device)
    space = donor.to(table.device, work)
    shared, sought = (places >= 0) & (theirs >= 0), (places < 0) & (theirs >= 0)
    atoms, values = space[theirs[shared]], table[places[shared]].to(work)
    found = [table[:0].to(work)]
    for targets in space[theirs[sought]].split(_BATCH):
        picked, coefficients = _pursuit(targets, atoms, k)
        found.append(torch.einsum("nk,nkw->nw", coefficients, values[picked]))
    made = table.new_empty((old.count(NEW), table.shape[1]))
    known = theirs[places < 0] >= 0
    made[known] = torch.cat(found).to(table.dtype)
    if not known.all():
        made[~known] = made_rows(table, int((~known).sum()), seed)
    return _gathered(table, old, made)


register(
    Op(
        "vocab_transplant_omp",
        "approximate",
        (2, 2),
        (
            Param("rows", str),
            Param("k", int, 64),
            Param("donor_rows", str, "", quiet=True),
            Param("seed", int, 0, quiet=True),
        ),
        _omp_shape,
        _omp,
        partners="Embedding and head each with the donor's table of the same role; a bias takes vocab_map.",
        example=Example(
            'vocab_transplant_omp(w, donor, rows="0:2 +1", k=2)',
            {"w": [[1.0, 0.0], [0.0, 10.0]], "donor": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 3.0, 0.0]]},
        ),
    )
)


def _labels_shape(shapes: Sequence[Shape], *, index: tuple[int, ...], axis: int) -> Shape:
    (shape,) = shapes
    along = axis_of(shape, axis)
    if not index:
        raise PlanError("index names no label")
    for row in index:
        if not NEW <= row < shape[along]:
            raise PlanError(
                f"index {row} is none of the {shape[along]} labels of axis {axis} of a tensor of shape {show(shape)}; "
                f"{NEW} is a new label"
            )
    return (*shape[:along], len(index), *shape[along + 1 :])


def _labels(tensors: Sequence[Tensor], *, index: tuple[int, ...], axis: int) -> Tensor:
    """The rows of a head, weight or bias, for other labels: for each new label the old row, or -1 for one that the
    head did not know, whose row is zeros. surgery.vocabulary.label_map makes the index from two id2label tables. Every
    bit of the rows that are chosen survives.

    Rule: torch.index_select.
    """
    import torch

    (head,) = tensors
    along = axis % head.dim()
    places = torch.tensor(index, dtype=torch.long, device=head.device)
    if not head.shape[along]:
        return head.new_zeros(_labels_shape([tuple(head.shape)], index=index, axis=axis))
    chosen = head.index_select(along, places.clamp(min=0))
    fresh = (places < 0).reshape(-1, *[1] * (head.dim() - along - 1))
    return chosen.masked_fill(fresh, 0)


def _unlabel(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    along, index = axis_of(shapes[0], params["axis"]), params["index"]
    place = {row: at for at, row in reversed(list(enumerate(index))) if row != NEW}
    if len(place) != shapes[0][along]:
        return [None]
    return [(Step("take", {"index": tuple(place[row] for row in range(len(place))), "axis": along}),)]


register(
    Op(
        "label_remap",
        "exact",
        (1, 1),
        (Param("index", tuple), Param("axis", int, 0)),
        _labels_shape,
        _labels,
        inverse=_unlabel,
        partners="The head's weight and bias take one index; every other tensor over the labels too.",
        example=Example("label_remap(head.weight, index=(2, -1, 0))", {"head.weight": [[1.0], [2.0], [3.0]]}),
    )
)
