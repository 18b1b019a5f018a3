"""Rules: what a person wants otherwise than the source has it, said before anything is mapped.

    rules = [
        surgery.rules.select_layers([0, 2, 4]),
        surgery.rules.drop("pooler.*", why="my model pools by mean"),
        surgery.rules.init("head.*", why="other classes"),
    ]

A file holds the same, a rule a line, `#` begins a comment:

    select_layers([0, 2, 4])
    drop("pooler.*", why="my model pools by mean")

What they do is surgery.derivation's.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import ops
from surgery.errors import SurgeryError
from surgery.ops import Value

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint


class RuleError(SurgeryError):
    """A rule that cannot be read, or that does not fit the source or the target."""


@dataclass(frozen=True)
class Rule:
    """One rule. `str` of it is the line that a file of rules has."""


@dataclass(frozen=True)
class Derive(Rule):
    """The tensor `name` is made by an expression over the source's tensors, in place of what it was."""

    name: str
    expression: str
    implied: bool = False  # follows from the sizes of the target, and is found anew from them

    def __str__(self) -> str:
        return f"derive({_text(self.name)}, {_text(self.expression)})"


@dataclass(frozen=True)
class Resize(Rule):
    """Each source tensor that the pattern matches is given another size by an op of one tensor."""

    pattern: str
    op: str
    params: tuple[tuple[str, Value], ...]

    def __str__(self) -> str:
        shown = "".join(f", {name}={ops.spell(value)}" for name, value in self.params)
        return f"resize({_text(self.pattern)}, {_text(self.op)}{shown})"


@dataclass(frozen=True)
class SelectLayers(Rule):
    """The blocks of a stack that are kept, in the order in which they then stand."""

    keep: tuple[int, ...]
    stack: str = ""

    def __str__(self) -> str:
        where = f", stack={_text(self.stack)}" if self.stack else ""
        return f"select_layers({list(self.keep)}{where})"


@dataclass(frozen=True)
class Reshape(Rule):
    """A change of the body as a whole: of a width, of heads, of blocks. What shares it is found by running."""

    word: str
    where: str = ""  # a module of the reference, or the name of a group; empty where `sizes` name the groups
    sizes: tuple[tuple[str, int], ...] = ()
    params: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        shown = [_text(self.where)] if self.where else []
        shown += [f"{name}={size}" for name, size in self.sizes]
        shown += [f"{name}={list(v) if isinstance(v, tuple) else ops.spell(v)}" for name, v in self.params]
        return f"{self.word}({', '.join(shown)})"


@dataclass(frozen=True)
class Without(Rule):
    """A tensor that the source is taken not to have: it follows from a size that is another now."""

    name: str
    why: str
    implied: bool = True


@dataclass(frozen=True)
class MergeLora(Rule):
    """An adapter that is merged into the source's weights; its tensors stand beside them, their names after `name:`."""

    path: str
    name: str = "lora"

    def __str__(self) -> str:
        named = f", name={_text(self.name)}" if self.name != "lora" else ""
        return f"merge_lora({_text(self.path)}{named})"


@dataclass(frozen=True)
class Place:
    """Where a transplant finds what it reads, for those who know it; else it is found by itself."""

    donor: str = ""  # the path of its weights, its tokenizer beside them
    weights: Checkpoint | None = None  # these, opened
    donor_tables: tuple[str, ...] = ()  # those that may be its embedding and its head
    tables: tuple[str, ...] = ()  # of the source
    tokenizer: str = ""  # the folder of the source's


@dataclass(frozen=True)
class Transplant(Rule):
    """Another vocabulary, row by row: what the source knows is copied, what only a donor knows is made by OMP."""

    tokenizer: str  # empty: the donor's own
    donor: str = ""  # empty: none
    k: int = 64
    rows: int = 0  # of the new table, where there are more than tokens
    tables: tuple[str, ...] = ()
    donor_tables: tuple[str, ...] = ()
    source_tokenizer: str = ""
    seed: int = 0
    name: str = "donor"
    place: Place = field(default=Place(), compare=False)

    def __str__(self) -> str:
        shown = [_text(self.tokenizer)] if self.tokenizer else []
        for each in fields(self)[1:-1]:
            value = getattr(self, each.name)
            if value != each.default:
                spelled = json.dumps(list(value)) if isinstance(value, tuple) else ops.spell(value)
                shown.append(f"{each.name}={spelled}")
        return f"transplant_vocabulary({', '.join(shown)})"


