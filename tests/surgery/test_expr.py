"""The expression language: what is written reads back, what is wrong says where, and shapes agree with values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery import ops
from surgery.errors import PlanError
from surgery.expr import Call, Expr, Name, call, evaluate, fill, indices, infer, kind, names, parse, rename, substitute

NAMES = st.one_of(
    st.sampled_from(
        ["a", "h.0.q.weight", "h.{i}.q", "h.{2*i+1}.q", "0", "2.0", "inf", "", "a b", 'say "x"', "cat", "{", "a\\b"]
    ),
    st.text(max_size=12),
)


def values(param: ops.Param) -> st.SearchStrategy[ops.Value]:
    if param.type is int:
        return st.integers(-9, 9)
    if param.type is float:
        return st.floats(allow_nan=False)
    if param.type is str:
        return st.text(max_size=6)
    return st.lists(st.integers(-1, 9), max_size=4).map(tuple)


@st.composite
def calls(draw: st.DrawFn, inner: st.SearchStrategy[Expr]) -> Expr:
    op = draw(st.sampled_from(ops.registered()))
    fewest, most = op.arity
    args = draw(st.lists(inner, min_size=fewest, max_size=max(fewest, 3) if most is None else most))
    params = [(param.name, draw(values(param))) for param in op.params if param.default is None or draw(st.booleans())]
    return Call(op.name, tuple(args), tuple(draw(st.permutations(params))))


EXPRESSIONS: st.SearchStrategy[Expr] = st.recursive(NAMES.map(Name), calls, max_leaves=6)


@given(EXPRESSIONS)
def test_what_is_written_reads_back(expr: Expr) -> None:
    assert parse(str(expr)) == expr
    assert str(parse(str(expr))) == str(expr)
    assert hash(parse(str(expr))) == hash(expr)


@given(st.text())
def test_any_text_parses_or_is_refused_in_words(text: str) -> None:
    try:
        expr = parse(text)
    except PlanError:
        return
    assert parse(str(expr)) == expr


@given(EXPRESSIONS)
def test_renaming_there_and_back_gives_the_same(expr: Expr) -> None:
    there = {name: f"t.{number}" for number, name in enumerate(names(expr))}
    back = {new: old for old, new in there.items()}
    assert names(rename(expr, there)) == tuple(there.values())
    assert rename(rename(expr, there), back.__getitem__) == expr


def test_spaces_lines_and_order_of_parameters_do_not_matter() -> None:
    assert parse("slice( a ,\n  stop = 4, axis=1 )") == parse("slice(a, axis=1, start=0, stop=4)")
    assert str(parse("cat(a,b)")) == "cat(a, b, axis=0)"
    assert parse("scale(a, by=2)") == parse("scale(a, by=2.0)") == call("scale", "a", by=2)


def test_numbers_come_in_every_spelling() -> None:
    assert call("scale", "a", by=1e-30) == parse("scale(a, by=1e-30)")
    assert str(parse("full(shape=(), value=-inf)")) == "full(shape=(), value=-inf)"
    assert parse("zeros(shape=(3))") == parse("zeros(shape=(3,))") == call("zeros", shape=[3])


def test_indices_are_filled_in_and_reckoned() -> None:
    expr = parse("cat(h.{i}.q, h.{i+1}.{j}.k, h.{2*i-1}.v, axis=0)")
    assert str(substitute(expr, {"i": 3, "j": 0})) == "cat(h.3.q, h.4.0.k, h.5.v, axis=0)"
    assert str(substitute(expr, {"j": 7})) == "cat(h.{i}.q, h.{i+1}.7.k, h.{2*i-1}.v, axis=0)"
    assert indices("h.{i+1}.{j}.{2*i}") == ("i", "j")
    assert fill("{ not } {an+index", {"n": 1}) == "{ not } {an+index"
    with pytest.raises(PlanError, match=r"\{i-1\} in h\.\{i-1\} is -1 where i is 0"):
        fill("h.{i-1}", {"i": 0})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a tensor name or an op is expected"),
        ("cat(a, b", "the parenthesis that cat opens is not closed"),
        ("cat(a, neg(b)", "the parenthesis that cat opens is not closed"),
        ("cat(a, b))", "a closing parenthesis too many"),
        ("a b", "nothing more is expected after a"),
        ("cta(a, b)", "unknown op cta; did you mean cat"),
        ("transpose(a, b)", "transpose takes 1 tensor, not 2"),
        ("cat()", "cat takes at least 1 tensor, not 0"),
        ("cat(a, axs=1)", "no parameter axs.*did you mean axis"),
        ("cat(a, axis=0, axis=1)", "parameter axis is given twice"),
        ("cat(a, axis=0, b)", "tensors come first"),
        ("cat(a, axis=1.5)", "parameter axis takes a whole number, not 1.5"),
        ("cat(a, axis=)", "axis: a number, a list"),
        ("slice(a, start=1)", "slice needs its parameter stop"),
        ("scale(a, 2.0)", "2.0 is a number where a tensor is expected"),
        ("permute(a, dims=1)", r"dims takes a list as \(2, 3\), not 1"),
        ("permute(a, dims=(1, 0)", "the parenthesis that permute opens is not closed"),
        ("permute(a, dims=(1, 0", "the list of dims is not closed"),
        ("permute(a, dims=(1, 0.5))", "a list holds whole numbers, not 0.5"),
        ("cat(a, axis=" + "1" * 5000 + ")", "a number of 5000 characters"),
        ("cat(a; b)", "a comma or a closing parenthesis"),
        ('"abc', "the quoted text does not read"),
        ("cat(a, é)", "is expected here, not 'é'"),
        ("neg(" * 1000 + "a" + ")" * 1000, "ops within each other"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says) as error:
        parse(text)
    assert "column" in str(error.value)


def test_the_mark_stands_under_the_fault_also_in_a_later_line() -> None:
    with pytest.raises(PlanError) as error:
        parse("cat(a,\n    b; c)")
    text, mark = str(error.value).splitlines()[1:]
    assert text[mark.index("^")] == ";"


def test_building_a_call_checks_it() -> None:
    for build in (
        lambda: Call("cta", (Name("a"),)),
        lambda: call("scale", "a"),
        lambda: call("full", shape=(1,), value=float("nan")),
    ):
        with pytest.raises(PlanError):
            build()


def test_infer_names_op_argument_and_shapes() -> None:
    shapes = {"h.0.q": (768, 768), "h.0.k": (64, 700)}
    with pytest.raises(PlanError) as error:
        infer(parse("transpose(cat(h.0.q, h.0.k, axis=0))"), shapes.__getitem__)
    for piece in ("cat: argument 2 has shape 64x700", "768x768", "axis 0 only", "h.0.k: 64x700"):
        assert piece in str(error.value)
    with pytest.raises(PlanError, match=r"the source has no tensor h\.9"):
        infer(Name("h.9"), shapes.__getitem__)


def test_the_kind_is_that_of_the_worst_op() -> None:
    assert kind(parse("cat(transpose(a), b)")) == "exact"
    assert kind(parse("cat(scale(a, by=2.0), b)")) == "preserving"
    dtypes = {"half": "BF16", "single": "F32"}
    cast = parse('cast(transpose(half), dtype="F32")')
    assert kind(cast, dtypes.__getitem__) == "exact"
    assert kind(cast) == "lossy"
    assert kind(parse('cast(single, dtype="F64")')) == "exact"
    assert kind(parse('cast(single, dtype="BF16")'), dtypes.__getitem__) == "lossy"
    assert (
        kind(parse('cast(add(half, single), dtype="F32")'), dtypes.__getitem__) == "lossy"
    )  # not known, so not claimed


def test_evaluate_reads_each_name_and_applies_inside_out() -> None:
    tensors = {"q": torch.arange(6.0).reshape(2, 3), "k": torch.ones(3, 2)}
    result = evaluate(parse("add(cat(q, transpose(k)), full(shape=(1,), value=0.5))"), tensors.__getitem__)
    assert torch.equal(result, torch.cat([tensors["q"], tensors["k"].t()]) + 0.5)
    assert evaluate(Name("q"), tensors.__getitem__) is tensors["q"]


def test_reading_and_checking_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from surgery import expr; import surgery.plan, surgery.plan_file, surgery.report\n"
        "e = expr.parse('cat(transpose(a), b)'); expr.infer(e, lambda n: (2, 2)); expr.kind(e)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
