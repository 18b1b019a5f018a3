"""Another vocabulary for a source, token by token, with the help of a donor: surgery.rules.transplant_vocabulary.

    embeddings.word_embeddings.weight
        -> vocab_transplant_omp(embeddings.word_embeddings.weight, donor:model.embed_tokens.weight, rows="0:900 +124")

The donor's embedding and its head stand beside the source (surgery.beside). Which tensors have a row for each token is
told by their names and lengths where nobody says it: the embedding, a head over the same tokens, and the head's bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from surgery import checkpoint
from surgery.beside import alone
from surgery.checkpoint import Checkpoint
from surgery.expr import Call, Expr, Name
from surgery.ops.vocabulary import NEW, spell_rows
from surgery.rules import RuleError, Transplant
from surgery.vocabulary import TokenMap, lies_in, token_map

if TYPE_CHECKING:
    from surgery.reader import TensorInfo

_EMBEDDING = re.compile(r"embed|wte\b|tok_|token|word|shared", re.IGNORECASE)
_OTHER_TABLE = re.compile(r"pos|wpe\b|type|segment|patch|rel", re.IGNORECASE)
_HEADS = (
    "lm_head",
    "decoder",
    "predictions",
    "vocab_projector",
    "head",
    "output",
    "proj_out",
    "embed_out",
)
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_FLOATS = ("F64", "F32", "F16", "BF16")
_TOKENIZER = "tokenizer.json, vocab.json or vocab.txt"


@dataclass(frozen=True)
class Donor:
    """What a rule takes from another model."""

    tables: Checkpoint  # its embedding, and its head where that is another
    embedding: str
    head: str  # the embedding's name where it has no other
    folder: Path  # of its tokenizer

    @classmethod
    def read(cls, rule: Transplant) -> Donor:
        """RuleError or CheckpointError where it cannot be read, has no tokenizer, or no table that can be told."""
        path = Path(rule.place.donor or rule.donor)
        if rule.place.weights is None and not path.exists():
            raise RuleError(
                f"{rule}: there is no donor {path}",
                hint="Give the folder of its weights. Names of a catalogue are known to zoo alone: zoo graft --donor.",
            )
        folder = path if path.is_dir() else path.parent
        if not lies_in(folder):
            raise RuleError(
                f"{rule}: the donor has no tokenizer beside its weights, no {_TOKENIZER} in {folder}",
                hint="Save it there, as transformers does: tokenizer.save_pretrained(FOLDER).",
            )
        weights = checkpoint.open(path) if rule.place.weights is None else rule.place.weights
        said = rule.donor_tables or rule.place.donor_tables
        found = token_tables(weights, len(token_map(folder, folder).old), said, f"{rule}: the donor", "donor_tables")
        wide = [name for name in found if len(weights[name].shape) == 2]
        # two that were said are the embedding, and then the head
        heads = wide[1:2] if rule.donor_tables else [name for name in wide if _is_head(name)][:1]
        embedding = next((name for name in wide if name not in heads), wide[0])
        head = heads[0] if heads and weights[heads[0]].shape == weights[embedding].shape else embedding
        return cls(weights.view(list(dict.fromkeys((embedding, head)))), embedding, head, folder)


@dataclass(frozen=True)
class Made:
    """The rows of a derivation with another vocabulary; why tables of the donor are not used; what is to be said."""

    rows: Mapping[str, Expr]
    why: Mapping[str, str]
    said: str


def transplanted(rule: Transplant, rows: Mapping[str, Expr], source: Checkpoint) -> Made:
    """What the rule makes of the tables of `source`, which holds the donor's beside its own (surgery.beside). RuleError
    where a tokenizer is missing, no token is shared, or the tables cannot be told."""
    ours = _tokenizer(rule, source)
    donor = Donor.read(rule) if rule.donor else None
    new = Path(rule.tokenizer) if rule.tokenizer or donor is None else donor.folder
    own = {name: source[name] for name in rows if name in source}
    said = rule.tables or rule.place.tables
    tables = token_tables(own, len(token_map(ours, ours).old), said, f"{rule}: the source", "tables")
    size = rule.rows or None
    before = {name: own[name].shape[0] for name in tables}
    found = token_map(ours, new, old_size=min(before.values()), new_size=size)
    if not found.copied and donor is None:
        raise RuleError(
            f"{rule}: the source knows none of the {len(found.old):,} tokens: nothing of its table would be left",
            hint="Is it a tokenizer of the same texts? A donor that knows both kinds of tokens would help: donor=...",
        )
    if donor is None:
        plain = {name: _mapped(rows[name], found, rule) for name in tables}
        return Made(plain, {}, f"vocabulary by token: {found}")
    theirs = token_map(donor.folder, new, old_size=donor.tables[donor.embedding].shape[0], new_size=size).old
    both = list(zip(found.old, theirs, strict=True))
    shared = sum(a != NEW and b != NEW for a, b in both)
    sought = sum(a == NEW and b != NEW for a, b in both)
    if not shared:
        raise RuleError(
            f"{rule}: the source and the donor share none of the {len(both):,} tokens, so nothing relates their tables",
            hint="Choose a donor whose tokenizer has tokens of the source's, spelled as any of the known kinds.",
        )
    k = min(rule.k, shared, donor.tables[donor.embedding].shape[1])
    made: dict[str, Expr] = {}
    for name in tables:
        if len(own[name].shape) == 1 or not sought:
            made[name] = _mapped(rows[name], found, rule)
            continue
        other = Name(f"{rule.name}:{donor.head if _is_head(name) else donor.embedding}")
        aligned = "" if theirs == tuple(range(len(theirs))) else spell_rows(theirs)
        params = (("rows", found.rows), ("k", k), ("donor_rows", aligned), ("seed", rule.seed))
        made[name] = Call("vocab_transplant_omp", (rows[name], other), params)
    unused = {f"{rule.name}:{name}": "the donor's, and no tensor is made from it" for name in donor.tables}
    roles = f" ({found.by_role} of them by role)" if found.by_role else ""
    few = "" if k == rule.k or not sought else f" (k = {k})"
    unknown = found.made - sought
    said_of = [f"{found.copied:,} copied{roles}", f"{sought:,} made by OMP from {rule.donor}{few}"]
    if unknown:
        said_of.append(f"{unknown:,} unknown to both (mean)")
    return Made(made, unused, f"vocabulary by token: {len(both):,} tokens: {', '.join(said_of)}")


def _mapped(expr: Expr, found: TokenMap, rule: Transplant) -> Expr:
    return Call("vocab_map", (expr,), (("rows", found.rows), ("seed", rule.seed)))


def _tokenizer(rule: Transplant, source: Checkpoint) -> Path:
    """Where the source's tokenizer lies."""
    if rule.source_tokenizer:
        return Path(rule.source_tokenizer)
    files = alone(source).files
    folder = Path(rule.place.tokenizer) if rule.place.tokenizer else files[0].parent if files else None
    if folder is None or not lies_in(folder):
        where = f" ({folder})" if folder is not None else ""
        raise RuleError(
            f"{rule}: no tokenizer lies beside the source's weights{where}, no {_TOKENIZER}",
            hint='Say where it is: transplant_vocabulary(..., source_tokenizer="folder/").',
        )
    return folder


