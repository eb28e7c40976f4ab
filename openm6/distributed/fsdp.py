"""The mesh of a run, and models on it: experts distributed over ranks, dense weights sharded by FSDP2, replicas.

The mesh has the axes (dp_replicate, dp_shard, ep), ep innermost, so that the exchange between experts stays within a
machine. All ranks train on rows of their own. Dense weights are sharded over dp_shard × ep and replicated over
dp_replicate. Of each expert matrix a rank holds the experts of its position on ep, sharded over dp_shard along the
width and replicated over dp_replicate. Losses are fractions of a global sum, so every gradient is a plain sum over
ranks.
"""

# Dimensions: E experts, D width, F hidden, P columns of the first product

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from openm6.core.errors import ConfigError
from openm6.distributed.config import MeshShape
from openm6.nn.block import TransformerBlock
from openm6.nn.moe import Experts

SLOT = "::"  # between a parameter's name and that of one of its optimizer's tensors


@dataclass(frozen=True)
class Layout:
    """The mesh of a run."""

    shape: MeshShape
    mesh: DeviceMesh
    dense: DeviceMesh  # dp_shard and ep as one axis: the ranks that hold one replica of the model among them

    def find(self, names: tuple[str, ...]) -> DeviceMesh:
        """Return the submesh with these axes."""
        return self.dense if names == ("dense",) else self.mesh[names]

    def on_host(self) -> Layout:
        """Return a mesh of the same ranks on CPUs, for copies of what is on GPUs."""
        return self if self.mesh.device_type == "cpu" else open_layout(self.shape, torch.device("cpu"))


def open_layout(shape: MeshShape, device: torch.device) -> Layout:
    """Open the mesh of the ranks that the launcher started."""
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=MeshShape._fields)
    return Layout(shape, mesh, mesh["dp_shard", "ep"]._flatten("dense"))


def shard(model: nn.Module, layout: Layout) -> None:
    """Shard a model, the same on all ranks, in place: experts by `keep_experts`, then all else by FSDP2.

    Raises:
        ConfigError: the experts' width cannot be sharded evenly.
    """
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
        for name, weight in module.named_parameters():
            if weight.shape[1] % layout.shape.dp_shard:
                raise ConfigError(
                    f"parallel.dp_shard={layout.shape.dp_shard} cannot shard the experts' {name} matrices of "
                    f"{weight.shape[1]} rows evenly: choose a divisor"
                )
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
    """Reduce by sums, not means."""
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


class UnitResharder:
    """Fills new modules with the weights of sharded ones and shards them; all ranks do so in the same order.

    FSDP2 can neither unwrap nor copy a module. So a sharded model that takes another form is built again from the
    old one's tensors and wrapped in turn, one module at a time.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._last: tuple[nn.Module, dict[str, Tensor]] | None = None

    @torch.no_grad()
    def refill(self, fresh: nn.Module, old: nn.Module) -> None:
        """Fill `fresh`, which has the form of `old` before it was sharded; each rank keeps its experts."""
        if self._last is None or self._last[0] is not old:  # layers that shared it come one after another
            self._last = old, {name: _full_tensor(weight) for name, weight in old.named_parameters()}
        for name, weight in self._last[1].items():
            setattr(fresh, name, nn.Parameter(weight.clone()))
        fresh.train(old.training)
        shard_unit(fresh, self.layout)


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
