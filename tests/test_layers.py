"""The direction of imports: a file imports lower layers and its own package, nothing else of OpenM6."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "openm6"
# Beside the package: they may import all of it, and it none of them.
BENCHMARKS = ROOT / "benchmarks"
LAYERS = {
    "core": 10,
    "energy": 15,
    "kernels": 15,
    "ops": 20,
    "optim": 25,
    "nn": 30,
    "codecs": 35,
    "modalities": 40,
    "distributed": 40,
    "offload": 45,
    "models": 50,
    "checkpoint": 50,
    "tasks": 50,
    "data": 60,
    "inference": 60,
    "plan": 60,
    "evaluate": 70,
    "hub": 70,
    "train": 80,
    "api": 85,
    "serve": 90,
    "cli": 100,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
ALL_FILES = [*FILES, *sorted(BENCHMARKS.rglob("*.py"))]

# Files that import a module whose name they compute, with the reason; all others name what they import.
COMPUTED_NAMES = {
    "benchmarks/baseline_deepspeed.py": "packages of others, for a comparison",
    "benchmarks/__main__.py": "the list of benchmarks in its own file",
    "benchmarks/decode.py": "packages of others, for a comparison",
}
MODULE = re.compile(r"openm6(?:\.\w+)+")
ENTRY = re.compile(r"(openm6(?:\.\w+)+):\w+(?:\.\w+)*")  # an entry point: module:function
IMPORTERS = ("import_module", "__import__", "find_spec", "run_module")


def imported_modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """Line and full name of every import in a file, wherever it stands; `package` is what a leading dot means."""
    found = [(line, text.partition(":")[0]) for line, text in strings(tree) if ENTRY.fullmatch(text)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module or "") if part)
            found.append((node.lineno, module))
            # A name after `import` may be a module: `from openm6 import train`.
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in IMPORTERS:
            found += [(line, text) for line, text in strings(node) if MODULE.fullmatch(text)]
    return found


def strings(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and text of every string."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [(node.lineno, node.value) for node in nodes if isinstance(node.value, str)]


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def computes_names(source: str) -> bool:
    """Whether a file imports a module whose name is not a string in the call."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return any(not isinstance(call.args[0], ast.Constant) for call in calls if called(call) in IMPORTERS if call.args)


