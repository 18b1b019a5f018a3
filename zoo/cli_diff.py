"""`zoo diff`: what two checkpoints have in common, by content."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from zoo import account, show
from zoo.cli import command, host_for
from zoo.errors import NO
from zoo.out import Out

if TYPE_CHECKING:
    from surgery.diff import Diff, Difference
    from surgery.reader import TensorInfo

_MOST = 24  # lines of one kind that are shown

# status: what a person is told
_TITLES = {
    "same": "same",
    "renamed": "renamed, same values",
    "changed": "changed",
    "left": "only in A",
    "right": "only in B",
}


@command("diff", "Compare two checkpoints: which tensors are the same, renamed, changed, or on one side only.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--all", "whole", is_flag=True, help="List every tensor, also those that are the same.")
def diff(out: Out, a: str, b: str, whole: bool) -> int:
    from surgery.diff import diff as compare
    from zoo import api

    host = host_for(out)
    for ref in (a, b):  # both, before either is fetched
        host.pick(ref)
    hub = api.make_hub(host, quiet=not out.progress)
    located = [api.fetch(ref, of=host, hub=hub) for ref in (a, b)]
    left, right = (api.open_located(each, host) for each in located)
    if out.progress:
        out.note("comparing ...")
    found = compare(left, right)
    thing = {
        **found.as_dict(),
        "left": {"ref": str(located[0].pick.reference), "source": located[0].where, **show.totals(left)},
        "right": {"ref": str(located[1].pick.reference), "source": located[1].where, **show.totals(right)},
    }

    def human() -> str:
        sides = [
            (letter, str(each.pick.reference), show.summary(tensors))
            for letter, each, tensors in (("A", located[0], left), ("B", located[1], right))
        ]
        answer = out.style(verdict(found), "green" if found.same else "yellow")
        width = account.terminal_width()
        return "\n".join([*account.fitted(sides, width), *lines(found, whole=whole, width=width), answer])

    out.data(thing, human, lambda: "same" if found.same else "differs")
    for checkpoint in (left, right):
        for note in checkpoint.notes:
            out.note(note)
    return 0 if found.same else NO


def verdict(found: Diff) -> str:
    """The answer in one line."""
    if not found.rows:
        return "same: neither holds a tensor"
    if found.same:
        return f"same: all {len(found.rows)} tensors, byte for byte"
    short = {"renamed": "renamed", "left": "only in A", "right": "only in B"}
    return "differs: " + ", ".join(f"{n} {short.get(status, status)}" for status, n in found.counts.items())


def lines(found: Diff, *, whole: bool = False, width: int | None = None) -> Iterator[str]:
    """What differs, a section for each kind; with `whole`, what is the same too, and all of it. In lines of at most
    `width` where that is given, as on a terminal."""
    for status, title in _TITLES.items():
        rows = [row for row in found.rows if row.status == status]
        if not rows or (found.same and not whole):  # then the answer says it all
            continue
        yield f"{title}: {len(rows)} tensor{'s' * (len(rows) > 1)}"
        if status != "same" or whole:
            yield from _indented(_rows(rows, whole, width and width - 2))
    for letter, other, ties, others in (
        ("A", "B", found.left_ties, found.right_ties),
        ("B", "A", found.right_ties, found.left_ties),
    ):
        shown = [names for names in ties if whole or names not in others]
        if shown:
            yield f"tied in {letter}, by equal bytes{'' if whole else f', and not in {other}'}:"
            yield from _indented(_some([" = ".join(names) for names in shown], whole))


def _rows(rows: Sequence[Difference], whole: bool, width: int | None) -> list[str]:
    """A line for each; of those that were measured the largest change first, the others with repeated blocks in one."""
    from surgery.fold import Line, Ranges, fold, spell_range

    measured = sorted((row for row in rows if row.relative is not None), key=lambda row: -(row.relative or 0.0))
    ranges = Ranges()
    plain = [
        Line(row.name, (f"-> {row.right}" if row.status == "renamed" else "", "; ".join(_said(row))), _what(row))
        for row in rows
        if row.relative is None
    ]
    cells = [(row.name, _what(row), "; ".join(_said(row))) for row in measured]
    for line in fold(plain, ranges):
        cells.append((f"{line.name} {line.texts[0]}".rstrip(), str(line.rest), line.texts[1]))
    kept = cells if whole else cells[:_MOST]
    shown = list(account.fitted(kept, width))
    if len(cells) > len(kept):
        shown.append(f"... and {len(cells) - len(kept)} more; --all shows all")
    used = [name for name in ranges.numbers if any(f"{{{name}" in line for line in shown)]
    if used:
        shown.append("with " + ", ".join(f"{name} = {spell_range(ranges.numbers[name])}" for name in used))
    return shown


def _what(row: Difference) -> str:
    """Type and shape; both where they are not the same."""

    def shape(info: TensorInfo) -> str:
        return f"[{', '.join(map(str, info.shape))}]"

    left, right = row.left_info or row.right_info, row.right_info or row.left_info
    assert left is not None
    assert right is not None
    dtype = f"{left.dtype} -> {right.dtype}" if row.retyped else left.dtype
    return f"{dtype} {shape(left)}" + (f" -> {shape(right)}" if row.reshaped else "")


def _said(row: Difference) -> Iterator[str]:
    if row.axes is not None:
        yield "transposed" if row.axes == (1, 0) else f"axes in the order {', '.join(map(str, row.axes))}"
    if row.relative is not None and row.left_info is not None:
        measures = (("relative", row.relative), ("largest", row.largest or 0.0))
        said = [f"{what} {_number(value)}" for what, value in measures if math.isfinite(value)]
        yield ", ".join([*said, f"{row.elements} of {row.left_info.numel} elements"])
    yield from row.notes


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _some(shown: list[str], whole: bool) -> list[str]:
    if whole or len(shown) <= _MOST:
        return shown
    return [*shown[:_MOST], f"... and {len(shown) - _MOST} more; --all shows all"]


def _indented(found: Iterable[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in found)
