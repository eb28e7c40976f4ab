"""The mesh of a run, and models on it: experts distributed over ranks, dense weights sharded by FSDP2, replicas.

The mesh has the axes (data, shard, experts), experts innermost, so that their exchange stays within a machine. All
ranks train on rows of their own. Dense weights are sharded over shard × experts and replicated over data. Of each
expert matrix a rank holds the experts of its position on the last axis, sharded over shard along the width and
replicated over data. Losses are fractions of a global sum, so every gradient is a plain sum over ranks.
"""

# Dimensions: E experts, D width, F hidden, P columns of the first product

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from openm6.core.errors import ConfigError
from openm6.nn.block import Block
from openm6.nn.moe import Experts
from openm6.parallel.config import MeshShape

AXES = ("dp_replicate", "dp_shard", "ep")
SLOT = "::"  # between a parameter's name and that of one of its optimizer's tensors


@dataclass(frozen=True)
class Layout:
    """The mesh of a run."""

    shape: MeshShape
    mesh: DeviceMesh

    dense: DeviceMesh  # shard and experts as one axis

    def inner_group(self) -> dist.ProcessGroup:
        """Return the ranks that hold one replica of the model among them."""
        return self.dense.get_group()

    def find(self, names: tuple[str, ...]) -> DeviceMesh:
        """Return the submesh with these axes."""
        return self.dense if names == ("dense",) else self.mesh[names]

    def on_host(self) -> Layout:
        """Return a mesh of the same ranks on CPUs, for copies of what is on GPUs."""
        return self if self.mesh.device_type == "cpu" else open_layout(self.shape, torch.device("cpu"))

    def expert_group(self) -> dist.ProcessGroup:
        """Return the ranks over which the experts of a layer are distributed."""
        return self.mesh["ep"].get_group()


def open_layout(shape: MeshShape, device: torch.device) -> Layout:
    """Open the mesh of the ranks that the launcher started."""
    sizes = (shape.dp_replicate, shape.dp_shard, shape.ep)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    return Layout(shape, mesh, mesh["dp_shard", "ep"]._flatten("dense"))


def shard(model: nn.Module, layout: Layout) -> None:
    """Shard a model, the same on all ranks, in place: experts by `keep_experts`, then all else by FSDP2.

    Raises:
        ConfigError: the experts' width cannot be sharded evenly.
    """
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    keep_experts(layers, layout.mesh.get_local_rank("ep"), layout.shape.ep)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        shard_block(block, layout)
    shard_rest(model, layout)


def shard_block(block: Block, layout: Layout) -> None:
    """Shard a block that holds only the experts of this rank."""
    dense, own = _dense_mesh(layout), _expert_mesh(layout)
    if own is not None and isinstance(block.feed_forward, Experts):
        _shard_experts(block.feed_forward, own, dense, layout.shape.dp_shard)
    # A shared router's side loss leaves the block by another way than its output, which FSDP watches.
    keep = block.router is not None
    fully_shard(block, mesh=dense, ignored_params=_held([block]), reshard_after_forward=not keep)
    _sum_only(block)


def shard_rest(model: nn.Module, layout: Layout) -> None:
    """Shard what is outside of the blocks, which are sharded; `model` is called before all that it holds."""
    fully_shard(model, mesh=_dense_mesh(layout), ignored_params=_held(model.modules()))
    # FSDP warns, in every step, of adding in place to what a layer returns, which does not happen here.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    _sum_only(model)


def reshard(model: nn.Module) -> None:
    """Free what was gathered for a forward pass that no backward pass followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _held(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Return the weights of experts, which are sharded by themselves."""
    inner = (module for outer in modules for module in outer.modules() if isinstance(module, Experts))
    return {weight for experts in inner for weight in (experts.up, experts.down)}


