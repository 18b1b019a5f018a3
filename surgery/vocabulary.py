"""From one tokenizer to another, and from one list of labels to another: which old row each new one is.

    found = token_map(old_tokenizer, new_tokenizer)
    found.rows                                    # for vocab_map and vocab_transplant_omp
    label_map(old.config.id2label, new.id2label).index      # for label_remap

Tokens are compared by what they stand for. Two tokenizers that spell the same text differently, as byte-level BPE
("Ġthe"), SentencePiece ("▁the"), WordPiece ("the", "##ing") and CLIP's BPE ("the</w>") do, are compared by that text.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from surgery.errors import PlanError
from surgery.ops.vocabulary import NEW, spell_rows


class HasVocabulary(Protocol):
    """A tokenizer of transformers or tokenizers."""

    def get_vocab(self) -> dict[str, int]: ...


# A tokenizer; tokenizer.json, vocab.json, vocab.txt or a folder that holds one; the tokens in order, or with their ids.
Vocabulary: TypeAlias = HasVocabulary | str | Path | Sequence[str] | Mapping[str, int]
Labels: TypeAlias = Sequence[str] | Mapping[int, str] | Mapping[str, str]

_ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
# Where one family has no such token: BERT's [CLS] opens a text as Llama's <s> does.
_STANDS_FOR = {"cls": "bos", "sep": "eos", "bos": "cls", "eos": "sep"}
# What the tokens of a role are called where nothing says so.
_CALLED = {
    "[PAD]": "pad",
    "<pad>": "pad",
    "<|pad|>": "pad",
    "<|padding|>": "pad",
    "[UNK]": "unk",
    "<unk>": "unk",
    "[CLS]": "cls",
    "[SEP]": "sep",
    "[MASK]": "mask",
    "<mask>": "mask",
    "<s>": "bos",
    "[BOS]": "bos",
    "<bos>": "bos",
    "<|startoftext|>": "bos",
    "<start_of_text>": "bos",
    "<|begin_of_text|>": "bos",
    "</s>": "eos",
    "[EOS]": "eos",
    "<eos>": "eos",
    "<|endoftext|>": "eos",
    "<|end_of_text|>": "eos",
    "<end_of_text>": "eos",
}


@dataclass(frozen=True)
class TokenMap:
    """`old[n]` is the old id of the new token n, NEW (-1) where there is none. `by_role` of the copied ones were found
    by their role, not by what they stand for."""

    old: tuple[int, ...]
    by_role: int

    @property
    def copied(self) -> int:
        """How many rows are copied."""
        return len(self.old) - self.made

    @property
    def made(self) -> int:
        """How many rows have to be made."""
        return self.old.count(NEW)

    @property
    def rows(self) -> str:
        """The map as vocab_map and vocab_transplant_omp take it."""
        return spell_rows(self.old)

    def __str__(self) -> str:
        roles = f", {self.by_role} of them by role" if self.by_role else ""
        return f"{len(self.old):,} tokens: {self.copied:,} copied{roles}, {self.made:,} made"


@dataclass(frozen=True)
class LabelMap:
    """`index[n]` is the old row of the new label n, NEW (-1) where there is none; `dropped` are the old labels that no
    new one takes."""

    index: tuple[int, ...]
    dropped: tuple[str, ...]

    @property
    def kept(self) -> int:
        """How many labels keep their row."""
        return len(self.index) - self.index.count(NEW)

    def __str__(self) -> str:
        return f"{len(self.index):,} labels: {self.kept:,} kept, {self.index.count(NEW):,} new"


@dataclass(frozen=True)
class _Tokens:
    ids: Mapping[str, int]
    roles: Mapping[str, str]  # role: token


def token_map(
    old: Vocabulary, new: Vocabulary, *, old_size: int | None = None, new_size: int | None = None
) -> TokenMap:
    """For each id of the new tokenizer the row of the old table. Special tokens are matched by role first (padding by
    padding, whatever they are called), all others by what they stand for. `old_size` and `new_size` are the rows of
    the two tables where they differ from the tokenizers' (padded tables): an old id past the end has no row, and new
    rows past the last token are made. PlanError: a file that is no vocabulary, a table smaller than its vocabulary."""
    before, after = _read(old), _read(new)
    length = max(after.ids.values(), default=-1) + 1
    if new_size is not None and new_size < length:
        raise PlanError(f"a table of {new_size} rows does not hold the {length} ids of the new tokenizer")
    known = {token: at for token, at in before.ids.items() if old_size is None or at < old_size}
    found = [NEW] * (length if new_size is None else new_size)
    styles = _style(before.ids), _style(after.ids)
    # whole words without a mark are spelled as WordPiece spells them
    alike = styles[0] == styles[1] or set(styles) <= {"plain", "wordpiece"}
    texts: dict[bytes, int] = {}
    if not alike:
        # of two tokens for one text the later assignment stays: one that ends a word, then the older one
        for token, at in sorted(known.items(), key=lambda item: (item[0].endswith("</w>"), -item[1])):
            texts[_text(token, styles[0])] = at
    for token, at in after.ids.items():
        if alike:
            found[at] = known.get(token, NEW)
        elif token in after.roles.values():
            found[at] = known.get(token, NEW)  # not a text
        else:
            found[at] = texts.get(_text(token, styles[1]), NEW)
    by_role = 0
    for role, token in after.roles.items():
        name = before.roles.get(role) or before.roles.get(_STANDS_FOR.get(role, ""))
        if name in known and token in after.ids:
            by_role += token != name
            found[after.ids[token]] = known[name]
    return TokenMap(tuple(found), by_role)


def label_map(old: Labels, new: Labels) -> LabelMap:
    """For each new label the row of the old head, by name: first as spelled, then without regard to case, spaces,
    underscores and hyphens where that tells one label from all others. Labels that a list holds more than once match in
    order where both hold them equally often. `old` and `new` are lists or id2label tables. PlanError: placeholders such
    as LABEL_0, ids that do not count from 0, a label that could be more than one."""
    before, after = _labels(old, "old"), _labels(new, "new")
    index = [NEW] * len(after)
    for spelled in (str, loosely):
        places: defaultdict[str, list[int]] = defaultdict(list)
        wanted: defaultdict[str, list[int]] = defaultdict(list)
        taken = set(index)
        for row, label in enumerate(before):
            if row not in taken:
                places[spelled(label)].append(row)
        for row, label in enumerate(after):
            if index[row] == NEW:
                wanted[spelled(label)].append(row)
        for label, rows in wanted.items():
            if len(places[label]) == len(rows):
                for row, place in zip(rows, places[label], strict=True):
                    index[row] = place
            elif places[label]:
                raise PlanError(
                    f'the label "{label}" stands {len(places[label])} times among the old labels and {len(rows)} times '
                    "among the new: which is which is open",
                    hint="give each class a name of its own; or write the index of label_remap by hand",
                )
    taken = set(index)
    return LabelMap(tuple(index), tuple(label for row, label in enumerate(before) if row not in taken))


def loosely(label: str) -> str:
    """A label without regard to case, spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]+", " ", label).strip().casefold()


