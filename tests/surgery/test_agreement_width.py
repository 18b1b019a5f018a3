"""Ops that choose, copy and merge units agree with the published rules, over random shapes, and keep the functions
that they say they keep."""

from __future__ import annotations

import copy
import importlib.util
import random as python_random
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.core_model_loading import PermuteForRope
from transformers.pytorch_utils import prune_linear_layer

from surgery import ops
from surgery.expr import call, evaluate
from tests.agreement import SEEDS, agree, random, run

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
some = settings(max_examples=40, deadline=None)
THEIRS = "the authors' program is not on PYTHONPATH: see benchmarks/agreement.py"


@some
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), DTYPES, SEEDS)
def test_shrinking_is_the_uniform_rule_of_weight_selection(
    sizes: list[tuple[int, int]], dtype: torch.dtype, seed: int
) -> None:
    large, small = tuple(max(pair) for pair in sizes), tuple(min(pair) for pair in sizes)
    weight = random(large, dtype, seed)
    wanted, mine = weight, weight
    for axis, (held, taken) in enumerate(zip(large, small, strict=True)):
        # every (held / taken)-th, else evenly spread and rounded half to even
        index = np.arange(taken) * (held // taken) if held % taken == 0 else np.linspace(0, held - 1, taken).round()
        wanted = wanted.index_select(axis, torch.tensor(index.astype(int)))
        mine = run("shrink_width", mine, to=taken, axis=axis)
    assert torch.equal(mine, wanted)


@some
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), DTYPES, SEEDS)
def test_shrinking_is_what_the_authors_of_weight_selection_run(
    sizes: list[tuple[int, int]], dtype: torch.dtype, seed: int
) -> None:
    theirs = pytest.importorskip("weight_selection", reason=THEIRS)
    weight = random(tuple(max(pair) for pair in sizes), dtype, seed)
    wanted = theirs.uniform_element_selection(weight, torch.Size(min(pair) for pair in sizes))
    for axis, pair in enumerate(sizes):
        weight = run("shrink_width", weight, to=min(pair), axis=axis)
    agree("shrink_width", "weight_selection.uniform_element_selection, the authors' program", weight, wanted)


def hypercloning() -> ModuleType:
    """The file of the rule alone: the package around it imports libraries of models that nothing here needs."""
    package = importlib.util.find_spec("hypercloning")
    if package is None or not package.submodule_search_locations:
        pytest.skip(THEIRS)
    file = Path(package.submodule_search_locations[0], "common.py")
    spec = importlib.util.spec_from_file_location("hypercloning_common", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@some
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), DTYPES, SEEDS)
def test_cloning_is_what_the_authors_of_hypercloning_run(
    out: int, into: int, n_out: int, n_in: int, dtype: torch.dtype, seed: int
) -> None:
    theirs = hypercloning()
    weight = random((out, into), dtype, seed)
    reference = "hypercloning.common.clone_matrix, the authors' program"
    for normalize, inputs in ((True, 1), (False, -1)):
        wanted = theirs.clone_matrix((out * n_out, into * n_in), weight, normalize=normalize)
        agree("clone_width", reference, run("clone_width", weight, times=(n_out, n_in), inputs=inputs), wanted)


@some
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([0, 1, 3]), SEEDS)
def test_widening_is_that_of_a_public_net2net(held: int, more: int, kernel: int, seed: int) -> None:
    theirs = pytest.importorskip("net2net", reason=THEIRS)
    torch.manual_seed(seed)
    first, second = (
        (nn.Conv2d(2, held, kernel), nn.Conv2d(held, 3, kernel)) if kernel else (nn.Linear(2, held), nn.Linear(held, 3))
    )
    same = {"to": held + more, "seed": seed}
    mine = [run("widen", t.detach(), **same) for t in (first.weight, first.bias)]
    mine.append(run("widen", second.weight.detach(), axis=1, share=1, **same))
    old = first.weight.detach().flatten(1)
    picked = iter([int((old == row).all(1).nonzero()[0]) for row in mine[0].flatten(1)[held:]])
    with pytest.MonkeyPatch.context() as patched:  # both draw the units to repeat: let it draw ours
        patched.setattr(theirs.np.random, "randint", lambda low, high: next(picked))
        wide, after, _ = theirs.wider(first, second, held + more, noise=False, random_init=False, weight_norm=False)
    for value, wanted in zip(mine, (wide.weight, wide.bias, after.weight), strict=True):
        agree("widen", "net2net.wider of E. Goelge, without its noise", value, wanted.detach())


