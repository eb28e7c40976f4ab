"""docs/m6-10t.md equals the results of the planner, and these equal sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import claim_page
from tools.claim_page import PAGE, main, page


def test_the_page_is_what_the_planner_computes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    "text",
    [
        f"= {48 * 10_240 * 2 * 1024 * 9984 / 1e12:.2f} trillion",
        f"= {512 * 240 * 300 * 1.1 / 1e6:.1f} MWh, {100 * 512 * 240 * 300 * 1.1 / 1e6 / 1287:.1f} % of",
        f"{12.87e6 / (512 * 240):.0f} W per GPU",
        f"{1287e3 / 175e3:.1f} kWh per million parameters",
        f"{512 * 240 * 700 * 1.1 / 1e6:.0f} MWh by rating",
    ],
)
def test_sums_by_hand(text: str) -> None:
    assert text in page()


def test_a_page_that_differs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_page, "PAGE", tmp_path / "page.md")
    assert main([]) == 0 and main(["--check"]) == 0
    claim_page.PAGE.write_text(page().replace("40.6", "40.7"), encoding="utf-8")
    assert main(["--check"]) == 1
