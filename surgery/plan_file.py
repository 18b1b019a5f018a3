"""The plan as a file: TOML that reads well, survives hands, and gives back exactly the plan that was saved.

    [rows]
    "blocks.{i}.in_proj_weight" = "cat(h.{i}.q.weight, h.{i}.k.weight, h.{i}.v.weight, axis=0)"

A section for each way in which a tensor can end, then what is known of the rows ([evidence], [alternatives], [remarks])
and [shapes], which lists every target tensor in order. `surgery.fold` writes repeated blocks once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from surgery.errors import PlanError
from surgery.expr import Expr, Name, fill, indices, names, parse, rename, substitute, walk
from surgery.fold import Line, Ranges, Values, expand, fold, fold_in_order, parse_range, spell_range
from surgery.ops import did_you_mean
from surgery.plan import STALE, Dropped, Plan, Row, Stamp, Status

VERSION = 1

_HEAD = """\
# Where each tensor of the target comes from: "target tensor" = "expression over source tensors".
# {i} runs through its range, under [ranges]. Edit what you like: the verdict then reads "stale" until it is verified.
"""

# Sections of target tensors, by the status they give: in the file's order, with what a reader is told.
_STATUS = {
    "rows": (Status.FILLED, ""),
    "synthesised": (Status.SYNTHESISED, "Made by a rule: the source holds no such tensor."),
    "tied": (Status.TIED, "One tensor with another of the target."),
    "constant": (Status.CONSTANT, "The target's own value, right as it is; and why."),
    "kept": (Status.KEPT, "Loaded before, by an earlier graft."),
    "new": (Status.NEW, "Freshly initialised; and why."),
}
_ABOUT = {
    "dropped": "Source tensors that nothing uses, and why.",
    "aside": "What new tensors would be but for a rule; the rest was proven with it in place.",
    "evidence": "Why each row is as it is.",
    "alternatives": "What was tried and refuted.",
    "remarks": "",
    "shapes": "Every target tensor, in order.",
}
_TEXTS = ("verdict", "verdict_for", "diagnosis")
_LISTS = ("proven", "symmetries", "notes", "rules", "allow_different")
_PLAIN = {"version", "fold", "candidate", "source", "target", "ranges", *_TEXTS, *_LISTS}
_STAMP = {"description", "structure", "revision", "files"}
_SHAPE = re.compile(r"(\S*) \[((?:\d+(?:, *\d+)*)?)\]", re.ASCII)

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------- writing


def dumps(plan: Plan) -> str:
    """The plan as TOML."""
    if not any(indices(text) for text in _all_names(plan)):
        text = _HEAD + "".join(_document(plan, "", folded=True))
        with contextlib.suppress(PlanError):
            if loads(text) == plan:
                return text
    # Names that look like indices, or a fold that would not give back the same rows: each row is written out.
    return _HEAD + "".join(_document(plan, "", folded=False))


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes the file whole or not at all. Where the file holds the same rows already, only what is said of them is
    written anew, so that a person's comments and their own layout stay."""
    target = Path(path)
    text = _updated(plan, target) or dumps(plan)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise PlanError(
            f"{target}: a name cannot be written as UTF-8: {error.object[error.start : error.end]!r}"
        ) from None
    beside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            file.write(data)
        os.replace(beside, target)
    except OSError as error:
        raise PlanError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def _updated(plan: Plan, path: Path) -> str | None:
    """The text of the file with the plan's header, where the file holds the same rows; None where it does not."""
    try:
        text = path.read_bytes().decode()
        old = loads(text)
    except (OSError, UnicodeDecodeError, PlanError):
        return None
    if plan.candidates or replace(old, **_said(plan)) != plan:
        return None
    import tomlkit

    document = tomlkit.parse(text)
    for key, value in _said(plan).items():
        written = list(value) if isinstance(value, tuple) else value
        if written:
            document[key] = tomlkit.item(written)
            if isinstance(written, list):
                document[key].multiline(True)
        elif key in document:
            del document[key]
    result = tomlkit.dumps(document)
    with contextlib.suppress(PlanError):
        if loads(result) == plan:
            return result
    return None


