"""The plugin host: finds plugins, imports and calls each apart, and remembers what went wrong with which.

A plugin that raises, at import or in a hook, stops nobody: it costs one line on stderr and its own contribution.
A host has no global state; `zoo.api.host()` keeps the one that the command line and the library use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from zoo import hooks
from zoo.entry import Entry, Part, Pick, Recognition, Source, SourceKind, pick
from zoo.errors import ZooError, did_you_mean
from zoo.reference import CATALOGUE, Reference, parse

if TYPE_CHECKING:
    from surgery import Format, TensorInfo

# What a plugin can do wrong may end in any of these. KeyboardInterrupt is the person's, and goes through.
_FAULTS = (Exception, SystemExit)


@dataclass
class Problem:
    """One thing that is wrong with a plugin: where, what, and the traceback where there was an exception."""

    where: str
    what: str
    traceback: str = ""


@dataclass
class Plugin:
    """A plugin as found: its name, where it comes from, and how it fares."""

    name: str
    target: str  # what the entry point names: "zoo_text"
    entry_point: importlib.metadata.EntryPoint | None = None
    module: object | None = None
    off: bool = False
    problems: list[Problem] = field(default_factory=list)
    hooks: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """ok, off, failed (not usable at all), or broken (a hook raised or gave nonsense; the rest is used)."""
        if self.off:
            return "off"
        if self.module is None:
            return "failed"
        return "broken" if self.problems else "ok"

    @property
    def distribution(self) -> str:
        """Name and version of the distribution that brought it, for messages."""
        # Reading these parses the distribution's METADATA, so it is done only when someone looks.
        found = self.entry_point.dist if self.entry_point is not None else None
        return f"{found.name} {found.version}" if found is not None else "no distribution"

    @property
    def file(self) -> str:
        return str(getattr(self.module, "__file__", "") or "")

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution})"


def _discover() -> list[Plugin]:
    found = [
        Plugin(point.name, point.value, entry_point=point)
        for point in importlib.metadata.entry_points(group=hooks.GROUP)
    ]
    return sorted(found, key=lambda plugin: (plugin.name, plugin.target))


def _switches(text: str) -> tuple[set[str], set[str]]:
    """ZOO_PLUGINS: "-audio,-text" switches these off; names without a sign switch all others off."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    return {word for word in words if not word.startswith("-")}, {word[1:] for word in words if word.startswith("-")}


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201  the last resort of a library caller; the command line passes its own


