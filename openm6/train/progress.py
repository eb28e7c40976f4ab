"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counts of a run so far; goes into checkpoints as it is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    non_finite: int = 0  # skipped steps
    non_finite_in_a_row: int = 0
    spikes: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
