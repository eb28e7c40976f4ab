"""`openm6 bench scaling`: a step on 1, 2 and more processes of this machine, and a model of 1 to 512 GPUs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openm6.base.errors import ConfigError
from openm6.bench.measure import Deadline, device_name, emit
from openm6.bench.ranks import on_ranks
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig, count_parameters
from openm6.models.presets import preset
from openm6.nn.config import ExpertsConfig
from openm6.ops.sequence import causal_layout
from openm6.parallel.config import MeshShape
from openm6.parallel.processes import ProcessRanks

LENGTH, WARMUP = 256, 2
SMALL = BackboneConfig(
    width=192, num_layers=4, num_heads=3, num_kv_heads=1, head_dim=64,
    experts=ExpertsConfig(hidden=192, num_experts=8, top_k=2),
)  # fmt: skip


@dataclass(frozen=True)
class Links:
    """Speeds that the model of many GPUs assumes, a GPU: products, and bytes sent within a machine and between them."""

    tflops: float = 400.0  # reached, in bf16
    inside_gbps: float = 300.0  # NVLink
    between_gbps: float = 40.0  # one 400 Gbit/s adapter a GPU, at four fifths
    gpus_a_machine: int = 8


def bench_scaling(
    processes: tuple[int, ...] = (1, 2, 4),
    rows: int = 8,
    steps: int = 8,
    of: str = "m6-10t",
    links: Links | None = None,
    seconds: float = 150.0,
    json_path: Path | None = None,
) -> None:
    """Measures and models, prints one JSON object and writes it to `json_path`.

    Raises:
        ConfigError: rows that the processes cannot share evenly.
    """
    assert SMALL.experts is not None
    num_experts = SMALL.experts.num_experts
    if wrong := [size for size in processes if rows % size or num_experts % size]:
        raise ConfigError(
            f"{rows} rows and {num_experts} experts cannot be shared by {wrong[0]} processes: choose divisors of both"
        )
    deadline = Deadline(seconds)
    measured = []
    for size in processes:
        for way in ("data", "experts") if size > 1 else ("data",):
            for scaling, rows_each in (("strong", rows // size), ("weak", rows // processes[-1])):
                if deadline.passed:
                    break
                times = on_ranks(size, time_steps, way, rows_each, steps)
                seconds_per_step = max(times)
                tokens = rows_each * size * LENGTH
                measured.append(
                    {
                        "processes": size,
                        "way": way,
                        "scaling": scaling,
                        "rows_each": rows_each,
                        "seconds_per_step": seconds_per_step,
                        "tokens_per_second": tokens / seconds_per_step,
                    }
                )
    links = links or Links()
    emit(
        {
            "measured": measured,
            "device": f"{device_name(torch.device('cpu'))}; one thread a process",
            "modelled": [model_step(preset(of).backbone, size, links) for size in (1, 8, 16, 64, 128, 512)],
            "of": of,
            "assumed": links.__dict__,
        },
        json_path,
    )


def parse_counts(words: str) -> tuple[int, ...]:
    """`1,2,4` as numbers.

    Raises:
        ConfigError: something else.
    """
    parts = [word.strip() for word in words.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--processes {words} must be numbers of processes, such as 1,2,4")
    return tuple(int(part) for part in parts)


def time_steps(way: str, rows: int, steps: int) -> float:
    """The median seconds of a forward, backward and update on this rank's rows."""
    ranks = ProcessRanks(torch.device("cpu"), 120)
    torch.manual_seed(0)
    model = Backbone(SMALL)
    if way == "experts":
        ranks.place(model, MeshShape(1, 1, ranks.size))
    model.exchange = ranks.exchange(1)
    groups = ranks.groups([{"params": list(model.parameters())}])
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    x, layout = torch.randn(rows, LENGTH, SMALL.width), causal_layout(rows, LENGTH)
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


def model_step(config: BackboneConfig, ranks: int, links: Links, tokens: int = 4096) -> dict[str, Any]:
    """Seconds of a step in which every rank has `tokens` tokens, by part, and which of them binds.

    Experts are dealt out to all ranks, what is dense is cut over them. Rows and answers travel forwards and backwards
    in two bytes a number; overlapped with computing the longer of the two counts, else their sum.
    """
    count, experts = count_parameters(config), config.experts
    layers = sum(config.has_experts(layer) for layer in range(config.num_layers))
    rows = tokens * experts.choices * (experts.capacity or 1.0) if experts else 0.0
    compute = 6 * count.active * tokens / (links.tflops * 1e12)
    machine = min(links.gpus_a_machine, ranks)
    sent = 4 * layers * rows * config.width * 2  # rows there, answers home, forwards and backwards
    stays = 1 / ranks
    inside, away = (machine - 1) / ranks, (ranks - machine) / ranks
    exchange = sent * (inside / (links.inside_gbps * 1e9) + away / (links.between_gbps * 1e9))
    dense = count.total - (_expert_parameters(config) if experts else 0)
    slowest = links.inside_gbps if ranks <= links.gpus_a_machine else links.between_gbps
    # Gathered forwards and backwards in two bytes, gradients summed in four.
    gather = dense * (2 + 2 + 4) * (1 - stays) / (slowest * 1e9)
    parts = {"compute": compute, "exchange": exchange, "dense weights": gather}
    step = max(compute, exchange + gather)
    return {
        "gpus": ranks,
        "parameters_per_gpu": (count.total - dense) / ranks + dense / ranks,
        "seconds": parts,
        "seconds_per_step_overlapped": step,
        "seconds_per_step_in_turn": sum(parts.values()),
        "tokens_per_second_overlapped": tokens * ranks / step,
        "binds": max(parts, key=lambda name: parts[name]),
    }


def _expert_parameters(config: BackboneConfig) -> int:
    experts = config.experts
    assert experts is not None
    matrices = 3 if experts.ffn == "swiglu" else 2
    layers = len({config.weight_sets[n] for n in range(config.num_layers) if config.has_experts(n)})
    return layers * experts.num_experts * matrices * config.width * experts.hidden
