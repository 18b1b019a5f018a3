"""The page of a report, without a browser: what is in it, what it costs, and when it is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests import tiny_bert
from tests.zoo import large_report
from tests.zoo.conftest import Done, calling
from zoo import cli, html
from zoo.errors import ZooError

Run = Callable[..., Done]
VOID = {"meta", "input", "br"}


class Read(HTMLParser):
    """The elements of a page; every one closed by what opened it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def large() -> str:
    return html.page(*large_report.make())


def test_it_holds_all_it_needs(large: str) -> None:
    read = Read(large)
    assert not [tag for tag in ("link", "img", "iframe", "object") if read.all(tag)]
    assert not [a for _, a in read.found if {"src", "srcset", "action", "onclick", "onload"} & a.keys()]
    assert {a["href"] for a in read.all("a")} == {"#map"}
    assert "url(" not in large
    assert "default-src 'none'" in large


def test_every_tensor_has_a_row(large: str) -> None:
    report, told = large_report.make()
    labels = [str(a["aria-label"]) for a in Read(large).all("div") if a.get("role") == "treeitem"]
    for name in (*told.tensors, *report.plan.by_target):
        assert any(label.startswith(f"{name}, ") for label in labels), name


def test_what_strangers_wrote_is_escaped(large: str) -> None:
    assert len(Read(large).all("script")) == 2  # the data, and the page's own
    assert "<script>alert" not in large
    assert "<b>nothing" not in large


def test_repeated_blocks_are_closed_and_a_divergence_is_open() -> None:
    for refuted in (False, True):
        read = Read(html.page(*large_report.make(refuted=refuted)))
        groups = {str(a["data-path"]): a for a in read.all("div") if "data-path" in a}
        shown = [a for a in read.all("div") if a.get("role") == "treeitem" and "hidden" not in a]
        assert len(shown) < 2 * html._SHOWN
        assert groups["blocks.7"]["aria-expanded"] == "false"
        assert groups["blocks.30"]["aria-expanded"] == str(refuted).lower()
        assert ("hidden" in groups["blocks.30.attn.qkv"]) is not refuted


def test_a_report_without_a_proof_has_a_page() -> None:
    report, told = large_report.make(1)
    from dataclasses import replace

    bare = replace(report, proof=None, plan=replace(report.plan, symmetries=(), notes=()))
    text = html.page(bare, replace(told, depth=(), no_depth="Nothing was run.", notes=()))
    assert text.count("Nothing was run.") == 2


def test_colours_can_be_read() -> None:
    """A contrast of at least 4.5, as WCAG 2.2 asks of text (1.4.3), on each ground that a colour stands on."""
    css = html._part("report.css")
    light, dark = (css.partition("@media (prefers-color-scheme: dark)")[i] for i in (0, 2))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        grounds = [colours.pop(name) for name in ("page", "card", "chosen")]
        colours.pop("rule")
        assert {*html.STATUSES, "text", "dim", "link", "good", "bad"} <= set(colours)
        for name, colour in colours.items():
            for ground in grounds:
                bright, dim = sorted((luminance(colour), luminance(ground)), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, ground)


def test_no_two_statuses_share_a_sign() -> None:
    target = [sign for status, (sign, _) in html.STATUSES.items() if status not in ("used", "dropped")]
    assert len(set(target)) == len(target)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    html.write(path, "old")

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space"):
        html.write(path, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("r.html", "old")]


def test_nobody_elses_file_is_replaced(tmp_path: Path, large: str) -> None:
    path = tmp_path / "r.html"
    assert html.check_free(str(path)) == path
    html.write(path, large)
    assert html.check_free(str(path)) == path  # an earlier page
    path.write_text("<html>mine</html>")
    with pytest.raises(ZooError, match="no report of a graft"):
        html.check_free(str(path))
    with pytest.raises(ZooError, match="is a page"):
        html.check_free(str(tmp_path / "weights.safetensors"))
    with pytest.raises(ZooError, match="no folder"):
        html.check_free(str(tmp_path / "nowhere" / "r.html"))
    assert html.check_free(None) is None


# ---------------------------------------------------------------------------------------------------- commands

pytest.importorskip("transformers")
REF = "file:tiny#encoder"


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A folder where a graft was run with --html and --json."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("html")
    tiny_bert.save(folder / "tiny")
    (folder / "mine.py").write_text(tiny_bert.MINE)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        status = cli.main(["graft", REF, "mine.py", "--html", "report.html", "--json"])
    return folder, Done(status, out.getvalue(), "")


@pytest.fixture
def run(
    grafted: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command line, in this process and a copy of that folder."""
    shutil.copytree(grafted[0], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")

    return calling(capsys)


def test_graft_writes_a_page_and_says_the_same_json(grafted: tuple[Path, Done]) -> None:
    folder, done = grafted
    assert (done.status, done.json["verdict"]) == (0, "proven")
    assert done.json["wrote"] == ["mine.safetensors", "mine.graft.toml"]
    text = (folder / "report.html").read_text()
    Read(text)
    assert "proven" in text
    assert "cpu/float32</strong> on plain: 20 calls of modules compared" in text
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_refutation_has_a_page_with_the_residuals_around_it(run: Run) -> None:
    wrong = tiny_bert.MINE.replace("self.ln2 = nn.LayerNorm(dim, eps=1e-12)", "self.ln2 = nn.LayerNorm(dim, eps=1e-5)")
    Path("wrong.py").write_text(wrong)
    done = run("graft", REF, "wrong.py", "--plan", "mine.graft.toml", "--html", "report.html")
    assert done.status == 1
    assert "the report is report.html" in done.err
    text = Path("report.html").read_text()
    assert 'id="divergence"' in text
    assert "layers.0.ln2" in text
    assert text.count('class="dot over"') > 5
    assert not Path("wrong.safetensors").exists()


def test_a_divergence_in_a_submodule_is_found_in_the_whole(run: Run) -> None:
    wrong = tiny_bert.MINE.replace("F.gelu(", "F.gelu(approximate='tanh', input=")
    Path("wrong.py").write_text(wrong)
    Path("pair.py").write_text(tiny_bert.PAIR.replace("from mine", "from wrong"))
    done = run("graft", REF, "pair.py", "--into", "left", "--html", "report.html", "--json")
    assert done.status == 1
    where = f"left.{done.json['proof']['divergence']['target_module']}"
    assert f'data-module="{where}"' in Path("report.html").read_text()
    assert "◆ first divergence" in Path("report.html").read_text()


def test_verify_writes_a_page_of_each_pass(run: Run) -> None:
    done = run("verify", REF, "mine.py", "--on", "cpu/bfloat16", "--on", "cuda/float16", "--html", "v.html", "-q")
    assert (done.status, done.out) == (0, "proven\n"), done.err
    text = Path("v.html").read_text()
    for name in ("cpu/float64", "cpu/bfloat16", "cuda/float16"):
        assert f"<strong>{name}</strong>" in text


def test_what_nothing_ran_has_a_page(run: Run) -> None:
    run("graft", REF, "mine.py", "--static", "--html", "static.html", "-o", "static.safetensors")
    assert "Nothing was run." in Path("static.html").read_text()


def test_a_page_that_may_not_be_written_is_found_first(run: Run) -> None:
    Path("notes.html").write_text("mine")
    before = sorted(Path().iterdir())
    done = run("graft", REF, "mine.py", "--html", "notes.html", "-o", "again.safetensors")
    assert done.status == 2
    assert "no report of a graft" in done.err
    assert sorted(Path().iterdir()) == before
