"""A vocabulary from a donor, on the command line: own tokenizers, real models, from file to file, and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.vocabulary import token_map
from tests import tiny_bert
from tests.vocabularies import COMMON, RARE, saved, trained
from tests.zoo.conftest import Done, calling

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

Run = Callable[..., Done]
WORD = "embeddings.word_embeddings.weight"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    return calling(capsys)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A BERT that read the common texts, a wider GPT-2 that read all; and how many tokens the own tokenizer has."""
    source = trained("wordpiece", COMMON, 60)
    config = transformers.BertConfig(**{**tiny_bert.SIZES, "vocab_size": source.get_vocab_size()})
    saved(transformers.BertModel(config, add_pooling_layer=False), source, tmp_path / "source")
    donor = trained("bytes", COMMON + RARE, 400)
    wide = transformers.GPT2Config(
        n_embd=24, n_layer=1, n_head=2, n_positions=16, vocab_size=donor.get_vocab_size(), bos_token_id=0
    )
    saved(transformers.GPT2LMHeadModel(wide), donor, tmp_path / "donor")
    mine = trained("words", [*COMMON, *RARE, "zygote"], 90)
    mine.save(str(tmp_path / "mine.json"))
    (tmp_path / "mine.py").write_text(tiny_bert.MINE)
    count: int = mine.get_vocab_size()
    return count


def test_a_donor_on_the_command_line(run: Run, models: int) -> None:
    sets = (f"--set=vocab={models}",)
    given = ("--tokenizer", "mine.json", "--donor", "file:donor")
    done = run("graft", "file:source#encoder", "mine.py", *sets, *given)
    assert done.status == 0, done.err
    own, theirs = token_map("source", "mine.json").old, token_map("donor", "mine.json").old
    both = list(zip(own, theirs, strict=True))
    made = sum(a < 0 <= b for a, b in both)
    unknown = sum(a < 0 and b < 0 for a, b in both)
    assert made > 3
    assert unknown > 0
    told = " ".join(done.out.split())
    assert f"{models} tokens: {models - made - unknown} copied" in told
    assert f"{made} made by OMP from file:donor" in told
    assert f"{unknown} unknown to both (mean)" in told
    assert "adapted: the same function" in told
    plan = surgery.Plan.load("mine.graft.toml")
    assert plan.rules == ('transplant_vocabulary("mine.json", donor="file:donor")',)
    row = plan["word.weight"]
    assert row.sources == (WORD, "donor:transformer.wte.weight")
    assert str(row.expr).startswith(f"vocab_transplant_omp({WORD}, donor:transformer.wte.weight, rows=")
    # rows: copied as they are; made as the op's rule makes them from the donor's own
    new, old = load_file("mine.safetensors")["word.weight"], load_file("source/model.safetensors")[WORD]
    space = load_file("donor/model.safetensors")["transformer.wte.weight"]
    for at, (a, b) in enumerate(both):
        if a >= 0:
            assert torch.equal(new[at], old[a])
        elif b >= 0:
            atoms = [(x, y) for x, y in both if x >= 0 and y >= 0]
            basis = space[[y for _, y in atoms]].double()
            if len(atoms) <= space.shape[1]:  # all atoms are taken: least squares
                weights = torch.linalg.lstsq(basis.T, space[b].double().unsqueeze(1)).solution.squeeze(1)
                torch.testing.assert_close(
                    new[at], (weights @ old[[x for x, _ in atoms]].double()).float(), rtol=1e-3, atol=1e-4
                )
    assert run("verify", "file:source#encoder", "mine.py", *sets).status == 0
    # from file to file, searched and by the plan alone, to the same bytes
    done = run("graft", "file:source#encoder", "mine.py", *sets, *given, "--to-file", "-o", "files.safetensors")
    assert done.status == 0, done.err
    plans = ("--plan", "mine.graft.toml")
    done = run("graft", "file:source#encoder", "mine.py", *sets, *plans, "--to-file", "-o", "given.safetensors")
    assert done.status == 0, done.err
    done = run("graft", "file:source#encoder", "mine.py", *sets, *plans, "-o", "again.safetensors", "--json")
    assert (done.status, done.json["verdict"]) == (0, "adapted"), done.err
    first = Path("mine.safetensors").read_bytes()
    assert all(Path(f"{name}.safetensors").read_bytes() == first for name in ("files", "given", "again"))
    done = run("verify", "file:source#encoder", "mine.py", *sets, "--weights", "files.safetensors", "--html", "r.html")
    assert done.status == 0, done.err


