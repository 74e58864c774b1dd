"""The page of a result in a real browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fxmerge
from fxmerge.interpolation import Interpolation
from tests.test_html import HOSTILE
from tests.test_pictures import Net, X

pytestmark = pytest.mark.slow

LINE = Interpolation((0.0, 0.5, 1.0), (0.1, 0.9, 0.1), (0.1, 0.2, 0.1), "distance", 1.5)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    tools = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("There is no Chromium on the PATH, and CHROMIUM names none.")
    with tools.sync_playwright() as started:
        own = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield own
        own.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it."""
    merged = fxmerge.merge(Net(0), Net(1), [X])
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    page = fxmerge.page(merged, title=HOSTILE, models=(HOSTILE, "b"), warnings=[HOSTILE, "a second one"], line=LINE)
    page.save(path)
    return path


@pytest.fixture
def tab(browser: Any, file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a tab. Nothing may be written to its console, and nothing loaded."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1200, "height": 900}}))
    tab, told = context.new_page(), []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("dialog", lambda dialog: told.append(dialog.message))
    tab.on("request", lambda one: told.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
    tab.goto(file.as_uri())
    tab.wait_for_timeout(200)
    yield tab
    context.close()
    assert told == []


def visible_rows(tab: Any) -> list[str]:
    found: list[str] = tab.locator("tr[data-class]:visible td.name").all_inner_texts()
    return found


def width(tab: Any) -> int:
    found: int = tab.evaluate("document.documentElement.scrollWidth")
    return found


def test_it_shows_all_sections_with_warnings_first(tab: Any) -> None:
    assert tab.locator("h1").inner_text() == HOSTILE and tab.title() == HOSTILE
    assert tab.locator("main h2").all_inner_texts() == [
        "2 warnings",
        "What was made",
        "Time and memory",
        "How near to the ensemble",
        "On the line between the parents",
        "Architecture",
        "Classes of units",
        "Layers before and after the fit",
        "What does not move",
    ]
    assert tab.locator(".warnings li").all_inner_texts() == [HOSTILE, "a second one"]
    assert tab.locator("img").count() == 0 and tab.locator("figure svg").count() == 4
    # Marks of all that was measured: three bars of distances, and a dot before and after for every fitted layer.
    assert tab.locator("section:has(h2:text('How near')) svg rect").count() == 3
    assert tab.locator("section:has(h2:text('fit')) svg circle").count() >= 6


def test_a_search_finds_classes_and_layers(tab: Any) -> None:
    everything = visible_rows(tab)
    tab.get_by_role("searchbox").fill("BLOCKS of")
    assert visible_rows(tab) == ["blocks of stem.weight[0]"] and len(everything) == 2
    assert tab.locator("#hits").inner_text() == "1 class, 0 layers"
    tab.get_by_role("searchbox").fill("norm")
    nodes = tab.locator(".node")
    assert tab.locator(".node.hit").all_inner_texts()[0].startswith("norm")
    assert tab.locator(".node.dim").count() == nodes.count() - 1
    assert tab.locator("#hits").inner_text() == "1 class, 1 layer"
    tab.get_by_role("searchbox").fill("nothing has this name")
    assert visible_rows(tab) == [] and tab.locator(".none").is_visible()
    assert tab.locator("#hits").inner_text() == "0 classes, 0 layers"
    tab.get_by_role("searchbox").fill("")
    assert visible_rows(tab) == everything and tab.locator(".dim, .hit").count() == 0


def test_a_class_opens_with_its_similarities_and_links_to_its_layers(tab: Any) -> None:
    name = visible_rows(tab)[-1]
    tab.get_by_role("link", name=name, exact=True).first.click()
    panel = tab.locator("dialog")
    assert panel.is_visible() and name in panel.locator("h2").inner_text()
    assert panel.locator("figure svg image").count() == 2
    assert "before and" in panel.inner_text() and "may move as" in panel.inner_text()
    panel.locator("td a").first.click()
    assert "shape (" in panel.inner_text() and tab.url.endswith(tab.evaluate("location.hash"))
    tab.go_back()
    tab.wait_for_timeout(100)
    assert name in panel.locator("h2").inner_text()
    panel.get_by_role("button", name="Close").click()
    tab.wait_for_url(lambda url: "#" not in url)  # The browser tells the page of the closing a little later.
    assert not panel.is_visible()


def test_a_layer_opens_and_links_to_its_classes(tab: Any) -> None:
    tab.locator("a.node", has_text="stem").click()
    panel = tab.locator("dialog")
    assert "stem.weight" in panel.inner_text() and "error after" in panel.inner_text()
    panel.locator("td a").first.click()
    assert "class of units" in panel.inner_text()
    tab.keyboard.press("Escape")
    assert not panel.is_visible()


def test_the_keyboard_is_enough(tab: Any) -> None:
    def focused() -> str:
        text: str = tab.evaluate("(document.activeElement.id || document.activeElement.textContent).trim()")
        return text

    tab.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    tab.keyboard.press("/")
    assert focused() == "search"
    tab.keyboard.type("head")
    tab.keyboard.press("Enter")
    panel = tab.locator("dialog")
    assert panel.is_visible() and focused() == "panel-title"
    tab.keyboard.press("Escape")
    tab.wait_for_timeout(100)
    assert not panel.is_visible() and focused() == "search"
    tab.keyboard.press("Control+A")
    tab.keyboard.press("Delete")
    for _ in range(20):  # The graph has one stop, after the buttons for zoom.
        tab.keyboard.press("Tab")
        if focused().startswith("node-"):
            break
    assert focused() == "node-0"
    for key, node in [("ArrowDown", "node-1"), ("ArrowDown", "node-2"), ("ArrowUp", "node-1"), ("End", "node-6")]:
        tab.keyboard.press(key)
        assert focused() == node
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    tab.wait_for_timeout(100)
    assert "head" in panel.locator("h2").inner_text()
    tab.keyboard.press("Escape")
    tab.wait_for_timeout(100)
    assert focused() == "node-5"
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.wait_for_timeout(100)
    assert "class of units" in panel.inner_text()


def test_the_graph_can_be_zoomed(tab: Any) -> None:
    size = "document.getElementById('node-1').getBoundingClientRect().width"
    before = tab.evaluate(size)
    tab.get_by_role("button", name="Zoom in").click()
    assert tab.evaluate(size) == pytest.approx(1.3 * before, rel=0.02)
    tab.get_by_role("button", name="Fit all").click()
    box, node = tab.locator(".box").bounding_box(), tab.locator("#node-6").bounding_box()
    assert node["y"] + node["height"] <= box["y"] + box["height"]


@pytest.mark.parametrize("tab", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_it_is_dark_where_the_system_is_and_by_its_button(tab: Any) -> None:
    def brightness() -> list[float]:
        """Of the background and of the text: the mean of red, green and blue."""
        colours = tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        return [sum(map(float, colour[4:-1].split(","))) / 3 for colour in colours]

    background, text = brightness()
    is_dark = tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (background < text) == is_dark and abs(background - text) > 180
    tab.locator("#theme").click()
    background, text = brightness()
    assert (background > text) == is_dark and abs(background - text) > 180
    bar = tab.locator("section:has(h2:text('How near')) svg rect").first
    assert bar.evaluate("bar => getComputedStyle(bar).fill") == (
        "rgb(11, 98, 196)" if is_dark else "rgb(111, 176, 255)"
    )


@pytest.mark.parametrize("tab", [{"viewport": {"width": 360, "height": 740}, "has_touch": True}], indirect=True)
def test_a_phone_does_not_scroll_sideways(tab: Any) -> None:
    assert width(tab) == 360
    for one in tab.locator("details").all():
        one.evaluate("details => (details.open = true)")
    assert width(tab) == 360
    tab.get_by_role("searchbox").fill("stem")
    assert width(tab) == 360
    for place in ("class-0", "class-1", "layer-1", "layer-3"):
        tab.evaluate(f"location.hash = '{place}'")
        tab.wait_for_timeout(100)
        panel = tab.locator("dialog")
        assert panel.is_visible() and panel.evaluate("d => [d.scrollWidth, d.clientWidth]") == [360, 360]
        assert width(tab) == 360


def test_what_was_not_computed_is_said(browser: Any, tmp_path: Path) -> None:
    page = fxmerge.page(fxmerge.fold(Net(0), None, 0.5, example=X[:2]))
    page.save(tmp_path / "report.html")
    tab = browser.new_page()
    told: list[str] = []
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.goto((tmp_path / "report.html").as_uri())
    headings = tab.locator("main h2").all_inner_texts()
    assert headings[-1] == "What is not on this page" and "Layers before and after the fit" not in headings
    assert tab.locator("section:has(h2:text('not on this page')) li").all_inner_texts() == page.to_dict()["missing"]
    assert told == []
