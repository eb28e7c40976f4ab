"""Make docs/images/mini.png: what `mini` draws from descriptions, and answers in other pairs of modalities.

    python -m tools.mini.gallery mini docs/images/mini.png

The descriptions are those of `shipped/gallery.yaml`; the answers below them are cards of the page of `openm6 try`.
Needs the extra [dev], and Debian's chromium.
"""

from __future__ import annotations

import base64
import html
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

import openm6
from openm6.core.config import read_yaml
from openm6.core.errors import ConfigError
from openm6.serve.scenarios.run import try_model

DESCRIPTIONS = Path(__file__).with_name("shipped") / "gallery.yaml"
SIZE = {"width": 1152, "height": 900}
# The chosen cards of the page of answers stand in columns below the drawings.
COMPOSE = """([drawings, titles]) => {
    const cards = [...document.querySelectorAll("article.try")];
    const chosen = titles.map(title => cards.find(card => card.querySelector("h3").textContent.trim() === title));
    const missing = titles.filter((_, at) => !chosen[at]);
    if (missing.length) throw new Error("no card with the title " + missing[0]);
    const columns = document.createElement("div");
    columns.className = "chosen";
    columns.append(...chosen);
    document.body.innerHTML = drawings;
    document.body.append(columns);
}"""
STYLE = """
body { padding: 18px; width: 1152px; }
.drawings { display: grid; grid-template-columns: repeat(8, 1fr); gap: 12px; margin-bottom: 16px; }
.drawings figure { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 8px; }
.drawings img { width: 100%; border-radius: 8px; display: block; }
.drawings figcaption { font-size: 12px; line-height: 1.35; color: var(--soft); margin-top: 6px; }
.chosen { columns: 4; column-gap: 12px; }
.chosen .try { break-inside: avoid; background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 10px; margin-bottom: 12px; }
audio { display: none; }
"""


def drawn(model: openm6.OpenM6, descriptions: list[dict[str, Any]]) -> str:
    """Return HTML with one image for each description: its text, and a seed."""
    figures = []
    for one in descriptions:
        prompt = f"draw {one['text']}" if one["text"].isascii() else f"画{one['text']}"
        image: Any = model.generate(prompt, output="image", seed=one.get("seed", 0))
        content = io.BytesIO()
        image.save(content, "PNG")
        source = base64.b64encode(content.getvalue()).decode()
        caption = html.escape(one["text"])
        shown = f'<img src="data:image/png;base64,{source}" alt="{caption}">'
        figures.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="drawings">{"".join(figures)}</div>'


def compose(page: Page, answers: Path, drawings: str, titles: list[str]) -> None:
    """Show the drawings and the chosen cards."""
    page.goto(answers.resolve().as_uri())
    page.evaluate(COMPOSE, [drawings, titles])
    page.add_style_tag(content=STYLE)
    page.wait_for_timeout(1000)


def main(name: str, target: Path) -> None:
    """Draw, answer, and write the image.

    Raises:
        ConfigError: there is no Chromium.
        CheckpointError: there is no such model.
    """
    browser = shutil.which("chromium")
    if browser is None:
        raise ConfigError("there is no chromium on the path: apt-get install chromium")
    listed = read_yaml(DESCRIPTIONS)
    drawings = drawn(openm6.load(name), listed["drawings"])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tool:
        answers = Path(folder) / "try.html"
        try_model(name, answers)
        opened = tool.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = opened.new_page(viewport=SIZE)  # type: ignore[arg-type]
        compose(page, answers, drawings, listed["cards"])
        page.screenshot(path=target, full_page=True)
        opened.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
