"""Mapping with nothing run: what it settles is right, and what it cannot settle it leaves open."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.checkpoint import open as open_checkpoint
from surgery.expr import Name, call
from surgery.graft import infos
from surgery.mapper import static
from surgery.plan import Plan, Status

D, FF, VOCAB, LENGTH = 8, 20, 23, 12


class Named(nn.Module):
    """A module with children by name: names and types are all that counts here."""

    def __init__(this, /, **children: nn.Module | nn.Parameter) -> None:
        nn.Module.__init__(this)
        for name, child in children.items():
            setattr(this, name, child)


def lin(a: int, b: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(a, b, bias=bias)


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(D)


def bert_state(layers: int = 2) -> dict[str, Tensor]:
    def block() -> nn.Module:
        return Named(
            attention=Named(
                self=Named(query=lin(D, D), key=lin(D, D), value=lin(D, D)),
                output=Named(dense=lin(D, D), LayerNorm=norm()),
            ),
            intermediate=Named(dense=lin(D, FF)),
            output=Named(dense=lin(FF, D), LayerNorm=norm()),
        )

    model = Named(
        embeddings=Named(
            word_embeddings=nn.Embedding(VOCAB, D),
            position_embeddings=nn.Embedding(LENGTH, D),
            token_type_embeddings=nn.Embedding(2, D),
            LayerNorm=norm(),
        ),
        encoder=Named(layer=nn.ModuleList(block() for _ in range(layers))),
        pooler=Named(dense=lin(D, D)),
    )
    return shaken(model)


def shaken(model: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        k: torch.randn(v.shape, generator=g) if v.is_floating_point() else v.clone()
        for k, v in model.state_dict().items()
    }


def own(first: str = "attn_norm", second: str = "ffn_norm", layers: int = 2, **more: nn.Module) -> nn.Module:
    def block() -> nn.Module:
        return Named(
            wq=lin(D, D), wk=lin(D, D), wv=lin(D, D), wo=lin(D, D), fc1=lin(D, FF), fc2=lin(FF, D),
            **{first: norm(), second: norm()},
        )  # fmt: skip

    return Named(
        tok=nn.Embedding(VOCAB, D),
        pos=nn.Embedding(LENGTH, D),
        seg=nn.Embedding(2, D),
        emb_norm=norm(),
        blocks=nn.ModuleList(block() for _ in range(layers)),
        **more,
    )


def find(state: dict[str, Tensor], target: nn.Module) -> Plan:
    return static.find(open_checkpoint(state), target)


def exprs(plan: Plan) -> dict[str, str]:
    return {r.target: str(r.expr) for r in plan.rows if r.expr is not None}


# -- what is settled --------------------------------------------------------------------------------------------------
def test_words_settle_a_block_and_the_number_of_the_block_the_rest() -> None:
    state = bert_state(layers=12)
    plan = find(state, own(layers=12))
    assert plan.verdict == "consistent", plan.diagnosis
    rows = exprs(plan)
    assert rows["blocks.10.wq.weight"] == "encoder.layer.10.attention.self.query.weight"
    assert rows["blocks.2.wo.bias"] == "encoder.layer.2.attention.output.dense.bias"
    assert rows["blocks.9.attn_norm.weight"] == "encoder.layer.9.attention.output.LayerNorm.weight"
    assert rows["blocks.9.ffn_norm.weight"] == "encoder.layer.9.output.LayerNorm.weight"
    assert rows["tok.weight"] == "embeddings.word_embeddings.weight"
    plan.check(open_checkpoint(state), infos(own(layers=12)))


def test_a_documented_layer_says_what_its_norms_and_its_fused_projection_mean() -> None:
    layer = nn.TransformerEncoderLayer(D, 2, FF, batch_first=True)
    target = Named(
        tok=nn.Embedding(VOCAB, D), pos=nn.Embedding(LENGTH, D), seg=nn.Embedding(2, D), emb_norm=norm(),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )  # fmt: skip
    plan = find(bert_state(), target)
    assert plan.verdict == "consistent", plan.diagnosis
    rows = exprs(plan)
    q, k, v = (f"encoder.layer.1.attention.self.{n}.weight" for n in ("query", "key", "value"))
    assert rows["encoder.layers.1.self_attn.in_proj_weight"] == f"cat({q}, {k}, {v}, axis=0)"
    assert rows["encoder.layers.1.norm1.weight"] == "encoder.layer.1.attention.output.LayerNorm.weight"
    assert rows["encoder.layers.1.norm2.weight"] == "encoder.layer.1.output.LayerNorm.weight"


def test_gamma_and_beta_are_weight_and_bias_and_a_prefix_falls_away() -> None:
    state = {
        "bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in bert_state().items()
    }
    plan = find(state, own())
    assert plan.verdict == "consistent", plan.diagnosis
    assert exprs(plan)["emb_norm.bias"] == "bert.embeddings.LayerNorm.beta"


def test_a_square_matrix_lies_as_the_others_of_its_block_do() -> None:
    """Written as x @ W, all of them: those that are not square show it."""
    state = {k: v.t().contiguous() if v.ndim == 2 and "encoder" in k else v for k, v in bert_state().items()}
    plan = find(state, own())
    assert plan.verdict == "consistent", plan.diagnosis
    assert exprs(plan)["blocks.0.wq.weight"] == "transpose(encoder.layer.0.attention.self.query.weight)"


def test_weight_norm_in_its_spellings() -> None:
    conv = nn.Conv1d(4, 6, 3)
    source = Named(stem=conv, head=lin(6, 2))
    target = copy.deepcopy(source)
    nn.utils.parametrizations.weight_norm(target.stem, dim=2)
    plan = find(shaken(source), target)
    assert plan.verdict == "consistent", plan.diagnosis
    rows = exprs(plan)
    assert rows["stem.parametrizations.weight.original0"] == "norm_except(stem.weight, dim=2)"
    assert rows["stem.parametrizations.weight.original1"] == "stem.weight"
    back = find(shaken(target), source)
    assert exprs(back)["stem.weight"].startswith("weight_norm(stem.parametrizations.weight.original0")


def test_a_bias_that_the_source_does_not_have_is_zero() -> None:
    source = Named(up=lin(D, FF, bias=False), down=lin(FF, D))
    plan = find(shaken(source), Named(up=lin(D, FF), down=lin(FF, D)))
    assert plan.verdict == "consistent"
    assert plan["up.bias"].status is Status.SYNTHESISED


def test_tied_tensors_and_a_fresh_head() -> None:
    target = own(lm_head=lin(D, VOCAB, bias=False), classifier=lin(D, 3))
    target.lm_head.weight = target.tok.weight
    plan = find(bert_state(), target)
    assert plan.verdict == "consistent", plan.diagnosis
    assert plan["lm_head.weight"].tied_to == "tok.weight"
    assert plan["classifier.weight"].status is Status.NEW


def test_an_lstm_is_documented() -> None:
    source = Named(hist_encoder=nn.LSTM(3, 8, 2), out=lin(8, 4))
    plan = find(shaken(source), Named(rnn=nn.LSTM(3, 8, 2), out=lin(8, 4)))
    assert plan.verdict == "consistent", plan.diagnosis
    assert exprs(plan)["rnn.weight_ih_l1"] == "hist_encoder.weight_ih_l1"
    assert exprs(plan)["rnn.bias_hh_l0"] == "hist_encoder.bias_hh_l0"


@pytest.mark.parametrize("seed", range(40))
def test_fewer_words_lead_to_abstention_and_never_to_another_mapping(seed: int) -> None:
    """Some words of the source's names say nothing: what is still claimed is what the whole names say."""
    chance = random.Random(seed)
    state, target = bert_state(), own(pool=lin(D, D))
    truth = exprs(find(state, target))
    words = sorted({w for k in state for w in k.split(".")[:-1] if not w.isdigit()})
    blank = {w: f"zz{chr(97 + i)}" for i, w in enumerate(chance.sample(words, chance.randint(1, 5)))}

    def blanked(name: str) -> str:
        return ".".join(blank.get(w, w) for w in name.split("."))

    plan = find({blanked(k): v for k, v in state.items()}, target)
    if plan.verdict == "consistent":
        assert exprs(plan) == {k: blanked(v) for k, v in truth.items()}
    else:
        assert plan.diagnosis


