"""A cache bounded by bytes: records, codes and mels of files, keys and values of prompts."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class LRUCache(Generic[V]):
    """Arrays, tuples of arrays, or records, by key; the least recently used are dropped first. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        # Of `get_or_compute`: calls, those that had to compute, and the seconds of these.
        self.lookups, self.misses, self.seconds = 0, 0, 0.0
        self.entries: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """Return the entry under `key`, which is marked as used now, or None."""
        with self._lock:
            if key is None or key not in self.entries:
                return None
            self.entries.move_to_end(key)
            return self.entries[key]

    def put(self, key: Hashable, value: V) -> V:
        """Keep `value`, unless the key is None or it is larger than the cache, and return it."""
        size = _size(value)
        with self._lock:
            if key is not None and key not in self.entries and size <= self.max_bytes:
                self.entries[key] = value
                self.bytes += size
                while self.bytes > self.max_bytes:
                    self.bytes -= _size(self.entries.popitem(last=False)[1])
        return value

    def get_or_compute(self, key: Hashable, compute: Callable[[], V]) -> V:
        """Return the entry under `key`; compute and keep it if there is none."""
        found = self.get(key)
        self.lookups += 1
        if found is not None:
            return found
        with self.timed(misses=1):
            value = compute()
        return self.put(key, value)

    @contextmanager
    def timed(self, misses: int = 0) -> Iterator[None]:
        """Count the time within as that of computing entries, and so many misses."""
        began = time.perf_counter()
        yield
        self.misses, self.seconds = self.misses + misses, self.seconds + time.perf_counter() - began


def _size(value: Any) -> int:
    """Return the bytes of arrays; of Python values about as much as they take."""
    if isinstance(value, str | bytes):
        return 64 + len(value)
    if isinstance(value, Mapping):
        return sum(64 + _size(part) for part in value.values())
    if isinstance(value, tuple):
        return sum(map(_size, value))
    if isinstance(value, list):
        return sum(8 + _size(part) for part in value)
    return int(getattr(value, "nbytes", 32))
