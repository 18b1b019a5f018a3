"""What a plugin says about a model, as pure data: entries, their parts and sources, and how a name finds them.

Nothing here imports torch or touches the network. `load` and `probe` are import strings ("package.module:function"),
resolved only when something is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from zoo.errors import ZooError, did_you_mean
from zoo.reference import Reference

if TYPE_CHECKING:
    from torch import Tensor, nn

SourceKind = Literal["hub", "package", "file", "timm", "open_clip"]

_ENTRY = re.compile(r"[a-z0-9][a-z0-9_-]*")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PART = re.compile(r"[a-z_][a-z0-9_]*")
_IMPORT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def _must(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Source:
    """One place that has an entry's files.

    `location` is a repository id (hub), "dist/path" (package), a path (file), or the library's own name (timm,
    open_clip). `files` names the weights first, then what belongs to them; empty means: find them, safetensors first.
    `sha256` maps a file's name to the hash that is known for it; a file with other bytes is refused. `licence` is that
    of these files where it is not the entry's.
    """

    kind: SourceKind
    location: str
    revision: str | None = None
    files: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    licence: str = ""

    def __post_init__(self) -> None:
        _must(self.location, "a source needs a location")
        for name, digest in self.sha256.items():
            _must(re.fullmatch(r"[0-9a-f]{64}", digest), f"{self.location}: the sha256 of {name} is not 64 hex digits")

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{'hf' if self.kind == 'hub' else self.kind}:{self.location}{at}"


@dataclass(frozen=True)
class Part:
    """A named piece of a model.

    `tensors` gives, per layout of the entry, the glob patterns of the tensors that belong to it. Parts may overlap:
    a text encoder holds its embeddings. `probe` is the import string of
    `f(checkpoint: surgery.Checkpoint, config: Mapping) -> zoo.PartProbe`; `outputs` are the names it answers for.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]]
    probe: str | None = None
    outputs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            _must(_PART.fullmatch(name), f"{name!r} is not a name for a part")
        _must(self.probe is None or _IMPORT.fullmatch(self.probe), f"part {self.name}: {self.probe!r} is no import")
        for layout, patterns in self.tensors.items():
            _must(not isinstance(patterns, str), f"part {self.name}: {layout} wants a tuple of patterns")


@dataclass(frozen=True)
class Entry:
    """A named model of the catalogue, or what an open namespace made of a reference.

    `tags` maps a tag ("base", "large-v3") to its sources, in the order in which they are tried. `layouts` maps the name
    of each way the tensors are spelled to patterns that must all be met for a checkpoint to be of that layout.
    An entry that is not `open` has no sources; `note` then says so, and what to use instead. `sizes` is the import
    string of `f(checkpoint, config) -> zoo.Sizes | None`: the sizes that a target may have otherwise.
    """

    name: str
    tags: Mapping[str, tuple[Source, ...]] = field(default_factory=lambda: _NOTHING)
    default_tag: str = ""
    modality: str = ""
    tasks: tuple[str, ...] = ()
    licence: str = ""
    open: bool = True
    note: str = ""
    layouts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NOTHING)
    requires: str | None = None
    load: str | None = None
    probe: str | None = None
    outputs: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    sizes: str | None = None

    def __post_init__(self) -> None:
        if ":" not in self.name:  # "hf:org/repo" and its like are names that no one types without the scheme
            _must(_ENTRY.fullmatch(self.name), f"{self.name!r} is not a name for an entry")
        if self.open:
            _must(self.tags, f"entry {self.name} is open and has no sources")
            _must(self.default_tag in self.tags, f"entry {self.name}: the default tag {self.default_tag!r} is no tag")
        else:
            _must(self.note, f"entry {self.name} is closed and does not say why")
        for tag in self.tags:
            _must(_TAG.fullmatch(tag), f"entry {self.name}: {tag!r} is not a name for a tag")
        for text in (self.load, self.probe, self.sizes):
            _must(text is None or _IMPORT.fullmatch(text), f"entry {self.name}: {text!r} is not module:function")
        names = [name for part in self.parts for name in (part.name, *part.aliases)]
        _must(len(names) == len(set(names)), f"entry {self.name}: two parts have one name")
        for part in self.parts:
            strange = set(part.tensors) - set(self.layouts or {"": ()})
            _must(not strange, f"entry {self.name}, part {part.name}: unknown layouts {sorted(strange)}")

    def licence_of(self, tag: str) -> str:
        """The licence of one tag's weights; the entry's own for a tag that it does not have."""
        return next((source.licence for source in self.tags.get(tag, ()) if source.licence), self.licence)

    def part(self, name: str) -> Part:
        """The part of that name or alias, or an error that lists those there are."""
        for part in self.parts:
            if name == part.name or name in part.aliases:
                return part
        have = ", ".join(part.name for part in self.parts)
        raise ZooError(
            f'{self.name} has no part "{name}"',
            kind="unknown",
            hint=f"its parts are {have}" if have else f"zoo show {self.name} shows its tensors",
        )

    def layout_of(self, names: Iterable[str]) -> str | None:
        """The first layout whose patterns are all met by these tensor names. An entry without layouts has one, ""."""
        if not self.layouts:
            return ""
        known = tuple(names)
        for layout, patterns in self.layouts.items():
            if all(any(fnmatchcase(name, pattern) for name in known) for pattern in patterns):
                return layout
        return None

    def tensors_of(self, part: Part, names: Iterable[str]) -> list[str]:
        """The tensors of a part, in the checkpoint's order, or an error that says why there are none."""
        known = tuple(names)
        layout = self.layout_of(known)
        if layout is None:
            raise ZooError(
                f"the tensors are not spelled in any way that {self.name} is known in ({', '.join(self.layouts)})",
                kind="weights",
                hint="zoo show lists the tensors; graft without a part",
            )
        found = matching(known, part.tensors.get(layout, ()))
        if not found:
            raise ZooError(f"this checkpoint of {self.name} holds no tensor of its part {part.name}", kind="weights")
        return found


def matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Recognition:
    """What an unlabelled checkpoint could be: the name of an entry, and the evidence, one sentence each.

    `matched` counts the pieces of evidence of equal weight, so that two recognitions can be compared; ties are shown.
    """

    entry: str
    evidence: tuple[str, ...]
    matched: int = 1


@dataclass(frozen=True)
class PartProbe:
    """How to run a part: what a probe's import string gives.

    `inputs(seed, variant)` are keyed by the field's standard names: input_ids, attention_mask, pixel_values ...
    `narrower`: probes of the same reference that answer for a piece of these outputs, as for the class's token of all
    tokens. They are tried in turn where a target does not show all; the report says which one it was.
    """

    reference: nn.Module
    run: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, ...]]
    inputs: Callable[[int, str], dict[str, Tensor]]
    variants: tuple[str, ...] = ("plain", "padded", "shortest", "longest")
    outputs: tuple[str, ...] = ()
    narrower: tuple[PartProbe, ...] = ()


@dataclass(frozen=True)
class Pick:
    """What a reference stands for: an entry, one of its tags, perhaps a part.

    `part` stays empty while `reference.part` names one when the entry is not known yet: an unlabelled checkpoint has to
    be recognised first.
    """

    reference: Reference
    entry: Entry
    tag: str
    part: Part | None = None

    @property
    def revision(self) -> str | None:
        return self.reference.revision

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where to get it, best first. A closed entry answers with its note."""
        if not self.entry.open:
            raise ZooError(f"{self.entry.name}: {self.entry.note}", kind="closed")
        return self.entry.tags[self.tag]


def pick(reference: Reference, entries: Mapping[str, Entry]) -> Pick:
    """Find a catalogue reference among `entries`: an entry of exactly that name wins, then its tag, then the part."""
    found = _tagged(reference.body, entries)
    if found is not None:
        entry, tag = found
        if reference.part is None:
            return Pick(reference, entry, tag)
        part = entry.part(reference.part)
        return Pick(replace(reference, part=part.name), entry, tag, part)
    stem = reference.body
    missing: ZooError | None = None
    while "-" in stem:
        stem, _, _ = stem.rpartition("-")
        found = _tagged(stem, entries)
        if found is None:
            continue
        entry, tag = found
        try:
            part = entry.part(reference.body[len(stem) + 1 :])
        except ZooError as error:
            missing = missing or error
            continue
        canonical = Reference(reference.scheme, stem, reference.revision).of_part(part.name)
        return Pick(canonical.of_part(entry.part(reference.part).name if reference.part else None), entry, tag, part)
    raise missing or _unknown(reference, entries)


def _tagged(text: str, entries: Mapping[str, Entry]) -> tuple[Entry, str] | None:
    if text in entries:
        return entries[text], entries[text].default_tag
    name, _, tag = text.partition(".")
    if name in entries and tag in entries[name].tags:
        return entries[name], tag
    return None


def _unknown(reference: Reference, entries: Mapping[str, Entry]) -> ZooError:
    name, dot, tag = reference.body.partition(".")
    if dot and name in entries:
        tags = list(entries[name].tags)
        near = did_you_mean(tag, tags)
        hint = f"{near} its tags are {', '.join(tags)}".strip() if tags else f"{name} has no tags"
        return ZooError(f'{name} has no tag "{tag}"', kind="unknown", hint=hint)
    spellings = [*entries, *(f"{entry.name}-{part.name}" for entry in entries.values() for part in entry.parts)]
    near = did_you_mean(reference.body, spellings) or did_you_mean(name, list(entries))
    more = "zoo list shows the names there are; a repository of the hub is hf:org/repo, a file is file:path"
    return ZooError(f'no entry is called "{reference.body}"', kind="unknown", hint=f"{near} {more}".strip())