# -- what is left open ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "second"),
    [("norm1", "norm2"), ("norm2", "norm1"), ("input_layernorm", "post_attention_layernorm"), ("a", "b")],
)
def test_numbers_and_letters_do_not_say_which_norm_is_meant(first: str, second: str) -> None:
    plan = find(bert_state(), own(first, second))
    assert plan.verdict == "ambiguous"
    assert "attention.output.LayerNorm or" in plan.diagnosis
    assert len(plan.candidates) >= 2
    assert len({c.rows_hash for c in plan.candidates}) == len(plan.candidates)


def decoder(norms: tuple[str, str, str]) -> nn.Module:
    def block() -> nn.Module:
        parts = {"self_attn": nn.MultiheadAttention(D, 2), "cross_attn": nn.MultiheadAttention(D, 2)}
        return Named(**parts, fc1=lin(D, FF), fc2=lin(FF, D), **{n: norm() for n in norms})

    return Named(layers=nn.ModuleList(block() for _ in range(2)))


@pytest.mark.parametrize("layers", [1, 2])
def test_the_second_of_three_norms_is_not_the_same_everywhere(layers: int) -> None:
    source = {
        k: v for k, v in shaken(decoder(("norm1", "norm2", "norm_cross"))).items() if int(k.split(".")[1]) < layers
    }
    layer = nn.TransformerDecoderLayer(D, 2, FF)
    plan = find(source, Named(dec=nn.TransformerDecoder(layer, layers)))
    assert plan.verdict == "ambiguous"
    settled = find(
        {k.replace("norm1", "norm_self").replace("norm2", "norm_mlp"): v for k, v in source.items()},
        Named(dec=nn.TransformerDecoder(layer, layers)),
    )
    assert settled.verdict == "consistent" or layers == 1, settled.diagnosis
    if layers == 2:
        assert exprs(settled)["dec.layers.1.norm2.weight"] == "layers.1.norm_cross.weight"


