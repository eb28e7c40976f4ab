"""The benchmarks of many processes: equal numbers, and the planner's model of many GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.all_to_all import bench_all_to_all
from benchmarks.ranks import parse_counts
from benchmarks.scaling import SIZES, bench_scaling, model_steps
from openm6.core.errors import ConfigError


def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    bench_all_to_all(ranks=4, parts=2, json_path=tmp_path / "exchange.json")
    assert json.loads((tmp_path / "exchange.json").read_text())["equal"] is True


def test_the_model_of_many_gpus_is_the_planner_s() -> None:
    rows = model_steps("m6-10t", "h100-80gb")
    assert [row["gpus"] for row in rows] == list(SIZES)
    assert rows[0]["seconds"]["network"] == 0.0 and rows[-1]["bottleneck"] == "compute"
    assert rows[-1]["fits"] and not rows[0]["fits"]


def test_processes_are_numbers() -> None:
    assert parse_counts("1, 2,4") == (1, 2, 4)
    with pytest.raises(ConfigError, match="must be numbers of processes"):
        parse_counts("1,two")
    with pytest.raises(ConfigError, match="cannot be divided by 3 processes"):
        bench_scaling(processes="3")