@dataclass(frozen=True)
class Drop(Rule):
    """Source tensors that are not to be used."""

    pattern: str
    why: str

    def __str__(self) -> str:
        return f"drop({_text(self.pattern)}, why={_text(self.why)})"


@dataclass(frozen=True)
class Init(Rule):
    """Target tensors that stay as they are initialised."""

    pattern: str
    why: str

    def __str__(self) -> str:
        return f"init({_text(self.pattern)}, why={_text(self.why)})"


# -- how a person writes them -----------------------------------------------------------------------------------------
def derive(name: str, expression: str) -> Rule:
    """Make the source tensor `name` by an expression, as a row of a plan spells it.

    >>> print(derive("head.weight", "take(classifier.weight, rows=(2, 0))"))
    derive("head.weight", "take(classifier.weight, rows=(2, 0))")
    """
    return Derive(name, expression)


def resize(pattern: str, op: str, **params: Value | list[int]) -> Rule:
    """Give the source tensors that `pattern` matches (a glob) another size by an op that takes one tensor; the ops and
    their rules are listed in the reference. A probe's reference must then be built at that size: it has to hold what
    the op makes.

    >>> print(resize("*.position_embeddings.weight", "extend_pos_embed_tile", to=1024))
    resize("*.position_embeddings.weight", "extend_pos_embed_tile", to=1024)
    """
    given = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in params.items())
    ops.get(op).bind(1, given)
    return Resize(pattern, op, given)


def select_layers(keep: Sequence[int], *, stack: str = "") -> Rule:
    """Keep these blocks of a stack of repeated blocks, in this order, and leave the others out; a number that stands
    twice gives a copy (DistilBERT keeps every other block; SOLAR stacks [0, 24) on [8, 32)). `stack` is what precedes
    the number in the names of the source ("encoder.layer"), needed only where there are several stacks.

    >>> print(select_layers([0, 2, 4]))
    select_layers([0, 2, 4])
    """
    numbers = tuple(keep)
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise RuleError(f"select_layers takes the numbers of the layers to keep, from 0, not {list(keep)!r}")
    return SelectLayers(numbers, stack)


def shrink(**sizes: int) -> Rule:
    """Make the source narrower: `hidden`, `inner` (the neurons of every MLP) and `heads`, each to so many units, which
    are chosen evenly; heads stay whole, so `heads` shrinks with `hidden` (Xu et al., arXiv 2311.18823). Lossy.

    Of this rule and those that follow: everything that shares a width is found from the dataflow of the reference, so
    a probe is needed; when they preserve the function is said in surgery.shrink_width and the others.

    >>> print(shrink(hidden=192, inner=768, heads=6))
    shrink(hidden=192, inner=768, heads=6)
    """
    return Reshape("shrink", "", _widths("shrink", sizes))


def widen(*, seed: int = 0, uniform: bool = False, **sizes: int) -> Rule:
    """Make the source wider: units are repeated at random, and what leaves them is divided by the number of replicas
    (Chen et al., arXiv 1511.05641). See surgery.widen.

    >>> print(widen(inner=1024))
    widen(inner=1024, seed=0, uniform=0)
    """
    return Reshape("widen", "", _widths("widen", sizes), (("seed", seed), ("uniform", int(uniform))))


def clone_width(*, times: int = 2) -> Rule:
    """Make every width `times` as large, the function being kept, norms included (Samragh et al., arXiv 2409.12903).

    >>> print(clone_width(times=2))
    clone_width(times=2)
    """
    return Reshape("clone_width", params=(("times", times),))


def prune_heads(where: str, *, heads: Sequence[int]) -> Rule:
    """Take these heads away from the attention at `where`, a module of the reference (* stands for any text).

    >>> print(prune_heads("encoder.layer.0", heads=[1, 3]))
    prune_heads("encoder.layer.0", heads=[1, 3])
    """
    return Reshape("prune_heads", where, params=(("heads", tuple(heads)),))


def mha_to_gqa(where: str, *, kv_heads: int) -> Rule:
    """Share key and value heads between queries: each the mean of neighbouring ones (Ainslie et al., arXiv 2305.13245).

    >>> print(mha_to_gqa("model.layers.*.self_attn", kv_heads=2))
    mha_to_gqa("model.layers.*.self_attn", kv_heads=2)
    """
    return Reshape("mha_to_gqa", where, params=(("kv_heads", kv_heads),))


