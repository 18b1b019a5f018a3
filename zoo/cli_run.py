"""`zoo run` and `zoo suggest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from zoo.cli import command, host_for
from zoo.errors import ZooError
from zoo.out import Out, table


@command("run", "Run a model on a plain input: a text, or the path of an image, a recording or a table.")
@click.argument("ref")
@click.argument("given", metavar="INPUT", nargs=-1, required=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, mps ...")
def run(out: Out, ref: str, given: tuple[str, ...], device: str) -> None:
    from zoo.loaded import load

    loaded = load(ref, device=device)
    said = loaded.describe(loaded.run(given[0] if len(given) == 1 else list(given)))
    out.data({"ref": ref, "input": list(given), "result": said}, lambda: "\n".join(_lines(said)))


def _lines(thing: Any, indent: str = "") -> list[str]:
    """A result as people read it: names, and what stands under them."""
    if isinstance(thing, Mapping):
        found = []
        for key, value in thing.items():
            if isinstance(value, Mapping) or (
                isinstance(value, list) and value and isinstance(value[0], (list, Mapping))
            ):
                found += [f"{indent}{key}", *_lines(value, indent + "  ")]
            else:
                found.append(f"{indent}{key}: {_short(value)}")
        return found
    if isinstance(thing, list) and thing and isinstance(thing[0], Mapping):
        return [indent + line for line in table([[_short(v) for v in row.values()] for row in thing]).splitlines()]
    if isinstance(thing, list) and thing and isinstance(thing[0], list):
        return [indent + _short(row) for row in thing]
    return [indent + _short(thing)]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_short(each) for each in value)
    return str(value)


@command("suggest", "Suggest what to start from: for which data, which task, how much of it.")
@click.argument("data")
@click.argument("task", required=False)
@click.option("--examples", type=click.IntRange(min=0), help="How many labelled examples there are.")
def suggest(out: Out, data: str, task: str | None, examples: int | None) -> None:
    from zoo.suggest import modality_of, tasks_of
    from zoo.suggest import suggest as found_for

    modality = modality_of(data)
    found = found_for(host_for(out), modality, task, examples)
    if not found:
        raise ZooError(f"nothing is known for {modality}", kind="unknown", hint="zoo list shows the names there are")

    def human() -> str:
        lines = []
        for i, each in enumerate(found, 1):
            size = f"{each.parameters:g}M parameters" if each.parameters is not None else ""
            head = "; ".join(text for text in (size, each.licence) if text)
            lines.append(f"{i}. {each.what}{f' ({head})' if head else ''}{'' if each.ref else ', from scratch'}")
            lines.append(f"   {each.why}")
            lines.append(f"   source: {each.source}")
        return "\n".join(lines)

    out.data(
        {"data": modality, "task": task, "examples": examples, "suggestions": [each.as_dict() for each in found]},
        human,
        lambda: "\n".join(each.ref for each in found if each.ref),
    )
    if task is None and tasks_of(modality):
        out.hint(f"a task narrows it: {', '.join(tasks_of(modality))}")
    if examples is None:
        out.hint("--examples N ranks by how many labelled examples there are")
