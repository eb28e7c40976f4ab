"""The direction of the house: a file imports lower floors and its own room, nothing else of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "openm6"
FLOORS = {
    "base": 1,
    "ops": 2,
    "optim": 2,
    "nn": 3,
    "modalities": 4,
    "parallel": 4,
    "models": 5,
    "checkpoint": 5,
    "tasks": 5,
    "data": 6,
    "generate": 6,
    "plan": 6,
    "evaluate": 7,
    "train": 8,
    "serve": 8,
    "bench": 9,
    "cli": 10,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported_modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """Line and full name of every import in a file, wherever it stands; `package` is what a leading dot means."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module or "") if part)
            found.append((node.lineno, module))
            # `from openm6 import train` names a room in the list of names, not in the module.
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names if module == "openm6"]
    return found


def climbs(source: str, room: str, package: str) -> list[str]:
    """What a file of `room` imports but may not."""
    wrong = []
    for line, module in imported_modules(ast.parse(source), package):
        parts = module.split(".")
        if parts[0] != "openm6" or len(parts) < 2 or parts[1] == room or parts[1] == "__version__":
            continue
        if FLOORS.get(parts[1], 99) >= FLOORS[room]:
            wrong.append(f"line {line}: {module} is not below {room}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE.parent)
    package = ".".join(relative.parent.parts)
    assert climbs(path.read_text(encoding="utf-8"), relative.parts[1], package) == []


def test_every_room_has_a_floor() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"recipes"} <= set(FLOORS)


@pytest.mark.parametrize(
    "source",
    [
        "from openm6.train.loop import train",
        "import openm6.models.backbone",
        "from openm6 import cli",
        "from ..models import backbone",
        "from openm6.checkpoint.folder import latest",  # a sibling on the same floor
        "def f():\n    from openm6.train.loop import train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from openm6.train.loop import train",
        "from openm6.unknown_room import x",
    ],
)
def test_a_climb_is_found(source: str) -> None:
    assert climbs(source, "tasks", "openm6.tasks")


@pytest.mark.parametrize(
    "source",
    [
        "from openm6.base.errors import DataError",
        "from openm6.tasks.task import Task",
        "from . import task",
        "import torch",
    ],
)
def test_the_way_down_is_free(source: str) -> None:
    assert climbs(source, "tasks", "openm6.tasks") == []


LATER = re.compile(
    r"(openm6(?:\.\w+)+)(?::\w+)?"
)  # an import by name, as `importlib` and the doors of the line take


def needs(modules: dict[str, str]) -> dict[str, set[str]]:
    """For each module, by its source, the other modules that it imports, also those it imports by name and later."""
    found: dict[str, set[str]] = {}
    for module, source in modules.items():
        tree = ast.parse(source)
        names = {name for _, name in imported_modules(tree, module.rpartition(".")[0])}
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        matches = (LATER.fullmatch(text) for text in texts if isinstance(text, str))
        names |= {match[1] for match in matches if match}
        found[module] = (names & set(modules)) - {module}
    return found


def circles(needed: dict[str, set[str]]) -> list[str]:
    """Modules that need themselves by way of others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for module in needed[waiting.pop()] - seen:
                seen.add(module)
                waiting.append(module)
        return seen

    return sorted(module for module in needed if module in reached(module))


def test_no_imports_run_in_a_circle() -> None:
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in FILES
        if path.name != "__init__.py"
    }
    assert circles(needs(modules)) == []


def test_a_circle_is_found() -> None:
    sources = {
        "openm6.a.one": "from openm6.a.two import x",
        "openm6.a.two": "import importlib\nimportlib.import_module('openm6.a.three')",
        "openm6.a.three": "import openm6.a.one",
        "openm6.a.four": "import openm6.a.one",
    }
    assert circles(needs(sources)) == ["openm6.a.one", "openm6.a.three", "openm6.a.two"]