def insert_identity_blocks(where: str, *, after: Sequence[int], approximate: bool = False) -> Rule:
    """Behind each of these blocks of the list at `where`, a copy that passes on its input: its projections into the
    residual stream are zero (Wu et al., arXiv 2401.02415). Pre-norm blocks only; with `approximate` others too, whose
    function it changes.

    >>> print(insert_identity_blocks("h", after=[0, 1]))
    insert_identity_blocks("h", after=[0, 1])
    """
    more = (("approximate", 1),) if approximate else ()
    return Reshape("insert_identity_blocks", where, params=(("after", tuple(after)), *more))


def dense_to_moe(where: str, *, experts: int, top_k: int = 2, normalise: bool = True, seed: int = 0) -> Rule:
    """Put `experts` copies of an MLP in the place of each one that `where` names (a module of the reference, * stands
    for any text), `top_k` of which a router chooses for each token. The gates of those chosen are divided by their sum,
    as Mixtral's are, so that the function is kept: the experts are equal until they are trained; without `normalise`,
    as Switch has it, they are not. The routers are drawn by `seed` (Komatsuzaki et al., arXiv 2212.05055).

    >>> print(dense_to_moe("model.layers.*.mlp", experts=4, top_k=2))
    dense_to_moe("model.layers.*.mlp", experts=4, top_k=2)
    """
    for name, value in (("experts", experts), ("top_k", top_k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RuleError(f"dense_to_moe: {name}={value!r} cannot be", hint=f"{name} is a whole number, 1 or more.")
    more = (("normalise", 0),) if not normalise else ()
    seeded = (("seed", seed),) if seed else ()
    return Reshape("dense_to_moe", where, params=(("experts", experts), ("top_k", top_k), *more, *seeded))


def _widths(word: str, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes.values()):
        raise RuleError(f"{word} takes the new widths by name, as in {word}(hidden=192, inner=768, heads=6)")
    return tuple(sizes.items())


def merge_lora(path: str | os.PathLike[str], *, name: str = "lora") -> Rule:
    """Merge an adapter that PEFT wrote (its folder: adapter_model.safetensors and adapter_config.json) into the source
    before it is mapped. Rows then read `lora_merge(W, lora:X.lora_B.weight, lora:X.lora_A.weight, scale=...)`: the
    adapter's tensors are sources like all others, their names after `name:`. What PEFT trained whole (modules_to_save,
    biases) takes the source's place. A second adapter needs another `name`. A DoRA adapter is a RuleError.

    >>> print(merge_lora("adapter/"))
    merge_lora("adapter/")
    """
    return MergeLora(os.fspath(path), _word("merge_lora", name, "an adapter"))


def _word(rule: str, name: str, what: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise RuleError(f"{rule}: {name!r} cannot name {what}", hint='A word, as in name="style".')
    return name


def transplant_vocabulary(
    tokenizer: str | os.PathLike[str] = "",
    *,
    donor: str | os.PathLike[str] = "",
    k: int = 64,
    rows: int = 0,
    tables: Sequence[str] = (),
    donor_tables: Sequence[str] = (),
    source_tokenizer: str | os.PathLike[str] = "",
    seed: int = 0,
    name: str = "donor",
) -> Rule:
    """Give the source the vocabulary of another tokenizer (tokenizer.json, vocab.txt, vocab.json, or a folder that
    holds one), token by token. A token that the source knows keeps its row. One that only the donor knows gets the row
    that orthogonal matching pursuit finds from `k` tokens that both know (mergekit's tokensurgeon, arXiv 2506.06607;
    fewer where fewer are shared); the donor's width may be another. One that neither knows is drawn about the mean of
    the source's rows, by `seed`; without a donor, all are that the source does not know.

    donor: the folder of another model's weights, its tokenizer beside them; to zoo any reference. Without `tokenizer`,
    the new vocabulary is the donor's own. rows: of the new table, where it has more than there are tokens. tables,
    donor_tables: globs of the tensors with a row for each token, where names do not tell (of the donor the embedding,
    and then the head, if that is another). source_tokenizer: where it does not lie beside the source's weights. Rows of
    a plan read `vocab_transplant_omp(word, donor:word, rows=...)`: the donor's tensors are sources like all others,
    their names after `name:`.

    >>> print(transplant_vocabulary("my_tokenizer.json", donor="other/model"))
    transplant_vocabulary("my_tokenizer.json", donor="other/model")
    """
    if not os.fspath(tokenizer) and not os.fspath(donor):
        raise RuleError(
            "transplant_vocabulary names neither a tokenizer nor a donor",
            hint='As in transplant_vocabulary("my_tokenizer.json", donor="other/model").',
        )
    if k < 1 or rows < 0 or seed < 0:
        wrong = f"k={k}" if k < 1 else f"rows={rows}" if rows < 0 else f"seed={seed}"
        raise RuleError(f"transplant_vocabulary: {wrong} cannot be", hint="k is 1 or more, rows and seed 0 or more.")
    return Transplant(
        os.fspath(tokenizer),
        os.fspath(donor),
        k,
        rows,
        (tables,) if isinstance(tables, str) else tuple(tables),
        (donor_tables,) if isinstance(donor_tables, str) else tuple(donor_tables),
        os.fspath(source_tokenizer),
        seed,
        _word("transplant_vocabulary", name, "a donor"),
    )


def drop(pattern: str, *, why: str) -> Rule:
    """Use no source tensor that `pattern` matches (a glob): what would have been filled from one stays new.

    >>> print(drop("pooler.*", why="my model pools by mean"))
    drop("pooler.*", why="my model pools by mean")
    """
    return Drop(pattern, _reason("drop", pattern, why))


def init(pattern: str, *, why: str) -> Rule:
    """Leave the target's tensors that `pattern` matches (a glob) as they are initialised.

    >>> print(init("head.*", why="other classes"))
    init("head.*", why="other classes")
    """
    return Init(pattern, _reason("init", pattern, why))


def _reason(rule: str, pattern: str, why: str) -> str:
    if not why.strip():
        raise RuleError(f"{rule}({_text(pattern)}) gives no reason", hint=f'{rule}({_text(pattern)}, why="...")')
    return why


_WORDS: Mapping[str, Callable[..., Rule]] = {
    each.__name__: each
    for each in (
        *(clone_width, dense_to_moe, derive, drop, init, insert_identity_blocks, merge_lora, mha_to_gqa),
        *(prune_heads, resize, select_layers, shrink, transplant_vocabulary, widen),
    )
}


def read(path: str | os.PathLike[str]) -> list[Rule]:
    """The rules of a file, a rule a line. RuleError with the line's number where one cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RuleError(f"{path}: the rules cannot be read: {error}", hint="Give a text file, a rule a line.") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            rule = parse_rule(line)
        except SurgeryError as error:
            raise RuleError(f"{path}, line {number}: {error}", hint=error.hint) from None
        if rule is not None:
            found.append(rule)
    return found


def parse_rule(line: str) -> Rule | None:
    """One rule as a file has it; None of an empty line or a comment."""
    try:
        parsed = ast.parse(line.strip(), mode="exec").body
        if not parsed:
            return None
        (statement,) = parsed
        call = getattr(statement, "value", None)
        if not (isinstance(statement, ast.Expr) and isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("it is not a call")
        args = [ast.literal_eval(arg) for arg in call.args]
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise RuleError(
            f"not a rule: {line.strip()!r} ({getattr(error, 'msg', None) or error})",
            hint='A rule reads as in drop("pooler.*", why="my model pools by mean").',
        ) from None
    word = call.func.id
    if word not in _WORDS:
        near = difflib.get_close_matches(word, _WORDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(_WORDS)}."
        raise RuleError(f"no rule is called {word}", hint=hint)
    rule = _WORDS[word]
    try:
        inspect.signature(rule).bind(*args, **named)
        return rule(*args, **named)
    except TypeError as error:
        raise RuleError(f"{word}: {error}", hint=_example(rule)) from None


def _example(rule: Callable[..., Rule]) -> str:
    """How the rule reads, out of its own documentation."""
    found = re.search(r">>> print\((.+)\)$", inspect.getdoc(rule) or "", re.MULTILINE)
    return f"It reads as in {found[1]}." if found else ""


def checked(rules: Iterable[object]) -> tuple[Rule, ...]:
    """The rules, each a Rule or a line of text; anything else is a RuleError."""
    found = []
    for rule in rules:
        parsed = parse_rule(rule) if isinstance(rule, str) else rule
        if not isinstance(parsed, Rule):
            raise RuleError(f"{rule!r} is not a rule", hint="Rules are made by surgery.rules: select_layers, drop ...")
        found.append(parsed)
    return tuple(found)


def _text(value: Any) -> str:
    return ops.spell(str(value))
