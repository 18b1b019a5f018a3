"""Which axes of a model change together: found from the dataflow of real libraries' models, never from names."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery import SurgeryError, coupled
from surgery.coupling import Coupling, Group
from surgery.unit_spaces import Space, cut, factors, find, index_of, joined, leaves, product, regroup, unify
from tests import tiny_bodies


def one(coupling: Coupling, name: str, tensor: str) -> Group:
    found = [g for g in coupling.groups if g.name == name and tensor in g.tensors]
    assert len(found) == 1, [str(g) for g in found]
    return found[0]


def axes(group: Group) -> set[tuple[str, int, int]]:
    return {(m.tensor, m.axis, m.times) for m in group.members}


def test_gpt2_fused_projection_of_a_conv1d() -> None:
    model, example = tiny_bodies.body("gpt2")
    coupling = coupled(model, example)
    at = "transformer.h.0."
    heads = one(coupling, "heads", f"{at}attn.c_attn.weight")
    assert (heads.size, axes(heads)) == (
        4,
        {(f"{at}attn.c_attn.weight", 1, 3), (f"{at}attn.c_attn.bias", 0, 3), (f"{at}attn.c_proj.weight", 0, 1)},
    )
    assert {m.tensor: m.layout for m in heads.members}[f"{at}attn.c_proj.weight"] == "heads*head_dim"
    inner = one(coupling, "inner", f"{at}mlp.c_fc.weight")
    assert (inner.size, axes(inner)) == (
        96,
        {(f"{at}mlp.c_fc.weight", 1, 1), (f"{at}mlp.c_fc.bias", 0, 1), (f"{at}mlp.c_proj.weight", 0, 1)},
    )
    assert not inner.normed
    assert [m.tensor for m in inner.consumers] == [f"{at}mlp.c_proj.weight"]
    assert [m.tensor for m in inner.producers] == [f"{at}mlp.c_fc.weight"]
    hidden = one(coupling, "hidden", "transformer.wpe.weight")
    assert hidden.normed
    assert {("transformer.wte.weight", 1, 1), ("lm_head.weight", 1, 1), (f"{at}attn.c_attn.weight", 0, 1)} <= axes(
        hidden
    )
    assert coupling.ties() == [["transformer.wte.weight", "lm_head.weight"]]
    assert not coupling.unknown


def test_bert_heads_lie_in_separate_projections() -> None:
    model, example = tiny_bodies.body("bert")
    coupling = coupled(model, example)
    at = "encoder.layer.1.attention."
    heads = one(coupling, "heads", f"{at}self.query.weight")
    made = {(f"{at}self.{p}.{t}", 0, 1) for p in ("query", "key", "value") for t in ("weight", "bias")}
    assert axes(heads) == made | {(f"{at}output.dense.weight", 1, 1)}
    # keys and queries share their width, values have one of their own
    queries = one(coupling, "head_dim", f"{at}self.query.weight")
    assert f"{at}self.key.weight" in queries.tensors
    assert f"{at}self.value.weight" not in queries.tensors
    assert [g.size for g in coupling.find("inner")] == [40, 40]


def test_timm_vit_and_multihead_attention_share_one_fused_projection() -> None:
    for name, at, fused in (("vit", "blocks.0.attn.", "qkv.weight"), ("encoder", "self_attn.", "in_proj_weight")):
        model, example = tiny_bodies.body(name)
        heads = one(coupled(model, example), "heads", at + fused)
        assert heads.size == 4
        assert {m.layout for m in heads.members if m.tensor == at + fused} == {"(1 + 1 + 1)*heads*head_dim"}


def test_residual_streams_of_a_convolutional_net() -> None:
    model, example = tiny_bodies.body("resnet")
    coupling = coupled(model, example)
    stream = one(coupling, "hidden", "layer1.0.conv2.weight")
    assert {("conv1.weight", 0, 1), ("bn1.running_mean", 0, 1), ("layer1.1.conv2.weight", 0, 1)} <= axes(stream)
    assert ("layer2.0.downsample.0.weight", 1, 1) in axes(stream)
    assert ("layer2.0.downsample.0.weight", 0, 1) not in axes(stream)
    inner = one(coupling, "inner", "layer1.0.conv1.weight")
    assert inner.tensors[0] == "layer1.0.conv1.weight"
    assert {"layer1.0.bn1.running_var", "layer1.0.conv2.weight"} <= set(inner.tensors)


def test_grouped_and_depthwise_convolutions() -> None:
    model, example = tiny_bodies.body("resnext")
    coupling = coupled(model, example)
    (groups,) = [g for g in coupling.groups if "groups" in g.marks and "layer1.0.conv2.weight" in g.tensors]
    assert groups.size == 4
    assert ("layer1.0.conv2.weight", 0, 1) in axes(groups)
    assert ("layer1.0.conv1.weight", 0, 1) in axes(groups)
    model, example = tiny_bodies.body("depthwise")
    coupling = coupled(model, example)
    (inner,) = [g for g in coupling.groups if "features.2.conv.1.0.weight" in g.tensors and g.name == "inner"]
    assert {("features.2.conv.0.0.weight", 0, 1), ("features.2.conv.1.0.weight", 0, 1)} <= axes(inner)
    assert ("features.2.conv.2.weight", 1, 1) in axes(inner)


def test_t5_ties_both_stacks_and_shares_heads_by_its_position_bias() -> None:
    model, example = tiny_bodies.body("t5")
    coupling = coupled(model, example)
    assert len(coupling.ties()) == 1
    at = "encoder.block.{}.layer.0.SelfAttention."
    heads = one(coupling, "heads", at.format(0) + "q.weight")
    assert at.format(1) + "q.weight" in heads.tensors  # the bias of the first block is added in all
    assert at.format(0) + "relative_attention_bias.weight" in heads.tensors
    assert len([g for g in coupling.groups if g.name == "hidden"]) == 1


def test_llama_groups_queries_and_gates() -> None:
    model, example = tiny_bodies.body("llama")
    coupling = coupled(model, example)
    at = "model.layers.0."
    heads = one(coupling, "heads", f"{at}self_attn.k_proj.weight")
    assert heads.size == 2
    assert f"{at}self_attn.q_proj.weight" in heads.tensors
    queries = one(coupling, "query_heads", f"{at}self_attn.q_proj.weight")
    assert (queries.size, set(queries.tensors)) == (3, {f"{at}self_attn.q_proj.weight", f"{at}self_attn.o_proj.weight"})
    gated = one(coupling, "inner", f"{at}mlp.gate_proj.weight")
    assert set(gated.tensors) == {f"{at}mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    turned = one(coupling, "head_dim", f"{at}self_attn.k_proj.weight")
    assert turned.refusal  # the tables of rotary positions hold a value for each


def test_swin_merges_four_patches_of_one_width() -> None:
    model, example = tiny_bodies.body("swin")
    coupling = coupled(model, example)
    narrow = one(coupling, "hidden", "features.0.0.weight")
    wide = one(coupling, "hidden", "features.3.0.norm1.weight")
    assert (narrow.size, wide.size) == (24, 48)
    assert ("features.2.reduction.weight", 1, 4) in axes(narrow)
    assert ("features.2.reduction.weight", 0, 1) in axes(wide)
    heads = one(coupling, "heads", "features.1.0.attn.qkv.weight")
    assert ("features.1.0.attn.relative_position_bias_table", 1, 1) in axes(heads)


@pytest.mark.parametrize("name", [*tiny_bodies.BODIES, "encoder"])
def test_every_axis_of_every_model_is_told(name: str) -> None:
    model, example = tiny_bodies.body(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    coupling = coupled(model, example)
    assert not coupling.unknown
    for tensor, value in model.state_dict().items():
        if value.is_floating_point():
            spaces = coupling.spaces(tensor)
            assert [find(s).size for s in spaces] == list(value.shape)
            assert all(find(leaf) in coupling.by_space for s in spaces for leaf in leaves(s))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert {g.size for g in coupling.groups if g.name in ("heads", "inner", "hidden")}


class Shuffled(nn.Module):
    """A model whose parameters stand under the names of others."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.inner = [model]  # a list, so that it is no submodule
        own = dict(model.named_parameters())
        names = sorted(own)
        random.Random(seed).shuffle(names)
        self.now = dict(zip(own, names, strict=True))
        self.held = nn.ParameterDict({new.replace(".", "/"): own[old] for old, new in self.now.items()})

    def forward(self, **x: Any) -> Any:
        values = {old: self.held[new.replace(".", "/")] for old, new in self.now.items()}
        return torch.func.functional_call(self.inner[0], values, (), x)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_names_tell_nothing(name: str) -> None:
    model, example = tiny_bodies.body(name)
    plain = coupled(model, example)
    shuffled = Shuffled(model, 3)
    other = coupled(shuffled, example)
    back = {"held." + new.replace(".", "/"): old for old, new in shuffled.now.items()}
    tied = {n: several[0] for several in plain.ties() for n in several}

    def told(coupling: Coupling, names: dict[str, str]) -> set[Any]:
        own = set(dict(model.named_parameters()))
        members = [
            frozenset(
                (tied.get(n, n), m.axis, m.times)
                for m in g.members
                if (n := names.get(m.tensor, m.tensor)) in own or n in tied
            )
            for g in coupling.groups
        ]
        return {(g.name, g.size, each) for g, each in zip(coupling.groups, members, strict=True) if each}

    assert told(plain, {}) == told(other, back)


