"""Adapters of PEFT merged by a rule: by the formula, by PEFT itself where it is installed, and taken out again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import rules
from surgery.beside import joined
from surgery.derivation import derivation
from tests import pairs
from tests.surgery.test_convert import bare_bert

transformers = pytest.importorskip("transformers")

TARGETS = ("attention.self.query", "attention.self.value", "output.dense")


def adapter(folder: Path, modules: Mapping[str, nn.Module], *, rank: int = 2, seed: int = 5, **config: Any) -> Path:
    """As PEFT's save_pretrained lays it out, for these modules by their names."""
    folder.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        out, into = module.weight.shape
        if type(module).__name__ == "Conv1D":
            out, into = into, out
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, into, generator=g)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank, generator=g) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "fan_in_fan_out": False, "use_rslora": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def targets(bert: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in bert.named_modules() if name.endswith(TARGETS) and isinstance(m, nn.Linear)}


def by_formula(state: Mapping[str, Tensor], folder: Path, scale: float) -> dict[str, Tensor]:
    held = load_file(folder / "adapter_model.safetensors")
    new = dict(state)
    for name in held:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = held[name.replace("lora_A", "lora_B")].double() @ held[name].double() * scale
            weight = new[f"{module}.weight"].double()
            new[f"{module}.weight"] = (weight + (delta if weight.shape == delta.shape else delta.t())).float()
    return new


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4 / math.sqrt(2))])
def test_an_adapter_is_merged_before_anything_is_mapped(rslora: bool, scale: float, tmp_path: Path) -> None:
    bert, mine = bare_bert(), pairs.Encoder().eval()
    folder = adapter(tmp_path / "adapter", targets(bert), use_rslora=rslora)
    rule = rules.merge_lora(folder)
    report = surgery.graft(bert.state_dict(), mine, probe=pairs.probe(bert), rules=[rule], require="proven")
    whole = by_formula(bert.state_dict(), folder, scale)
    row = report.plan["blocks.0.ffn.2.weight"]
    name = "encoder.layer.0.output.dense"
    assert row.sources == (f"{name}.weight", f"lora:{name}.lora_B.weight", f"lora:{name}.lora_A.weight")
    assert f"scale={scale}" in str(row.expr)
    assert report.plan.rules == (f"merge_lora({json.dumps(str(folder))})",)
    torch.testing.assert_close(
        mine.state_dict()["blocks.0.ffn.2.weight"], whole[f"{name}.weight"], rtol=1e-6, atol=1e-7
    )
    # and the function is that of the model with its merged weights
    merged = bare_bert()
    merged.load_state_dict(whole)
    x = pairs.inputs(11)
    with torch.no_grad():
        torch.testing.assert_close(mine.encode(*x), pairs.run_bert(merged, x), rtol=1e-5, atol=1e-5)
    # a reference that holds the merged weights already is as good
    exact = bare_bert()
    exact.load_state_dict(dict(merged_state(bert.state_dict(), rule)))
    again = surgery.graft(bert.state_dict(), pairs.Encoder(), probe=pairs.probe(exact), rules=[rule])
    assert again.verdict == "proven"
    # verified, saved, and run from file to file, by the plan alone
    report.plan.save(tmp_path / "plan.toml")
    plan = surgery.Plan.load(tmp_path / "plan.toml")
    assert surgery.verify(bert.state_dict(), mine, plan, probe=pairs.probe(bert)).verdict == "proven"
    out = surgery.write(bert.state_dict(), plan, tmp_path / "out.safetensors", base=mine.state_dict())
    assert all(torch.equal(t, mine.state_dict()[n]) for n, t in load_file(out).items())


