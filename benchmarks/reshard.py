"""Benchmark `reshard`: a checkpoint written by several ranks and read by others, and the pause of training."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.harness import Json, Report, Seconds, device_name
from benchmarks.ranks import on_ranks, parse_counts
from openm6.checkpoint.folder import step_folder
from openm6.checkpoint.load import load_model, load_optimizer
from openm6.checkpoint.optimizer import optimizer_state_dict
from openm6.checkpoint.save import Snapshot
from openm6.checkpoint.sharded import ShardedSaver
from openm6.core.device import free_host_bytes
from openm6.core.errors import ConfigError
from openm6.core.seeds import derive_seed
from openm6.distributed.config import MeshShape
from openm6.distributed.fsdp import Layout, local, open_layout, shard
from openm6.distributed.processes import apart
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig, count_parameters
from openm6.nn.config import ExpertsConfig
from openm6.optim.adamw import AdamW

CPU = torch.device("cpu")
GIB, GOAL_SECONDS, STEP = 2**30, 60.0, 1
BYTES = 4 + 2 + 2  # of a parameter in a checkpoint: weights in fp32, two moments in bf16
SIZES = {
    "1b": BackboneConfig(
        hidden_size=1024, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=64,
        experts=ExpertsConfig(intermediate_size=1280, num_experts=32, top_k=2),
    ),
    "small": BackboneConfig(
        hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32,
        experts=ExpertsConfig(intermediate_size=64, num_experts=8, top_k=2),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """Results of a rank after saving."""

    copied: float  # seconds of a plain copy of all its tensors on the host
    stood_still: float  # seconds until training could go on
    seconds: float  # until the checkpoint was whole
    peak: int  # bytes
    checksum: float


@dataclass(frozen=True)
class Read:
    """Results of a rank after loading."""

    seconds: float
    peak: int
    checksum: float


def bench_reshard(
    size: Annotated[str, typer.Option("--size", metavar="1b|small", help="Size of the model.")] = "1b",
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="Processes that write.")] = 4,
    to: Annotated[str, typer.Option("--to", metavar="2,1", help="Processes that read, in turn.")] = "2,1",
    seconds: Seconds = 420.0,
    json_path: Json = None,
) -> None:
    """Write a checkpoint with several processes and read it with others: time, memory, pause of training.

    \b
    Example: python -m benchmarks reshard --ranks 4 --to 2,1 --json reshard.json
    """
    readers = parse_counts(to)
    config = _checked(size, ranks, readers)
    read: list[dict[str, Any]] = []
    with Report(json_path, seconds) as report, tempfile.TemporaryDirectory() as folder:
        report["parameters"] = count_parameters(config).total
        written = on_ranks(ranks, write_part, size, folder, seconds=seconds)
        on_disk = sum(path.stat().st_size for path in step_folder(Path(folder), STEP).iterdir())
        report.update(
            {
                "checkpoint_gib": on_disk / GIB,
                "written": {
                    "ranks": ranks,
                    "host_copy_seconds": max(one.copied for one in written),
                    "training_stands_still_seconds": max(one.stood_still for one in written),
                    "seconds": max(one.seconds for one in written),
                    "peak_gib": sum(one.peak for one in written) / GIB,
                },
                "read": read,
                "goal_seconds": GOAL_SECONDS,
                "device": f"{device_name(CPU)}; one thread a process",
            }
        )
        report.later("reached", lambda: _reached(read, len(readers)))
        for count in readers:
            if report.deadline.passed:
                break
            found = on_ranks(count, read_part, size, folder, seconds=max(60.0, report.deadline.left))
            read.append(_reading(count, found, written))


def _reached(read: list[dict[str, Any]], expected: int) -> bool:
    return len(read) == expected and all(one["seconds"] <= GOAL_SECONDS for one in read)


def _checked(size: str, ranks: int, to: tuple[int, ...]) -> BackboneConfig:
    if size not in SIZES:
        raise ConfigError(f"--size {size} must be one of {', '.join(SIZES)}")
    config = SIZES[size]
    assert config.experts is not None
    if ranks < 2:
        raise ConfigError("--ranks must be at least 2: one process cuts nothing")
    if wrong := [count for count in (ranks, *to) if config.experts.num_experts % count or count < 1]:
        raise ConfigError(
            f"{wrong[0]} ranks cannot share {config.experts.num_experts} experts evenly: choose a divisor"
        )
    needed = BYTES * count_parameters(config).total
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if 1.2 * needed > free:
        raise ConfigError(
            f"the checkpoint takes {needed / GIB:.1f} GiB and {tempfile.gettempdir()} has {free / GIB:.1f}: "
            "free some space, or set TMPDIR to another disk"
        )
    if 2.2 * needed > free_host_bytes():  # the tensors and their copy
        raise ConfigError(
            f"{2.2 * needed / GIB:.1f} GiB of memory are needed and {free_host_bytes() / GIB:.1f} are free: "
            "choose --size small"
        )
    return config


def _reading(count: int, found: list[Read], written: list[Written]) -> dict[str, Any]:
    before, after = (one[0].checksum for one in (written, found))
    return {
        "ranks": count,
        "seconds": max(one.seconds for one in found),
        "peak_gib": sum(one.peak for one in found) / GIB,
        "equal": abs(after - before) <= 1e-9 * abs(before),
    }


def mesh_shape(ranks: int) -> MeshShape:
    """Return a mesh with experts distributed over half of the ranks and sharded over two, if possible."""
    return MeshShape(1, 1, ranks) if ranks < 4 or ranks % 2 else MeshShape(1, 2, ranks // 2)


def write_part(size: str, folder: str) -> Written:
    """Fill the part of one rank and save it."""
    model, optimizer, layout = build_part(size)
    assert layout is not None
    for number, (name, tensor) in enumerate(_tensors(model, optimizer)):
        generator = torch.Generator().manual_seed(derive_seed(number, name, dist.get_rank()))
        local(tensor).detach().uniform_(0.5, 1.5, generator=generator)
    checksum = _checksum(model, optimizer, layout)
    moments = optimizer_state_dict(optimizer, model)
    saver = ShardedSaver(layout)
    dist.barrier()
    began = time.perf_counter()
    copies = [local(tensor).detach().clone() for _, tensor in _tensors(model, optimizer)]
    copied = time.perf_counter() - began
    del copies
    dist.barrier()
    began = time.perf_counter()
    saver.begin(Snapshot(STEP, model, moments, {}), Path(folder), keep=1)
    stood_still = time.perf_counter() - began
    saver.finish()
    return Written(copied, stood_still, time.perf_counter() - began, _peak(), checksum)


def read_part(size: str, folder: str) -> Read:
    """Load the part of one rank, or the whole model in one process."""
    model, optimizer, layout = build_part(size)
    checkpoint = step_folder(Path(folder), STEP)
    dist.barrier()
    began = time.perf_counter()
    load_model(checkpoint, model, layout)
    load_optimizer(checkpoint, optimizer, model, layout)
    dist.barrier()
    seconds = time.perf_counter() - began
    return Read(seconds, _peak(), _checksum(model, optimizer, layout))


def build_part(size: str) -> tuple[Backbone, torch.optim.Optimizer, Layout | None]:
    """Return the part of this rank, with storage for values and moments; no process holds the whole model."""
    ranks = dist.get_world_size()
    layout = open_layout(mesh_shape(ranks), CPU) if ranks > 1 else None
    with torch.device("meta"):
        model = Backbone(SIZES[size])
        if layout is not None:
            shard(model, layout)
    model.to_empty(device="cpu")
    optimizer = AdamW(apart([{"params": list(model.parameters())}]), lr=1e-3, state_dtype=torch.bfloat16)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")
        }
    return model, optimizer, layout


def _tensors(model: Backbone, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from sorted(optimizer_state_dict(optimizer, model).items())


def _checksum(model: Backbone, optimizer: torch.optim.Optimizer, layout: Layout | None) -> float:
    """Return the sum of all values of all ranks; replicated ones count once."""
    total = torch.zeros((), dtype=torch.float64)
    rank = dist.get_rank()
    for _, tensor in _tensors(model, optimizer):
        parted = isinstance(tensor, DTensor) or tensor.ndim == 3  # sharded, or distributed experts
        if parted or rank == 0:
            total += local(tensor).detach().sum(dtype=torch.float64)
    if layout is not None:
        dist.all_reduce(total)
    return float(total)


def _peak() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
