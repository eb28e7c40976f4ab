"""What a meter says: joules, and by which kind of counter they were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["nvml", "rapl", "estimate"]
SOURCES: tuple[Source, ...] = ("nvml", "rapl", "estimate")  # from the best to the least


@dataclass(frozen=True)
class Reading:
    """Joules, their sources joined by `+` from the best to the least, and how many came from each."""

    joules: float
    source: str
    by_source: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, by_source: Mapping[str, float]) -> Reading:
        """The reading of parts, of which a source without a counter has none."""
        known: dict[str, float] = {source: by_source[source] for source in SOURCES if source in by_source}
        return cls(sum(known.values()), "+".join(known), known)

    def since(self, earlier: Reading) -> Reading:
        """What was added after `earlier`."""
        parts = {
            source: joules - earlier.by_source.get(source, 0.0) for source, joules in self.by_source.items()
        }
        return Reading.of(parts)
