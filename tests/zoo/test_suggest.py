"""Suggestions: the table is sound, what fits comes first, and what is unknown is told with what there is."""

from __future__ import annotations

from urllib.parse import urlparse

import pytest

import zoo
from zoo.host import Host
from zoo.suggest import MODALITIES, _table, modality_of, suggest, tasks_of


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


def test_the_table_is_sound(host: Host) -> None:
    entries = {entry.name: entry for entry in host.entries()}
    for row in _table()["model"]:
        name, _, tag = row["ref"].partition(".")
        assert row["modality"] in MODALITIES
        assert row["tasks"]
        assert row["why"]
        assert row["source"]
        assert not urlparse(row["source"]).scheme
        assert name in entries, f"{name} is no entry"
        assert not tag or tag in entries[name].tags
    assert {row["modality"] for row in _table()["plain"]} == set(MODALITIES)


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_kind_of_data_has_an_answer(host: Host, modality: str) -> None:
    found = suggest(host, modality)
    assert found[-1].ref == ""  # what to train from scratch comes last, and is always there
    for task in tasks_of(modality):
        assert all(task in each.tasks for each in suggest(host, modality, task) if each.ref)


def test_how_much_there_is_decides(host: Host) -> None:
    few, many = (suggest(host, "text", "classification", n)[0].ref for n in (20, 100_000))
    assert few == "minilm"
    assert many in ("bert", "roberta")
    assert "meant for 1,000" in next(s for s in suggest(host, "text", "classification", 20) if s.ref == "bert").why


def test_words_that_people_use() -> None:
    assert [modality_of(w) for w in ("photos", "speech", "CSV", "sensors")] == ["images", "audio", "table", "series"]
    with pytest.raises(zoo.ZooError, match="no kind of data") as caught:
        modality_of("imges")
    assert "images" in caught.value.hint


def test_an_unknown_task_lists_those_there_are(host: Host) -> None:
    with pytest.raises(zoo.ZooError, match="no task for text") as caught:
        suggest(host, "text", "clasification")
    assert "classification" in caught.value.hint


def test_without_a_plugin_its_entries_are_left_out() -> None:
    assert [each.ref for each in suggest(Host({}), "text") if each.ref] == []
