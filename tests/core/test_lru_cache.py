"""The cache bounded by bytes: order of dropping, bounds, tuples of arrays, threads."""

from __future__ import annotations

import sys
import threading

import numpy as np
import torch

from openm6.core.lru_cache import LRUCache


def keep(cache: LRUCache[np.ndarray], key: bytes | None, size: int = 10) -> bool:
    """Whether the cache had to compute the array."""
    computed: list[np.ndarray] = []

    def compute() -> np.ndarray:
        computed.append(np.zeros(size))
        return computed[-1]

    array = cache.get_or_compute(key, compute)
    assert len(array) == size and cache.bytes == sum(kept.nbytes for kept in cache.entries.values())
    assert cache.bytes <= cache.max_bytes
    return bool(computed)


def test_the_cache_drops_the_least_recently_used_first() -> None:
    cache = LRUCache[np.ndarray](max_bytes=3 * 80)
    assert all(keep(cache, key) for key in (b"a", b"b", b"c"))
    assert not keep(cache, b"a") and keep(cache, b"d")
    assert not any(keep(cache, key) for key in (b"a", b"c", b"d")) and keep(cache, b"b")


def test_the_cache_stays_bounded() -> None:
    cache = LRUCache[np.ndarray](max_bytes=1000)
    for number in range(200):
        keep(cache, str(number).encode(), number % 7)
    assert keep(cache, b"large", 1000) and keep(cache, b"large", 1000), "larger than the cache: returned and dropped"
    assert keep(cache, None) and keep(cache, None), "without a key nothing is kept"


def test_threads_may_share_it() -> None:
    """More keys than fit, requested by several threads: nothing is lost between a look-up and its use."""
    cache = LRUCache[np.ndarray](max_bytes=20 * 80)
    errors: list[Exception] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for number in rng.integers(0, 40, 20_000):
                cache.get_or_compute(str(number).encode(), lambda: np.zeros(10))
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
    assert cache.bytes == sum(array.nbytes for array in cache.entries.values()) <= cache.max_bytes


def test_keys_and_values_count_together() -> None:
    cache = LRUCache[tuple[torch.Tensor, torch.Tensor]](100)
    parts = {name: (torch.zeros(5), torch.zeros(5)) for name in (b"a", b"b", b"c")}  # 40 bytes each
    assert cache.put(b"a", parts[b"a"]) is parts[b"a"]
    cache.put(b"a", parts[b"a"])
    assert cache.bytes == 40, "a second time under the same key"
    cache.put(b"b", parts[b"b"])
    assert cache.get(b"a") is parts[b"a"]
    cache.put(b"c", parts[b"c"])
    assert cache.get(b"b") is None and cache.get(b"a") is not None and cache.bytes == 80


def test_records_count_with_their_media_and_texts() -> None:
    cache = LRUCache[dict](10_000)
    for row in range(10):
        cache.put(row, {"image": bytes(2000), "text_en": "x" * 500, "numbers": {"a": 1.0}, "tags_en": ["a", "b"]})
    assert list(cache.entries) == [7, 8, 9] and 7500 < cache.bytes < 10_000
