"""The mesh of a run, and models on it: experts distributed over ranks, dense weights sharded by FSDP2, replicas.

The mesh has the axes (dp_replicate, dp_shard, ep), ep innermost, so that the exchange between experts stays within a
machine. All ranks train on rows of their own. Dense weights are sharded over dp_shard × ep and replicated over
dp_replicate. Of each expert matrix a rank holds the experts of its position on ep, sharded over dp_shard along the
width and replicated over dp_replicate. Losses are fractions of a global sum, so every gradient is a plain sum over
ranks. Layers that are offloaded are sharded in the same way.
"""

# Dimensions: E experts, P ranks of a group, R rows of the whole, r most rows of any rank, C columns, E' experts here

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from openm6.distributed.config import MeshShape
from openm6.distributed.process_group import LayerWeights
from openm6.nn.block import TransformerBlock
from openm6.nn.moe import Experts
from openm6.optim.rules import Shape
from openm6.optim.sharding import REPLICATED, ShardSpec, is_sharded_along

SLOT = "::"  # between a parameter's name and that of one of its optimizer's tensors


@dataclass(frozen=True)
class Layout:
    shape: MeshShape
    mesh: DeviceMesh
    dense: DeviceMesh  # dp_shard and ep as one axis: the ranks that hold one replica of the model among them
    timeout: timedelta  # of every exchange

    def find(self, names: tuple[str, ...]) -> DeviceMesh:
        return self.dense if names == ("dense",) else self.mesh[names]

    def on_host(self) -> Layout:
        """Return a mesh of the same ranks on CPUs, for copies of what is on GPUs."""
        return self if self.mesh.device_type == "cpu" else open_layout(self.shape, torch.device("cpu"), self.timeout)


def open_layout(shape: MeshShape, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Layout:
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=MeshShape._fields)
    dense = mesh["dp_shard", "ep"]._flatten("dense")
    for group in (*mesh.get_all_groups(), dense.get_group()):
        _set_pg_timeout(timeout, group)  # a mesh opens its groups with torch's own, up to half an hour
    return Layout(shape, mesh, dense, timeout)


def shard(model: nn.Module, layout: Layout) -> None:
    """Shard a model, the same on all ranks, in place: experts by `keep_experts`, then all else by FSDP2."""
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    keep_experts(layers, layout.mesh.get_local_rank("ep"), layout.shape.ep)
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    # Modules that several layers share are one unit.
    for module in dict.fromkeys(module for block in blocks for module in block.shareable().values()):
        shard_unit(module, layout)
    shard_rest(model, layout)


def shard_unit(module: nn.Module, layout: Layout) -> None:
    """Shard the matrices that layers may share; of `Experts`, which hold only those of this rank, along the width."""
    if not isinstance(module, Experts):
        fully_shard(module, mesh=_mesh(layout, "dense"))
    elif layout.shape.dp_shard > 1:
        # Along dim 1, because dim 0, that of the experts, is distributed already.
        fully_shard(module, mesh=_mesh(layout, "dp_shard"), shard_placement_fn=lambda parameter: Shard(1))
    _sum_only(module)


def shard_rest(model: nn.Module, layout: Layout) -> None:
    """Shard norms, routers and all that is outside of the blocks; `model` is called before all that it holds."""
    experts = (module for module in model.modules() if isinstance(module, Experts))
    held = {weight for module in experts for weight in module.parameters()}
    fully_shard(model, mesh=_mesh(layout, "dense"), ignored_params=held)
    # FSDP warns, in every step, of adding in place to what a layer returns, which does not happen here.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    _sum_only(model)


def _sum_only(module: nn.Module) -> None:
    for one in module.modules():
        if isinstance(one, FSDPModule):
            # Without the second line the division is asked of the backend, which gloo refuses and NCCL gets wrong in
            # bf16 (pytorch#190745).
            one.set_gradient_divide_factor(1.0)
            one.set_force_sum_reduction_for_comms(True)


