"""Entries as data: what they insist on, and how a name finds one."""

from __future__ import annotations

import pytest

from zoo.entry import Entry, Part, Pick, Source, pick
from zoo.errors import ZooError
from zoo.reference import parse

HUB = (Source("hub", "org/repo"),)
LAYOUTS = {"plain": ("enc.*",), "prefixed": ("m.enc.*",)}
ENCODER = Part("encoder", {"plain": ("emb.*", "enc.*"), "prefixed": ("m.emb.*", "m.enc.*")}, aliases=("body",))
HEAD = Part("head", {"plain": ("out.*",), "prefixed": ("out.*",)})


def entry(name: str, *tags: str) -> Entry:
    tags = tags or ("base",)
    return Entry(name, tags=dict.fromkeys(tags, HUB), default_tag=tags[0], layouts=LAYOUTS, parts=(ENCODER, HEAD))


CATALOGUE = {each.name: each for each in (entry("net", "base", "large-v3"), entry("net-mini"), entry("net-mini-head"))}

# reference -> entry, tag, part
FOUND = {
    "net": ("net", "base", None),
    "net.large-v3": ("net", "large-v3", None),
    "net#head": ("net", "base", "head"),
    "net-head": ("net", "base", "head"),
    "net-body": ("net", "base", "encoder"),
    "net#body": ("net", "base", "encoder"),
    "net.large-v3-encoder": ("net", "large-v3", "encoder"),
    "net-mini": ("net-mini", "base", None),
    "net-mini-encoder": ("net-mini", "base", "encoder"),
    "net-mini-head": ("net-mini-head", "base", None),  # an entry of exactly that name wins
    "net-mini#head": ("net-mini", "base", "head"),
    "net-encoder#encoder": ("net", "base", "encoder"),
}

# reference -> what the message or the hint says
LOST = {
    "nett": "did you mean net",
    "nothing-like-it": "zoo list shows the names there are",
    "net.lage-v3": "did you mean large-v3?",
    "net.x": "its tags are base, large-v3",
    "net#decoder": "its parts are encoder, head",
    "net-decoder": "its parts are encoder, head",
    "net-encoder#head": "names the part encoder, and head was asked for too",
}


def find(text: str) -> Pick:
    return pick(parse(text), CATALOGUE)


@pytest.mark.parametrize(("text", "expected"), FOUND.items())
def test_found(text: str, expected: tuple[str, str, str | None]) -> None:
    found = find(text)
    assert (found.entry.name, found.tag, found.part and found.part.name) == expected
    assert found.reference.part == expected[2]


@pytest.mark.parametrize(("text", "said"), LOST.items())
def test_not_found(text: str, said: str) -> None:
    with pytest.raises(ZooError) as caught:
        find(text)
    assert said in f"{caught.value} {caught.value.hint}"
    assert caught.value.status == 2


def test_sugar_is_the_same_as_its_canonical_form() -> None:
    assert find("net.large-v3-body@main") == find("net.large-v3@main#encoder")


def test_layouts_and_tensors_of_a_part() -> None:
    net = CATALOGUE["net"]
    assert net.layout_of(["enc.0.w", "out.w"]) == "plain"
    assert net.layout_of(["m.enc.0.w"]) == "prefixed"
    assert net.layout_of(["other"]) is None
    assert net.tensors_of(ENCODER, ["out.w", "m.enc.1.w", "m.emb.w"]) == ["m.enc.1.w", "m.emb.w"]
    with pytest.raises(ZooError, match="holds no tensor of its part head"):
        net.tensors_of(HEAD, ["enc.0.w"])
    with pytest.raises(ZooError, match=r"not spelled in any way that net is known in \(plain, prefixed\)"):
        net.tensors_of(HEAD, ["other"])


def test_a_closed_entry_answers_with_its_note() -> None:
    closed = Entry("gpt-9", open=False, note="no weights are public; net is a relative")
    chosen = pick(parse("gpt-9"), {"gpt-9": closed})
    with pytest.raises(ZooError, match="gpt-9: no weights are public; net is a relative") as caught:
        _ = chosen.sources
    assert caught.value.status == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "Bert"}, "is not a name for an entry"),
        ({"name": "a", "open": True}, "has no sources"),
        ({"name": "a", "open": False}, "does not say why"),
        ({"name": "a", "tags": {"x": HUB}, "default_tag": "y"}, "the default tag 'y' is no tag"),
        ({"name": "a", "tags": {"x": HUB}, "default_tag": "x", "parts": (HEAD, HEAD)}, "two parts have one name"),
        ({"name": "a", "tags": {"x": HUB}, "default_tag": "x", "parts": (HEAD,)}, "unknown layouts"),
        ({"name": "a", "tags": {"x": HUB}, "default_tag": "x", "load": "torch"}, "is not module:function"),
    ],
)
def test_entries_insist(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Entry(**arguments)  # type: ignore[arg-type]


def test_sources_and_parts_insist() -> None:
    with pytest.raises(ValueError, match="not 64 hex digits"):
        Source("hub", "org/repo", sha256={"a": "123"})
    with pytest.raises(ValueError, match="is not a name for a part"):
        Part("text encoder", {})
    with pytest.raises(ValueError, match="wants a tuple of patterns"):
        Part("encoder", {"": "enc.*"})  # type: ignore[dict-item]