class Host:
    """Plugins, and what they bring.

    `plugins` maps names to modules (or any objects with hook implementations), or to names of modules to import; left
    out, they are found through the entry points of the group "zoo". `switches` is what ZOO_PLUGINS would say.
    `warn` gets one line for each fault, when it happens.
    """

    def __init__(
        self,
        plugins: Mapping[str, object] | None = None,
        *,
        switches: str | None = None,
        warn: Callable[[str], None] = _to_stderr,
    ) -> None:
        self.warn = warn
        self._managers: dict[int, pluggy.PluginManager] = {}
        if plugins is None:
            self.plugins = _discover()
        else:
            self.plugins = [
                Plugin(name, given, module=None) if isinstance(given, str) else Plugin(name, repr(given), module=given)
                for name, given in plugins.items()
            ]
        self._switch(os.environ.get("ZOO_PLUGINS", "") if switches is None else switches)
        seen: dict[str, Plugin] = {}
        for plugin in self.plugins:
            first = seen.setdefault(plugin.name, plugin)
            if plugin.off:
                continue
            if first is not plugin:
                self._fault(plugin, "name", f"{first} has this name already; one of the two has to be uninstalled")
                plugin.module = None
            else:
                self._load(plugin)

    def _switch(self, text: str) -> None:
        only, without = _switches(text)
        for plugin in self.plugins:
            plugin.off = plugin.name in without or bool(only and plugin.name not in only)
        for word in sorted((only | without) - {plugin.name for plugin in self.plugins}):
            near = did_you_mean(word, [plugin.name for plugin in self.plugins])
            self.warn(f'warning: ZOO_PLUGINS names "{word}", and no plugin is called that{"; " if near else ""}{near}')

    # ------------------------------------------------------------------------------------------------ faults

    def _fault(self, plugin: Plugin, where: str, what: str, error: BaseException | None = None) -> None:
        text = "".join(traceback.format_exception(error)) if error is not None else ""
        plugin.problems.append(Problem(where, what, text))
        self.warn(f"warning: plugin {plugin}: {where}: {what} (zoo plugins -v shows more)")

    def _guarded(self, plugin: Plugin, where: str, call: Callable[[], Any]) -> Any:
        """The result of a call into a plugin, or None after a fault, which is then on record."""
        try:
            return call()
        except _FAULTS as error:
            self._fault(plugin, where, _line(error), error)
            return None

    def _load(self, plugin: Plugin) -> None:
        def work() -> object:
            if plugin.module is not None:
                return plugin.module
            if plugin.entry_point is not None:
                return plugin.entry_point.load()
            return importlib.import_module(plugin.target)

        module = self._guarded(plugin, "import", work)
        plugin.module = None
        if module is None:
            return
        wanted = getattr(module, "ZOO_API", None)
        if wanted is None:
            self._fault(plugin, "ZOO_API", f"it does not say which API it is written for: ZOO_API = {hooks.HOOK_API}")
        elif wanted != hooks.HOOK_API:
            self._fault(plugin, "ZOO_API", f"it is written for API {wanted!r}, and this host speaks {hooks.HOOK_API}")
        else:
            self._register(plugin, module)

    def _register(self, plugin: Plugin, module: object) -> None:
        # One manager for each plugin: pluggy checks the signatures, and no call can reach another plugin.
        manager = pluggy.PluginManager(hooks.GROUP)
        manager.add_hookspecs(hooks)

        def work() -> bool:
            manager.register(module, name=plugin.name)
            manager.check_pending()
            return True

        if self._guarded(plugin, "hooks", work):
            plugin.module = module
            plugin.hooks = tuple(name for name in hooks.NAMES if getattr(manager.hook, name).get_hookimpls())
            self._managers[id(plugin)] = manager

    def _call(self, hook: str, kind: type | tuple[type, ...], **arguments: Any) -> Iterable[tuple[Plugin, Any]]:
        """Each thing of `kind` that a plugin's hook gives, with the plugin; single results and iterables alike."""
        for plugin in self.plugins:
            manager = self._managers.get(id(plugin))
            if manager is None or hook not in plugin.hooks:
                continue

            flat: list[Any] = []

            def work(manager: pluggy.PluginManager = manager, flat: list[Any] = flat) -> None:
                for result in getattr(manager.hook, hook)(**arguments):
                    # Consumed in here: a generator raises only when it is run. What it gave until then counts.
                    flat.extend([result] if isinstance(result, (Entry, str)) else result)

            self._guarded(plugin, hook, work)
            for given in flat:
                if isinstance(given, kind):
                    yield plugin, given
                else:
                    self._fault(plugin, hook, f"it gave {given!r:.80}, which is not what this hook gives")

    # ------------------------------------------------------------------------------------------------ what they bring

    @cached_property
    def _claims(self) -> dict[str, list[tuple[Plugin, Entry]]]:
        claims: dict[str, list[tuple[Plugin, Entry]]] = {}
        for plugin, entry in self._call("zoo_entries", Entry):
            claims.setdefault(entry.name, []).append((plugin, entry))
        for name, claimants in claims.items():
            if len(claimants) > 1:
                self.warn(f"warning: {self._conflict(name, claimants)}")
        return claims

    def _conflict(self, name: str, claimants: list[tuple[Plugin, Entry]]) -> ZooError:
        who = " and ".join(str(plugin) for plugin, _ in claimants)
        last = claimants[-1][0].name
        return ZooError(
            f'two plugins give an entry called "{name}": {who}; neither is used',
            kind="conflict",
            hint=f"switch one off, as in ZOO_PLUGINS=-{last}",
        )

    def entries(self) -> list[Entry]:
        """All entries, by name. A name that two plugins claim is left out, and has been warned of."""
        return [claims[0][1] for _, claims in sorted(self._claims.items()) if len(claims) == 1]

    def conflicts(self) -> list[ZooError]:
        """The entry names that two plugins claim, each as the error that using it raises."""
        return [self._conflict(name, claims) for name, claims in sorted(self._claims.items()) if len(claims) > 1]

    def owner(self, name: str) -> Plugin | None:
        """The plugin that gives this entry."""
        claims = self._claims.get(name, [])
        return claims[0][0] if len(claims) == 1 else None

    def find(self, ref: str) -> Entry:
        return self.pick(ref).entry

    def pick(self, ref: str | Reference) -> Pick:
        """What a reference stands for. No network."""
        try:
            return self._pick(parse(ref) if isinstance(ref, str) else ref)
        except ZooError as error:
            path = str(ref).strip().partition("#")[0]
            if error.kind in ("unknown", "reference") and path and Path(path).exists():  # a path, typed as a name
                error.hint = f"for what lies here under that name, type file:{str(ref).strip()}"
            raise

    def _pick(self, reference: Reference) -> Pick:
        if reference.scheme == CATALOGUE:
            return self._pick_named(reference)
        if reference.scheme in ("timm", "open_clip"):
            return _picked(reference, self._resolve(reference))
        kinds: dict[str, SourceKind] = {"hf": "hub", "file": "file", "package": "package"}
        source = Source(kinds[reference.scheme], reference.body)
        return _picked(reference, self._unlisted(reference, source))

    def _pick_named(self, reference: Reference) -> Pick:
        entries = {entry.name: entry for entry in self.entries()}
        try:
            return pick(reference, entries)
        except ZooError as error:
            for name, claims in self._claims.items():
                spelled = reference.body == name or reference.body.startswith((f"{name}.", f"{name}-"))
                if error.kind == "unknown" and len(claims) > 1 and spelled:
                    raise self._conflict(name, claims) from None
            if error.kind == "unknown":
                failed = [plugin for plugin in self.plugins if plugin.status in ("failed", "broken", "off")]
                names = ", ".join(f"{plugin.name} is {plugin.status}" for plugin in failed)
                error.hint += f"; of the plugins, {names}" if names else ""
            raise

    def _resolve(self, reference: Reference) -> Entry:
        text = f"{reference.scheme}:{reference.body}"
        answers = list(self._call("zoo_resolve", Entry, ref=text))
        if not answers:
            raise ZooError(
                f'no plugin opens "{text}"',
                kind="unknown",
                hint=f"the name must be {reference.scheme}'s own, of published weights; zoo plugins shows who opens "
                "them; a repository of the hub opens as hf:org/repo",
            )
        if len(answers) > 1:
            raise self._conflict(text, answers)
        return answers[0][1]

    def _unlisted(self, reference: Reference, source: Source) -> Entry:
        """An entry for something that no plugin lists; a repository that one does list keeps that entry's parts."""
        name = f"{reference.scheme}:{reference.body}"
        for entry in self.entries():
            if any(known.kind == source.kind and known.location == source.location for known in _sources(entry)):
                return replace(entry, name=name, tags={"default": (source,)}, default_tag="default")
        return Entry(name, tags={"default": (source,)}, default_tag="default")

    def recognise(self, config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[Recognition]:
        """What an unlabelled checkpoint could be, best evidence first; equal ones all stand at the top. Without a
        config.json, plugins are given what the file itself says of its model."""
        from zoo.sources import described

        config = config or described(tensors)
        found = [given for _, given in self._call("zoo_recognise", Recognition, config=config, tensors=tensors)]
        return sorted(found, key=lambda recognition: (-recognition.matched, recognition.entry))

    def part_tensors(self, chosen: Pick, config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[str]:
        """The tensors of the part that `chosen` asks for; recognises the checkpoint where its entry is not known."""
        if chosen.part is not None:
            return chosen.entry.tensors_of(chosen.part, tensors)
        wanted = chosen.reference.part
        if wanted is None:
            return list(tensors)
        found = self.recognise(config, tensors)
        best = [recognition for recognition in found if recognition.matched == found[0].matched]
        if not best:
            raise ZooError(
                f'what {chosen.entry.name} is was not recognised, so it has no part "{wanted}"',
                kind="unknown",
                hint=f"zoo show {chosen.entry.name} shows its tensors",
            )
        answers: dict[tuple[str, ...], str] = {}
        for recognition in best:
            entry = self.find(recognition.entry)
            answers[tuple(entry.tensors_of(entry.part(wanted), tensors))] = recognition.entry
        if len(answers) > 1:
            names = " or ".join(answers.values())
            raise ZooError(
                f'{chosen.entry.name} could be {names}, whose part "{wanted}" holds different tensors',
                kind="ambiguous",
                hint="put its config.json beside it",
            )
        return list(next(iter(answers)))

    def formats(self) -> list[Format]:
        if not any("zoo_formats" in plugin.hooks for plugin in self.plugins):
            return []
        from surgery import Format

        return [given for _, given in self._call("zoo_formats", Format)]

    def ops(self) -> list[str]:
        return [given for _, given in self._call("zoo_ops", str)]

    def ops_of(self, plugin: Plugin) -> list[str]:
        return [given for by, given in self._call("zoo_ops", str) if by is plugin]


def _picked(reference: Reference, entry: Entry) -> Pick:
    part: Part | None = None
    if reference.part is not None and entry.parts:
        part = entry.part(reference.part)
        reference = replace(reference, part=part.name)
    return Pick(reference, entry, entry.default_tag, part)


def _sources(entry: Entry) -> Iterable[Source]:
    for sources in entry.tags.values():
        yield from sources


def _line(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


def module_name(plugin: Plugin) -> str:
    """The module that a plugin is, for a look at it in a fresh process."""
    if isinstance(plugin.module, ModuleType):
        return plugin.module.__name__
    return plugin.target.partition(":")[0]
