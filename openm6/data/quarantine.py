"""Records that cannot be trained on, set aside with their reasons; too many broken ones stop the run.

Counted apart: records that lack a field, those too long for a row, and those of which only a part was used.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from openm6.core.errors import TrainingError
from openm6.core.files import append_line, as_output_error, to_json

MAX_BROKEN = 0.05  # fraction of the records at which a run stops unless its recipe sets another limit
MAX_LISTED = 10_000
MAX_REASON = 500
# What is counted beside the records seen, and the words of the summary.
COUNTS = {
    "broken": "broken",
    "too_long": "too long for a row",
    "truncated": "truncated to fit",
    "not_applicable": "skipped for want of a field",
}


class Quarantine:
    """Counts records, lists broken ones in `path`; stops at the fraction `limit` of them, from `minimum` records on."""

    def __init__(self, path: Path | None = None, limit: float = MAX_BROKEN, minimum: int = 200) -> None:
        self._path, self._limit, self._minimum = path, limit, minimum
        self._listed: set[tuple[str, str]] = set()  # source and id, also by an earlier part of the same run
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError, KeyError, TypeError):  # a crash may have cut off a line
                    entry = json.loads(line)
                    self._listed.add((entry["source"], entry["id"]))
        self.seen = 0
        # By name in COUNTS and source (`not_applicable`: source/task), once per draw of a record.
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTS}

    @property
    def broken_fraction(self) -> float:
        return self.counts["broken"].total() / self.seen if self.seen else 0.0

    def accept(self, count: int = 1) -> None:
        self.seen += count

    def count(self, name: str, source: str) -> None:
        """Count a record that is not set aside: `truncated` (also accepted) or `not_applicable` (not even seen)."""
        self.counts[name][source] += 1

    def add(self, source: str, record_id: str, reason: object, name: str = "broken") -> None:
        """Set a record aside, which counts as seen: broken, or `too_long` even if cut; TrainingError over the limit."""
        short = str(reason)[:MAX_REASON]
        self.seen += 1
        self.counts[name][source] += 1
        if self._path is not None and (source, record_id) not in self._listed and len(self._listed) < MAX_LISTED:
            self._listed.add((source, record_id))
            line = {"kind": name.replace("_", " "), "source": source, "id": record_id, "reason": short}
            with as_output_error(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, to_json(line))
        if name == "broken" and self.seen >= self._minimum and self.broken_fraction > self._limit:
            worst, count = self.counts["broken"].most_common(1)[0]
            where = f"; see {self._path}" if self._path else ""
            raise TrainingError(
                f"{self.broken_fraction:.1%} of the records are broken, most ({count}) in {worst!r}, the last one "
                f"{record_id} of {source!r}: {short}{where}; fix the data or raise max_broken, the limit of "
                f"{self._limit:.0%}"
            )

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, **{name: dict(counts) for name, counts in self.counts.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])
        self.counts = {name: Counter(state[name]) for name in COUNTS}


def merge_counts(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of what the quarantines of several ranks count, as returned by `state`."""
    sums = {name: sum((Counter(state[name]) for state in states), Counter()) for name in COUNTS}
    return {"seen": sum(state["seen"] for state in states), **{name: dict(sums[name]) for name in COUNTS}}


def summary(state: Mapping[str, Any]) -> str:
    """What was set aside and cut, from a quarantine's state, in one line; empty if nothing was."""
    parts = []
    for name, words in COUNTS.items():
        counts = Counter(state[name])
        if counts:
            most = ", ".join(f"{source} {count:,}" for source, count in counts.most_common(3))
            parts.append(f"{counts.total():,} {words} ({most}{', …' if len(counts) > 3 else ''})")
    return f"{state['seen']:,} records drawn; {'; '.join(parts)}" if parts else ""
