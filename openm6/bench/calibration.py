"""`openm6 bench plan`: the planner held against short runs of many configurations that it was not anchored by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openm6.bench.machine import planned
from openm6.bench.measure import Deadline, emit
from openm6.bench.probe import TEXT_ONLY, run_probe
from openm6.plan.ceilings import read_ceilings

SECONDS = 170.0
STEPS = 12


def _sizes(width: int, layers: int) -> list[str]:
    return [
        f"model.overrides.width={width}",
        f"model.overrides.num_heads={width // 64}",
        f"model.overrides.num_layers={layers}",
    ]


def _dense(hidden: int, ffn: str = "swiglu") -> list[str]:
    return ["model.overrides.experts=null", f"model.overrides.dense={{hidden: {hidden}, ffn: {ffn}}}"]


CASES: dict[str, list[str]] = {
    "sparse, text, width 192, 1,024 tokens": [TEXT_ONLY, "packing.rows=2"],
    "sparse, text, width 192, 4,096 tokens": [TEXT_ONLY, "packing.rows=8"],
    "sparse, text, width 384, 6 layers": [TEXT_ONLY, *_sizes(384, 6), "packing.rows=4"],
    "dense, text, width 192": [TEXT_ONLY, *_dense(768), "packing.rows=4"],
    "dense, text, width 384, 6 layers": [TEXT_ONLY, *_sizes(384, 6), *_dense(1536), "packing.rows=4"],
    "dense gelu, text, width 512": [TEXT_ONLY, *_sizes(512, 4), *_dense(2048, "gelu"), "packing.rows=2"],
    "dense, multimodal, width 256, 6 layers": [*_sizes(256, 6), *_dense(1024), "packing.rows=4"],
    "sparse, multimodal, width 192": ["packing.rows=4"],
    "sparse, multimodal, width 192, 8 layers": ["model.overrides.num_layers=8", "packing.rows=4"],
    "16 experts, multimodal, width 256": [
        *_sizes(256, 4),
        "model.overrides.experts={num_experts: 16, hidden: 256}",
        "packing.rows=4",
    ],
    "prototypes, multimodal, width 256": [
        *_sizes(256, 4),
        "model.overrides.experts={top_k: null, num_prototypes: 4, hidden: 256}",
        "packing.rows=4",
    ],
    "preset tiny, multimodal": ["model.preset=tiny", "packing.rows=4"],
    "adafactor, multimodal, width 384": [
        *_sizes(384, 4),
        "loop.optimizer.name=adafactor",
        "packing.rows=4",
    ],
}


def bench_plan(json_path: Path | None, seconds: float = SECONDS, only: str | None = None) -> None:
    """Run each case for a few steps and print what was planned beside what was measured.

    `only`: as `3:8`, the cases from the third to before the eighth, where the machine is not free for all at once.
    """
    deadline = Deadline(seconds)
    first, _, last = (only or ":").partition(":")
    names = list(CASES)[int(first or 0) : int(last) if last else None]
    ceilings = read_ceilings()
    rows: list[dict[str, Any]] = []
    for name in names:
        if deadline.passed:
            break
        probe, stage = run_probe(CASES[name], STEPS), planned(CASES[name], ceilings)
        row: dict[str, Any] = {"case": name, "parameters": stage.parameters}
        pairs = {
            "seconds": (stage.time.seconds, probe.seconds),
            "bytes": (stage.budget.device, probe.memory),
            "joules": (stage.time.seconds * ceilings.watts["busy"], probe.joules),
        }
        for unit, (said, found) in pairs.items():
            row[unit] = {"planned": said, "measured": found, "error": said / found - 1 if found else None}
        rows.append(row)
    emit({"machine": ceilings.machine, "taken": ceilings.taken, "rows": rows}, json_path)
