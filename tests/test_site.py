"""The documentation site is built without a warning, and its Chinese pages say to type what the English ones do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CHINESE = sorted((DOCS / "zh").glob("*.md"))
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_page_is_built_and_linked(tmp_path: Path) -> None:
    """From sources without leftovers of an earlier build, with pages of files beside the docs."""
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    for page in DOCS.rglob("*.md"):
        assert (tmp_path / page.relative_to(DOCS)).with_suffix(".html").is_file()
    assert "Glossary" in (tmp_path / "contributing.html").read_text(encoding="utf-8")
    assert 'href="contributing.html#extensions"' in (tmp_path / "quickstart.html").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)]+)\)", (tmp_path / "llms.txt").read_text(encoding="utf-8")))
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")} - {"index.html"}
    assert linked == pages


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.stem)
def test_chinese_commands_are_those_of_the_english_page(page: Path) -> None:
    english = (DOCS / page.name).read_text(encoding="utf-8")
    known = {line for block in FENCE.findall(english) for line in block.splitlines()} | set(
        re.findall(r"`([^`\n]+)`", english)
    )
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        assert set(block.splitlines()) <= known
