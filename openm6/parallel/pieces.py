"""The parts of FSDP2's tensors, and those that streaming cuts itself, as update rules want to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from openm6.optim.pieces import WHOLE, Piece, chunk_lengths, keeps_cut


class RankGroup:
    """The ranks of a process group that hold the parts of the same tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def exchange(self, sent: Tensor, to: Sequence[int], received: Sequence[int]) -> Tensor:
        arrived = sent.new_empty(sum(received))
        dist.all_to_all_single(arrived, sent.contiguous(), list(received), list(to), group=self.group)
        return arrived


@cache
def rank_group(group: dist.ProcessGroup) -> RankGroup:
    """One for each process group: update rules tell groups apart by identity."""
    return RankGroup(group)


class DistributedPiece(Piece):
    """A parameter that FSDP2 has cut along one axis."""

    def __init__(self, parameter: DTensor, place: int) -> None:
        """`place` is that of the mesh axis over which it is cut."""
        self._mesh, self._placements, self._place = parameter.device_mesh, parameter.placements, place
        placement = parameter.placements[place]
        assert isinstance(placement, Shard)
        self._dimensions = parameter.ndim
        self.axis = placement.dim % parameter.ndim
        self.group = rank_group(self._mesh.get_group(place))
        self.lengths = chunk_lengths(parameter.shape[self.axis], self.group.size)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def slot(self, key: str, part: Tensor) -> Tensor:
        kept = keeps_cut(key, self.axis, self._dimensions)
        shape = list(part.shape)
        if kept:
            shape[self.axis] = sum(self.lengths)
        placements = [one if kept else Replicate() for one in self._placements]
        return as_part(part, self._mesh, placements, shape)


def as_part(part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """What lies here of a tensor of this shape, with its place in the whole; no copy is made."""
    stride = torch.empty(torch.Size(shape), device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def piece_of(parameter: Tensor) -> Piece:
    """How a parameter of a model that `sharding.shard` has cut lies here."""
    if not isinstance(parameter, DTensor):
        return WHOLE
    places = [place for place, one in enumerate(parameter.placements) if isinstance(one, Shard)]
    assert len(places) == 1, "FSDP2 cuts a parameter along one axis"
    return DistributedPiece(parameter, places[0])
