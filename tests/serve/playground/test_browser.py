"""The page in a real browser, at the widths of a desk and of a phone: choose, click, see, hear, read."""

# ruff: noqa: E402

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

pytest.importorskip("gradio", reason="the extra [serve] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from openm6.serve.config import EngineConfig, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.playground.page import add_playground
from openm6.serve.run import create_app
from tests.serve.routes.test_scenarios import trained_model
from tests.serve.running import running

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
PATIENCE = 60_000  # milliseconds
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    app = add_playground(create_app(Engine(trained_model(), EngineConfig(max_model_len=512)), name="tiny"))
    with running(app) as found:
        yield f"{found}/playground/"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.BrowserContext]:
    """One context, which keeps the scripts of the page."""
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found.new_context(viewport=DESK)
        found.close()


@pytest.fixture
def page(browser: playwright.BrowserContext, address: str) -> Iterator[playwright.Page]:
    found = browser.new_page()
    found.set_default_timeout(PATIENCE)
    found.goto(address)
    found.wait_for_selector("#run")
    playwright.expect(found.locator("#state")).to_contain_text("●", timeout=PATIENCE)
    yield found
    found.close()


def choose(page: playwright.Page, dropdown: str, title: str) -> None:
    """Picks an entry of a dropdown."""
    page.click(f"#{dropdown} input")
    page.locator("ul[role=listbox] li", has_text=title).first.click()


def answered(page: playwright.Page) -> None:
    playwright.expect(page.locator("#note")).to_contain_text(" s", timeout=PATIENCE)


def test_an_image_is_inpainted_and_kept_in_the_gallery(page: playwright.Page) -> None:
    """On the way, a scenario that was not trained says so."""
    choose(page, "scenario", "Restyle")
    playwright.expect(page.locator("#state")).to_contain_text("needs training on style_transfer", timeout=PATIENCE)
    page.click("#run")
    playwright.expect(page.locator("#note [role=alert]")).to_contain_text("openm6 train design", timeout=PATIENCE)
    choose(page, "scenario", "Fill in a region")
    playwright.expect(page.locator("#state")).to_contain_text("Replace what lies in a box", timeout=PATIENCE)
    page.click("#run")
    answered(page)
    playwright.expect(page.locator("#answer-image img").first).to_be_visible(timeout=PATIENCE)
    playwright.expect(page.locator("#gallery img").first).to_be_visible(timeout=PATIENCE)


def test_audio_is_generated(page: playwright.Page) -> None:
    choose(page, "domain", "Speech and audio")
    choose(page, "scenario", "Read aloud")
    playwright.expect(page.locator("#input-text textarea")).to_have_value("seven", timeout=PATIENCE)
    page.locator("[id^=input-] textarea").first.fill("eight")  # an example can be changed
    page.click("#run")
    answered(page)
    playwright.expect(page.locator("#answer-audio")).to_be_visible(timeout=PATIENCE)


def test_an_interval_is_drawn(page: playwright.Page) -> None:
    choose(page, "domain", "Manufacturing and science")
    playwright.expect(page.locator("#state")).to_contain_text("interval", timeout=PATIENCE)
    page.click("#run")
    answered(page)
    figure = page.locator("#answer-figure svg[role=img]")  # not the wheel that turns while it is made
    playwright.expect(figure).to_be_visible(timeout=PATIENCE)
    playwright.expect(page.locator("#answer-figure")).to_contain_text("80%")


def test_a_broken_upload_is_one_sentence(page: playwright.Page) -> None:
    page.set_viewport_size(PHONE)
    page.get_by_role("tab").nth(1).click()
    broken = {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}
    page.locator("#free-image input[type=file]").set_input_files(files=[broken])
    playwright.expect(page.locator("#free-image img").first).to_be_attached(timeout=PATIENCE)
    for language, button, sentence in (
        ("English", "Answer", "The image is broken"),
        ("中文", "回答", "图片已损坏"),
    ):
        page.locator("#language label", has_text=language).click()
        playwright.expect(page.locator("#ask")).to_have_text(button, timeout=PATIENCE)
        page.click("#ask")
        said = page.locator("#note [role=alert]")
        playwright.expect(said).to_contain_text(sentence, timeout=PATIENCE)
        playwright.expect(said).to_be_in_viewport(ratio=1, timeout=PATIENCE)
        assert page.locator("[data-testid=toast-body]").count() == 0, "nothing of Gradio's own lies over it"
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_phone_shows_it_in_chinese_without_scrolling_sideways(page: playwright.Page) -> None:
    page.set_viewport_size(PHONE)
    page.click("#run")
    playwright.expect(page.locator("#gallery img").first).to_be_attached(timeout=PATIENCE)
    playwright.expect(page.locator("#answer-image img").first).to_be_in_viewport(ratio=1, timeout=PATIENCE)
    page.locator("#language label", has_text="中文").click()
    playwright.expect(page.locator("#title")).to_contain_text("试验场", timeout=PATIENCE)
    playwright.expect(page.locator("#run")).to_have_text("回答", timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_free_question_is_answered(page: playwright.Page) -> None:
    page.get_by_role("tab", name="Ask freely").click()
    page.fill("#free-text textarea", "draw the digit seven")
    page.locator("#output label", has_text="Image").click()
    page.click("#ask")
    answered(page)
    playwright.expect(page.locator("#answer-image img").first).to_be_visible(timeout=PATIENCE)


def test_a_key_is_asked_for_where_there_are_keys(browser: playwright.BrowserContext) -> None:
    config = ServeConfig(keys=("secret",))
    app = add_playground(create_app(Engine(trained_model(), EngineConfig(max_model_len=512)), config, name="tiny"))
    with running(app) as address:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"{address}/playground/")
        page.wait_for_selector("input[type=password]")
        assert page.locator("#run").count() == 0
        for password, count in (("wrong", 0), ("secret", 1)):
            page.locator("input").first.fill("me")
            page.fill("input[type=password]", password)
            page.get_by_role("button").last.click()
            if count:
                page.wait_for_selector("#run")
            else:
                page.wait_for_timeout(1500)
            assert page.locator("#run").count() == count
        page.close()


def test_it_opens_on_a_gallery_whose_cards_fill_the_form(page: playwright.Page) -> None:
    cards = page.locator("#cards .card")
    playwright.expect(cards.first).to_be_visible(timeout=PATIENCE)
    playwright.expect(page.locator("#cards .card[data-name=read_aloud] audio")).to_be_attached(timeout=PATIENCE)
    page.click("#cards .card[data-name=couplet]")
    playwright.expect(page.locator("#state")).to_contain_text("couplet", timeout=PATIENCE)
    playwright.expect(page.locator("#input-line textarea")).to_have_value("千山鸟飞绝", timeout=PATIENCE)
    # The dropdown of the domain still works after a card was chosen.
    choose(page, "domain", "Design and arts")
    playwright.expect(page.locator("#state")).to_contain_text("●", timeout=PATIENCE)
