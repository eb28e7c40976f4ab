"""The benchmark of batches: what it prints."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.batches import bench_batches


def test_entries_are_printed(tmp_path: Path) -> None:
    bench_batches(2, 3, 60.0, tmp_path / "batches.json", full=False)
    report = json.loads((tmp_path / "batches.json").read_text(encoding="utf-8"))
    assert len(report["ms_per_1024_tokens"]) == 3 and min(report["ms_per_1024_tokens"]) > 0
    assert report["batches_per_entry"] == 2 and report["cut_short"] is None
