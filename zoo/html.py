"""A graft's report as one page that opens from the disk: what became what, the plan, and what running said.

The page holds everything it needs: styles, script and data lie in it, and its content security policy lets it fetch
nothing. Names of tensors are text that strangers wrote: the template escapes all of it, and the script sets text only.
Without a script the page is complete but for the lines and the search.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import account
from zoo.errors import ZooError
from zoo.out import amount

if TYPE_CHECKING:
    from jinja2 import Template

    import surgery
    from surgery import TensorInfo
    from surgery.residuals import Depth

_MARK = '<meta name="generator" content="weightzoo">'  # a page with it is ours, and may be replaced
_SUFFIXES = (".html", ".htm")
_SHOWN = 160  # rows of a tree that are open at first, at most

# status: (sign, what it means). Told apart by sign and word; colour only adds.
STATUSES = {
    "filled": ("●", "taken over from the source, by the expression of its row"),
    "adapted": ("◐", "made of the source by an approximate or lossy op"),
    "synthesised": ("◇", "made by a rule; the source has no such tensor"),
    "tied": ("=", "one tensor with another one"),
    "constant": ("■", "the module's own value, right as it is"),
    "kept": ("↺", "loaded before, and kept"),
    "new": ("○", "as it is initialised"),
    "used": ("●", "something in the target is made of it"),
    "dropped": ("✗", "nothing in the target is made of it"),
}
_VERDICTS = {
    "proven": "✓",
    "adapted": "≈",
    "consistent": "~",
    "ambiguous": "?",
    "refuted": "✗",
    "differs": "✗",
    "unmet": "✗",
}


@dataclass(frozen=True)
class Told:
    """What a page tells beside the report."""

    ref: str
    where: str  # the source it is from
    target: str
    tensors: Mapping[str, TensorInfo]  # of the source
    notes: tuple[str, ...] = ()
    depth: tuple[Depth, ...] = ()
    no_depth: str = ""  # why there is no residual by depth
    wrote: tuple[str, ...] = ()
    into: str = ""  # the submodule that was grafted into; what was proven names modules from there
    verdict: str = ""  # where it is not the report's own
    message: str = ""
    chosen: str = ""  # that a person took one of several mappings that fit


def check_free(path: str | None) -> Path | None:
    """The path of a page to write, before anything is done: its folder is there, and the file is none but an earlier
    page of ours."""
    if path is None:
        return None
    found = Path(path)
    if found.suffix.lower() not in _SUFFIXES:
        raise ZooError(f"{found}: the report is a page", kind="file", hint=f"name it {found.with_suffix('.html')}")
    if not found.parent.is_dir():
        raise ZooError(f"there is no folder {found.parent}", kind="file", hint=f"mkdir -p {found.parent}")
    if found.exists() and not found.is_file():
        raise ZooError(f"{found} is in the way, and no file", kind="file", hint="choose another name")
    if not os.access(found if found.exists() else found.parent, os.W_OK):
        raise ZooError(f"{found} may not be written", kind="file", hint="choose another name")
    if found.exists():
        with found.open("rb") as file:
            ours = _MARK.encode() in file.read(4096)
        if not ours:
            raise ZooError(
                f"{found} is there, and is no report of a graft",
                kind="file",
                hint="choose another name, or move it away",
            )
    return found


def write(path: Path, text: str) -> None:
    """The page, whole or not at all."""
    fresh = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def page(report: surgery.Report, told: Told) -> str:
    """The page of a report."""
    proof = report.proof
    parted = proof.divergence if proof is not None else None
    module = None
    if parted is not None:
        module = ".".join(name for name in (told.into, parted.target_module) if name)
    verdict = told.verdict or str(report.verdict)
    target, source = _target(report), _source(report, told.tensors)
    number = {tensor["name"]: i for i, tensor in enumerate(source)}
    for i, tensor in enumerate(target):
        tensor["from"] = [number[name] for name in tensor.pop("sources") if name in number]
        for name in tensor["from"]:
            source[name]["to"].append(i)
    script = _part("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    from markupsafe import Markup

    from surgery.fold import folded

    return _template().render(
        mark=Markup(_MARK),
        css=Markup(_part("report.css")),
        script=Markup(script),
        script_hash=digest,
        data=Markup(_json({"target": target, "source": source, "signs": {k: v[0] for k, v in STATUSES.items()}})),
        report=report,
        proof=proof,
        told=told,
        verdict=verdict,
        sign=_VERDICTS.get(verdict, ""),
        said=account.verdict(report, chosen=told.chosen).partition(": ")[2] if not told.verdict else "",
        reasons=_reasons(report, told),
        divergence=parted,
        divergence_at=module,
        candidates=list(account.candidates(report)),
        accounting=_accounting(report, told.tensors),
        statuses=STATUSES,
        trees=[
            ("s", "Source", told.ref, tree(source, None)),
            ("t", "Target", told.target, tree(target, module)),
        ],
        plan=_plan(report),
        plots=[plot(depth, report) for depth in told.depth],
        said_of=list(account.said(proof)) if proof is not None else [],
        symmetries=folded([*report.plan.symmetries]),
        notes=list(dict.fromkeys([*report.plan.notes, *told.notes])),
    )


def _reasons(report: surgery.Report, told: Told) -> list[str]:
    """Why the answer is what it is, but for the first divergence, which has a place of its own."""
    if told.message:
        return [told.message]
    return [line.strip() for line in account.reasons(report) if not line.startswith("first divergence")]


@cache
def _part(name: str) -> str:
    return (files("zoo") / "page" / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["amount"] = amount
    made.filters["power"] = _power
    return made.from_string(_part("report.html"))


def _power(value: float) -> str:
    if not math.isfinite(value):
        return "cannot be compared"
    return f"{value:.1e}" if value else "0"


def _json(thing: object) -> str:
    """For a script element: no character in it can end the element."""
    text = json.dumps(thing, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ---------------------------------------------------------------------------------------------------- both sides


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _target(report: surgery.Report) -> list[dict[str, Any]]:
    planned = report.plan.by_target
    found = []
    for row in report.rows:
        known = planned.get(row.name)
        if row.status == "dropped" or known is None:
            continue
        found.append(
            {
                "name": row.name,
                "status": account.status_of(row),
                "kind": row.kind,
                "type": f"{known.dtype} {_shape(known.shape)}",
                "expr": row.expr,
                "note": row.note,
                "evidence": known.evidence,
                "not": list(known.alternatives),
                "sources": row.sources,
            }
        )
    return found


def _source(report: surgery.Report, tensors: Mapping[str, TensorInfo]) -> list[dict[str, Any]]:
    dropped = {drop.source: drop.reason for drop in report.plan.dropped}
    used = set(report.plan.used)
    return [
        {
            "name": name,
            "status": "used" if name in used else "dropped",
            "type": f"{info.dtype} {_shape(info.shape)}",
            "note": dropped.get(name, "" if name in used else "the plan says nothing of it"),
            "to": [],
        }
        for name, info in tensors.items()
    ]


def _accounting(report: surgery.Report, tensors: Mapping[str, TensorInfo]) -> list[tuple[str, int, int, str]]:
    """(status, tensors, elements, what it means), for those that occur."""
    planned = report.plan.by_target
    count: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for row in report.rows:
        status = account.status_of(row)
        count[status] += 1
        shape = planned[row.name].shape if row.name in planned else ()
        if status == "dropped":
            shape = tensors[row.name].shape if row.name in tensors else (0,)
        elements[status] += math.prod(shape)
    return [(name, count[name], elements[name], STATUSES[name][1]) for name in STATUSES if count[name]]


# ---------------------------------------------------------------------------------------------------- trees


@dataclass
class Item:
    """A line of a tree: a tensor (its number), or a group with how its tensors ended."""

    label: str
    path: str
    level: int
    tensor: int | None = None
    type: str = ""
    status: str = ""
    open: bool = False
    shown: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    children: list[Item] = field(default_factory=list)

    @property
    def told(self) -> str:
        """ "12 filled, 2 new"."""
        return ", ".join(f"{n} {status}" for status, n in self.counts.items())


def tree(tensors: Sequence[Mapping[str, Any]], module: str | None) -> list[Item]:
    """The lines of a tree, groups before what is in them. Repeated blocks are closed at first, and what leads to
    `module` is open; of a large model only the upper levels are."""
    root = Item("", "", 0)
    groups: dict[str, Item] = {"": root}
    for number, tensor in enumerate(tensors):
        *words, leaf = str(tensor["name"]).split(".")
        path, parent = "", root
        for word in words:
            path = f"{path}.{word}" if parent is not root else word
            if path not in groups:
                groups[path] = Item(word, path, 0)
                parent.children.append(groups[path])
            parent = groups[path]
        item = Item(leaf, str(tensor["name"]), 0, number, str(tensor["type"]), str(tensor["status"]))
        parent.children.append(item)
    for child in root.children:
        _joined(child)
        _counted(child)
    leading = {path for path in groups if module is not None and (module == path or module.startswith(f"{path}."))}
    deepest = 99
    while True:
        found = list(_lines(root.children, 1, True, leading, deepest))
        if deepest == 0 or sum(item.shown for item in found) <= _SHOWN:
            return found
        deepest = min(deepest, max(item.level for item in found)) - 1


def _joined(item: Item) -> None:
    """A group with one group in it reads better as one: `encoder.layer`."""
    while len(item.children) == 1 and item.children[0].tensor is None and not item.children[0].label.isdigit():
        child = item.children[0]
        item.label, item.path, item.children = f"{item.label}.{child.label}", child.path, child.children
    for child in item.children:
        _joined(child)


def _counted(item: Item) -> Counter[str]:
    if item.tensor is not None:
        return Counter([item.status])
    for child in item.children:
        item.counts.update(_counted(child))
    return item.counts


def _lines(items: Iterable[Item], level: int, shown: bool, leading: set[str], deepest: int) -> Iterator[Item]:
    for item in items:
        item.level, item.shown = level, shown
        blocks = item.label.isdigit()
        item.open = item.tensor is None and ((level <= deepest and not blocks) or item.path in leading)
        yield item
        yield from _lines(item.children, level + 1, shown and item.open, leading, deepest)


# ---------------------------------------------------------------------------------------------------- plan


def _plan(report: surgery.Report) -> tuple[list[tuple[str, str, str, str, str]], str]:
    """(name, type, status, what it is made of, evidence) with repeated blocks in one row; and what the indices run
    through."""
    from surgery.fold import Line, Ranges, fold, spell_range

    planned = report.plan.by_target
    lines = []
    for row in report.rows:
        known = planned.get(row.name)
        type = f"{known.dtype} {_shape(known.shape)}" if known is not None else ""
        lines.append(Line(row.name, (row.expr or row.note,), (type, account.status_of(row))))
    ranges = Ranges()
    rows = []
    for line in fold(lines, ranges):
        assert isinstance(line.rest, tuple)
        evidence = planned[line.name].evidence if line.name in planned else ""  # of folded rows, each has its own
        rows.append((line.name, str(line.rest[0]), str(line.rest[1]), account.braced(line.texts[0]), evidence))
    used = [name for name in ranges.numbers if any(f"{{{name}" in cell for row in rows for cell in row)]
    return rows, ", ".join(f"{name} = {spell_range(ranges.numbers[name])}" for name in used)


# ---------------------------------------------------------------------------------------------------- plots

_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BOTTOM = 720.0, 250.0, 62.0, 12.0, 14.0, 26.0
_LEAST = -17  # the exponent at which nothing is left; an exact zero is drawn there


@dataclass(frozen=True)
class Dot:
    """A point of a plot."""

    x: float
    y: float
    title: str
    over: bool


@dataclass(frozen=True)
class Plot:
    """Residual by depth, as coordinates."""

    depth: Depth
    gate: float | None
    gate_y: float
    ticks: tuple[tuple[float, str], ...]
    dots: tuple[Dot, ...]
    line: str
    own: str
    parted: Dot | None
    unpaired: int
    worst: float
    width: float = _WIDE
    height: float = _HIGH
    left: float = _LEFT
    right: float = _WIDE - _RIGHT
    bottom: float = _HIGH - _BOTTOM


def plot(depth: Depth, report: surgery.Report) -> Plot:
    """The coordinates of a pass: x is the order in which modules finish, y the residual, by powers of ten."""
    ran = {p.name: p.gate for p in report.proof.passes} if report.proof is not None else {}
    gate = ran.get(depth.name) or None
    count = max(len(depth.modules), 2)
    top = max([0, *(_exponent(p.residual) for p in depth.points if math.isfinite(p.residual))])
    top = math.ceil(top)

    def x(at: int) -> float:
        return round(_LEFT + (_WIDE - _LEFT - _RIGHT) * at / (count - 1), 1)

    def y(value: float) -> float:
        share = (min(_exponent(value), top) - _LEAST) / (top - _LEAST)
        return round(_HIGH - _BOTTOM - share * (_HIGH - _BOTTOM - _TOP), 1)

    dots = [
        Dot(
            x(p.at),
            y(p.residual),
            f"{p.module or 'the whole module'}: {_power(p.residual)}, against {p.reference or 'the whole reference'}",
            gate is not None and not p.residual <= gate,
        )
        for p in depth.points
    ]
    parted = None
    found = report.proof.divergence if report.proof is not None else None
    if found is not None and found.target_module in depth.modules:
        at = depth.modules.index(found.target_module)
        known = next((p.residual for p in depth.points if p.at == at), found.residual)
        parted = Dot(x(at), y(known), f"{found.target_module or 'the whole module'}: the first divergence", True)
    own = [f"{x(p.at)},{y(p.own)}" for p in depth.points if p.own > 0]
    return Plot(
        depth,
        gate,
        y(gate) if gate else 0.0,
        (*((y(10.0**power), f"1e{power}") for power in range(-12, top + 1, 4)), (y(0.0), "0")),
        tuple(dots),
        " ".join(f"{dot.x},{dot.y}" for dot in dots),
        " ".join(own) if len(own) > 1 else "",
        parted,
        len(depth.modules) - len(depth.points),
        max((p.residual for p in depth.points), default=0.0),
    )


def _exponent(value: float) -> float:
    if value == 0.0:
        return _LEAST
    return max(_LEAST, math.log10(value)) if math.isfinite(value) else math.inf
