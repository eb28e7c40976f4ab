"""Benchmark `scaling`: a step on 1, 2 and more processes of this machine, and a cost model of 1 to 512 GPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from benchmarks.harness import Deadline, Json, Report, Seconds, Steps, device_name
from benchmarks.ranks import Of, on_ranks, parse_counts
from openm6.core.errors import ConfigError
from openm6.distributed.config import MeshShape
from openm6.distributed.processes import DistributedContext
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig
from openm6.ops.sequence import causal_meta
from openm6.plan.hardware import ClusterOptions, gpu, gpu_cluster
from openm6.plan.plan import make_plan
from openm6.plan.request import PlanRequest, read_model

SIZES = (1, 8, 16, 64, 128, 512)  # GPUs
MODELLED_TOKENS = 4096  # of a step on each GPU
LENGTH, WARMUP = 256, 2
SMALL = BackboneConfig(
    hidden_size=192, num_layers=4, num_heads=3, num_kv_heads=1, head_dim=64,
    experts=ExpertsConfig(intermediate_size=192, num_experts=8, top_k=2),
)  # fmt: skip


def bench_scaling(
    processes: Annotated[str, typer.Option("--processes", metavar="1,2,4", help="Numbers of processes.")] = "1,2,4",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows per step of all processes.")] = 8,
    steps: Steps = 8,
    of: Of = "m6-10t",
    gpu_kind: Annotated[
        str, typer.Option("--gpu", metavar="KIND", help="GPU of the cost model, as in openm6 plan.")
    ] = "h100-80gb",
    seconds: Seconds = 150.0,
    json_path: Json = None,
) -> None:
    """Measure a step on several processes here, and model one on up to 512 GPUs.

    \b
    Example: python -m benchmarks scaling --json scaling.json
    """
    counts = parse_counts(processes)
    assert SMALL.experts is not None
    num_experts = SMALL.experts.num_experts
    if wrong := [size for size in counts if rows % size or num_experts % size]:
        raise ConfigError(
            f"{rows} rows and {num_experts} experts cannot be divided by {wrong[0]} processes: choose divisors of both"
        )
    measured: list[dict[str, Any]] = []
    with Report(json_path, seconds) as report:
        report.update(
            {
                "measured": measured,
                "device": f"{device_name(torch.device('cpu'))}; one thread a process",
                "modelled": model_steps(of, gpu_kind),
                "of": of,
                "assumed": gpu_cluster(gpu(gpu_kind), ClusterOptions()).assumed,
            }
        )
        for row in _measured(counts, rows, steps, report.deadline):
            measured.append(row)  # one by one: a cut leaves those before it


def model_steps(of: str, kind: str) -> list[dict[str, Any]]:
    """Return a modelled step of a preset at 2 bytes per parameter on 1 to 512 GPUs; host memory is ignored.

    Raises:
        ConfigError: no such preset or GPU.
    """
    request = PlanRequest(read_model(of), batch=MODELLED_TOKENS, bytes_per_parameter=2)
    rows = []
    for count in SIZES:
        cluster = gpu_cluster(gpu(kind), ClusterOptions(devices=count))
        stage = make_plan(request, cluster).real
        rows.append(
            {
                "gpus": count,
                "parameters_per_gpu": stage.parameters / count,
                "seconds": asdict(stage.time),
                "seconds_per_step": stage.time.seconds,
                "tokens_per_second": stage.tokens / stage.time.seconds,
                "bottleneck": stage.time.bottleneck,
                "fits": stage.fits,
            }
        )
    return rows


def _measured(processes: tuple[int, ...], rows: int, steps: int, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """Yield results by number of processes, for data and expert parallelism, strong and weak scaling."""
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


def time_steps(way: str, rows: int, steps: int) -> float:
    """Return the median seconds of forward, backward and update on the rows of this rank."""
    ranks = DistributedContext(torch.device("cpu"), 120)
    torch.manual_seed(0)
    model = Backbone(SMALL)
    if way == "experts":
        ranks.shard(model, MeshShape(1, 1, ranks.size))
    model.executor.dispatcher = ranks.token_dispatcher(1)
    groups = ranks.groups([{"params": list(model.parameters())}])
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    x, meta = torch.randn(rows, LENGTH, SMALL.hidden_size), causal_meta(rows, LENGTH)
    times = []
    for _ in range(WARMUP + steps):
        dist.barrier()
        began = time.perf_counter()
        y, loads = model(x, meta)
        (y.square().mean() + sum(load.side_loss for load in loads)).backward()
        ranks.sum_gradients(model.parameters())
        ranks.norm(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARMUP:])
