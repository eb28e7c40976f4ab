"""`openm6 bench machine`: the ceilings of this machine, kept for the planner."""

from __future__ import annotations

import datetime
import platform
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openm6.base.log import get_log
from openm6.bench.machine_rates import (
    disk_rates,
    exchange_rates,
    grouped_rates,
    link_rates,
    memory_rates,
    product_rates,
    watts,
)
from openm6.bench.measure import Deadline, device_name, emit
from openm6.bench.probe import TEXT_ONLY, Probe, run_probe
from openm6.bench.training_rates import measure_parts
from openm6.plan.ceilings import Ceilings, Curve, TrainingRates, write_ceilings
from openm6.plan.hardware import GIB
from openm6.plan.machine import machine_cluster
from openm6.plan.plan import StagePlan, make_plan
from openm6.plan.question import Question, model_of_recipe
from openm6.train.run import read_recipe, recipe_path

SECONDS = 170.0
# Four short runs, of few and many tokens, a small and a larger model, and text alone, anchor the sums of the parts.
ANCHORS = (
    ["packing.rows=2"],
    ["packing.rows=8"],
    [TEXT_ONLY, "packing.rows=6"],
    [
        "packing.rows=4",
        "model.overrides.width=384",
        "model.overrides.num_heads=6",
        "model.overrides.num_layers=6",
    ],
)
ANCHOR_STEPS = 14


def bench_machine(json_path: Path | None) -> None:
    """Measure, keep and print the ceilings of this machine."""
    ceilings = measure_machine(Deadline(SECONDS))
    path = write_ceilings(ceilings)
    get_log().info(f"kept for openm6 plan in {path}")
    emit(ceilings.model_dump(mode="json"), json_path)


def measure_machine(deadline: Deadline) -> Ceilings:
    """All ceilings; training parts first, as processes are forked before threads are started."""
    points, workers = measure_parts()
    exchange = exchange_rates(deadline)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    draw, source = watts(device)
    rates = TrainingRates(
        **{name: _curve(points, name) for name in ("attention", "dense", "experts", "head")},
        update={part.removeprefix("update "): rate for part, _, rate in points if part.startswith("update ")},
        workers=workers,
    )
    ceilings = Ceilings(
        machine=f"{device_name(device)}, {platform.machine()}",
        taken=datetime.date.today().isoformat(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if gpu else None,
        memory_bytes=_memory(device),
        products={
            name: Curve(points=tuple(found)) for name, found in product_rates(device, deadline).items()
        },
        grouped={name: Curve(points=tuple(found)) for name, found in grouped_rates(device, deadline).items()},
        memory=memory_rates(device, deadline),
        links=link_rates(device, deadline),
        disk=disk_rates(Path.cwd()),
        all_to_all=exchange,
        watts=draw,
        watts_source=source,
        training=rates,
    )
    return anchor(ceilings, [(words, run_probe(words, ANCHOR_STEPS)) for words in ANCHORS])


def anchor(ceilings: Ceilings, probes: list[tuple[list[str], Probe]]) -> Ceilings:
    """The ceilings with the factors of time and memory under which the probes are planned as they ran."""
    stages = [planned(words, ceilings) for words, _ in probes]
    text = [TEXT_ONLY in words for words, _ in probes]
    columns = [
        [0.0 if only else float(stage.tokens) for stage, only in zip(stages, text, strict=True)],
        [float(stage.tokens) if only else 0.0 for stage, only in zip(stages, text, strict=True)],
    ]
    times, memory = [probe.seconds for _, probe in probes], [probe.memory for _, probe in probes]
    step, stretch, token, text_token = fit([[stage.time.seconds for stage in stages], *columns], times)
    process, gap, bytes_, text_bytes = fit([[stage.budget.device for stage in stages], *columns], memory)
    fitted = {
        "step": step, "stretch": stretch, "token": token, "text_token": text_token, "process": process, "gap": gap,
        "token_bytes": bytes_, "text_token_bytes": text_bytes, "workers": probes[0][1].workers,
    }  # fmt: skip
    busy = sum(probe.joules for _, probe in probes) / sum(times)
    return ceilings.model_copy(
        update={
            "training": ceilings.training.model_copy(update=fitted),
            "watts": {**ceilings.watts, "busy": busy},
        }
    )


def fit(causes: list[list[float]], measured: list[float]) -> list[float]:
    """An offset and a factor for each cause, none below zero, that come nearest to what was measured."""
    columns = np.array([np.ones(len(measured)), *causes]).T
    scale, target = columns.max(0), np.array(measured)
    best, found = np.inf, np.zeros(columns.shape[1])
    for chosen in product((False, True), repeat=columns.shape[1]):
        use = np.array(chosen)
        if not use.any():
            continue
        values = np.zeros(columns.shape[1])
        values[use] = np.linalg.lstsq(columns[:, use] / scale[use], target, rcond=None)[0] / scale[use]
        error = float(np.square((columns @ values - target) / target).sum())
        if (values >= 0).all() and error < best:
            best, found = error, values
    return found.tolist()


def planned(overrides: list[str], ceilings: Ceilings) -> StagePlan:
    """The plan of a probe's run on the machine of the ceilings."""
    _, values = read_recipe(recipe_path("demo"), overrides)
    model = replace(model_of_recipe("probe", values), workers=ceilings.training.workers)
    return make_plan(Question(model), machine_cluster(ceilings)).real


def _curve(points: list[tuple[str, float, float]], name: str) -> Curve:
    return Curve(points=tuple((size, rate) for part, size, rate in points if part == name))


def _memory(device: torch.device) -> float:
    """Bytes of the device, for a processor those of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    pages: dict[str, Any] = {}
    try:
        text = Path("/proc/meminfo").read_text()
        pages = dict(line.split(":", 1) for line in text.splitlines())
        return float(pages["MemTotal"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8.0 * GIB
