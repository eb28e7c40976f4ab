"""Shards of weights that ranks hold: of tensors that FSDP2 has sharded, and of layers that are offloaded."""

# Dimensions: P ranks of a group, R rows of the whole, r most rows of any rank, C columns, E' experts here

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from openm6.core.errors import ConfigError
from openm6.distributed.fsdp import Layout, as_part, local
from openm6.distributed.process_group import LayerWeights
from openm6.optim.rules import Shape
from openm6.optim.sharding import REPLICATED, ShardSpec, is_sharded_along


class DTensorShardSpec(ShardSpec):
    """A parameter that FSDP2 has sharded along one axis."""

    def __init__(self, parameter: DTensor) -> None:
        self._mesh, self._placements, self._dimensions = parameter.device_mesh, parameter.placements, parameter.ndim
        # FSDP2 shards a parameter along one axis.
        ((dim, placement),) = ((dim, one) for dim, one in enumerate(self._placements) if isinstance(one, Shard))
        axis = placement.dim % parameter.ndim
        super().__init__(axis, parameter.shape[axis], self._mesh.get_group(dim))

    def local(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def slot(self, key: str, part: Tensor) -> Tensor:
        kept = is_sharded_along(key, self.axis, self._dimensions)
        shape = list(part.shape)
        if kept:
            shape[self.axis] = self.length
        placements = [one if kept else Replicate() for one in self._placements]
        return as_part(part, self._mesh, placements, shape)


def shard_spec_of(parameter: Tensor) -> ShardSpec:
    """Return how a parameter of a model that `fsdp.shard` has sharded is divided."""
    return DTensorShardSpec(parameter) if isinstance(parameter, DTensor) else REPLICATED


class ReplicatedWeights(LayerWeights):
    """Every rank keeps all weights, and updates them by the same gradients."""

    def reduce(self, index: int, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return _summed(gradients, None)


class ShardedWeights(LayerWeights):
    """Experts are distributed, and rows of dense matrices and of experts sharded, as `fsdp.shard` does.

    A group is gathered for each use, in the dtype of computation: one exchange for what is dense and, if experts are
    sharded, one for them. Gradients are summed and sharded in one exchange each, in fp32.
    """

    sharded = True

    def __init__(self, layout: Layout, shapes: Sequence[Mapping[str, Shape]]) -> None:
        """`shapes` are those of whole matrices.

        Raises:
            ConfigError: the experts' rows cannot be sharded evenly.
        """
        super().__init__(shapes)
        self.layout = layout
        self._dense = layout.dense.get_group()
        self._data = layout.mesh["dp_replicate"].get_group() if layout.shape.dp_replicate > 1 else None
        self.host = layout.on_host()  # for checkpoints
        self._specs = [{name: self._spec(name, shape) for name, shape in one.items()} for one in shapes]

    def _spec(self, name: str, shape: Shape) -> ShardSpec:
        if len(shape) == 2:
            return ShardSpec(0, shape[0], self._dense)
        axes = self.layout.shape
        if shape[1] % axes.dp_shard:
            raise ConfigError(
                f"parallel.dp_shard={axes.dp_shard} cannot shard the experts' {name} of {shape[1]} rows evenly: "
                "choose a divisor"
            )
        mesh, here = self.layout.mesh, shape[0] // axes.ep
        group = mesh["dp_shard"].get_group() if axes.dp_shard > 1 else None
        return ShardSpec(1, shape[1], group, here * mesh.get_local_rank("ep"))

    def shard_spec(self, index: int, name: str) -> ShardSpec:
        return self._specs[index][name]

    def part(self, index: int, name: str, whole: Tensor, local_experts: bool = False) -> Tensor:
        spec = self.shard_spec(index, name)
        if whole.ndim == 3 and not local_experts:
            here = whole.shape[0] // self.layout.shape.ep
            whole = whole[spec.first : spec.first + here]
        return whole if spec.group is None else whole.split(spec.lengths, spec.axis)[spec.group.rank()]

    def gather(self, index: int, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group, names in self._groups(index):
            if group is not None:
                specs = [self.shard_spec(index, name) for name in names]
                found |= zip(names, _gathered([parts[name] for name in names], specs, group), strict=True)
        return found

    def gathered(self, index: int) -> int:
        ep = self.layout.shape.ep
        return sum(math.prod(shape) // (ep if len(shape) == 3 else 1) for shape in self.shapes[index].values())

    def reduce(self, index: int, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group, names in self._groups(index):
            parts = [gradients[name].float() for name in names]
            if group is not None:
                parts = _scattered(parts, [self.shard_spec(index, name) for name in names], group)
            found |= zip(names, parts, strict=True)
        return found if self._data is None else _summed(found, self._data)

    def all_reduce(self, square: Tensor) -> Tensor:
        dist.all_reduce(square, group=self._dense)
        return square

    def to_global(self, index: int, name: str, slot: str, part: Tensor) -> Tensor:
        part = part.cpu()
        shape, sizes = self.shapes[index][name], list(part.shape)
        axis = len(shape) - 2
        rows: Placement = Replicate()
        if sizes and is_sharded_along(slot, axis, len(shape)):
            sizes[axis], rows = shape[axis], Shard(axis)
        if len(shape) == 2:
            return as_part(part, self.host.dense, [rows], sizes)
        if sizes:  # a count of steps has no experts
            sizes[0] = shape[0]
        experts = Shard(0) if sizes else Replicate()
        return as_part(part, self.host.mesh["dp_shard", "ep"], [rows, experts], sizes)

    def to_local(self, part: Tensor) -> Tensor:
        return local(part)

    def _groups(self, index: int) -> list[tuple[dist.ProcessGroup | None, list[str]]]:
        groups: dict[dist.ProcessGroup | None, list[str]] = {}
        for name, spec in self._specs[index].items():
            groups.setdefault(spec.group, []).append(name)
        return list(groups.items())


def _summed(gradients: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return the sums over a group, in one exchange, in fp32."""
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients.values()])
    dist.all_reduce(flat, group=group)
    sizes = [gradient.numel() for gradient in gradients.values()]
    return {
        name: part.view_as(gradient)
        for (name, gradient), part in zip(gradients.items(), flat.split(sizes), strict=True)
    }


def _gathered(parts: list[Tensor], specs: list[ShardSpec], group: dist.ProcessGroup) -> list[Tensor]:
    """Gather whole matrices, or whole experts, from their rows on all ranks; in one exchange."""
    padded = [F.pad(part, (0, 0, 0, spec.lengths[0] - part.shape[-2])) for part, spec in zip(parts, specs, strict=True)]
    flat = torch.cat([part.reshape(-1) for part in padded])
    joined = flat.new_empty(group.size() * len(flat))
    dist.all_gather_into_tensor(joined, flat, group=group)
    split = joined.view(group.size(), -1).split([part.numel() for part in padded], dim=1)
    return [
        # P r C -> P·r C, or P E' r C -> E' P·r C
        rows.reshape(-1, *part.shape).movedim(0, -3).flatten(-3, -2)[..., : spec.length, :]
        for rows, part, spec in zip(split, padded, specs, strict=True)
    ]


def _scattered(gradients: list[Tensor], specs: list[ShardSpec], group: dist.ProcessGroup) -> list[Tensor]:
    """Return the rows of this rank of the sums over ranks; in one exchange."""
    ranks, apart = group.size(), []
    for whole, spec in zip(gradients, specs, strict=True):
        # R C -> P r C, or E' R C -> P E' r C; missing rows are zero.
        padded = F.pad(whole, (0, 0, 0, ranks * spec.lengths[0] - whole.shape[-2]))
        apart.append(padded.unflatten(-2, (ranks, -1)).movedim(-3, 0))
    flat = torch.cat([rows.reshape(ranks, -1) for rows in apart], dim=1)
    own = flat.new_empty(flat.shape[1])
    dist.reduce_scatter_tensor(own, flat.reshape(-1), group=group)
    split = own.split([rows[0].numel() for rows in apart])
    return [
        part.view(rows.shape[1:])[..., : spec.lengths[group.rank()], :]
        for part, rows, spec in zip(split, apart, specs, strict=True)
    ]
