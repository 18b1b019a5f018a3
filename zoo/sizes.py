"""The sizes of a model that a target may have otherwise: image, patch, vocabulary, positions, window, channels.

A plugin says of its entry which sizes a checkpoint has, which ones a target seems to want, and how the tensors are
made for them. Everything else is as for any graft: the model of those sizes is built, holds the resized tensors, and
the target is proven to compute the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, permutations, product
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

LABELS = "labels"
Value = int | tuple[int, ...]
Alike = Callable[[int], "tuple[dict[str, Tensor], dict[str, Tensor]]"]


@dataclass(frozen=True)
class Resized:
    """A model of other sizes.

    rows: {tensor of the checkpoint: the expression that makes it, as a plan spells it}, for those that change.
    config: {where in the configuration: the new value}, as in {("text_config", "vocab_size"): 50000}.
    without: tensors that only count what has another number now (position ids, causal masks): the model makes them.
    alike: seed -> (inputs of the model as it was, inputs of the resized one) that show the same thing, such as one
        picture at two sizes; what the outputs then differ by is the drift. None where nothing can be compared.
    """

    rows: Mapping[str, str]
    config: Mapping[tuple[str, ...], Any]
    alike: Alike | None = None
    without: tuple[str, ...] = ()

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with what is changed in it."""
        changed = dict(config)
        for path, value in self.config.items():
            held = changed
            for key in path[:-1]:
                held[key] = dict(held.get(key) or {})
                held = held[key]
            held[path[-1]] = value
        return changed


@dataclass(frozen=True)
class Sizes:
    """What a plugin's `sizes` gives for a checkpoint and its configuration.

    values: the sizes that the checkpoint has, by name: {"image size": (224, 224), "patch size": (16, 16)}.
    wanted: the sizes that a target could want, as changes of `values`, likeliest first. None at all where the target
        has the sizes that the checkpoint has, or none that the family knows how to give it.
    resized: all sizes -> the model that has them.
    """

    values: Mapping[str, Value]
    wanted: Callable[[Body], Iterable[Mapping[str, Value]]]
    resized: Callable[[Mapping[str, Value]], Resized]


@dataclass(frozen=True)
class Body:
    """What is seen of a target without running it.

    shapes: of all its tensors. tables: those that may be tables of rows (embeddings, bare parameters and buffers).
    said: {attribute, lower case: the whole numbers or tuples of them that its modules hold under that name}; and the
        arguments that it was made with, where they are known.
    inputs: the shapes of the entry's standard inputs ("pixel_values", "input_ids"), where an example shows them.
    labels: the names of its classes in order, where it has them as `id2label` or `classes`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tables: Mapping[str, tuple[int, ...]]
    said: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Mapping[str, tuple[int, ...]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Body:
        from torch import nn

        shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
        tables: dict[str, tuple[int, ...]] = {}
        said: dict[str, dict[Value, None]] = {}
        for name, value in (arguments or {}).items():
            plain = _plain(value)
            if plain is not None:
                said.setdefault(name.lower(), {})[plain] = None
        for path, module in model.named_modules():
            at = f"{path}." if path else ""
            library = type(module).__module__.startswith("torch.nn")
            if isinstance(module, nn.Embedding) or not library:
                own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                tables.update({at + name: tuple(t.shape) for name, t in own if t is not None and t.dim() > 1})
            for name, value in vars(module).items():
                plain = _plain(value)
                if plain is not None and not name.startswith("_"):
                    said.setdefault(name.lower(), {})[plain] = None
        words = {name: tuple(values) for name, values in said.items()}
        return cls(shapes, tables, words, dict(inputs or {}), names_of_classes(model))

    def words(self, *names: str) -> list[Value]:
        """The values that the target's modules hold under these attribute names, each once."""
        return list(dict.fromkeys(value for name in names for value in self.said.get(name, ())))

    def rows(self, width: int) -> dict[str, int]:
        """{tensor: number of rows} of the tables that have rows of this width, leading axes of 1 aside."""
        found = {}
        for name, shape in self.tables.items():
            flat = [n for n in shape[:-1] if n != 1]
            if shape[-1] == width and len(flat) == 1:
                found[name] = flat[0]
        return found

    def lengths(self, tables: Sequence[Table], width: int) -> Iterator[dict[str, int]]:
        """{size: rows} that the target's tables of this width could have in place of those of the checkpoint, likeliest
        first. Tables of equal length are one another's; names that say what a table is come before lengths that only
        follow the same order."""
        return _matched(tables, self.rows(width))


