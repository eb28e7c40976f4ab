"""The documentation site: the Markdown pages of this folder, and the reference of the Python API from docstrings."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.highlighting import lexers

project = "OpenM6"
author = "The OpenM6 authors"
copyright = f"2026, {author}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
# GitHub gives headings the same anchors, so that links to them work in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
lexers["csv"] = TextLexer()
ROOT = Path(__file__).parent.parent

autodoc_member_order = "bysource"
autodoc_typehints = "signature"

html_theme = "furo"
html_title = "OpenM6"
html_copy_source = False
html_extra_path = ["llms.txt"]


# Pages whose text is a file beside this folder, and the links that lead to them.
FILES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "notice": "NOTICE"}
FENCE = "````"


def notebook_text(path: Path) -> str:
    """The cells of a notebook and what they show as Markdown, with headings one level deeper."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found.append(re.sub(r"^#", "##", text, flags=re.MULTILINE))
            continue
        found.append(f"{FENCE}python\n{text}\n{FENCE}")
        for output in cell["outputs"]:
            shown = {kind: "".join(content) for kind, content in output.get("data", {}).items()}
            if "image/png" in shown:
                found.append(f'<img alt="Result" src="data:image/png;base64,{shown["image/png"].strip()}">')
            elif "text/html" in shown:
                found.append(f"{FENCE}{{raw}} html\n{shown['text/html']}\n{FENCE}")
            else:
                text = shown.get("text/plain") or "".join(output.get("text", ""))
                found.append(f"{FENCE}text\n{text}\n{FENCE}")
    return "\n\n".join(found)


def read_source(app: Sphinx, name: str, source: list[str]) -> None:
    """Read the files beside this folder as pages, and lead links to their pages."""
    if name in FILES:
        text = (ROOT / FILES[name]).read_text(encoding="utf-8").replace("](docs/", "](")
        source[0] = text if FILES[name].endswith(".md") else f"# {FILES[name]}\n\n{FENCE}text\n{text}\n{FENCE}\n"
    if name == "examples":
        for file in re.findall(r"\]\(\.\./examples/(\w+)\.ipynb\)", source[0]):
            anchor = f"notebook-{file}"
            source[0] = source[0].replace(f"](../examples/{file}.ipynb)", f"](#{anchor})")
            source[0] += f"\n({anchor})=\n{notebook_text(ROOT / 'examples' / f'{file}.ipynb')}\n"
    for page, file in FILES.items():
        source[0] = re.sub(rf"\]\((\.\./)?{file}(?=[)#])", f"]({page}.md", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read_source)
