"""A reference to weights, resolved: the tensors that were asked for, and what is known of running them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.entry import Entry, Part, PartProbe, Pick
from zoo.errors import ZooError

if TYPE_CHECKING:
    import surgery
    from zoo.host import Host
    from zoo.hub import Hub
    from zoo.sources import Located

_ALL = "the whole model"


@dataclass
class Source:
    """A reference to weights, resolved: the tensors that were asked for, and what is known of running them."""

    located: Located
    whole: surgery.Checkpoint
    checkpoint: surgery.Checkpoint  # the part of it that was asked for
    config: Mapping[str, Any]
    entry: Entry | None  # None where the checkpoint was not recognised
    part: Part | None
    _hashes: Future[dict[str, str]] | None = field(default=None, repr=False)

    @property
    def ref(self) -> str:
        return str(self.located.pick.reference)

    @property
    def probe(self) -> str | None:
        """The import string of what runs it."""
        if self.part is not None:
            return self.part.probe
        return self.entry.probe if self.entry is not None else None

    def reference(self) -> PartProbe | None:
        """The reference, ready to run; None where nobody knows how to run this. A missing extra is an error."""
        from zoo.api import needs

        if self.probe is None:
            return None
        assert self.entry is not None  # whoever names a probe
        with needs(self.entry.requires):
            made = imported(self.probe)(self.checkpoint, self.config)
        if not isinstance(made, PartProbe):
            raise ZooError(f"{self.probe} gave a {type(made).__name__}, and not a zoo.PartProbe", kind="plugin")
        return made

    def hashing(self) -> Future[dict[str, str]]:
        """The sha256 of the files of weights, being computed beside whatever else is done."""
        if self._hashes is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
            self._hashes = pool.submit(_hashes, self.located)
            pool.shutdown(wait=False)
        return self._hashes

    def unrunnable(self) -> str:
        """Why there is no reference."""
        if self.entry is None:
            return f"{self.ref} was not recognised, so there is no reference to run"
        return f"{self.entry.name} has no reference for {self.part.name if self.part else _ALL}"

    def stamped(self, plan: surgery.Plan) -> surgery.Plan:
        """The plan with where its source came from: revision, and the sha256 of the files."""
        stamp = replace(
            plan.source,
            description=f"{self.ref} from {self.located.source}",
            revision=self.located.commit,
            files=self.hashing().result(),
        )
        return replace(plan, source=stamp)


def resolve(
    ref: str,
    *,
    part: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    of: Host | None = None,
    hub: Hub | None = None,
) -> Source:
    """The weights behind a reference, pulled if need be."""
    from zoo import api

    of = of or api.host()
    located = api.fetch(ref, part=part, revision=revision, offline=offline, of=of, hub=hub)
    whole = api.open_whole(located, of)
    config = located.config
    entry, wanted = _recognised(located.pick, of, config, whole)
    checkpoint = whole
    if located.pick.reference.part is not None:
        checkpoint = whole.view(of.part_tensors(located.pick, config, whole))
    return Source(located, whole, checkpoint, config, entry, wanted)


def _recognised(
    chosen: Pick, of: Host, config: Mapping[str, Any], tensors: Mapping[str, surgery.TensorInfo]
) -> tuple[Entry | None, Part | None]:
    """The entry and part that say how to run it; by recognition where the reference names none."""
    if chosen.entry.parts or chosen.entry.probe:
        return chosen.entry, chosen.part
    found = of.recognise(config, tensors)
    best = [recognition for recognition in found if recognition.matched == found[0].matched]
    if len(best) != 1:
        return None, None
    entry = of.find(best[0].entry)
    wanted = chosen.reference.part
    return entry, entry.part(wanted) if wanted is not None else None


def _hashes(located: Located) -> dict[str, str]:
    known = located.checked or {}
    found = {}
    for path in _weights(located):
        if path.name in known:
            found[path.name] = known[path.name]
        else:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _weights(located: Located) -> list[Path]:
    if not located.weights.name.endswith(".index.json"):
        return [located.weights]
    from zoo.hub import shards_of

    return [located.weights, *(located.weights.parent / name for name in shards_of(located.weights))]


def imported(text: str) -> Callable[..., Any]:
    """What an import string names. A module that is missing is told from one that lacks the name."""
    module, _, name = text.partition(":")
    found = getattr(import_module(module), name, None)
    if not callable(found):
        raise ZooError(f"{module} has no function {name}", kind="plugin", hint="zoo plugins check NAME looks closer")
    return found
