"""Rows of vocabularies and labels: made as transformers and mergekit make them, over random shapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from surgery import ops
from surgery.errors import PlanError
from surgery.expr import call, infer, parse
from surgery.ops.vocabulary import NEW, read_rows, spell_rows
from tests.agreement import SEEDS, agree, random, run

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
some = settings(max_examples=40, deadline=None)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.integers(3, 60),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    SEEDS,
)
def test_a_resized_vocabulary_is_that_of_transformers_number_by_number(
    width: int, old: int, new: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=width, vocab_size=old, n_positions=4, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).to(dtype)
    before, after = model.transformer.wte, torch.nn.Embedding(new, width, dtype=dtype)
    shared = min(old, new)
    table = before.weight.detach().clone()
    after.weight.data[:shared] = table[:shared]
    if new > old:
        torch.manual_seed(seed + 1)
        model._init_added_embeddings_weights_with_mean(before, after, old, new - old)
    torch.manual_seed(seed)  # what the op draws does not depend on the generator that others use, nor disturb it
    mine = run("vocab_resize", table, to=new, seed=seed + 1)
    following = torch.rand(3)
    agree("vocab_resize", "transformers, resize_token_embeddings with mean_resizing", mine, after.weight.detach())
    torch.manual_seed(seed)
    assert torch.equal(torch.rand(3), following)
    assert torch.equal(run("vocab_resize", table, to=new, seed=seed + 1), mine)
    # as a person calls it, where other draws come first: the same distribution
    model.resize_token_embeddings(new)
    spread = (
        7 * 1e-9**0.5 * float(table.double().std(0, correction=0).max())
        + float(table.abs().max()) * torch.finfo(dtype).eps
    )
    torch.testing.assert_close(mine, model.transformer.wte.weight.detach(), rtol=0, atol=2 * spread)


def test_a_tied_head_and_its_bias_take_the_rows_of_transformers() -> None:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4, "intermediate_size": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=40, **shape))
    bias = torch.nn.init.normal_(model.cls.predictions.decoder.bias).detach().clone()
    table = model.bert.embeddings.word_embeddings.weight.detach().clone()
    model.resize_token_embeddings(44)
    resized = model.bert.embeddings.word_embeddings.weight.detach()
    mine = run("vocab_resize", table, to=44, seed=5)
    assert torch.equal(mine[:40], resized[:40])
    torch.testing.assert_close(mine, resized, rtol=0, atol=1e-5)  # two draws from a deviation of 6e-7
    mine = run("vocab_resize", bias, to=44, seed=5)
    assert torch.equal(mine[:40], bias)
    # about the mean, with a deviation of 1e-9 of the old, which float32 cannot show
    head = torch.nn.Linear(4, 44)
    model._init_added_lm_head_bias_with_mean(SimpleNamespace(bias=bias), head, 4)
    torch.testing.assert_close(mine[40:], head.bias.detach()[40:], rtol=1e-6, atol=1e-8)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(20, 60), SEEDS)
def test_new_rows_have_the_mean_and_a_billionth_of_the_covariance(width: int, old: int, seed: int) -> None:
    table = random((old, width), seed=seed) * 3 + 1
    made = run("vocab_resize", table, to=old + 4000, seed=seed)[old:]
    mean, covariance = table.mean(0), torch.cov(table.T, correction=0).reshape(width, width) * 1e-9
    deviation = covariance.diagonal().sqrt()
    assert torch.all((made.mean(0) - mean).abs() < 5 * deviation / 4000**0.5)
    measured = torch.cov(made.T).reshape(width, width)
    assert torch.all((measured - covariance).abs() < 0.15 * deviation.outer(deviation))
    assert not torch.equal(made, run("vocab_resize", table, to=old + 4000, seed=seed + 1)[old:])


ROWS = st.lists(st.one_of(st.just(NEW), st.integers(0, 9)), min_size=1, max_size=30).map(tuple)


@given(st.lists(st.one_of(st.just(NEW), st.integers(0, 60)), max_size=60).map(tuple))
def test_a_map_of_rows_is_written_and_read(old: tuple[int, ...]) -> None:
    assert read_rows(spell_rows(old)) == old


@given(st.text(max_size=12))
def test_any_text_reads_as_rows_or_is_refused_in_words(text: str) -> None:
    try:
        old = read_rows(text)
    except PlanError:
        return
    assert read_rows(spell_rows(old)) == old


def test_a_large_map_stays_small_and_quick() -> None:
    old = tuple(n * 7 % 50257 if n % 3 else NEW for n in range(50257))
    text = spell_rows(old)
    assert len(text) < 450_000
    expr = call("vocab_map", "w", rows=text)
    assert infer(expr, {"w": (50257, 4)}.__getitem__) == (50257, 4)
    assert parse(str(expr)) == expr
    with pytest.raises(PlanError, match=f"names the old row {max(old)}") as error:
        infer(expr, {"w": (9, 4)}.__getitem__)
    assert len(str(error.value)) < 600
    assert spell_rows(range(50257)) == "0:50257"


@some
@given(ROWS, DTYPES, SEEDS)
def test_mapped_rows_are_copied_bit_for_bit_and_the_others_made(
    old: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    for table in (random((10, 3), dtype, seed), random((10,), dtype, seed)):
        mine = run("vocab_map", table, rows=spell_rows(old), seed=seed)
        made = iter(run("vocab_resize", table, to=10 + len(old), seed=seed)[10:] if table.dim() == 2 else [])
        for row, place in zip(mine, old, strict=True):
            if place != NEW:
                assert torch.equal(row, table[place])
            elif table.dim() == 1:
                torch.testing.assert_close(row, table.double().mean().to(dtype), rtol=1e-2, atol=1e-2)
            elif old.count(NEW) == len(old):
                assert torch.equal(row, next(made))  # drawn as vocab_resize draws as many
    assert ops.get("vocab_map").check([random((10, 3), seed=seed)], rows=spell_rows(old)) == int(
        len({place for place in old if place != NEW}) == 10
    )


def test_a_permuted_vocabulary_comes_back() -> None:
    table = random((6, 2), torch.float16)
    assert ops.get("vocab_map").check([table], rows="5 +2 3:5 0:3") == 1


@some
@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=8).map(tuple),
    st.integers(0, 1),
    st.sampled_from([torch.float32, torch.float16, torch.int64]),
)
def test_labels_keep_every_bit_of_their_rows(index: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    head = (random((5, 5)) * 10).to(dtype)
    mine = run("label_remap", head, index=index, axis=axis)
    for place, row in enumerate(index):
        wanted = head.select(axis, row) if row != NEW else torch.zeros(5, dtype=dtype)
        assert torch.equal(mine.select(axis, place), wanted)
    assert ops.get("label_remap").check([head], index=index, axis=axis) == int(set(range(5)) <= set(index))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 8), st.integers(0, 12), st.integers(1, 12), st.integers(1, 5), st.integers(2, 6),
    st.sampled_from([torch.float64, torch.float32]), SEEDS,
)  # fmt: skip
def test_transplanted_rows_are_those_of_mergekit(
    k: int, more: int, count: int, width: int, spare: int, dtype: torch.dtype, seed: int
) -> None:
    surgeon = pytest.importorskip("mergekit.tokensurgeon")
    shared, space = k + more, k + spare
    generator = torch.Generator().manual_seed(seed)
    donor = random((shared + count, space), dtype, seed)
    table = random((shared + 3, width), dtype, seed + 1)
    places = torch.randperm(shared + count, generator=generator)[:shared].sort().values.tolist()
    order = torch.randperm(shared + 3, generator=generator)[:shared].tolist()
    old = [NEW] * (shared + count)
    for place, row in zip(places, order, strict=True):
        old[place] = row
    fresh = [place for place, row in enumerate(old) if row == NEW]
    picked, coefficients = surgeon.batch_omp(donor[fresh], donor[places], k)
    wanted = torch.einsum("nk,nkw->nw", coefficients, table[order][picked])
    mine = run("vocab_transplant_omp", table, donor, rows=spell_rows(old), k=k)
    assert torch.equal(mine[places], table[order])
    tolerance = 1e-7 if dtype == torch.float64 else 2e-2  # atoms of a random space may be all but dependent
    agree("vocab_transplant_omp", "mergekit.tokensurgeon.batch_omp", mine[fresh], wanted, within=tolerance)


@some
@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 6), st.integers(1, 4), SEEDS)
def test_a_row_that_is_a_sum_of_shared_rows_is_that_sum_in_the_old_space(
    k: int, more: int, count: int, width: int, seed: int
) -> None:
    # with orthogonal rows the pursuit finds the very atoms, so the answer is known without any implementation
    shared = k + more
    atoms = torch.linalg.qr(random((shared, shared), seed=seed)).Q
    table = random((shared, width), seed=seed + 1)
    weights = torch.zeros(count, shared, dtype=torch.float64)
    for row in range(count):
        chosen = torch.randperm(shared, generator=torch.Generator().manual_seed(seed + row))[:k]
        weights[row, chosen] = random((k,), seed=seed + row) + 3
    donor = torch.cat((atoms, weights @ atoms))
    mine = run("vocab_transplant_omp", table, donor, rows=f"0:{shared} +{count}", k=k)
    torch.testing.assert_close(mine[shared:], weights @ table, rtol=1e-9, atol=1e-9)
    # a donor row that occurs twice adds nothing and breaks nothing
    assume(k > 1)
    twice = torch.cat((atoms[:1], atoms, weights @ atoms))
    double = torch.cat((table[:1], table))
    again = run("vocab_transplant_omp", double, twice, rows=f"0:{shared + 1} +{count}", k=k)
    assert torch.isfinite(again).all()
    half = run("vocab_transplant_omp", table.half(), donor.half(), rows=f"0:{shared} +{count}", k=k)
    assert half.dtype == torch.float16
    assert run("vocab_transplant_omp", table, donor, rows=f"0:{shared}").shape == table.shape  # nothing to approximate


@some
@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 5), st.integers(0, 3), st.integers(1, 3), SEEDS)
def test_a_donor_with_tokens_of_its_own_order(
    shared: int, kept: int, count: int, unknown: int, width: int, seed: int
) -> None:
    """`kept` tokens the source knows and the donor not, `unknown` ones neither; the donor's rows lie in any order."""
    generator = torch.Generator().manual_seed(seed)
    donor, table = random((shared + count, 7), seed=seed), random((shared + kept, width), seed=seed + 1)
    k = min(shared, 4)
    plain = run("vocab_transplant_omp", table, donor, rows=f"0:{shared} +{count}", k=k)
    order = torch.randperm(shared + count, generator=generator)
    place = torch.argsort(order)  # where in the donor each row of before lies now
    old = [*range(shared + kept), *[NEW] * (count + unknown)]
    theirs = [*place[:shared].tolist(), *[NEW] * kept, *place[shared:].tolist(), *[NEW] * unknown]
    mine = run(
        *("vocab_transplant_omp", table, donor[order]),
        rows=spell_rows(old),
        donor_rows=spell_rows(theirs),
        k=k,
        seed=3,
    )
    assert torch.equal(mine[: shared + kept], table)
    torch.testing.assert_close(mine[shared + kept :][:count], plain[shared:], rtol=1e-9, atol=1e-9)
    drawn = run("vocab_resize", table, to=len(table) + unknown, seed=3)[len(table) :]
    assert torch.equal(mine[len(mine) - unknown :], drawn)
