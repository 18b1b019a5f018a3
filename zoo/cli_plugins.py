"""`zoo plugins`, and `zoo plugins check NAME`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import click

from zoo.cli import CONTEXT, command, common
from zoo.errors import NO, ZooError, did_you_mean
from zoo.host import Host, Plugin, module_name
from zoo.out import Out, table

# What a plugin must not import when it is imported itself: each costs a second or more, in every command.
HEAVY = (
    "torch",
    "transformers",
    "timm",
    "open_clip",
    "tensorflow",
    "jax",
    "numpy",
    "scipy",
    "pandas",
    "huggingface_hub",
)


@click.group("plugins", invoke_without_command=True, context_settings=CONTEXT, help="List the plugins, and check one.")
@click.pass_context
@common
def plugins(out: Out, context: click.Context) -> None:
    if context.invoked_subcommand is not None:
        return
    host = Host(warn=_silent)
    host.entries()  # so that faults in this hook show as well
    rows = [
        (plugin.name, plugin.status, plugin.distribution, " ".join(hook.removeprefix("zoo_") for hook in plugin.hooks))
        for plugin in host.plugins
    ]

    def human() -> str:
        lines = [table(rows, header=("NAME", "STATUS", "FROM", "GIVES"))]
        for plugin in host.plugins:
            lines += [f"{plugin.name}: {problem.where}: {problem.what}" for problem in plugin.problems]
            if out.verbose:
                lines += [f"{plugin.name}: {plugin.file}"] if plugin.file else []
                lines += [problem.traceback.rstrip() for problem in plugin.problems if problem.traceback]
        lines += [f"conflict: {conflict}" for conflict in host.conflicts()]
        return "\n".join(lines)

    thing = {"plugins": [_as_dict(plugin) for plugin in host.plugins], "conflicts": [str(c) for c in host.conflicts()]}
    out.data(thing, human, lambda: "\n".join(f"{plugin.name} {plugin.status}" for plugin in host.plugins))
    if any(plugin.problems for plugin in host.plugins) and not out.verbose:
        out.hint("zoo plugins -v shows the tracebacks; zoo plugins check NAME looks closer")


def _silent(_: str) -> None:
    """This command shows every problem itself."""


def _as_dict(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "status": plugin.status,
        "distribution": plugin.distribution,
        "module": plugin.target,
        "file": plugin.file,
        "hooks": list(plugin.hooks),
        "problems": [
            {"where": problem.where, "what": problem.what, "traceback": problem.traceback}
            for problem in plugin.problems
        ],
    }


@command(
    "check", "Check a plugin: that it imports quickly, that its hooks and entries hold, that what it names exists."
)
@click.argument("name")
def check(out: Out, name: str) -> int:
    host = Host(warn=_silent, switches="")
    found = [plugin for plugin in host.plugins if plugin.name == name]
    if not found:
        names = [plugin.name for plugin in host.plugins]
        near = did_you_mean(name, names)
        raise ZooError(
            f'no plugin is called "{name}"', kind="unknown", hint=near or f"there are {', '.join(names) or 'none'}"
        )
    results = [(title, why) for plugin in found for title, why in _checks(host, plugin)]
    good = all(not why for _, why in results)
    thing = {
        "plugin": name,
        "ok": good,
        "checks": [{"check": title, "ok": not why, "why": why} for title, why in results],
    }
    rows = [("FAIL" if why else "ok", title, why) for title, why in results]
    out.data(thing, lambda: table(rows), lambda: "ok" if good else "FAIL")
    return 0 if good else NO


plugins.add_command(check)


def _checks(host: Host, plugin: Plugin) -> Iterator[tuple[str, str]]:
    """Each check, and what is wrong; nothing where nothing is."""
    yield "imports", "; ".join(problem.what for problem in plugin.problems if problem.where == "import")
    yield "imports nothing heavy", _heavy(plugin)
    yield "declares its API and its hooks", _problems(plugin, lambda where: where in ("ZOO_API", "hooks", "name"))
    if plugin.module is None:
        return
    entries = [entry for entry in host.entries() if host.owner(entry.name) is plugin]
    yield f"its {len(entries)} entries hold", _problems(plugin, lambda where: where == "zoo_entries")
    mine = [str(conflict) for conflict in host.conflicts() if str(plugin) in str(conflict)]
    yield "shares no name with another plugin", "; ".join(mine)
    named = {
        text
        for entry in entries
        for text in (entry.load, entry.probe, entry.sizes, *(part.probe for part in entry.parts))
    }
    named |= set(host.ops_of(plugin))
    missing = [_missing(text) for text in sorted(text for text in named if text is not None)]
    yield "what it names can be imported", "; ".join(filter(None, missing))
    bare = [
        f"{entry.name}#{part.name} has no patterns for layout {layout}"
        for entry in entries
        for part in entry.parts
        for layout in entry.layouts
        if layout not in part.tensors  # an empty tuple says that it has none of it
    ]
    yield "its parts are known in every layout", "; ".join(bare)


def _problems(plugin: Plugin, where: Callable[[str], bool]) -> str:
    return "; ".join(problem.what for problem in plugin.problems if where(problem.where))


def _heavy(plugin: Plugin) -> str:
    """Import it in a fresh process, and see what came along."""
    code = (
        "import importlib, json, sys\n"
        f"importlib.import_module({module_name(plugin)!r})\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else "it does not import"
    came = json.loads(done.stdout.splitlines()[-1])
    return f"importing it imports {', '.join(came)}; move that into the functions that need it" if came else ""


def _missing(text: str) -> str:
    """Whether "module:function" leads somewhere, without running it: the module is found, and its text defines it."""
    module, _, attribute = text.partition(":")
    try:
        spec = find_spec(module)
    except ImportError as error:
        return f"{text}: {error}"
    if spec is None or spec.loader is None:
        return f"{text}: there is no module {module}"
    source = getattr(spec.loader, "get_source", lambda _: None)(module)
    if source is not None and attribute not in _defined(source):
        return f"{text}: {module} defines no {attribute}"
    return ""


def _defined(source: str) -> set[str]:
    import ast

    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
