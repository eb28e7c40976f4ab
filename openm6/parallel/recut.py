"""A cut model in another form: its parts gathered, put into new modules, and cut again, one block at a time.

FSDP2 has no way back for a module that it has wrapped, and none to copy one. So what shall have another form is built
anew, takes over the old one's tensors, and is wrapped in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openm6.nn.block import Block
from openm6.parallel.sharding import Layout, shard_block


class Recut:
    """Fills new blocks with the weights of old ones and cuts them; all ranks do so in the same order."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._last: tuple[Block, dict[str, Tensor]] | None = None

    @torch.no_grad()
    def refill(self, fresh: Block, old: Block) -> None:
        """`fresh` has the form of `old` before it was cut; its own values do not matter. Experts stay dealt out."""
        for name, weight in self._gathered(old).items():
            _put(fresh, name, nn.Parameter(weight.clone()))
        for name, buffer in old.named_buffers():
            _module_of(fresh, name).register_buffer(name.rpartition(".")[2], buffer.clone())
        fresh.train(old.training)
        shard_block(fresh, self.layout)

    def _gathered(self, old: Block) -> dict[str, Tensor]:
        """All its weights, of its experts those of this rank. Layers that share a block ask in turn."""
        if self._last is None or self._last[0] is not old:
            self._last = old, {name: _whole(weight) for name, weight in old.named_parameters()}
        return self._last[1]


@torch.no_grad()
def gather_parameters(modules: list[nn.Module]) -> None:
    """Whole parameters in place of those that a wrapped parent had cut, within modules that are not wrapped."""
    wholes: dict[int, nn.Parameter] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in wholes:
                wholes[id(weight)] = nn.Parameter(_whole(weight), requires_grad=weight.requires_grad)
            setattr(module, name, wholes[id(weight)])


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()


def _module_of(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _put(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    setattr(_module_of(module, name), name.rpartition(".")[2], weight)