def _said(plan: Plan) -> dict[str, Any]:
    return {
        key: getattr(plan, key)
        for key in ("verdict", "proven", "verdict_for", "symmetries", "notes", "diagnosis", "rules", "allow_different")
    }


def _all_names(plan: Plan) -> Iterator[str]:
    for row in plan.rows:
        yield row.target
        yield from row.sources
        yield from row.set_aside
        yield row.tied_to or ""
    yield from (drop.source for drop in plan.dropped)
    for candidate in plan.candidates:
        yield from _all_names(candidate)


def _document(plan: Plan, prefix: str, *, folded: bool) -> Iterator[str]:
    """The plan as a table; `prefix` is that of a candidate's sections."""
    yield f"version = {VERSION}\n"
    if not folded:
        yield "fold = false  # names are written out, and braces in them are plain characters\n"
    for key in ("verdict", "proven", "verdict_for", "diagnosis", "rules", "allow_different", "symmetries", "notes"):
        value = getattr(plan, key)
        if value:
            yield f"{key} = {_array(value) if isinstance(value, tuple) else _string(value)}\n"
    yield from _stamp(f"{prefix}source", plan.source)
    yield from _stamp(f"{prefix}target", plan.target)
    ranges = Ranges()
    sections = "".join(_sections(plan, prefix, ranges if folded else None))
    if ranges.numbers:
        yield f"\n[{prefix}ranges]\n"
        yield from (f"{name} = {_string(spell_range(numbers))}\n" for name, numbers in ranges.numbers.items())
    yield sections
    for candidate in plan.candidates:
        yield f"\n[[{prefix}candidate]]\n"
        yield from _document(candidate, f"{prefix}candidate.", folded=folded)


def _stamp(name: str, stamp: Stamp) -> Iterator[str]:
    if stamp == Stamp():
        return
    yield f"\n[{name}]\n"
    for key in ("description", "revision", "structure"):
        value = getattr(stamp, key)
        if value or (key == "revision" and value is not None):
            yield f"{key} = {_string(value)}\n"
    if stamp.files:
        yield f"\n[{name}.files]\n"
        yield from (f"{_key(file)} = {_string(digest)}\n" for file, digest in stamp.files.items())


def _sections(plan: Plan, prefix: str, ranges: Ranges | None) -> Iterator[str]:
    for name, (status, about) in _STATUS.items():
        rows = [row for row in plan.rows if row.status is status]
        if not rows:
            continue
        yield _title(prefix + name, about)
        if status in (Status.FILLED, Status.SYNTHESISED):
            exprs = [(row.target, row.expr) for row in rows if row.expr is not None]
            yield from _fold_exprs(exprs, ranges)
        else:
            texts = [(row.target, (row.note if row.tied_to is None else row.tied_to,)) for row in rows]
            yield from _fold_texts(texts, ranges, _string_of_one)
    if plan.dropped:
        yield _title(prefix + "dropped", _ABOUT["dropped"])
        reasons = [(drop.source, drop.reason) for drop in plan.dropped]
        for source, reason in fold_in_order(reasons, ranges) if ranges else reasons:
            yield f"{_key(source)} = {_string(reason)}\n"
    asides = [(row.target, row.aside) for row in plan.rows if row.aside is not None]
    if asides:
        yield _title(prefix + "aside", _ABOUT["aside"])
        yield from _fold_exprs(asides, ranges)
    about_rows: dict[str, list[tuple[str, tuple[str, ...]]]] = {
        "evidence": [(row.target, (row.evidence,)) for row in plan.rows if row.evidence],
        "alternatives": [(row.target, row.alternatives) for row in plan.rows if row.alternatives],
        "remarks": [(row.target, (row.note,)) for row in plan.rows if row.note and _has_own_value(row.status)],
    }
    for name, entries in about_rows.items():
        if entries:
            yield _title(prefix + name, _ABOUT[name])
            yield from _fold_texts(entries, ranges, _array if name == "alternatives" else _string_of_one)
    if plan.rows:
        yield _title(prefix + "shapes", _ABOUT["shapes"])
        shapes = [(row.target, f"{row.dtype} [{', '.join(map(str, row.shape))}]") for row in plan.rows]
        for target, shape in fold_in_order(shapes, ranges) if ranges else shapes:
            yield f"{_key(target)} = {_string(shape)}\n"


