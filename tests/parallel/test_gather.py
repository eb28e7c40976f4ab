"""Two ranks that share their pairs find the loss and the gradients of one rank that holds them all."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from openm6.modalities.pool import PoolAdapter, PoolConfig
from openm6.nn.gather import LocalGather
from openm6.parallel.gather import RankGather, open_gather

PARTS = ((0, 3), (3, 4))  # pairs of each rank: unlike numbers


def pool() -> PoolAdapter:
    torch.manual_seed(3)
    return PoolAdapter(8, PoolConfig(size=4))


def pairs() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of four pairs, two of which say the same."""
    torch.manual_seed(4)
    key = torch.tensor([5, 6, 5, 7]).repeat_interleave(2)
    return torch.randn(8, 8), {"key": key, "space": torch.ones_like(key)}


def rank_loss(own: int, part: tuple[int, int], folder: str, port: int) -> None:
    """One of two processes: its share of the loss, its gradients, and a turn without pairs."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=own)
    adapter, (hidden, arrays) = pool(), pairs()
    adapter.gather = open_gather()
    assert isinstance(adapter.gather, RankGather)
    rows = slice(2 * part[0], 2 * part[1])
    mine = hidden[rows].clone().requires_grad_(True)
    loss = adapter.nll(mine, {name: array[rows] for name, array in arrays.items()}).sum()
    loss.backward()
    weight = adapter.project.weight.grad
    dist.all_reduce(weight)
    both = adapter.none() if own else adapter.nll(hidden[:2], {n: a[:2] for n, a in arrays.items()}).sum()
    torch.save([loss.detach(), mine.grad, weight, both.detach()], Path(folder) / f"{own}.pt")
    dist.destroy_process_group()


def _worker(own: int, folder: str, port: int) -> None:
    rank_loss(own, PARTS[own], folder, port)


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(_worker, (str(tmp_path), port), nprocs=2)
    found = [torch.load(tmp_path / f"{own}.pt", weights_only=True) for own in range(2)]
    adapter, (hidden, arrays) = pool(), pairs()
    hidden.requires_grad_(True)
    whole = adapter.nll(hidden, arrays).sum()
    whole.backward()
    assert float(found[0][0] + found[1][0]) == pytest.approx(float(whole), rel=1e-5)
    assert torch.allclose(torch.cat([found[0][1], found[1][1]]), hidden.grad, atol=1e-6)
    for _, _, weight, _ in found:
        assert torch.allclose(weight, adapter.project.weight.grad, atol=1e-6)
    assert float(found[1][3]) == 0.0


def test_alone_nothing_travels() -> None:
    gather = open_gather()
    assert isinstance(gather, LocalGather)
    rows = torch.randn(3, 2)
    assert gather.rows(rows) == (rows, 0)
