"""The transformer between embedding and heads: a stack of blocks under the sequence rule."""

# Dimensions: B rows, S new tokens, T tokens with those of the cache, D width, E experts

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn

from openm6 import kernels
from openm6.models.config import BackboneConfig
from openm6.nn.attention import Mask
from openm6.nn.block import Context, TransformerBlock, build_block
from openm6.nn.cache import SlotCache, TokenCache
from openm6.nn.executor import LayerExecutor
from openm6.nn.layers import Adaptable, LowRank, RMSNorm
from openm6.nn.moe import MoE, Router, RouterStats
from openm6.ops.attention import query_blocks
from openm6.ops.pointwise import rotary_table
from openm6.ops.sequence import SequenceMeta, additive_mask, block_mask, visible

DENSE_PAIRS = 4 * 1024**2  # of queries and keys, whose dense mask and scores take no memory to speak of
Refill = Callable[[nn.Module, nn.Module], None]  # fills a new module of the same form with an old one's weights


class Backbone(nn.Module):
    """Turns embedded tokens into hidden states, from which heads predict.

    Layers of a group share weights by holding the same modules, see `TransformerBlock`. Built under
    `torch.device("meta")` it costs no memory; then `to_empty(device=...)` and `reset_parameters()`, or load a
    checkpoint. With `meta_matrices` only the matrices that layers may share are on `meta`, for a model that does not
    fit on one device: the `executor` then holds their values.
    """

    def __init__(self, config: BackboneConfig, meta_matrices: bool = False) -> None:
        super().__init__()
        self.config = config
        self.executor = LayerExecutor()  # replaced to compile, checkpoint or offload layers
        self.layers = nn.ModuleList()
        for layer, first in enumerate(config.shared_with):
            shared = None if first == layer else self.blocks[first]
            mlp = config.feed_forward(layer)
            new = config.lora, config.modality_experts
            self.layers.append(build_block(config.attention, mlp, shared, config.share_routers, meta_matrices, *new))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.reset_parameters()

    @property
    def blocks(self) -> list[TransformerBlock]:
        return [cast(TransformerBlock, block) for block in self.layers]

    @property
    def group_blocks(self) -> list[TransformerBlock]:
        """The first layer of each group of layers that share weights."""
        return [self.blocks[layer] for layer in self.config.group_layers]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First values: truncated normal, smaller if a module adds to the residual stream; follows torch's seed."""
        deviation, shared = self.config.deviation, self.config.share_routers
        for block in self.group_blocks:
            block.reset_matrices(deviation, self.config.output_deviation)
            if shared and block.router is not None:
                block.router.reset_parameters(deviation)
        for block in self.blocks:
            block.reset_norms()
            if not shared and block.router is not None:
                block.router.reset_parameters(deviation)
            for module in block.modules():
                if isinstance(module, LowRank):
                    module.reset_parameters()
            for added in block.modality_experts:
                added = cast(MoE, added)
                added.experts.reset_parameters(deviation, self.config.output_deviation)
                added.router.reset_parameters(deviation)
        self.final_norm.reset_parameters()

    def forward(
        self, x: Tensor, meta: SequenceMeta, cache: TokenCache | None = None, others: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, list[RouterStats]]:
        """Embedded tokens B S D, added to a cache -> states after the final norm, and sparse layers' statistics."""
        expected = (meta.batch, meta.length, self.config.hidden_size)
        if x.shape != expected:
            raise ValueError(f"embedded tokens have the shape {tuple(x.shape)}, expected {expected}")

        def make_context(x: Tensor, meta: SequenceMeta) -> Context:
            rotary, mask = rotary_table(meta.positions, *self.config.rotary), choose_mask(meta, cache, x)
            return Context(rotary, mask, meta.valid, cache, self.executor.dispatcher, others)

        x, stats = self.executor.run(self.blocks, x, meta, make_context)
        return self.final_norm(x), stats

    def block(self, layer: int) -> TransformerBlock:
        """A layer, ready on the device until another one is asked for."""
        return self.executor.block(self.blocks, layer)

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        """Return an empty cache of `slots` sequences of up to `capacity` tokens, as the weights on device and dtype."""
        num_layers, heads, size = self.config.num_layers, self.config.num_kv_heads, self.config.head_dim
        return SlotCache(num_layers, slots, capacity, heads, size, self.final_norm.weight)

    @torch.no_grad()
    def delink(self, refill: Refill | None = None) -> dict[str, str]:
        """Give every layer weights of its own, copies of those that it shared (M6-10T, 2110.03888, §3).

        The first layer of a group keeps the very tensors, so that nothing is computed differently afterwards. If
        modules cannot be copied, as those sharded over ranks, every layer gets new ones, which `refill` fills from
        the old. Return the name of each parameter that could be shared -> the name that it had, or is a copy of.
        """
        old, blocks = self.config, self.blocks
        self.config = old.model_copy(update={"sharing": None})
        names: dict[str, str] = {}
        for first in old.group_layers:
            modules: dict[str, nn.Module] = {**blocks[first].shareable()}
            if old.share_routers and blocks[first].router is not None:
                modules["mlp.router"] = cast(Router, blocks[first].router)
            group = [layer for layer, other in enumerate(old.shared_with) if other == first]
            for (name, module), layer in product(modules.items(), group):
                parameters = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
                names |= {f"layers.{layer}.{inner}": f"layers.{first}.{inner}" for inner in parameters}
                if refill is not None and not isinstance(module, Router):
                    fresh = build_block(old.attention, old.feed_forward(layer), meta_matrices=True)
                    refill(fresh.get_submodule(name), module)
                    blocks[layer].set_submodule(name, fresh.get_submodule(name))
                elif layer != first:
                    blocks[layer].set_submodule(name, deepcopy(module))
        return names

    def merge_lora(self) -> None:
        for module in self.modules():
            if isinstance(module, Adaptable):
                module.merge_lora()

    @torch.no_grad()
    def update_balance(self, stats: list[RouterStats]) -> None:
        """Move routers' biases towards balance after a training step; several `stats` of one router are summed."""
        totals: dict[Router, Tensor] = {}
        for found in stats:
            router = self.blocks[found.layer].router
            if router is not None and router.weight.requires_grad:
                totals[router] = totals[router] + found.load if router in totals else found.load
        for router, total in totals.items():
            router.update_balance(total)


def side_loss(stats: list[RouterStats]) -> Tensor | float:
    """The weighted side losses of all routers, to be added to the training loss."""
    return sum((found.side_loss for found in stats), start=0.0)


def choose_mask(meta: SequenceMeta, cache: TokenCache | None, x: Tensor) -> Mask:
    """The rule in the form that is fastest here: query blocks or FlexAttention for whole rows, else a dense mask."""
    keys = meta if cache is None else cache.extend(meta)
    if keys is meta and x.is_cpu:
        return query_blocks(meta, x.dtype)
    # Evaluation has rows of many lengths, for each of which FlexAttention would be compiled.
    small = not torch.is_grad_enabled() and meta.batch * meta.length**2 <= DENSE_PAIRS
    whole = cache is None and x.is_cuda and not small
    if whole and kernels.available(x.device):
        return block_mask(meta)
    mask = visible(meta, keys)
    return additive_mask(mask, x.dtype) if x.is_cpu else mask
