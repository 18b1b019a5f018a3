"""Values as sums: every element says which weights stand in it, checked by computing it again from their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import twin
from surgery.mapper.affine import Affine, NotAffine
from surgery.mapper.hypothesis import Hypothesis
from surgery.mapper.record import Tape, record
from surgery.mapper.reference import Reference

HEADS, WIDTH = 2, 6


class Does(nn.Module):
    """A module of one function and a few parameters."""

    def __init__(self, f: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.f = f
        for name, t in parameters.items():
            self.register_parameter(name, nn.Parameter(t))

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tape_of(module: nn.Module, x: Any) -> Tape:
    with torch.no_grad():
        return record(lambda m, x: m(x), twin.twin(module), x)


def reference(tape: Tape) -> Affine:
    return Reference(tape)


def hypothesis(tape: Tape) -> Affine:
    """A target of which nothing is settled."""
    return Hypothesis(tape, Reference(tape), {}, set())


def by_number(p: Affine, module: nn.Module) -> Tensor:
    """What the numbers stand for: the module's own elements, one after another; 0 for number 0."""
    state = module.state_dict()
    flat = torch.zeros(p.next, dtype=torch.float64)
    for first, size, name in p.names:
        flat[first : first + size] = state[name].reshape(-1).double()
    for u in p.virtual.values():
        held = p.tape.values[u.vid].tensor
        assert held is not None
        flat[u.offset : u.offset + u.size] = (1 / held if u.how else held).reshape(-1)
    return flat


def rebuilt(p: Affine, module: nn.Module, vid: int) -> Tensor:
    """The value of a sum of terms, from the numbers alone."""
    shape = p.tape.values[vid].shape
    terms = p.terms(vid)
    weight = by_number(p, module)
    total = torch.zeros(shape, dtype=torch.float64)
    for t in terms:
        part = torch.ones(shape, dtype=torch.float64)
        if t.kind in ("known", "scale"):
            assert t.value is not None
            part = part * t.value
        if t.kind in ("weight", "scale"):
            assert t.ids is not None
            part = part * weight[t.ids.long()]
        if t.kind == "product":
            assert t.site is not None
            assert t.row is not None
            assert t.col is not None
            form = t.site.linear()
            if form is None:  # a convolution that is no product of rows
                stride, padding, dilation, transposed, more, groups = t.site.geometry
                kernel = weight[t.site.w.dense()]
                y = torch.ops.aten.convolution(
                    t.site.x, kernel, None, stride, padding, dilation, transposed, more, groups
                )
                table = y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])
            else:
                table = form[0] @ weight[form[1].dense()]
            part = torch.where(t.row > 0, table[(t.row.long() - 1).clamp_min(0), (t.col.long() - 1).clamp_min(0)], 0.0)
        total = total + t.coef * part
    return total


def fused(m: nn.Module, x: Tensor) -> Any:
    """[query | key | value] in one product, split, and cut into heads."""
    qkv = F.linear(x, m.w, m.b)
    return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))


def woven(m: nn.Module, x: Tensor) -> Any:
    """The same with the three of each head side by side."""
    return F.linear(x, m.w, m.b).view(2, 4, HEADS, 3, WIDTH // HEADS).permute(3, 0, 2, 1, 4).unbind(0)


def tokens(m: nn.Module, x: Tensor) -> Any:
    """A class token before the patches, and a position for each."""
    return torch.cat([m.token.expand(len(x), -1, -1), x @ m.w.t()], 1) + m.places[: x.shape[1] + 1]


def folded_scale(m: nn.Module, x: Tensor) -> Any:
    return (x - 3) * m.g * 0.5 + m.b / 4 - x


SUMS: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
    "fused qkv": (Does(fused, w=rand(3 * WIDTH, WIDTH), b=rand(3 * WIDTH)), rand(2, 4, WIDTH), ["product", "weight"]),
    "qkv per head": (
        Does(woven, w=rand(3 * WIDTH, WIDTH), b=rand(3 * WIDTH)),
        rand(2, 4, WIDTH),
        ["product", "weight"],
    ),
    "transposed weight": (Does(lambda m, x: x @ m.w, w=rand(WIDTH, 5)), rand(2, 4, WIDTH), ["product"]),
    "weight on the left": (Does(lambda m, x: m.w @ x, w=rand(5, 4)), rand(4, WIDTH), ["product"]),
    "heads as a batch": (
        Does(lambda m, x: torch.einsum("btd,hde->bhte", x, m.w), w=rand(HEADS, WIDTH, 3)),
        rand(2, 4, WIDTH),
        ["product"],
    ),
    "tokens": (
        Does(tokens, token=rand(1, 1, 3), w=rand(3, WIDTH), places=rand(9, 3)),
        rand(2, 4, WIDTH),
        ["weight", "product", "weight"],
    ),
    "two products": (
        Does(lambda m, x: x @ m.a - (2 * x) @ m.b + m.c, a=rand(WIDTH, 5), b=rand(5, WIDTH).t().clone(), c=rand(5)),
        rand(4, WIDTH),
        ["product", "product", "weight"],
    ),
    "scaled": (Does(folded_scale, g=rand(WIDTH), b=rand(WIDTH)), rand(4, WIDTH), ["scale", "weight", "known"]),
    "layer norm": (nn.LayerNorm(WIDTH), rand(2, 4, WIDTH), ["scale", "weight"]),
    "divided": (Does(lambda m, x: x / m.g, g=rand(WIDTH)), rand(4, WIDTH), ["scale"]),
    "embedding": (nn.Embedding(7, 3), torch.tensor([[1, 0, 6], [6, 2, 1]]), ["weight"]),
    "conv": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), rand(2, 4, 7, 6), ["product", "weight"]),
    "patches": (nn.Conv2d(3, 5, 2, stride=2, bias=False), rand(2, 3, 4, 6), ["product"]),
    "conv in time": (nn.Conv1d(4, 6, 3, dilation=2, padding=2), rand(2, 4, 9), ["product", "weight"]),
    "conv of points": (nn.Conv1d(4, 6, 1), rand(2, 4, 9), ["product", "weight"]),
    "conv in groups": (nn.Conv1d(4, 6, 3, groups=2), rand(2, 4, 9), ["product", "weight"]),
    "transposed conv": (nn.ConvTranspose2d(4, 3, 3, stride=2), rand(2, 4, 5, 3), ["product", "weight"]),
}


