"""JSON that every parser reads: no NaN, no infinity, no half characters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """Return plain data as JSON text, with null for what is not finite."""
    return json.dumps(plain_data(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain_data(value: Any) -> Any:
    """Return a copy that JSON and UTF-8 can hold: NumPy's numbers as Python's, None for NaN and infinities."""
    if isinstance(value, dict):
        return {plain_data(str(key)): plain_data(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become question marks
    if isinstance(value, Sequence):
        return [plain_data(inner) for inner in value]
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
