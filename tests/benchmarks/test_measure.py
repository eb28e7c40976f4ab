from __future__ import annotations

import json

from benchmarks.harness import Deadline, alternate, emit


def test_candidates_take_turns_after_the_warm_up():
    calls: list[str] = []
    candidates = {"ours": lambda: calls.append("ours"), "baseline": lambda: calls.append("baseline")}
    timings = alternate(candidates, repeats=2, warmup=1, deadline=Deadline(60))
    assert calls == ["ours", "baseline", "ours", "baseline", "ours", "baseline"]
    assert {name: timing.summary()["runs"] for name, timing in timings.items()} == {"ours": 2, "baseline": 2}


def test_past_the_deadline_everyone_still_has_one_timing():
    timings = alternate({"ours": int, "baseline": int}, repeats=50, warmup=0, deadline=Deadline(0))
    assert all(len(timing.seconds) == 1 for timing in timings.values())


def test_the_result_is_printed_and_written(tmp_path, capsys):
    emit({"ours": {"tokens_per_second": 1.5}}, tmp_path / "figures.json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "figures.json").read_text()) == {"ours": {"tokens_per_second": 1.5}}
