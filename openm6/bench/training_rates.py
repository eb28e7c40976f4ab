"""How fast whole parts of a model train on this machine: as many processes at once as a run on its cores has."""

# Letters: R rows, S tokens of a row, T = R·S, D width, F hidden, V vocabulary, E experts

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.models.backbone import Backbone, choose_mask
from openm6.models.config import BackboneConfig
from openm6.nn.block import Block, Context, LayerParts
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.exchange import LocalExchange
from openm6.ops.rotary import rotary_table
from openm6.ops.sequence import Layout
from openm6.optim.config import OptimizerConfig
from openm6.optim.registry import OPTIMIZERS, build_optimizer
from openm6.parallel.crew import Crew, can_fork, usable_cores
from openm6.plan.work import PASSES, attention_operations

ROWS, LENGTH, PIECE = 1, 512, 64  # of one process, and the tokens of one example
WIDTHS = (128, 256, 512)
SECONDS = 0.25  # for each part
UPDATED = 2_000_000  # parameters of the update that is timed
Point = tuple[
    str, float, float
]  # part, weights of its network (parameters, for an update), operations a second


def measure_parts() -> tuple[list[Point], int]:
    """Points of all parts, with the rates of all processes together, and how many processes there were."""
    if not can_fork():
        return _points(), 1
    workers = usable_cores()
    crew = Crew([_serve for _ in range(workers)])
    try:
        found = crew.gather()
    finally:
        crew.close()
    return [
        (part, size, sum(points[number][2] for points in found))
        for number, (part, size, _) in enumerate(found[0])
    ], workers


def _serve(pipe: Connection) -> None:
    pipe.send(_points())
    pipe.recv()  # until the crew is closed


def _points() -> list[Point]:
    points: list[Point] = []
    for width in WIDTHS:
        for ffn in ("dense", "experts"):
            config = _config(width, ffn)
            points.append(_part(config, ffn))
        points.append(_attention(_config(width, "dense")))
        points.append(_head(width))
    return points + [_update(name) for name in OPTIMIZERS]


def _config(width: int, kind: str) -> BackboneConfig:
    hidden = width * 3 // 2
    return BackboneConfig(
        width=width, num_layers=1, num_heads=width // 64, num_kv_heads=max(1, width // 128), head_dim=64,
        dense=DenseConfig(hidden=hidden) if kind == "dense" else None,
        experts=ExpertsConfig(hidden=hidden, num_experts=8, top_k=2) if kind == "experts" else None,
    )  # fmt: skip


def example_layout(rows: int = ROWS, length: int = LENGTH) -> Layout:
    """Packed rows of examples of 64 tokens, half of each read and half wanted one after the other."""
    places = torch.arange(length).expand(rows, length)
    sample = (places // PIECE).to(torch.int32)
    order = (places % PIECE - PIECE // 2 + 1).clamp(min=0).to(torch.int32)
    positions = (places % PIECE).to(torch.int32)[..., None].expand(-1, -1, 3)
    return Layout(sample, order, torch.zeros_like(sample), positions)


def block_of(config: BackboneConfig) -> tuple[Block, LayerParts, Context]:
    """The only layer of a backbone, and what its forward pass needs."""
    backbone, layout = Backbone(config), example_layout()
    x = torch.zeros(layout.batch, layout.length, config.width)
    context = Context(
        rotary=rotary_table(layout.positions, config.rope_theta, config.sections),
        mask=choose_mask(layout, None, x),
        valid=layout.valid,
        cache=None,
        exchange=LocalExchange(),
    )
    block, parts = backbone.sets[0], backbone.layers[0]
    assert isinstance(block, Block) and isinstance(parts, LayerParts)
    return block, parts, context


def _attention(config: BackboneConfig) -> Point:
    block, parts, context = block_of(config)

    def forward(x: Tensor) -> Tensor:
        normal = parts.attention_norm(x)
        return x + block.attention(normal, parts.head_norms, context.rotary, context.mask, None, 0)

    weights = config.width * 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    operations = PASSES * (2 * weights + attention_operations(config, PIECE * 5 / 8))
    return "attention", weights, operations * ROWS * LENGTH / _seconds(forward, config.width)


def _part(config: BackboneConfig, kind: str) -> Point:
    block, parts, context = block_of(config)
    network = 3 * config.width * config.feed_forward(0).hidden

    def forward(x: Tensor) -> Tensor:
        normal = parts.feed_forward_norm(x)
        if kind == "dense":
            assert isinstance(block.feed_forward, nn.Module)
            return x + block.feed_forward(normal)
        y, load = block.feed_forward(normal, parts.router, context.valid, context.exchange, 0)
        return x + y + load.side_loss

    rows = ROWS * LENGTH * (2 if kind == "experts" else 1)
    return kind, network, 2 * PASSES * network * rows / _seconds(forward, config.width)


def _head(width: int) -> Point:
    vocabulary, learned = 2048, ROWS * LENGTH // 4
    weight = (
        torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    )  # as small as in a model: no denormals
    labels = torch.randint(0, vocabulary, (learned,))

    def forward(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x[0, :learned], weight), labels)

    return "head", vocabulary * width, 2 * PASSES * vocabulary * width * learned / _seconds(forward, width)


def _update(name: str) -> Point:
    """Sum of two processes' gradients, norm, and the optimizer's step; as parameters a second."""
    side = int((UPDATED / 4) ** 0.5)
    matrices = [nn.Parameter(torch.randn(side, side) * 0.02) for _ in range(4)]
    groups = [{"params": matrices, "muon": True}]
    optimizer = build_optimizer(groups, OptimizerConfig(name=name))
    gradients = [torch.randn_like(matrix) * 0.01 for matrix in matrices]
    seen = [torch.empty_like(matrix) for matrix in matrices]

    def step() -> None:
        torch._foreach_copy_(seen, gradients)
        for matrix, gradient in zip(matrices, seen, strict=True):
            matrix.grad = gradient.add(gradient)
            torch.linalg.vector_norm(matrix.grad)
        optimizer.step()

    return f"update {name}", float(UPDATED), 4 * side**2 / _repeat(step)


def _seconds(forward: Callable[[Tensor], Tensor], width: int) -> float:
    x = torch.randn(ROWS, LENGTH, width, requires_grad=True)
    return _repeat(lambda: forward(x).sum().backward())


def _repeat(call: Callable[[], object]) -> float:
    """Median seconds of as many calls as fit the time; two more beforehand warm up."""
    for _ in range(2):
        call()
    times: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]
