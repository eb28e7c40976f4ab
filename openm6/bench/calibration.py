"""`openm6 bench plan`: the planner held against short runs of many configurations that it was not anchored by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from openm6.base.errors import ConfigError, TrainingError
from openm6.base.log import get_log
from openm6.bench.anchors import (
    ALONE,
    ANCHORS,
    LAST_RUN,
    Anchor,
    anchor,
    dense,
    planned,
    run_anchor,
    sizes,
    streamed,
    way_name,
)
from openm6.bench.measure import Deadline
from openm6.bench.probe import TEXT_ONLY
from openm6.bench.report import Report
from openm6.plan.ceilings import Ceilings, read_ceilings
from openm6.plan.check import GOALS

SECONDS = 440.0
QUANTITIES = {"seconds": "step time", "bytes": "memory", "joules": "energy"}
CASES: dict[str, list[str]] = {
    "sparse, text, width 192, 1,024 tokens": [*TEXT_ONLY, "packing.rows=2"],
    "sparse, text, width 192, 4,096 tokens": [*TEXT_ONLY, "packing.rows=8"],
    "sparse, text, width 384, 6 layers": [*TEXT_ONLY, *sizes(384, 6), "packing.rows=4"],
    "dense, text, width 192": [*TEXT_ONLY, *dense(768), "packing.rows=4"],
    "dense, text, width 384, 6 layers": [*TEXT_ONLY, *sizes(384, 6), *dense(1536), "packing.rows=4"],
    "dense gelu, text, width 512": [*TEXT_ONLY, *sizes(512, 4), *dense(2048, "gelu"), "packing.rows=2"],
    "dense, multimodal, width 256, 6 layers": [*sizes(256, 6), *dense(1024), "packing.rows=4"],
    "sparse, multimodal, width 192": ["packing.rows=4"],
    "sparse, multimodal, width 192, 8 layers": ["model.overrides.num_layers=8", "packing.rows=4"],
    "16 experts, multimodal, width 256": [
        *sizes(256, 4),
        "model.overrides.experts={num_experts: 16, hidden: 256}",
        "packing.rows=4",
    ],
    "prototypes, multimodal, width 256": [
        *sizes(256, 4),
        "model.overrides.experts={top_k: null, num_prototypes: 4, hidden: 256}",
        "packing.rows=4",
    ],
    "preset tiny, multimodal": ["model.preset=tiny", "packing.rows=4"],
    "adafactor, multimodal, width 384": [
        *sizes(384, 4),
        "loop.optimizer.name=adafactor",
        "packing.rows=4",
    ],
    "one process, text, width 256": [*TEXT_ONLY, *sizes(256, 4), "packing.rows=4", ALONE],
    "streamed, 16 bytes, multimodal, width 192": ["packing.rows=4", *streamed(16)],
    "streamed, 4 bytes, dense, text, width 384": [
        *TEXT_ONLY,
        *sizes(384, 6),
        *dense(1536),
        "packing.rows=4",
        *streamed(4),
    ],
    "streamed, 2 bytes, multimodal, width 384": ["packing.rows=4", *sizes(384, 4), *streamed(2)],
    "streamed, 1 byte, multimodal, width 256": [
        "packing.rows=8",
        *sizes(256, 6),
        *streamed(1, micro_batches=4, recompute_every=2),
    ],
}


def bench_plan(json_path: Path | None, seconds: float = SECONDS, only: str | None = None) -> None:
    """Run each case for a few steps and print what was planned beside what was measured.

    Anchors are run anew in between, so that a machine that grows slower or faster meanwhile is the same for both.
    `only`: as `3:8`, the cases from the third to before the eighth. What is not done in time is named.

    Raises:
        ConfigError: the machine was not measured, or `only` names no cases.
    """
    ceilings, names = read_ceilings(), _chosen(only)
    found: dict[str, Anchor] = {}

    def comparison() -> dict[str, Any]:
        result = compare(found, ceilings)
        result["left_out"] = [name for name in names if name not in found]
        show_comparison(result)
        return result

    with Report(json_path, seconds) as report:
        report.at_end(comparison)
        for name, words in _interleaved(names):
            if report.deadline.left < LAST_RUN:
                break
            _run(found, name, words, ceilings)
        _repeat_disturbed(found, ceilings, report.deadline)


def compare(found: dict[str, Anchor], ceilings: Ceilings) -> dict[str, Any]:
    """Plans beside measurements: a row for each case, and how many of each quantity are as near as wanted."""
    anchors = [one for name, one in found.items() if name not in CASES]
    fresh = anchor(ceilings, anchors)
    rows = [_row(name, one, fresh) for name, one in found.items() if name in CASES]
    quiet = [row for row in rows if not row["disturbed"]]
    return {
        "machine": ceilings.machine,
        "taken": ceilings.taken,
        "rows": rows,
        "within": {unit: _within(rows, unit) for unit in QUANTITIES},
        "within_undisturbed": {unit: _within(quiet, unit) for unit in QUANTITIES},
        "cases": len(rows),
        "undisturbed": len(quiet),
        "metering": {"largest_share_of_a_step": max((one.probe.metering for one in found.values()), default=None)},
        "anchors": [{"settings": one.words, **asdict(one.probe)} for one in anchors],
        "anchored": {
            way: getattr(fresh.training, way).model_dump(mode="json", exclude={"parts"})
            for way in ("team", "alone")
        },
    }  # fmt: skip


def show_comparison(result: dict[str, Any]) -> None:
    """The rows as a table, beside the JSON on standard output."""
    table = Table("case", *(f"{word}: planned, measured, off by" for word in QUANTITIES.values()), box=None)
    for row in result["rows"]:
        cells = [_cell(row[unit], unit) for unit in QUANTITIES]
        table.add_row(row["case"] + (" (disturbed)" if row["disturbed"] else ""), *cells)
    console = Console(stderr=True)
    console.print(table)
    for kind, count in (("within", "cases"), ("within_undisturbed", "undisturbed")):
        words = ", ".join(
            f"{word} {result[kind][unit]} (within {GOALS[word]:.0%})" for unit, word in QUANTITIES.items()
        )
        console.print(f"of {result[count]} {count}: {words}")


def _chosen(only: str | None) -> list[str]:
    first, _, last = (only or ":").partition(":")
    try:
        chosen = list(CASES)[int(first or 0) : int(last) if last else None]
    except ValueError:
        chosen = []
    if not chosen:
        raise ConfigError(f"--only {only!r} names no cases: give numbers from 0 to {len(CASES)}, as 3:8")
    return chosen


def _interleaved(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Cases with the anchors spread among them, the first before and the last behind them all."""
    places = [(number * len(names) / (len(ANCHORS) - 1) - 0.5, number) for number in range(len(ANCHORS))]
    runs = [(place, f"anchor {number}", ANCHORS[number]) for place, number in places]
    runs += [(float(place), name, CASES[name]) for place, name in enumerate(names)]
    return [(name, words) for _, name, words in sorted(runs, key=lambda run: run[0])]


