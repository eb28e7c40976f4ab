"""JSON that every reader takes: NaN and infinities, for which it has no word, are written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON text."""
    return json.dumps(finite_or_none(value), indent=indent, ensure_ascii=False, allow_nan=False)


def finite_or_none(value: Any) -> Any:
    """Return a copy of plain data in which NaN and infinities are None."""
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
