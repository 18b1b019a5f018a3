"""Where a target is smaller on purpose, the option that asks for that is named; and tokenizers that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_bert
from zoo.cli import main

pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{n}" for n in range(4, 40))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_bert.save(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        (["--set=dim=12"], 1, "12 wide, and the source 16: --shrink makes it narrower"),
        (["--set=depth=1"], 1, "a place for 1 of the 2 blocks of encoder.layer: --layers 0 keeps so many"),
        (["--set=vocab=30"], 2, "word.weight has 30 rows, and the source 40 tokens"),
        (["--set=vocab=3", "--tokenizer=mine.txt"], 2, "the tokenizer has 4 tokens, and word.weight of the target 3"),
        (["--tokenizer=other.txt"], 2, "share none of"),
        (["--tokenizer=empty.txt"], 2, "empty.txt holds no tokens"),
    ],
)
def test_what_to_type_next(
    given: list[str],
    status: int,
    said: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(tiny_bert.MINE)
    Path("mine.txt").write_text("[UNK]\n[CLS]\nword4\nmine\n")
    Path("other.txt").write_text("a\nb\n")
    Path("empty.txt").write_text("\n")
    assert main(["graft", f"file:{source}#encoder", "mine.py", *given]) == status
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("mine.safetensors").exists()


def test_a_plan_of_the_first_blocks_is_no_shallow_target(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is refused in the first of as many blocks as the source has needs no --layers."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(tiny_bert.MINE.replace("F.gelu(", "F.silu(").replace("nn.GELU()", "nn.SiLU()"))
    assert main(["graft", f"file:{source}#encoder", "mine.py"]) == 1
    said = capsys.readouterr()
    assert "--allow-different" in said.err
    assert "--layers" not in said.err


def test_a_table_of_tokens_is_told_from_others_of_its_width(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table with room for more tokens than there are is longer than that of positions, and is not taken for it."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(tiny_bert.MINE)
    Path("mine.txt").write_text("[UNK]\n[CLS]\nword4\nmine\n")
    assert main(["graft", f"file:{source}#encoder", "mine.py", "--set=vocab=30", "--tokenizer=mine.txt"]) == 0
    assert "vocabulary by token: 30 tokens: 3 copied, 27 made" in capsys.readouterr().out