@some
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.booleans(), SEEDS)
def test_heads_stay_whole_and_fused_projections_apart(
    width: int, heads: int, parts: int, kept: int, bias: bool, seed: int
) -> None:
    assume(kept <= heads)
    fused = random((parts * heads * width,) if bias else (parts * heads * width, 3), seed=seed)
    mine = run("shrink_width", fused, to=parts * kept * width, unit=width, parts=parts)
    apart = [run("shrink_width", part, to=kept * width, unit=width) for part in fused.chunk(parts)]
    assert torch.equal(mine, torch.cat(apart))
    same = {"seed": seed, "unit": width}
    wide = run("widen", fused, to=parts * (heads + kept) * width, parts=parts, **same)
    assert torch.equal(
        wide, torch.cat([run("widen", p, to=(heads + kept) * width, **same) for p in fused.chunk(parts)])
    )
    assert ops.get("widen").check([fused], to=parts * (heads + kept) * width, parts=parts, **same) == 1
    for head in mine.reshape(parts * kept, width, -1):
        assert any(torch.equal(head, old) for old in fused.reshape(parts * heads, width, -1))


@some
@given(st.integers(1, 8), st.integers(1, 6), st.data(), SEEDS)
def test_pruned_heads_are_those_of_transformers(heads: int, width: int, data: st.DataObject, seed: int) -> None:
    drop = tuple(data.draw(st.lists(st.integers(0, heads - 1), max_size=heads - 1, unique=True)))
    layer = nn.Linear(5, heads * width).double()
    kept = [n for n in range(heads * width) if n // width not in drop]
    pruned = prune_linear_layer(copy.deepcopy(layer), torch.tensor(kept))
    mine = run("prune_heads", layer.weight.detach(), heads=heads, drop=drop)
    agree("prune_heads", "transformers.pytorch_utils.prune_linear_layer", mine, pruned.weight.detach())
    assert torch.equal(run("prune_heads", layer.bias.detach(), heads=heads, drop=drop), pruned.bias)
    out = nn.Linear(heads * width, 5).double()
    pruned = prune_linear_layer(copy.deepcopy(out), torch.tensor(kept), dim=1)
    assert torch.equal(run("prune_heads", out.weight.detach(), heads=heads, drop=drop, axis=1), pruned.weight)
    fused = torch.cat([layer.weight.detach()] * 3)
    three = run("prune_heads", fused, heads=heads, drop=drop, parts=3)
    assert torch.equal(three, torch.cat([layer.weight.detach()[kept]] * 3))
    keep = tuple(head for head in range(heads) if head not in drop)
    assert torch.equal(run("prune_units", fused, keep=keep, unit=width, parts=3), three)


@some
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), DTYPES, SEEDS)
def test_cloning_is_hypercloning(out: int, into: int, n_out: int, n_in: int, dtype: torch.dtype, seed: int) -> None:
    weight, bias = random((out, into), dtype, seed), random((out,), dtype, seed + 1)
    # Equation 1 of the paper, by numpy: tiled, over the number of copies of the inputs
    wanted = torch.tensor(np.tile(weight.float().numpy() if dtype != torch.float64 else weight.numpy(), (n_out, n_in)))
    mine = run("clone_width", weight, times=(n_out, n_in))
    assert torch.equal(mine, (wanted / n_in).to(dtype))
    assert torch.equal(run("clone_width", bias, times=(n_out,)), bias.repeat(n_out))
    assert torch.equal(run("clone_width", weight, times=(1, n_in), inputs=-1), weight.repeat(1, n_in))
    turned = run("clone_width", weight.T.contiguous(), times=(n_in, n_out), inputs=0)
    assert torch.equal(turned, mine.T)
    three = run("clone_width", torch.cat((weight, weight * 2)), times=(n_out, n_in), parts=2)
    assert torch.equal(three, torch.cat((mine, run("clone_width", weight * 2, times=(n_out, n_in)))))
    assert ops.get("clone_width").check([weight.double()], times=(n_out, n_in)) == 1


