"""What to type next where a graft came to nothing because the target is smaller than the source on purpose.

What is lossy is never done as a guess; but where the sizes of both sides say what is wanted, the option that asks for
it is named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    import surgery
    from surgery.rules import Rule
    from zoo.resolving import Source


def of(source: Source, model: nn.Module, report: surgery.Report) -> Iterator[str]:
    """Sentences, likeliest first; none where the sizes do not say."""
    yield from _narrower(source, model)
    yield from _shallower(source, model, report)


def fewer_tokens(source: Source, model: nn.Module, rules: Sequence[Rule]) -> Iterator[str]:
    """Where the target has fewer rows for tokens than the source has tokens, and no rule speaks of them."""
    from zoo.adapting import VOCABULARY, making, sizes_of, tables_of_tokens, tables_that_may_hold_tokens

    sizes = sizes_of(source)
    own = sizes.values.get(VOCABULARY) if sizes is not None else None
    if making(rules) or not isinstance(own, int) or not tables_of_tokens(source):
        return
    found = tables_that_may_hold_tokens(model, source)
    if found and max(found.values()) < own:
        name, rows = max(found.items(), key=lambda each: each[1])
        yield (
            f"{name} has {rows:,} rows, and the source {own:,} tokens; a smaller vocabulary is never guessed: "
            "--tokenizer says which of them are yours"
        )


def _narrower(source: Source, model: nn.Module) -> Iterator[str]:
    theirs = Counter(info.shape[0] for info in source.checkpoint.values() if len(info.shape) == 1)
    ours = Counter(t.shape[0] for t in model.state_dict(keep_vars=True).values() if t.dim() == 1)
    if not theirs or not ours:
        return
    (wide, _), (narrow, _) = theirs.most_common(1)[0], ours.most_common(1)[0]
    if narrow < wide and wide not in ours:
        yield f"your module is {narrow:,} wide, and the source {wide:,}: --shrink makes it narrower, which is lossy"


def _blocks(model: nn.Module) -> int:
    """How many the longest list of blocks in the target's names has, of the outermost; 0 where none is numbered."""
    numbers: dict[str, set[str]] = {}
    for name in model.state_dict(keep_vars=True):
        if (place := re.search(r"(?:^|(?<=\.))(\d+)(?=\.)", name)) is not None:
            numbers.setdefault(name[: place.start()], set()).add(place[1])
    return max(map(len, numbers.values()), default=0)


def _shallower(source: Source, model: nn.Module, report: surgery.Report) -> Iterator[str]:
    from surgery.derivation import stacks

    has = _blocks(model)
    for at, count in stacks(source.checkpoint).items():
        inside = re.compile(rf"{re.escape(at)}\.(\d+)\." if at else r"(\d+)\.")
        used = {int(found[1]) for name in report.plan.used if (found := inside.match(name))}
        # A refused plan may hold the first blocks only, of a target that has them all.
        if used and used == set(range(len(used))) and len(used) <= has < count:
            kept = ",".join(map(str, range(has)))
            blocks = f"{has} of the {count} blocks of {at}" if at else f"{has} of the {count} blocks"
            yield f"your module has a place for {blocks}: --layers {kept} keeps so many, which is lossy"
