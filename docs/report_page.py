"""Takes the pictures of the report page, light, dark and on a phone: `python docs/report_page.py [report.html]`.

Two small residual networks are trained on the digits 0 to 4 (scikit-learn's, real 8x8 images) from different
initialisations, and merged. It needs `pip install -e '.[demo,browser]'` and a Chromium: on the PATH, or as `CHROMIUM`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import fxmerge
from fxmerge import demo
from fxmerge.pictures.page import Page

PAGES = Path(__file__).parent / "pages"
TASK = demo.TASKS[0]
EPOCHS, WIDTH = 8, 16
SHOTS: dict[str, dict[str, Any]] = {
    "report-light.png": {"viewport": {"width": 1240, "height": 1080}, "color_scheme": "light"},
    "report-dark.png": {"viewport": {"width": 1240, "height": 860}, "color_scheme": "dark"},
    "report-phone.png": {
        "viewport": {"width": 360, "height": 740},
        "color_scheme": "light",
        "device_scale_factor": 1.5,
    },
}


def chromium() -> str | None:
    """The path of a Chromium, if there is one."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def merged() -> Page:
    """The page of a merge of two networks that were trained on the same digits."""
    split, held_out = demo.load_split(0)
    training = replace(demo.TRAININGS["cnn"], build=lambda: demo.CNN(WIDTH))
    with tqdm(total=2 * EPOCHS, desc="training", disable=None) as bar:
        models = [demo.train(training, split, TASK, seed, EPOCHS, bar) for seed in (0, 1)]
    loader = split.only(TASK).images.split(64)
    line = fxmerge.interpolate(models[0], models[1], loader, points=9)
    result = fxmerge.merge(models[0], models[1], loader)
    accuracies = [f"{demo.accuracy(network, held_out, TASK):.1%}" for network in (*models, result)]
    return fxmerge.page(
        result,
        title="digits-a + digits-b",
        models=("digits-a", "digits-b"),
        facts=[("accuracy on held-out digits", "digits-a {}, digits-b {}, merged {}".format(*accuracies))],
        line=line,
    )


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium.

    Raises:
        RuntimeError: if there is none.
    """
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise RuntimeError("There is no Chromium on the PATH: install one, or set CHROMIUM to its path.")
    with sync_playwright() as tools:
        own = tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield own
        own.close()


def take(html: Path, into: Path) -> None:
    """Takes all pictures of a page."""
    with browser() as own:
        for name, settings in SHOTS.items():
            context = own.new_context(**settings)
            tab = context.new_page()
            tab.goto(html.as_uri())
            tab.wait_for_timeout(400)
            if name == "report-dark.png":
                tab.get_by_role("link", name="stages.2.conv1.weight[0]", exact=True).click()
            if name == "report-phone.png":
                tab.locator(".explorer").evaluate("explorer => explorer.scrollIntoView()")
            tab.wait_for_timeout(300)
            tab.screenshot(path=into / name)
            context.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        html = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "report.html"
        if not html.exists():
            merged().save(html)
        take(html, PAGES)


if __name__ == "__main__":
    main()
