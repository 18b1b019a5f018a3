"""Departures that are meant: the rest is proven around them, and nothing else is let through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from tests import pairs

ACT = "blocks.*.ffn.1"


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return pairs.bert()


def around(bert: nn.Module, target: nn.Module, *allowed: str, surface: bool = True, **more: Any) -> surgery.Report:
    probe = pairs.probe(bert, surface=surface)
    return surgery.graft(bert.state_dict(), target, probe=probe, allow_different=allowed, **more)


def refused(bert: nn.Module, target: nn.Module, *allowed: str, **more: Any) -> surgery.Report:
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(surgery.GraftError) as caught:
        around(bert, target, *allowed, **more)
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
    report = caught.value.report
    assert report is not None
    return report


def right_rows(report: surgery.Report, target: nn.Module) -> None:
    wanted = pairs.expressions(target)
    assert {r.target: str(r.expr) for r in report.plan.rows if r.expr is not None} == wanted


def inside(report: surgery.Report) -> set[str]:
    assert report.proof is not None
    end = ": inside a departure, not proven"
    return {line.removesuffix(end) for line in report.proof.not_exercised if line.endswith(end)}


def changed(target: nn.Module, bert: nn.Module, **rows: str) -> surgery.Plan:
    """The right plan but for these rows, dots as double underscores."""
    expressions = pairs.expressions(target) | {name.replace("__", "."): text for name, text in rows.items()}
    return pairs.plan_of(bert.state_dict(), target, expressions)


# -- what is allowed --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("surface", [False, True])
def test_an_activation_in_every_block(bert: nn.Module, surface: bool) -> None:
    target = pairs.Encoder(gelu="tanh")
    report = around(bert, target, ACT, surface=surface)
    assert report.verdict == "adapted"
    right_rows(report, target)
    proof = report.proof
    assert proof is not None
    assert [d.module for d in proof.departures] == ["blocks.0.ffn.1", "blocks.1.ffn.1"]
    assert all(d.reference.endswith("intermediate.intermediate_act_fn") for d in proof.departures)
    assert all(1e-5 < d.drift < 1e-3 for d in proof.departures)
    assert proof.passes[0].residuals["last_hidden_state"] < 1e-12
    assert not inside(report)
    assert torch.equal(target.tokens.weight, bert.embeddings.word_embeddings.weight)


def test_the_drift_of_the_outputs_is_what_a_run_shows(bert: nn.Module) -> None:
    target = pairs.Encoder(gelu="tanh")
    for surface in (False, True):
        proof = around(bert, target, ACT, surface=surface).proof
        assert proof is not None
        apart = []
        for seed in (1, 2, 3):
            x = pairs.inputs(seed)
            with torch.no_grad():
                a, b = pairs.run_bert(bert, x), pairs.run_encoder(target.eval(), x)
            apart.append(float((a - b).abs().max() / a.abs().max()))
        assert proof.departed["last_hidden_state"] == pytest.approx(max(apart), rel=0.05)


def test_norms_of_another_eps_and_weights_inside(bert: nn.Module) -> None:
    target = pairs.Encoder(eps=1e-3)
    report = around(bert, target, "blocks.*.norm?", "norm")
    assert report.verdict == "adapted"
    right_rows(report, target)
    assert inside(report) == {n for n in target.state_dict() if "norm" in n}
    assert any("10 of 29 filled tensors are inside departures" in note for note in report.proof.notes)


def test_another_number_of_heads(bert: nn.Module) -> None:
    target = pairs.Encoder(heads=8)
    report = around(bert, target, "blocks.*.mix")
    assert report.verdict == "adapted"
    assert inside(report) == {n for n in target.state_dict() if ".mix." in n}
    outside = {n: e for n, e in pairs.expressions(target).items() if ".mix." not in n}
    assert outside.items() <= {r.target: str(r.expr) for r in report.plan.rows}.items()


@pytest.mark.parametrize("departs", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("named", [(0,), (1,), (0, 1)])
def test_only_what_is_named_may_depart(bert: nn.Module, departs: tuple[int, ...], named: tuple[int, ...]) -> None:
    target = pairs.Encoder()
    for i in departs:
        target.blocks[i].ffn[1] = nn.GELU("tanh")
    patterns = [f"blocks.{i}.ffn.1" for i in named]
    given = pairs.plan(bert.state_dict(), target)
    if not set(departs) <= set(named):
        first = min(set(departs) - set(named))
        report = refused(bert, target, *patterns, plan=given)
        assert report.verdict == "refuted"
        assert report.proof.divergence.target_module == f"blocks.{first}.ffn.1"
        return
    report = around(bert, target, *patterns, plan=given)
    assert report.verdict == ("adapted" if departs else "proven")
    assert [d.module for d in report.proof.departures] == [f"blocks.{i}.ffn.1" for i in departs]
    idle = [n for n in report.proof.notes if n.endswith("is allowed to depart, and does not")]
    assert len(idle) == len(set(named) - set(departs))


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("surface", [False, True])
def test_a_second_defect_elsewhere(bert: nn.Module, surface: bool) -> None:
    target = pairs.Encoder(gelu="tanh")
    target.blocks[1].norm1.eps = 1e-3
    report = refused(bert, target, ACT, surface=surface, plan=pairs.plan(bert.state_dict(), target))
    assert report.verdict == "refuted"
    assert report.proof.divergence.target_module == "blocks.1.norm1"
    assert report.proof.divergence.cause == "eps"


@pytest.mark.parametrize(
    ("row", "text", "module"),
    [
        ("blocks__0__ffn__2__weight", "encoder.layer.1.output.dense.weight", "blocks.0.ffn.2"),  # right after it
        ("blocks__1__ffn__0__weight", "encoder.layer.0.intermediate.dense.weight", "blocks.1.ffn.0"),  # right before it
        ("blocks__1__norm2__bias", "encoder.layer.0.output.LayerNorm.bias", "blocks.1.norm2"),
        ("blocks__0__mix__proj__bias", "encoder.layer.1.attention.output.dense.bias", "blocks.0.mix.proj"),
        ("tokens__weight", "neg(embeddings.word_embeddings.weight)", "tokens"),
    ],
)
@pytest.mark.parametrize("surface", [False, True])
def test_a_wrong_weight_outside(bert: nn.Module, row: str, text: str, module: str, surface: bool) -> None:
    target = pairs.Encoder(gelu="tanh")
    report = refused(bert, target, ACT, surface=surface, plan=changed(target, bert, **{row: text}))
    assert report.verdict == "refuted"
    where = report.proof.divergence.target_module
    assert not where.endswith("ffn.1")
    assert where == module or row.startswith("tokens")


def test_a_wrong_weight_inside_is_never_called_proven(bert: nn.Module) -> None:
    target = pairs.Encoder(eps=1e-3)
    wrong = changed(target, bert, blocks__0__norm1__weight="encoder.layer.1.output.LayerNorm.weight")
    report = around(bert, target, "blocks.*.norm?", "norm", plan=wrong)
    assert report.verdict == "adapted"
    assert "blocks.0.norm1.weight" in inside(report)


@pytest.mark.parametrize("surface", [False, True])
def test_nothing_is_left_to_prove(bert: nn.Module, surface: bool) -> None:
    target = pairs.Encoder(gelu="tanh")
    report = refused(bert, target, "*", surface=surface, plan=pairs.plan(bert.state_dict(), target))
    assert report.verdict == "ambiguous"
    assert "nothing is left to prove" in report.message
    assert inside(report) == set(pairs.expressions(target))


def test_all_blocks_named_leaves_the_embeddings(bert: nn.Module) -> None:
    target = pairs.Encoder(gelu="tanh")
    report = around(bert, target, "blocks.*")
    assert report.verdict == "adapted"
    assert inside(report) == {n for n in pairs.expressions(target) if n.startswith("blocks.")}


class Halved(nn.Module):
    """Gives something of a size that the reference has nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)[..., ::2]


