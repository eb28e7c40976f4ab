"""Attention by blocks against scaled_dot_product_attention under the whole mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.ops.attention import BLOCK_QUERIES, attend_query_blocks, query_blocks
from openm6.ops.sequence import SequenceMeta, causal_meta, join, visible
from tests.sequences import padding_meta


def of_example(meta: SequenceMeta, number: int) -> SequenceMeta:
    return SequenceMeta(torch.full_like(meta.example_id, number), meta.attn_order, meta.block_id, meta.positions)


def packed(seed: int) -> SequenceMeta:
    """Per row: a long example, a short one with a bidirectional source and a private block, padding, another."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.tensor([[0] * 9 + [1, 2] + [3] * 5], dtype=torch.int32).expand(2, -1)
    private = torch.tensor([[0] * 11 + [2] * 5], dtype=torch.int32).expand(2, -1)
    short = SequenceMeta(torch.ones_like(order), order, private, torch.zeros(2, 16, 3))
    long = int(torch.randint(1, 2 * BLOCK_QUERIES, (1,), generator=generator))
    return join([causal_meta(2, long), short, padding_meta(2, 3), of_example(causal_meta(2, 30), 2)])


def reference(query: Tensor, key: Tensor, value: Tensor, meta: SequenceMeta) -> Tensor:
    parts = (part.transpose(1, 2) for part in (query, key, value))
    mask = visible(meta, meta)
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_values_and_gradients_equal_the_whole_mask(heads: tuple[int, int]) -> None:
    torch.manual_seed(sum(heads))
    meta = packed(seed=sum(heads))
    query = torch.randn(2, meta.length, heads[0], 8, requires_grad=True)
    key, value = (torch.randn(2, meta.length, heads[1], 8, requires_grad=True) for _ in range(2))
    upstream = torch.randn_like(query)
    ours = attend_query_blocks(query, key, value, query_blocks(meta, torch.float32))
    theirs = reference(query, key, value, meta)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (query, key, value), upstream),
        torch.autograd.grad(theirs, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_blocks_cover_each_query_once_in_order_with_all_visible_keys() -> None:
    meta = packed(seed=5)
    blocks = query_blocks(meta, torch.float32)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == 2 * meta.length
    seen = torch.zeros(2 * meta.length, 2 * meta.length, dtype=torch.bool)
    for block in blocks:
        seen[block.start : block.stop, block.first : block.last] = block.bias == 0
        assert block.stop - block.start <= BLOCK_QUERIES
    assert torch.equal(seen, torch.block_diag(*visible(meta, meta)[:, 0].float()).bool())
    spent = sum(block.bias.numel() for block in blocks)
    assert spent < 0.8 * 2 * meta.length**2, "nothing was saved"