def test_the_accounting_holds_for_the_adapter(tmp_path: Path) -> None:
    bert = bare_bert()
    folder = adapter(tmp_path / "adapter", targets(bert))
    rule = rules.merge_lora(folder)
    plan = surgery.plan(bert.state_dict(), pairs.Encoder(), probe=pairs.probe(bert), rules=[rule])
    source = joined(surgery.open(bert.state_dict()), [rule])
    used = {n for n in source if n.startswith("lora:")} & set(plan.used)
    assert len(used) == 2 * len(targets(bert))
    assert f"the adapter {folder} is merged into {len(targets(bert))} tensors, as asked for" in plan.notes
    with pytest.raises(surgery.PlanError, match="the source has no tensor lora:"):
        plan.check(surgery.open(bert.state_dict()), surgery.open(pairs.Encoder().state_dict()))
    kept = rules.select_layers([1])
    shallow = pairs.Encoder()
    shallow.blocks = shallow.blocks[:1]
    plan = surgery.plan(bert.state_dict(), shallow, probe=pairs.probe(bert), rules=[kept, rule])
    plan.check(source, {row.target: surgery.open(shallow.state_dict())[row.target] for row in plan.rows})
    assert "lora:encoder.layer.1.output.dense.lora_A.weight" in plan["blocks.0.ffn.2.weight"].sources
    assert any(drop.source == "lora:encoder.layer.0.output.dense.lora_A.weight" for drop in plan.dropped)


