"""The processes that train one model together, and what they exchange outside of the layers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from openm6.nn.exchange import ExpertExchange, LocalExchange
from openm6.optim.pieces import WHOLE, Piece, whole
from openm6.optim.rules import Shape
from openm6.parallel.config import MeshShape

Value = TypeVar("Value")


class WeightSets:
    """What lies here of each weight set: all of it, in one process; the parent of sets on several ranks.

    `number` is that of a set, `name` that of one of its matrices.
    """

    def __init__(self, shapes: Sequence[Mapping[str, Shape]]) -> None:
        """`shapes` are those of whole sets."""
        self.shapes = shapes

    @property
    def parted(self) -> bool:
        """Whether ranks hold unlike parts, so that using a set is an exchange."""
        return False

    def is_sharded(self, number: int, name: str) -> bool:
        """Whether only some rows of a matrix lie here, so that it must be gathered to be used."""
        return False

    def piece(self, number: int, name: str) -> Piece:
        """How a matrix lies here."""
        return WHOLE

    def part(self, number: int, name: str, whole: Tensor, dealt: bool = False) -> Tensor:
        """What lies here of a whole matrix, of which experts may be `dealt` out already."""
        return whole

    def local_shapes(self, number: int) -> dict[str, Shape]:
        """The shapes of what lies here of a set."""
        return dict(self.shapes[number])

    def gather(self, number: int, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those matrices that travel, in full; of experts that are dealt out, those here. All ranks call it alike."""
        return parts

    def gathered(self, number: int) -> int:
        """Numbers in a set as it is computed with here."""
        return sum(math.prod(shape) for shape in self.local_shapes(number).values())

    def reduce(self, number: int, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of what was gathered -> of what lies here, summed over ranks."""
        return gradients

    def total(self, square: Tensor) -> Tensor:
        """A sum over what lies here -> over all of a set, in place."""
        return square

    def in_whole(self, number: int, name: str, slot: str, part: Tensor) -> Tensor:
        """What lies here of a tensor kept for a matrix, as the part of the whole that a checkpoint takes it for.

        On the host, and without a copy where it is there already.
        """
        return part.cpu()

    def here(self, part: Tensor) -> Tensor:
        """What `in_whole` was given, from what it gave."""
        return part


class Ranks:
    """One process alone, for which every sum is its own; the parent of several processes."""

    rank: int = 0
    size: int = 1
    shares_memory: bool = False  # whether all ranks see the same weights, which rank 0 keeps the rest of

    @property
    def is_main_process(self) -> bool:
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

    def forget_unused(self, parameters: Sequence[Tensor]) -> None:
        """Takes away the gradients that are zero on all ranks, as one process has none for what it does not use."""

    def shard(self, model: nn.Module, shape: MeshShape) -> None:
        """Lays the model, the same on all ranks, out over them."""

    def open_mesh(self, shape: MeshShape) -> None:
        """Lays out nothing but the axes: for a model whose weight sets are streamed, each rank its part."""

    def sets(self, shapes: Sequence[Mapping[str, Shape]]) -> WeightSets:
        """What this rank keeps of streamed weight sets of these shapes."""
        return WeightSets(shapes)

    @property
    def wrapped(self) -> bool:
        """Whether the model itself is cut, so that all ranks must bring a gradient for each of its parameters."""
        return False

    def reshard(self, model: nn.Module) -> None:
        """After a forward pass that no backward one follows: parameters are again what this rank keeps of them."""

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients of the whole model."""
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip(self, parameters: Sequence[Tensor], bound: float, norm: Tensor) -> None:
        """Scales gradients so that their norm, known to be `norm`, becomes `bound` at most."""
        clip_grads_with_norm_(list(parameters), bound, norm)

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's groups, in a form that its fused updates take."""
        return groups

    def piece(self, parameter: Tensor) -> Piece:
        """How a parameter lies here, for update rules that need more than its own numbers."""
        return whole(parameter)

    def first_expert(self, here: int) -> int:
        """The number of the first of the `here` experts of each layer that this rank holds."""
        return 0

    def exchange(self, parts: int) -> ExpertExchange:
        """The way of rows to their experts, in so many parts."""
        return LocalExchange()

    @property
    def layout(self) -> Any:
        """How the model is cut; None where each rank holds all of it."""
        return None

    def gather(self, value: Value) -> list[Value]:
        """The plain values of all ranks, on every rank."""
        return [value]

    def broadcast_object(self, value: Value) -> Value:
        """Rank 0's plain value, on every rank."""
        return value

    def same(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank, in place: what ranks decide by it, they decide alike."""
        return tensor

    def barrier(self) -> None:
        """Wait until all ranks that share memory have updated their part of the weights."""

    def main_process_first(self) -> AbstractContextManager[Any]:
        """Left by the other ranks when rank 0 leaves it, however long that takes; all enter it together."""
        return nullcontext()

    def guard(self) -> AbstractContextManager[Any]:
        """While entered, a failure of any rank ends all of them with one sentence."""
        return nullcontext()

    def close(self) -> None:
        """Leaves the group; the other methods must not be called after it."""


def launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether the launcher started this process again after a failure of any rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
