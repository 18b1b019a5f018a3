"""A vocabulary from a donor, by the rule alone: which rows are copied, made and drawn, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery import rules
from surgery.beside import joined
from surgery.derivation import Derivation, derivation
from surgery.derived import derive
from surgery.vocabulary import token_map
from tests.vocabularies import COMMON, RARE, saved, trained

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def llama(vocabulary: int, width: int, *, tied: bool) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of pieces with a head of its own, a wider donor of bytes, and an own tokenizer of word pieces."""
    folder = tmp_path_factory.mktemp("models")
    pieces = trained("unigram", COMMON * 20, 70)
    saved(llama(pieces.get_vocab_size() + 3, 8, tied=False), pieces, folder / "source")
    of_bytes = trained("bytes", COMMON + RARE, 300)
    saved(llama(of_bytes.get_vocab_size(), 12, tied=False), of_bytes, folder / "donor")
    saved(llama(of_bytes.get_vocab_size(), 12, tied=True), of_bytes, folder / "tied")
    trained("wordpiece", COMMON + RARE, 160).save(str(folder / "mine.json"))
    return folder


def made(
    models: Path, rule: rules.Rule, source: Any = None, *more: rules.Rule
) -> tuple[surgery.Checkpoint, Derivation]:
    base = joined(surgery.open(models / "source" if source is None else source), [rule])
    found = derivation(base, [rule, *more])
    return derive(base, found.rows), found


def test_rows_are_copied_made_and_drawn(models: Path) -> None:
    rule = rules.transplant_vocabulary(models / "mine.json", donor=models / "donor", k=5)
    new, found = made(models, rule)
    old = load_file(models / "source" / "model.safetensors")
    own = token_map(models / "source", models / "mine.json").old
    theirs = token_map(models / "donor", models / "mine.json").old
    copied = [n for n, row in enumerate(own) if row >= 0]
    by_pursuit = [n for n, row in enumerate(own) if row < 0 <= theirs[n]]
    unknown = [n for n, row in enumerate(own) if row < 0 and theirs[n] < 0]
    assert min(len(copied), len(by_pursuit), len(unknown)) > 1
    for name, of in (("model.embed_tokens.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
        value = new.read(name)
        assert value.shape == (len(own), 8)
        assert torch.equal(value[copied], old[name][[own[n] for n in copied]])
        text = str(found.rows[name])
        assert text.startswith(f"vocab_transplant_omp({name}, donor:{of}, rows=")
        drawn = value[unknown]
        torch.testing.assert_close(drawn, old[name].mean(0).expand_as(drawn), rtol=0, atol=1e-3)
        apart = (value[by_pursuit] - old[name].mean(0)).abs().amax(1)
        assert bool((apart > 1e-2).all())
    counts = f"{len(copied)} copied", f"{len(by_pursuit)} made by OMP", f"{len(unknown)} unknown to both (mean)"
    assert all(count in found.notes[0] for count in counts), found.notes
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(new.read(untouched), old[untouched])


def test_a_donor_with_a_tied_head_gives_both_from_its_table(models: Path) -> None:
    rule = rules.transplant_vocabulary(models / "mine.json", donor=models / "tied")
    _, found = made(models, rule)
    assert "donor:model.embed_tokens.weight" in str(found.rows["lm_head.weight"])
    assert "(k = " in found.notes[0]  # fewer than 64 are shared


def test_without_a_donor_all_unknown_rows_are_drawn(models: Path) -> None:
    rule = rules.transplant_vocabulary(models / "mine.json", seed=4)
    _, found = made(models, rule)
    assert str(found.rows["lm_head.weight"]).startswith("vocab_map(lm_head.weight, rows=")
    assert str(found.rows["lm_head.weight"]).endswith("seed=4)")
    assert found.notes[0].startswith("vocabulary by token: ")


def test_a_plan_by_the_rule_is_written_from_file_to_file(models: Path, tmp_path: Path) -> None:
    rule = rules.transplant_vocabulary(models / "mine.json", donor=models / "donor", k=5)
    new, _ = made(models, rule)
    count = new["lm_head.weight"].shape[0]
    target, reference = llama(count, 8, tied=False), llama(count, 8, tied=False).eval()
    reference.load_state_dict({name: new.read(name) for name in new})
    probe = surgery.Probe(
        reference,
        lambda module, x: module(x).logits,
        lambda module, x: module(x).logits,
        lambda seed: torch.randint(0, count, (2, 7), generator=torch.Generator().manual_seed(seed)),
    )
    report = surgery.graft(models / "source", target.eval(), probe=probe, rules=[rule])
    assert report.verdict == "adapted"
    assert report.plan.rules == (str(rule),)
    report.plan.save(tmp_path / "plan.toml")
    plan = surgery.Plan.load(tmp_path / "plan.toml")
    assert surgery.verify(models / "source", target, plan, probe=probe).verdict == "adapted"
    out = load_file(surgery.write(models / "source", plan, tmp_path / "out.safetensors"))
    assert all(torch.equal(out[name], value) for name, value in target.state_dict().items())
    assert {drop.source for drop in plan.dropped} <= {"donor:lm_head.weight"}


@pytest.mark.parametrize(
    "rule",
    [
        rules.transplant_vocabulary("a.json", donor="other/model"),
        rules.transplant_vocabulary(donor="bert", k=8, rows=70, seed=1, name="b"),
        rules.transplant_vocabulary("a.json", tables=["x.weight", "y"], donor_tables=["e", "h"], source_tokenizer="t/"),
    ],
)
def test_the_rule_reads_back(rule: rules.Rule) -> None:
    assert rules.parse_rule(str(rule)) == rule


def test_what_cannot_be_is_refused(models: Path, tmp_path: Path) -> None:
    def refused(said: str, source: Any = None, *more: rules.Rule, **given: Any) -> None:
        rule = rules.transplant_vocabulary(models / "mine.json", **given)
        with pytest.raises(surgery.SurgeryError) as caught:
            made(models, rule, source, *more)
        assert said in str(caught.value)
        assert caught.value.hint

    state = load_file(models / "source" / "model.safetensors")
    refused("no tokenizer lies beside the source's weights", state, donor=models / "donor")
    refused("there is no donor nowhere", donor="nowhere")
    refused("no table of numbers that ?.none matches", donor=models / "donor", donor_tables=["?.none"])
    refused("tables of several lengths", donor=models / "donor", tables=["*.weight"])
    refused("two rules give the source another vocabulary", None, rules.transplant_vocabulary(models / "mine.json"))
    odd = {"thing": state["lm_head.weight"]}
    refused("no table of tokens that can be told by its name", odd, source_tokenizer=models / "source")
    short = {"wte.weight": state["lm_head.weight"][:9]}
    refused("wte.weight has 9 rows, and its tokenizer", short, source_tokenizer=models / "source")
    with pytest.raises(rules.RuleError, match="neither a tokenizer nor a donor"):
        rules.transplant_vocabulary()
    with pytest.raises(rules.RuleError, match="k=0 cannot be"):
        rules.transplant_vocabulary("a", k=0)
    # said by name, anything goes
    rule = rules.transplant_vocabulary(models / "mine.json", tables=["thing"], source_tokenizer=models / "source")
    assert str(made(models, rule, odd)[1].rows["thing"]).startswith("vocab_map(thing")