def test_a_cloned_net_computes_each_output_as_many_times() -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).double()
    large = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).double()
    state = {}
    for name, value in small.state_dict().items():
        times = (2, 2) if value.dim() == 2 else (2,)
        if name.startswith("3."):
            times = (1, *times[1:])
        state[name] = run("clone_width", value, times=times)
    large.load_state_dict(state)
    x = random((5, 3))
    torch.testing.assert_close(large(x.repeat(1, 2)), small(x), rtol=1e-12, atol=1e-12)


@some
@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 3), st.sampled_from(["random", "even"]), SEEDS)
def test_widening_is_net2wider(held: int, more: int, unit: int, spread: str, seed: int) -> None:
    torch.manual_seed(seed)
    first, second = nn.Conv2d(2, held * unit, 3).double(), nn.Conv2d(held * unit, 3, 3).double()
    to = (held + more) * unit
    same = {"to": to, "seed": seed, "spread": spread, "unit": unit}
    weight, bias = run("widen", first.weight.detach(), **same), run("widen", first.bias.detach(), **same)
    after = run("widen", second.weight.detach(), axis=1, share=1, **same)
    # each unit is one of the old ones (the first are themselves), and what consumes a unit's copies sums to what it was
    assert torch.equal(weight[: held * unit], first.weight)
    found = []
    for n, kernel in enumerate(weight.reshape(held + more, -1)):
        match = [m for m, old in enumerate(first.weight.detach().reshape(held, -1)) if torch.equal(old, kernel)]
        assert len(match) == 1
        found += match
        assert torch.equal(bias.reshape(held + more, unit)[n], first.bias.detach().reshape(held, unit)[match[0]])
    counts = np.bincount(found, minlength=held)
    shares = second.weight.detach().reshape(3, held, unit, 3, 3) / torch.tensor(counts).reshape(1, held, 1, 1, 1)
    assert torch.equal(after.reshape(3, held + more, unit, 3, 3), shares[:, found])
    x = random((2, 2, 7, 7), seed=seed)
    wide = F.conv2d(F.relu(F.conv2d(x, weight, bias)), after, second.bias)
    torch.testing.assert_close(wide, second(F.relu(first(x))), rtol=1e-12, atol=1e-12)
    if spread == "even":
        assert found == [n % held for n in range(held + more)]
    assert ops.get("widen").check([first.weight.detach()], **same) == 1


@some
@given(st.integers(2, 4), st.sampled_from([(), (1,), (3,), (3, 5)]), SEEDS)
def test_an_inserted_dirac_layer_changes_nothing(width: int, kernel: tuple[int, ...], seed: int) -> None:
    weight = evaluate(call("dirac", shape=(width, width, *kernel)), {}.__getitem__)
    x = random((2, width, *[6 for _ in kernel]), seed=seed)
    if not kernel:
        assert torch.equal(F.linear(x, weight), x)
    else:
        conv = F.conv1d if len(kernel) == 1 else F.conv2d
        assert torch.equal(conv(x, weight, padding="same"), x)


