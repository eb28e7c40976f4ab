"""What commands import when they are called, and replacements that check their arguments and do nothing."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CLI = Path(__file__).parents[2] / "openm6" / "cli"
OWN_PAGES = {("openm6.cli.use", "print_energy"), ("openm6.cli.listings", "print_inspection")}
EXTRAS = {"ray"}  # packages that are too large for the extra [dev]


@cache
def lazy_imports() -> list[tuple[str, str]]:
    """Module and name of every import of the package inside a function of the command line."""
    found = set()
    for path in CLI.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        imports = (node for function in functions for node in ast.walk(function))
        for node in imports:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openm6."):
                found |= {(node.module or "", alias.name) for alias in node.names}
    return sorted(found)


def import_name(module: str, name: str) -> Any:
    """What a lazy import brings; None if it needs an extra that is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return None


signature_of = cache(inspect.signature)


def checked(signature: inspect.Signature, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that passes on what fits the signature, and raises TypeError for other words."""

    def passes(*words: Any, **named: Any) -> Any:
        signature.bind(*words, **named)
        return call(*words, **named)

    return passes


def replace_calls(
    monkeypatch: pytest.MonkeyPatch, instead: Mapping[str, Callable[..., Any]], keep: tuple[str, ...] = ()
) -> None:
    """Put a function in place of each that a command calls; it has the same signature and calls `instead[name]`.

    `keep` names functions that stay; classes and tables stay as well.
    """
    # All imports first: a module may call at import what is replaced below.
    reals = {(module, name): import_name(module, name) for module, name in [*lazy_imports(), *OWN_PAGES]}
    for (module, name), real in reals.items():
        call = instead.get(name, lambda *words, **named: None)
        if real is None:
            missing = ModuleType(module)
            setattr(missing, name, call)
            monkeypatch.setitem(sys.modules, module, missing)
        elif inspect.isfunction(real) and name not in keep:
            monkeypatch.setattr(f"{module}.{name}", checked(signature_of(real), call))
