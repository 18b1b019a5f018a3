"""What a family of vision models is to this plugin: its names in each library, and the pieces that it is cut into.

Pure data. A piece is told by the names that it holds at the top of a model: children such as `patch_embed`, or tensors
such as `cls_token`. From them come both the patterns of an entry's part and what of a model is kept to run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from zoo import Entry, Part, PartProbe, Source

if TYPE_CHECKING:
    from surgery import Checkpoint

TIMM, TORCHVISION, TRANSFORMERS = "timm", "torchvision", "transformers"
JAX = "jax"  # the files that Google published, arrays by the names of its own programs

# What each piece answers with: embedded patches; features (tokens or a map of them); logits.
OUTPUTS = {
    "patch": ("embeddings",),
    "stem": ("embeddings",),
    "encoder": ("last_hidden_state",),
    "body": ("last_hidden_state",),
    "head": ("logits",),
}
_ALIASES = {"body": ("encoder",)}


def hub(*models: str) -> tuple[Source, ...]:
    """timm's own repositories, one for each set of weights."""
    return tuple(Source("hub", f"timm/{model}") for model in models)


@dataclass(frozen=True)
class Family:
    """One family, in every spelling of its tensors that is known.

    `pieces`: layout -> part -> top-level names. `prefixes`: what timm's names of its architectures begin with.
    `bodies`: model_type in transformers -> the attribute that a model with a head keeps its body under.
    `candidates`: layout -> architectures that a checkpoint without configuration is compared with, by all names and
    shapes. `renamed`: layout -> that layout's names in another's, as (pattern, replacement) in turn.
    """

    name: str
    prefixes: tuple[str, ...]
    layouts: Mapping[str, tuple[str, ...]]
    pieces: Mapping[str, Mapping[str, tuple[str, ...]]]
    bodies: Mapping[str, str]
    candidates: Mapping[str, tuple[str, ...]]
    not_from: tuple[str, ...] = ()  # prefixes of timm that begin alike, and are another family's
    never: tuple[str, ...] = ()  # patterns of tensors by which it is another model, however alike the rest

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the entries."""
        order = next(iter(self.pieces.values()))
        return tuple(
            Part(
                part,
                {layout: _patterns(pieces[part]) for layout, pieces in self.pieces.items() if part in pieces},
                probe=f"zoo_vision.{self.name}:{part}_probe",
                outputs=OUTPUTS[part],
                aliases=_ALIASES.get(part, ()),
            )
            for part in order
        )

    def entry(self, tags: Mapping[str, tuple[Source, ...]], default_tag: str, licence: str) -> Entry:
        return Entry(
            name=self.name,
            tags=tags,
            default_tag=default_tag,
            modality="vision",
            tasks=("image-classification", "feature-extraction"),
            licence=licence,
            layouts=self.layouts,
            requires="vision",
            load="zoo_vision.loading:load",
            probe=f"zoo_vision.{self.name}:whole_probe",
            outputs=("last_hidden_state", "logits"),
            parts=self.parts,
            sizes="zoo_vision.sizes:sizes",
        )

    def layout_of(self, names: Iterable[str]) -> str | None:
        """The layout that a checkpoint is in, by the names of its tensors."""
        known = tuple(names)
        for layout, patterns in self.layouts.items():
            if all(any(fnmatchcase(name, pattern) for name in known) for pattern in patterns):
                return layout
        return None

    def probe(self, part: str) -> Callable[[Checkpoint, Mapping[str, Any]], PartProbe]:
        """What an import string names: it runs a part, or the "whole". Libraries are imported only then."""

        def probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
            from zoo_vision.probes import probe_of

            return probe_of(self, part, checkpoint, config)

        return probe


def _patterns(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(pattern for name in names for pattern in (name, f"{name}.*"))


def both(body: str, *names: str) -> tuple[str, ...]:
    """Names in a model of transformers: with no head they stand at the top, else under the body's name."""
    return tuple(each for name in names for each in (name, f"{body}.{name}"))
