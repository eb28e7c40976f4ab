"""A bounded memory of codes already computed, so that a picture seen in every epoch goes through the codec once."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np


class Recall:
    """Keeps the most recently used arrays up to a number of bytes; forgetting changes time, never a result.

    Safe for threads: a server prepares requests in several.
    """

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.arrays: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes | None) -> np.ndarray | None:
        """The array under `key`, or None."""
        with self._lock:
            if key is None or key not in self.arrays:
                return None
            self.arrays.move_to_end(key)
            return self.arrays[key]

    def put(self, key: bytes | None, array: np.ndarray) -> np.ndarray:
        """Keeps `array` (unless the key is None) and gives it back."""
        with self._lock:
            if key is not None and key not in self.arrays:
                self.arrays[key] = array
                self.bytes += array.nbytes
                while self.bytes > self.max_bytes:
                    self.bytes -= self.arrays.popitem(last=False)[1].nbytes
        return array
