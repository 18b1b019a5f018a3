"""The plan's file: every plan comes back as it was, blocks are folded, edits are understood."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import PlanError
from surgery.expr import call, parse
from surgery.fold import Line, Ranges, expand, fold, fold_in_order, parse_range, spell_range
from surgery.plan import Dropped, Plan, Row, Stamp, Status
from surgery.plan_file import dumps, loads

# ------------------------------------------------------------------ every plan comes back

# Names with numbers in many places, so that folding has something to do, and names with anything in them.
PIECES = st.sampled_from(["h", "blocks", "w", "0", "1", "2", "3", "10", "conv1", "a_2", "b-3", "{i}", "", "é", "x y"])
NAMES = st.one_of(st.lists(PIECES, min_size=1, max_size=4).map(".".join), st.text(max_size=6))
TEXTS = st.one_of(
    st.sampled_from(["", "block 3 of 12", "as {i}", 'say "x"', "it's\n'so'", "a\x7f\\"]), st.text(max_size=8)
)
EXPRS = st.one_of(
    NAMES.map(lambda name: call("neg", name)),
    st.lists(NAMES, min_size=1, max_size=3).map(lambda names: call("cat", *names, axis=0)),
    NAMES.map(lambda name: call("cast", name, dtype='F"32')),
)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
STAMPS = st.builds(Stamp, TEXTS, TEXTS, st.none() | TEXTS, st.dictionaries(NAMES, TEXTS, max_size=2))


@st.composite
def rows(draw: st.DrawFn, target: str) -> Row:
    status = draw(st.sampled_from(Status))
    return Row(
        target,
        status,
        draw(EXPRS) if status in (Status.FILLED, Status.SYNTHESISED) else None,
        draw(SHAPES),
        draw(st.sampled_from(["F32", "BF16", ""])),
        draw(TEXTS),
        tuple(draw(st.lists(TEXTS, max_size=2))),
        draw(NAMES) if status is Status.TIED else None,
        draw(TEXTS),
    )


@st.composite
def plans(draw: st.DrawFn, deep: bool = True) -> Plan:
    targets = draw(st.lists(NAMES, unique=True, max_size=8))
    sources = draw(st.lists(NAMES, unique=True, max_size=5))
    return Plan(
        tuple(draw(rows(target)) for target in targets),
        tuple(Dropped(source, draw(TEXTS)) for source in sources),
        draw(STAMPS),
        draw(STAMPS),
        draw(st.none() | st.sampled_from(["proven", "stale"])),
        tuple(draw(st.lists(TEXTS, max_size=2))),
        tuple(draw(st.lists(TEXTS, max_size=2))),
        tuple(draw(st.lists(plans(deep=False), max_size=2))) if deep else (),
        draw(TEXTS),
        (),
    )


@given(plans())
@settings(max_examples=200, deadline=None)
def test_any_plan_comes_back_as_it_was(plan: Plan) -> None:
    assert loads(dumps(plan)) == plan


@st.composite
def models(draw: st.DrawFn) -> Plan:
    """Plans of models with repeated blocks, some of which are missing, odd or out of order."""
    found: list[Row] = []
    dropped: list[Dropped] = []
    shift, factor = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    for stage in range(draw(st.integers(1, 3))):
        for block in range(draw(st.integers(0, 5))):
            for part in ("q", "k", "mlp.0", "mlp.2"):
                if draw(st.integers(0, 9)) == 0:
                    continue
                odd = draw(st.integers(0, 9)) == 0
                source = f"s.{stage}.h.{factor * block + shift + odd}.{part}"
                found.append(
                    Row(
                        f"t.{stage}.b.{block}.{part}",
                        Status.FILLED,
                        call("neg", source),
                        (2 + stage, 3),
                        "F32",
                        f"as {block}",
                    )
                )
            dropped.append(Dropped(f"s.{stage}.h.{block}.mask", "a mask"))
    if draw(st.booleans()):
        found = draw(st.permutations(found))
    return Plan(tuple(found), tuple(dropped))


@given(models())
@settings(deadline=None)
def test_folded_models_come_back_in_their_order_and_are_folded(plan: Plan) -> None:
    text = dumps(plan)
    assert loads(text) == plan
    assert "fold = false" not in text


@given(models())
@settings(deadline=None)
def test_folding_is_exact_by_itself(plan: Plan) -> None:
    """Not by the check that `dumps` makes afterwards."""
    ranges = Ranges()
    shapes = [(row.target, str(row.shape)) for row in plan.rows]
    folded = fold_in_order(shapes, ranges)
    assert [(name, value) for name, value, _ in expand(folded, ranges.numbers)] == shapes
    lines = [Line(row.target, row.sources, None) for row in plan.rows]
    unfolded = expand([(line.name, line.texts[0]) for line in fold(lines, ranges)], ranges.numbers)
    from surgery.expr import fill

    assert {name: fill(text, numbers) for name, text, numbers in unfolded} == {
        line.name: line.texts[0] for line in lines
    }


# ------------------------------------------------------------------ what it looks like


def filled(target: str, expr: str, *shape: int) -> Row:
    return Row(target, Status.FILLED, parse(expr), shape or (2, 2), "F32")


def section(text: str, name: str) -> list[str]:
    found = re.search(rf"^\[{name}\].*\n((?:.+\n)*)", text, re.MULTILINE)
    return found[1].splitlines() if found else []


def test_a_plan_reads_well() -> None:
    layers = range(12)
    plan = Plan(
        (
            filled("emb", "wte"),
            *(
                row
                for n in layers
                for row in (
                    filled(
                        f"blocks.{n}.in_proj_weight",
                        f"cat(h.{n}.q.weight, h.{n}.k.weight, h.{n}.v.weight, axis=0)",
                        6,
                        2,
                    ),
                    Row(f"blocks.{n}.mask", Status.CONSTANT, None, (4, 4), "BOOL", note="causal"),
                )
            ),
            Row("head", Status.NEW, None, (3, 2), "F32", note="no source has its shape"),
            Row("out", Status.TIED, None, (2, 2), "F32", tied_to="emb"),
        ),
        tuple(Dropped(f"h.{n}.bias", "a mask") for n in layers),
        Stamp("bert", "ab", "c0ffee", {"model.safetensors": "12"}),
        Stamp("mymodel.py:Encoder", "cd"),
        "proven",
        ("key bias",),
        proven=("cpu/float64: last_hidden_state 3e-15 on 4 inputs",),
    )
    text = dumps(plan)
    head, _, rest = text.partition("\n[source]\n")
    assert re.sub(r'verdict_for = "[0-9a-f]{64}"', "...", head).splitlines()[2:] == [
        "version = 1",
        'verdict = "proven"',
        "proven = [",
        '    "cpu/float64: last_hidden_state 3e-15 on 4 inputs",',
        "]",
        "...",
        "symmetries = [",
        '    "key bias",',
        "]",
    ]
    assert (
        rest
        == """\