def test_a_bare_square_matrix_may_want_a_transpose() -> None:
    source = {"proj": torch.randn(D, D), "tok.weight": torch.randn(VOCAB, D)}
    plan = find(source, Named(tok=nn.Embedding(VOCAB, D), proj=nn.Parameter(torch.zeros(D, D))))
    assert plan.verdict == "ambiguous"


def test_a_fused_projection_in_a_plain_linear_is_of_an_order_that_no_name_says() -> None:
    def block() -> nn.Module:
        return Named(
            qkv=lin(D, 3 * D), proj=lin(D, D), fc1=lin(D, FF), fc2=lin(FF, D), attn_norm=norm(), mlp_norm=norm()
        )

    fused = Named(tok=nn.Embedding(VOCAB, D), blocks=nn.ModuleList(block() for _ in range(2)))
    state = {
        k: v for k, v in bert_state().items() if "position" not in k and "type" not in k and "embeddings.L" not in k
    }
    assert find(state, fused).verdict == "ambiguous"
    assert find(shaken(fused), copy.deepcopy(fused)).verdict == "consistent"


def test_towers_of_equal_shapes() -> None:
    def tower() -> nn.Module:
        return copy.deepcopy(own().blocks)

    source = shaken(Named(text_model=tower(), vision_model=tower()))
    assert find(source, Named(tower_a=tower(), tower_b=tower())).verdict == "ambiguous"
    assert find(source, Named(blocks=tower())).verdict == "ambiguous"
    named = find(source, Named(visual=tower(), transformer=tower()))
    assert named.verdict == "consistent", named.diagnosis
    assert exprs(named)["transformer.0.wq.weight"] == "text_model.0.wq.weight"


def test_fc1_may_be_the_gate() -> None:
    def gated(gate: str, up: str, down: str) -> nn.Module:
        def block() -> nn.Module:
            return Named(**{gate: lin(D, FF), up: lin(D, FF), down: lin(FF, D), "norm": norm(), "attn": lin(D, D)})

        return Named(layers=nn.ModuleList(block() for _ in range(2)))

    source = shaken(gated("gate_proj", "up_proj", "down_proj"))
    assert find(source, gated("fc1", "fc3", "fc2")).verdict == "ambiguous"
    assert find(source, gated("w1", "w3", "w2")).verdict == "ambiguous"


def test_what_a_forward_pass_would_use_must_not_be_left_over() -> None:
    """A table of the source that the target has no place for may have been added to another."""
    target = own()
    del target.seg
    plan = find(bert_state(), target)
    assert plan.verdict == "ambiguous"
    assert "token_type_embeddings" in plan.diagnosis


def test_positions_of_another_length() -> None:
    target = own()
    target.pos = nn.Embedding(LENGTH - 2, D)
    assert find(bert_state(), target).verdict == "ambiguous"


def test_other_numbers_of_layers() -> None:
    assert find(bert_state(3), own(layers=2)).verdict == "ambiguous"


def test_a_gain_that_may_be_less_one() -> None:
    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

    plan = find(shaken(Named(norm=nn.RMSNorm(D), out=lin(D, 3))), Named(norm=OwnNorm(), out=lin(D, 3)))
    assert plan.verdict == "ambiguous"
    assert "less one" in plan.diagnosis


def test_a_head_of_two_layers_is_not_half_new() -> None:
    source = Named(stem=nn.Conv2d(3, D, 3), classifier=nn.Sequential(lin(D * 4, FF), nn.ReLU(), lin(FF, 5)))
    target = Named(stem=nn.Conv2d(3, D, 3), pre_logits=Named(fc1=nn.Conv2d(D, FF, 2)), head=lin(FF, 5))
    assert find(shaken(source), target).verdict == "ambiguous"


def test_graft_refuses_what_is_open_and_leaves_the_target_as_it_was() -> None:
    target = own("norm1", "norm2")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(surgery.GraftError) as caught:
        surgery.graft(bert_state(), target)
    assert caught.value.report is not None
    assert len(caught.value.report.candidates) >= 2
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


# -- a tensor that a run did not reach --------------------------------------------------------------------------------
def test_suggest_spells_a_neighbour() -> None:
    source = open_checkpoint({"bert.a.weight": torch.zeros(3, 2), "bert.pooler.weight": torch.zeros(4, 2)})
    rows = {"a.weight": Name("bert.a.weight")}
    said = static.suggest("pooler.weight", (4, 2), rows, source)
    assert said is not None
    assert said[0] == Name("bert.pooler.weight")
    assert static.suggest("pooler.weight", (2, 4), rows, source) is None
    turned = {"a.weight": call("transpose", "bert.a.weight")}
    assert static.suggest("pooler.weight", (4, 2), turned, source) is None
    renamed = {"a.weight": Name("bert.pooler.weight")}
    assert static.suggest("b.weight", (4, 2), renamed, source) is None
