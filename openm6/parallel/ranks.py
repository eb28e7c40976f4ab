"""The processes that train one model together, and the few things they tell one another outside of the layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from openm6.parallel.gradients import sum_gradients

Value = TypeVar("Value")


class Ranks:
    """One process alone, for which every sum is its own; the parent of several processes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes and speaks."""
        return self.rank == 0

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Each of a few plain numbers, summed over the ranks."""
        return list(numbers)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over the ranks, in place."""
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums gradients over the ranks; a parameter without one on some ranks counts as zero there."""

    def gather(self, value: Value) -> list[Value]:
        """The plain values of all ranks, on every rank."""
        return [value]

    def from_first(self, value: Value) -> Value:
        """Rank 0's plain value, on every rank."""
        return value

    def close(self) -> None:
        """Leaves the group; the other methods must not be called after it."""


class ProcessRanks(Ranks):
    """The processes that torchrun started, connected by NCCL on GPUs and by gloo elsewhere."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        if not dist.is_initialized():
            _open_group(device, timeout_seconds)
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def total(self, numbers: Sequence[float]) -> list[float]:
        # On the host, where the numbers are: a GPU would have to be waited for.
        tensor = torch.tensor(list(numbers), dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        sum_gradients(list(parameters))

    def gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Value) -> Value:
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def close(self) -> None:
        dist.destroy_process_group()


def _open_group(device: torch.device, timeout_seconds: float) -> None:
    gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if gpu else None,
    )


def launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether the launcher started this process again after a failure of any rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def own_device() -> torch.device:
    """The device of this process: a GPU for each process of a machine, where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def open_ranks(device: torch.device, timeout_seconds: float) -> Ranks:
    """The ranks of this run: this process alone, or those that the launcher started."""
    return ProcessRanks(device, timeout_seconds) if launched() else Ranks()