def test_taken_out_again_within_rounding(tmp_path: Path) -> None:
    bert = bare_bert()
    state = bert.state_dict()
    rule = rules.merge_lora(adapter(tmp_path / "adapter", targets(bert)))
    plan = surgery.plan(state, pairs.Encoder(), probe=pairs.probe(bert), rules=[rule])
    source = joined(surgery.open(state), [rule])
    with pytest.raises(surgery.PlanError, match="is made by lora_merge, which is preserving"):
        plan.inverted(source)
    back = plan.inverted(source, rounding=True)
    assert "within rounding, not bit for bit" in back.notes[-1]
    assert "lora_unmerge(" in str(back["encoder.layer.0.output.dense.weight"].expr)
    out = surgery.write(state, plan, tmp_path / "out.safetensors", base=pairs.Encoder().state_dict())
    again = load_file(surgery.write(out, back, tmp_path / "again.safetensors"))
    assert set(again) == set(state)
    changed = {f"{name}.weight" for name in targets(bert)}
    for name, t in state.items():
        if name in changed:
            torch.testing.assert_close(again[name], t, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(again[name], t)


def merged_state(state: Mapping[str, Tensor], *given: rules.Rule) -> dict[str, Tensor]:
    """The source as the rules make it."""
    from surgery.derived import derive

    source = joined(surgery.open(state), given)
    made = derive(source, derivation(source, given).rows)
    return {name: made.read(name) for name in made}


@pytest.mark.parametrize("case", ["linear", "conv1d", "embedding", "patterns", "whole", "prefix"])
def test_agrees_with_peft(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    given: dict[str, Any] = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
    if case == "conv1d":
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
        model = transformers.GPT2Model(config)
        given |= {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}
    else:
        model = bare_bert()
        given |= {"target_modules": ["query", "word_embeddings"] if case == "embedding" else ["query", "dense"]}
        if case == "patterns":
            given |= {"rank_pattern": {"layer.0.attention.self.query": 3}, "alpha_pattern": {"output.dense": 5}}
        if case == "whole":
            given |= {"modules_to_save": ["token_type_embeddings"], "bias": "all"}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    trained = peft.get_peft_model(model, peft.LoraConfig(**given))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    theirs = trained.merge_and_unload().state_dict()
    source = {f"bert.{name}": t for name, t in state.items()} if case == "prefix" else state
    mine = merged_state(source, rules.merge_lora(tmp_path / "adapter"))
    assert any(not torch.equal(theirs[name], state[name]) for name in state)
    for name, t in theirs.items():
        torch.testing.assert_close(mine[f"bert.{name}" if case == "prefix" else name], t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_weight_goes_by_the_flag_and_others_by_their_shape(flag: bool, tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    tall, square = Conv1D(6, 4), Conv1D(4, 4)
    folder = adapter(tmp_path / "adapter", {"tall": tall, "square": square}, fan_in_fan_out=flag)
    state = {"tall.weight": tall.weight.detach(), "square.weight": square.weight.detach()}
    new = merged_state(state, rules.merge_lora(folder))
    held = load_file(folder / "adapter_model.safetensors")

    def delta(name: str) -> Tensor:
        b, a = (held[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        return 2 * b @ a

    torch.testing.assert_close(new["tall.weight"], state["tall.weight"] + delta("tall").t())
    turned = delta("square").t() if flag else delta("square")
    torch.testing.assert_close(new["square.weight"], state["square.weight"] + turned)


def test_two_adapters_have_two_names(tmp_path: Path) -> None:
    bert = bare_bert()
    one = adapter(tmp_path / "one", targets(bert))
    two = adapter(tmp_path / "two", targets(bert), seed=6)
    state = bert.state_dict()
    new = merged_state(state, rules.merge_lora(one), rules.merge_lora(two, name="style"))
    wanted = by_formula(by_formula(state, one, 2.0), two, 2.0)
    for name, t in wanted.items():
        torch.testing.assert_close(new[name], t, rtol=1e-5, atol=1e-6)
    with pytest.raises(surgery.SurgeryError, match="two adapters are called lora"):
        merged_state(state, rules.merge_lora(one), rules.merge_lora(two))


def test_a_file_of_rules_reads_back(tmp_path: Path) -> None:
    lines = ['merge_lora("adapter/")', 'merge_lora("other", name="style")']
    (tmp_path / "rules.txt").write_text("\n".join(lines))
    assert [str(rule) for rule in rules.read(tmp_path / "rules.txt")] == lines
    with pytest.raises(surgery.SurgeryError, match="cannot name an adapter"):
        rules.merge_lora("x", name="a b")


@pytest.mark.parametrize(
    ("config", "break_it", "said"),
    [
        ({"use_dora": True}, "", "is a DoRA adapter"),
        ({"peft_type": "IA3"}, "", "holds IA3, and not LoRA"),
        ({"r": 3}, "", "has a rank of 2, and adapter_config.json says 3"),
        ({"lora_alpha": "many"}, "", "and no number"),
        ({}, "config", "is no adapter: it needs adapter_model.safetensors and adapter_config.json"),
        ({}, "json", "cannot be read"),
        ({}, "half", "what cannot be merged: x"),
        ({}, "magnitude", "what cannot be merged: x.lora_magnitude_vector"),
        ({}, "other", "1 of the 1 tensors that the adapter changes are not in the source: y.weight"),
        ({}, "shape", "B @ A of x is 5x3, and its weight 5x4"),
        ({}, "empty", "no pair of lora_A and lora_B"),
    ],
)
def test_what_cannot_be_merged_is_refused(config: dict[str, Any], break_it: str, said: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {"x": nn.Linear(4, 5)}, **config)
    weights = folder / "adapter_model.safetensors"
    held = load_file(weights)
    a, b = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
    if break_it == "config":
        (folder / "adapter_config.json").unlink()
    elif break_it == "json":
        (folder / "adapter_config.json").write_text("{")
    elif break_it == "half":
        del held[b]
    elif break_it == "magnitude":
        held["base_model.model.x.lora_magnitude_vector"] = torch.ones(5)
    elif break_it == "other":
        held = {name.replace(".x.", ".y."): t for name, t in held.items()}
    elif break_it == "shape":
        held[a] = held[a][:, :3].clone()
    elif break_it == "empty":
        held = {"base_model.model.x.weight": torch.ones(5, 4)}
    save_file(held, weights)
    with pytest.raises(surgery.SurgeryError) as caught:
        merged_state({"x.weight": torch.ones(5, 4)}, rules.merge_lora(folder))
    assert said in str(caught.value)
    if said != "and no number":
        assert caught.value.hint
