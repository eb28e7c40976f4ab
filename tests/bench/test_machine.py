"""Ceilings that are kept, plans that short runs anchor, and a plan held against a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.base.errors import ConfigError, DataError
from openm6.base.run_folder import RunFolder
from openm6.bench.anchors import ANCHORS, Anchor, anchor, model_of, planned, streamed, way_name
from openm6.bench.calibration import CASES
from openm6.bench.probe import TEXT_ONLY, Probe
from openm6.plan.ceilings import Ceilings, Curve, TrainingRates, Way, read_ceilings, write_ceilings
from openm6.plan.check import check_run, read_measured
from openm6.plan.cost import Cost
from openm6.plan.examples import ExampleFacts
from openm6.plan.machine import machine_cluster
from openm6.plan.measured import load_of

FLAT = Curve(points=((1e4, 5e10), (1e6, 1e11)))
PARTS = {
    "attention": {"products": 6e-11, "pieces": 8e-5},
    "dense": {"products": 6e-11},
    "experts": {"products": 7e-11, "experts": 5e-5},
    "head": {"products": 5e-11},
    "read text": {"calls": 4e-5},
    "learn image_out": {"tokens": 4e-5},
    "update adamw": {"parameters": 1e-9},
    "rule 16": {"parameters": 1e-9},
    "fetch 16": {"parameters": 2e-10},
}


def facts(task: str, words: float, codes: float) -> ExampleFacts:
    """An example of a task over emoji, with so many learned tokens."""
    learned = {"text": words, "image_out": codes}
    read = {"text": 2 * words + 4.0, "image_out": codes}
    tokens = sum(read.values())
    return ExampleFacts(
        source="emoji", task=task, tokens=tokens, read=read, learned=learned, pairs=tokens**2, pieces=1.0,
        seconds=1e-4,
    )  # fmt: skip


def ceilings() -> Ceilings:
    """A machine of two cores whose parts have round prices."""
    parts = {name: Cost(prices=prices) for name, prices in PARTS.items()}
    rates = TrainingRates(
        team=Way(processes=2, parts=parts),
        alone=Way(processes=1, parts=parts),
        examples=(facts("answer", 8.0, 0.0), facts("define", 12.0, 0.0), facts("draw", 0.0, 64.0)),
        fill=0.99,
        token=1e-6,
    )
    return Ceilings(
        machine="a machine", taken="2026-01-01", threads=2, memory_bytes=16e9, products={"float32": FLAT},
        grouped={"float32": FLAT}, memory={"copy": 1e10, "read": 1e10}, watts={"idle": 5.0, "busy": 20.0},
        watts_source="estimate", training=rates,
    )  # fmt: skip


def test_a_curve_between_and_beyond_its_points() -> None:
    assert FLAT.at(1e5) == pytest.approx(7.5e10)
    assert FLAT.at(1.0) == 5e10 and FLAT.at(1e9) == 1e11


def test_anchored_plans_say_what_the_probes_took() -> None:
    plain, anchors = ceilings(), []
    for words in ANCHORS:
        stage, model = planned(words, plain), model_of(words)
        load = load_of(model, plain.training, (model.rows or 0) * model.length)
        fixed = 5e8 if way_name(words) == "team" else 4e8
        seconds = 0.05 + 1.5 * stage.time.seconds + 2e-5 * load.codes
        memory = fixed + 1.2 * stage.budget.device + 3e3 * load.words + 3e4 * load.codes
        anchors.append(Anchor(words, Probe(seconds, 12 * seconds, memory)))
    anchored = anchor(plain, anchors)
    assert anchored.training.team.watts == pytest.approx(12.0)
    assert anchored.training.alone.process == pytest.approx(4e8, rel=1e-3)
    for one in anchors:
        stage = planned(one.words, anchored)
        assert stage.time.seconds == pytest.approx(one.probe.seconds, rel=1e-6)
        assert stage.budget.device == pytest.approx(one.probe.memory, rel=1e-6)


def test_a_way_with_one_anchor_keeps_its_numbers() -> None:
    few = [Anchor(words, Probe(1.0, 10.0, 1e9)) for words in ANCHORS if way_name(words) == "team"]
    anchored = anchor(ceilings(), few)
    assert anchored.training.alone == ceilings().training.alone
    assert anchored.training.team != ceilings().training.team


def test_no_anchor_is_among_the_cases_and_both_hold_every_way() -> None:
    assert not [words for words in ANCHORS if words in CASES.values()]
    for runs in (ANCHORS, tuple(CASES.values())):
        assert {way_name(words) for words in runs} == {"team", "alone"}
        assert {model_of(words).streamed for words in runs} == {True, False}
    assert len(CASES) >= 12


def test_streaming_computes_forward_twice_and_saves_states() -> None:
    plain = ceilings()
    resident, moved = (planned([*TEXT_ONLY, *words], plain) for words in (["loop.workers=1"], streamed(16)))
    assert moved.time.compute > 1.2 * resident.time.compute
    small = planned([*TEXT_ONLY, *streamed(2)], plain)
    assert small.budget.states < 0.5 * moved.budget.states and small.tier.bytes == 2


def test_a_machine_with_a_gpu_is_planned_by_it_and_its_probes_by_its_processor() -> None:
    half = {"bfloat16": FLAT, "float32": FLAT}
    links = {"host_to_device": 5e10, "both_ways": 4e10}
    found = ceilings().model_copy(
        update={"gpu": "a GPU", "products": half, "grouped": half, "links": links, "host_bytes": 64e9}
    )
    cluster = machine_cluster(found)
    assert cluster.name == "a GPU" and cluster.measured is None and cluster.host_link == 4e10
    assert (cluster.memory, cluster.host_memory) == (16e9, 64e9)
    assert cluster.dense_rate == pytest.approx(0.6e11) and cluster.expert_rate == pytest.approx(0.45e11)
    assert machine_cluster(found, processor=True).memory == 64e9
    assert planned([], found).time == planned([], ceilings()).time


def test_ceilings_are_kept_and_a_plan_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENM6_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="run openm6 bench machine once"):
        read_ceilings()
    path = write_ceilings(ceilings())
    assert read_ceilings() == ceilings()
    run = RunFolder.open(tmp_path / "run")
    run.write_config(
        {"kind": "multimodal", "model": {"preset": "nano"}, "packing": {"rows": 2, "length": 512}}
    )
    lines = [
        f'{{"step": {step}, "seconds": {step * 0.2}, "joules": {step * 4.0}, "memory_peak": 104857600}}\n'
        for step in range(1, 9)
    ]
    run.metrics.write_text("".join(lines[:2]))
    with pytest.raises(DataError, match="fewer than three lines"):
        read_measured(run)
    run.metrics.write_text("".join(lines))
    assert read_measured(run) == pytest.approx({"memory": 100.0, "step time": 200.0, "energy": 4.0})
    rows = {row["name"]: row for row in check_run(run.path)}
    time = rows["step time"]
    assert time["error"] == pytest.approx(time["planned"] / 200.0 - 1)
    assert rows["memory"]["planned"] > 0 and rows["memory"]["note"] == "off by more than wanted"
    run.write_config(
        {
            "kind": "multimodal",
            "model": {"preset": "nano"},
            "packing": {"rows": 2, "length": 512},
            "loop": {"save_every": 3},
        }
    )
    saving = next(row for row in check_run(run.path) if row["name"] == "memory")
    moments = saving["planned"] - rows["memory"]["planned"]
    assert f"{moments:,.0f} MiB come in 8 steps: {moments:,.0f} MiB by saving" in saving["note"]
    assert rows["energy"]["planned"] == pytest.approx(time["planned"] / 1000 * 20.0)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="run openm6 bench machine again"):
        read_ceilings()
