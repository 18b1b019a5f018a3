"""A graft's report for a person: what came from where, what is new, what was proven and where. Read without colour."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from zoo.out import amount, table

if TYPE_CHECKING:
    import surgery
    from surgery.proof import Proof
    from surgery.report import ReportRow

_MOST = 24  # folded rows of one kind that are shown; a module without repeated blocks may have hundreds
_WIDTH = 100

# status: (how a person is told of it, what it means), in the order of telling
_TOLD = {
    "filled": ("grafted", ""),
    "adapted": ("adapted", "by an approximate or lossy op"),
    "synthesised": ("made", "by a rule; the source has no such tensor"),
    "tied": ("tied", ""),
    "constant": ("constant", "the module's own values, right as they are"),
    "kept": ("kept", "from before"),
    "new": ("new", ""),
    "dropped": ("dropped", ""),
}


def status_of(row: ReportRow) -> str:
    """How a row ended, as a person is told: what an approximate or lossy op made is adapted."""
    made = row.status in ("filled", "synthesised")
    return "adapted" if made and row.kind in ("approximate", "lossy") else row.status


def counts(report: surgery.Report) -> str:
    """ "75 grafted, 1 adapted, 2 new, 3 dropped"."""
    found = Counter(map(status_of, report.rows))
    return ", ".join(f"{found[status]} {title}" for status, (title, _) in _TOLD.items() if found[status])


def render(report: surgery.Report, *, why: bool = False, width: int | None = None) -> str:
    """The whole account; in lines of at most `width` where that is given, as on a terminal."""
    return "\n".join([*_sections(report, why=why, width=width), *wrapped(proven(report), width)])


def terminal_width() -> int | None:
    """How wide the terminal is that stdout goes to; None where it goes elsewhere, and lines are left whole."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def wrapped(lines: Iterable[str], width: int | None) -> Iterator[str]:
    """Sentences in lines of at most `width`; what follows the first one is indented below it."""
    for line in lines:
        if width is None or len(line) <= width or "\x1b" in line:  # what is in colour is short
            yield line
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(line.strip(), width, initial_indent=indent, subsequent_indent=f"{indent}  ")


def fitted(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """A table in lines of at most `width`: where a row is wider, its last column stands below the others."""
    if width is None:
        yield from table(rows).splitlines()
        return
    heads = table([row[:-1] for row in rows]).splitlines()
    for row, head, line in zip(rows, heads, table(rows).splitlines(), strict=True):
        if len(line) <= width:
            yield line
        else:
            yield from wrapped([head.rstrip(), *([f"    {row[-1]}"] if row[-1] else [])], width)


def _sections(report: surgery.Report, *, why: bool, width: int | None) -> Iterator[str]:
    shapes = {row.target: row for row in report.plan.rows}
    for status, (title, means) in _TOLD.items():
        rows = [row for row in report.rows if status_of(row) == status]
        if not rows:
            continue
        elements = sum(_elements(shapes[row.name].shape) for row in rows if row.name in shapes)
        size = f", {amount(elements)} parameters" if elements else ""
        yield f"{title}: {len(rows)} tensor{'s' * (len(rows) > 1)}{size}{f' ({means})' if means else ''}"
        if status != "kept" or why:  # of what was there before, the number is enough
            yield from _indented(_lines(rows, report, why=why, width=width and width - 2))


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _lines(rows: Sequence[ReportRow], report: surgery.Report, *, why: bool, width: int | None) -> list[str]:
    """A line for each row, repeated blocks in one; with `why`, the evidence below it."""
    from surgery.fold import Line, Ranges, fold, spell_range

    planned = report.plan.by_target
    ranges = Ranges()
    lines = []
    for row in rows:
        known = planned.get(row.name)
        shape = f"[{', '.join(map(str, known.shape))}]" if known is not None else ""
        approximate = f" ({row.kind})" if row.kind in ("approximate", "lossy") else ""
        said = (row.expr or row.note) + approximate
        evidence = (known.evidence, *known.alternatives) if why and known is not None else ()
        lines.append(Line(row.name, (said, *evidence), shape))
    folded = fold(lines, ranges)
    shown = [(line.name, str(line.rest), line.texts) for line in folded[: len(folded) if why else _MOST]]
    cells = [(name, shape, _cut(braced(texts[0]), why)) for name, shape, texts in shown]
    found = []
    for lines_of, (_, _, texts) in zip(_columns(cells, width), shown, strict=True):
        found += lines_of
        found += wrapped([f"    {text}" for text in texts[1:] if text], width)
    if len(folded) > len(shown):
        found.append(f"... and {len(folded) - len(shown)} more; --why shows all")
    used = [name for name in ranges.numbers if any(f"{{{name}" in line for line in found)]
    if used:
        found.append("with " + ", ".join(f"{name} = {spell_range(ranges.numbers[name])}" for name in used))
    return found


def _columns(cells: Sequence[tuple[str, str, str]], width: int | None) -> list[list[str]]:
    """The lines of each row. Where the width is given the last column goes on below itself, and the first two do where
    they leave it too little room."""
    if width is None:
        return [[line] for line in table(cells).splitlines()]
    from rich.console import Console
    from rich.table import Table

    most = [max((len(row[column]) for row in cells), default=0) for column in range(2)]
    first = min(most[0], max(12, width - most[1] - 4 - 30))
    last = width - first - most[1] - 4
    console = Console(width=width, color_system=None, highlight=False, markup=False, emoji=False)
    found = []
    for row in cells:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=first, overflow="fold")
        grid.add_column(width=most[1], overflow="fold")
        grid.add_column(overflow="fold")
        grid.add_row(_broken(row[0], first), row[1], _broken(row[2], last))
        with console.capture() as capture:
            console.print(grid)
        found.append([line.rstrip() for line in capture.get().splitlines()])
    return found


