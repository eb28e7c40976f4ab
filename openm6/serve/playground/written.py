"""Inputs as a person types them into a text box, and back: numbers, series, candidates, boxes."""

from __future__ import annotations

from typing import Any

from openm6.base.errors import DataError
from openm6.serve.scenarios.scenario import InputKind


def read_written(kind: InputKind, text: str) -> Any:
    """The value that was typed.

    Raises:
        DataError: it cannot be read as this kind.
    """
    text = text.strip()
    if kind == "numbers":
        return dict(_column(line) for line in text.replace(";", "\n").splitlines() if line.strip())
    if kind == "series":
        name, _, values = text.replace("：", ":").rpartition(":")
        return {"name": name.strip() or "value", "values": _numbers(values)}
    if kind == "candidates":
        return [line.strip() for line in text.splitlines() if line.strip()]
    if kind in ("box", "stretch"):
        return _numbers(text)
    return text


def _column(line: str) -> tuple[str, float | None]:
    name, equals, value = line.replace("：", "=").replace(":", "=").partition("=")
    if not equals or not name.strip():
        raise DataError(f"{line.strip()!r} must look like mass = 3.5")
    return name.strip(), _number(value)


def _numbers(text: str) -> list[Any]:
    return [_number(word) for word in text.replace("，", ",").split(",")]


def _number(word: str) -> float | None:
    word = word.strip()
    if not word:
        return None
    try:
        return float(word)
    except ValueError:
        raise DataError(f"{word!r} is not a number: write it as 3.5") from None


def written(kind: InputKind, value: Any) -> str:
    """A value as it would be typed."""
    if kind == "numbers":
        return "\n".join(f"{name} = {_plain(number)}" for name, number in value.items())
    if kind == "series":
        return f"{value['name']}: {', '.join(map(_plain, value['values']))}"
    if kind == "candidates":
        return "\n".join(value)
    if kind in ("box", "stretch"):
        return ", ".join(map(_plain, value))
    return str(value)


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:g}"
