"""Targets of other sizes than the checkpoint: what is wanted is found from their shapes, and the rest is proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
import zoo
from tests import tiny_bert
from zoo.sizes import Body, Table


def target(vocabulary: int = 40, longest: int = 24, depth: int = 2) -> nn.Module:
    space: dict[str, Any] = {}
    exec(tiny_bert.MINE, space)
    torch.manual_seed(5)
    made: nn.Module = space["Tagger"](vocab=vocabulary, longest=longest, depth=depth)
    return made.eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert.save(folder)
    return folder


def example() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "mask": torch.ones_like(ids), "kinds": torch.zeros_like(ids)}


# -- text -------------------------------------------------------------------------------------------------------------
def test_a_larger_vocabulary_keeps_the_old_rows_and_draws_the_new_ones(bert: Path) -> None:
    mine = target(vocabulary=57)
    report = zoo.graft(f"file:{bert}#encoder", mine, example=example())
    assert report.verdict == "adapted"
    old = surgery.open(bert).read("embeddings.word_embeddings.weight")
    new = mine.get_parameter("word.weight")
    assert torch.equal(new[:40], old)
    # the rows that transformers' mean_resizing draws lie this close to the mean of the old ones
    torch.testing.assert_close(new[40:], old.mean(0).expand(17, -1), atol=1e-3, rtol=0)
    assert any("vocabulary 40 -> 57; what both sizes take gives the same" in note for note in report.plan.notes)
    (row,) = [row for row in report.rows if row.kind == "approximate"]
    assert (row.name, row.op) == ("word.weight", "vocab_resize")
    assert row.note.startswith("vocabulary 40 -> 57")


def test_longer_positions_are_tiled_and_shorter_ones_cut(bert: Path) -> None:
    old = surgery.open(bert).read("embeddings.position_embeddings.weight")
    longer = target(longest=61)
    assert zoo.graft(f"file:{bert}#encoder", longer, example=example()).verdict == "adapted"
    assert torch.equal(longer.get_parameter("place.weight"), torch.cat((old, old, old[:13])))
    shorter = target(longest=17)
    assert zoo.graft(f"file:{bert}#encoder", shorter, example=example(), require="proven").verdict == "proven"
    assert torch.equal(shorter.get_parameter("place.weight"), old[:17])


def test_two_sizes_at_once_and_a_plan_that_is_verified_again(bert: Path, tmp_path: Path) -> None:
    mine = target(vocabulary=41, longest=60)
    report = zoo.graft(f"file:{bert}#encoder", mine, example=example())
    assert report.verdict == "adapted"
    assert sorted(report.proof.adapted if report.proof else ()) == ["place.weight", "word.weight"]
    report.plan.save(tmp_path / "plan.toml")
    again = target(vocabulary=41, longest=60)
    plan = surgery.Plan.load(tmp_path / "plan.toml")
    assert zoo.graft(f"file:{bert}#encoder", again, example=example(), plan=plan).verdict == "adapted"
    for name, value in mine.state_dict().items():
        if not name.startswith("tag"):
            assert torch.equal(value, again.state_dict()[name]), name
    # what is written from file to file is what the module holds
    part = zoo.open(f"file:{bert}#encoder")
    surgery.write(part, plan, tmp_path / "out.safetensors", base=mine.state_dict())
    written = surgery.open(tmp_path / "out.safetensors")
    assert all(torch.equal(written.read(name), value) for name, value in mine.state_dict().items())


def test_a_smaller_vocabulary_is_not_guessed(bert: Path) -> None:
    with pytest.raises((surgery.GraftError, zoo.ZooError)):
        zoo.graft(f"file:{bert}#encoder", target(vocabulary=30), example=example())


def test_rules_and_sizes_together(bert: Path) -> None:
    mine = target(longest=48, depth=1)
    report = zoo.graft(f"file:{bert}#encoder", mine, example=example(), rules=[surgery.rules.select_layers([1])])
    assert report.verdict == "adapted"
    assert report.plan["layers.0.ln2.bias"].sources == ("encoder.layer.1.output.LayerNorm.bias",)


# -- which sizes ------------------------------------------------------------------------------------------------------
VOCABULARY = Table("vocabulary", 100, ("word", "tok"), more="more")
POSITIONS = Table("positions", 66, ("pos", "place"), spare=2, more="more", fewer="fewer")
TYPES = Table("types", 2, ("type",))


@pytest.mark.parametrize(
    ("theirs", "first"),
    [
        ({"a": 120, "b": 66, "c": 2}, {"vocabulary": 120}),
        ({"a": 120, "b": 64, "c": 2}, {"vocabulary": 120}),  # positions without the rows to spare
        ({"a": 100, "b": 32}, {"positions": 32}),
        ({"a": 120, "b": 70}, {"vocabulary": 120, "positions": 70}),
        ({"word": 110, "pos": 4096}, {"vocabulary": 110, "positions": 4096}),
        ({"a": 100, "b": 66, "c": 2}, None),
        ({"a": 100, "b": 66, "c": 2, "domains": 7}, None),  # a table of their own
        ({"a": 50, "b": 66}, None),
    ],
)
def test_lengths_that_a_target_wants(theirs: Mapping[str, int], first: Mapping[str, int] | None) -> None:
    body = Body({}, {name: (rows, 8) for name, rows in theirs.items()})
    found = list(body.lengths([VOCABULARY, POSITIONS, TYPES], 8))
    assert (found[0] if found else None) == first


def test_a_body_is_read_off_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_size, self.grid, self.name = 4, (2, 3), "net"
            self.pos = nn.Parameter(torch.zeros(1, 7, 8))
            self.conv = nn.Conv2d(3, 8, 4, 4)
            self.words = nn.Embedding(11, 8)

    body = Body.of(Net())
    assert body.words("patch_size", "kernel_size") == [4, (4, 4)]
    assert body.words("grid") == [(2, 3)]
    assert body.rows(8) == {"pos": 7, "words.weight": 11}
    assert body.shapes["conv.weight"] == (8, 3, 4, 4)


def test_a_plugin_whose_sizes_are_no_sizes(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Callable[..., Any] = lambda *_: 3  # noqa: E731
    monkeypatch.setattr("zoo_text.sizes.bert", wrong)
    with pytest.raises(zoo.ZooError, match=r"zoo_text.sizes:bert gave a int, and not zoo.Sizes"):
        zoo.graft(f"file:{bert}#encoder", target(), example=example())


# -- tokens and labels by name ----------------------------------------------------------------------------------------
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(35))]


@pytest.fixture(scope="module")
def with_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny_bert.save(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def test_rows_by_token_where_a_tokenizer_is_given(with_words: Path, tmp_path: Path) -> None:
    mine = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "word7", "word3", "new", "word30"]
    (tmp_path / "vocab.txt").write_text("\n".join(mine) + "\n")
    model = target(vocabulary=8)
    ids = {"ids": torch.tensor([[2, 4, 5, 6, 7, 3]]), "mask": torch.ones(1, 6), "kinds": torch.zeros(1, 6).long()}
    report = zoo.graft(f"file:{with_words}#encoder", model, example=ids, tokenizer=tmp_path / "vocab.txt")
    assert report.verdict == "adapted"
    old, new = surgery.open(with_words).read("embeddings.word_embeddings.weight"), model.get_parameter("word.weight")
    for token in (name for name in mine if name in WORDS):
        assert torch.equal(new[mine.index(token)], old[WORDS.index(token)]), token
    assert any("vocabulary by token: 8 tokens: 7 copied" in note for note in report.plan.notes)
    report.plan.save(tmp_path / "plan.toml")
    again = target(vocabulary=8)
    plan = surgery.Plan.load(tmp_path / "plan.toml")
    assert zoo.graft(f"file:{with_words}#encoder", again, example=ids, plan=plan).verdict == "adapted"
    assert torch.equal(again.get_parameter("word.weight"), new)


def test_the_same_number_of_other_tokens_is_no_plain_copy(with_words: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(reversed(WORDS)) + "\n")
    model = target()
    report = zoo.graft(f"file:{with_words}#encoder", model, example=example(), tokenizer=tmp_path / "vocab.txt")
    assert report.verdict == "adapted"
    old = surgery.open(with_words).read("embeddings.word_embeddings.weight")
    assert torch.equal(model.get_parameter("word.weight"), old.flip(0))


def test_a_tokenizer_for_what_has_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(zoo.ZooError, match="no table of tokens"):
        zoo.graft(f"file:{tmp_path / 'model.safetensors'}", nn.Linear(2, 3), tokenizer=tmp_path / "vocab.txt")


def test_rows_of_a_head_by_the_names_of_classes(tmp_path: Path) -> None:
    import json

    import transformers

    torch.manual_seed(0)
    names = ["anger", "joy", "fear", "love", "sadness"]
    config = transformers.BertConfig(**tiny_bert.SIZES, id2label=dict(enumerate(names)), num_labels=5)
    model = transformers.BertForTokenClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["2"] == "fear"
    mine = target()
    mine.tag = nn.Linear(16, 3)
    mine.classes = ["love", "joy", "fear"]  # type: ignore[assignment]
    report = zoo.graft(f"file:{tmp_path}", mine, example=example(), require="proven")
    assert report.plan["tag.weight"].sources == ("classifier.weight",)
    assert torch.equal(mine.get_parameter("tag.weight"), model.classifier.weight[[3, 1, 2]])
    assert any("labels by name: 3 kept" in note for note in report.plan.notes)

    other = target()
    other.tag = nn.Linear(16, 3)
    other.classes = ["love", "surprise", "fear"]  # type: ignore[assignment]
    report = zoo.graft(f"file:{tmp_path}", other, example=example())
    assert torch.equal(other.get_parameter("tag.bias")[[0, 2]], model.classifier.bias[[3, 2]])
    # of what both know nothing moves, whatever the order
    assert any("what both sizes take gives the same" in note for note in report.plan.notes)
    spelled = target()
    spelled.tag = nn.Linear(16, 2)
    spelled.classes = ["Love", "FEAR"]  # type: ignore[assignment]
    zoo.graft(f"file:{tmp_path}", spelled, example=example(), require="proven")
    assert torch.equal(spelled.get_parameter("tag.weight"), model.classifier.weight[[3, 2]])
    assert any("labels by name: 2 kept, 1 new" in note for note in report.plan.notes)

    unnamed = target()
    unnamed.tag = nn.Linear(16, 3)
    report = zoo.graft(f"file:{tmp_path}", unnamed, example=example())
    assert report.plan["tag.weight"].status == "new"


# -- the command line -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "sets", "said"),
    [
        (["--layers", "1"], ["depth=1"], "of the 2 blocks of encoder.layer those numbered 1 are kept"),
        (["--layers", "encoder.layer:0"], ["depth=1"], "those numbered 0 are kept"),
        (["--shrink"], ["dim=8", "heads=2", "inner=12"], "as asked for: hidden 16 -> 8, heads 4 -> 2"),
        (["--rules", "rules.txt"], [], "as asked for: trained anew"),
        (["--tokenizer", "vocab.txt"], ["vocab=4"], "vocabulary by token: 4 tokens: 3 copied"),
    ],
)
def test_flags_of_the_command_line(
    flags: list[str],
    sets: list[str],
    said: str,
    with_words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from zoo.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(tiny_bert.MINE)
    (tmp_path / "rules.txt").write_text('init("layers.1.down.*", why="trained anew")\n')
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\nword4\nmine\n")
    args = [f"file:{with_words}#encoder", "mine.py", *(f"--set={each}" for each in sets)]
    assert main(["graft", *args, *flags]) == 0, capsys.readouterr().err
    assert said in capsys.readouterr().out
    assert main(["verify", *args]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layers", "one"], "--layers takes numbers with commas between them"),
        (["--layers", "0,5"], "has 2 blocks, numbered 0 to 1, and 5 is asked for"),
        (["--shrink"], "the target is as wide as the source"),
        (["--shrink", "--static"], "--static runs nothing"),
        (["--rules", "none.txt"], "the rules cannot be read"),
        (["--tokenizer", "none.json"], "none.json"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str],
    said: str,
    with_words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from zoo.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(tiny_bert.MINE)
    assert main(["graft", f"file:{with_words}#encoder", "mine.py", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mine.safetensors").exists()
