"""The code style, as far as a program can judge it: lengths, names, imports, annotations."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (ROOT / "openm6", ROOT / "benchmarks", ROOT / "tools")
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 600, 60
SHORT_FILE, MAX_SHORT_FILES = 60, 15  # files of the package below so many lines, and how many there may be
EMPTY_WORDS = re.compile(r"(^|_)(utils?|helpers?|common|misc|manager|stuff)($|_)")
OPTIONAL = {
    "datasets",
    "diffusers",
    "matplotlib",
    "peft",
    "transformers",
    "torch.utils.tensorboard",
    "fastapi",
    "gradio",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def complaints(source: str, name: str) -> list[str]:
    """Everything in a file that the code style forbids."""
    tree = ast.parse(source)
    found = []
    if source.count("\n") > LONGEST_FILE:
        found.append(f"{source.count(chr(10))} lines: split the file")
    if not ast.get_docstring(tree):
        found.append("no docstring on top of the file")
    if EMPTY_WORDS.search(Path(name).stem):
        found.append(f"the file name {name} says nothing")
    lines = source.splitlines()
    for node in functions(tree):
        found += function_complaints(node, lines)
    for node in ast.walk(tree):
        found += node_complaints(node)
    return found


def function_complaints(node: Function, lines: list[str]) -> list[str]:
    found = []
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > LONGEST_FUNCTION:
        found.append(f"line {node.lineno}: {node.name} has {length} lines")
    if node.args.kwarg is not None:
        found.append(f"line {node.lineno}: {node.name} takes **{node.args.kwarg.arg}: name the arguments")
    if not node.name.startswith("_") and node.returns is None:
        found.append(f"line {node.lineno}: {node.name} does not say what it returns")
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom) and not is_lazy(inner, lines):
            found.append(f"line {inner.lineno}: import inside {node.name} without a comment that says why")
    return found


def node_complaints(node: ast.AST) -> list[str]:
    found = []
    if isinstance(node, Function | ast.ClassDef):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.name).lower()
        if EMPTY_WORDS.search(words):
            found.append(f"line {node.lineno}: the name {node.name} says nothing")
    if isinstance(node, ast.Global):
        found.append(f"line {node.lineno}: a global that changes")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
        found.append(f"line {node.lineno}: hasattr as a type test")
    if isinstance(node, ast.Import | ast.ImportFrom) and any(name.split(".")[0] == "pickle" for name in names(node)):
        found.append(f"line {node.lineno}: pickle runs code from files")
    return found


def names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def is_lazy(node: ast.Import | ast.ImportFrom, lines: list[str]) -> bool:
    """Whether an import may stand inside a function: an optional package, or below a comment that gives the reason."""
    above = itertools.takewhile(lambda line: line.strip(), reversed(lines[: node.lineno - 1]))
    block = itertools.dropwhile(lambda line: line.strip().startswith(("import ", "from ")), above)
    return all(is_optional(name) for name in names(node)) or next(block, "").strip().startswith("# ")


def is_optional(module: str) -> bool:
    return any(module == known or module.startswith(known + ".") for known in OPTIONAL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_style(path: Path) -> None:
    assert complaints(path.read_text(encoding="utf-8"), path.name) == []


def test_few_files_are_fragments() -> None:
    """A subject is rarely as short as that: most fragments belong to the file that they are read with."""
    sources = {
        path: path.read_text(encoding="utf-8") for path in (ROOT / "openm6").rglob("*.py") if path.name != "__init__.py"
    }
    short = [str(path.relative_to(ROOT)) for path, text in sources.items() if text.count("\n") < SHORT_FILE]
    assert len(short) <= MAX_SHORT_FILES, "\n".join(sorted(short))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("x = 1\n", "good.py"),
        ('"""Doc."""\n', "string_utils.py"),
        ('"""Doc."""\n' + "x = 1\n" * 600, "long.py"),
        ('"""Doc."""\ndef f() -> None:\n' + "    x = 1\n" * 60, "f.py"),
        ('"""Doc."""\ndef f():\n    pass\n', "f.py"),
        ('"""Doc."""\ndef f(**rest: int) -> None:\n    pass\n', "f.py"),
        ('"""Doc."""\ndef _f():\n    import json\n', "f.py"),
        ('"""Doc."""\nclass DataManager:\n    pass\n', "f.py"),
        ('"""Doc."""\nx = hasattr(1, "a")\n', "f.py"),
        ('"""Doc."""\ndef _f():\n    global x\n    x = 1\n', "f.py"),
        ('"""Doc."""\nimport pickle\n', "f.py"),
    ],
)
def test_each_rule_bites(source: str, name: str) -> None:
    assert complaints(source, name)


def test_an_optional_package_may_be_imported_where_it_is_used() -> None:
    source = '"""Doc."""\ndef f() -> None:\n    import transformers\n'
    assert complaints(source, "f.py") == []


def test_a_lazy_import_gives_its_reason() -> None:
    lazy = '"""Doc."""\ndef f() -> None:\n    # heavy: only with a GPU\n    import json\n    import csv\n'
    assert complaints(lazy, "f.py") == []
    assert len(complaints(lazy.replace("    # heavy: only with a GPU\n", ""), "f.py")) == 2
