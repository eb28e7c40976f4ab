"""The benchmark serve and `generate`, at sizes of a test: what they print, and that both sides do the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import generate, serve
from benchmarks.arrivals import tails
from benchmarks.baseline_qwen import QwenBaseline, Seen
from benchmarks.harness import Deadline, Report, emit
from benchmarks.serve import (
    LOAD,
    ServeSetting,
    answer_prompts,
    arrival_moments,
    compare_under_load,
    make_models,
    make_prompts,
    ours_run,
    run_in_turn,
)
from benchmarks.serve import compare as compare_text
from openm6.inference.decode_batch import DecodeBatch

TUNED = QwenBaseline.batching_settings
TINY = ServeSetting(
    width=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=4, hidden=16, vocabulary=96,
    requests=4, shortest=3, longest=8, new_tokens=5, rows=3, seconds=30,
)  # fmt: skip


def test_text_is_the_same_as_the_baselines() -> None:
    prompts = make_prompts(TINY)
    text_head, baseline = make_models(TINY, torch.device("cpu"))
    assert baseline is not None
    rows = DecodeBatch(text_head, 3, 64)
    assert ours_run(rows, prompts, TINY.new_tokens)["tokens"] == TINY.requests * TINY.new_tokens
    ids = torch.tensor([prompts[0]])
    theirs = baseline.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
    )
    from_us: list[int] = []
    rows = DecodeBatch(text_head, 1, 64)
    run_one(rows, prompts[0], from_us)
    assert theirs[0, len(prompts[0]) :].tolist() == from_us


def run_one(rows, prompt, found) -> None:
    """The tokens that our rows give to one prompt."""
    original = rows.step

    def noted():
        ended = original()
        found.extend(row.token for row in rows.rows)
        return ended

    rows.step = noted
    ours_run(rows, [prompt], 5)


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it comes, the baseline's pool is most of the memory of the machine, and takes half a minute to make."""
    names = ("transformers continuous batching", "transformers continuous batching, small pool")
    settings = {"page_size": 32, "num_blocks": 16, "max_batch_tokens": 64}
    found = {name: {**settings, "allow_block_sharing": name == names[0]} for name in names}
    monkeypatch.setattr(QwenBaseline, "batching_settings", lambda *_: found)


def test_the_tuned_pool_holds_all_prompts() -> None:
    _, baseline = make_models(TINY, torch.device("cpu"))
    assert isinstance(baseline, QwenBaseline)
    prompts = make_prompts(TINY)
    ways = TUNED(baseline, prompts, TINY.new_tokens)
    first, second = ways
    assert ways[first] == {} and ways[second]["num_blocks"] * ways[second]["page_size"] >= sum(
        len(prompt) + TINY.new_tokens for prompt in prompts
    )


def test_what_bench_serve_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RUNS", 1)
    with Report(None, 60) as report:
        compare_text(TINY, torch.device("cpu"), report)
    found = report.found
    assert found["text"]["openm6"]["tokens"] == 20 and found["baseline"].startswith("transformers")
    assert found["best_baseline"] in found["text"] and len(found["text"]) == 4, "as it comes and tuned"
    load = found["text_under_load"]
    assert load["openm6"]["first_token_seconds"]["p99"] > 0 and len(load) >= 3
    assert set(found["ours_over_each"]) <= set(found["text"]) and found["ours_over_best_baseline"] > 0


def test_candidates_alternate_and_a_slow_or_failed_one_runs_once() -> None:
    order: list[str] = []

    def run(name: str, seconds: list[float]) -> dict[str, float | str]:
        order.append(name)
        return {"tokens": 1, "seconds": seconds.pop(0)} if seconds else {"error": "no memory"}

    seconds = {"ours": [0.0, 3.0, 1.0, 2.0], "slow": [0.0, 9.0], "broken": []}
    found: dict[str, dict[str, float]] = {}
    candidates = {name: lambda name=name, own=own: run(name, own) for name, own in seconds.items()}
    run_in_turn(candidates, TINY, Deadline(60), found)
    assert order == ["ours", "ours", "slow", "slow", "broken", "broken", "ours", "ours"]
    assert found["ours"]["seconds"] == 2.0 and found["slow"]["seconds"] == 9.0 and "error" in found["broken"]
    order.clear()
    run_in_turn({name: lambda name=name: run(name, [1.0]) for name in ("a", "b")}, TINY, Deadline(0), only := {})
    assert order == ["a", "a"] and set(only) == {"a"}


def test_the_load_follows_what_takes_arrivals_and_a_cut_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, tuned = "transformers continuous batching", "transformers continuous batching, small pool"
    rates = {"openm6": 90.0, "transformers generate, padded batches of 4": 80.0, first: 2.0, tuned: 10.0}
    seen = Seen(4, dict.fromkeys(range(4), 9.0), dict.fromkeys(range(4), 9.0))
    monkeypatch.setattr(serve, "answer_prompts", lambda *_: seen)

    def failing(*_: object) -> Seen:
        raise ValueError("cut")

    baseline = SimpleNamespace(batching_settings=lambda *_: {first: {}, tuned: {}}, under_load=failing)
    report = Report(None, 60)
    with pytest.raises(ValueError, match="cut"):
        compare_under_load(None, baseline, make_prompts(TINY), 5, rates, report)
    assert report.found["text_under_load"]["arrivals_per_second"] == LOAD * 10.0
    assert set(report.found["text_under_load"]) == {"arrivals_per_second", "openm6"}
    compare_under_load(None, None, make_prompts(TINY), 5, rates, late := Report(None, 0))
    assert set(late.found["text_under_load"]) == {"arrivals_per_second"}


def test_without_the_baseline_ours_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with Report(None, 60) as report:
        compare_text(TINY, torch.device("cpu"), report)
    found = report.found
    assert found["baseline"] is None and "pip install" in found["baseline_note"] and set(found["text"]) == {"openm6"}
    assert found["text_under_load"]["openm6"]["requests_per_second"] > 0


def test_tails_are_quantiles() -> None:
    assert tails([float(one) for one in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert tails([1.0, 2.0])["p50"] == 1.5


def test_what_is_not_measured_is_null_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emit({"first": tails([])}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["first"]["p99"] is None
    assert "NaN" not in capsys.readouterr().out


def test_the_core_is_enough() -> None:
    """No import of an extra is needed to begin, nor for arrivals on all routes."""
    words = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'fastapi', 'uvicorn', 'starlette'])); "
        "import benchmarks.serve, benchmarks.generate"
    )
    subprocess.run([sys.executable, "-c", words], check=True)


def test_prompts_wait_for_their_moment() -> None:
    text_head, _ = make_models(TINY, torch.device("cpu"))
    moments = arrival_moments(TINY.requests, 50.0)
    seen = answer_prompts(DecodeBatch(text_head, 3, 64), make_prompts(TINY), TINY.new_tokens, moments)
    assert all(seen.first[number] >= moment for number, moment in enumerate(moments))
    assert all(seen.last[number] >= seen.first[number] for number in seen.first) and seen.tokens == 20


def test_what_bench_generate_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "REPEATS", 1)
    with Report(None, 60) as report:
        generate.compare("nano", "image-64", report)
    found = report.found
    assert found["positions"] == 64 and found["codes"] >= 64 and found["passes"] == 12
    assert found["autoregressive_over_masked"] > 0 and found["autoregressive_over_masked_unguided"] > 0
