"""Benchmark `simulate`: one rank of many in one process: bytes that it stores and sends.

With torch's fake process group and tensors without contents, a step of ten trillion parameters runs through the code of
training: sharding, all-to-all, backward pass, update. Shapes, bytes and collectives are exact; values are not used.
"""

# Shapes: T tokens of a rank, D width

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Json, Report
from benchmarks.ranks import NumRanks, Of
from openm6.core.errors import ConfigError
from openm6.distributed.collectives import AllToAllDispatcher
from openm6.distributed.config import MeshShape
from openm6.distributed.fsdp import Layout, expert_parameters, local, open_layout, shard
from openm6.distributed.processes import apart
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig, count_parameters
from openm6.models.presets import preset
from openm6.nn.block import Context

SECONDS = 420.0
CPU = torch.device("cpu")
DTYPE = torch.bfloat16
KINDS = {
    "alltoall": "all_to_all",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "broadcast": "broadcast",
}


class CollectiveCount(TorchDispatchMode):
    """Count collectives by kind, and the bytes that this rank contributes to each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, values: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            kind = next((word for part, word in KINDS.items() if part in name), name)
            # Those with two buffers name the one to fill first.
            brought = values[1] if kind in ("all_to_all", "all_gather", "reduce_scatter") else values[0]
            self.calls[kind] += 1
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in _tensors(brought))
        return function(*values, **(named or {}))


class Stack(nn.Module):
    """The blocks of a backbone under a causal mask: everything in a step that depends on the rank."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for layer, block in enumerate(self.backbone.blocks):
            x, _ = block(x, context, layer)
        return self.backbone.final_norm(x)


def bench_simulate(
    of: Of = "m6-10t",
    ranks: NumRanks = 512,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Index of the rank.")] = 0,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Ranks over which experts are sharded.")] = 1,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Number of layers, for a faster run.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows per rank.")] = 4,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens per row.")] = 1024,
    json_path: Json = None,
) -> None:
    """Simulate a step of one rank of many without its memory: stored bytes, collectives and their bytes.

    \b
    Example: python -m benchmarks simulate --of m6-10t --ranks 512 --json simulation.json
    """
    config = preset(of).backbone
    config = config.model_copy(update={"num_layers": layers}) if layers else config
    with Report(json_path, SECONDS) as report:
        report["of"] = of
        report.update(simulate(config, ranks, rank, shards, rows, length))


def simulate(config: BackboneConfig, ranks: int, rank: int, shards: int, rows: int, length: int) -> dict[str, Any]:
    """Return bytes stored and exchanged by rank `rank` of `ranks`, with `shards` × expert-parallel ranks."""
    experts = config.experts
    if experts is None or ranks % shards or experts.num_experts % (ranks // shards):
        raise ConfigError(
            f"{ranks} ranks in {shards} shards cannot share the model's experts evenly: change --ranks or --shards"
        )
    began = time.perf_counter()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        layout = open_layout(MeshShape(1, shards, ranks // shards), CPU)
        figures = _step(config, layout, rows, length)
    finally:
        dist.destroy_process_group()
    total = count_parameters(config).total
    return {
        "ranks": ranks,
        "rank": rank,
        "mesh": {"dp_replicate": 1, "dp_shard": shards, "ep": ranks // shards},
        "parameters": total,
        "layers": config.num_layers,
        "tokens_per_rank": rows * length,
        **figures,
        "expected_exchange_bytes": expected_exchange_bytes(config, ranks // shards, rows * length),
        "seconds_of_rehearsal": time.perf_counter() - began,
    }


def expected_exchange_bytes(config: BackboneConfig, columns: int, tokens: int) -> int:
    """Return the bytes that a rank sends per step by formula: dispatch and combine, forward and backward."""
    experts = config.experts
    assert experts is not None
    layers = sum(config.has_experts(layer) for layer in range(config.num_layers))
    rows = experts.experts_per_token * tokens
    counts = experts.num_experts * 8  # numbers of rows, if they are not known beforehand
    if experts.capacity_factor is not None:
        per_expert = experts.experts_per_token * tokens / experts.num_experts * experts.capacity_factor
        rows, counts = experts.num_experts * max(1, -int(-per_expert // 1)), 0
    return layers * (4 * rows * config.hidden_size * DTYPE.itemsize + counts)


def _step(config: BackboneConfig, layout: Layout, rows: int, length: int) -> dict[str, Any]:
    counter = CollectiveCount()
    with torch.device("meta"):
        stack = Stack(Backbone(config))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _empty(stack)
        shard(stack, layout)
        groups = apart([{"params": list(stack.parameters())}])
        optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=True)
        x = torch.empty(rows, length, config.hidden_size, dtype=DTYPE)
        with counter:
            stack(x, _context(config, layout, rows, length)).sum().backward()
            gradients = sum(_bytes(p.grad) for p in stack.parameters() if p.grad is not None)
            optimizer.step()
        slots = sum(_bytes(t) for state in optimizer.state.values() for t in state.values())
    held = sum(local(parameter).numel() for parameter in stack.parameters())
    dealt = sum(local(parameter).numel() for _, parameter in expert_parameters(stack))
    return {
        "parameters_per_rank": held,
        "expert_parameters_per_rank": dealt,
        "bytes_per_rank": {"weights": DTYPE.itemsize * held, "gradients": gradients, "moments": slots},
        "collectives": {
            kind: {"calls": calls, "bytes": counter.bytes[kind]} for kind, calls in sorted(counter.calls.items())
        },
    }


def _empty(model: nn.Module) -> None:
    """Replace tensors on `meta`, which FSDP cannot communicate, by fake ones."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=DTYPE)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape))


def _context(config: BackboneConfig, layout: Layout, rows: int, length: int) -> Context:
    angle = torch.empty(rows, length, 1, config.head_dim // 2)
    mask = torch.zeros(1, 1, length, length, dtype=DTYPE)
    valid = torch.ones(rows, length, dtype=torch.bool)
    exchange = AllToAllDispatcher(layout.mesh["ep"].get_group())
    return Context(rotary=(angle, angle), mask=mask, valid=valid, cache=None, dispatcher=exchange)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _bytes(tensor: Tensor) -> int:
    part = local(tensor)
    return part.numel() * part.element_size()
