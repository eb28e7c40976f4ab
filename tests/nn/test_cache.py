"""The key-value cache by itself: writers continue slots, readers store nothing, and bounds hold."""

from __future__ import annotations

import pytest
import torch

from openm6.core.errors import ConfigError
from openm6.nn.cache import PackedWriter, SlotCache, SlotReader, SlotWriter
from openm6.ops.sequence import SequenceMeta, causal_meta, join, visible


def make(slots: int = 3, room: int = 6) -> SlotCache:
    return SlotCache(3, slots, room, 2, 4, torch.empty(0))


def fill(cache: SlotCache, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    writer, parts = SlotWriter(cache, slot), (torch.randn(1, length, 2, 4), torch.randn(1, length, 2, 4))
    writer.extend(causal_meta(1, length))
    writer.write(1, *parts)
    return parts


def test_written_tokens_come_back_in_order() -> None:
    torch.manual_seed(0)
    cache, key, value = make(), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4)
    first, second = SlotWriter(cache, 1), SlotWriter(cache, 1, 3)
    first.extend(causal_meta(1, 3))
    first.write(1, key[:, :3], value[:, :3])
    seen = second.extend(causal_meta(1, 2, start=3))
    keys, values = second.write(1, key[:, 3:], value[:, 3:])
    assert torch.equal(keys, key) and torch.equal(values, value)
    assert visible(causal_meta(1, 2, start=3), seen)[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert cache.lengths == [0, 5, 0] and not cache.keys[0].any() and not cache.keys[2].any()


def test_a_reader_sees_each_slot_as_far_as_it_is_filled_and_stores_nothing() -> None:
    cache = make()
    long, short = fill(cache, 2, 4), fill(cache, 0, 1)
    before = cache.keys.clone()
    reader = SlotReader(cache, [2, None, 0])
    new = causal_meta(3, 2)
    seen = visible(new, reader.extend(new))[:, 0, 1].int().tolist()
    assert seen == [[1] * 6, [0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1]]
    keys, _ = reader.write(1, torch.ones(3, 2, 2, 4), torch.ones(3, 2, 2, 4))
    assert torch.equal(keys[0, :4], long[0][0]) and torch.equal(keys[2, :1], short[0][0])
    assert torch.equal(cache.keys, before) and cache.lengths == [1, 0, 4]


def test_a_packed_row_fills_a_slot_per_example() -> None:
    cache = make()
    two = causal_meta(1, 2)
    second = SequenceMeta(two.example_id + 1, two.attn_order, two.block_id, two.positions)
    writer = PackedWriter(cache, [2, 0])
    writer.extend(join([causal_meta(1, 3), second]))
    key = torch.randn(1, 5, 2, 4)
    writer.write(0, key, key)
    assert cache.lengths == [2, 0, 3]
    assert torch.equal(cache.keys[0, 2, :3], key[0, :3]) and torch.equal(cache.keys[0, 0, :2], key[0, 3:])


def test_slots_are_moved_taken_put_and_cleared() -> None:
    cache = make()
    key, value = fill(cache, 0, 3)
    cache.move(0, 2)
    taken = cache.take(2, 1)
    assert torch.equal(taken[0][1], key[0, 1:]) and torch.equal(taken[1][1], value[0, 1:])
    cache.put(1, taken, 2)
    assert cache.lengths == [3, 4, 3] and torch.equal(cache.keys[1, 1, 2:4], key[0, 1:])
    cache.clear([0, 1])
    assert cache.lengths == [0, 0, 3] and not cache.keys[:, :2].any() and cache.keys[1, 2].any()


def test_bounds() -> None:
    cache = make()
    for attempt in (
        lambda: SlotWriter(cache, 0).extend(causal_meta(1, 7)),
        lambda: SlotWriter(cache, 0, 5).extend(causal_meta(1, 2)),
        lambda: PackedWriter(cache, [1]).extend(causal_meta(1, 7)),
        lambda: cache.put(0, (torch.zeros(3, 5, 2, 4), torch.zeros(3, 5, 2, 4)), 2),
    ):
        with pytest.raises(ConfigError, match="make slots larger"):
            attempt()
