"""What to start from: a ranked list out of the table in suggestions.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, did_you_mean

if TYPE_CHECKING:
    from zoo.host import Host

# What people call a modality.
MODALITIES: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "texts", "language", "documents", "sentences"),
    "images": ("images", "image", "photos", "photographs", "pictures", "vision"),
    "audio": ("audio", "speech", "sound", "sounds", "recordings", "voice"),
    "series": ("series", "timeseries", "time-series", "sensors", "signals", "measurements"),
    "table": ("table", "tables", "tabular", "spreadsheet", "csv", "columns"),
}


@dataclass(frozen=True)
class Suggestion:
    """One line of the answer. `ref` is empty for a plain architecture, which is trained from scratch."""

    ref: str
    what: str
    why: str
    source: str
    licence: str = ""
    parameters: float | None = None  # millions
    tasks: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "ref": self.ref or None,
            "what": self.what,
            "why": self.why,
            "parameters_in_millions": self.parameters,
            "licence": self.licence,
            "tasks": list(self.tasks),
            "source": self.source,
        }


def modality_of(word: str) -> str:
    """The modality that a word stands for, or a ZooError with those there are."""
    for name, words in MODALITIES.items():
        if word.lower() in words:
            return name
    near = did_you_mean(word.lower(), [w for words in MODALITIES.values() for w in words])
    raise ZooError(
        f'"{word}" is no kind of data that is known here', hint=f"{near} there are {', '.join(MODALITIES)}".strip()
    )


def tasks_of(modality: str) -> list[str]:
    return sorted({task for row in _table()["model"] if row["modality"] == modality for task in row["tasks"]})


def suggest(host: Host, modality: str, task: str | None = None, examples: int | None = None) -> list[Suggestion]:
    """The models that fit, best first, and then the plain architecture to begin with where none does.

    `examples`: how many labelled ones are at hand. A model that is meant for more comes after those that are not; among
    the others, the one that asks for most comes first, because more data is what a larger model is for.
    """
    tasks = tasks_of(modality)
    if task is not None and task not in tasks and tasks:
        near = did_you_mean(task, tasks)
        raise ZooError(
            f'"{task}" is no task for {modality} that is known here',
            hint=f"{near} there are {', '.join(tasks)}".strip(),
        )
    known = {entry.name: entry for entry in host.entries()}
    rows = []
    for row in _table()["model"]:
        name, _, tag = str(row["ref"]).partition(".")
        if row["modality"] != modality or (task is not None and task not in row["tasks"]) or name not in known:
            continue
        if tag and tag not in known[name].tags:
            continue
        rows.append((row, known[name].licence_of(tag or known[name].default_tag)))
    if examples is not None:
        rows.sort(key=lambda each: (each[0]["least"] > examples, abs(each[0]["least"] - examples)))
    found = [
        Suggestion(
            ref=row["ref"],
            what=row["ref"],
            why=row["why"] + _short(row["least"], examples),
            source=row["source"],
            licence=licence,
            parameters=row.get("parameters"),
            tasks=tuple(row["tasks"]),
        )
        for row, licence in rows
    ]
    plain = [
        Suggestion("", row["architecture"], row["why"], row["source"])
        for row in _table()["plain"]
        if row["modality"] == modality
    ]
    return found + plain


def _short(least: int, examples: int | None) -> str:
    return f" (meant for {least:,} examples or more)" if examples is not None and least > examples else ""


def _table() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(files("zoo").joinpath("suggestions.toml").read_text(encoding="utf-8"))
