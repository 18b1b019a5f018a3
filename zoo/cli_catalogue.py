"""`zoo list`, `zoo show` and `zoo pull`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import command, host_for
from zoo.errors import ZooError
from zoo.out import Out, size, table

if TYPE_CHECKING:
    from surgery import TensorInfo
    from zoo.entry import Entry, Pick
    from zoo.host import Host
    from zoo.sources import Located


# ---------------------------------------------------------------------------------------------------- list


@command("list", "List the models of the catalogue.")
@click.option("--modality", help="Only those for text, vision, audio ...")
def list_(out: Out, modality: str | None) -> None:
    entries = [entry for entry in host_for(out).entries() if modality in (None, entry.modality)]
    header = ("NAME", "MODALITY", "PARTS", "TAGS", "LICENCE")
    rows = [
        (
            entry.name,
            entry.modality,
            " ".join(part.name for part in entry.parts),
            " ".join(entry.tags) if entry.open else "(closed)",
            entry.licence,
        )
        for entry in entries
    ]
    out.data(
        {"entries": [describe(entry) for entry in entries]},
        lambda: table(rows, header=header),
        lambda: "\n".join(entry.name for entry in entries),
    )
    if entries:
        out.hint("zoo show NAME shows what is in one; a tag is chosen as in NAME.TAG, the first is the default")
    else:
        out.hint("no plugin gave an entry; zoo plugins shows why")


def describe(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "modality": entry.modality,
        "tasks": list(entry.tasks),
        "licence": entry.licence,
        "open": entry.open,
        "note": entry.note,
        "default_tag": entry.default_tag,
        "tags": {tag: [str(source) for source in sources] for tag, sources in entry.tags.items()},
        "parts": [part.name for part in entry.parts],
        "requires": entry.requires,
    }


# ---------------------------------------------------------------------------------------------------- show


@command("show", "Show the parts and tensors of a checkpoint, from its headers; nothing is downloaded.")
@click.argument("ref")
def show(out: Out, ref: str) -> None:
    from zoo import api
    from zoo import show as tree
    from zoo.sources import locate

    host = host_for(out)
    chosen = host.pick(ref)
    hub = api.make_hub(host)
    located = locate(chosen, hub, expand=host.pick, download=False, check=False)
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = {}
    if located is not None:
        checkpoint = api.open_whole(located, host)
        tensors, config, where = checkpoint, located.config, located.where
        notes = checkpoint.notes
    else:
        tensors, where = _from_the_hub(chosen, host, ref)
    if chosen.entry.open and chosen.entry.note:
        notes = (*notes, chosen.entry.note)
    entry, evidence = _entry_of(chosen, host, config, tensors)
    wanted = host.part_tensors(chosen, config, tensors)
    shown = {name: tensors[name] for name in wanted}
    if chosen.reference.part is None:
        found = tree.sections(shown, entry)
    else:
        found = [tree.Section(chosen.reference.part, tree.tree(shown), shown)]
    thing = {
        "ref": str(chosen.reference),
        "source": where,
        "files": [str(path) for path in located.files] if located is not None else [],
        "licence": chosen.entry.licence_of(chosen.tag),
        **tree.totals(shown),
        "recognised": evidence,
        "parts": tree.as_dict(found),
        "notes": list(notes),
    }

    def human() -> str:
        lines = [f"{out.style(str(chosen.reference), 'bold')}  {tree.summary(shown)}", f"from {where}"]
        for name, why in evidence.items():
            lines.append(f"looks like {name}: {'; '.join(why)}")
        return "\n".join([*lines, "", tree.render(found)])

    out.data(thing, human, lambda: tree.render(found))
    for note in notes:
        out.note(note)


def _entry_of(
    chosen: Pick, host: Host, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[Entry | None, dict[str, list[str]]]:
    """The entry whose parts to show; where a plugin has to recognise the checkpoint, its evidence, ties included."""
    if chosen.entry.parts:
        return chosen.entry, {}
    found = host.recognise(config, tensors)
    best = [recognition for recognition in found if recognition.matched == found[0].matched]
    evidence = {recognition.entry: list(recognition.evidence) for recognition in best}
    return (host.find(best[0].entry) if len(best) == 1 else None), evidence


def _from_the_hub(chosen: Pick, host: Host, ref: str) -> tuple[Mapping[str, TensorInfo], str]:
    """The headers of the first repository among the sources, by byte ranges."""
    from zoo import api

    hub = api.make_hub(host)
    source = next(source for source in chosen.sources if source.kind == "hub")
    try:
        commit, _, tensors = hub.headers(source.location, chosen.revision or source.revision, source.files)
    except ZooError as error:
        if error.kind == "not-cached":
            error.hint = f"zoo pull {ref}"
        raise
    return tensors, f"{source} at commit {commit} (headers only; zoo pull {ref} brings the rest)"


# ---------------------------------------------------------------------------------------------------- pull


@command(
    "pull", "Bring a checkpoint to this machine: weights, configuration and tokenizer. Prints where the weights are."
)
@click.argument("ref")
@click.option("--part", help="The same as REF#PART.")
@click.option("--revision", help="The same as REF@REVISION: a branch, tag or commit of the hub.")
@click.option("--offline", is_flag=True, help="Do not ask the network; what is on this machine, or an error.")
def pull(out: Out, ref: str, part: str | None, revision: str | None, offline: bool) -> None:
    from zoo import api

    host = host_for(out)
    hub = api.make_hub(host, quiet=not out.progress)
    located = api.fetch(ref, part=part, revision=revision, offline=offline, of=host, hub=hub)
    for passed in located.passed_over:
        out.note(f"passed over {passed}")
    if located.note:
        out.warn(located.note)
    reference = located.pick.reference
    if located.commit is not None and reference.revision != located.commit:
        out.hint(f"this very commit is {_pinned(located)}")
    out.data(_as_dict(located), lambda: _describe(located), lambda: str(located.weights))


def _pinned(located: Located) -> str:
    from dataclasses import replace

    return str(replace(located.pick.reference, revision=located.commit))


def _as_dict(located: Located) -> dict[str, Any]:
    return {
        "ref": str(located.pick.reference),
        "entry": located.pick.entry.name,
        "source": str(located.source),
        "commit": located.commit,
        "weights": str(located.weights),
        "files": [str(path) for path in located.files],
        "sha256": dict(located.checked or {}),
        "passed_over": list(located.passed_over),
        "note": located.note,
    }


def _describe(located: Located) -> str:
    checked = located.checked or {}
    rows = [
        (
            path.name,
            size(path.stat().st_size),
            f"sha256 {checked[path.name][:12]}... as known" if path.name in checked else "",
        )
        for path in located.files
    ]
    head = f"{located.pick.reference} from {located.where}"
    return "\n".join([head, *(f"  {line}" for line in table(rows).splitlines()), str(located.weights)])