def test_nothing_of_its_size(bert: nn.Module) -> None:
    target = pairs.Encoder()
    for block in target.blocks:
        block.ffn = nn.Sequential(nn.Linear(32, 62), Halved(), nn.Linear(31, 32))
    rows = {n: e for n, e in pairs.expressions(target).items() if ".ffn." not in n}
    report = refused(bert, target, ACT, plan=pairs.plan_of(bert.state_dict(), target, rows))
    assert report.verdict == "refuted"
    assert "of blocks.0.ffn.1: " in report.proof.divergence.why


def test_names_that_fit_nothing(bert: nn.Module) -> None:
    with pytest.raises(surgery.SurgeryError, match=r"ffn\.9, which .* does not have; did you mean blocks") as caught:
        around(bert, pairs.Encoder(), "blocks.0.ffn.9")
    assert "star" in caught.value.hint
    target = pairs.Encoder(gelu="tanh")
    target.idle = nn.GELU()
    with pytest.raises(surgery.SurgeryError, match="idle, which is never called"):
        around(bert, target, "idle", plan=pairs.plan(bert.state_dict(), target))


# -- the plan remembers -----------------------------------------------------------------------------------------------
def test_a_plan_file_keeps_what_may_depart(bert: nn.Module, tmp_path: Path) -> None:
    target = pairs.Encoder(gelu="tanh")
    report = around(bert, target, ACT)
    report.plan.save(tmp_path / "a.graft.toml")
    plan = surgery.Plan.load(tmp_path / "a.graft.toml")
    assert plan == report.plan
    assert (plan.allow_different, plan.verdict) == ((ACT,), "adapted")
    probe = pairs.probe(bert, surface=True)
    proof = surgery.verify(bert.state_dict(), target, plan, probe=probe)
    assert proof.verdict == "adapted"
    assert len(proof.departures) == 2
    without = replace(plan, allow_different=())
    assert without.verdict == "stale"
    assert surgery.verify(bert.state_dict(), target, without, probe=probe).verdict == "refuted"
    again = surgery.verify(bert.state_dict(), target, without, probe=probe, allow_different=[ACT])
    assert again.verdict == "adapted"
    said = again.as_dict()
    assert [d["allowed"] for d in said["departures"]] == [ACT, ACT]
    assert set(said["departed"]) == {"last_hidden_state"}


