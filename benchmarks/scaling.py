"""The benchmark scaling: a step on 1, 2 and more processes of this machine, and a model of 1 to 512 GPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import Deadline, device_name
from benchmarks.ranks import on_ranks
from benchmarks.report import Report
from benchmarks.scaling_model import SIZES, links_of, model_step
from openm6.base.errors import ConfigError
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.presets import preset
from openm6.nn.config import ExpertsConfig
from openm6.ops.sequence import causal_meta
from openm6.parallel.config import MeshShape
from openm6.parallel.processes import ProcessRanks

LENGTH, WARMUP = 256, 2
SMALL = BackboneConfig(
    width=192, num_layers=4, num_heads=3, num_kv_heads=1, head_dim=64,
    experts=ExpertsConfig(hidden=192, num_experts=8, top_k=2),
)  # fmt: skip


def bench_scaling(
    processes: tuple[int, ...] = (1, 2, 4),
    rows: int = 8,
    steps: int = 8,
    of: str = "m6-10t",
    gpu: str = "h100-80gb",
    seconds: float = 150.0,
    json_path: Path | None = None,
) -> None:
    """Measures and models, prints one JSON object and writes it to `json_path`.

    Raises:
        ConfigError: rows that the processes cannot share evenly, or no such preset or GPU.
    """
    assert SMALL.experts is not None
    num_experts = SMALL.experts.num_experts
    if wrong := [size for size in processes if rows % size or num_experts % size]:
        raise ConfigError(
            f"{rows} rows and {num_experts} experts cannot be shared by {wrong[0]} processes: choose divisors of both"
        )
    links, config = links_of(gpu), preset(of).backbone
    measured: list[dict[str, Any]] = []
    with Report(json_path, seconds) as report:
        report.update(
            {
                "measured": measured,
                "device": f"{device_name(torch.device('cpu'))}; one thread a process",
                "modelled": [model_step(config, size, links) for size in SIZES],
                "of": of,
                "rates": asdict(links),
            }
        )
        for row in _measured(processes, rows, steps, report.deadline):
            measured.append(row)  # one by one: a cut leaves those before it


def _measured(
    processes: tuple[int, ...], rows: int, steps: int, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """Each number of processes, copied and with experts dealt out, with as many rows in all and with as many each."""
    for size in processes:
        for way in ("data", "experts") if size > 1 else ("data",):
            for scaling, rows_each in (("strong", rows // size), ("weak", rows // processes[-1])):
                if deadline.passed:
                    return
                seconds = max(on_ranks(size, time_steps, way, rows_each, steps))
                yield {
                    "processes": size,
                    "way": way,
                    "scaling": scaling,
                    "rows_each": rows_each,
                    "seconds_per_step": seconds,
                    "tokens_per_second": rows_each * size * LENGTH / seconds,
                }


def parse_counts(words: str) -> tuple[int, ...]:
    """`1,2,4` as numbers.

    Raises:
        ConfigError: something else.
    """
    parts = [word.strip() for word in words.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"{words!r} must be numbers of processes, such as 1,2,4")
    return tuple(int(part) for part in parts)


def time_steps(way: str, rows: int, steps: int) -> float:
    """The median seconds of a forward, backward and update on this rank's rows."""
    ranks = ProcessRanks(torch.device("cpu"), 120)
    torch.manual_seed(0)
    model = Backbone(SMALL)
    if way == "experts":
        ranks.shard(model, MeshShape(1, 1, ranks.size))
    model.exchange = ranks.exchange(1)
    groups = ranks.groups([{"params": list(model.parameters())}])
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    x, layout = torch.randn(rows, LENGTH, SMALL.width), causal_meta(rows, LENGTH)
    times = []
    for _ in range(WARMUP + steps):
        dist.barrier()
        began = time.perf_counter()
        y, loads = model(x, layout)
        (y.square().mean() + sum(load.side_loss for load in loads)).backward()
        ranks.sum_gradients(model.parameters())
        ranks.norm(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARMUP:])