def token_tables(
    tensors: Mapping[str, TensorInfo], tokens: int, said: Sequence[str], whose: str, parameter: str
) -> list[str]:
    """The tensors with a row for each token, the embedding first: those that the globs in `said` match, else those that
    names and lengths tell. RuleError, which begins with `whose`, where there are none."""
    known = {name: info for name, info in tensors.items() if info.dtype in _FLOATS and len(info.shape) in (1, 2)}
    if said:
        found = [name for glob in said for name in known if fnmatchcase(name, glob)]
        lengths = {known[name].shape[0] for name in found}
        if len(lengths) != 1 or all(len(known[name].shape) == 1 for name in found):
            what = "tables of several lengths" if len(lengths) > 1 else "no table of numbers"
            raise RuleError(f"{whose} has {what} that {', '.join(said)} matches", hint=_hint(known, tokens, parameter))
        return list(dict.fromkeys(found))
    outside = {n: i for n, i in known.items() if not _IN_A_BLOCK.search(n) and i.shape[0] >= tokens}
    named = [n for n, i in outside.items() if len(i.shape) == 2 and _is_embedding(n)]
    short = [n for n, i in known.items() if len(i.shape) == 2 and _is_embedding(n) and not _IN_A_BLOCK.search(n)]
    if short and not named:
        raise RuleError(
            f"{whose}: {short[0]} has {known[short[0]].shape[0]:,} rows, and its tokenizer {tokens:,} tokens",
            hint="Tokenizer and weights have to be of one model. If they are, name the tables: "
            f"transplant_vocabulary(..., {parameter}=[{_quoted(short[:1])}]).",
        )
    if not named:
        raise RuleError(
            f"{whose} has no table of tokens that can be told by its name, with a row for each of {tokens:,} tokens",
            hint=_hint(known, tokens, parameter),
        )
    length = min(outside[name].shape[0] for name in named)
    embeddings = [name for name in named if outside[name].shape[0] == length]
    return [*embeddings, *(n for n, i in outside.items() if i.shape[0] == length and _is_head(n))]


def _hint(known: Mapping[str, TensorInfo], tokens: int, parameter: str) -> str:
    long = [name for name, info in known.items() if len(info.shape) == 2 and info.shape[0] >= tokens]
    shown = _quoted(long[:3]) if long else '"the.embedding.weight"'
    more = ", ..." if len(long) > 3 else ""
    return f"Name those that are meant: transplant_vocabulary(..., {parameter}=[{shown}{more}])."


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _is_embedding(name: str) -> bool:
    return bool(_EMBEDDING.search(name)) and not _OTHER_TABLE.search(name) and not _is_head(name)


def _is_head(name: str) -> bool:
    """Does it give logits, or is it a bias of them?"""
    return name.split(".")[-2:-1] != [] and name.split(".")[-2] in _HEADS
