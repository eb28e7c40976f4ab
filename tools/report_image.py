"""Make the screenshot docs/images/demo.png: five tasks of a run's report, in a headless browser.

    python tools/report_image.py runs/demo docs/images/demo.png

Needs the extra [dev], and Debian's chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from openm6.core.errors import ConfigError

TASKS = (
    "image classification/digits",
    "speech recognition/spoken",
    "text to image/avatars",
    "image inpainting/digits",
    "time series forecasting/weather",
)
SIZE = {"width": 1152, "height": 800}
# Those tasks alone, in this order, each in a copy of its section, from which it has its colours.
KEEP = """names => {
    const tasks = [...document.querySelectorAll("article.task")];
    const name = task => [...task.querySelector("h3").childNodes].map(node => node.textContent.trim()).join("/");
    const chosen = names.map(words => tasks.find(task => name(task) === words));
    document.body.replaceChildren(...chosen.map(task => {
        const section = task.closest("section").cloneNode(false);
        Object.assign(section.style, {padding: 0, margin: "0 0 20px"});
        section.append(task);
        return section;
    }));
    Object.assign(document.body.style, {padding: "18px", maxWidth: "none", margin: "0"});
}"""


def main(run: Path, target: Path) -> None:
    """Open the report and write the screenshot.

    Raises:
        ConfigError: there is no Chromium, or no report.
    """
    browser, report = shutil.which("chromium"), run / "report.html"
    if browser is None or not report.is_file():
        raise ConfigError(f"this needs chromium (apt-get install chromium) and {report}")
    with sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = opened.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.goto(report.resolve().as_uri())
        page.evaluate(KEEP, list(TASKS))
        page.wait_for_timeout(1500)
        page.screenshot(path=target, full_page=True)
        opened.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
