"""How a report and a proof look in a notebook: short static tables, without a script. Their `_repr_html_` calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from surgery.fold import folded
from surgery.proof import power

if TYPE_CHECKING:
    from surgery.proof import PassResult, Proof
    from surgery.report import Report

_MOST = 24  # rows of a table


def report(of: Report) -> str:
    """Verdict, accounting, the rows with repeated blocks in one, and the proof."""
    counted = ", ".join(f"{count} {status}" for status, count in of.counts.items())
    parts = [f"<p><strong>{escape(of.verdict.value)}</strong>: {escape(counted)}</p>"]
    if of.message:
        parts.append(f"<p>{escape(of.message)}</p>")
    parts.append(_table(("tensor", "how it ended", "shape", "made of, or why"), list(_rows(of))))
    if of.plan.symmetries:
        parts.append(_list(folded([f"any choice is right: {symmetry}" for symmetry in of.plan.symmetries])))
    if of.proof is not None:
        parts.append(_passes(of.proof))
    return f"<div>{''.join(parts)}</div>"


def proof(of: Proof) -> str:
    """Verdict, the passes, and what was said beside them."""
    head = f"<p><strong>{escape(of.verdict)}</strong>{f': {escape(of.message)}' if of.message else ''}</p>"
    said = [*of.departures_said(), *(f"{output} is computed at {where}" for output, where in of.surface.items())]
    said += of.causes
    said += [*of.not_exercised, *(f"any choice is right: {symmetry}" for symmetry in of.symmetries), *of.notes]
    return f"<div>{head}{_passes(of)}{_list(folded(said))}</div>"


def _rows(of: Report) -> Iterator[tuple[str, ...]]:
    from surgery.fold import Line, Ranges, fold, spell_range

    planned = of.plan.by_target
    lines = []
    for row in of.rows:
        shape = list(planned[row.name].shape) if row.name in planned else ""
        status = f"{row.status}, {row.kind}" if row.kind in ("approximate", "lossy") else row.status
        lines.append(Line(row.name, (row.expr or row.note,), (status, str(shape))))
    ranges = Ranges()
    for line in fold(lines, ranges):
        assert isinstance(line.rest, tuple)
        used = [name for name in ranges.numbers if f"{{{name}" in line.name]
        where = ", ".join(f"{name} = {spell_range(ranges.numbers[name])}" for name in used)
        yield line.name + (f" ({where})" if where else ""), *map(str, line.rest), line.texts[0]


def _passes(of: Proof) -> str:
    return _table(("pass", "answer", "residual", "gate"), [_pass(each) for each in of.passes])


def _pass(of: PassResult) -> tuple[str, ...]:
    said = ", ".join(f"{name} {power(value)}" for name, value in of.residuals.items())
    shown = "; ".join(text for text in (said, of.why) if text)
    return of.name, of.status, shown, power(of.gate) if of.status != "not run" else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    left = 'style="text-align:left"'
    head = "".join(f"<th {left}>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td {left}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[:_MOST])
    more = f"<p>... and {len(rows) - _MOST} more rows</p>" if len(rows) > _MOST else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:_MOST])
    more = f"<li>... and {len(lines) - _MOST} more</li>" if len(lines) > _MOST else ""
    return f"<ul>{items}{more}</ul>" if items else ""
