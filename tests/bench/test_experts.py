"""The benchmark of one sparse layer at sizes of milliseconds."""

from __future__ import annotations

import json

import pytest

from openm6.base.errors import ConfigError
from openm6.bench.experts import bench_experts
from openm6.bench.sizes import SIZES
from tests.bench.test_sizes import TINY


def test_the_report_compares_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    bench_experts("cpu", "transformers", 0.01, tmp_path / "experts.json")
    report = json.loads((tmp_path / "experts.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    for side in (report["ours"], report["peer"]):
        seconds = side["layer_seconds"]["median"]
        assert side["tokens_per_second"] == pytest.approx(TINY.tokens / seconds, rel=0.01)
        assert sum(side["breakdown_ms"].values()) == pytest.approx(1000 * seconds, rel=0.01)
    assert report["ratio"] > 0


def test_the_peer_can_be_left_out_but_not_be_anything(monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    assert bench_experts("cpu", "none", 0.01, None)["peer"] is None
    with pytest.raises(ConfigError, match="transformers or none"):
        bench_experts("cpu", "fairseq", None, None)
