"""The processes that train one model together, and what they exchange outside of the layers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from openm6.distributed.config import MeshShape
from openm6.nn.moe import TokenDispatcher
from openm6.optim.rules import Shape
from openm6.optim.sharding import REPLICATED, ShardSpec, replicated

Value = TypeVar("Value")


class LayerWeights:
    """This rank's part of offloaded weights (one process: all), by group `index` and matrix `name`; base class."""

    sharded: bool = False  # whether ranks hold different shards, so that using a group needs collectives

    def __init__(self, shapes: Sequence[Mapping[str, Shape]]) -> None:
        """`shapes` are those of whole matrices."""
        self.shapes = shapes

    def is_sharded(self, index: int, name: str) -> bool:
        """Return whether this rank holds only some rows of a matrix, so that it must be gathered to be used."""
        return self.shard_spec(index, name).group is not None

    def shard_spec(self, index: int, name: str) -> ShardSpec:
        return REPLICATED

    def part(self, index: int, name: str, whole: Tensor, local_experts: bool = False) -> Tensor:
        """Return the shard here of a whole matrix, or of one that has only the `local_experts`."""
        return whole

    def local_shapes(self, index: int) -> dict[str, Shape]:
        """Return the shapes of the shards here of a group."""
        empty = {name: torch.empty(shape, device="meta") for name, shape in self.shapes[index].items()}
        return {name: tuple(self.part(index, name, whole).shape) for name, whole in empty.items()}

    def gather(self, index: int, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sharded matrices in full, of distributed experts those here; a collective."""
        return parts

    def gathered(self, index: int) -> int:
        """Return the number of parameters of a group when it is gathered here."""
        return sum(math.prod(shape) for shape in self.local_shapes(index).values())

    def reduce(self, index: int, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reduce gradients of what was gathered to those of the shards here, summed over ranks."""
        return gradients

    def all_reduce(self, square: Tensor) -> Tensor:
        """Sum a value of the shards here over all shards of a group, in place."""
        return square

    def to_global(self, index: int, name: str, slot: str, part: Tensor) -> Tensor:
        """Return a tensor kept for a matrix on the host (no copy if it is there), with its offset, for a checkpoint."""
        return part.cpu()

    def to_local(self, part: Tensor) -> Tensor:
        """Return the tensor that `to_global` was given, from its result."""
        return part


class ProcessGroupContext:
    """One process alone, for which every sum is its own; base class for several."""

    rank: int = 0
    size: int = 1
    shares_memory: bool = False  # whether all ranks use the same weights in memory
    wrapped: bool = False  # whether the model is sharded, so that all ranks need a gradient for each of its parameters
    layout: Any = None  # the mesh of a sharded model; None if each rank holds all of it

    @property
    def is_main_process(self) -> bool:
        """Return whether this is rank 0, the only one that writes and logs."""
        return self.rank == 0

    def all_reduce(self, numbers: Sequence[float]) -> list[float]:
        """Return each of a few plain numbers summed over the ranks."""
        return list(numbers)

    def all_reduce_later(self, numbers: Sequence[float], use: Callable[[list[float]], None]) -> None:
        """Call `use` with sums over the ranks that are not needed yet: at once, or when the next numbers are summed."""
        use(list(numbers))

    def finish_sums(self) -> None:
        """Sum what still waits for the next sum."""

    def all_reduce_tensor(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum gradients over the ranks; a parameter without one on a rank counts as zero there."""

    def forget_unused(self, parameters: Sequence[Tensor]) -> None:
        """Remove gradients that are zero on all ranks, because one process has none for what it does not use."""

    def shard(self, model: nn.Module, shape: MeshShape) -> None:
        """Shard a model, the same on all ranks."""

    def open_mesh(self, shape: MeshShape) -> None:
        """Open the mesh alone, for a model whose layers are offloaded and sharded by their store."""

    def layer_weights(self, shapes: Sequence[Mapping[str, Shape]]) -> LayerWeights:
        """Return the shards of offloaded layers of these shapes."""
        return LayerWeights(shapes)

    def reshard(self, model: nn.Module) -> None:
        """Shard parameters again after a forward pass that no backward pass follows."""

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the norm of all gradients of the whole model."""
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip(self, parameters: Sequence[Tensor], bound: float, norm: Tensor) -> None:
        """Scale gradients so that their norm, known to be `norm`, becomes `bound` at most."""
        clip_grads_with_norm_(list(parameters), bound, norm)

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the optimizer's groups in a form that its fused updates accept."""
        return groups

    def shard_spec(self, parameter: Tensor) -> ShardSpec:
        """Return how a parameter is divided, for update rules that need more than this rank's shard."""
        return replicated(parameter)

    def first_expert(self, here: int) -> int:
        """Return the index of the first of the `here` experts of each layer that this rank holds."""
        return 0

    def token_dispatcher(self, chunks: int) -> TokenDispatcher:
        """Return the exchange of rows with their experts, in so many chunks."""
        return TokenDispatcher()

    def gather(self, value: Value) -> list[Value]:
        """Return the plain values of all ranks, on every rank."""
        return [value]

    def broadcast_object(self, value: Value) -> Value:
        """Return rank 0's plain value, on every rank."""
        return value

    def barrier(self) -> None:
        """Wait until all ranks that share memory have updated their part of the weights."""

    def main_process_first(self) -> AbstractContextManager[Any]:
        """Enter together; the other ranks leave when rank 0 leaves, however long that takes."""
        return nullcontext()

    def guard(self) -> AbstractContextManager[Any]:
        """While entered, let a failure of any rank end all of them with one sentence."""
        return nullcontext()

    def close(self) -> None:
        """Leave the group; no other method may be called after it."""


def launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether the launcher started this process again after a failure of any rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
