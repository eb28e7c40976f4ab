"""Anchoring a plan to probes, keeping what was measured, and holding a plan against a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.base.errors import ConfigError, DataError
from openm6.base.run_folder import RunFolder
from openm6.bench.machine import ANCHORS, anchor, fit, planned
from openm6.bench.probe import TEXT_ONLY, Probe
from openm6.bench.training_rates import block_of, example_layout
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig
from openm6.ops.sequence import visible
from openm6.plan.ceilings import Ceilings, Curve, TrainingRates, read_ceilings, write_ceilings
from openm6.plan.check import check_run, read_measured
from openm6.plan.question import TEXT_TASKS
from openm6.tasks.registry import TASKS

FLAT = Curve(points=((1e4, 5e10), (1e6, 1e11)))


def ceilings() -> Ceilings:
    """A machine whose parts all run at the same rates."""
    rates = TrainingRates(
        attention=FLAT,
        dense=FLAT,
        experts=FLAT,
        head=FLAT,
        update={"adamw": 5e8, "adafactor": 2e8},
        workers=2,
    )
    return Ceilings(
        machine="a machine", taken="2026-01-01", threads=2, memory_bytes=16e9, products={"float32": FLAT},
        grouped={"float32": FLAT}, memory={"copy": 1e10, "read": 1e10}, watts={"idle": 5.0, "busy": 20.0},
        watts_source="estimate", training=rates,
    )  # fmt: skip


def test_a_curve_between_and_beyond_its_points() -> None:
    assert FLAT.at(1e5) == pytest.approx(7.5e10)
    assert FLAT.at(1.0) == 5e10 and FLAT.at(1e9) == 1e11


def test_a_fit_finds_what_made_the_figures_and_nothing_below_zero() -> None:
    parts, tokens = [1.0, 2.0, 5.0, 7.0], [10.0, 40.0, 20.0, 10.0]
    made = [3 + 2 * part + 0.1 * token for part, token in zip(parts, tokens, strict=True)]
    assert fit([parts, tokens], made) == pytest.approx([3.0, 2.0, 0.1])
    falling = [9.0, 7.0, 4.0, 2.0]
    assert min(fit([parts, tokens], falling)) >= 0


def test_anchored_plans_say_what_the_probes_took() -> None:
    plain = ceilings()
    probes = []
    for words in ANCHORS:
        stage = planned(words, plain)
        each = 2e-5 if TEXT_ONLY in words else 5e-5
        seconds = 0.05 + 1.5 * stage.time.seconds + each * stage.tokens
        memory = 5e8 + 1.2 * stage.budget.device + 3e4 * stage.tokens
        probes.append((words, Probe(seconds, 12 * seconds, memory, 2)))
    anchored = anchor(plain, probes)
    assert anchored.watts["busy"] == pytest.approx(12.0)
    for words, probe in probes:
        stage = planned(words, anchored)
        assert stage.time.seconds == pytest.approx(probe.seconds, rel=1e-6)
        assert stage.budget.device == pytest.approx(probe.memory, rel=1e-6)


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
    assert rows["energy"]["planned"] == pytest.approx(time["planned"] / 1000 * 20.0)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="run openm6 bench machine again"):
        read_ceilings()


def test_the_timed_layout_packs_examples_that_do_not_see_one_another() -> None:
    mask = visible(example_layout(), example_layout())[0, 0]
    assert mask[0, :32].all() and not mask[0, 32:].any()  # a source token sees its source
    assert mask[63, :64].all() and not mask[63, 64:].any()
    assert not mask[64, :64].any()


def test_a_block_is_taken_out_whole() -> None:
    config = BackboneConfig(
        width=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, dense=DenseConfig(hidden=64)
    )
    block, parts, context = block_of(config)
    assert sum(weight.numel() for weight in block.parameters()) == 64 * 4 * 64 + 3 * 64 * 64
    assert parts.router is None and context.valid.all()


def test_text_tasks_read_and_give_text() -> None:
    assert all(TASKS[name].reads == TASKS[name].gives == "text" for name in TEXT_TASKS)
