"""The comparison of plans with runs: its order, its counting, disturbed runs, and what it says when cut short."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from openm6.base.errors import ConfigError, TrainingError
from openm6.bench import calibration, probe
from openm6.bench.anchors import ANCHORS, Anchor, planned
from openm6.bench.calibration import CASES, bench_plan, compare
from openm6.bench.probe import Probe, read_probe
from openm6.bench.quiet import MachineLoad
from openm6.plan.ceilings import Ceilings, write_ceilings
from tests.bench.test_machine import ceilings


def as_planned(words: list[str], plain: Ceilings, factor: float = 1.0) -> Anchor:
    """A run that takes `factor` times what is planned without anchors."""
    stage = planned(words, plain)
    seconds = factor * stage.time.seconds
    return Anchor(words, Probe(seconds, 20 * seconds, 5e8 + stage.budget.device, others=0.0, metering=1e-3))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ceilings:
    monkeypatch.setenv("OPENM6_CACHE", str(tmp_path / "cache"))
    write_ceilings(ceilings())
    return ceilings()


def test_what_is_as_planned_is_within_and_what_is_not_is_counted_out(measured: Ceilings) -> None:
    found = {f"anchor {number}": as_planned(words, measured) for number, words in enumerate(ANCHORS)}
    found |= {name: as_planned(words, measured) for name, words in list(CASES.items())[:3]}
    slow = list(CASES)[2]
    found[slow] = as_planned(CASES[slow], measured, factor=2.0)
    loud = list(CASES)[1]
    found[loud] = replace(found[loud], probe=replace(found[loud].probe, others=0.4))
    result = compare(found, measured)
    assert result["cases"] == 3 and result["undisturbed"] == 2
    assert result["within"] == {"seconds": 2, "bytes": 3, "joules": 2}
    assert result["within_undisturbed"] == {"seconds": 1, "bytes": 2, "joules": 1}
    assert {row["case"]: row["seconds"]["error"] for row in result["rows"]}[slow] == pytest.approx(-0.5)
    assert result["metering"]["largest_share_of_a_step"] == 1e-3


def test_anchors_are_spread_among_the_cases(measured: Ceilings) -> None:
    names = [name for name, _ in calibration._interleaved(list(CASES))]
    assert set(CASES) < set(names) and len(names) == len(CASES) + len(ANCHORS)
    places = [place for place, name in enumerate(names) if name not in CASES]
    assert places[0] == 0 and places[-1] == len(names) - 1
    assert max(later - place for place, later in itertools.pairwise(places)) <= 4


def test_a_disturbed_run_is_repeated_and_a_failed_one_named(
    measured: Ceilings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    first, second = list(CASES.values())[:2]

    def run(words: list[str], plain: Ceilings) -> Anchor:
        calls.append(words)
        if words == second:
            raise TrainingError("a probe run failed")
        one = as_planned(words, plain)
        disturbed = words == first and calls.count(first) == 1
        return replace(one, probe=replace(one.probe, others=0.5 if disturbed else 0.01))

    monkeypatch.setattr(calibration, "run_anchor", run)
    bench_plan(tmp_path / "plan.json", 60.0, "0:2")
    result = json.loads((tmp_path / "plan.json").read_text())
    assert calls.count(first) == 2 and result["left_out"] == [list(CASES)[1]]
    assert [row["case"] for row in result["rows"]] == [next(iter(CASES))] and result["undisturbed"] == 1
    assert "within 15%" in capsys.readouterr().err


def test_out_of_time_it_says_what_is_left_out(measured: Ceilings, capsys: pytest.CaptureFixture[str]) -> None:
    bench_plan(None, 1.0)
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == [] and result["left_out"] == list(CASES)


def test_cases_that_do_not_exist(measured: Ceilings) -> None:
    for only in ("90:95", "x:y"):
        with pytest.raises(ConfigError, match=f"--only '{only}' names no cases"):
            bench_plan(None, 1.0, only)


def test_a_probe_tells_what_others_did_meanwhile(tmp_path: Path) -> None:
    run = probe.RunFolder.open(tmp_path)
    line = {"joules": 0.0, "memory_peak": 7, "metering_seconds": 0.0}
    lines = [
        line | {"step": step, "seconds": 0.5 * step, "joules": 4.0 * step, "own_cpu": 0.8 * step,
                "busy_cpu": 0.9 * step, "all_cpu": 1.0 * step, "metering_seconds": 0.001 * step}
        for step in range(1, 9)
    ]  # fmt: skip
    run.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = read_probe(run)
    assert (found.seconds, found.joules, found.memory) == (0.5, 4.0, 7.0)
    assert found.others == pytest.approx(0.1) and found.disturbed
    assert found.cpu == pytest.approx(0.8) and found.metering == pytest.approx(0.002)


def test_the_load_of_the_machine_only_grows() -> None:
    first, second = probe.machine_load(), probe.machine_load()
    if first is None:
        pytest.skip("this system does not tell")
    assert isinstance(second, MachineLoad) and second.busy >= first.busy > 0 and second.all >= second.busy