def _labels(labels: Labels, side: str) -> list[str]:
    if isinstance(labels, Mapping):
        numbered = {int(number): label for number, label in labels.items()}
        if sorted(numbered) != list(range(len(numbered))):
            raise PlanError(f"the ids of the {side} labels do not count from 0: {sorted(numbered)[:5]} ...")
        listed = [numbered[number] for number in range(len(numbered))]
    else:
        listed = list(labels)
    if listed and all(re.fullmatch(r"LABEL_\d+", label) for label in listed):
        raise PlanError(
            f"the {side} labels are placeholders, {listed[0]} and so on, and say nothing",
            hint="name the classes in id2label, or leave the head new",
        )
    return listed


def _read(source: Vocabulary) -> _Tokens:
    if isinstance(source, str | Path):
        return _read_path(Path(source))
    if isinstance(source, Mapping):
        return _Tokens(dict(source), _called(source))
    if isinstance(source, Sequence):
        return _Tokens({token: at for at, token in enumerate(source)}, _called(source))
    ids = source.get_vocab()
    said = {role: getattr(source, f"{role}_token", None) for role in _ROLES}
    roles = {role: str(token) for role, token in said.items() if token is not None}
    return _Tokens(ids, roles or _called(ids))


def _called(tokens: Mapping[str, int] | Sequence[str]) -> dict[str, str]:
    return {role: token for token, role in reversed(_CALLED.items()) if token in tokens}