def _sum_only(module: nn.Module) -> None:
    """Reduce by sums, not means."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            # Without the second line the division is asked of the backend, which gloo refuses and NCCL gets wrong in
            # bf16 (pytorch#190745).
            one.set_gradient_divide_factor(1.0)
            one.set_force_sum_reduction_for_comms(True)


def keep_experts(layers: list[Experts], place: int, count: int) -> None:
    """Keep of each layer's experts part `place` of `count`, as parameters of their own."""
    for experts in layers:
        for name in ("up", "down"):
            whole = getattr(experts, name)
            part = whole.detach().chunk(count)[place].clone()
            setattr(experts, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _shard_experts(experts: Experts, own: DeviceMesh, dense: DeviceMesh, ranks: int) -> None:
    for name, weight in (("up", experts.up), ("down", experts.down)):
        if weight.shape[1] % ranks:
            raise ConfigError(
                f"parallel.dp_shard={ranks} cannot shard the experts' {name} matrices of {weight.shape[1]} rows "
                "evenly: choose a divisor"
            )
    if experts.shared is not None:
        fully_shard(experts.shared, mesh=dense)
    # Along dim 1, because dim 0, that of the experts, is distributed already.
    fully_shard(experts, mesh=own, shard_placement_fn=lambda parameter: Shard(1))


def _dense_mesh(layout: Layout) -> DeviceMesh:
    return layout.dense if layout.shape.dp_replicate == 1 else layout.mesh["dp_replicate", "dense"]


def _expert_mesh(layout: Layout) -> DeviceMesh | None:
    """None where each rank of a copy holds experts of its own, uncut."""
    if layout.shape.dp_shard == 1:
        return None
    return (
        layout.mesh["dp_shard"] if layout.shape.dp_replicate == 1 else layout.mesh["dp_replicate", "dp_shard"]
    )


def with_places(model: nn.Module, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return tensors named after parameters (a slot of the optimizer's behind `::`) with their place in the whole.

    Experts' weights are plain tensors or DTensors of FSDP's shards alone: without their offset among all experts, a
    checkpoint would take one rank's experts for all of them.
    """
    weights = dict(expert_parameters(model))
    return {
        name: _whole(tensor, layout)
        if (owner := name.partition(SLOT)[0]) in weights and tensor.dim() == weights[owner].dim()
        else tensor
        for name, tensor in tensors.items()
    }


def _whole(tensor: Tensor, layout: Layout) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    cut = isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)
    # What lacks the sharded axis is equal on the ranks that share an expert. A DTensor's width is that of the whole.
    shape = torch.Size([local.shape[0] * layout.shape.ep, *tensor.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(1) if cut else Replicate(), Shard(0)]
    mesh = layout.mesh["dp_shard", "ep"]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and parameters that are distributed by experts."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield f"{name}.up", module.up
            yield f"{name}.down", module.down


class BlockResharder:
    """Fill new blocks with the weights of sharded ones and shard them; all ranks do so in the same order.

    FSDP2 can neither unwrap nor copy a module. So a sharded model that takes another form is built again from the
    old one's tensors and wrapped in turn, one block at a time.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._last: tuple[Block, dict[str, Tensor]] | None = None

    @torch.no_grad()
    def refill(self, fresh: Block, old: Block) -> None:
        """Fill `fresh`, which has the form of `old` before it was sharded; each rank keeps its experts."""
        for name, weight in self._gathered(old).items():
            _put(fresh, name, nn.Parameter(weight.clone()))
        for name, buffer in old.named_buffers():
            _module_of(fresh, name).register_buffer(name.rpartition(".")[2], buffer.clone())
        fresh.train(old.training)
        shard_block(fresh, self.layout)

    def _gathered(self, old: Block) -> dict[str, Tensor]:
        """Return all weights, of the experts those of this rank; layers that share a block come one after another."""
        if self._last is None or self._last[0] is not old:
            self._last = old, {name: _full_tensor(weight) for name, weight in old.named_parameters()}
        return self._last[1]


@torch.no_grad()
def gather_parameters(modules: list[nn.Module]) -> None:
    """Replace parameters that a wrapped parent has sharded by whole ones, within modules that are not wrapped."""
    wholes: dict[int, nn.Parameter] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in wholes:
                wholes[id(weight)] = nn.Parameter(_full_tensor(weight), requires_grad=weight.requires_grad)
            setattr(module, name, wholes[id(weight)])


def _full_tensor(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()


def _module_of(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _put(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    setattr(_module_of(module, name), name.rpartition(".")[2], weight)
