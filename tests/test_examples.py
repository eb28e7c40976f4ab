"""The notebooks of examples/: each is equal to the script beside it, and the script runs to its end."""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path

import pytest

from openm6.train import multimodal_data
from tests.forked import Program

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
MAX_BYTES = 200_000


def ids(path: Path) -> str:
    return path.stem


def test_there_are_scripts_for_all_notebooks() -> None:
    notebooks = {path.stem for path in (ROOT / "examples").glob("*.ipynb")}
    assert notebooks == {path.stem for path in SCRIPTS} and len(notebooks) >= 6


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_script_and_notebook_are_equal(script: Path) -> None:
    """A notebook that lacks what its script says is written again by `python tools/notebooks.py`."""
    jupytext = pytest.importorskip("jupytext")
    notebook = script.with_suffix(".ipynb")
    assert notebook.stat().st_size < MAX_BYTES, "outputs are images and tables of some kilobytes"
    pair = [[(one.cell_type, one.source) for one in jupytext.read(path).cells] for path in (script, notebook)]
    assert pair[0] == pair[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_a_notebook_opens_with_what_it_needs(script: Path) -> None:
    first = re.search(r"# %% \[markdown\]\n(.*?)\n# %%", script.read_text(encoding="utf-8"), re.DOTALL)
    assert first and "It needs `pip install ." in first[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_the_scores_of_a_notebook_are_worth_showing(script: Path) -> None:
    cells = json.loads(script.with_suffix(".ipynb").read_text("utf-8"))["cells"]
    printed = "".join(line for cell in cells for out in cell.get("outputs", ()) for line in out.get("text", ()))
    scores = [int(score) for score in re.findall(r"(\d+)%", printed)]
    assert all(score >= 20 for score in scores) and (scores or script.stem == "energy"), printed


def run_script(path: Path) -> None:
    """Run a script in its folder, without time for trees and networks, which would take most of it."""
    os.chdir(path.parent)
    multimodal_data.DEFAULT_MINUTES = multimodal_data.NETWORK_MINUTES = 0.01
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_a_script_runs(script: Path, tmp_path: Path) -> None:
    """Each runs to its end, with a tenth of its training steps; the notebook has the results of all of them."""
    fewer = re.compile(r"(steps(?:: |=))(\d+)")
    text = fewer.sub(lambda found: f"{found[1]}{max(1, int(found[2]) // 10)}", script.read_text("utf-8"))
    (tmp_path / script.name).write_text(text, "utf-8")
    with Program(tmp_path / "errors", run_script, tmp_path / script.name) as program:
        code, errors = program.ended(600)
    assert code == 0, errors[-3000:]
