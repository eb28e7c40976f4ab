"""The direction of the house: a file imports lower floors and its own room, nothing else of the package."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "openm6"
BENCHMARKS = (
    PACKAGE.parent / "benchmarks"
)  # beside the package: they may import all of it, and it none of them
FLOORS = {
    "base": 10,
    "energy": 15,
    "kernels": 15,
    "ops": 20,
    "optim": 25,
    "nn": 30,
    "codecs": 35,
    "modalities": 40,
    "parallel": 40,
    "offload": 45,
    "models": 50,
    "checkpoint": 50,
    "tasks": 50,
    "data": 60,
    "inference": 60,
    "plan": 60,
    "evaluate": 70,
    "train": 80,
    "serve": 80,
    "cli": 100,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
ALL_FILES = [*FILES, *sorted(BENCHMARKS.rglob("*.py"))]


# A file that imports by a name it makes, with the reason why it may; all others name what they import.
NAMES_MADE = {
    "../benchmarks/peer_deepspeed.py": "packages of others, for a comparison",
    "../benchmarks/__main__.py": "the table of its own file",
}
NAME = re.compile(
    r"(openm6(?:\.\w+)+)(?::\w+)?"
)  # an import by name, as `importlib` and the doors of the line take


def imported_modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """Line and full name of every import in a file, wherever it stands; `package` is what a leading dot means."""
    found = named_modules(tree)
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


def named_modules(tree: ast.AST) -> list[tuple[int, str]]:
    """Modules that a file names in a text, to be imported later."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = NAME.fullmatch(node.value)
            found += [(node.lineno, match[1])] if match else []
    return found


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def makes_names(source: str) -> bool:
    """Whether a file imports a module whose name does not stand there as a text."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return any(
        not isinstance(call.args[0], ast.Constant)
        for call in calls
        if called(call) in ("import_module", "__import__", "find_spec", "run_module")
    )


def climbs(source: str, room: str, package: str) -> list[str]:
    """What a file of `room` imports but may not."""
    wrong = []
    tree = ast.parse(source)
    named = named_modules(tree)
    for line, module in imported_modules(tree, package):
        parts = module.split(".")
        if (line, module) in named and parts[1] not in FLOORS:
            continue  # a text that only looks like a module, as the key of something
        if parts[0] == "benchmarks":
            wrong.append(f"line {line}: {module} is not part of the package")
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
        "from benchmarks.train import bench_train",
        "from openm6.checkpoint.folder import latest",  # a sibling on the same floor
        "def f():\n    from openm6.train.loop import train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from openm6.train.loop import train",
        "from openm6.unknown_room import x",
        "import importlib\nimportlib.import_module('openm6.train.loop')",
        "DOORS = {'train': 'openm6.train.run:train_recipe'}",
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
        "import importlib\nimportlib.import_module('openm6.base.files')",
        "def f():\n    from openm6.kernels import moe",
        "FILE = 'openm6.yaml of a run'",
    ],
)
def test_the_way_down_is_free(source: str) -> None:
    assert climbs(source, "tasks", "openm6.tasks") == []


def test_only_listed_files_import_by_names_that_they_make() -> None:
    making = {
        os.path.relpath(path, PACKAGE) for path in ALL_FILES if makes_names(path.read_text(encoding="utf-8"))
    }
    assert making == set(NAMES_MADE)


@pytest.mark.parametrize(
    "source", ["importlib.import_module(f'openm6.{room}.x')", "import_module(name)", "__import__(name)"]
)
def test_a_name_that_is_made_is_found(source: str) -> None:
    assert makes_names(source)
    assert not makes_names("importlib.import_module('openm6.train.loop')")


def needs(modules: dict[str, str]) -> dict[str, set[str]]:
    """For each module, by its source, the other modules that it imports, also those it imports by name and later."""
    found: dict[str, set[str]] = {}
    for module, source in modules.items():
        names = {name for _, name in imported_modules(ast.parse(source), module.rpartition(".")[0])}
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
        for path in ALL_FILES
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
