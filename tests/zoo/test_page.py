"""The page of a report in a browser: Chromium without a window, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.zoo import large_report
from zoo import html

sync_api = pytest.importorskip("playwright.sync_api", reason="no chromium: playwright is not installed")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@dataclass
class Opened:
    """A page that was opened from the disk, and what it complained of and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # As root in a container there is no sandbox to be had; the pages are our own.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "small": large_report.make(2),
        "large": large_report.make(),
        "refuted": large_report.make(refuted=True),
    }
    for name, (report, told) in made.items():
        (folder / f"{name}.html").write_text(html.page(report, told), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def go(name: str, width: int = 1280, height: int = 900, **settings: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("dialog", lambda dialog: opened.said.append(dialog.message))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(pages[name].as_uri())
        return opened

    yield go
    for context in contexts:
        context.close()


def names(page: Any, side: str) -> list[str]:
    return [tensor["name"] for tensor in page.evaluate("JSON.parse(document.getElementById('data').textContent)")[side]]


SETTINGS = {
    "desktop": {},
    "phone": {"width": 390, "height": 844},
    "dark": {"color_scheme": "dark"},
    "forced colours": {"forced_colors": "active"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["small", "large", "refuted"])
def test_it_opens_from_the_disk_and_asks_for_nothing(
    visit: Callable[..., Opened], pages: dict[str, Path], name: str, settings: dict[str, Any]
) -> None:
    opened = visit(name, **settings)
    opened.page.click("#open-all")
    assert opened.said == []
    assert opened.asked == [pages[name].as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= settings.get("width", 1280)


def test_names_are_text(visit: Callable[..., Opened]) -> None:
    opened = visit("small")
    opened.page.fill("#search", "alert(1)")
    opened.page.press("#search", "Enter")
    assert opened.page.text_content("#detail h4 .ref") == large_report.ODD
    assert opened.page.evaluate("document.scripts.length") == 2
    assert "<b>nothing</b> depends on it" in opened.page.text_content("#detail")
    assert opened.said == []


def test_the_search_reaches_every_tensor(visit: Callable[..., Opened]) -> None:
    page = visit("large").page
    missed = page.evaluate(
        """() => {
          const data = JSON.parse(document.getElementById("data").textContent), missed = [];
          const search = document.getElementById("search");
          for (const tensor of [...data.target, ...data.source]) {
            search.value = tensor.name;
            search.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
            const row = document.activeElement;
            const told = document.querySelector("#detail h4 .ref").textContent;
            if (told !== tensor.name || row.hidden || !row.getAttribute("aria-label").startsWith(tensor.name + ","))
              missed.push(tensor.name);
          }
          return missed;
        }"""
    )
    assert missed == []


def test_arrow_keys_reach_every_tensor(visit: Callable[..., Opened]) -> None:
    """By Tab to a tree, and in it by the right arrow, which opens and enters, and the down arrow, which goes on."""
    page = visit("small").page
    for side, tree in (("source", "s"), ("target", "t")):
        page.focus("#close-all" if tree == "s" else "#tree-s [tabindex='0']")
        while page.evaluate("document.activeElement.closest('[role=tree]')?.id") != f"tree-{tree}":
            page.keyboard.press("Tab")
        page.keyboard.press("Home")
        met = []
        while True:
            label = page.evaluate("document.activeElement.getAttribute('aria-label')")
            met.append(label)
            page.keyboard.press("ArrowRight")
            if page.evaluate("document.activeElement.getAttribute('aria-label')") == label:
                page.keyboard.press("ArrowDown")
                now = page.evaluate("document.activeElement.getAttribute('aria-label')")
                if now == label:
                    break
        for name in names(page, side):
            assert any(label.startswith(f"{name}, ") for label in met), name


def test_tab_leads_through_everything_else(visit: Callable[..., Opened]) -> None:
    page = visit("refuted").page
    met = []
    for _ in range(25):
        page.keyboard.press("Tab")
        met.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    for wanted in ("Skip to what became what", "blocks.30.attn.qkv", "search", "open-all", "close-all"):
        assert wanted in met, met
    assert "These numbers as a table" in met


def test_a_tensor_leads_to_its_counterpart(visit: Callable[..., Opened]) -> None:
    page = visit("large").page
    page.fill("#search", "blocks.7.attn.qkv.weight")
    page.press("#search", "Enter")
    froms = page.locator("#detail button").all_text_contents()
    assert froms == [f"encoder.layer.7.attention.self.{part}.weight" for part in ("query", "key", "value")]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(froms[0])
    assert "blocks.7.attn.qkv.weight" in page.text_content("#detail")
    page.wait_for_function("document.querySelectorAll('#lines path.on').length > 0")
    assert page.locator("#lines path.on").get_attribute("class") == "filled on"


def test_lines_join_what_is_shown(visit: Callable[..., Opened]) -> None:
    page = visit("large").page
    page.wait_for_function("document.querySelectorAll('#lines path').length > 0")
    drawn = page.evaluate(
        "[...document.querySelectorAll('#lines path')].map((path) => path.getAttribute('class').split(' ')[0])"
    )
    assert {"filled", "adapted", "tied"} <= set(drawn)
    assert len(drawn) < 100
    pattern = "getComputedStyle(document.querySelector('#lines .%s')).strokeDasharray"
    assert len({page.evaluate(pattern % kind) for kind in ("filled", "adapted", "tied")}) == 3


def test_a_divergence_is_open(visit: Callable[..., Opened]) -> None:
    page = visit("refuted").page
    row = page.locator("#tree-t .row.parted")
    assert row.is_visible()
    assert "first divergence" in row.text_content()
    page.click("#divergence a")
    assert page.evaluate("document.activeElement.dataset.path") == "blocks.30.attn.qkv"
    assert page.locator("svg.plot path.parted").count() == 2


def test_without_a_script_all_is_there(visit: Callable[..., Opened]) -> None:
    page = visit("small", java_script_enabled=False).page
    rows = page.locator(".row")
    assert all(rows.nth(i).is_visible() for i in range(rows.count()))
    assert not page.locator("#search").is_visible()


FRAME = "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));"
INTERACTIONS = {
    "open a block": "document.querySelector('[data-path=\"blocks.5\"]').click();",
    "scroll a tree": "document.getElementById('pane-t').scrollTop += 400;",
    "search": "const s = document.getElementById('search'); s.value = 'norm2'; s.dispatchEvent(new Event('input'));",
    "open all": "document.getElementById('open-all').click();",
    "scroll all": "document.getElementById('pane-t').scrollTop += 4000;",
    "close all": "document.getElementById('close-all').click();",
}


def test_a_thousand_tensors_stay_smooth(visit: Callable[..., Opened]) -> None:
    """Each interaction, until the second frame after it: the best of five, so that a busy machine is no slow page."""
    page = visit("large").page
    assert min(len(names(page, "source")), len(names(page, "target"))) > 900
    loading = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    took: dict[str, list[float]] = {}
    for _ in range(5):
        for name, action in INTERACTIONS.items():
            script = f"async () => {{ const t = performance.now(); {action} {FRAME} return performance.now() - t; }}"
            took.setdefault(name, []).append(page.evaluate(script))
    best = {name: round(min(times), 1) for name, times in took.items()}
    print(f"loaded in {loading:.0f} ms; {best}")
    assert max(best.values()) < 100, best
    assert loading < 3000
