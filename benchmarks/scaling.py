"""The benchmark scaling: a step on 1, 2 and more processes of this machine, and a model of 1 to 512 GPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from benchmarks.harness import Deadline, Json, Report, Seconds, Steps, device_name
from benchmarks.ranks import Of, on_ranks, parse_counts
from openm6.base.errors import ConfigError
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig, count_parameters
from openm6.models.presets import preset
from openm6.nn.config import ExpertsConfig
from openm6.ops.sequence import causal_meta
from openm6.parallel.config import MeshShape
from openm6.parallel.processes import ProcessRanks
from openm6.plan.hardware import ALL_TO_ALL, ClusterOptions, gpu, gpu_cluster

SIZES = (1, 8, 16, 64, 128, 512)


@dataclass(frozen=True)
class Links:
    """Rates of one GPU as they are reached: operations a second by kind of layer, and bytes sent a second within a
    machine and between machines; and where they come from."""

    dense: float
    experts: float
    inside: float
    between: float
    gpus_a_machine: int
    sources: tuple[str, ...] = ()


def links_of(kind: str) -> Links:
    """Of a GPU in the planner's table: its best product as measured, its links as declared, and the shares of both
    that the planner takes to be reached.

    Raises:
        ConfigError: no such GPU.
    """
    entry = gpu(kind)
    cluster = gpu_cluster(entry, ClusterOptions(devices=max(SIZES)))
    product = entry.measured or entry.rate
    known = "measured" if entry.measured else "specified"
    sources = (
        f"{entry.name}: best product {product / 1e12:.0f} TFLOP/s ({known}), links {entry.peer_link / 1e9:.0f} GB/s "
        f"within a machine and {entry.network / 1e9:.0f} GB/s between them (declared); {entry.source}",
        f"reached in dense layers {cluster.dense_rate / 1e12:.0f} and in expert layers "
        f"{cluster.expert_rate / 1e12:.0f} TFLOP/s, and {ALL_TO_ALL:.0%} of the links (assumed, as by openm6 plan)",
    )
    return Links(
        cluster.dense_rate,
        cluster.expert_rate,
        cluster.peer_link,
        cluster.network,
        cluster.per_node,
        sources,
    )


def model_step(config: BackboneConfig, ranks: int, links: Links, tokens: int = 4096) -> dict[str, Any]:
    """Seconds of a step in which every rank has `tokens` tokens, by part, and which of them binds.

    Experts are dealt out to all ranks, what is dense is cut over them. Rows and answers travel forwards and backwards
    in two bytes a number; overlapped with computing the longer of the two counts, else their sum.
    """
    count = count_parameters(config)
    dense = count.total - _expert_parameters(config)
    compute = 6 * tokens * (dense / links.dense + (count.active - dense) / links.experts)
    parts = {
        "compute": compute,
        "exchange": _exchange(config, ranks, links, tokens),
        "dense weights": _dense_weights(dense, ranks, links),
    }
    step = max(compute, parts["exchange"] + parts["dense weights"])
    return {
        "gpus": ranks,
        "parameters_per_gpu": count.total / ranks,
        "seconds": parts,
        "seconds_per_step_overlapped": step,
        "seconds_per_step_in_turn": sum(parts.values()),
        "tokens_per_second_overlapped": tokens * ranks / step,
        "binds": max(parts, key=lambda name: parts[name]),
    }


def _exchange(config: BackboneConfig, ranks: int, links: Links, tokens: int) -> float:
    """Seconds for rows there and answers home, forwards and backwards."""
    experts = config.experts
    if experts is None:
        return 0.0
    layers = sum(config.has_experts(layer) for layer in range(config.num_layers))
    rows = tokens * experts.choices * (experts.capacity or 1.0)
    sent = 4 * layers * rows * config.width * 2
    machine = min(links.gpus_a_machine, ranks)
    inside, away = (machine - 1) / ranks, (ranks - machine) / ranks
    return sent * (inside / links.inside + away / links.between)


def _dense_weights(dense: int, ranks: int, links: Links) -> float:
    """Seconds to gather them forwards and backwards in two bytes, and to sum their gradients in four."""
    slowest = links.inside if ranks <= links.gpus_a_machine else links.between
    return dense * (2 + 2 + 4) * (1 - 1 / ranks) / slowest


def _expert_parameters(config: BackboneConfig) -> int:
    experts = config.experts
    if experts is None:
        return 0
    matrices = 3 if experts.ffn == "swiglu" else 2
    layers = len({config.weight_sets[n] for n in range(config.num_layers) if config.has_experts(n)})
    return layers * experts.num_experts * matrices * config.width * experts.hidden


LENGTH, WARMUP = 256, 2
SMALL = BackboneConfig(
    width=192, num_layers=4, num_heads=3, num_kv_heads=1, head_dim=64,
    experts=ExpertsConfig(hidden=192, num_experts=8, top_k=2),
)  # fmt: skip


def bench_scaling(
    processes: Annotated[str, typer.Option("--processes", metavar="1,2,4", help="How many.")] = "1,2,4",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of a step, of all processes.")] = 8,
    steps: Steps = 8,
    of: Of = "m6-10t",
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="KIND", help="Of the model's GPUs, as for plan.")
    ] = "h100-80gb",
    seconds: Seconds = 150.0,
    json_path: Json = None,
) -> None:
    """A step on 1, 2 and more processes here, measured, and on up to 512 GPUs, modelled.

    \b
    Example: python -m benchmarks scaling --json scaling.json
    """
    counts = parse_counts(processes)
    assert SMALL.experts is not None
    num_experts = SMALL.experts.num_experts
    if wrong := [size for size in counts if rows % size or num_experts % size]:
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
        for row in _measured(counts, rows, steps, report.deadline):
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
