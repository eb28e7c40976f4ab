"""Broken records set aside with their reasons; a few are counted, too many stop the run.

A record that lacks a field that its task needs is not broken: it is skipped for that task and counted apart.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openm6.base.errors import TrainingError
from openm6.base.files import append_line, told_as_output_error

MAX_BROKEN = 0.05  # share of the records at which a run stops unless its recipe says otherwise
MAX_LISTED = 10_000
MAX_REASON = 500


class Quarantine:
    """Counts records seen and set aside; writes each broken one once to `path` as a line of JSON.

    Safe to share between threads. `limit` is the share of broken records at which the run stops, judged once
    `minimum` records were seen.
    """

    def __init__(self, path: Path | None = None, limit: float = MAX_BROKEN, minimum: int = 200) -> None:
        self._path = path
        self._limit = limit
        self._minimum = minimum
        self._lock = threading.Lock()
        self._listed = _listed_in(path)
        self.seen = 0
        self.counts: Counter[str] = Counter()  # source -> broken records, again each time one is drawn
        self.not_applicable: Counter[str] = (
            Counter()
        )  # source/task -> records skipped, neither seen nor broken

    @property
    def total(self) -> int:
        """Broken records met so far."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Broken records as a share of those seen."""
        return self.total / self.seen if self.seen else 0.0

    def accept(self, count: int = 1) -> None:
        """Counts records that were read well."""
        with self._lock:
            self.seen += count

    def skip(self, component: str) -> None:
        """Count a record that lacks a field that the task of `component` needs."""
        with self._lock:
            self.not_applicable[component] += 1

    def add(self, source: str, record_id: str, reason: object) -> None:
        """Sets a record aside; it counts as seen.

        Raises:
            TrainingError: the share of broken records is above the limit.
        """
        with self._lock:
            self.seen += 1
            self.counts[source] += 1
            self._list(source, record_id, str(reason)[:MAX_REASON])
            if self.seen >= self._minimum and self.share > self._limit:
                worst, count = self.counts.most_common(1)[0]
                where = f"; see {self._path}" if self._path else ""
                raise TrainingError(
                    f"{self.share:.1%} of the records are broken, most ({count}) in {worst!r}, such as {record_id}: "
                    f"{str(reason)[:MAX_REASON]}{where}; mend the data or raise max_broken, the limit "
                    f"of {self._limit:.0%}"
                )

    def state(self) -> dict[str, Any]:
        """The counts, as JSON-able values."""
        with self._lock:
            return {
                "seen": self.seen,
                "counts": dict(self.counts),
                "not_applicable": dict(self.not_applicable),
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to counts that `state` gave; the file keeps what it lists."""
        with self._lock:
            self.seen = int(state["seen"])
            self.counts = Counter(state["counts"])
            self.not_applicable = Counter(state.get("not_applicable", {}))

    def _list(self, source: str, record_id: str, reason: str) -> None:
        if self._path is None or (source, record_id) in self._listed or len(self._listed) >= MAX_LISTED:
            return
        self._listed.add((source, record_id))
        with told_as_output_error(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"source": source, "id": record_id, "reason": reason}
        append_line(self._path, json.dumps(line, ensure_ascii=False))


def _listed_in(path: Path | None) -> set[tuple[str, str]]:
    """What an earlier part of the same run has listed; a line cut off by a crash is passed over."""
    listed: set[tuple[str, str]] = set()
    if path is None or not path.is_file():
        return listed
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            listed.add((entry["source"], entry["id"]))
        except (ValueError, KeyError, TypeError):
            continue
    return listed
