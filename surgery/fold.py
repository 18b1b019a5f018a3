"""Repeated blocks, written once: "h.0.w", "h.1.w" ... as "h.{i}.w" with the range of i stated, and back.

A number folds where it stands as a whole piece of a name ("h.0.w", "layer_0/w", not "conv1.w"). Both ways of folding
are exact: what they give expands to the entries that went in. `fold` looks for few lines and may move them; it is for
sections that are looked up by name. `fold_in_order` keeps the order too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

from surgery.errors import PlanError
from surgery.expr import fill, indices

V = TypeVar("V")
Values: TypeAlias = dict[str, int]

_NUMBER = re.compile(r"(?<![A-Za-z0-9{])(0|[1-9][0-9]{0,8})(?![A-Za-z0-9}])")
_LETTERS = "ijkmnpqrstuvwxyz"  # l and o are left out: they read as 1 and 0
_MOST = 1_000_000  # entries that one line may stand for: a slip of the keyboard must not fill the memory


@dataclass
class Ranges:
    """The index variables of a file, each with the numbers it runs through, in order."""

    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def name(self, numbers: tuple[int, ...], taken: Iterable[str]) -> str:
        """A variable that runs through these numbers and is not among those taken: a known one, else a new one."""
        for name, known in self.numbers.items():
            if known == numbers and name not in taken:
                return name
        new = next(name for name in _letters() if name not in self.numbers)
        self.numbers[new] = numbers
        return new


def _letters() -> Iterator[str]:
    yield from _LETTERS
    turn = 1
    while True:
        yield from (f"{letter}{turn}" for letter in _LETTERS)
        turn += 1


def spell_range(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 3, 7) as "0..3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def parse_range(name: str, text: str) -> tuple[int, ...]:
    """ "0..3, 7" as (0, 1, 2, 3, 7): numbers and runs, both ends included, each number once."""
    numbers: list[int] = []
    for piece in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:\.\.\s*([0-9]{1,9})\s*)?", piece)
        if found is None:
            raise PlanError(f'the range of {name}, "{text}", does not read', hint=f'Write it as {name} = "0..11, 13".')
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= _MOST:
            raise PlanError(f'the range of {name}, "{text}", is empty or far too long at {piece.strip()}')
        numbers.extend(range(first, last + 1))
    if len(set(numbers)) != len(numbers):
        raise PlanError(f'the range of {name}, "{text}", holds a number twice')
    return tuple(numbers)


def expand(entries: Iterable[tuple[str, V]], ranges: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, V, Values]]:
    """Each name with its indices filled in, the value of its line, and the numbers that its indices stand for.

    Lines that follow each other and share everything up to their first index are a block: all of them with 0, then all
    with 1, and so on.
    """
    whole = list(entries)
    for name, _ in whole:
        size = 1
        for index in indices(name):
            if index not in ranges:
                raise PlanError(
                    f'no range is stated for {{{index}}} in "{name}"',
                    hint=f'Add it under [ranges]: {index} = "0..11".',
                )
            size *= len(ranges[index])
        if size > _MOST:
            raise PlanError(f'"{name}" stands for {size} tensors; no model has so many')
    yield from _expand([(name, value, {}) for name, value in whole], ranges)


def _expand(
    entries: list[tuple[str, V, Values]], ranges: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, V, Values]]:
    at = 0
    while at < len(entries):
        head = _head(entries[at][0])
        if head is None:
            yield entries[at]
            at += 1
            continue
        stop = at
        while stop < len(entries) and _head(entries[stop][0]) == head:
            stop += 1
        (index,) = indices(head)
        for number in ranges[index]:
            filled = [(fill(n, {index: number}), v, {**known, index: number}) for n, v, known in entries[at:stop]]
            yield from _expand(filled, ranges)
        at = stop


def _head(name: str) -> str | None:
    """The name up to and including its first index."""
    found = indices(name)
    if not found:
        return None
    end = re.search(r"\{(?:\d{1,9}\*)?" + found[0] + r"(?:[+-]\d{1,9})?\}", name, re.ASCII)
    assert end is not None
    return name[: end.end()]


# ---------------------------------------------------------------------------------------------- in order


class _Slot(NamedTuple):
    numbers: tuple[int, ...]


_Template: TypeAlias = tuple[str | _Slot, ...]


def fold_in_order(entries: Sequence[tuple[str, V]], ranges: Ranges) -> list[tuple[str, V]]:
    """Folds blocks that follow each other with equal contents. Expanding gives the entries back in their order."""
    items: list[tuple[list[str], Hashable]] = []
    for number, (name, value) in enumerate(entries):
        # a text that looks like an index would be taken for one, and a value that does must not be shared
        items.append(([name], (number,)) if indices(name) else (_NUMBER.split(name), _key(value, number)))
    by_key = {_key(value, number): value for number, (_, value) in enumerate(entries)}
    by_key |= {(number,): value for number, (_, value) in enumerate(entries)}
    return [(_write(template, ranges), by_key[key]) for template, key in _in_order(items)]


def _key(value: object, number: int) -> Hashable:
    text = value if isinstance(value, str) else repr(value)
    return ("unlike", number) if indices(text) else ("like", text)


def _in_order(items: list[tuple[list[str], Hashable]]) -> list[tuple[_Template, Hashable]]:
    result: list[tuple[_Template, Hashable]] = []
    at, before = 0, None
    while at < len(items):
        pieces, key = items[at]
        if len(pieces) == 1:
            result.append(((pieces[0],), key))
            at, before = at + 1, None
            continue
        prefix = pieces[0]
        blocks: list[tuple[int, list[tuple[list[str], Hashable]]]] = []
        while at < len(items) and len(items[at][0]) > 1 and items[at][0][0] == prefix:
            number, rest = int(items[at][0][1]), (items[at][0][2:], items[at][1])
            if blocks and blocks[-1][0] == number:
                blocks[-1][1].append(rest)
            else:
                blocks.append((number, [rest]))
            at += 1
        folded = [(number, _in_order(block)) for number, block in blocks]
        first = 0
        while first < len(folded):
            numbers, inner = [folded[first][0]], folded[first][1]
            stop = first + 1
            while stop < len(folded) and folded[stop][1] == inner and folded[stop][0] not in numbers:
                numbers.append(folded[stop][0])
                stop += 1
            # two neighbours with one head would be read as one block
            slot = (prefix, tuple(numbers))
            if len(numbers) > 1 and slot != before:
                result += [((prefix, _Slot(tuple(numbers)), *template), key) for template, key in inner]
            else:
                result += [((prefix, str(number), *template), key) for number in numbers for template, key in inner]
            before = slot
            first = stop
    return result


def _write(template: _Template, ranges: Ranges) -> str:
    taken: list[str] = []
    text = ""
    for piece in template:
        if isinstance(piece, _Slot):
            taken.append(ranges.name(piece.numbers, taken))
            text += f"{{{taken[-1]}}}"
        else:
            text += piece
    return text


# ---------------------------------------------------------------------------------------------- fewest lines


class Line(NamedTuple):
    """An entry taken apart: its name, the texts of its value whose numbers may follow those of the name, all else."""

    name: str
    texts: tuple[str, ...]
    rest: Hashable


class _Member(NamedTuple):
    at: int  # where it stood
    line: Line
    key: tuple[int, ...]  # the numbers of its name
    values: tuple[int, ...]  # the numbers of its texts, one after the other


class _Follows(NamedTuple):
    """A number that is reckoned from the number in one slot of the name: factor * number + offset."""

    slot: int
    factor: int
    offset: int


def fold(lines: Sequence[Line], ranges: Ranges) -> list[Line]:
    """The lines with repeated ones folded, each where the first of those it stands for stood."""
    groups: dict[Hashable, list[_Member]] = {}
    done: list[tuple[int, Line]] = []
    for at, line in enumerate(lines):
        if any(indices(text) for text in (line.name, *line.texts)):
            done.append((at, line))
            continue
        pieces = [_NUMBER.split(text) for text in (line.name, *line.texts)]
        numbers = [tuple(map(int, piece[1::2])) for piece in pieces]
        skeleton = (tuple(tuple(piece[::2]) for piece in pieces), line.rest)
        flat = tuple(number for text in numbers[1:] for number in text)
        groups.setdefault(skeleton, []).append(_Member(at, line, numbers[0], flat))
    for group in groups.values():
        done.extend(_rectangles(group, ranges))
    return [line for _, line in sorted(done, key=lambda item: item[0])]


def folded(sentences: Sequence[str]) -> list[str]:
    """The sentences, those that are the same for each of repeated blocks as one, with the range stated."""
    ranges = Ranges()
    found = []
    for line in fold([Line(sentence, (), None) for sentence in sentences], ranges):
        used = [name for name in ranges.numbers if f"{{{name}}}" in line.name]
        found.append(line.name + "".join(f" ({name} = {spell_range(ranges.numbers[name])})" for name in used))
    return found


def _rectangles(members: list[_Member], ranges: Ranges) -> Iterator[tuple[int, Line]]:
    """Covers the members with lines that stand for every combination of the numbers of their indices."""
    columns = list(zip(*(member.key for member in members), strict=True))
    varying = [slot for slot, column in enumerate(columns) if len(set(column)) > 1]
    if len(members) == 1 or not varying:
        yield from ((member.at, member.line) for member in members)
        return
    size = 1
    for slot in varying:
        size *= len(set(columns[slot]))
    if size != len(members):
        parts = _split_by_shape(members, varying)
    else:
        follows = [_follow(members, varying, number) for number in range(len(members[0].values))]
        if None not in follows:
            line = _fold(members, varying, [follow for follow in follows if follow is not None], ranges)
            yield min(member.at for member in members), line
            return
        parts = _split_by_values(members, varying, follows.index(None))
    for part in parts:
        yield from _rectangles(part, ranges)


def _follow(members: list[_Member], varying: list[int], number: int) -> _Follows | None:
    """How one number of the values follows from the name; None where it does not, or not readably."""
    wanted = [member.values[number] for member in members]
    if len(set(wanted)) == 1:
        return _Follows(-1, 0, wanted[0])
    for slot in varying:
        (x0, y0), *others = sorted({(m.key[slot], y) for m, y in zip(members, wanted, strict=True)})
        if not others or others[0][0] == x0:
            continue
        factor, left = divmod(others[0][1] - y0, others[0][0] - x0)
        offset = y0 - factor * x0
        if left or factor < 1 or any(factor * x + offset != y for x, y in others):
            continue
        if factor == 1 or (len(others) > 1 and factor < 10 and abs(offset) < 10):  # any two points lie on a line
            return _Follows(slot, factor, offset)
    return None


def _split_by_shape(members: list[_Member], varying: list[int]) -> list[list[_Member]]:
    """Members that do not fill a rectangle, cut along the slot that leaves the fewest pieces."""
    best: list[list[_Member]] = []
    for slot in varying:
        columns: dict[int, list[_Member]] = {}
        for member in members:
            columns.setdefault(member.key[slot], []).append(member)
        alike: dict[frozenset[tuple[int, ...]], list[_Member]] = {}
        for column in columns.values():
            shape = frozenset(member.key[:slot] + member.key[slot + 1 :] for member in column)
            alike.setdefault(shape, []).extend(column)
        parts = list(alike.values()) if len(alike) > 1 else list(columns.values())
        if not best or len(parts) < len(best):
            best = parts
    return best


def _split_by_values(members: list[_Member], varying: list[int], number: int) -> list[list[_Member]]:
    """Members whose values do not all follow from the name: the many that do, and the rest."""
    for slot in varying:
        offsets = [member.values[number] - member.key[slot] for member in members]
        common, count = Counter(offsets).most_common(1)[0]
        if count > 1 and count * 2 >= len(members):
            return [
                [member for member, offset in zip(members, offsets, strict=True) if offset == common],
                [member for member, offset in zip(members, offsets, strict=True) if offset != common],
            ]
    columns: dict[int, list[_Member]] = {}
    for member in members:
        columns.setdefault(member.key[varying[0]], []).append(member)
    return list(columns.values())


def _fold(members: list[_Member], varying: list[int], follows: list[_Follows], ranges: Ranges) -> Line:
    names: dict[int, str] = {}
    for slot in varying:
        numbers = tuple(sorted({member.key[slot] for member in members}))
        names[slot] = ranges.name(numbers, names.values())
    first = members[0]
    key = [f"{{{names[slot]}}}" if slot in names else str(number) for slot, number in enumerate(first.key)]
    reckoned = iter([_spell(follow, names) for follow in follows])
    texts = []
    for text in first.line.texts:
        pieces = _NUMBER.split(text)
        pieces[1::2] = [next(reckoned) for _ in pieces[1::2]]
        texts.append("".join(pieces))
    pieces = _NUMBER.split(first.line.name)
    pieces[1::2] = key
    return Line("".join(pieces), tuple(texts), first.line.rest)


def _spell(follow: _Follows, names: Mapping[int, str]) -> str:
    if follow.factor == 0:
        return str(follow.offset)
    factor = f"{follow.factor}*" if follow.factor > 1 else ""
    offset = f"{follow.offset:+d}" if follow.offset else ""
    return f"{{{factor}{names[follow.slot]}{offset}}}"
