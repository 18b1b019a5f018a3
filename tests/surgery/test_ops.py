"""The ops: exact ones round-trip bit for bit, shapes are foretold right, and published rules are met."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery import ops
from surgery.errors import PlanError
from surgery.expr import Call, Expr, Name, call, evaluate, infer, parse, undone

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def tensor(shape: ops.Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random values of the type, specials among them: bits must survive, also those of a NaN's neighbours."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(-1000, 1000, shape, generator=generator, dtype=dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if values.numel() > 2:
        values.view(-1)[0], values.view(-1)[1] = math.inf, -0.0
    return values.to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and (
            one.contiguous().view(torch.uint8).tolist() == other.contiguous().view(torch.uint8).tolist()
            if one.dim()
            else one.view(1).view(torch.uint8).tolist() == other.reshape(1).view(torch.uint8).tolist()
        )
    )


@st.composite
def round_trips(draw: st.DrawFn) -> tuple[dict[str, ops.Shape], Expr, ops.Shape]:
    """An expression that goes there and back: it must give tensor `a` again."""
    shape = draw(SHAPES)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    at = axis % len(shape)
    others = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))

    def sized(length: int) -> ops.Shape:
        return (*shape[:at], length, *shape[at + 1 :])

    which = draw(
        st.sampled_from(
            ["cat", "interleave", "widths", "permute", "reshape", "flip", "take", "neg", "repeat", "transpose"]
        )
    )
    shapes = {"a": shape}
    if which == "cat":
        shapes |= {f"b{n}": sized(length) for n, length in enumerate(others)}
        order = draw(st.permutations(list(shapes)))
        start = sum(shapes[name][at] for name in order[: order.index("a")])
        return (
            shapes,
            call("slice", call("cat", *order, axis=axis), axis=axis, start=start, stop=start + shape[at]),
            shape,
        )
    if which == "interleave":
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if shape[at] % g == 0]))
        shapes |= {f"b{n}": shape for n, _ in enumerate(others)}
        order = draw(st.permutations(list(shapes)))
        fused = call("interleave", *order, groups=groups, axis=axis)
        back = call("deinterleave", fused, index=order.index("a"), of=len(order), groups=groups, axis=axis)
        return shapes, back, shape
    if which == "widths":
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if shape[at] % g == 0]))
        shapes |= {f"b{n}": sized(groups * width) for n, width in enumerate(others)}
        order = draw(st.permutations(list(shapes)))
        widths = tuple(shapes[name][at] // groups for name in order)
        fused = call("interleave", *order, groups=groups, axis=axis)
        index = order.index("a")
        return (
            shapes,
            call("deinterleave", fused, index=index, of=len(order), groups=groups, widths=widths, axis=axis),
            shape,
        )
    if which == "permute":
        dims = tuple(draw(st.permutations(range(len(shape)))))
        back = tuple(dims.index(n) for n in range(len(shape)))
        return shapes, call("permute", call("permute", "a", dims=dims), dims=back), shape
    if which == "reshape":
        return shapes, call("reshape", call("reshape", "a", shape=(-1,)), shape=shape), shape
    if which == "flip":
        return shapes, call("flip", call("flip", "a", axis=axis), axis=axis), shape
    if which == "take":
        index = tuple(draw(st.permutations(range(shape[at]))))
        back = tuple(index.index(n) for n in range(shape[at]))
        return shapes, call("take", call("take", "a", index=index, axis=axis), index=back, axis=axis), shape
    if which == "neg":
        return shapes, call("neg", call("neg", "a")), shape
    if which == "repeat":
        times = tuple(draw(st.integers(1, 3)) for _ in shape)
        back: Expr = call("repeat", "a", times=times)
        for n, length in enumerate(shape):
            back = call("slice", back, axis=n, start=0, stop=length)
        return shapes, back, shape
    shapes["a"] = shape = (shape[0], shape[-1])
    return shapes, call("transpose", call("transpose", "a")), shape


@given(round_trips(), st.sampled_from(DTYPES), st.integers(0, 100))
def test_exact_ops_round_trip_bit_for_bit(
    case: tuple[dict[str, ops.Shape], Expr, ops.Shape], dtype: torch.dtype, seed: int
) -> None:
    shapes, expr, shape = case
    tensors = {name: tensor(shapes[name], dtype, seed + n) for n, name in enumerate(shapes)}
    assert infer(expr, shapes.__getitem__) == shape
    assert same_bits(evaluate(expr, tensors.__getitem__), tensors["a"])


@st.composite
def undoable(draw: st.DrawFn) -> tuple[ops.Op, list[ops.Shape], dict[str, ops.Value]]:
    """Any exact op that has an inverse, with arguments and parameters that fit."""
    op = draw(st.sampled_from([op for op in ops.registered() if op.kind == "exact" and op.inverse]))
    shape = draw(SHAPES)
    at = draw(st.integers(0, len(shape) - 1))
    params: dict[str, ops.Value] = {"axis": at}
    count = draw(st.integers(1, 3))
    if op.name in ("cat", "interleave"):
        groups = draw(st.integers(1, 3)) if op.name == "interleave" else 1
        lengths = [groups * draw(st.integers(0, 3)) for _ in range(count)]
        shapes = [(*shape[:at], length, *shape[at + 1 :]) for length in lengths]
        return op, shapes, params | ({"groups": groups} if op.name == "interleave" else {})
    if op.name in ("rope_permute", "rope_unpermute"):
        return op, [(2 * count * shape[0], *shape[1:])], {"heads": count}
    if op.name == "transpose":
        return op, [(shape[0], count)], {}
    if op.name == "permute":
        return op, [shape], {"dims": tuple(draw(st.permutations(range(len(shape)))))}
    if op.name == "reshape":
        return op, [shape], {"shape": (1, *reversed(shape), -1)}
    if op.name == "repeat":
        return op, [shape], {"times": tuple(draw(st.integers(1, 3)) for _ in range(len(shape) + count - 1))}
    if op.name in ("take", "label_remap"):
        more = draw(st.lists(st.integers(0, shape[at] - 1), max_size=3))
        return op, [shape], params | {"index": tuple(draw(st.permutations([*range(shape[at]), *more])))}
    return op, [shape], params if op.name == "flip" else {}


@given(undoable(), st.sampled_from(DTYPES), st.integers(0, 100))
def test_every_exact_op_undoes_itself_bit_for_bit(
    case: tuple[ops.Op, list[ops.Shape], dict[str, ops.Value]], dtype: torch.dtype, seed: int
) -> None:
    op, shapes, params = case
    tensors = [tensor(shape, dtype, seed + n) for n, shape in enumerate(shapes)]
    assert op.check(tensors, **params) == sum(0 not in shape or op.name in ("permute", "reshape") for shape in shapes)


@given(st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 100))
def test_a_widening_cast_round_trips(dtype: torch.dtype, seed: int) -> None:
    value = tensor((3, 2), dtype, seed)
    name = "BF16" if dtype == torch.bfloat16 else "F16"
    for wide in ("F32", "F64"):
        expr = parse(f'cast(cast(a, dtype="{wide}"), dtype="{name}")')
        assert same_bits(evaluate(expr, lambda _: value), value)


@st.composite
def any_calls(draw: st.DrawFn) -> tuple[dict[str, ops.Shape], Expr]:
    """Any op with arguments and parameters that may or may not fit."""
    op = draw(st.sampled_from(ops.registered()))
    fewest, most = op.arity
    count = draw(st.integers(fewest, max(fewest, 3) if most is None else most))
    base = draw(st.lists(st.integers(1, 4), max_size=3).map(tuple))
    shapes: dict[str, ops.Shape] = {}
    for n in range(count):
        shape = base
        if base and draw(st.booleans()):
            at = draw(st.integers(0, len(base) - 1))
            shape = (*base[:at], draw(st.integers(1, 4)), *base[at + 1 :])
        shapes[f"t{n}"] = shape[draw(st.integers(0, 1)) :] if draw(st.integers(0, 3)) == 0 else shape
    params: dict[str, ops.Value] = {}
    for param in op.params:
        if param.type is int:
            params[param.name] = draw(st.integers(-3, 5))
        elif param.type is float:
            params[param.name] = draw(st.floats(-2, 2))
        elif param.type is str:
            params[param.name] = draw(st.sampled_from(["F32", "BF16", "F64", "F33"]))
        elif param.name == "widths":
            params[param.name] = ()
        else:
            params[param.name] = tuple(draw(st.lists(st.integers(-1, 4), max_size=4)))
    return shapes, call(op.name, *shapes, **params)


@given(any_calls())
def test_what_infer_foretells_is_what_evaluate_gives(case: tuple[dict[str, ops.Shape], Expr]) -> None:
    shapes, expr = case
    try:
        foretold = infer(expr, shapes.__getitem__)
    except PlanError:
        return  # refused by shape: nothing is promised about values
    tensors = {name: tensor(shape, seed=n).abs() + 1 for n, (name, shape) in enumerate(shapes.items())}
    assert tuple(evaluate(expr, tensors.__getitem__).shape) == foretold


@pytest.mark.parametrize("op", ops.registered(), ids=lambda op: op.name)
def test_every_op_states_its_rule_and_its_signature(op: ops.Op) -> None:
    assert "Rule:" in op.rule
    assert op.signature.startswith(op.name + "(")


@pytest.mark.parametrize("op", [op for op in ops.registered() if op.kind == "preserving"], ids=lambda op: op.name)
def test_arithmetic_is_unrounded_in_float64_and_rounds_once_in_half(op: ops.Op) -> None:
    shape = (3, 4)
    values = [tensor(shape, torch.float64, n).abs().clamp(max=4) + 0.1 for n in range(op.arity[0])]
    by_shape: dict[str, list[ops.Shape]] = {
        "weight_norm": [(3, 1), (3, 4)],
        "bn_fold": [(3, 4), (3,), (3,)],
        "bn_fold_bias": [(3,)] * 5,
        "lora_merge": [(3, 4), (3, 2), (2, 4)],
        "lora_unmerge": [(3, 4), (3, 2), (2, 4)],
        "inflate_2d_to_3d": [(3, 4, 1, 2)],
    }
    if op.name in by_shape:
        values = [tensor(s, torch.float64, n).abs().clamp(max=4) + 0.1 for n, s in enumerate(by_shape[op.name])]
    wanted: dict[str, ops.Value] = {"by": 0.3, "frames": 3, "times": (2, 3), "to": 6}
    params = {p.name: p.default if p.default is not None else wanted[p.name] for p in op.params}
    params |= {"share": 1, "axis": 1} if op.name == "widen" else {}
    read = {f"t{n}": value for n, value in enumerate(values)}
    exact = evaluate(call(op.name, *read, **params), read.__getitem__)
    assert exact.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: value.to(dtype) for name, value in read.items()}
        result = evaluate(call(op.name, *half, **params), half.__getitem__)
        wide = evaluate(call(op.name, *half, **params), lambda name: half[name].double())  # noqa: B023
        assert result.dtype == dtype
        # one rounding: half a unit in the last place, and the float32 in between
        assert torch.all((result.double() - wide).abs() <= wide.abs() * torch.finfo(dtype).eps * 0.51)


@pytest.mark.parametrize("op", ops.registered(), ids=lambda op: op.name)
def test_every_op_has_an_example_that_works_and_is_undone_as_it_says(op: ops.Op) -> None:
    assert op.example is not None
    read = {
        name: tensor(value, torch.float64).nan_to_num(posinf=1.0) if isinstance(value, tuple) else torch.tensor(value)
        for name, value in op.example.reads.items()
    }
    read = {name: value.double() if value.is_floating_point() else value for name, value in read.items()}
    shapes = {name: tuple(value.shape) for name, value in read.items()}
    expr = parse(op.example.row)
    assert isinstance(expr, Call)
    assert expr.op == op.name
    assert str(parse(str(expr))) == str(expr)
    result = evaluate(expr, read.__getitem__)
    assert tuple(result.shape) == infer(expr, shapes.__getitem__)
    back = undone(expr, "result", shapes.__getitem__)
    for name, value in back.items():
        again = evaluate(value, (read | {"result": result}).__getitem__)
        assert infer(value, (shapes | {"result": tuple(result.shape)}).__getitem__) == shapes[name]
        if op.kind == "exact":
            assert same_bits(again, read[name])
        else:
            torch.testing.assert_close(again, read[name], rtol=1e-12, atol=1e-12)
    if all(isinstance(arg, Name) for arg in expr.args):
        assert op.check([read[arg.name] for arg in expr.args], **dict(expr.params)) == len(back)


def test_a_plan_row_is_undone_step_by_step() -> None:
    shapes = {"q": (4, 3), "k": (4, 3), "b": (3, 2), "a": (2, 4)}
    expr = parse("cat(transpose(lora_merge(transpose(q), b, a, scale=0.5)), rope_permute(k, heads=2), axis=1)")
    back = undone(expr, "w", shapes.__getitem__)
    assert {name: str(value) for name, value in back.items()} == {
        "q": "transpose(lora_unmerge(transpose(slice(w, axis=1, start=0, stop=3)), b, a, scale=0.5))",
        "k": "rope_unpermute(slice(w, axis=1, start=3, stop=6), heads=2)",
    }
    read = {
        name: tensor(shape, torch.float64, n).nan_to_num(posinf=1) for n, (name, shape) in enumerate(shapes.items())
    }
    read["w"] = evaluate(expr, read.__getitem__)
    torch.testing.assert_close(evaluate(back["q"], read.__getitem__), read["q"], rtol=0, atol=1e-14)
    assert same_bits(evaluate(back["k"], read.__getitem__), read["k"])


def test_a_check_that_fails_says_which_argument() -> None:
    take = ops.get("take")
    wrong = dataclasses.replace(take, inverse=lambda shapes, params: [(ops.Step("flip", {"axis": 0}),)])
    with pytest.raises(PlanError, match="take: argument 1 of shape 3 did not come back"):
        wrong.check([torch.arange(3)], index=(0, 1, 2))
    assert take.check([torch.arange(3)], index=(0, 2)) == 0
    longer = dataclasses.replace(take, infer=lambda shapes, **_: (9,))
    with pytest.raises(PlanError, match="take gave shape 3 where 9 was foretold"):
        longer.check([torch.arange(3)], index=(0, 1, 2))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weight_norm_is_that_of_torch(dim: int) -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3).double(), dim=dim)
    state = layer.state_dict()
    prefix = "parametrizations.weight.original"
    folded = evaluate(call("weight_norm", prefix + "0", prefix + "1", dim=dim), state.__getitem__)
    torch.testing.assert_close(folded, layer.weight.detach(), rtol=1e-14, atol=0)
    gain = evaluate(call("norm_except", "w", dim=dim), lambda _: folded)
    again = evaluate(call("weight_norm", "g", "w", dim=dim), {"g": gain, "w": folded}.__getitem__)
    torch.testing.assert_close(again, folded, rtol=1e-14, atol=0)


def test_the_norm_of_a_whole_tensor_and_of_a_vector() -> None:
    v = tensor((3, 4), torch.float64, 1).clamp(-2, 2)
    assert evaluate(parse("norm_except(v, dim=-1)"), lambda _: v).item() == pytest.approx(v.norm().item())
    assert torch.equal(evaluate(parse("norm_except(v)"), lambda _: v[1]), v[1].abs())


def test_interleave_is_the_per_head_layout() -> None:
    heads, width, model = 2, 3, 5
    q, k, v = (tensor((heads * width, model), seed=n) for n in range(3))
    fused = evaluate(call("interleave", "q", "k", "v", groups=heads), {"q": q, "k": k, "v": v}.__getitem__)
    # as Megatron-style models read it: [heads, 3, width, model]
    read = fused.view(heads, 3, width, model)
    for n, part in enumerate((q, k, v)):
        assert torch.equal(read[:, n].reshape(heads * width, model), part)


def test_a_constant_follows_the_type_it_meets() -> None:
    weight = torch.ones(2, 2)
    assert evaluate(parse("zeros(shape=(3,))"), lambda _: weight).dtype == torch.float64
    assert evaluate(parse("ones(shape=())"), lambda _: weight).shape == ()
    assert torch.all(torch.isinf(evaluate(parse("full(shape=(2, 1), value=-inf)"), lambda _: weight)))


def test_what_is_drawn_depends_on_its_seed_alone() -> None:
    def draw(text: str) -> Tensor:
        return evaluate(parse(text), {}.__getitem__)

    first = draw("normal(shape=(100, 100), seed=3)")
    torch.rand(5)
    assert torch.equal(first, draw("normal(shape=(100, 100), seed=3)"))
    assert not torch.equal(first, draw("normal(shape=(100, 100), seed=4)"))
    assert float(first.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cat(m, v)", "argument 2 has shape 4 and argument 1 has 4x6"),
        ("cat(m, m, axis=2)", "axis 2 does not exist in a tensor of shape 4x6"),
        ("cat(s)", "axis 0 does not exist in a tensor of shape scalar"),
        ("transpose(v)", "it takes a matrix.*use permute"),
        ("permute(m, dims=(0, 0))", "is not an order of the 2 axes"),
        ("reshape(m, shape=(5, 5))", "24 elements, which do not fit"),
        ("reshape(m, shape=(-1, 0))", "do not fit"),
        ("reshape(m, shape=(-1, -1))", "at most one may be -1"),
        ("slice(m, axis=1, start=4, stop=7)", "no range within the 6 of axis 1"),
        ("slice(m, start=2, stop=2)", "no range"),
        ("interleave(m, m, groups=3)", "axis 0 of argument 1, of shape 4x6, does not divide into groups=3"),
        ("deinterleave(m, index=3, groups=1, of=2)", "index=3 is none of the of=2 parts"),
        ("deinterleave(m, index=0, groups=2)", "groups of 2, which do not divide into 3"),
        ("deinterleave(m, index=0, of=2, groups=2, widths=(1,))", "one width of 1 or more for each part"),
        ("take(m, index=(0, 4))", "index 4 is outside axis 0"),
        ("repeat(m, times=(2,))", "a count of 1 or more for each axis"),
        ("add(m, v)", "argument 2 has shape 4, which does not broadcast with 4x6"),
        ('cast(m, dtype="F31")', "is none of"),
        ("weight_norm(v, m)", "argument 1, the gain, has shape 4.*gain of shape 4x1"),
        ("norm_except(m, dim=2)", "dim=2 is no axis"),
        ("zeros(shape=(-1,))", "lengths are 0 or more"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_words(text: str, says: str) -> None:
    shapes = {"m": (4, 6), "v": (4,), "s": ()}
    expr = parse(text)
    with pytest.raises(PlanError, match=says) as error:
        infer(expr, shapes.__getitem__)
    assert text.partition("(")[0] + ":" in str(error.value)


def test_an_op_of_anothers_name_is_refused() -> None:
    cat = ops.get("cat")
    assert ops.register(cat) is cat
    with pytest.raises(PlanError, match=r"cat is registered twice: by surgery\.ops\.layout and by"):
        ops.register(ops.Op("cat", "exact", (1, 1), (), cat.infer, lambda tensors: tensors[0]))
    with pytest.raises(PlanError, match="cannot name an op"):
        ops.Op("not a word", "exact", (1, 1), (), cat.infer, cat.apply)
    with pytest.raises(PlanError, match="kind 'harmless' is none of"):
        ops.Op("mine", "harmless", (1, 1), (), cat.infer, cat.apply)  # type: ignore[arg-type]


def test_the_name_of_a_tensor_may_be_that_of_an_op() -> None:
    assert parse("cat") == Name("cat")