def _broken(text: str, width: int) -> str:
    """A text in lines of at most `width` where that can be: broken after a space, or before a dot of a name."""
    lines = [""]
    for piece in re.findall(r"\.?[^.\s]+\s*|\s+|\.", text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


_NAMES = re.compile(r"(?<=\()[\w./{}:+*-]+(?:, [\w./{}:+*-]+)+(?=, \w+=|\))")


def braced(text: str) -> str:
    """ "cat(a.q.weight, a.k.weight, axis=0)" as "cat(a.{q, k}.weight, axis=0)": what names share is said once."""

    def shorter(match: re.Match[str]) -> str:
        names = [name.split(".") for name in match[0].split(", ")]
        start = _shared(names)
        end = _shared([name[start:][::-1] for name in names])
        middles = [".".join(name[start : len(name) - end]) for name in names]
        if not start + end or not all(middles):
            return match[0]
        pieces = [*names[0][:start], f"{{{', '.join(middles)}}}", *names[0][len(names[0]) - end :]]
        return ".".join(pieces)

    return _NAMES.sub(shorter, text)


def _shared(names: Sequence[Sequence[str]]) -> int:
    """How many pieces all names begin with."""
    count = 0
    for pieces in zip(*names, strict=False):
        if len(set(pieces)) > 1:
            break
        count += 1
    return count


def _cut(text: str, whole: bool) -> str:
    return text if whole or len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def proven(report: surgery.Report) -> Iterator[str]:
    """What the verdict rests on."""
    from surgery.fold import folded

    if report.proof is not None:
        yield "proof:"
        yield from _indented(said(report.proof))
    yield from _indented(folded([f"any choice is right: {symmetry}" for symmetry in report.plan.symmetries]))
    yield from _indented(report.plan.notes)


def said(proof: Proof) -> Iterator[str]:
    """What running showed, a sentence each; sentences that are the same for each of repeated blocks are one."""
    from surgery.fold import folded

    yield from folded(list(dict.fromkeys(proof.sentences)))


def reasons(report: surgery.Report) -> Iterator[str]:
    """Why the answer is what it is, and the first place where the two part."""
    parted = str(report.proof.divergence) if report.proof is not None and report.proof.divergence else ""
    message = report.message.replace(parted, "").rstrip("; ") if parted else report.message
    if message:
        yield f"  {message}"
    if parted:
        yield f"first divergence: {parted}"


def verdict(report: surgery.Report, *, chosen: str = "") -> str:
    """The answer in one line. `chosen` says that a person took one of several mappings that fit."""
    if chosen and str(report.verdict) == "consistent":
        return f"{report.verdict}: it fits names, shapes and structure, as others do; {chosen}; nothing was run"
    several = "more than one mapping fits, and they are not equivalent"
    proof = report.proof
    but = "the rows that are marked"
    if proof is not None and proof.departures:
        but = f"what is allowed to depart, and {but}" if proof.adapted else "what is allowed to depart"
    said = {
        "proven": "the same function, by running both in float64",
        "adapted": f"the same function, but for {but}",
        "consistent": "one mapping fits names, shapes and structure; nothing was run",
        "ambiguous": several if report.candidates else "it is not settled what becomes what",
        "refuted": "it ran, and computes something else",
    }
    return f"{report.verdict}: {said[str(report.verdict)]}"


def candidates(report: surgery.Report) -> Iterator[str]:
    """Where several plans fit: each by the rows in which it differs from the others."""
    plans = report.candidates
    differing = {
        row.target for row in (plans[0].rows if plans else ()) if len({str(_expr(p, row.target)) for p in plans}) > 1
    }
    for number, plan in enumerate(plans, 1):
        yield f"candidate {number} (--accept {number}):"
        rows = [f"{row.target} = {row.expr or row.status}" for row in plan.rows if row.target in differing]
        yield from _indented(rows[:6])
        if len(rows) > 6:
            yield f"  ... and {len(rows) - 6} more"


def _expr(plan: surgery.Plan, target: str) -> object:
    row = plan.by_target.get(target)
    return row.expr if row is not None else None


def _indented(lines: Iterable[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in lines)
