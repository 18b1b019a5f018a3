"""The grammar of references."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.reference import Reference, parse

GOOD = {
    "bert": Reference("zoo", "bert"),
    "bert.large": Reference("zoo", "bert.large"),
    "bert.large@main": Reference("zoo", "bert.large", "main"),
    "bert@refs/pr/3#encoder": Reference("zoo", "bert", "refs/pr/3", "encoder"),
    "whisper.large-v3#encoder": Reference("zoo", "whisper.large-v3", None, "encoder"),
    "bert-encoder": Reference("zoo", "bert-encoder"),
    "hf:org/repo": Reference("hf", "org/repo"),
    "hf:bert-base-uncased": Reference("hf", "bert-base-uncased"),
    "hf:org/repo.v1@abc123#text": Reference("hf", "org/repo.v1", "abc123", "text"),
    "timm:vit_base_patch16_224.augreg_in21k": Reference("timm", "vit_base_patch16_224.augreg_in21k"),
    "open_clip:ViT-B-32/laion2b_s34b_b79k": Reference("open_clip", "ViT-B-32/laion2b_s34b_b79k"),
    "file:thing.pt": Reference("file", "thing.pt"),
    "file:/a b/it@home/thing.pt#encoder": Reference("file", "/a b/it@home/thing.pt", None, "encoder"),
    "file:run#7.pt": Reference("file", "run#7.pt"),
    "file:C:\\models\\thing.pt": Reference("file", "C:\\models\\thing.pt"),
    "package:dist-name/folder/model.safetensors#head": Reference(
        "package", "dist-name/folder/model.safetensors", None, "head"
    ),
}

# text -> what the message or the hint says
BAD = {
    "": "empty",
    "  ": "empty",
    "bert#": "after # comes the name of one part",
    "bert#a#b": "after # comes the name of one part",
    "bert@": "after @ comes a branch",
    "hf:": "hf:org/repo",
    "hf:a/b/c": "hf:org/repo",
    "open_clip:ViT-B-32": "open_clip:arch/tag",
    "file:": "file:path",
    "package:dist/../other": "does not lead out of it",
    "google-bert/bert-base-uncased": "type hf:google-bert/bert-base-uncased",
    "./model.safetensors": "type file:./model.safetensors",
    "a/b/c.pt": "type file:a/b/c.pt",
    "hub:org/repo": 'no kind of reference is called "hub:"',
    "fil:thing": "did you mean file?",
    "https://huggingface.co/org/repo": "type hf:org/repo",
    "https://huggingface.co/org/repo/resolve/main/model.safetensors": "type hf:org/repo",
    "bért": "is not a reference",
}


@pytest.mark.parametrize(("text", "expected"), GOOD.items())
def test_parse(text: str, expected: Reference) -> None:
    assert parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(("text", "said"), BAD.items())
def test_refused(text: str, said: str) -> None:
    with pytest.raises(ZooError) as caught:
        parse(text)
    assert said in f"{caught.value} {caught.value.hint}"
    assert caught.value.status == 2


def test_part_and_revision_given_apart() -> None:
    reference = parse("bert")
    assert str(reference.of_part("encoder").at("main")) == "bert@main#encoder"
    assert parse("bert#encoder").of_part("encoder").of_part(None).part == "encoder"
    with pytest.raises(ZooError, match="names the part encoder, and pooler was asked for too"):
        parse("bert#encoder").of_part("pooler")
    with pytest.raises(ZooError, match="names a revision"):
        parse("bert@main").at("other")
    with pytest.raises(ZooError, match="has no revisions"):
        parse("file:a.pt").at("main")


WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
PART = st.none() | st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
REVISION = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,12}", fullmatch=True)


@given(WORD, REVISION, PART)
def test_names_round_trip(body: str, revision: str | None, part: str | None) -> None:
    reference = Reference("zoo", body, revision, part)
    assert parse(str(reference)) == reference


@given(WORD, WORD, REVISION, PART)
def test_repositories_round_trip(org: str, name: str, revision: str | None, part: str | None) -> None:
    reference = Reference("hf", f"{org}/{name}", revision, part)
    assert parse(str(reference)) == reference


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        reference = parse(text)
    except ZooError as error:
        assert str(error)
    else:
        assert parse(str(reference)) == reference