def test_by_rule_and_the_donors_own_tokenizer(run: Run, models: int) -> None:
    count = transformers.GPT2Config.from_pretrained("donor").vocab_size
    Path("rules.txt").write_text('transplant_vocabulary(donor="donor", k=8)\n')
    args = ("file:source#encoder", "mine.py", f"--set=vocab={count + 3}")  # a table with room
    done = run("graft", *args, "--rules", "rules.txt", "--json")
    assert (done.status, done.json["verdict"]) == (0, "adapted"), done.err
    plan = surgery.Plan.load("mine.graft.toml")
    assert plan.rules == (f'transplant_vocabulary(donor="donor", k=8, rows={count + 3})',)
    assert "k=8" in str(plan["word.weight"].expr)
    assert run("verify", *args).status == 0


def test_a_head_follows_with_its_bias(run: Run, models: int, tmp_path: Path) -> None:
    """An untied head takes the donor's head where it has one, a tied one follows the embedding."""
    source = trained("wordpiece", COMMON, 60)
    config = transformers.BertConfig(**{**tiny_bert.SIZES, "vocab_size": source.get_vocab_size()})
    saved(transformers.BertForMaskedLM(config), source, tmp_path / "lm")
    mine = (
        tiny_bert.MINE
        + """

class Speaker(Tagger):
    def __init__(self, vocab, tied=True):
        super().__init__(vocab=vocab)
        del self.tag
        self.dense, self.norm = nn.Linear(16, 16), nn.LayerNorm(16, eps=1e-12)
        self.out = nn.Linear(16, vocab)
        if tied:
            self.out.weight = self.word.weight

    def forward(self, ids, mask, kinds):
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.ln(self.word(ids) + self.place(place) + self.kind(kinds))
        for layer in self.layers:
            x = layer(x, mask)
        return self.out(self.norm(F.gelu(self.dense(x))))
"""
    )
    Path("speaker.py").write_text(mine)
    given = ("--tokenizer", "mine.json", "--donor", "file:donor", f"--set=vocab={models}")
    done = run("graft", "file:lm", "speaker.py:Speaker", *given, "--json")
    assert (done.status, done.json["verdict"]) == (0, "adapted"), done.err
    plan = surgery.Plan.load("speaker.graft.toml")
    assert {plan["word.weight"].tied_to, plan["out.weight"].tied_to} & {"word.weight", "out.weight"}
    assert str(plan["out.bias"].expr).startswith("vocab_map(")
    assert run("verify", "file:lm", "speaker.py:Speaker", f"--set=vocab={models}").status == 0


@pytest.mark.parametrize(
    ("case", "status", "said"),
    [
        ("no tokenizer", 2, "the donor has no tokenizer beside its weights"),
        ("nothing shared", 2, "share none of the"),
        ("closed", 1, "no weights are public"),
        ("unknown", 2, "nowhere"),
        ("no table", 2, "has no table of tokens that can be told by its name"),
        ("other tokenizer", 2, "its tokenizer"),
    ],
)
def test_donors_that_cannot_be(case: str, status: int, said: str, run: Run, models: int) -> None:
    donor = {"closed": "gpt-4", "unknown": "nowhere"}.get(case, "file:donor")
    if case == "no tokenizer":
        Path("donor/tokenizer.json").unlink()
    elif case == "nothing shared":
        Path("donor/tokenizer.json").unlink()
        Path("donor/vocab.json").write_text(json.dumps({f"‡{n}": n for n in range(300)}))
    elif case in ("no table", "other tokenizer"):
        rows = 5 if case == "other tokenizer" else 400
        from safetensors.torch import save_file

        Path("donor/config.json").unlink()
        name = "thing.weight" if case == "no table" else "wte.weight"
        save_file({name: torch.randn(rows, 4)}, "donor/model.safetensors", metadata={"format": "pt"})
    args = ("file:source#encoder", "mine.py", f"--set=vocab={models}")
    done = run("graft", *args, "--tokenizer", "mine.json", "--donor", donor)
    assert done.status == status, done.out + done.err
    assert said in " ".join(done.err.split())
    assert not Path("mine.safetensors").exists()
