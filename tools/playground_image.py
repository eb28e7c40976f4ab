"""Make the screenshot docs/images/playground.png: the gallery and images of a trained model, in a headless browser.

    python -m tools.playground_image openm6/shipped/mini docs/images/playground.png

Needs the extras [serve] and [dev], and Debian's chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from openm6.core.errors import ConfigError
from tests.load.server import served

SIZE = {"width": 1200, "height": 1160}
WORDS = (
    "trophy, IconPark colour icon",
    "umbrella, Phosphor filled icon",
    "a happy face with light skin and long red hair, sketch",
    "a happy face with tan skin, long red hair, a blue shirt and glasses, pixel art",
)
PATIENCE = 60_000  # milliseconds


def main(trained: Path, target: Path) -> None:
    """Serve the run, generate the images, and write the screenshot.

    Raises:
        ConfigError: there is no Chromium.
    """
    browser = shutil.which("chromium")
    if browser is None:
        raise ConfigError("there is no chromium on the path: apt-get install chromium")
    with served(trained, ("--playground",)) as address, sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = opened.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{address.port}/playground/")
        expect(page.locator("#run")).to_be_enabled(timeout=PATIENCE)
        wait_for_gallery(page)
        draw(page)
        page.screenshot(path=target)
        opened.close()


def wait_for_gallery(page: Page) -> None:
    """Wait until no card is added any more."""
    before, cards = -1, page.locator("#cards .card")
    while cards.count() != before:
        before = cards.count()
        page.wait_for_timeout(4000)


def draw(page: Page) -> None:
    """Generate an image for each of the texts, by the first scenario."""
    for number, words in enumerate(WORDS, start=1):
        page.locator("[id^=input-] textarea").first.fill(words)
        page.click("#run")
        expect(page.locator("#gallery .grid-container img")).to_have_count(number, timeout=PATIENCE)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