@pytest.mark.parametrize("surface", [False, True])
def test_passes_around_departures(bert: nn.Module, surface: bool) -> None:
    target = pairs.Encoder(gelu="tanh")
    report = around(bert, target, ACT, surface=surface)
    names = ("cpu/float64", "cpu/float32", "cpu/bfloat16", "cpu/float32+compile", "cuda/float32")
    proof = surgery.verify(
        bert.state_dict(), target, report.plan, probe=pairs.probe(bert, surface=surface), passes=names
    )
    passes = {p.name: p for p in proof.passes}
    assert [passes[n].status for n in names[:4]] == ["passed", "passed", "passed", "not run"]
    assert "took the departures' place" in passes["cpu/float32"].why
    assert "torch.compile" in passes["cpu/float32+compile"].why
    target.blocks[0].norm1.eps = 0.3
    spoiled = surgery.verify(
        bert.state_dict(), target, report.plan, probe=pairs.probe(bert, surface=surface), passes=names[:2]
    )
    assert spoiled.verdict == "refuted"


@pytest.mark.parametrize("blockwise", [False, True])
def test_in_little_memory(bert: nn.Module, blockwise: bool) -> None:
    target = pairs.Encoder(gelu="tanh", eps=1e-3)
    allowed = [ACT, "*norm*"]
    report = around(bert, target, *allowed)
    probe = pairs.probe(bert, surface=True)
    proof = surgery.verify(bert.state_dict(), target, report.plan, probe=probe, blockwise=blockwise)
    assert proof.verdict == "adapted"
    assert proof.not_exercised == report.proof.not_exercised


