"""The benchmark of one sparse layer at sizes of milliseconds."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decoder
from benchmarks.experts import bench_experts, routings
from benchmarks.sizes import SIZES
from openm6.core.errors import ConfigError
from tests.benchmarks.test_sizes import TINY


def test_the_report_compares_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    bench_experts("cpu", "transformers", 0.01, tmp_path / "experts.json")
    report = json.loads((tmp_path / "experts.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    for side in (report["ours"], report["baseline"]):
        seconds = side["layer_seconds"]["median"]
        assert side["tokens_per_second"] == pytest.approx(TINY.tokens / seconds, rel=0.01)
        assert sum(side["breakdown_ms"].values()) == pytest.approx(1000 * seconds, rel=0.01)
    assert report["ratio"] > 0


def test_the_baseline_can_be_left_out_but_not_be_anything(monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    assert bench_experts("cpu", "none", 0.01, None)["baseline"] is None
    with pytest.raises(ConfigError, match="transformers or none"):
        bench_experts("cpu", "fairseq", None, None)


def test_routings_have_the_same_active_weights():
    config = SIZES["fine"].backbone.experts
    ways = routings(config)
    assert list(ways) == ["top_k", "prototypes", "top_k_shared", "prototypes_shared"]
    assert {way.experts_per_token + way.num_shared for way in ways.values()} == {8}
    assert ways["prototypes"].num_prototypes == 8 and ways["prototypes_shared"].num_prototypes == 4
    # One prototype is top-1, which stands there already.
    assert list(routings(SIZES["a"].backbone.experts)) == ["top_k", "prototypes", "top_k_shared"]


def test_a_layer_computes_its_shared_experts(monkeypatch):
    passes = []
    monkeypatch.setattr(decoder, "backward_of", lambda forward, x, parameters: passes.append((forward, parameters)))
    x = torch.randn(TINY.rows, TINY.length, TINY.width)
    ways = routings(TINY.backbone.experts)
    for way in ways.values():
        decoder.our_layer(way, x)
    # An unused weight has no gradient, which is an error here.
    found = [torch.autograd.grad(forward(x).sum(), weights) for forward, weights in passes]
    counts = dict(zip(ways, [sum(one.numel() for one in gradients) for gradients in found], strict=True))
    assert counts["top_k_shared"] - counts["top_k"] == 3 * TINY.width * TINY.hidden


def test_the_comparison_of_routings_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    report = bench_experts("cpu", "transformers", 0.01, tmp_path / "routings.json", compare=True)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "routings.json").read_text()) == report
    rows = report["routings"]
    for name, share in report["over_top_k"].items():
        expected = rows[name]["tokens_per_second"] / rows["top_k"]["tokens_per_second"]
        assert share == pytest.approx(expected, abs=0.001)
    assert set(report["over_top_k"]) == set(rows) >= {"top_k", "prototypes"}
    assert rows["prototypes"]["experts"]["num_prototypes"] == TINY.top_k
