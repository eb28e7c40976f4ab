"""The benchmarks of many processes: equal numbers, and a model of many GPUs that follows its own law."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.exchange import bench_exchange
from benchmarks.ranks import parse_counts
from benchmarks.scaling import bench_scaling, links_of, model_step
from openm6.base.errors import ConfigError
from openm6.models.presets import preset


def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    bench_exchange(ranks=4, parts=2, json_path=tmp_path / "exchange.json")
    assert json.loads((tmp_path / "exchange.json").read_text())["equal"] is True


def test_a_faster_network_never_slows_a_step() -> None:
    config = preset("m6-10t").backbone
    links = links_of("h100-80gb")
    assert "794 TFLOP/s (measured)" in links.sources[0] and links.gpus_a_machine == 8
    slow, fast = (model_step(config, 512, replace(links, between=speed)) for speed in (40e9, 400e9))
    assert fast["seconds"]["exchange"] < slow["seconds"]["exchange"]
    assert fast["seconds"]["compute"] == slow["seconds"]["compute"]
    assert fast["seconds_per_step_overlapped"] <= slow["seconds_per_step_overlapped"]
    alone = model_step(config, 1, links)
    assert alone["seconds"]["exchange"] == 0.0 and alone["binds"] == "compute"


def test_processes_are_numbers() -> None:
    assert parse_counts("1, 2,4") == (1, 2, 4)
    with pytest.raises(ConfigError, match="must be numbers of processes"):
        parse_counts("1,two")
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        bench_scaling(processes="3")
