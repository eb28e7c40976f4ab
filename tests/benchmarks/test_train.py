"""The training benchmark at sizes of milliseconds: its report, its turns, and the equality of what it compares."""

from __future__ import annotations

import json
import queue
from types import SimpleNamespace

import pytest
import torch

from benchmarks import baseline as baseline_module
from benchmarks import per_core
from benchmarks import train as bench
from benchmarks.baseline import baseline_candidate, choose_experts
from benchmarks.baseline_qwen import backbone_state
from benchmarks.decoder import our_candidate
from benchmarks.harness import Deadline, Timing
from benchmarks.per_core import ratio
from benchmarks.sizes import SIZES
from openm6.core.device import usable_cores
from openm6.core.errors import ConfigError, TrainingError
from openm6.ops.sequence import causal_meta
from tests.benchmarks.test_sizes import TINY

CPU = torch.device("cpu")
PARTS = {"expert_products", "routing", "attention", "head_and_loss", "optimizer", "rest"}


def test_the_report_compares_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    monkeypatch.setattr(bench, "ROUNDS", 2)
    bench.bench_train(None, "transformers", 30.0, tmp_path / "train.json", "fp32")
    report = json.loads((tmp_path / "train.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["config"]["name"] == "cpu" and report["cores"] == usable_cores()
    for side in ("ours", "baseline"):
        found = report["fp32"][side]
        assert found["step_seconds"]["runs"] == 2 * usable_cores()
        assert found["fastest"] >= found["tokens_per_second_per_core"] > 0 and found["variation"] >= 1
        assert set(report["breakdown_ms"][side]) == PARTS
    assert (report["fp32"]["ratio"] is None) == (report["fp32"]["note"] is not None)


def test_the_baseline_can_be_left_out(monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", TINY)
    report = bench.bench_train("cpu", "none", 0.01, None, "fp32")
    assert set(report["fp32"]) == {"ours"} and set(report["breakdown_ms"]) == {"ours"}
    assert report["baseline_note"] == "disabled by --baseline none"


def test_there_is_no_ratio_of_times_that_vary():
    steady, noisy = Timing([0.10, 0.11, 0.12]), Timing([0.2, 0.3, 0.3])
    assert ratio(steady, Timing([0.22, 0.22, 0.22])) == (2.0, None)
    found, note = ratio(steady, noisy)
    assert found is None and "took 1.50 times the fastest" in note


def test_a_process_that_fails_is_an_error_of_one_sentence(monkeypatch):
    process = SimpleNamespace(exitcode=1, start=lambda: None, kill=lambda: None, join=lambda: None)
    context = SimpleNamespace(set_forkserver_preload=lambda _: None, Queue=queue.Queue, Process=lambda **_: process)
    monkeypatch.setattr(per_core.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(per_core, "LOOK_EVERY", 0.01)
    with pytest.raises(TrainingError, match="a process of the benchmark failed"):
        per_core.time_per_core(test_there_is_no_ratio_of_times_that_vary, (), 1, Deadline(1), {})


def test_the_baseline_in_bf16_has_two_settings(monkeypatch):
    steps = bench.open_steps(TINY, "bf16", "grouped_mm")
    assert set(steps) == {"ours", "baseline, autocast", "baseline, weights in bf16"}
    for step in steps.values():
        first = step()
        assert [step() for _ in range(3)][-1] < first
    with pytest.raises(ConfigError, match="auto, fp32 or bf16"):
        bench.bench_train("cpu", "none", None, None, "fp16")


def test_the_baseline_takes_its_fastest_experts_and_says_why_not_others(monkeypatch):
    monkeypatch.setattr(baseline_module, "MAX_COPIED", 0)
    found = choose_experts(TINY, CPU)
    times = found["milliseconds_per_layer"]
    assert set(times) == {"eager", "grouped_mm"} and found["experts_implementation"] == min(times, key=times.get)
    assert {"batched_mm", "deepgemm", "sonicmoe"} <= set(found["unusable"])
    assert "GiB of weights" in found["unusable"]["batched_mm"]


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ConfigError, match="transformers or none"):
        bench.bench_train("cpu", "fairseq", None, None)


def test_both_train_the_same_model():
    """The baseline's weights in our decoder give the baseline's loss, side losses aside."""
    baseline = baseline_candidate(TINY, CPU, "eager").model
    ours = our_candidate(TINY, CPU).model
    ours.backbone.load_state_dict(backbone_state(baseline))
    with torch.no_grad():
        ours.embedding.weight.copy_(baseline.get_input_embeddings().weight)
        ours.head.copy_(baseline.get_output_embeddings().weight)
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