@some
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), DTYPES, SEEDS)
def test_grouped_heads_are_the_mean_of_theirs(
    groups: int, size: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    weight = random((groups * size * width, 3), dtype, seed)
    mine = run("mha_to_gqa", weight, heads=groups * size, groups=groups)
    heads = weight.double().reshape(groups, size, width, 3)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(mine.double(), heads.mean(1).reshape(groups * width, 3), **close)
    assert torch.equal(run("mha_to_gqa", weight[:, 0], heads=groups * size, groups=groups), mine[:, 0])
    if size == 1:
        assert torch.equal(mine, weight)
    same = weight.reshape(groups, size, width, 3)[:, :1].expand(-1, size, -1, -1).reshape(weight.shape)
    # heads that are alike lose nothing but the rounding of the mean
    again = run("mha_to_gqa", same.contiguous(), heads=groups * size, groups=groups)
    torch.testing.assert_close(again.reshape(groups, width, 3), same.reshape(groups, size, width, 3)[:, 0])


@some
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), DTYPES, SEEDS)
def test_rotary_rows_turn_as_in_transformers(
    heads: int, half: int, model: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    rows = random((heads * 2 * half,) if bias else (heads * 2 * half, model), dtype, seed)
    config = SimpleNamespace(num_attention_heads=heads)
    for op, inverse in (("rope_permute", False), ("rope_unpermute", True)):
        theirs = PermuteForRope(inverse=inverse)._permute_for_rope(rows, config)
        agree(op, "transformers.core_model_loading.PermuteForRope", run(op, rows, heads=heads), theirs)
        assert ops.get(op).check([rows], heads=heads) == 1


@some
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.booleans(), SEEDS)
def test_merged_adapters_add_what_they_computed(out: int, into: int, rank: int, turned: bool, seed: int) -> None:
    weight, b, a = (
        random((out, into), seed=seed),
        random((out, rank), seed=seed + 1),
        random((rank, into), seed=seed + 2),
    )
    scale = python_random.Random(seed).uniform(0.1, 4)
    stored = weight.T.contiguous() if turned else weight
    merged = run("lora_merge", stored, b, a, scale=scale, transposed=int(turned))
    x = random((3, into), seed=seed + 3)
    apart = x @ weight.T + scale * ((x @ a.T) @ b.T)
    torch.testing.assert_close(x @ (merged if turned else merged.T), apart, rtol=1e-12, atol=1e-12)
    for op in ("lora_merge", "lora_unmerge"):
        assert ops.get(op).check([stored, b, a], scale=scale, transposed=int(turned)) == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([0, 1, 3]), st.integers(1, 4), SEEDS)
def test_merged_adapters_are_pefts(out: int, into: int, kernel: int, rank: int, seed: int) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Conv2d(into, out, kernel) if kernel else nn.Linear(into, out))
    weight = base[0].weight.detach().clone()
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(base, config).base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    merged = run("lora_merge", weight, b, a, scale=3.0)
    layer.merge()
    agree("lora_merge", "peft, merge", merged, layer.base_layer.weight.detach(), within=1e-5)
    layer.unmerge()
    unmerged = run("lora_unmerge", merged, b, a, scale=3.0)
    agree("lora_unmerge", "peft, unmerge", unmerged, layer.base_layer.weight.detach(), within=1e-5)


@some
@given(st.integers(1, 7), st.integers(1, 7), st.data(), SEEDS)
def test_low_rank_is_the_nearest_of_its_rank(out: int, into: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(1, min(out, into)))
    weight = random((out, into), seed=seed)
    mine = run("low_rank", weight, rank=rank)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert np.linalg.norm((weight - mine).numpy()) == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), abs=1e-12)
    assert int(torch.linalg.matrix_rank(mine)) <= rank
    b, a = (run("low_rank", weight, rank=rank, factor=factor) for factor in ("b", "a"))
    torch.testing.assert_close(b @ a, mine, rtol=1e-12, atol=1e-12)
    half = run("low_rank", weight.half(), rank=min(out, into))
    torch.testing.assert_close(half, weight.half(), rtol=1e-2, atol=1e-2)


def test_an_mlp_of_gpt2_widens_without_changing_its_logits() -> None:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 30, "n_positions": 16}
    small = GPT2LMHeadModel(GPT2Config(n_inner=12, **shape)).double().eval()
    large = GPT2LMHeadModel(GPT2Config(n_inner=20, **shape)).double().eval()
    state = small.state_dict()
    for name, value in list(state.items()):
        if ".mlp.c_fc." in name:
            state[name] = run("widen", value, to=20, axis=-1, seed=3)
        elif name.endswith(".mlp.c_proj.weight"):
            state[name] = run("widen", value, to=20, axis=0, seed=3, share=1)
    large.load_state_dict(state)
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits, rtol=1e-12, atol=1e-12)