def _has_own_value(status: Status) -> bool:
    """Whether the section of this status holds something other than the note."""
    return status in (Status.FILLED, Status.SYNTHESISED, Status.TIED)


def _fold_exprs(exprs: list[tuple[str, Expr]], ranges: Ranges | None) -> Iterator[str]:
    if ranges is None:
        lines = [(target, expr) for target, expr in exprs]
    else:
        lines = []
        for line in fold([Line(target, _leaves(expr), _Frame(expr)) for target, expr in exprs], ranges):
            assert isinstance(line.rest, _Frame)
            lines.append((line.name, line.rest.filled(line.texts)))
    yield from (f"{_key(target)} = {_string(str(expr))}\n" for target, expr in lines)


def _leaves(expr: Expr) -> tuple[str, ...]:
    return tuple(part.name for part in walk(expr) if isinstance(part, Name))


class _Frame:
    """An expression without its names: equal where ops and parameters are."""

    def __init__(self, expr: Expr) -> None:
        self.expr = rename(expr, lambda _: "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frame) and self.expr == other.expr

    def __hash__(self) -> int:
        return hash(self.expr)

    def filled(self, leaves: tuple[str, ...]) -> Expr:
        rest = iter(leaves)
        return rename(self.expr, lambda _: next(rest))


def _fold_texts(
    entries: Sequence[tuple[str, tuple[str, ...]]], ranges: Ranges | None, written: Callable[[tuple[str, ...]], str]
) -> Iterator[str]:
    lines = [Line(name, texts, None) for name, texts in entries]
    for line in fold(lines, ranges) if ranges else lines:
        yield f"{_key(line.name)} = {written(line.texts)}\n"


def _title(name: str, about: str) -> str:
    return f"\n[{name}]{f'  # {about}' if about else ''}\n"


def _string(text: str) -> str:
    """A TOML string: in single quotes where that spares escapes."""
    if ('"' in text or "\\" in text) and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _string_of_one(texts: tuple[str, ...]) -> str:
    return _string(texts[0])


def _array(texts: Iterable[str]) -> str:
    return "[\n" + "".join(f"    {_string(text)},\n" for text in texts) + "]"


def _key(name: str) -> str:
    return (
        name
        if re.fullmatch(r"[A-Za-z0-9_-]+", name)
        else json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")
    )


# ---------------------------------------------------------------------------------------------- reading


def load(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan file; what is wrong with it is a PlanError that names file, section and line."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise PlanError(f"the plan {os.fspath(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(
            f"{os.fspath(path)} is not a plan: it is not text in UTF-8", hint="Name the .graft.toml file."
        ) from None
    try:
        return loads(text)
    except PlanError as error:
        raise PlanError(f"{os.fspath(path)}: {error}", hint=error.hint) from None


def loads(text: str) -> Plan:
    """The plan that the text holds."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and what tomllib lets through of ints and depth
        hint = "Names and expressions stand in double quotes; a name that holds quotes in single ones."
        raise PlanError(f"not TOML: {error}", hint=hint) from None
    return _plan(document, "")


def _plan(document: dict[str, Any], prefix: str) -> Plan:
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise PlanError(
            "it states no version, so it is not a plan" if version is None else f"version {version!r} is not known",
            hint=f"A plan of this release begins with version = {VERSION}.",
        )
    known = {*_PLAIN, *_STATUS, *_ABOUT}
    for key in document:
        if key not in known:
            near = did_you_mean(key, known)
            what = f"section [{prefix}{key}]" if isinstance(document[key], dict) else f"key {key}"
            raise PlanError(f"unknown {what}{near}", hint=f"There are {', '.join(sorted(known))}.")
    reader = _Reader(document, prefix)
    rows = reader.rows()
    dropped = tuple(Dropped(name, reason) for name, reason in reader.texts("dropped").items())
    candidates = document.get("candidate", [])
    if not isinstance(candidates, list) or not all(isinstance(candidate, dict) for candidate in candidates):
        raise PlanError(f"candidates are tables: [[{prefix}candidate]]")
    said: dict[str, Any] = {key: reader.text(key) for key in _TEXTS} | {key: reader.list(key) for key in _LISTS}
    if said["verdict"] is not None and said["verdict_for"] is None:
        said["verdict"] = STALE  # nothing says what it was given for
    return Plan(
        rows=rows,
        dropped=dropped,
        source=reader.stamp("source"),
        target=reader.stamp("target"),
        candidates=tuple(_plan(candidate, f"{prefix}candidate.") for candidate in candidates),
        **{**said, "diagnosis": said["diagnosis"] or ""},
    )


class _Reader:
    """Takes one document apart, with messages that say where."""

    def __init__(self, document: dict[str, Any], prefix: str) -> None:
        self.document, self.prefix = document, prefix
        self.folds = document.get("fold", True) is not False
        stated = self.table("ranges")
        self.ranges: dict[str, tuple[int, ...]] = {}
        for name, value in stated.items():
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if isinstance(value, list):
                value = ", ".join(map(str, value))
            if not isinstance(value, str):
                raise PlanError(f"[{prefix}ranges] {name} is no range", hint=f'Write it as {name} = "0..11, 13".')
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise PlanError(f"[{prefix}ranges] {name!r} cannot name an index: letters, digits and _ do")
            self.ranges[name] = parse_range(name, value)

    def where(self, section: str, name: str = "") -> str:
        return f"[{self.prefix}{section}]" + (f" {json.dumps(name, ensure_ascii=False)}" if name else "")

    def table(self, section: str) -> dict[str, Any]:
        table = self.document.get(section, {})
        if not isinstance(table, dict):
            raise PlanError(f"{section} is a section: [{self.prefix}{section}]")
        return table

    def text(self, key: str) -> str | None:
        value = self.document.get(key)
        if value is not None and not isinstance(value, str):
            raise PlanError(f"{key} is a text in quotes, not {value!r}")
        return value

    def list(self, key: str) -> tuple[str, ...]:
        value = self.document.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise PlanError(f"{key} is a list of texts, not {value!r}")
        return tuple(value)

    def stamp(self, section: str) -> Stamp:
        table = self.table(section)
        files = table.get("files", {})
        texts = {key: value for key, value in table.items() if key != "files"}
        for key, value in texts.items():
            if key not in _STAMP:
                raise PlanError(f"{self.where(section)} has no key {key}{did_you_mean(key, _STAMP)}")
            if not isinstance(value, str):
                raise PlanError(f"{self.where(section, key)} is a text in quotes, not {value!r}")
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise PlanError(f'{self.where(section)} files is a table of "file" = "sha256"')
        return Stamp(files=files, **texts)

    def lines(self, section: str, type_: type[T]) -> Iterator[tuple[str, T, Values, str]]:
        """Each name with its value, the numbers of its indices, and the line it comes from."""
        table = self.table(section)
        for name, value in table.items():
            if isinstance(value, dict):
                first = next(iter(value), "...")
                raise PlanError(
                    f"{self.where(section)} {name} is a table",
                    hint=f'A name with dots stands in quotes: "{name}.{first}" = ...',
                )
            if not isinstance(value, type_):
                wanted = "a text in quotes" if type_ is str else "a list of texts"
                raise PlanError(f"{self.where(section, name)} is {wanted}, not {value!r}")
        if not self.folds:
            yield from ((name, value, {}, name) for name, value in table.items())
            return
        seen: dict[str, str] = {}
        entries = [(name, (value, name)) for name, value in table.items()]
        try:
            for name, (value, line), numbers in expand(entries, self.ranges):
                if name in seen:
                    raise PlanError(
                        f'{name} is meant twice: by "{seen[name]}" and by "{line}"',
                        hint='Take its number out of a range, under a letter of its own: k = "0..2, 4..11".',
                    )
                seen[name] = line
                yield name, value, numbers, line
        except PlanError as error:
            raise PlanError(f"{self.where(section)}: {error}", hint=error.hint) from None

    def texts(self, section: str) -> dict[str, str]:
        return {name: fill(value, numbers) for name, value, numbers, _ in self.lines(section, str)}

    def exprs(self, section: str) -> dict[str, Expr]:
        parsed: dict[str, Expr] = {}
        found: dict[str, Expr] = {}
        for name, value, numbers, line in self.lines(section, str):
            try:
                if line not in parsed:
                    parsed[line] = parse(value)
                    loose = [i for part in names(parsed[line]) for i in indices(part) if i not in indices(line)]
                    if loose and self.folds:
                        raise PlanError(f"the target name has no {{{loose[0]}}}, so it stands for no number here")
                found[name] = substitute(parsed[line], numbers) if numbers else parsed[line]
                if numbers and (odd := re.search(r"\{[^{}]*\}", " ".join(names(found[name])))):
                    raise PlanError(
                        f"{odd[0]} does not read as an index",
                        hint="An index is written {i}, {i+1}, {2*i} or {2*i-1}.",
                    )
            except PlanError as error:
                raise PlanError(f"{self.where(section, line)}: {error}", hint=error.hint) from None
        return found

    def rows(self) -> tuple[Row, ...]:
        found: dict[str, dict[str, Any]] = {}
        for section, (status, _) in _STATUS.items():
            entries: Mapping[str, Any]
            if status in (Status.FILLED, Status.SYNTHESISED):
                entries, key = self.exprs(section), "expr"
            else:
                entries, key = self.texts(section), "tied_to" if status is Status.TIED else "note"
            for name, value in entries.items():
                if name in found:
                    raise PlanError(f"{name} stands in {self.where(section)} and under {found[name]['status']} tensors")
                found[name] = {"status": status, key: value}
        self._attach(found, "aside", "aside", self.exprs("aside"))
        self._attach(found, "evidence", "evidence", self.texts("evidence"))
        self._attach(found, "remarks", "note", self.texts("remarks"))
        several: dict[str, tuple[str, ...]] = {}
        for name, texts, numbers, line in self.lines("alternatives", list):
            if not all(isinstance(text, str) for text in texts):
                raise PlanError(f"{self.where('alternatives', line)} is a list of texts")
            several[name] = tuple(fill(text, numbers) for text in texts)
        self._attach(found, "alternatives", "alternatives", several)
        rows = []
        for name, value, _, line in self.lines("shapes", str):
            matched = _SHAPE.fullmatch(value)
            if matched is None:
                raise PlanError(f'{self.where("shapes", line)} is written as "F32 [768, 3072]", not "{value}"')
            if name not in found:
                raise PlanError(
                    f"{name} has a shape and no row{did_you_mean(name, set(found))}",
                    hint=f"Add it to one of {', '.join(f'[{section}]' for section in _STATUS)}.",
                )
            shape = tuple(int(length) for length in matched[2].split(",")) if matched[2] else ()
            rows.append(Row(name, shape=shape, dtype=matched[1], **{"expr": None, **found.pop(name)}))
        if found:
            name = next(iter(found))
            raise PlanError(
                f"{name} has a row and no shape{did_you_mean(name, {row.target for row in rows})}",
                hint=f'If the target has it, add it to [shapes]: "{name}" = "F32 [768, 3072]".',
            )
        return tuple(rows)

    def _attach(self, found: dict[str, dict[str, Any]], section: str, key: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in found:
                raise PlanError(f"{self.where(section)} speaks of {name}, which has no row")
            if key in found[name]:
                raise PlanError(f"{self.where(section)} speaks of {name}, whose own line says it: put it there")
            found[name][key] = value