def imports_by_string(source: str) -> list[str]:
    """Modules and functions of OpenM6 that a file names in strings, where no type checker sees them."""
    tree = ast.parse(source)
    found = [f"line {line}: {text}" for line, text in strings(tree) if ENTRY.fullmatch(text)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in IMPORTERS:
            found += [f"line {line}: {text}" for line, text in strings(node) if MODULE.fullmatch(text)]
    return found


def violations(source: str, own: str, package: str) -> list[str]:
    """What a file of the package `own` imports but may not."""
    found = []
    for line, module in imported_modules(ast.parse(source), package):
        parts = module.split(".")
        if parts[0] == "benchmarks":
            found.append(f"line {line}: {module} is not part of the package")
        if parts[0] != "openm6" or len(parts) < 2 or parts[1] in (own, "__version__"):
            continue
        if LAYERS.get(parts[1], 99) >= LAYERS[own]:
            found.append(f"line {line}: {module} is not in a layer below {own}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    folders = path.relative_to(ROOT).parent.parts
    assert violations(source, folders[1], ".".join(folders)) == []
    assert imports_by_string(source) == []


def packages() -> set[str]:
    """Every package of OpenM6 that holds code."""
    return {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"recipes"}


def test_every_package_has_a_layer() -> None:
    assert packages() == set(LAYERS)


def test_every_package_is_in_the_table_with_its_layer() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d*) *\| `openm6/(\w+)` \| \w", page, re.MULTILINE)
    assert {name: int(layer) for layer, name in rows if layer} == LAYERS
    assert [name for layer, name in rows if not layer] == ["recipes"]
    assert [int(layer) for layer, _ in rows if layer] == sorted(LAYERS.values(), reverse=True)


@pytest.mark.parametrize(
    "source",
    [
        "from openm6.train.loop import train",
        "import openm6.models.backbone",
        "from openm6 import cli",
        "from ..models import backbone",
        "from .. import models",
        "from benchmarks.train import bench_train",
        # a package in the same layer
        "from openm6.checkpoint.folder import latest",
        "def f():\n    from openm6.train.loop import train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from openm6.train.loop import train",
        "from openm6.unknown_package import x",
        "import importlib\nimportlib.import_module('openm6.train.loop')",
        "ENTRIES = {'train': 'openm6.train.run:train_recipe'}",
    ],
)
def test_a_violation_is_found(source: str) -> None:
    assert violations(source, "tasks", "openm6.tasks")


@pytest.mark.parametrize(
    "source",
    [
        "from openm6.core.errors import DataError",
        "from openm6.tasks.task import Task",
        "from . import task",
        "import torch",
        "import importlib\nimportlib.import_module('openm6.core.files')",
        "def f():\n    from openm6.kernels import moe",
        "FILE = 'openm6.yaml of a run'",
    ],
)
def test_lower_layers_may_be_imported(source: str) -> None:
    assert violations(source, "tasks", "openm6.tasks") == []


def test_only_listed_files_import_names_that_they_compute() -> None:
    found = {os.path.relpath(path, ROOT) for path in ALL_FILES if computes_names(path.read_text(encoding="utf-8"))}
    assert found == set(COMPUTED_NAMES)


@pytest.mark.parametrize(
    "source", ["importlib.import_module(f'openm6.{name}.x')", "import_module(name)", "__import__(name)"]
)
def test_a_computed_name_is_found(source: str) -> None:
    assert computes_names(source)
    assert not computes_names("importlib.import_module('openm6.train.loop')")


@pytest.mark.parametrize(
    "source",
    [
        "importlib.import_module('openm6.core.files')",
        "import_module(name='openm6.core.files')",
        "ENTRIES = {'write': 'openm6.core.files:replace_text'}",
        "def f(name='openm6.core.files:RunFolder.open'): pass",
    ],
)
def test_an_import_by_string_is_found(source: str) -> None:
    assert imports_by_string(source)


@pytest.mark.parametrize("source", ["import_module('json')", "from openm6.core import files", "KEY = 'openm6.core'"])
def test_other_strings_are_free(source: str) -> None:
    assert imports_by_string(source) == []


def dependencies(modules: dict[str, str]) -> dict[str, set[str]]:
    """For each module, by its source, the other modules that it imports, also lazily and by string."""
    found: dict[str, set[str]] = {}
    for module, source in modules.items():
        names = {name for _, name in imported_modules(ast.parse(source), module.rpartition(".")[0])}
        found[module] = (names & set(modules)) - {module}
    return found


def package_dependencies(needed: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between packages, by their first two names."""
    found: dict[str, set[str]] = {}
    for module, others in needed.items():
        package = ".".join(module.split(".")[:2])
        imported = {".".join(other.split(".")[:2]) for other in others}
        found.setdefault(package, set()).update(imported - {package})
    return {package: others & set(found) for package, others in found.items()}


def cycles(needed: dict[str, set[str]]) -> list[str]:
    """Modules or packages that depend on themselves through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for module in needed[waiting.pop()] - seen:
                seen.add(module)
                waiting.append(module)
        return seen

    return sorted(module for module in needed if module in reached(module))


def test_no_import_cycle_exists() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in ALL_FILES
        if path.name != "__init__.py"
    }
    needed = dependencies(modules)
    assert cycles(needed) == []
    assert cycles(package_dependencies(needed)) == []


def test_a_cycle_is_found() -> None:
    sources = {
        "openm6.a.one": "from openm6.a.two import x",
        "openm6.a.two": "import importlib\nimportlib.import_module('openm6.b.three')",
        "openm6.b.three": "from openm6.a import one",
        "openm6.b.four": "import openm6.a.one",
    }
    needed = dependencies(sources)
    assert cycles(needed) == ["openm6.a.one", "openm6.a.two", "openm6.b.three"]
    assert cycles(package_dependencies(needed)) == ["openm6.a", "openm6.b"]
    acyclic = {"openm6.a.one": {"openm6.b.three"}, "openm6.a.two": set(), "openm6.b.three": {"openm6.a.two"}}
    assert cycles(acyclic) == []
    assert cycles(package_dependencies(acyclic)) == ["openm6.a", "openm6.b"]
