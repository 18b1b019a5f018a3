"""From a dense model to a mixture of experts by a rule: Llama into transformers' own Mixtral."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery import rules

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
RULE = rules.dense_to_moe("model.layers.*.mlp", experts=4, top_k=2)


def llama() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mixtral(**other: Any) -> Any:
    config = transformers.MixtralConfig(
        **{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **other}, experts_implementation="eager"
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    return model


def probe(reference: nn.Module) -> surgery.Probe:
    def run(module: nn.Module, x: Any) -> torch.Tensor:
        return module(x).logits

    return surgery.Probe(
        reference,
        run,
        run,
        lambda seed: torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed)),
    )


def test_a_llama_becomes_a_mixtral(tmp_path: Path) -> None:
    source, target = llama(), mixtral()
    report = surgery.graft(source.state_dict(), target, probe=probe(source), rules=[RULE], require="proven")
    theirs, ours = source.state_dict(), target.state_dict()
    for layer in range(2):
        at = f"model.layers.{layer}.mlp"
        fused = torch.cat((theirs[f"{at}.gate_proj.weight"], theirs[f"{at}.up_proj.weight"]))
        assert all(torch.equal(expert, fused) for expert in ours[f"{at}.experts.gate_up_proj"])
        assert all(torch.equal(e, theirs[f"{at}.down_proj.weight"]) for e in ours[f"{at}.experts.down_proj"])
        row = report.plan[f"{at}.gate.weight"]
        assert (str(row.status), str(row.expr)) == ("synthesised", f"normal(shape=(4, 16), std=0.02, seed={layer})")
    assert not torch.equal(ours["model.layers.0.mlp.gate.weight"], ours["model.layers.1.mlp.gate.weight"])
    with torch.no_grad():
        ids = torch.arange(12).reshape(2, 6)
        torch.testing.assert_close(target(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-5)
    assert report.plan.rules == (str(RULE),)
    assert any("2 routers of 4 experts drawn" in note for note in report.plan.notes)
    # what a router holds changes nothing, and is not called proven
    assert report.proof is not None
    assert [said.split(":")[0] for said in report.proof.not_exercised] == [
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    ]
    report.plan.save(tmp_path / "plan.toml")
    plan = surgery.Plan.load(tmp_path / "plan.toml")
    out = load_file(surgery.write(source.state_dict(), plan, tmp_path / "out.safetensors"))
    assert all(torch.equal(out[name], value) for name, value in ours.items())
    # the kernels that transformers has for experts
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        target.set_experts_implementation(implementation)
        passes = ("cpu/float32",) if implementation == "grouped_mm" else ()
        assert surgery.verify(source.state_dict(), target, plan, probe=probe(source), passes=passes).verdict == "proven"


def test_gates_that_do_not_sum_to_one_are_another_function() -> None:
    source = llama()
    rule = rules.dense_to_moe("model.layers.*.mlp", experts=4, top_k=2, normalise=False)
    with pytest.raises(surgery.GraftError, match="refuted"):
        surgery.graft(source.state_dict(), mixtral(), probe=probe(source), rules=[rule])


class Switch(nn.Module):
    """Each token to one expert, which counts as much as the router is sure of it."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            transformers.models.llama.modeling_llama.LlamaMLP(transformers.LlamaConfig(**SIZES)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        sure, which = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            at = torch.nonzero(which == number).flatten()
            out = out.index_add(0, at, expert(tokens[at]) * sure[at, None])
        return out.reshape(x.shape)


def test_experts_that_are_another_function_are_adapted() -> None:
    source, target = llama(), llama()
    for layer in target.model.layers:  # type: ignore[union-attr]
        layer.mlp = Switch(16, 3)  # type: ignore[union-attr]
    rule = rules.dense_to_moe("model.layers.*.mlp", experts=3, top_k=1, normalise=False)
    report = surgery.graft(source.state_dict(), target.eval(), probe=probe(source), rules=[rule])
    assert report.verdict == "adapted"
    assert report.proof is not None
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in report.proof.adapted
    assert "model.layers.0.self_attn.q_proj.weight" not in report.proof.adapted


def test_a_difference_elsewhere_is_refuted() -> None:
    source = llama()
    with pytest.raises(surgery.GraftError, match="input_layernorm"):
        surgery.graft(source.state_dict(), mixtral(rms_norm_eps=1e-6), probe=probe(source), rules=[RULE])


@pytest.mark.parametrize(
    ("where", "given", "said"),
    [
        ("model.layers.*.mpl", {"experts": 4}, "the model has no module model.layers.*.mpl"),
        ("model.layers.*.mlp", {"experts": 2, "top_k": 3}, "top_k=3 of 2 experts cannot be"),
        ("model.layers.*.self_attn", {"experts": 2}, "arguments"),
        ("model.rotary_emb", {"experts": 2}, "arguments"),
        ("model.layers.*", {"experts": 2}, "arguments"),
    ],
)
def test_what_cannot_be_is_refused(where: str, given: dict[str, int], said: str) -> None:
    source = llama()
    rule = rules.dense_to_moe(where, **given)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.graft(source.state_dict(), mixtral(), probe=probe(source), rules=[rule])
    assert said in str(caught.value)
    assert caught.value.hint


def test_the_rule_is_checked_and_reads_back() -> None:
    with pytest.raises(rules.RuleError, match="experts=0 cannot be"):
        rules.dense_to_moe("h.*.mlp", experts=0)
    with pytest.raises(rules.RuleError, match="top_k='2' cannot be"):
        rules.dense_to_moe("h.*.mlp", experts=2, top_k="2")  # type: ignore[arg-type]
    for rule in (RULE, rules.dense_to_moe("h.*.mlp", experts=8, normalise=False, seed=3)):
        assert rules.parse_rule(str(rule)) == rule
    source = llama()
    with pytest.raises(surgery.SurgeryError, match="what it touches is seen by running"):
        surgery.graft(source.state_dict(), mixtral(), rules=[RULE])