_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def lies_in(folder: Path) -> bool:
    """Does the folder hold a vocabulary that can be read?"""
    return any((folder / name).is_file() for name in _FILES)


def _read_path(path: Path) -> _Tokens:
    if path.is_dir():
        there = [path / name for name in _FILES if (path / name).is_file()]
        if not there:
            raise PlanError(
                f"{path} holds none of {', '.join(_FILES)}",
                hint="Save the tokenizer there, as transformers does: tokenizer.save_pretrained(FOLDER).",
            )
        tokens = _read_path(there[0])
        said: dict[str, str] = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (path / name).is_file():
                said |= _roles_said(_json(path / name))
        return _Tokens(tokens.ids, {**tokens.roles, **said})
    if path.suffix == ".json":
        table = _json(path)
        ids = _ids(table) if isinstance(table, dict) else None
        if not ids:
            raise PlanError(f"{path} holds no vocabulary: a tokenizer.json, or token: id pairs")
        return _Tokens(ids, _called(ids))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} does not read as a vocabulary: {error}") from None
    # a token may be a line separator of Unicode, so only the newline parts lines
    if not text.strip():
        raise PlanError(f"{path} holds no tokens")
    lines = text.removesuffix("\n").split("\n")
    ids = {token.removesuffix("\r"): at for at, token in enumerate(lines)}
    return _Tokens(ids, _called(ids))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} does not read as JSON: {error}") from None


def _ids(table: dict[str, Any]) -> dict[str, int] | None:
    """The ids of a tokenizer.json (its model's, and those added), or of a plain table."""
    model = table.get("model")
    if not isinstance(model, dict):
        return dict(table) if table and all(type(at) is int for at in table.values()) else None
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: (token, score)
        ids = {token: at for at, (token, _) in enumerate(vocab)}
    elif isinstance(vocab, dict):
        ids = dict(vocab)
    else:
        return None
    return ids | {added["content"]: added["id"] for added in table.get("added_tokens") or []}


def _roles_said(table: Any) -> dict[str, str]:
    """What a tokenizer's own settings call the tokens of each role."""
    said = {}
    for role in _ROLES:
        token = table.get(f"{role}_token") if isinstance(table, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            said[role] = token
    return said


def _style(ids: Mapping[str, int]) -> str:
    starts = Counter("##" if token.startswith("##") else token[:1] for token in ids if len(token) > 1)
    ends = sum(token.endswith("</w>") for token in ids)
    marks = {"byte-level": starts["Ġ"], "sentencepiece": starts["▁"], "wordpiece": starts["##"], "word-end": ends}
    style, most = max(marks.items(), key=lambda item: item[1])
    return style if most else "plain"


@functools.cache
def _bytes_of() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for the letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(rest)}


def _text(token: str, style: str) -> bytes:
    """The bytes of text that a token stands for, with a space where a word begins."""
    if style in ("byte-level", "word-end"):
        letters = _bytes_of()
        bare = token.removesuffix("</w>") if style == "word-end" else token
        known = all(letter in letters for letter in bare)
        text = bytes(letters[letter] for letter in bare) if known else bare.encode()
        # the end of a word is most often that of a whole one
        return b" " + text if style == "word-end" and bare != token and any(c.isalnum() for c in bare) else text
    if style == "sentencepiece":
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()
    if token.startswith("##"):
        return token[2:].encode()
    # WordPiece does not say whether a space came before punctuation; most often none does
    return f" {token}".encode() if any(letter.isalnum() for letter in token) else token.encode()