def test_into_a_submodule(bert: nn.Module) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = pairs.Encoder(gelu="tanh")

    for pattern in ("text.blocks.*.ffn.1", ACT):
        report = around(bert, Tower(), pattern, into="text")
        assert report.verdict == "adapted"
        assert [d.module for d in report.proof.departures] == ["blocks.0.ffn.1", "blocks.1.ffn.1"]


# -- real models ------------------------------------------------------------------------------------------------------
def hidden(module: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = module(x).last_hidden_state
    return found


def grafted(
    source: nn.Module, target: nn.Module, inputs: Callable[[int], Tensor], *allowed: str, surface: bool
) -> surgery.Report:
    probe = surgery.Probe(source, hidden, None if surface else hidden, inputs, outputs=("hidden",))
    return surgery.graft(source.state_dict(), target, probe=probe, allow_different=allowed)


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("surface", [False, True])
def test_vit_with_another_eps(surface: bool) -> None:
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    size |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    source = pairs.shaken(ViTModel(ViTConfig(**size), add_pooling_layer=False)).eval()
    target = ViTModel(ViTConfig(**size, layer_norm_eps=1e-3), add_pooling_layer=False).eval()
    report = grafted(source, target, images, "*layernorm*", surface=surface)
    assert report.verdict == "adapted"
    assert {d.module: d.reference for d in report.proof.departures} == {
        n: n for n, _ in target.named_modules() if "layernorm" in n
    }
    assert all(str(row.expr) == row.target for row in report.plan.rows)
    assert 1e-3 < report.proof.departed["hidden"] < 0.1


def gpt2(**more: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **more
    )
    return GPT2Model(config).eval()


class Windowed(nn.Module):
    """Attention that sees the last tokens only."""

    def __init__(self, like: nn.Module, window: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.window = like.c_attn, like.c_proj, window

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        b, t, d = x.shape
        q, k, v = (part.view(b, t, 4, -1).transpose(1, 2) for part in self.c_attn(x).split(d, 2))
        i = torch.arange(t, device=x.device)
        seen = (i[:, None] >= i) & (i[:, None] - i < self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, d)), None


class Gated(nn.Module):
    """A perceptron, and a gate that the source does not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, Gate()

    def forward(self, x: Tensor) -> Any:
        return self.gate(self.inner(x))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.score(x))


@pytest.mark.parametrize("surface", [False, True])
def test_gpt2_with_an_attention_of_its_own(surface: bool) -> None:
    source, target = pairs.shaken(gpt2()), gpt2()
    for block in target.h:
        block.attn = Windowed(block.attn, 3)
    report = grafted(source, target, tokens, "h.*.attn", surface=surface)
    assert report.verdict == "adapted"
    assert [d.reference for d in report.proof.departures] == ["h.0.attn.c_proj", "h.1.attn.c_proj"]
    assert all(str(row.expr) == row.target for row in report.plan.rows)
    assert inside(report) == {n for n in target.state_dict() if ".attn." in n}


@pytest.mark.parametrize("surface", [False, True])
def test_gpt2_with_a_gate(surface: bool) -> None:
    source, target = pairs.shaken(gpt2()), gpt2()
    for block in target.h:
        block.mlp = Gated(block.mlp)
    report = grafted(source, target, tokens, "h.*.mlp.gate", surface=surface)
    assert report.verdict == "adapted"
    assert {r.target for r in report.plan.rows if r.status == "new"} == {
        n for n in target.state_dict() if ".gate." in n
    }
    assert [d.reference for d in report.proof.departures] == ["h.0.mlp.c_proj", "h.1.mlp.c_proj"]


def test_gpt2_with_an_activation_far_from_the_sources() -> None:
    source, target = pairs.shaken(gpt2()), gpt2(activation_function="relu")
    assert grafted(source, target, tokens, "h.*.mlp.act", surface=True).verdict == "adapted"
    with pytest.raises(surgery.GraftError, match=r"around h\.1\.mlp\.act: h\.0\.mlp\.act"):
        grafted(source, gpt2(activation_function="relu"), tokens, "h.1.mlp.act", surface=True)


def test_what_does_not_depart_is_proven_though_storing_rounds(bert: nn.Module) -> None:
    target = pairs.Encoder().bfloat16()
    target.blocks[0].ffn[1] = nn.GELU("tanh")
    report = around(bert, target, ACT, plan=pairs.plan(bert.state_dict(), target))
    assert report.verdict == "adapted"
    assert report.proof.storage > 1e-4
    assert [d.module for d in report.proof.departures] == ["blocks.0.ffn.1"]


class Leaking(nn.Module):
    """Writes into what it is given, which others read after it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5) * 2


