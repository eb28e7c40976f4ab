"""A bounded memory: what is forgotten is made again, what is kept is the same array."""

from __future__ import annotations

import sys
import threading

import numpy as np

from openm6.modalities.recall import Recall


def test_it_gives_back_what_was_put() -> None:
    recall, array = Recall(), np.arange(5)
    assert recall.get(b"a") is None
    assert recall.put(b"a", array) is array
    assert recall.get(b"a") is array and recall.bytes == array.nbytes


def test_the_least_recently_used_is_forgotten_first() -> None:
    recall = Recall(max_bytes=3 * 80)
    for key in (b"a", b"b", b"c"):
        recall.put(key, np.zeros(10))
    recall.get(b"a")
    recall.put(b"d", np.zeros(10))
    assert recall.get(b"b") is None
    assert all(recall.get(key) is not None for key in (b"a", b"c", b"d"))
    assert recall.bytes == 240


def test_memory_stays_bounded() -> None:
    recall = Recall(max_bytes=1000)
    for number in range(200):
        recall.put(str(number).encode(), np.zeros(number % 7, np.float64))
        assert recall.bytes == sum(array.nbytes for array in recall.arrays.values()) <= 1000


def test_what_is_larger_than_the_memory_is_given_back_and_forgotten() -> None:
    recall, large = Recall(max_bytes=10), np.zeros(100)
    assert recall.put(b"x", large) is large
    assert recall.get(b"x") is None and recall.bytes == 0


def test_without_a_key_nothing_is_kept() -> None:
    recall = Recall()
    recall.put(None, np.zeros(3))
    assert recall.get(None) is None and recall.bytes == 0


def test_putting_twice_counts_once() -> None:
    recall = Recall()
    recall.put(b"a", np.zeros(10))
    recall.put(b"a", np.zeros(10))
    assert recall.bytes == 80


def test_threads_may_share_it() -> None:
    """More keys than fit, asked for by several threads: nothing is lost between looking and taking."""
    recall = Recall(max_bytes=20 * 80)
    errors: list[Exception] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for number in rng.integers(0, 40, 20_000):
                key = str(number).encode()
                if recall.get(key) is None:
                    recall.put(key, np.zeros(10))
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
    assert recall.bytes == sum(array.nbytes for array in recall.arrays.values()) <= recall.max_bytes
