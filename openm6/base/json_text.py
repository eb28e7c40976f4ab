"""JSON that every parser reads: no NaN, no infinity, no half characters."""

from __future__ import annotations

import json
import math
from numbers import Integral, Real
from typing import Any


def json_text(value: Any) -> str:
    """`value` as indented JSON: NumPy's numbers as Python's, null for what is not finite, tuples as lists."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become question marks
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