def names_of_classes(model: nn.Module) -> tuple[str, ...]:
    """What a module says its classes are, in order: `id2label` or `classes`, its own or its config's; else nothing."""
    for holder in (model, getattr(model, "config", None)):
        for word in ("id2label", "classes"):
            found = getattr(holder, word, None)
            if isinstance(found, Mapping) and found:
                found = [found[key] for key in sorted(found, key=int)]
            if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
                return tuple(found)
    return ()


def _plain(value: object) -> Value | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, tuple) and value and all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        return value
    return None


def pair(value: Value) -> tuple[int, int]:
    """A size of two sides, also where one number stands for both."""
    if isinstance(value, int):
        return value, value
    first, second = (*value, value[-1])[:2]
    return first, second


@dataclass(frozen=True)
class Table:
    """Tensors of the checkpoint whose rows are counted by one size.

    rows: how many there are; `spare` of them come before the first that is counted (RoBERTa's positions begin behind
        two). words: how people call such a table. names: the tensors, all of so many rows. key: where the configuration
        has the number (counted with the spare ones).
    more, fewer: the expressions that make {to} rows of {name}, as a plan spells them; a table without `fewer` is never
        cut, because which rows are meant would be a guess. A table with neither is only listed so that it is not taken
        for another.
    """

    size: str
    rows: int
    words: tuple[str, ...]
    spare: int = 0
    names: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    more: str = ""
    fewer: str = ""

    # The published rules, for `more` and `fewer`.
    DRAWN: ClassVar[str] = "vocab_resize({name}, to={to}, seed=0)"  # new rows around the mean of the old ones
    TILED: ClassVar[str] = "extend_pos_embed_tile({name}, to={to}, offset={spare})"
    CUT: ClassVar[str] = "slice({name}, axis=0, start=0, stop={to})"

    def resized(self, to: int) -> Iterator[tuple[str, str]]:
        """(tensor, expression) for `to` counted rows."""
        to += self.spare
        for name in self.names:
            yield name, (self.more if to > self.rows else self.fewer).format(name=name, to=to, spare=self.spare)
        for name in self.biases:
            added = f"cat({name}, zeros(shape=({to - self.rows},)), axis=0)"
            yield name, added if to > self.rows else f"slice({name}, axis=0, start=0, stop={to})"


def tables(
    width: int, found: Sequence[Table], alike: Callable[[Mapping[str, int], Mapping[str, int]], Alike | None]
) -> Sizes:
    """The sizes that are lengths of tables of one width. `alike`: (the lengths as they were, the new ones) -> what
    shows the same at both."""
    values: dict[str, Value] = {each.size: each.rows - each.spare for each in found if each.more or each.fewer}

    def wanted(body: Body) -> Iterator[Mapping[str, Value]]:
        yield from body.lengths(found, width)

    def resized(sizes: Mapping[str, Value]) -> Resized:
        rows: dict[str, str] = {}
        config: dict[tuple[str, ...], Any] = {}
        without: list[str] = []
        before = {each.size: each.rows - each.spare for each in found}
        after = dict(before)
        for each in found:
            to, own = sizes.get(each.size), before[each.size]
            after[each.size] = to if isinstance(to, int) else own
            if isinstance(to, int) and to != own:
                rows |= dict(each.resized(to))
                without += each.counts
                if each.key:
                    config[each.key] = to + each.spare
        return Resized(rows, config, alike(before, after), tuple(without))

    return Sizes(values, wanted, resized)


