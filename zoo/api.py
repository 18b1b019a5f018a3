"""The library behind the command line: find, pull and open by reference, over one host and one hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.entry import Entry, Pick
from zoo.errors import ZooError
from zoo.host import Host
from zoo.reference import parse

if TYPE_CHECKING:
    import surgery
    from zoo.hub import Hub
    from zoo.sources import Located


@cache
def host() -> Host:
    """The host of this process, with the plugins that are installed."""
    return Host()


@contextmanager
def needs(extra: str | None) -> Iterator[None]:
    """Around a call into an entry's `load` or `probe`: a library that is missing becomes the `pip install` it takes."""
    try:
        yield
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        raise ZooError(
            f"this runs {error.name}, which is not installed", kind="extra", hint=f'pip install "weightzoo[{extra}]"'
        ) from error


def make_hub(of: Host | None = None, *, quiet: bool = True) -> Hub:
    """The hub, with the repositories of the catalogue for suggestions."""
    from zoo.hub import Hub

    def known() -> list[str]:
        tags = [tag for entry in (of or host()).entries() for tag in entry.tags.values()]
        return [source.location for sources in tags for source in sources if source.kind == "hub"]

    return Hub(known=known, quiet=quiet)


def entries() -> list[Entry]:
    """All entries of the catalogue, by name."""
    return host().entries()


def find(ref: str) -> Entry:
    """The entry behind a reference; no network. An unknown name raises a ZooError with close matches."""
    return host().find(ref)


def choose(ref: str, *, part: str | None = None, revision: str | None = None, of: Host | None = None) -> Pick:
    """What a reference stands for, with a part or revision given apart."""
    chosen = (of or host()).pick(parse(ref))
    reference = chosen.reference.at(revision)
    if part is None:
        return Pick(reference, chosen.entry, chosen.tag, chosen.part)
    found = chosen.entry.part(part) if chosen.entry.parts else None
    return Pick(reference.of_part(found.name if found else part), chosen.entry, chosen.tag, found)


def fetch(
    ref: str,
    *,
    part: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    check: bool = True,
    of: Host | None = None,
    hub: Hub | None = None,
) -> Located:
    """`pull`, with all there is to know about it: source, commit, files, what was passed over."""
    from zoo.sources import locate

    of = of or host()
    chosen = choose(ref, part=part, revision=revision, of=of)
    found = locate(chosen, hub or make_hub(of), expand=of.pick, offline=offline, check=check)
    if found is None:
        raise ZooError(f"{ref} could not be located", kind="weights")
    return found


def pull(ref: str, *, part: str | None = None, revision: str | None = None, offline: bool = False) -> Path:
    """Bring a checkpoint to this machine and give the path of its weights (a file, or the index of its shards).

    Its configuration and tokenizer lie beside it. Files go to the hub client's ordinary cache.
    """
    return fetch(ref, part=part, revision=revision, offline=offline).weights


def open_whole(located: Located, of: Host | None = None) -> surgery.Checkpoint:
    """The checkpoint of located files, whatever part was asked for; plugins' formats are known when it is opened."""
    import surgery
    from zoo.sources import unprefixed

    of = of or host()
    for extra in of.formats():
        surgery.register(extra)
    checkpoint = surgery.open(located.weights, key=located.key)
    if located.pick.entry.parts or located.pick.entry.probe:
        return checkpoint

    def evidence(tensors: Mapping[str, surgery.TensorInfo]) -> int:
        return max((found.matched for found in of.recognise(located.config, tensors)), default=0)

    return unprefixed(checkpoint, evidence)


def open_located(located: Located, of: Host | None = None) -> surgery.Checkpoint:
    """The checkpoint of located files; where a part was asked for, a view of its tensors under their own names."""
    of = of or host()
    checkpoint = open_whole(located, of)
    if located.pick.reference.part is None:
        return checkpoint
    return checkpoint.view(of.part_tensors(located.pick, located.config, checkpoint))


def open(
    ref: str, *, part: str | None = None, revision: str | None = None, offline: bool = False
) -> surgery.Checkpoint:
    """The checkpoint behind a reference, lazily: pulled if need be, headers read, no tensor touched."""
    return open_located(fetch(ref, part=part, revision=revision, offline=offline))
