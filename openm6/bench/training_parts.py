"""How fast whole parts of a model train on this machine, on real batches, with all cores at work as a run has them."""

# Letters: S tokens of a row, D width, n tokens of one kind, m of them learned

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from openm6.bench.fitting import Point
from openm6.bench.measure import Deadline
from openm6.modalities.batch import Batch, TokenGroup
from openm6.modalities.interface import Adapter
from openm6.modalities.text import TextAdapter
from openm6.models.backbone import Backbone, choose_mask
from openm6.models.config import BackboneConfig
from openm6.nn.block import Block, Context, LayerParts
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.exchange import LocalExchange
from openm6.ops.attention import PieceMask
from openm6.ops.rotary import rotary_table
from openm6.optim.config import OptimizerConfig
from openm6.optim.registry import OPTIMIZERS, build_optimizer
from openm6.optim.rules import Move, update_rule
from openm6.parallel.crew import Crew, can_fork, usable_cores
from openm6.parallel.record import RecordLayout
from openm6.plan.cost import adapter_causes, attention_causes, head_causes, network_causes, update_causes
from openm6.train.step import in_precision

HEAD = 64  # columns of a head
SHAPES = ((128, 1), (256, 2), (512, 2))  # D, key-value heads
NETWORKS: tuple[tuple[int, DenseConfig | ExpertsConfig], ...] = (
    (128, DenseConfig(hidden=512)),
    (256, DenseConfig(hidden=768, ffn="gelu")),
    (512, DenseConfig(hidden=1280)),
    (128, ExpertsConfig(hidden=192, num_experts=8, top_k=2)),
    (256, ExpertsConfig(hidden=320, num_experts=12, top_k=2)),
    (320, ExpertsConfig(hidden=128, num_experts=16, num_prototypes=4)),
    (512, ExpertsConfig(hidden=384, num_experts=8, top_k=2)),
)
ADAPTED = (128, 448)  # D of the adapters that are timed
SIDES = (250, 700)  # of the four square matrices whose update is timed
CALLS, SECONDS = 3, 0.12  # of a part, at least


@dataclass(frozen=True)
class Seats:
    """How the cores are shared: `processes` at once, each with `threads`."""

    processes: int
    threads: int


def seatings() -> dict[str, Seats]:
    """The two ways in which a run uses the cores of this machine; call it before the number of threads is changed."""
    return {"team": Seats(usable_cores() if can_fork() else 1, 1), "alone": Seats(1, torch.get_num_threads())}


def measure_parts(
    seats: Seats, batches: list[Batch], adapters: Callable[[int], dict[str, Adapter]], deadline: Deadline
) -> list[Point]:
    """Points of all parts: seconds in one process, the mean of those that work at the same time, in the precision
    that training chooses here.

    batches: what one process gets of a step, of few and many tokens, of all kinds and of text alone; adapters: new
    ones by width.
    """
    work = partial(_points, seats, batches, adapters, deadline)
    if seats.processes == 1:
        torch.set_num_threads(seats.threads)
        return list(work())
    crew = Crew([partial(_serve, work) for _ in range(seats.processes)])
    try:
        found = crew.gather()
    finally:
        crew.close()
    return [
        Point(same[0].part, same[0].causes, statistics.mean(point.taken for point in same))
        for same in zip(*found, strict=False)
    ]


def _serve(work: Callable[[], Iterator[Point]], pipe: Connection) -> None:
    pipe.send(list(work()))
    pipe.recv()  # until the crew is closed


def _points(
    seats: Seats, batches: list[Batch], adapters: Callable[[int], dict[str, Adapter]], deadline: Deadline
) -> Iterator[Point]:
    clock = time.thread_time if seats.threads == 1 else time.perf_counter
    repeat = partial(_repeat, clock=clock, deadline=deadline)
    with in_precision("auto", torch.device("cpu")):
        for batch in batches:
            for width, kv_heads in SHAPES:
                yield _attention(_config(width, kv_heads), batch, repeat)
            for width, part in NETWORKS:
                yield _network(width, part, batch, repeat)
            for width in ADAPTED:
                yield from _adapters(width, adapters(width), batch, repeat)
    for side in SIDES:
        for name in OPTIMIZERS:
            yield _update(name, side, seats.processes, repeat)
        if seats.processes == 1:
            for bytes_ in (16, 4, 2, 1):
                yield from _rule(bytes_, side, repeat)


Repeat = Callable[[Callable[[], object]], float]


def _repeat(call: Callable[[], object], clock: Callable[[], float], deadline: Deadline) -> float:
    """Median seconds of as many calls as fit the time; one beforehand warms up.

    Where each process has one thread its own clock counts: what others take of its core is not the part's.
    """
    call()
    times: list[float] = []
    until = time.perf_counter() + SECONDS
    while not times or (not deadline.passed and (len(times) < CALLS or time.perf_counter() < until)):
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times)


def _config(width: int, kv_heads: int = 1, part: DenseConfig | ExpertsConfig | None = None) -> BackboneConfig:
    sparse = part if isinstance(part, ExpertsConfig) else None
    dense = part if isinstance(part, DenseConfig) else None
    if part is None:
        dense = DenseConfig(hidden=64)
    return BackboneConfig(
        width=width, num_layers=1, num_heads=width // HEAD, num_kv_heads=kv_heads, head_dim=HEAD, dense=dense,
        experts=sparse,
    )  # fmt: skip