description = "bert"
revision = "c0ffee"
structure = "ab"

[source.files]
"model.safetensors" = "12"

[target]
description = "mymodel.py:Encoder"
structure = "cd"

[ranges]
i = "0..11"

[rows]
emb = "wte"
"blocks.{i}.in_proj_weight" = "cat(h.{i}.q.weight, h.{i}.k.weight, h.{i}.v.weight, axis=0)"

[tied]  # One tensor with another of the target.
out = "emb"

[constant]  # The target's own value, right as it is; and why.
"blocks.{i}.mask" = "causal"

[new]  # Freshly initialised; and why.
head = "no source has its shape"

[dropped]  # Source tensors that nothing uses, and why.
"h.{i}.bias" = "a mask"

[shapes]  # Every target tensor, in order.
emb = "F32 [2, 2]"
"blocks.{i}.in_proj_weight" = "F32 [6, 2]"
"blocks.{i}.mask" = "BOOL [4, 4]"
head = "F32 [3, 2]"
out = "F32 [2, 2]"
"""
    )
    assert str(plan) == text


def folds(*pairs: tuple[str, str]) -> tuple[list[str], list[str]]:
    text = dumps(Plan(tuple(filled(target, expr) for target, expr in pairs)))
    return section(text, "rows"), section(text, "ranges")


def test_gaps_two_indices_and_ragged_stages() -> None:
    assert folds(*((f"b.{n}.w", f"h.{n}.w") for n in (0, 1, 2, 5))) == (['"b.{i}.w" = "h.{i}.w"'], ['i = "0..2, 5"'])
    assert folds(*((f"b.{n}.e.{m}.w", f"h.{n}.{m}") for n in range(3) for m in range(3))) == (
        ['"b.{i}.e.{j}.w" = "h.{i}.{j}"'],
        ['i = "0..2"', 'j = "0..2"'],
    )
    ragged = [(f"s.{n}.b.{m}", f"h.{n}.{m}") for n, depth in enumerate((2, 2, 6, 2)) for m in range(depth)]
    assert folds(*ragged)[0] == ['"s.{i}.b.{j}" = "h.{i}.{j}"', '"s.2.b.{k}" = "h.2.{k}"']


def test_the_index_of_the_source_may_be_reckoned() -> None:
    assert folds(*((f"b.{n}", f"h.{n + 1}") for n in range(3)))[0] == ['"b.{i}" = "h.{i+1}"']
    assert folds(*((f"b.{n}.w", f"h.{2 * n + 1}.w") for n in range(3)))[0] == ['"b.{i}.w" = "h.{2*i+1}.w"']
    assert folds(*((f"b.{n}", f"h.{n - 1}") for n in range(1, 4)))[0] == ['"b.{i}" = "h.{i-1}"']
    assert folds(*((f"b.{n}", "shared") for n in range(3)))[0] == ['"b.{i}" = "shared"']


def test_what_does_not_fold_readably_is_written_out() -> None:
    teacher = [(f"b.{n}", f"h.{m}") for n, m in enumerate((0, 2, 4, 7, 9, 11))]
    assert folds(*teacher)[0] == [f'"{target}" = "{source}"' for target, source in teacher]
    assert folds(("b.0", "h.3"), ("b.1", "h.11")) == (['"b.0" = "h.3"', '"b.1" = "h.11"'], ['i = "0..1"'])


def test_one_odd_block_leaves_the_others_folded() -> None:
    pairs = [(f"b.{n}", f"h.{n}" if n != 3 else "h.9") for n in range(8)]
    # the shapes of all eight are equal, so that these have a range of their own
    assert folds(*pairs) == (['"b.{i}" = "h.{i}"', '"b.3" = "h.9"'], ['i = "0..2, 4..7"', 'j = "0..7"'])


def test_names_that_look_like_indices_are_plain_characters() -> None:
    plan = Plan((filled("b.{i}.w", '"h.{j}"'), filled("b.0.w", "h.0"), filled("b.1.w", "h.1")))
    text = dumps(plan)
    assert "fold = false" in text
    assert loads(text) == plan


def test_ranges_read_and_spell() -> None:
    assert parse_range("i", "0..2, 4 , 7..7") == (0, 1, 2, 4, 7)
    assert spell_range((0, 1, 2, 4, 7)) == "0..2, 4, 7"
    assert spell_range((0, 10, 1)) == "0, 10, 1"


# ------------------------------------------------------------------ edits

EDITED = dumps(
    Plan(
        tuple(filled(f"b.{n}.{part}", f"h.{n}.{part}") for n in range(4) for part in "qk"),
        (Dropped("x", "unused"),),
    ).with_verdict("proven", proven=["cpu/float64"])
)


def test_after_an_edit_the_verdict_is_stale() -> None:
    assert loads(EDITED).verdict == "proven"
    edited = loads(EDITED.replace('"h.{i}.q"', '"transpose( h.{i}.q )"'))
    assert (edited.verdict, edited.proven) == ("stale", ())
    assert str(edited["b.3.q"].expr) == "transpose(h.3.q)"
    assert loads(EDITED.replace('"h.{i}.q"', '"  h.{i}.q"')).verdict == "proven"  # the same rows, spaced otherwise
    assert loads(EDITED.replace('"proven"', '"adapted"', 1)).verdict == "stale"
    assert loads(re.sub("verdict_for.*\n", "", EDITED)).verdict == "stale"
    assert loads(EDITED.replace("unused", "of no use")).verdict == "proven"  # a reason is told, not computed


def test_a_block_may_be_taken_out_of_its_range() -> None:
    edited = EDITED.replace('i = "0..3"', 'i = "0..3"\nk = [0, 1, 3]').replace(
        '"b.{i}.q" = "h.{i}.q"', '"b.{k}.q" = "h.{k}.q"\n"b.2.q" = "h.0.q"'
    )
    plan = loads(edited)
    assert [str(plan[f"b.{n}.q"].expr) for n in range(4)] == ["h.0.q", "h.1.q", "h.0.q", "h.3.q"]


ROW = '"b.{i}.q" = "h.{i}.q"'


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version = 1", "version = 1 1", "not TOML: .*line 3"),
        ("version = 1", "version = 2", "version 2 is not known"),
        ("version = 1\n", "", "states no version"),
        ("version = 1", "version = true", "version True is not known"),
        ("[rows]", "[rowz]", r"unknown section \[rowz\]; did you mean rows"),
        ("version = 1", "version = 1\nverdikt = 'x'", "unknown key verdikt; did you mean verdict"),
        (ROW, '"b.{i}.q" = "cat(h.{i}.q"', r'\[rows\] "b.\{i\}.q": the parenthesis that cat opens is not closed'),
        (ROW, '"b.{i}.q" = "cta(h.{i}.q)"', "unknown op cta; did you mean cat"),
        (ROW, '"b.{i}.q" = "h.{j}.q"', r"the target name has no \{j\}"),
        (ROW, '"b.{i}.q" = "h.{i*2}.q"', r"\{i\*2\} does not read as an index"),
        ("version = 1", "version = " + "9" * 5000, "not TOML"),
        ("version = 1", "version = " + "[" * 5000, "not TOML"),
        (ROW, '"b.{i}.q" = "h.{i-1}.q"', r"\{i-1\} in h.\{i-1\}.q is -1 where i is 0"),
        (ROW, '"b.{j}.q" = "h.{j}.q"', r'no range is stated for \{j\} in "b.\{j\}.q"'),
        (ROW, ROW + '\n"b.2.q" = "h.0.q"', r'b.2.q is meant twice: by "b.\{i\}.q" and by "b.2.q"'),
        (ROW, ROW + "\nb.9.q = 'h.9.q'", r"\[rows\] b is a table"),
        (ROW, '"b.{i}.q" = 3', r'\[rows\] "b.\{i\}.q" is a text in quotes, not 3'),
        (ROW, "", "b.0.q has a shape and no row"),
        (ROW, ROW + '\n"new.w" = "h.9"', "new.w has a row and no shape"),
        ("[shapes]", '[new]\n"b.0.q" = ""\n[shapes]', r"b.0.q stands in \[new\] and under filled tensors"),
        ("[shapes]", '[evidence]\n"b.9.q" = "x"\n[shapes]', r"\[evidence\] speaks of b.9.q, which has no row"),
        ("[shapes]", '[alternatives]\n"b.0.q" = "x"\n[shapes]', "is a list of texts, not 'x'"),
        ("F32 [2, 2]", "F32 2x2", r'is written as "F32 \[768, 3072\]", not "F32 2x2"'),
        ('i = "0..3"', 'i = "0-3"', 'the range of i, "0-3", does not read'),
        ('i = "0..3"', 'i = "3..0"', "is empty or far too long"),
        ('i = "0..3"', 'i = "0..999999999"', "is empty or far too long"),
        ('i = "0..3"', 'i = "0..3, 2"', "holds a number twice"),
        ('i = "0..3"', "i = 0.5", r"\[ranges\] i is no range"),
        ('i = "0..3"', '"i j" = "0..3"', "cannot name an index"),
        ('proven = [\n    "cpu/float64",\n]', "proven = 'x'", "proven is a list of texts, not 'x'"),
        ('verdict = "proven"', "verdict = 1", "verdict is a text in quotes, not 1"),
        ("\n[ranges]", "\n[source]\nrevison = 'x'\n[ranges]", r"\[source\] has no key revison; did you mean revision"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old in EDITED
    path = tmp_path / "mine.graft.toml"
    path.write_text(EDITED.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(PlanError, match=says) as error:
        Plan.load(path)
    assert str(error.value).startswith(str(path))


@given(st.text())
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    try:
        loads(f"version = 1\n{text}")
    except PlanError:
        return


@given(st.integers(0, len(EDITED)), st.integers(0, 9), st.text(max_size=3))
def test_a_damaged_file_is_a_plan_or_a_plan_error(at: int, length: int, put: str) -> None:
    try:
        loads(EDITED[:at] + put + EDITED[at + length :])
    except PlanError:
        return


# ------------------------------------------------------------------ files


def test_save_and_load(tmp_path: Path) -> None:
    plan = loads(EDITED)
    plan.save(tmp_path / "a.toml")
    assert Plan.load(tmp_path / "a.toml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


def test_a_persons_comments_stay_when_the_verdict_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    text = EDITED.replace(ROW, "# mine\n\"b.{i}.q\" = 'transpose(h.{i}.q)'  # turned")
    path.write_text(text, encoding="utf-8")
    plan = Plan.load(path)
    assert plan.verdict == "stale"
    again = plan.with_verdict("consistent", proven=["one", "two"], symmetries=["a bias"])
    again.save(path)
    assert Plan.load(path) == again
    assert "# mine\n\"b.{i}.q\" = 'transpose(h.{i}.q)'  # turned" in path.read_text(encoding="utf-8")
    replace(again, verdict=None, proven=()).save(path)
    assert Plan.load(path).verdict is None
    other = replace(again, dropped=())
    other.save(path)  # other contents: written anew
    assert Plan.load(path) == other
    assert "# mine" not in path.read_text(encoding="utf-8")


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.toml cannot be read: No such file"):
        Plan.load(tmp_path / "none.toml")
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not a plan: it is not text in UTF-8"):
        Plan.load(tmp_path / "weights")


def test_a_save_that_fails_leaves_what_was(tmp_path: Path) -> None:
    plan = loads(EDITED)
    with pytest.raises(PlanError, match="cannot be written: No such file"):
        plan.save(tmp_path / "none" / "a.toml")
    plan.save(tmp_path / "a.toml")
    with pytest.raises(PlanError, match="cannot be written as UTF-8"):
        Plan((filled("a", '"\udc80"'),)).save(tmp_path / "a.toml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match="cannot be written"):
        plan.save(tmp_path / "folder")
    assert Plan.load(tmp_path / "a.toml") == plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.toml", "folder"]
