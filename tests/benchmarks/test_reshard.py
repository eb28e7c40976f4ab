"""The benchmark of resharding, on a small model: what was written comes back, and what it cannot do is summarize."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.reshard import bench_reshard
from openm6.core.errors import ConfigError


def test_what_four_ranks_wrote_two_and_one_read(tmp_path: Path) -> None:
    bench_reshard("small", 4, "2,1", json_path=tmp_path / "reshard.json")
    found = json.loads((tmp_path / "reshard.json").read_text())
    assert [one["ranks"] for one in found["read"]] == [2, 1]
    assert all(one["equal"] for one in found["read"])
    assert found["checkpoint_gib"] * 2**30 == pytest.approx(8 * found["parameters"], rel=0.2)
    assert 0 < found["written"]["training_stands_still_seconds"] <= found["written"]["seconds"]


@pytest.mark.parametrize(
    ("size", "ranks", "to", "sentence"),
    [
        ("2b", 4, "1", "must be one of 1b, small"),
        ("small", 4, "3", "3 ranks cannot share 8 experts evenly"),
    ],
)
def test_what_cannot_be_shared_is_refused(size: str, ranks: int, to: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        bench_reshard(size, ranks, to)