def block_of(config: BackboneConfig, batch: Batch) -> tuple[Block, LayerParts, Context]:
    """The only layer of a backbone, and what its forward pass needs of a batch."""
    backbone, layout = Backbone(config), batch.layout
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


def _attention(config: BackboneConfig, batch: Batch, repeat: Repeat) -> Point:
    block, parts, context = block_of(config, batch)
    mask = context.mask
    assert isinstance(mask, PieceMask)

    def forward(x: Tensor) -> Tensor:
        normal = parts.attention_norm(x)
        return x + block.attention(normal, parts.head_norms, context.rotary, mask, None, 0)

    pairs = sum((piece.stop - piece.start) * (piece.last - piece.first) for piece in mask.pieces)
    causes = attention_causes(config, batch.layout.example_id.numel(), pairs, len(mask.pieces))
    return Point("attention", causes, repeat(_both_ways(forward, batch, config.width)))


def _network(width: int, part: DenseConfig | ExpertsConfig, batch: Batch, repeat: Repeat) -> Point:
    block, parts, context = block_of(_config(width, part=part), batch)

    def forward(x: Tensor) -> Tensor:
        normal = parts.feed_forward_norm(x)
        if isinstance(part, DenseConfig):
            return x + block.feed_forward(normal)
        y, load = block.feed_forward(normal, parts.router, context.valid, context.exchange, 0)
        return x + y + load.side_loss

    causes = network_causes(width, part, batch.layout.example_id.numel())
    name = "dense" if isinstance(part, DenseConfig) else "experts"
    return Point(name, causes, repeat(_both_ways(forward, batch, width)))


def _both_ways(forward: Callable[[Tensor], Tensor], batch: Batch, width: int) -> Callable[[], object]:
    x = torch.randn(batch.layout.batch, batch.layout.length, width, requires_grad=True)
    slope = torch.randn_like(x)
    return lambda: forward(x).backward(slope)


def _adapters(width: int, adapters: dict[str, Adapter], batch: Batch, repeat: Repeat) -> Iterator[Point]:
    for name, kind in batch.kinds.items():
        adapter = adapters[name]
        causes = adapter_causes(width, len(kind.index))
        yield Point(f"read {name}", causes, repeat(partial(_read, adapter, kind, width)))
        chosen = kind.learned  # m
        if not len(chosen):
            continue
        hidden = torch.randn(len(chosen), width)
        call = partial(_learn, adapter, kind, chosen, hidden)
        if isinstance(adapter, TextAdapter):
            yield Point("head", head_causes(width, len(adapter.embedding.weight), len(chosen)), repeat(call))
        else:
            yield Point(f"learn {name}", adapter_causes(width, len(chosen)), repeat(call))


def _read(adapter: Adapter, kind: TokenGroup, width: int) -> None:
    vectors = adapter.embed(kind.arrays)  # n D
    if vectors.requires_grad:
        vectors.backward(torch.ones_like(vectors))
    adapter.zero_grad(set_to_none=True)


def _learn(adapter: Adapter, kind: TokenGroup, chosen: Tensor, hidden: Tensor) -> None:
    arrays = {key: array[chosen] for key, array in kind.arrays.items()}
    rows = hidden.detach().requires_grad_()
    total, _ = adapter.weighed_loss(rows, arrays, kind.weight[chosen])
    total.backward()
    adapter.zero_grad(set_to_none=True)


def _update(name: str, side: int, processes: int, repeat: Repeat) -> Point:
    """What one of the processes does of a step's end: hand on gradients, sum its own, their norm, move its weights."""
    matrices = [nn.Parameter(torch.randn(side, side) * 0.02) for _ in range(4)]
    optimizer = build_optimizer([{"params": matrices, "muon": True}], OptimizerConfig(name=name))
    found = [torch.randn_like(matrix) * 0.01 for matrix in matrices]
    handed = [torch.empty_like(matrix) for matrix in matrices]

    def step() -> None:
        own = [gradient.clone() for gradient in found]
        for _ in range(processes - 1):
            torch._foreach_copy_(handed, found)
            for gradient, other in zip(own, handed, strict=True):
                gradient.add_(other)
        for matrix, gradient in zip(matrices, own, strict=True):
            torch.linalg.vector_norm(gradient)
            matrix.grad = gradient.mul_(0.5)
        optimizer.step()

    return Point(f"update {name}", update_causes(processes * 4 * side**2), repeat(step))


def _rule(bytes_: int, side: int, repeat: Repeat) -> Iterator[Point]:
    """A streamed set's fetch for one use, and its move with the way home."""
    rule = update_rule(OptimizerConfig(bytes_per_parameter=bytes_))
    shapes = {f"matrix {number}": (side, side) for number in range(4)}
    layout = RecordLayout(shapes, rule)
    home, buffer = (torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(2))
    views = layout.views(buffer)
    for number, stored in enumerate(views.values()):
        rule.fill(stored, torch.randn(side, side) * 0.02, number)
    home.copy_(buffer)
    gradient = torch.randn(side, side) * 0.01
    move = Move(1e-3, 0.05, 7, torch.tensor(True))

    def fetch() -> None:
        buffer[: layout.read_bytes].copy_(home[: layout.read_bytes])
        for stored in views.values():
            rule.read(stored, torch.float32)

    def update() -> None:
        for stored in views.values():
            torch.linalg.vector_norm(gradient)
            rule.update(stored, gradient, move)
        home.copy_(buffer)

    causes = update_causes(4 * side**2)
    yield Point(f"fetch {bytes_}", causes, repeat(fetch))
    yield Point(f"rule {bytes_}", causes, repeat(update))