class Sorted(nn.Module):
    """An operator that has no rule stands in the stream of the inner width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = torch.linalg.inv(torch.diag_embed(self.a(x).exp())).diagonal(dim1=-2, dim2=-1)
        return self.c(self.b(h).relu())


def test_an_operator_without_a_rule_is_named_and_nothing_guessed() -> None:
    coupling = coupled(Sorted(), torch.randn(2, 6))
    assert coupling.unknown
    group = next(g for g in coupling.groups if "a.weight" in g.tensors and g.size == 8)
    assert "no rule for" in group.refusal
    assert not next(g for g in coupling.groups if "c.weight" in g.tensors and g.size == 10).refusal


def test_what_is_not_there_is_an_error_with_what_is() -> None:
    model, example = tiny_bodies.body("gpt2")
    coupling = coupled(model, example)
    with pytest.raises(SurgeryError, match="did you mean transformer.h.0.mlp"):
        coupling.find("transformer.h.0.mpl")
    with pytest.raises(SurgeryError, match="no group query_heads"):
        coupling.find(None, "query_heads")


# --- spaces ----------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SIZES, st.data())
@settings(max_examples=60, deadline=None)
def test_a_view_keeps_every_unit_at_its_place(sizes: list[int], data: st.DataObject) -> None:
    flat = Space(math.prod(sizes))
    apart = regroup([flat], sizes, "here")
    again = regroup(apart, [flat.size], "here")
    assert not any("fixed" in find(s).marks for s in (flat, *apart))
    unify(flat, again[0], "here")
    chosen: dict[Space, np.ndarray] = {}
    picks: list[np.ndarray] = []
    for space in apart:
        wanted = data.draw(st.lists(st.integers(0, space.size - 1), min_size=1, max_size=3))
        picks.append(np.array(wanted) if space.size > 1 else np.arange(1))
        if space.size > 1:
            chosen[find(space)] = picks[-1]
    places = np.arange(flat.size).reshape(sizes)[np.ix_(*picks)].reshape(-1)
    assert index_of(flat, chosen).tolist() == places.tolist()


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_cuts_meet_at_their_common_refinement(sizes: list[int], data: st.DataObject) -> None:
    whole = Space(sum(sizes))
    other = data.draw(st.permutations(sizes))
    first = cut(whole, sizes, "here")
    second = cut(whole, other, "here")
    assert [s.size for s in first] == sizes
    assert [s.size for s in second] == list(other)
    both = Space(sum(sizes))
    unify(both, joined(first), "here")
    unify(both, joined(second), "here")
    ends = {int(e) for e in (*np.cumsum(sizes), *np.cumsum(other))}
    assert len(list(leaves(both))) + sum(1 for s in _ones(both)) >= len(ends) - 1
    assert index_of(both, {}).tolist() == list(range(sum(sizes)))


def _ones(space: Space) -> list[Space]:
    space = find(space)
    if space.form == "leaf":
        return [space] if space.size == 1 else []
    return [leaf for part in space.parts for leaf in _ones(part)]


def test_a_view_across_a_cut_makes_the_pieces_one() -> None:
    q, k, v = Space(8), Space(8), Space(8)
    fused = joined([q, k, v])
    _, each = regroup([fused], [3, 8], "here")
    assert find(q) is find(k) is find(v) is find(each)
    heads, width = regroup([q], [2, 4], "here")
    assert index_of(fused, {find(heads): np.array([1])}).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert [find(f) for f in factors(product([heads, width]))] == [find(heads), find(width)]


def test_what_does_not_fit_is_fixed() -> None:
    a = product([Space(3), Space(4)])
    regroup([a], [2, 6], "a view in h.0")
    assert "a view in h.0" in find(a).marks["fixed"][0]
