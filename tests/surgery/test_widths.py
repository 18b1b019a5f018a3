"""Other widths for whole models: what is said to preserve the function does, on real libraries' models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery import Reshaped, SurgeryError
from surgery.expr import evaluate
from surgery.proof import GATE
from tests import tiny_bodies


def loaded(result: Reshaped) -> nn.Module:
    assert result.module is not None, result.notes
    return result.module


def fits(result: Reshaped, model: nn.Module, tmp_path: Path) -> None:
    """The plan runs from file to file, and what it writes is what the edited module holds, name for name."""
    surgery.write(model.state_dict(), result.plan, tmp_path / "out.safetensors")
    written = surgery.open(tmp_path / "out.safetensors")
    own = loaded(result).state_dict()
    assert set(written) == set(own)
    for name, tensor in own.items():
        got = written.read(name)
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name


def outputs(model: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        got = model(**example) if isinstance(example, dict) else model(example)
    return got[0] if isinstance(got, tuple) else got


# --- function-preserving ---------------------------------------------------------------------------------------------

PRESERVING = ["gpt2", "bert", "t5", "llama", "neox", "vit", "resnet", "convnext", "depthwise"]


@pytest.mark.parametrize("name", PRESERVING)
def test_net2wider_holds_where_no_norm_reduces(name: str, tmp_path: Path) -> None:
    model, example = tiny_bodies.body(name)
    sizes = {g.size for g in surgery.coupled(model, example).find("inner")}
    result = surgery.widen(model, example, "inner", to=max(sizes) + 13, seed=4)
    assert result.kind == "preserving"
    assert result.drift is not None
    assert result.drift <= GATE
    fits(result, model, tmp_path)
    # and in the type that the model has, by running the edited module itself
    wide = loaded(result)
    assert type(wide) is type(model)
    expected, got = outputs(model, example), outputs(wide, example)
    assert torch.allclose(expected, got, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [*PRESERVING, "swin"])
@pytest.mark.parametrize("times", [2, 3])
def test_hypercloning_holds_norms_included(name: str, times: int, tmp_path: Path) -> None:
    model, example = tiny_bodies.body(name)
    result = surgery.clone_width(model, example, times=times)
    assert result.kind == "preserving"
    assert result.drift is not None
    assert result.drift <= GATE
    fits(result, model, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "neox", "vit"])
def test_heads_are_repeated_whole(name: str) -> None:
    model, example = tiny_bodies.body(name)
    result = surgery.widen(model, example, "heads", to=7, seed=2)
    assert result.kind == "preserving"
    assert result.drift is not None
    assert result.drift <= GATE
    loaded(result)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama"])
def test_a_normed_width_is_approximate_unless_repeated_equally(name: str) -> None:
    model, example = tiny_bodies.body(name)
    uneven = surgery.widen(model, example, "hidden", to=30)
    assert uneven.kind == "approximate"
    assert uneven.drift is not None
    assert uneven.drift > 1e-4
    assert "takes a mean over these units" in uneven.notes[0]
    even = surgery.widen(model, example, "hidden", to=48, uniform=True)
    assert even.kind == "preserving"
    assert even.drift is not None
    assert even.drift <= GATE


def test_resnet_hidden_widths_widen_at_random_for_batch_norm_reduces_over_none() -> None:
    model, example = tiny_bodies.body("resnet")
    result = surgery.widen(model, example, "hidden", to=600, seed=1)
    assert result.kind == "preserving"
    assert result.drift is not None
    assert result.drift <= GATE


@pytest.mark.parametrize("name", ["lstm", "unet", "densenet", "beit", "whisper"])
def test_further_families(name: str, tmp_path: Path) -> None:
    model, example = tiny_bodies.body(name)
    cloned = surgery.clone_width(model, example, times=2)
    sizes = [g.size for g in surgery.coupled(model, example).find("inner")]
    wide = surgery.widen(model, example, "inner", to=max(sizes) + 5)
    for result in (cloned, wide):
        assert result.kind == "preserving"
        assert result.drift is not None
        assert result.drift <= GATE
        fits(result, model, tmp_path)


def test_numbers_that_are_no_sizes_are_left_alone() -> None:
    model, example = tiny_bodies.body("swin")  # four heads in windows of four
    groups = [g for g in surgery.coupled(model, example).groups if g.name in ("hidden", "heads")]
    small = loaded(surgery.shrink_width(model, example, {g: g.size // 2 for g in groups}))
    attention = small.features[3][0].attn
    assert (attention.num_heads, list(attention.window_size)) == (2, [4, 4])


def test_a_tied_output_embedding_stays_tied() -> None:
    model, example = tiny_bodies.body("gpt2")
    result = surgery.clone_width(model, example, times=2)
    wide = loaded(result)
    assert wide.lm_head.weight is wide.transformer.wte.weight
    assert result.plan["lm_head.weight"].tied_to == "transformer.wte.weight"
    assert any("stay tied" in note for note in result.notes)


# --- the published formulas ------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(width, inner), nn.BatchNorm1d(inner), nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        got: Tensor = self.out(torch.relu(self.norm(self.fc(x))))
        return got


WIDTHS = st.integers(1, 7)


@given(WIDTHS, st.integers(2, 7), WIDTHS, st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_net2wider_formula(width: int, inner: int, out: int, more: int, seed: int) -> None:
    model = tiny_bodies.unsettled(MLP(width, inner, out), seed)
    result = surgery.widen(model, torch.randn(3, width), "inner", to=inner + more, seed=seed)
    wide, own = loaded(result).state_dict(), model.state_dict()
    # g(j) = j for the old units, any old unit for the new: read off the rows that the rule repeats
    mapping = [
        next(i for i in range(inner) if torch.equal(wide["fc.weight"][j], own["fc.weight"][i]))
        for j in range(inner + more)
    ]
    assert mapping[:inner] == list(range(inner))
    counts = torch.tensor([mapping.count(i) for i in range(inner)])
    for name in ("fc.weight", "fc.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        assert torch.equal(wide[name], own[name][mapping])
    assert torch.allclose(wide["out.weight"], own["out.weight"][:, mapping] / counts[mapping], rtol=1e-6, atol=0)
    assert torch.equal(wide["out.bias"], own["out.bias"])


@given(st.integers(2, 6), st.integers(2, 6), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_hypercloning_formula(width: int, inner: int, times: int, seed: int) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(9, width), nn.LayerNorm(width)
            self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
            self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h = h + self.down(torch.relu(self.up(self.norm(h))))
            got: Tensor = self.head(self.last(h))
            return got

    model = tiny_bodies.unsettled(Residual(), seed)
    result = surgery.clone_width(model, torch.randint(0, 9, (2, 3)), times=times)
    assert result.kind == "preserving"
    wide, own = loaded(result).state_dict(), model.state_dict()
    n = times
    for name, tensor in own.items():
        expected = {
            "embed.weight": lambda w: w.repeat(1, n),
            "up.weight": lambda w: w.repeat(n, n) / n,
            "down.weight": lambda w: w.repeat(n, n) / n,
            "head.weight": lambda w: w.repeat(1, n) / n,
            "head.bias": lambda b: b,
        }.get(name, lambda b: b.repeat(n))(tensor)
        assert torch.allclose(wide[name], expected, rtol=1e-6, atol=0), name


def selected(w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform selection as Weight selection states it: along each axis a stride, else round(linspace(0, t - 1, s))."""
    for axis, s in enumerate(shape):
        t = w.shape[axis]
        index = torch.arange(s) * (t // s) if t % s == 0 else torch.linspace(0, t - 1, s).round().long()
        w = w.index_select(axis, index)
    return w


@given(st.integers(2, 9), st.integers(3, 9), st.data())
@settings(max_examples=12, deadline=None)
def test_weight_selection_formula(width: int, inner: int, data: st.DataObject) -> None:
    to = data.draw(st.integers(2, inner))
    model = tiny_bodies.unsettled(MLP(width, inner, 3), to)
    small = loaded(surgery.shrink_width(model, torch.randn(3, width), "inner", to=to)).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(small[name], selected(tensor, tuple(small[name].shape))), name


# --- lossy -----------------------------------------------------------------------------------------------------------


def test_vit_shrinks_as_weight_selection_does_with_heads_whole(tmp_path: Path) -> None:
    model, example = tiny_bodies.body("vit")
    result = surgery.shrink_width(model, example, {"hidden": 12, "heads": 2, "inner": 48})
    assert result.kind == "lossy"
    assert result.drift is not None
    small, own = loaded(result).state_dict(), model.state_dict()
    fits(result, model, tmp_path)
    q, k, v = own["blocks.0.attn.qkv.weight"].chunk(3)
    parts = [p.reshape(4, 6, 24)[::2].reshape(12, 24)[:, ::2] for p in (q, k, v)]
    assert torch.equal(small["blocks.0.attn.qkv.weight"], torch.cat(parts))
    assert torch.equal(small["pos_embed"], own["pos_embed"][..., ::2])
    assert torch.equal(small["blocks.0.mlp.fc1.weight"], own["blocks.0.mlp.fc1.weight"][::2, ::2])


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "neox", "vit"])
def test_pruned_heads_are_heads_whose_output_is_zero(name: str, tmp_path: Path) -> None:
    model, example = tiny_bodies.body(name)
    result = surgery.prune_heads(model, example, "heads", heads=[1])
    assert result.kind == "lossy"
    assert any("outgoing weights of these units at zero" in note for note in result.notes)
    fits(result, model, tmp_path)
    # by hand, with transformers' own means
    if name == "bert":
        kept = [*range(6), *range(12, 24)]
        own, small = model.state_dict(), loaded(result).state_dict()
        at = "encoder.layer.0.attention."
        assert torch.equal(small[f"{at}self.query.weight"], own[f"{at}self.query.weight"][kept])
        assert torch.equal(small[f"{at}output.dense.weight"], own[f"{at}output.dense.weight"][:, kept])


