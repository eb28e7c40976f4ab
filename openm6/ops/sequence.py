"""Attention masks of packed rows: one rule of visibility, for boolean masks and for FlexAttention."""

# Shapes: B rows, S tokens of a row, Q queries, K keys, n blocks of 128 tokens

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

PADDING = -1  # the example_id of tokens that belong to no example
BLOCK = 128  # FlexAttention decides per block of this many queries and keys

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CausalMask:
    """Marks plain causal attention (one example per row, no padding), so that SDPA needs no mask."""


@dataclass(frozen=True)
class SequenceMeta:
    """Example, visibility and position of each token of packed rows.

    example_id: B S int32, the example within the row; -1 for padding, which attends to padding only
    attn_order: B S int32, 0 for a bidirectional source; a token attends to its own order and lower ones
    block_id:   B S int32, 0, or the index of a block that is not visible outside
    positions:  B S 3, time, height and width for the rotary embedding (equal on all three for text)
    causal:     every row is one example without padding and strictly causal; no mask need be built
    """

    example_id: Tensor
    attn_order: Tensor
    block_id: Tensor
    positions: Tensor
    causal: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        shape, *others = (tuple(part.shape) for part in self.parts())
        if others != [shape, shape, (*shape, 3)]:
            raise ValueError(
                f"example_id, attn_order and block_id must have one shape B S and positions B S 3, not "
                f"{shape}, {others[0]}, {others[1]} and {others[2]}"
            )

    @property
    def batch(self) -> int:
        return self.example_id.shape[0]

    @property
    def length(self) -> int:
        return self.example_id.shape[1]

    @property
    def valid(self) -> Tensor:
        """B S bool: tokens that belong to an example."""
        return self.example_id >= 0

    def to(self, device: torch.device | str) -> SequenceMeta:
        """Return the same metadata on another device."""
        return SequenceMeta(*(part.to(device) for part in self.parts()), causal=self.causal)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return example_id, attn_order, block_id, positions."""
        return self.example_id, self.attn_order, self.block_id, self.positions

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes as arrays: torch would open a file for each tensor.
        return _meta_of_arrays, (self.causal, *(part.numpy() for part in self.parts()))


def _meta_of_arrays(causal: bool, *arrays: np.ndarray) -> SequenceMeta:
    return SequenceMeta(*(torch.from_numpy(array) for array in arrays), causal=causal)


def causal_meta(batch: int, length: int, start: int = 0, device: torch.device | str | None = None) -> SequenceMeta:
    """Return rows of one example each, strictly causal, whose first token has position `start`."""
    order = torch.arange(start, start + length, dtype=torch.int32, device=device).expand(batch, length)
    # A tensor for each part: torch.compile would specialize on two of them being one.
    example_id, block_id = torch.zeros_like(order), torch.zeros_like(order)
    return SequenceMeta(example_id, order, block_id, order.unsqueeze(-1).expand(batch, length, 3), causal=True)


def join(metas: list[SequenceMeta]) -> SequenceMeta:
    """Concatenate sequences along the row."""
    columns = zip(*(meta.parts() for meta in metas), strict=True)
    return SequenceMeta(*(torch.cat(column, dim=1) for column in columns))


def _is_visible(
    example_q: Tensor, order_q: Tensor, block_q: Tensor, example_k: Tensor, order_k: Tensor, block_k: Tensor
) -> Tensor:
    """The rule of visibility, on anything that broadcasts."""
    open_to_query = (block_k == 0) | (block_k == block_q)
    return (example_k == example_q) & (order_k <= order_q) & open_to_query


def visible(query: SequenceMeta, key: SequenceMeta) -> Tensor:
    """Return B 1 Q K, whether a key is visible to a query: same example, order not later, not within another block.

    Every token attends to itself, hence no row of the mask is empty.
    """
    queries = (part[:, None, :, None] for part in query.parts()[:3])  # B 1 Q 1
    keys = (part[:, None, None, :] for part in key.parts()[:3])  # B 1 1 K
    return _is_visible(*queries, *keys)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 if visible, else -inf: SDPA on a CPU would convert a boolean mask again in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def mask_mod(query: SequenceMeta, key: SequenceMeta) -> MaskMod:
    """Return the rule in FlexAttention's form: (batch, head, query index, key index) -> bool."""
    example_q, order_q, block_q, _ = query.parts()
    example_k, order_k, block_k, _ = key.parts()

    def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _is_visible(
            example_q[batch, q], order_q[batch, q], block_q[batch, q],
            example_k[batch, k], order_k[batch, k], block_k[batch, k],
        )  # fmt: skip

    return mask


def block_mask(query: SequenceMeta, key: SequenceMeta, block: int = BLOCK) -> BlockMask:
    """Return FlexAttention's mask from per-block summaries: empty blocks are skipped, full ones need no rule.

    `create_block_mask` would evaluate the rule on all Q·K pairs; this reads each token once.

    Raises:
        ValueError: a length that is no multiple of the block.
    """
    if query.length % block or key.length % block:
        raise ValueError(f"lengths {query.length} and {key.length} must be multiples of the block of {block}")
    some, full = block_kinds(query, key, block)  # B n n each
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full),
        BLOCK_SIZE=block, mask_mod=mask_mod(query, key), seq_lengths=(query.length, key.length),
    )  # fmt: skip


def block_kinds(query: SequenceMeta, key: SequenceMeta, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """For each pair of blocks, whether anything may be visible, and whether all is: B n n bool each.

    Conservative: a pair that may be partly visible is marked partial, and mask_mod decides per element.
    """
    low_q, high_q, low_order_q, high_order_q, _ = (part[:, :, None] for part in _summary(query, block))
    low_k, high_k, low_order_k, high_order_k, block_k = (part[:, None, :] for part in _summary(key, block))
    apart = (high_q < low_k) | (high_k < low_q)
    one_example = (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
    later = low_order_k > high_order_q
    full = one_example & (high_order_k <= low_order_q) & (block_k == 0)
    return ~(apart | later), full


def _summary(meta: SequenceMeta, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Lowest and highest example_id, lowest and highest attn_order, highest block_id of each block: B n."""
    example, order, private = (part.unflatten(1, (-1, block)) for part in meta.parts()[:3])
    return example.amin(-1), example.amax(-1), order.amin(-1), order.amax(-1), private.amax(-1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """B n n bool -> how many per query block (B 1 n) and their indices, the visible ones first (B 1 n n)."""
    count = blocks.sum(-1, dtype=torch.int32)
    index = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count.unsqueeze(1), index.unsqueeze(1)
