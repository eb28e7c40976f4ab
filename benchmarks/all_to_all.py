"""Benchmark `all-to-all`: expert parallelism, compared with one process that holds all experts."""

# Shapes: T tokens of a rank, D width

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from torch import Tensor

from benchmarks.harness import Json, Report
from benchmarks.ranks import on_ranks
from openm6.distributed.collectives import AllToAllDispatcher
from openm6.distributed.fsdp import keep_experts
from openm6.nn.config import ExpertsConfig
from openm6.nn.moe import Experts, MoE, Router, TokenDispatcher

Array = np.ndarray[Any, Any]
WIDTH, HIDDEN, TOKENS = 64, 96, 24
TOLERANCE = 1e-5
SECONDS = 300.0


@dataclass(frozen=True)
class Found:
    """Outputs and gradients of a rank: its tokens, its experts, its part of the sum for the router."""

    answers: Array  # T D
    tokens: Array  # T D
    up: Array
    down: Array
    router: Array


def bench_all_to_all(
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="Processes.")] = 8,
    parts: Annotated[int, typer.Option("--parts", min=1, help="Chunks of the all-to-all.")] = 2,
    json_path: Json = None,
) -> None:
    """Compare expert-parallel ranks with one process that holds all experts.

    \b
    Example: python -m benchmarks all-to-all --ranks 16
    """
    with Report(json_path, SECONDS) as report:
        report.update({"ranks": ranks, "experts": 4 * ranks, "parts": parts, "equal_to": TOLERANCE})
        report["tokens_of_ranks"] = [_tokens(rank).shape[1] for rank in range(ranks)]
        found = on_ranks(ranks, work_of_rank, parts)
        experts, router = _layer(ranks)
        alone = [_learn(experts, router, TokenDispatcher(), rank) for rank in range(ranks)]
        differences = _differences(found, alone)
        report["max_relative_difference"] = differences
        report["equal"] = all(value <= TOLERANCE for value in differences.values())


def _differences(found: list[Found], alone: list[Found]) -> dict[str, float]:
    """Return the differences between the ranks and one process that computes all of them in turn."""
    return {
        "answers": _largest([(a.answers, b.answers) for a, b in zip(found, alone, strict=True)]),
        "token_gradients": _largest([(a.tokens, b.tokens) for a, b in zip(found, alone, strict=True)]),
        "expert_gradients": _largest(
            [
                (np.concatenate([part.up for part in found]), alone[-1].up),
                (np.concatenate([part.down for part in found]), alone[-1].down),
            ]
        ),
        "router_gradients": _largest([(np.sum([part.router for part in found], axis=0), alone[-1].router)]),
    }


def work_of_rank(parts: int) -> Found:
    """Compute the part of one rank, in its process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    experts, router = _layer(size)
    keep_experts([experts], rank, size)
    return _learn(experts, router, AllToAllDispatcher(whole_group(), parts), rank)


def whole_group() -> dist.ProcessGroup:
    """Return the process group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group


def _layer(ranks: int) -> tuple[Experts, Router]:
    """Return a layer of four experts per rank, in as many prototypes as ranks."""
    torch.manual_seed(0)
    config = ExpertsConfig(
        intermediate_size=HIDDEN,
        num_experts=4 * ranks,
        num_prototypes=ranks,
        hidden_act="gelu",
        balance="none",
    )
    experts, router = Experts(WIDTH, config), Router(WIDTH, config)
    experts.reset_parameters(0.1, 0.1)
    router.reset_parameters(0.1)
    return experts, router


def _tokens(rank: int) -> Tensor:
    """Return tokens, a different number on each rank.  # 1 T D"""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(1, 1 + (7 * rank) % TOKENS, WIDTH, generator=generator)


def _learn(experts: Experts, router: Router, dispatcher: TokenDispatcher, rank: int) -> Found:
    x = _tokens(rank).requires_grad_()
    y, _ = MoE(router, experts, None)(x, torch.ones(x.shape[:2], dtype=torch.bool), dispatcher, 0)
    y.square().sum().backward()
    gradients = [_gradient(tensor) for tensor in (x, experts.up, experts.down, router.weight)]
    return Found(y.detach().numpy(), *gradients)


def _gradient(tensor: Tensor) -> Array:
    assert tensor.grad is not None
    # An array, because a tensor would be sent by a file of the process that ends.
    return tensor.grad.clone().numpy()


def _largest(pairs: list[tuple[Array, Array]]) -> float:
    """Return the largest difference, relative to the largest value."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