@pytest.mark.parametrize("read", [reference, hypothesis], ids=["reference", "target"])
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_gives_the_value(name: str, read: Callable[[Tape], Affine]) -> None:
    module, x, kinds = SUMS[name]
    tape = tape_of(module, x)
    p = read(tape)
    for vid in tape.outputs():
        want = tape.values[vid].tensor
        assert want is not None
        assert sorted(t.kind for t in p.terms(vid)) == sorted(kinds)
        torch.testing.assert_close(rebuilt(p, module, vid), want, rtol=1e-12, atol=1e-12)


def test_numbers_name_their_elements() -> None:
    """The second head's query, to the element."""
    module, x, _ = SUMS["fused qkv"]
    p = reference(tape_of(module, x))
    product, bias = p.terms(p.tape.outputs()[0])
    assert product.site is not None
    assert product.col is not None
    assert bias.ids is not None
    head, first = 1, {name: number for number, _, name in p.names}
    columns = product.col[0, head, 0].long() - 1
    assert columns.tolist() == [3, 4, 5]
    assert (bias.ids[0, head, 0].long() - first["b"]).tolist() == [3, 4, 5]
    weights = product.site.w.take(1, columns).dense() - first["w"]  # [input, output]
    assert weights.tolist() == [[row * WIDTH + column for row in (3, 4, 5)] for column in range(WIDTH)]
    assert p.owner(first["w"] + 17)[1] == "w"
    assert p.owner(first["b"])[1] == "b"


def test_a_tied_tensor_has_one_set_of_numbers() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False))
    module[2].weight = module[0].weight
    p = reference(tape_of(module, torch.tensor([1, 2])))
    assert sum(size for _, size, _ in p.names) == 5 * 4 + 4 + 4


def test_computed_weights_are_numbered_as_their_own() -> None:
    module = Does(lambda m, x: x @ m.w.exp(), w=rand(WIDTH, 5))
    p = reference(tape_of(module, rand(4, WIDTH)))
    (term,) = p.terms(p.tape.outputs()[0])
    assert term.site is not None
    assert term.site.w.lo == p.real_end
    assert len(p.virtual) == 1


def test_what_is_not_linear_in_an_open_weight_is_no_sum() -> None:
    module = Does(lambda m, x: torch.relu(x @ m.w) + x[:, :5], w=rand(WIDTH, 5))
    p = hypothesis(tape_of(module, rand(4, WIDTH)))
    with pytest.raises(NotAffine):
        p.terms(p.tape.outputs()[0])


def test_a_reference_ends_at_what_is_not_linear() -> None:
    """A residual stream: the block's input stands as a known value beside the product."""
    module = Does(lambda m, x: (y := torch.relu(x @ m.a)) + y @ m.b, a=rand(WIDTH, 5), b=rand(5, 5))
    p = reference(tape_of(module, rand(4, WIDTH)))
    vid = p.tape.outputs()[0]
    assert sorted(t.kind for t in p.terms(vid)) == ["known", "product"]
    want = p.tape.values[vid].tensor
    assert want is not None
    torch.testing.assert_close(rebuilt(p, module, vid), want)


def test_every_layout_moves_the_numbers() -> None:
    """Cut, turned, flipped, joined and padded: the weights are found where they went."""

    def layouts(m: nn.Module, x: Tensor) -> Any:
        y = F.linear(x, m.w, m.b)
        left, right = y.split([2, 4], -1)
        z = torch.cat([right.flip(-1), left], -1).roll(1, 0)
        return F.pad(z.unsqueeze(1).repeat(1, 2, 1), (1, 0))[:, :, ::2].transpose(0, 1).reshape(-1)

    module = Does(layouts, w=rand(6, WIDTH), b=rand(6))
    for read in (reference, hypothesis):
        p = read(tape_of(module, rand(4, WIDTH)))
        vid = p.tape.outputs()[0]
        want = p.tape.values[vid].tensor
        assert want is not None
        torch.testing.assert_close(rebuilt(p, module, vid), want)
