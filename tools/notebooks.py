"""Write the notebooks of examples/ from the scripts beside them, with the outputs of a run.

python tools/notebooks.py               # all of them, some minutes
python tools/notebooks.py quickstart    # one
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
KEPT = ("text/plain", "text/html", "image/png")


def convert(script: Path) -> nbformat.NotebookNode:
    """Return a script in percent format as a notebook without outputs, equal for equal scripts."""
    notebook = jupytext.read(script)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook in an empty folder, and keep what its cells print and show."""
    with tempfile.TemporaryDirectory(prefix="openm6-") as folder:
        client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            shown = [one for one in cell.outputs if one.output_type != "stream" or one.name == "stdout"]
            for one in shown:
                if "data" in one:
                    one.data = {kind: content for kind, content in one.data.items() if kind in KEPT}
            cell.outputs = shown


def main(names: list[str]) -> None:
    """Write the notebooks of these names, or all."""
    for script in sorted(EXAMPLES.glob("*.py")):
        if not names or script.stem in names:
            notebook = convert(script)
            execute(notebook)
            nbformat.write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
