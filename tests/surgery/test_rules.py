"""Rules: what a person wants otherwise than the source has it; on a tiny BERT of transformers and an own encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import rules
from surgery.derivation import derivation
from surgery.plan import Status
from tests import pairs


def deep_bert(layers: int = 5) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=pairs.VOCAB,
        hidden_size=pairs.WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=pairs.HEADS,
        intermediate_size=pairs.FFN,
        max_position_embeddings=pairs.PLACES,
    )
    return pairs.shaken(BertModel(config)).eval()


def encoder(layers: int = 2) -> nn.Module:
    torch.manual_seed(9)
    made = pairs.Encoder()
    made.blocks = nn.ModuleList(
        pairs.Block(1e-12, "none", "post", heads=pairs.HEADS, masked=True, scaled=True) for _ in range(layers)
    )
    return made.eval()


# -- layers -----------------------------------------------------------------------------------------------------------
def test_the_layers_that_are_kept_are_proven_as_a_model_of_their_own() -> None:
    bert, mine = deep_bert(), encoder(3)
    source = bert.state_dict()
    report = surgery.graft(
        source, mine, probe=pairs.probe(bert, surface=True), rules=[rules.select_layers([0, 2, 4])], require="proven"
    )
    assert report.plan["blocks.1.norm1.weight"].sources == ("encoder.layer.2.attention.output.LayerNorm.weight",)
    assert "of the 5 blocks of encoder.layer those numbered 0, 2, 4 are kept, as asked for" in report.plan.notes
    dropped = {drop.source: drop.reason for drop in report.plan.dropped}
    assert dropped["encoder.layer.1.output.dense.bias"] == "block 1 of encoder.layer is left out, as asked for"
    report.plan.check(surgery.open(source), _infos(mine))
    # against transformers itself, its own list of layers cut by hand
    bert.encoder.layer = nn.ModuleList([bert.encoder.layer[i] for i in (0, 2, 4)])  # type: ignore[union-attr,operator,index]
    ids, mask = pairs.inputs(7)
    with torch.no_grad():
        torch.testing.assert_close(mine.encode(ids, mask), pairs.run_bert(bert, (ids, mask)))  # type: ignore[operator]


def _infos(module: nn.Module) -> Any:
    from surgery.graft import infos

    return infos(module)


def test_a_layer_may_stand_twice() -> None:
    bert, mine = deep_bert(3), encoder(4)
    report = surgery.graft(
        bert.state_dict(),
        mine,
        probe=pairs.probe(bert, surface=True),
        rules=[rules.select_layers([0, 1, 1, 2])],
        require="proven",
    )
    assert report.plan["blocks.2.ffn.0.bias"].sources == ("encoder.layer.1.intermediate.dense.bias",)


def test_a_plan_keeps_its_rules_and_is_verified_by_them(tmp_path: Path) -> None:
    bert, mine = deep_bert(), encoder(2)
    probe = pairs.probe(bert, surface=True)
    report = surgery.graft(bert.state_dict(), mine, probe=probe, rules=["select_layers([1, 3])"])
    report.plan.save(tmp_path / "plan.toml")
    loaded = surgery.Plan.load(tmp_path / "plan.toml")
    assert loaded == report.plan
    assert loaded.rules == ("select_layers([1, 3])",)
    assert surgery.verify(bert.state_dict(), mine, loaded, probe=probe).verdict == "proven"
    again = encoder(2)
    assert surgery.graft(bert.state_dict(), again, probe=probe, plan=loaded).verdict == "proven"
    changed = (tmp_path / "plan.toml").read_text().replace("[1, 3]", "[1, 2]")
    (tmp_path / "plan.toml").write_text(changed)
    assert surgery.Plan.load(tmp_path / "plan.toml").verdict == "stale"


def test_layers_that_are_not_there() -> None:
    bert = deep_bert(3)
    with pytest.raises(surgery.SurgeryError, match=r"encoder.layer has 3 blocks, numbered 0 to 2, and 4 is asked for"):
        surgery.plan(bert.state_dict(), encoder(2), rules=[rules.select_layers([0, 4])])
    with pytest.raises(surgery.SurgeryError, match="has no stack of blocks decoder.layer"):
        surgery.plan(bert.state_dict(), encoder(2), rules=[rules.select_layers([0], stack="decoder.layer")])
    with pytest.raises(surgery.SurgeryError, match="numbers of the layers to keep"):
        rules.select_layers([])


def test_a_block_that_holds_what_the_others_do_not_must_be_kept() -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4)
    state = T5EncoderModel(config).state_dict()
    with pytest.raises(surgery.SurgeryError, match="which the others do not have") as caught:
        derivation(surgery.open(state), [rules.select_layers([1, 2])])  # type: ignore[list-item]
    assert "Keep block 0" in caught.value.hint


# -- drop and init ----------------------------------------------------------------------------------------------------
def test_what_is_left_new_on_request_is_named_and_the_rest_is_proven() -> None:
    bert, mine = deep_bert(2), encoder(2)
    before = mine.state_dict()["blocks.1.ffn.0.weight"].clone()
    report = surgery.graft(
        bert.state_dict(),
        mine,
        probe=pairs.probe(bert, surface=True),
        rules=[rules.init("blocks.1.ffn.0.*", why="to be trained anew"), rules.drop("pooler.*", why="mean pooling")],
    )
    assert report.verdict == "adapted"
    row = report.plan["blocks.1.ffn.0.weight"]
    assert row.status is Status.NEW
    assert row.note == "as asked for: to be trained anew"
    assert row.set_aside == ("encoder.layer.1.intermediate.dense.weight",)
    assert torch.equal(mine.state_dict()["blocks.1.ffn.0.weight"], before)
    assert torch.equal(
        mine.state_dict()["blocks.1.ffn.2.weight"], bert.state_dict()["encoder.layer.1.output.dense.weight"]
    )
    dropped = {drop.source: drop.reason for drop in report.plan.dropped}
    assert dropped["pooler.dense.weight"] == "as asked for: mean pooling"
    assert "blocks.1.ffn.0.weight is new: to be trained anew" in dropped["encoder.layer.1.intermediate.dense.weight"]
    assert (
        surgery.verify(bert.state_dict(), mine, report.plan, probe=pairs.probe(bert, surface=True)).verdict == "adapted"
    )


def test_a_dropped_source_leaves_its_target_new() -> None:
    bert, mine = deep_bert(2), encoder(2)
    rule = rules.drop("embeddings.token_type_embeddings.weight", why="one kind of sentence")
    report = surgery.graft(bert.state_dict(), mine, probe=pairs.probe(bert, surface=True), rules=[rule])
    assert report.plan["types.weight"].status is Status.NEW
    assert report.verdict == "adapted"


def test_a_pattern_that_meets_nothing_is_an_error() -> None:
    bert = deep_bert(2)
    for rule, where in (
        (rules.drop("pooling.*", why="x"), "the source has no tensor that pooling"),
        (rules.init("haed.*", why="x"), "the target has no tensor that haed"),
    ):
        with pytest.raises(surgery.SurgeryError, match=where):
            surgery.plan(bert.state_dict(), encoder(2), rules=[rule])


# -- derived tensors --------------------------------------------------------------------------------------------------
def test_a_derived_tensor_is_mapped_and_the_row_says_how_it_was_made() -> None:
    """A BERT of fewer positions is the reference; the source has more."""
    long, short = deep_bert(2), deep_bert(2)
    table = long.state_dict()["embeddings.position_embeddings.weight"]
    more = torch.cat((table, torch.randn(8, pairs.WIDTH)))
    source = {**long.state_dict(), "embeddings.position_embeddings.weight": more}
    index = tuple(range(pairs.PLACES))
    rule = rules.resize("*position_embeddings.weight", "take", index=index)
    mine = encoder(2)
    report = surgery.graft(source, mine, probe=pairs.probe(short, surface=True), rules=[rule], require="proven")
    assert str(report.plan["places.weight"].expr).startswith("take(embeddings.position_embeddings.weight")
    assert torch.equal(mine.state_dict()["places.weight"], table)


# -- files ------------------------------------------------------------------------------------------------------------
def test_a_file_of_rules_reads_back_as_it_is_written(tmp_path: Path) -> None:
    lines = [
        'select_layers([0, 2, 4], stack="encoder.layer")',
        'drop("pooler.*", why="my model pools by mean")',
        'init("head.*", why="other classes")',
        'resize("pos_embed", "take", index=(0, 1), axis=1)',
        'derive("head.weight", "take(classifier.weight, index=(2, 0))")',
    ]
    path = tmp_path / "rules.txt"
    path.write_text("# mine\n\n" + "\n".join(f"{line}  # why not" for line in lines) + "\n")
    assert [str(rule) for rule in rules.read(path)] == lines


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("shrink it", "line 1: not a rule"),
        ("forget('x')", "line 1: no rule is called forget"),
        ("drop('x')", "line 1: drop: missing a required argument: 'why'"),
        ("select_layers(3)", "line 1: select_layers: "),
        ("resize('x', 'vocab_resize', to='3')", "parameter to takes a whole number"),
        ("drop('x', why='')", "gives no reason"),
        ("select_layers([0, -1])", "numbers of the layers"),
        ("__import__('os').system('true')", "not a rule"),
        ("resize('x', 'no_such_op')", "unknown op"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rules.txt"
    path.write_text(line + "\n")
    with pytest.raises(surgery.SurgeryError, match="line 1") as caught:
        rules.read(path)
    assert said in str(caught.value)


# -- narrower ---------------------------------------------------------------------------------------------------------
def test_a_narrower_model_holds_evenly_chosen_units_and_is_proven_as_such(tmp_path: Path) -> None:
    bert = deep_bert(2)

    mine = narrow_encoder()
    rule = rules.shrink(hidden=16, inner=24, heads=2)
    report = surgery.graft(bert.state_dict(), mine, probe=pairs.probe(bert, surface=True), rules=[rule])
    assert report.verdict == "adapted"
    row = report.plan["blocks.0.ffn.0.weight"]
    assert row.sources == ("encoder.layer.0.intermediate.dense.weight",)
    old = bert.state_dict()["encoder.layer.0.intermediate.dense.weight"]
    inner = [round(i * 63 / 23) for i in range(24)]
    assert torch.equal(mine.state_dict()["blocks.0.ffn.0.weight"], old[inner][:, ::2])
    assert any("as asked for: hidden 32 -> 16" in note for note in report.plan.notes)
    report.plan.save(tmp_path / "plan.toml")
    loaded = surgery.Plan.load(tmp_path / "plan.toml")
    assert surgery.verify(bert.state_dict(), mine, loaded, probe=pairs.probe(bert, surface=True)).verdict == "adapted"


def narrow_encoder() -> nn.Module:
    """Half as wide, with half the heads."""
    return sized_encoder(16, 24, 2)


def sized_encoder(width: int, inner: int, heads: int) -> nn.Module:
    kept = pairs.WIDTH, pairs.FFN
    pairs.WIDTH, pairs.FFN = width, inner
    try:
        torch.manual_seed(9)
        return pairs.Encoder(heads=heads).eval()
    finally:
        pairs.WIDTH, pairs.FFN = kept


@pytest.mark.parametrize(
    ("rule", "sizes", "verdict"),
    [
        (rules.widen(inner=96), (32, 96, 4), "proven"),
        (rules.clone_width(times=2), (64, 128, 8), "proven"),
        (rules.widen(hidden=48, heads=6), (48, 64, 6), "adapted"),  # a norm reduces over it
        (rules.widen(hidden=64, heads=8, uniform=True), (64, 64, 8), "proven"),
    ],
    ids=str,
)
def test_a_wider_body_is_the_same_function_where_no_norm_minds(
    rule: rules.Rule, sizes: tuple[int, int, int], verdict: str
) -> None:
    bert, mine = deep_bert(2), sized_encoder(*sizes)
    report = surgery.graft(bert.state_dict(), mine, probe=pairs.probe(bert, surface=True), rules=[rule])
    assert report.verdict == verdict
    (note,) = [note for note in report.plan.notes if note.startswith("as asked for")]
    assert ("preserving" in note) == (verdict == "proven"), note
    if verdict == "proven" and rule != rules.widen(inner=96):
        return  # the hidden vectors are others, though the function of the whole is the same
    if verdict == "proven":
        ids, mask = pairs.inputs(3)
        with torch.no_grad():
            torch.testing.assert_close(mine.encode(ids, mask), pairs.run_bert(bert, (ids, mask)))  # type: ignore[operator]


def test_blocks_that_pass_on_are_refused_behind_a_norm() -> None:
    bert = deep_bert(2)
    rule = rules.insert_identity_blocks("encoder.layer", after=[0])
    with pytest.raises(surgery.SurgeryError):
        surgery.plan(bert.state_dict(), encoder(3), probe=pairs.probe(bert, surface=True), rules=[rule])
    # asked for all the same it is another function, and not called the same
    rule = rules.insert_identity_blocks("encoder.layer", after=[0], approximate=True)
    report = surgery.graft(bert.state_dict(), encoder(3), probe=pairs.probe(bert, surface=True), rules=[rule])
    assert report.verdict == "adapted"
    assert any("approximate; before any training its outputs move by" in note for note in report.plan.notes)


def test_rules_that_leave_nothing_are_refused() -> None:
    bert = deep_bert(2)
    with pytest.raises(rules.RuleError, match="nothing of the source is left"):
        surgery.graft(bert.state_dict(), encoder(2), probe=pairs.probe(bert), rules=[rules.drop("*", why="all")])


def test_a_width_that_is_not_there_and_heads_that_do_not_divide() -> None:
    bert = deep_bert(2)
    probe = pairs.probe(bert, surface=True)
    with pytest.raises(surgery.SurgeryError, match="depth"):
        surgery.plan(bert.state_dict(), narrow_encoder(), probe=probe, rules=[rules.shrink(depth=1)])
    with pytest.raises(surgery.SurgeryError, match="seen by running"):
        surgery.plan(bert.state_dict(), narrow_encoder(), rules=[rules.shrink(hidden=16)])
