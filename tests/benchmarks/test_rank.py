"""One rank's share: as many rows as a real exchange would bring, and layers that may be offloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.rank import PlayedDispatcher, bench_rank, rank_size
from openm6.core.errors import ConfigError


def test_the_real_share_of_m6_10t() -> None:
    size = rank_size("m6-10t", 512, on_gpu=True)
    assert size.experts_per_rank == 20
    assert size.copies == 5  # 80 choices · 512 ranks / 10,240 experts · 1.25
    backbone = size.recipe(0).model.overrides
    assert backbone["experts"]["num_experts"] == 20 and backbone["num_layers"] == 48


def test_rows_come_in_copies_and_answers_go_home() -> None:
    exchange = PlayedDispatcher(3)
    rows, counts = torch.randn(8, 4), torch.tensor([4, 4])

    def experts(chunk: int, arrived: torch.Tensor, arrived_counts: torch.Tensor) -> torch.Tensor:
        assert torch.equal(arrived_counts, torch.tensor([12, 12])) and arrived.shape == (24, 4)
        assert torch.equal(arrived[4:8], rows[:4]) and torch.equal(arrived[12:16], rows[4:])
        return 2 * arrived

    outputs, meanwhile = exchange.exchange(rows, counts, None, experts, lambda: rows)
    torch.testing.assert_close(outputs, 2 * rows)
    assert meanwhile is rows


def test_the_curve_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.rank.OFFLOADED", (0.0, 1.0))
    bench_rank(ranks=16, steps=1, json_path=tmp_path / "rank.json")
    result = json.loads((tmp_path / "rank.json").read_text())
    assert result["parameters_per_rank"] > 0 and result["reduced"] is not torch.cuda.is_available()
    assert [point["offloaded"] for point in result["curve"]] == [0.0, 1.0]
    assert all(point["seconds_per_step"] > 0 for point in result["curve"])


def test_ranks_must_divide_the_experts() -> None:
    with pytest.raises(ConfigError, match="--ranks 7 cannot hold equal numbers of experts"):
        _ = rank_size("m6-10t", 7, on_gpu=True).experts_per_rank
    with pytest.raises(ConfigError, match="has no experts"):
        rank_size("m6-base", 4, on_gpu=False)
