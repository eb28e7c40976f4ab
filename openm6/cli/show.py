"""How the result of a call reaches the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.protocol import is_renderable


def show(result: Any) -> None:
    """Print what a call gave back, if anything: rich knows how to draw tables, the rest says itself by `str`."""
    if result is not None:
        # rich would print a dataclass field by field, where its own words are meant.
        shown = result if is_renderable(result) else str(result)
        Console().print(shown, soft_wrap=True, highlight=False, markup=False)