def labelled(
    namings: Sequence[Sequence[str]],
    heads: Sequence[str],
    configured: Callable[[tuple[str, ...]], Mapping[tuple[str, ...], Any]],
) -> Sizes | None:
    """The rows of a head by the names of its classes: chosen, reordered, and a row of zeros for a class that is new.

    namings: the source's classes in order, in each way in which they are called; a name that two classes share means
        neither. heads: its weights and biases, a row for each class. configured: the target's names -> what changes in
        the configuration. None where the source does not know its classes.
    """
    namings = [_distinct(names) for names in namings if names]
    if not namings or not heads:
        return None
    own = tuple(range(len(namings[0])))
    theirs: list[tuple[str, ...]] = [tuple(namings[0])]

    def wanted(body: Body) -> Iterator[Mapping[str, Value]]:
        from surgery.vocabulary import label_map, loosely

        wanted_of = {loosely(name) for name in body.labels}
        best = max(namings, key=lambda names: sum(loosely(name) in wanted_of for name in names))
        if any(loosely(name) in wanted_of for name in best):
            theirs[:] = [body.labels]
            yield {LABELS: label_map(best, body.labels).index}

    def resized(sizes: Mapping[str, Value]) -> Resized:
        index = sizes.get(LABELS, own)
        if index == own:
            return Resized({}, {}, lambda seed: ({}, {}))
        rows = {name: f"label_remap({name}, index={index})" for name in heads}
        return Resized(rows, configured(theirs[0]), lambda seed: ({}, {}))

    return Sizes({LABELS: own}, wanted, resized)


def _distinct(names: Sequence[str]) -> list[str]:
    count = Counter(names)
    return [name if count[name] == 1 else f"{name}, class {number}" for number, name in enumerate(names)]


def joined(*parts: Sizes | None) -> Sizes | None:
    """The sizes of a model of several towers, each with its own."""
    held = [part for part in parts if part is not None]
    if len(held) < 2:
        return held[0] if held else None

    def wanted(body: Body) -> Iterator[Mapping[str, Value]]:
        ways = [list(islice(part.wanted(body), 3)) or [{}] for part in held]
        for chosen in product(*ways):
            yield {name: value for each in chosen for name, value in each.items()}

    def resized(sizes: Mapping[str, Value]) -> Resized:
        made = [part.resized(sizes) for part in held]
        rows = {name: text for each in made for name, text in each.rows.items()}
        config = {path: value for each in made for path, value in each.config.items()}
        shown = [each.alike for each in made]

        def alike(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            both = [each(seed) for each in shown if each is not None]
            before = {name: x for old, _ in both for name, x in old.items()}
            return before, {name: x for _, new in both for name, x in new.items()}

        without = tuple(name for each in made for name in each.without)
        return Resized(rows, config, alike if all(each is not None for each in shown) else None, without)

    return Sizes({name: value for part in held for name, value in part.values.items()}, wanted, resized)


def _matched(ours: Sequence[Table], theirs: Mapping[str, int], most: int = 6) -> Iterator[dict[str, int]]:
    left = dict(theirs)
    open_tables = []
    for table in ours:
        same = [name for name, rows in left.items() if rows in (table.rows, table.rows - table.spare)]
        same.sort(key=lambda name: not _is_called(name, table.words))
        if same:
            del left[same[0]]
        elif table.more or table.fewer:
            open_tables.append(table)
    if not open_tables or not left:
        return
    found: dict[tuple[tuple[str, int], ...], float] = {}
    names = sorted(left, key=lambda name: left[name])
    by_length = sorted(open_tables, key=lambda table: table.rows)
    for count in range(min(len(names), len(by_length)), 0, -1):
        for chosen in permutations(names, count):
            for tables in permutations(by_length, count):
                if any(not t.fewer and left[n] < t.rows for n, t in zip(chosen, tables, strict=True)):
                    continue
                key = tuple(sorted((t.size, left[n]) for n, t in zip(chosen, tables, strict=True)))
                called = sum(_is_called(n, t.words) for n, t in zip(chosen, tables, strict=True))
                wrong = sum(
                    any(_is_called(n, other.words) for other in ours if other.size != t.size)
                    and not _is_called(n, t.words)
                    for n, t in zip(chosen, tables, strict=True)
                )
                far = sum(abs(math.log2(max(left[n], 1) / t.rows)) for n, t in zip(chosen, tables, strict=True))
                score = 8 * count + 4 * called - 16 * wrong - min(far, 7 * count)
                found[key] = max(found.get(key, -99), score)
        if len(names) > 4:
            break
    for key, score in sorted(found.items(), key=lambda each: -each[1])[:most]:
        if score > 0:
            yield dict(key)


def _is_called(name: str, words: Iterable[str]) -> bool:
    lowered = name.lower()
    return any(word in lowered for word in words)
