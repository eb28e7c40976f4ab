"""Several processes that train one model: torch's process group as a `ProcessGroupContext`; sums of gradients.

`DistributedDataParallel` waits for a gradient of every parameter on every rank. Here a rank whose rows hold no
image has no gradient for the image adapter: it must take part all the same, and a parameter that no rank used
must stay without a gradient, as in one process, so that the optimizer leaves it alone.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from openm6.distributed import fsdp
from openm6.distributed.collectives import AllToAllDispatcher, CopiesDispatcher
from openm6.distributed.config import MeshShape
from openm6.distributed.failure import DONE, FailureWatchdog, open_store, wait_for
from openm6.distributed.process_group import LayerWeights, ProcessGroupContext
from openm6.nn.moe import TokenDispatcher
from openm6.optim.rules import Shape
from openm6.optim.sharding import ShardSpec

Value = TypeVar("Value")
BUCKET_BYTES = 25 * 2**20


class DistributedContext(ProcessGroupContext):
    """The processes that torchrun started, connected by NCCL on GPUs and by gloo on CPUs."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        self.timeout = timedelta(seconds=timeout_seconds)
        self._opened = not dist.is_initialized()
        if self._opened:
            gpu = device.type == "cuda"
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            dist.init_process_group(backend, timeout=self.timeout, device_id=device if gpu else None)
        self.device = device
        self.layout: fsdp.Layout | None = None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._later: list[tuple[Sequence[float], Callable[[list[float]], None]]] = []

    def all_reduce(self, numbers: Sequence[float]) -> list[float]:
        later, self._later = self._later, []
        # On the host, where the numbers are: a GPU would have to be waited for.
        tensor = torch.tensor([*numbers, *(one for part, _ in later for one in part)], dtype=torch.float64)
        dist.all_reduce(tensor)
        sums = iter(tensor.tolist())
        own = list(islice(sums, len(numbers)))
        for part, use in later:
            use(list(islice(sums, len(part))))
        return own

    def all_reduce_later(self, numbers: Sequence[float], use: Callable[[list[float]], None]) -> None:
        self._later.append((numbers, use))

    def finish_sums(self) -> None:
        if self._later:
            self.all_reduce([])

    def all_reduce_tensor(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def shard(self, model: nn.Module, shape: MeshShape) -> None:
        self.open_mesh(shape)
        if self.layout is not None:
            fsdp.shard(model, self.layout)
            self.wrapped = True

    def open_mesh(self, shape: MeshShape) -> None:
        if not shape.copies_only:
            self.layout = fsdp.open_layout(shape, self.device, self.timeout)

    def layer_weights(self, shapes: Sequence[Mapping[str, Shape]]) -> LayerWeights:
        return fsdp.ReplicatedWeights(shapes) if self.layout is None else fsdp.ShardedWeights(self.layout, shapes)

    def reshard(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def token_dispatcher(self, chunks: int) -> TokenDispatcher:
        if self.layout is None or self.layout.shape.ep == 1:
            return CopiesDispatcher()
        return AllToAllDispatcher(self.layout.mesh["ep"].get_group(), chunks)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        summed, group = list(parameters), None
        if self.layout is not None and self.wrapped:  # FSDP has summed all but those of plain parameters over replicas
            if self.layout.shape.dp_replicate == 1:
                return
            summed = [parameter for parameter in summed if not isinstance(parameter, DTensor)]
            group = self.layout.mesh["dp_replicate"].get_group()
        if not summed:
            return
        used = torch.tensor([parameter.grad is not None for parameter in summed], dtype=torch.uint8)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
        gradients: list[Tensor] = []
        for parameter, flag in zip(summed, used.tolist(), strict=True):
            if flag:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat, group=group)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])

    def forget_unused(self, parameters: Sequence[Tensor]) -> None:
        if self.layout is None or not parameters:
            return
        parts = _local_gradients(parameters)
        if not parts:  # alike on all ranks: nothing that is sharded is trained
            return
        used = torch.stack([part.any() for part in parts]).to(torch.uint8)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.layout.dense.get_group())
        found = iter(used.tolist())
        for parameter in parameters:
            if parameter.grad is not None and not next(found):
                parameter.grad = None

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        norm = torch.nn.utils.get_total_norm(_local_gradients(parameters))
        if self.layout is None or not self.wrapped:
            return norm
        square = norm.to(fsdp.local(parameters[0]).device, torch.float32).square()
        dist.all_reduce(square, group=self.layout.dense.get_group())
        return square.sqrt()

    def clip(self, parameters: Sequence[Tensor], bound: float, norm: Tensor) -> None:
        if parts := _local_gradients(parameters):
            torch._foreach_mul_(parts, (bound / (norm + 1e-6)).clamp(max=1.0))

    def shard_spec(self, parameter: Tensor) -> ShardSpec:
        return fsdp.shard_spec_of(parameter)

    def first_expert(self, here: int) -> int:
        return 0 if self.layout is None else here * self.layout.mesh.get_local_rank("ep")

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return apart(groups)

    def gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Value) -> Value:
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        if "MASTER_ADDR" not in os.environ:  # no launcher, so no store: a barrier waits until its own timeout
            yield
            dist.barrier()
            return
        store = open_store(self.broadcast_object(uuid.uuid4().hex))
        yield
        if self.is_main_process:
            store.set(DONE, "yes")
        else:
            wait_for(store, DONE)
        dist.barrier()  # rank 0 may keep the store that the others still look at

    def guard(self) -> AbstractContextManager[Any]:
        name = self.broadcast_object(uuid.uuid4().hex)
        return FailureWatchdog(self.rank, self.size, self.timeout.total_seconds(), name)

    def close(self) -> None:
        if self._opened:
            dist.destroy_process_group()


def apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Separate plain parameters from sharded ones within groups, because fused updates refuse a mixture."""
    return [
        {**group, "params": chosen}
        for group in groups
        for kind in (False, True)
        if (chosen := [p for p in group["params"] if isinstance(p, DTensor) is kind])
    ]


def _local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [fsdp.local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return neighbours of one dtype together, up to the size of a bucket."""
    buckets: list[list[Tensor]] = []
    remaining = 0
    for gradient in gradients:
        if not buckets or gradient.nbytes > remaining or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            remaining = BUCKET_BYTES
        buckets[-1].append(gradient)
        remaining -= gradient.nbytes
    return buckets
