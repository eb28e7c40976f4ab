"""Attention masks of packed rows: one rule of visibility, for boolean masks and for FlexAttention."""

# Shapes: B rows, S tokens of a row, Q queries, K keys, n blocks of 128 tokens

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

PADDING = -1  # the example_id of tokens that belong to no example
BLOCK = 128  # FlexAttention decides per block of this many queries and keys


@dataclass(frozen=True)
class SequenceMeta:
    """Example, visibility and position of each token of packed rows.

    example_id: B S int32, the example within the row; -1 for padding, which attends to padding only
    attn_order: B S int32, 0 for a bidirectional source; a token attends to its own order and lower ones
    block_id:   B S int32, 0, or the index of a block that is not visible outside
    positions:  B S 3, time, height and width for the rotary embedding (equal on all three for text)
    """

    example_id: Tensor
    attn_order: Tensor
    block_id: Tensor
    positions: Tensor

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
        return SequenceMeta(*(part.to(device, non_blocking=True) for part in self.parts()))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.example_id, self.attn_order, self.block_id, self.positions


def causal_meta(batch: int, length: int, start: int = 0, device: torch.device | str | None = None) -> SequenceMeta:
    """Return rows of one example each, strictly causal, whose first token has position `start`."""
    order = torch.arange(start, start + length, dtype=torch.int32, device=device).expand(batch, length)
    # A tensor for each part: torch.compile would specialize on two of them being one.
    example_id, block_id = torch.zeros_like(order), torch.zeros_like(order)
    return SequenceMeta(example_id, order, block_id, order.unsqueeze(-1).expand(batch, length, 3))


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
    """Return B 1 Q K, whether a key is visible to a query: same example, order not later, not in another block."""
    queries = (part[:, None, :, None] for part in query.parts()[:3])  # B 1 Q 1
    keys = (part[:, None, None, :] for part in key.parts()[:3])  # B 1 1 K
    return _is_visible(*queries, *keys)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 if visible, else -inf: SDPA on a CPU would convert a boolean mask again in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def pad_to_multiple(meta: SequenceMeta, multiple: int) -> SequenceMeta:
    """Return rows that end with padding, so that their length is a multiple."""
    missing = -meta.length % multiple
    if not missing:
        return meta
    example, order, private, positions = meta.parts()
    example = F.pad(example, (0, missing), value=PADDING)
    order, private = (F.pad(part, (0, missing)) for part in (order, private))
    return SequenceMeta(example, order, private, F.pad(positions, (0, 0, 0, missing)))


def block_mask(meta: SequenceMeta, block: int = BLOCK) -> BlockMask:
    """FlexAttention's mask of rows, padded to a multiple of `block`; it reads each token once, not all their pairs."""
    meta = pad_to_multiple(meta, block)
    example, order, private, _ = meta.parts()

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _is_visible(
            example[batch, q], order[batch, q], private[batch, q], example[batch, k], order[batch, k], private[batch, k]
        )

    some, full = block_kinds(meta, block)  # B n n each
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full),
        BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(meta.length, meta.length),
    )  # fmt: skip


def block_kinds(meta: SequenceMeta, block: int) -> tuple[Tensor, Tensor]:
    """For each pair of blocks, whether anything may be visible, and whether all is, conservatively: B n n bool each."""
    example, order, private = (part.unflatten(1, (-1, block)) for part in meta.parts()[:3])  # B n block
    low, high, low_order, high_order = example.amin(-1), example.amax(-1), order.amin(-1), order.amax(-1)  # B n
    apart = (high[:, :, None] < low[:, None]) | (high[:, None] < low[:, :, None])
    later = low_order[:, None] > high_order[:, :, None]
    one_example = (low == high)[:, :, None] & (low == high)[:, None] & (low[:, :, None] == low[:, None])
    full = one_example & (high_order[:, None] <= low_order[:, :, None]) & (private.amax(-1) == 0)[:, None]
    return ~(apart | later), full


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """B n n bool -> how many per query block (B 1 n) and their indices, the visible ones first (B 1 n n)."""
    count = blocks.sum(-1, dtype=torch.int32)
    index = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count.unsqueeze(1), index.unsqueeze(1)
