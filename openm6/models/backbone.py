"""The transformer between embedding and heads: a stack of blocks under the sequence rule."""

# Letters: B rows, S new tokens, T tokens with those of the cache, D width, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from openm6.models.config import BackboneConfig
from openm6.models.running import RunBlock, run_plainly
from openm6.nn.attention import Mask
from openm6.nn.block import Block, BlockRunner, BlockSource, Context, LayerParts
from openm6.nn.cache import SlotCache, TokenCache
from openm6.nn.config import ExpertsConfig
from openm6.nn.layers import RMSNorm
from openm6.nn.moe import LocalDispatcher, Router, RouterStats, TokenDispatcher
from openm6.ops.attention import query_blocks
from openm6.ops.pointwise import rotary_table
from openm6.ops.sequence import BLOCK, CausalMask, SequenceMeta, additive_mask, block_mask, visible

Refill = Callable[[Block, Block], None]  # fills a new block of the same form with an old one's weights


class Backbone(nn.Module):
    """Turns embedded tokens into hidden states, from which heads predict.

    `sets` holds the weight sets and `layers` what each layer keeps to itself; layer l uses sets[weight_sets[l]].
    Built under `torch.device("meta")` it costs no memory; then `to_empty(device=...)` and `reset_parameters()`, or
    load a checkpoint. With `empty_sets` only the matrices of the sets are on `meta`, for a model that does not fit
    on one device: whoever sets `runner` or `source` then keeps their values.
    """

    def __init__(self, config: BackboneConfig, empty_sets: bool = False) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner | None = None
        self.source: BlockSource | None = None  # replaced to offload weights in inference
        self.sets = nn.ModuleList(
            _block(config, config.weight_sets.index(index), empty_sets) for index in range(config.num_sets)
        )
        self.layers = nn.ModuleList(
            LayerParts(config.attention, _router(config, layer, shared=False))
            for layer in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.run_block: RunBlock = run_plainly  # replaced to compile or recompute blocks
        self.exchange: TokenDispatcher = LocalDispatcher()  # replaced for expert-parallel training
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First values: truncated normal, smaller if a part adds to the residual stream; follows torch's seed."""
        with torch.no_grad():
            for block in self.sets:
                cast(Block, block).reset_parameters(self.config.deviation, self.config.output_deviation)
            for parts in self.layers:
                cast(LayerParts, parts).reset_parameters(self.config.deviation)
            self.final_norm.reset_parameters()

    def forward(
        self, x: Tensor, meta: SequenceMeta, cache: TokenCache | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Embedded tokens B S D -> hidden states B S D after the final norm, and a report for each sparse layer.

        With a cache, the S tokens are added to it and see all of it by the same rule.

        Raises:
            ValueError: x does not fit the config or `meta`.
            ConfigError: the cache is too small.
        """
        if x.shape != (meta.batch, meta.length, self.config.hidden_size):
            expected = (meta.batch, meta.length, self.config.hidden_size)
            raise ValueError(f"embedded tokens have the shape {tuple(x.shape)}, expected {expected}")

        def make_context(x: Tensor, meta: SequenceMeta) -> Context:
            return Context(
                rotary=rotary_table(meta.positions, self.config.rope_theta, self.config.sections),
                mask=choose_mask(meta, cache, x),
                valid=meta.valid,
                cache=cache,
                exchange=self.exchange,
            )

        if self.runner is not None:
            parts = [cast(LayerParts, layer) for layer in self.layers]
            x, loads = self.runner.run(x, meta, parts, make_context)
        else:
            x, loads = self._run(x, make_context(x, meta))
        return self.final_norm(x), loads

    def _run(self, x: Tensor, context: Context) -> tuple[Tensor, list[RouterStats]]:
        loads: list[RouterStats] = []
        for layer in range(self.config.num_layers):
            parts = cast(LayerParts, self.layers[layer])
            x, load = self.run_block(self.block(layer), parts, x, context, layer)
            loads += [] if load is None else [load]
        return x, loads

    def new_cache(self, slots: int, room: int) -> SlotCache:
        """Return an empty cache of `slots` sequences of up to `room` tokens, on the weights' device in their dtype."""
        config, weight = self.config, self.final_norm.weight
        return SlotCache(
            config.num_layers, slots, room, config.num_kv_heads, config.head_dim, weight.device, weight.dtype
        )

    @torch.no_grad()
    def delink(self, refill: Refill | None = None) -> dict[str, str]:
        """Give every layer a weight set of its own, a copy of the one that it shared (M6-10T, 2110.03888, §3).

        The first layer of a set keeps the very tensors, so that nothing is computed differently afterwards. Where
        blocks cannot be copied, as those cut over ranks, every layer gets a new one, which `refill` fills from the old.

        Returns:
            name of each parameter in a set -> the name that it had, or that it is a copy of.
        """
        numbers = self.config.weight_sets
        shared = [cast(Block, block) for block in self.sets]
        config = self.config.model_copy(update={"sharing": None})
        self.sets = nn.ModuleList(
            _copies(shared, numbers) if refill is None else _refilled(shared, numbers, config, refill)
        )
        self.config = config
        return {
            f"sets.{layer}.{name}": f"sets.{index}.{name}"
            for layer, index in enumerate(numbers)
            for name, _ in shared[index].named_parameters()
        }

    def block(self, layer: int) -> Block:
        """The weight set of a layer, from the source if there is one."""
        if self.source is not None:
            return self.source.block(layer)
        return cast(Block, self.sets[self.config.weight_sets[layer]])

    def router(self, layer: int) -> Router | None:
        """The router of a layer, None if it is dense."""
        own = cast(LayerParts, self.layers[layer]).router
        return own if own is not None else cast(Block, self.sets[self.config.weight_sets[layer]]).router

    @torch.no_grad()
    def update_balance(self, loads: list[RouterStats]) -> None:
        """Moves the routers' biases a step towards balance; call it once after each training step.

        `loads` may hold several reports of a layer (micro-batches); they are summed, as those of a shared router are.
        """
        totals: dict[Router, Tensor] = {}
        for load in loads:
            router = self.router(load.layer)
            if router is not None:
                totals[router] = totals[router] + load.load if router in totals else load.load
        for router, total in totals.items():
            router.update_balance(total)


def side_loss(loads: list[RouterStats]) -> Tensor | float:
    """The weighted side losses of all routers, to be added to the training loss."""
    return sum((load.side_loss for load in loads), start=0.0)


def choose_mask(meta: SequenceMeta, cache: TokenCache | None, x: Tensor) -> Mask:
    """The rule in the form that is fastest here: query blocks or FlexAttention for whole rows, else a dense mask."""
    keys = meta if cache is None else cache.extend(meta)
    if keys is meta and x.is_cpu:
        return query_blocks(meta, x.dtype)
    if keys is meta and x.is_cuda and meta.causal:
        return CausalMask()
    if cache is None and x.is_cuda and meta.length % BLOCK == 0:
        return block_mask(meta, meta)
    mask = visible(meta, keys)
    return additive_mask(mask, x.dtype) if x.is_cpu else mask


def _block(config: BackboneConfig, layer: int, empty: bool) -> Block:
    """The weight set that `layer` is the first to use."""
    router = _router(config, layer, shared=True)
    with torch.device("meta") if empty else nullcontext():
        return Block(config.attention, config.feed_forward(layer), router)


def _copies(shared: list[Block], numbers: Sequence[int]) -> Iterator[Block]:
    for layer, index in enumerate(numbers):
        yield shared[index] if numbers.index(index) == layer else deepcopy(shared[index])


def _refilled(
    shared: list[Block], numbers: Sequence[int], config: BackboneConfig, refill: Refill
) -> Iterator[Block]:
    for layer, index in enumerate(numbers):
        fresh = _block(config, layer, empty=True)
        refill(fresh, shared[index])
        yield fresh


def _router(config: BackboneConfig, layer: int, shared: bool) -> Router | None:
    """A router for a sparse layer, if it belongs where the caller is building: with the set or with the layer."""
    part = config.feed_forward(layer)
    if not isinstance(part, ExpertsConfig) or shared != config.share_routers:
        return None
    return Router(config.hidden_size, part)
