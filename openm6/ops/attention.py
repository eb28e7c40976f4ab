"""Attention for packed rows on a CPU: each block of queries is multiplied with its visible keys only."""

# Shapes: B rows, S tokens of a row, N = B·S, H query heads, G key-value heads, M = H/G, d head size, Q K a block

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openm6.ops.sequence import SequenceMeta, additive_mask, visible

BLOCK_QUERIES = 128  # larger blocks waste work above the diagonal, smaller ones on small products


@dataclass(frozen=True)
class QueryBlock:
    """Queries `start` to `stop` of all rows and the keys around those they see; bias Q K: 0 if visible, else -inf."""

    start: int
    stop: int
    first: int
    last: int
    bias: Tensor


QueryBlocks = tuple[QueryBlock, ...]  # an attention mask as its blocks, in order, that are not wholly -inf


def query_blocks(meta: SequenceMeta, dtype: torch.dtype) -> QueryBlocks:
    """Cut rows at the boundaries of examples, and after each 128 tokens."""
    mask = visible(meta, meta)[:, 0]  # B S S
    blocks = []
    for row, example in enumerate(meta.example_id):
        lengths = torch.unique_consecutive(example, return_counts=True)[1].tolist()
        start, base = 0, row * meta.length
        for length in lengths:
            end = start + length
            for begin in range(start, end, BLOCK_QUERIES):
                stop = min(end, begin + BLOCK_QUERIES)
                last = int(mask[row, begin:stop, start:end].any(0).nonzero()[-1]) + start + 1
                bias = additive_mask(mask[row, begin:stop, start:last], dtype)
                blocks.append(QueryBlock(base + begin, base + stop, base + start, base + last, bias))
            start = end
    return tuple(blocks)


def attend_query_blocks(query: Tensor, key: Tensor, value: Tensor, mask: QueryBlocks) -> Tensor:
    """Softmax attention under a `QueryBlocks`: B S H d, B S G d twice -> B S H d."""
    return _AttendQueryBlocks.apply(query, key, value, mask)


class _AttendQueryBlocks(torch.autograd.Function):
    """Keep each block's attention weights, which are few if rows hold several examples.

    The M query heads of one key head are one taller matrix: its rows are (query, head) pairs. Blocks are many and
    small, so all key heads of a block are one batch and each block takes few calls: three forwards, five backwards.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: QueryBlocks) -> Tensor:
        group, scale = query.shape[2] // key.shape[2], query.shape[-1] ** -0.5
        queries, keys, values = _by_head(query, group), _by_head(key, 1), _by_head(value, 1)
        outputs = torch.empty_like(queries)  # G N·M d
        kept = []
        for block in mask:
            seen, rows = slice(block.first, block.last), slice(block.start * group, block.stop * group)
            bias = block.bias.to(query.dtype).repeat_interleave(group, 0)  # Q·M K
            logits = torch.baddbmm(bias, queries[:, rows], keys[:, seen].mT, alpha=scale)  # G Q·M K
            weight = torch.softmax(logits, -1, out=logits)
            torch.bmm(weight, values[:, seen], out=outputs[:, rows])
            if any(ctx.needs_input_grad):
                kept.append(weight)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.mask = mask
        return _by_token(outputs, query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        group, scale = query.shape[2] // key.shape[2], query.shape[-1] ** -0.5
        queries, keys, values = _by_head(query, group), _by_head(key, 1), _by_head(value, 1)
        upstreams = _by_head(gradient, group)
        d_query, d_key, d_value = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block, weight in zip(ctx.mask, kept, strict=True):
            seen, rows = slice(block.first, block.last), slice(block.start * group, block.stop * group)
            upstream = upstreams[:, rows]
            d_value[:, seen].baddbmm_(weight.mT, upstream)
            # softmax: d_logit = weight · (d_weight − Σ weight · d_weight)
            d_weight = torch.bmm(upstream, values[:, seen].mT).float()
            d_logit = torch._softmax_backward_data(d_weight, weight.float(), -1, torch.float32).to(query.dtype)
            d_key[:, seen].baddbmm_(d_logit.mT, queries[:, rows], alpha=scale)
            torch.bmm(d_logit, keys[:, seen], out=d_query[:, rows])
        d_query.mul_(scale)
        return _by_token(d_query, query), _by_token(d_key, key), _by_token(d_value, value), None


def _by_head(x: Tensor, group: int) -> Tensor:
    """B S G·M d -> G N·M d, for each key head the rows of its M = `group` query heads."""
    grouped = x.reshape(-1, x.shape[2] // group, group, x.shape[3])  # N G M d
    return grouped.transpose(0, 1).reshape(x.shape[2] // group, -1, x.shape[3])


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_by_head`."""
    grouped = x.view(x.shape[0], like.shape[0] * like.shape[1], -1, x.shape[2])  # G N M d
    return grouped.transpose(0, 1).reshape(like.shape)
