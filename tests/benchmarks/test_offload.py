"""The benchmark offload, small: the documented keys, and figures that fit one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import baseline_deepspeed
from benchmarks.harness import Report
from benchmarks.offload import OffloadSize, compare_with_deepspeed, measure
from openm6.core.errors import ConfigError

SMALL = OffloadSize(
    width=64,
    layers=2,
    experts=2,
    hidden=64,
    rows=2,
    length=128,
    vocabulary=400,
    gradient_accumulation_steps=1,
)
KEYS = {
    "parameters", "active_parameters", "bytes_per_parameter", "seconds_per_step", "tokens_per_step",
    "tokens_per_second", "tflops", "link_gbps", "joules_per_token", "peak_gpu_gib", "peak_host_gib",
}  # fmt: skip


def test_it_prints_the_documented_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "giant.json"
    measure(SMALL, 2, "deepspeed", True, 420.0, path)
    printed, written = json.loads(capsys.readouterr().out), json.loads(path.read_text())
    assert printed == written and set(written) >= KEYS
    assert written["baseline"] is None and "deepspeed" in written["baseline_note"]
    assert 0 < written["active_parameters"] < written["parameters"]
    assert 2 < written["bytes_per_parameter"] < 12  # a small model is mostly embeddings
    assert written["tokens_per_second"] * written["seconds_per_step"] == pytest.approx(written["tokens_per_step"])
    assert sum(written["seconds"].values()) == pytest.approx(written["seconds_per_step"])
    assert min(written["seconds"].values()) > 0 and written["link_gbps"] > 0 and written["sets_on_device"] == 0
    offloaded = written["budget_gib"]["host: offloaded weights"]
    assert 0 < offloaded < sum(written["budget_gib"].values()) < written["peak_host_gib"]
    assert written["curve"][0]["offloaded"] == 0.0


@pytest.mark.parametrize(("largest", "seconds", "ratio"), [(2048, 60, 5.0), (9999, 60, None), (2048, 0, None)])
def test_the_ratio_to_deepspeed_needs_a_size_that_fails(
    largest: int, seconds: float, ratio: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def run(width: int, layers: int, length: int, limit: float) -> dict[str, float] | None:
        limits.append(limit)
        return {"parameters": width * layers} if width <= largest else None

    monkeypatch.setattr(baseline_deepspeed, "_run", run)
    monkeypatch.setattr(baseline_deepspeed.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(baseline_deepspeed, "resolve_device", lambda: torch.device("cuda"))
    with Report(None, seconds) as report:
        report["parameters"] = 5 * 2048 * 32
        compare_with_deepspeed(report, 16)
    assert report.found.get("times_the_baseline") == ratio
    ran = [one["parameters"] for one in report.found["baseline_sizes"]]
    assert ran == [width * layers for width, layers in baseline_deepspeed.SIZES if width <= largest and seconds]
    assert report.found["baseline"] == (report.found["baseline_sizes"][-1] if ran else None)
    assert all(limit <= seconds for limit in limits)


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="--baseline megatron is unknown"):
        measure(SMALL, 4, "megatron", False, 420.0, None)
    with pytest.raises(ConfigError, match="--num-gpu-layers most must be"):
        OffloadSize(num_gpu_layers="most").recipe()
    with pytest.raises(ConfigError, match="--bytes 3 must be 16, 4, 2 or 1"):
        OffloadSize(bytes_per_parameter=3).recipe()