def test_pruning_a_head_that_adds_nothing_preserves() -> None:
    model, example = tiny_bodies.body("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight[12:18] = 0
    result = surgery.prune_heads(model, example, "heads", heads=[2])
    assert result.kind == "preserving"
    assert result.drift is not None
    assert result.drift <= GATE


def test_one_layer_alone() -> None:
    model, example = tiny_bodies.body("gpt2")
    result = surgery.prune_heads(model, example, "transformer.h.1.attn", heads=[0, 3])
    small = loaded(result)
    assert small.transformer.h[0].attn.num_heads == 4
    assert small.transformer.h[1].attn.num_heads == 2
    assert [row.target for row in result.plan.rows if "prune_heads" in str(row.expr)] == [
        f"transformer.h.1.attn.{t}" for t in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    ]


def test_a_body_that_cannot_bear_it_gets_a_plan_alone() -> None:
    model, example = tiny_bodies.body("encoder")  # nn.MultiheadAttention: width and heads are one number
    result = surgery.prune_heads(model, example, "self_attn", heads=[1])
    assert result.module is None
    assert result.drift is not None  # told by what stands in for it
    assert "build the body yourself" in result.notes[0]
    assert result.plan["self_attn.in_proj_weight"].shape == (54, 24)
    wide = surgery.widen(model, example, "self_attn", to=6)
    assert (wide.kind, wide.module, wide.drift) == ("preserving", None, None)
    assert "by its structure alone" in wide.notes[0]


# --- grouped queries -------------------------------------------------------------------------------------------------


def test_grouped_queries_in_a_class_that_can(tmp_path: Path) -> None:
    model, example = tiny_bodies.body("llama_mha")
    result = surgery.mha_to_gqa(model, example, "heads", kv_heads=2)
    assert result.kind == "approximate"
    assert result.drift is not None
    assert result.drift > 0
    small, own = loaded(result), model.state_dict()
    fits(result, model, tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.allclose(small.state_dict()[name], own[name].reshape(2, 2, 6, 24).mean(1).reshape(12, 24))
    assert [layer.self_attn.num_key_value_groups for layer in small.model.layers] == [2, 2]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]


@pytest.mark.parametrize(
    ("name", "tensor", "axis"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", 1),
        ("vit", "blocks.0.attn.qkv.weight", 0),
        ("encoder", "self_attn.in_proj_weight", 0),
    ],
)
def test_grouped_queries_out_of_a_fused_projection(name: str, tensor: str, axis: int) -> None:
    model, example = tiny_bodies.body(name)
    result = surgery.mha_to_gqa(model, example, "heads", kv_heads=2)
    assert result.module is None
    assert result.drift is not None
    whole = model.state_dict()[tensor]
    q, k, v = whole.chunk(3, dim=axis)
    mean = [p.unflatten(axis, (2, 2, 6)).mean(axis + 1).flatten(axis, axis + 1) for p in (k, v)]
    row = result.plan[tensor]
    assert row.expr is not None
    made = evaluate(row.expr, lambda _: whole)
    assert torch.allclose(made, torch.cat([q, *mean], dim=axis))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "do", "says"),
    [
        ("gpt2", lambda m, x: surgery.mha_to_gqa(m, x, "heads", kv_heads=3), "4 heads do not divide into 3 groups"),
        ("gpt2", lambda m, x: surgery.prune_heads(m, x, "heads", heads=[4]), "4 is none of them"),
        ("gpt2", lambda m, x: surgery.prune_heads(m, x, "heads", heads=[0, 1, 2, 3]), "one has to stay"),
        ("gpt2", lambda m, x: surgery.widen(m, x, "inner", to=8), "8 units are fewer"),
        ("gpt2", lambda m, x: surgery.widen(m, x, "hidden", to=30, uniform=True), "no multiple of 24"),
        ("gpt2", lambda m, x: surgery.widen(m, x, "inner"), "to which size"),
        ("gpt2", lambda m, x: surgery.shrink_width(m, x, "inner", to=0), "cannot be chosen"),
        ("gpt2", lambda m, x: surgery.widen(m, x, "transformer.k", to=30), "no group inner or heads or hidden"),
        ("gpt2", lambda m, x: surgery.clone_width(m, x, times=0), "times=0"),
        ("encoder", lambda m, x: surgery.clone_width(m, x), "the input has this size"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_why(
    name: str, do: Callable[[nn.Module, Any], Reshaped], says: str
) -> None:
    model, example = tiny_bodies.body(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(SurgeryError, match=says) as raised:
        do(model, example)
    assert raised.value.hint
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_the_persons_model_is_not_touched() -> None:
    model, example = tiny_bodies.body("vit")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    surgery.clone_width(model, example, times=2)
    surgery.prune_heads(model, example, "heads", heads=[0])
    assert model.blocks[0].attn.num_heads == heads
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
