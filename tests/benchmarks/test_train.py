"""The training benchmark at sizes of milliseconds: its report, its turns, and the equality of what it compares."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import train as bench
from benchmarks.baseline import baseline_candidate
from benchmarks.decoder import our_candidate
from benchmarks.harness import Deadline
from benchmarks.sizes import SIZES
from openm6.core.errors import ConfigError
from openm6.models.import_qwen import import_qwen
from openm6.ops.sequence import causal_meta
from tests.benchmarks.test_sizes import TINY

CPU = torch.device("cpu")
PARTS = {"expert_products", "routing", "attention", "head_and_loss", "optimizer", "rest"}


def test_the_report_compares_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    bench.bench_train(None, "transformers", 0.01, tmp_path / "train.json")
    report = json.loads((tmp_path / "train.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    for side in (report["ours"], report["baseline"]):
        assert set(side["breakdown_ms"]) == PARTS
        assert sum(side["breakdown_ms"].values()) == pytest.approx(1000 * side["step_seconds"]["median"], rel=0.01)
        assert side["tflops"] == pytest.approx(TINY.flops / side["step_seconds"]["median"] / 1e12, abs=1e-4)
    ratio = report["ours"]["tokens_per_second"] / report["baseline"]["tokens_per_second"]
    assert report["ratio"] == pytest.approx(ratio, rel=0.01)
    assert report["config"]["name"] == "cpu"


def test_the_baseline_can_be_left_out(monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    report = bench.bench_train("cpu", "none", 0.01, None)
    assert report["baseline"] is None
    assert report["ratio"] is None
    assert report["baseline_note"] == "disabled by --baseline none"


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ConfigError, match="transformers or none"):
        bench.bench_train("cpu", "fairseq", None, None)


def test_both_train_the_same_model():
    """The baseline's weights in our decoder give the baseline's loss, side losses aside."""
    baseline = baseline_candidate(TINY, CPU, compiled=False).model
    ours = our_candidate(TINY, CPU).model
    weights = import_qwen(baseline.state_dict(), baseline.config.to_dict())
    ours.backbone.load_state_dict(weights.backbone)
    with torch.no_grad():
        ours.embedding.weight.copy_(weights.embedding)
        ours.head.copy_(weights.head)
        ids = torch.randint(0, TINY.vocabulary, (2, 16))
        hidden, _ = ours.backbone(ours.embedding(ids), causal_meta(2, 16))
        baseline.config.output_router_logits = False
        theirs = baseline(input_ids=ids, labels=ids, output_router_logits=False).loss
    torch.testing.assert_close(ours.loss(hidden, ids), theirs, rtol=1e-4, atol=1e-4)


def test_a_turn_times_whole_steps_that_learn():
    candidate = our_candidate(TINY, CPU)
    first = candidate.step()
    bench.take_turns({"ours": candidate}, CPU, turns=2, steps=3, deadline=Deadline(60))
    assert len(candidate.timing.seconds) == 6
    assert candidate.step() < first


def test_ours_is_timed_as_a_run_trains(monkeypatch):
    """Nothing that a training run cannot have: a step of the benchmark calls the optimizer as any step does."""
    candidate, updates = our_candidate(TINY, CPU), []
    monkeypatch.setattr(candidate.optimizer, "step", lambda: updates.append(True))
    for _ in range(2):
        candidate.step()
    assert updates == [True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_of_ours_is_a_captured_graph(monkeypatch):
    """A run packs other shapes each step, so it has no graph, and the figure beside the baseline must have none."""

    def refuse(*_):
        raise AssertionError("a step was captured")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refuse)
    candidate = our_candidate(TINY, torch.device("cuda"))
    assert candidate.step().isfinite()