def test_what_a_departure_writes_elsewhere_is_seen(bert: nn.Module) -> None:
    target = pairs.Encoder()
    target.norm = nn.Sequential(target.norm, Leaking())  # of no other effect
    rows = {n.replace("norm.", "norm.0.") if n.startswith("norm.") else n: e for n, e in PLAIN.items()}
    plan = pairs.plan_of(bert.state_dict(), target, rows)
    assert around(bert, target, "norm.1", plan=plan).verdict == "proven"
    for block in target.blocks:
        block.mix = Before(block.mix)
    rows = {n.replace(".mix.", ".mix.inner."): e for n, e in rows.items()}
    plan = pairs.plan_of(bert.state_dict(), target, rows)
    assert refused(bert, target, "blocks.*.mix.first", plan=plan).verdict == "refuted"


PLAIN = pairs.expressions(pairs.Encoder())


class Before(nn.Module):
    """The residual reads what `first` has written into."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = Leaking(), inner

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.inner(self.first(x), mask)


@pytest.mark.parametrize("act", [nn.SiLU, lambda: nn.ReLU6(inplace=True)])
def test_resnet_with_one_activation_called_twice(act: Callable[[], nn.Module]) -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    source = pairs.shaken(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)).eval()
    target = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    for module in list(target.modules()):
        if hasattr(module, "relu"):
            module.relu = act()

    def images(seed: int) -> Tensor:
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    probe = surgery.Probe(source, lambda m, x: m(x), None, images)
    report = surgery.graft(source.state_dict(), target, probe=probe, allow_different=["*relu"])
    assert report.verdict == "adapted"
    assert [d.module for d in report.proof.departures] == [n for n, _ in target.named_modules() if n.endswith("relu")]
    assert not inside(report)
    assert all(str(row.expr) == row.target for row in report.plan.rows if row.expr is not None)


def test_t5_with_another_eps() -> None:
    from transformers import T5Config, T5EncoderModel

    size = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    source = pairs.shaken(T5EncoderModel(T5Config(**size))).eval()
    target = T5EncoderModel(T5Config(**size, layer_norm_epsilon=1e-2)).eval()
    report = grafted(source, target, tokens, "*layer_norm", surface=True)
    assert report.verdict == "adapted"
    assert {d.module: d.reference for d in report.proof.departures} == {
        n: n for n, _ in target.named_modules() if n.endswith("layer_norm")
    }


def test_departures_beside_rows_that_are_adapted(bert: nn.Module) -> None:
    target = pairs.Encoder(gelu="tanh")
    target.places = nn.Embedding(48, pairs.WIDTH)
    longer = "extend_pos_embed_tile(embeddings.position_embeddings.weight, to=48, offset=0)"
    plan = changed(target, bert, places__weight=longer)
    report = around(bert, target, ACT, plan=plan)
    assert report.verdict == "adapted"
    assert report.proof.adapted == ("places.weight",)
    assert len(report.proof.departures) == 2
    target.blocks[0].norm1.eps = 1e-3
    assert refused(bert, target, ACT, plan=plan).verdict == "refuted"
    assert "departs as allowed" in report.proof._repr_html_()