def _run(found: dict[str, Anchor], name: str, words: list[str], ceilings: Ceilings) -> None:
    """Takes the measurement in, unless an earlier one of the same was disturbed less."""
    try:
        one = run_anchor(words, ceilings)
    except TrainingError as error:
        get_log().warning(f"{name}: {error}")
        return
    before = found.get(name)
    if before is None or (one.probe.others or 0.0) < (before.probe.others or 0.0):
        found[name] = one
    get_log().info(f"{name}: {one.probe.seconds:.3f} s a step{', disturbed' * one.probe.disturbed}")


def _repeat_disturbed(found: dict[str, Anchor], ceilings: Ceilings, deadline: Deadline) -> None:
    """Once more while there is time, the most disturbed first."""
    again = [name for name, one in found.items() if one.probe.disturbed]
    for name in sorted(again, key=lambda name: -(found[name].probe.others or 0.0)):
        if deadline.left < LAST_RUN:
            return
        _run(found, name, found[name].words, ceilings)


def _row(name: str, one: Anchor, ceilings: Ceilings) -> dict[str, Any]:
    stage, probe = planned(one.words, ceilings), one.probe
    watts = ceilings.watts["busy"] if stage.watts is None else stage.watts
    pairs = {
        "seconds": (stage.time.seconds, probe.seconds),
        "bytes": (stage.budget.device, probe.memory),
        "joules": (stage.time.seconds * watts, probe.joules),
    }
    row: dict[str, Any] = {"case": name, "way": way_name(one.words), "parameters": stage.parameters}
    for unit, (said, measured) in pairs.items():
        row[unit] = {"planned": said, "measured": measured, "error": said / measured - 1}
    return row | {
        "tokens": stage.tokens,
        "cpu_seconds": probe.cpu,
        "others": probe.others,
        "metering": probe.metering,
        "disturbed": probe.disturbed,
    }


def _within(rows: list[dict[str, Any]], unit: str) -> int:
    return sum(abs(row[unit]["error"]) <= GOALS[QUANTITIES[unit]] for row in rows)


def _cell(pair: dict[str, float], unit: str) -> str:
    scale, name = {"seconds": (1e3, "ms"), "bytes": (2**-20, "MiB"), "joules": (1.0, "J")}[unit]
    return f"{pair['planned'] * scale:,.4g}, {pair['measured'] * scale:,.4g} {name}, {pair['error']:+.1%}"