def keep_experts(layers: list[Experts], index: int, count: int) -> None:
    """Keep of each layer's experts part `index` of `count`, as parameters of their own."""
    for experts in layers:
        for name, whole in list(experts.named_parameters()):
            part = whole.detach().chunk(count)[index].clone()
            setattr(experts, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _mesh(layout: Layout, axis: str) -> DeviceMesh:
    """The mesh over which weights are sharded along an axis, and replicated if there are replicas."""
    return layout.find((axis,)) if layout.shape.dp_replicate == 1 else layout.mesh["dp_replicate", axis]


def with_offsets(model: nn.Module, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return tensors named after parameters (a slot of the optimizer's behind `::`) with their offset in the whole.

    Experts' weights are plain tensors or DTensors of FSDP's shards alone: without their offset among all experts, a
    checkpoint would take one rank's experts for all of them.
    """
    weights, result = dict(expert_parameters(model)), dict(tensors)
    for name, tensor in tensors.items():
        weight = weights.get(name.partition(SLOT)[0])
        if weight is None or tensor.dim() != weight.dim():
            continue
        # What lacks the sharded axis is equal on the ranks that share an expert.
        sharded = isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)
        placements = [Shard(1) if sharded else Replicate(), Shard(0)]
        part = local(tensor)
        shape = (len(part) * layout.shape.ep, *tensor.shape[1:])  # a DTensor's width is that of the whole
        result[name] = as_part(part, layout.mesh["dp_shard", "ep"], placements, shape)
    return result


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this rank holds; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part(part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """Return the shard here of a tensor of this shape as a DTensor, without a copy."""
    stride = torch.empty(torch.Size(shape), device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and parameters that are distributed by experts."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield from module.named_parameters(prefix=name)


@torch.no_grad()
def refill_unit(layout: Layout, fresh: nn.Module, old: nn.Module) -> None:
    """Fill `fresh`, which has the form of `old` before it was sharded, and shard it; all ranks in the same order.

    FSDP2 can neither unwrap nor copy a module. So a sharded model that takes another form is built again from the
    old one's tensors and wrapped in turn, one module at a time. Each rank keeps its experts.
    """
    for name, weight in old.named_parameters():
        setattr(fresh, name, nn.Parameter(_full_tensor(weight).clone(), requires_grad=weight.requires_grad))
    fresh.train(old.training)
    shard_unit(fresh, layout)


@torch.no_grad()
def gather_parameters(modules: Iterable[nn.Module]) -> None:
    """Replace parameters that a wrapped parent has sharded by whole ones; wrapped modules keep theirs."""
    wholes: dict[int, nn.Parameter] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, FSDPModule):
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in wholes:
                wholes[id(weight)] = nn.Parameter(_full_tensor(weight), requires_grad=weight.requires_grad)
            setattr(module, name, wholes[id(weight)])


def _full_tensor(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()


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
        """`shapes` are those of whole matrices."""
        super().__init__(shapes)
        self.layout = layout
        self._dense = layout.dense.get_group()
        self._data = layout.mesh["dp_replicate"].get_group() if layout.shape.dp_replicate > 1 else None
        self.host = layout.on_host()  # for checkpoints
        self._specs = [{name: self._spec(shape) for name, shape in one.items()} for one in shapes]

    def _spec(self, shape: Shape) -> ShardSpec:
        if len(shape) == 2:
            return ShardSpec(0, shape[0], self._dense)
        axes, mesh = self.layout.shape, self.layout.mesh
        group = mesh["dp_shard"].get_group() if axes.dp_shard > 1 else None
        return ShardSpec(1, shape[1], group, shape[0] // axes.ep * mesh.get_local_rank("ep"))

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
        for group, matrices in self._groups(index):
            names = [name for name in matrices if name in gradients]  # others are frozen
            parts = [gradients[name].float() for name in names]
            if group is not None and parts:
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
