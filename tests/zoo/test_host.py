"""The plugin host: what plugins bring, and that a faulty one stops nobody."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import zoo
from tests.zoo.conftest import ON_DISK
from zoo.entry import Entry, Part, Recognition, Source
from zoo.errors import ZooError
from zoo.host import Host


def entry(name: str, **more: Any) -> Entry:
    return Entry(name, tags={"only": (Source("hub", f"org/{name}"),)}, default_tag="only", **more)


def plugin(**hooks: Any) -> SimpleNamespace:
    """A plugin made of functions."""
    marked = {name: zoo.hookimpl(hook) for name, hook in hooks.items()}
    return SimpleNamespace(ZOO_API=1, **marked)


def host(warned: list[str] | None = None, switches: str = "", **plugins: object) -> Host:
    return Host(plugins, switches=switches, warn=(warned if warned is not None else []).append)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ON_DISK.iterdir():
        monkeypatch.syspath_prepend(path)
    yield
    for name in [name for name in sys.modules if name.startswith("zoo_") and name != "zoo_text"]:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(ON_DISK):
            del sys.modules[name]


# ---------------------------------------------------------------------------------------------------- each hook


def test_zoo_entries() -> None:
    found = host(one=plugin(zoo_entries=lambda: [entry("b")]), two=plugin(zoo_entries=lambda: iter([entry("a")])))
    assert [each.name for each in found.entries()] == ["a", "b"]
    assert found.find("a").name == "a"
    assert [each.status for each in found.plugins] == ["ok", "ok"]


def test_zoo_resolve() -> None:
    def resolve(ref: str) -> Entry | None:
        return entry(ref, parts=(Part("head", {"": ("*",)}),)) if ref.startswith("timm:") else None

    found = host(one=plugin(zoo_resolve=resolve), two=plugin(zoo_resolve=lambda ref: None))
    chosen = found.pick("timm:vit_x.tag#head")
    assert chosen.entry.name == "timm:vit_x.tag"
    assert chosen.part is not None
    with pytest.raises(ZooError, match='no plugin opens "open_clip:a/b"'):
        found.pick("open_clip:a/b")


def test_zoo_resolve_twice_is_a_conflict() -> None:
    found = host(one=plugin(zoo_resolve=lambda ref: entry(ref)), two=plugin(zoo_resolve=lambda ref: entry(ref)))
    with pytest.raises(ZooError, match="two plugins give an entry"):
        found.pick("timm:x")


def test_zoo_recognise() -> None:
    sure = Recognition("a", ("config.json says so", "names fit"), 2)
    found = host(
        one=plugin(zoo_recognise=lambda config, tensors: [Recognition("b", ("names fit",))]),
        two=plugin(zoo_recognise=lambda tensors: [sure] if "x" in tensors else []),
    )
    assert found.recognise({}, {"x": None})[0] is sure  # type: ignore[dict-item]
    assert [each.entry for each in found.recognise({}, {})] == ["b"]


def test_zoo_formats() -> None:
    extra = zoo.Format("mine", (".mine",), lambda path, head: head.startswith(b"MINE"), "mine:open")
    assert host(one=plugin(zoo_formats=lambda: [extra])).formats() == [extra]
    assert host(one=plugin()).formats() == []


def test_zoo_ops() -> None:
    assert host(one=plugin(zoo_ops=lambda: ["mine:op"])).ops() == ["mine:op"]


# ---------------------------------------------------------------------------------------------------- unlabelled


def test_a_part_of_a_repository_that_has_to_be_recognised() -> None:
    parts = (Part("head", {"": ("out.*",)}),)
    found = host(
        one=plugin(
            zoo_entries=lambda: [entry("a", parts=parts)],
            zoo_recognise=lambda config: [Recognition("a", ("says so",))] if config else [],
        )
    )
    chosen = found.pick("hf:someone/else#head")
    assert chosen.part is None
    tensors: Any = {"in.w": None, "out.w": None}
    assert found.part_tensors(chosen, {"model_type": "a"}, tensors) == ["out.w"]
    with pytest.raises(ZooError, match="was not recognised"):
        found.part_tensors(chosen, {}, tensors)


def test_a_tie_between_different_parts_is_an_error() -> None:
    found = host(
        one=plugin(
            zoo_entries=lambda: [
                entry("a", parts=(Part("head", {"": ("out.*",)}),)),
                entry("b", parts=(Part("head", {"": ("in.*",)}),)),
            ],
            zoo_recognise=lambda: [Recognition("a", ("x",)), Recognition("b", ("y",))],
        )
    )
    tensors: Any = {"in.w": None, "out.w": None}
    with pytest.raises(ZooError, match="could be a or b"):
        found.part_tensors(found.pick("hf:x/y#head"), {}, tensors)


def test_a_listed_repository_keeps_its_parts() -> None:
    found = host(one=plugin(zoo_entries=lambda: [entry("a", parts=(Part("head", {"": ("out.*",)}),))]))
    chosen = found.pick("hf:org/a@main#head")
    assert (chosen.entry.name, chosen.revision, chosen.part and chosen.part.name) == ("hf:org/a", "main", "head")


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.usefixtures("on_disk")
def test_faulty_plugins_on_disk_stop_nobody() -> None:
    warned: list[str] = []
    found = Host(switches="", warn=warned.append)
    names = {each.name for each in found.entries()}
    assert {"minilm", "half", "rival-bert", "gpt-9"} <= names
    status = {each.name: each.status for each in found.plugins}
    expected = {"broken": "failed", "raises": "broken", "future": "failed", "rival": "ok", "closed": "ok", "text": "ok"}
    assert expected.items() <= status.items()
    lines = {line.split("plugin ")[1].split(" ")[0]: line for line in warned if "plugin " in line}
    assert "zoo-broken 1.2" in lines["broken"]
    assert "RuntimeError: the flux capacitor is missing" in lines["broken"]
    assert "ValueError: ran out of entries" in lines["raises"]
    assert "written for API 2, and this host speaks 1" in lines["future"]
    assert all("\n" not in line for line in warned)


@pytest.mark.usefixtures("on_disk")
def test_a_name_that_two_plugins_claim() -> None:
    warned: list[str] = []
    found = Host(switches="-broken,-raises,-heavy,-future", warn=warned.append)
    assert "bert" not in [each.name for each in found.entries()]
    for spelled in ("bert", "bert.base", "bert-encoder"):
        with pytest.raises(ZooError) as caught:
            found.find(spelled)
        assert "rival (zoo-rival 2.0)" in str(caught.value)
        assert "text (weightzoo" in str(caught.value)
        assert "ZOO_PLUGINS=-" in caught.value.hint
    assert len(warned) == 1
    assert Host(switches="-rival,-broken,-raises,-heavy,-future", warn=warned.append).find("bert").parts
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("made", "where", "said"),
    [
        (SimpleNamespace(), "ZOO_API", "does not say which API"),
        (SimpleNamespace(ZOO_API="1"), "ZOO_API", "written for API '1'"),
        (plugin(zoo_entrys=lambda: None), "hooks", "unknown hook"),
        (plugin(zoo_entries=lambda wrong: []), "hooks", "wrong"),
        (plugin(zoo_entries=lambda: 5), "zoo_entries", "not iterable"),
        (plugin(zoo_entries=lambda: ["bert"]), "zoo_entries", "'bert', which is not what this hook gives"),
        (plugin(zoo_entries=lambda: sys.exit(4)), "zoo_entries", "SystemExit"),
        (plugin(zoo_entries=lambda: [Entry("No Name")]), "zoo_entries", "is not a name for an entry"),
        ("no_such_module", "import", "No module named"),
    ],
)
def test_each_fault_is_named_and_contained(made: object, where: str, said: str) -> None:
    warned: list[str] = []
    found = host(warned, bad=made, good=plugin(zoo_entries=lambda: [entry("a")]))
    assert [each.name for each in found.entries()] == ["a"]
    bad, good = found.plugins
    assert [problem.where for problem in bad.problems] == [where]
    assert said in bad.problems[0].what
    assert (bad.status == "ok", good.status) == (False, "ok")
    assert len(warned) == 1


def test_what_is_good_of_a_broken_plugin_is_kept() -> None:
    found = host(one=plugin(zoo_entries=lambda: [entry("a"), "nonsense", entry("b")]))
    assert [each.name for each in found.entries()] == ["a", "b"]
    assert found.plugins[0].status == "broken"


# ---------------------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize(
    ("switches", "left"),
    [("", ["a", "b"]), ("-one", ["b"]), (" -one , -two ", []), ("one", ["a"]), ("one,two,-two", ["a"])],
)
def test_switches(switches: str, left: list[str]) -> None:
    one, two = plugin(zoo_entries=lambda: [entry("a")]), plugin(zoo_entries=lambda: [entry("b")])
    assert [each.name for each in host(switches=switches, one=one, two=two).entries()] == left


def test_a_plugin_that_is_off_is_not_imported() -> None:
    found = host(switches="-one", one="no_such_module")
    assert (found.plugins[0].status, found.plugins[0].problems) == ("off", [])


def test_a_switch_for_no_plugin_is_said() -> None:
    warned: list[str] = []
    host(warned, switches="-txt", text=plugin())
    assert warned == ['warning: ZOO_PLUGINS names "txt", and no plugin is called that; did you mean text?']


def test_an_unknown_name_mentions_plugins_that_are_off() -> None:
    with pytest.raises(ZooError) as caught:
        host(switches="-text", text=plugin()).find("bert")
    assert "text is off" in caught.value.hint


def test_hosts_share_nothing() -> None:
    first, second = host(one=plugin(zoo_entries=lambda: [entry("a")])), host()
    assert (len(first.entries()), second.entries()) == (1, [])
