"""The key-value cache by itself: writing, going back, and its bounds."""

from __future__ import annotations

import pytest
import torch

from openm6.base.errors import ConfigError
from openm6.nn.cache import KVCache
from openm6.ops.sequence import causal_meta, visible


def make(batch: int = 2, capacity: int = 6) -> KVCache:
    return KVCache(3, batch, capacity, 2, 4, "cpu", torch.float32)


def test_written_tokens_come_back_in_order():
    torch.manual_seed(0)
    cache, key, value = make(), torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 4)
    cache.extend(causal_meta(2, 3))
    cache.write(1, key[:, :3], value[:, :3])
    seen = cache.extend(causal_meta(2, 2, start=3))
    keys, values = cache.write(1, key[:, 3:], value[:, 3:])
    assert torch.equal(keys, key)
    assert torch.equal(values, value)
    assert seen.attn_order[0].tolist() == [0, 1, 2, 3, 4]
    assert not cache.keys[0].any()
    assert not cache.keys[2].any()


def test_truncate_makes_room_again():
    cache = make()
    cache.extend(causal_meta(2, 6))
    cache.truncate(2)
    layout = cache.extend(causal_meta(2, 1, start=9))
    assert layout.attn_order[1].tolist() == [0, 1, 9]


def test_unwritten_places_are_padding():
    cache = make()
    assert not visible(causal_meta(2, 1), cache.layout).any()


def test_bounds():
    cache = make()
    with pytest.raises(ConfigError, match="make the cache larger"):
        cache.extend(causal_meta(2, 7))
    cache.extend(causal_meta(2, 4))
    with pytest.raises(ValueError, match="the cache holds 4"):
        cache.truncate(5)
