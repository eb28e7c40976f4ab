"""Text on a GPU: the whole step, from embedding to drawn token, as a captured CUDA graph per size.

A step of a small model is hundreds of launches of a few microseconds each; a replay is one.
"""

# Shapes: B rows, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openm6.inference.decode import Precision, TextHead
from openm6.inference.text import DecodeBatch, SamplingMode

BATCHES = (
    1,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
    1024,
)  # a padded row costs little while reading the weights takes the time
KEYS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)

# Without cuDNN, which plans again for each shape; that takes longer than the step.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_Key = tuple[int, int, SamplingMode]


class GraphedDecodeBatch(DecodeBatch):
    """`DecodeBatch` whose passes are replayed; sizes are rounded up to a few, each captured when it first occurs.

    A graph holds addresses: of the cache, of the state, of its own outputs, all of which stay where they are. Its
    sizes are constants, so they are its key. The one wait of a step is the reading of the drawn tokens.
    """

    def __init__(
        self,
        text_head: TextHead,
        rows: int,
        room: int,
        precision: Precision = "bfloat16",
        deterministic: bool = False,
    ) -> None:
        """`deterministic` uses the largest number of rows in every pass."""
        slots = next(size for size in BATCHES if size >= rows)
        super().__init__(text_head, slots, room, precision, deterministic=False)
        self.capacity = rows
        self.largest_only = deterministic
        self.graphs: dict[_Key, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def _padded(self, count: int) -> int:
        slots = self.cache.slots
        return slots if self.largest_only else min(slots, next(size for size in BATCHES if size >= count))

    def _run(self, batch: int, longest: int, mode: SamplingMode) -> tuple[Tensor, Tensor]:
        longest = min(self.cache.room, next((size for size in KEYS if size >= longest), self.cache.room))
        key = (batch, longest, mode)
        if key not in self.graphs:
            self.graphs[key] = self._captured(key)
        graph, drawn, logits = self.graphs[key]
        graph.replay()
        return drawn, logits

    def _captured(self, key: _Key) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Runs the pass a few times aside, as libraries set themselves up when first called, then records it.

        The state is put back each time; what the passes wrote into the cache is written again by the next one.
        """
        state = (self.token, self.position, self.length, self.draw)
        before = [part.clone() for part in state]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), sdpa_kernel(ATTENTION):
            for _ in range(3):
                super()._run(*key)
                self._restore(before)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            sdpa_kernel(ATTENTION),
        ):
            drawn, logits = super()._run(*key)
        return graph, drawn, logits

    def _restore(self, before: list[Tensor]) -> None:
        for part, old in zip((self.token, self.position, self.length, self.draw), before, strict=True):
            part.copy_(old)


def open_batch(
    text_head: TextHead, rows: int, room: int, precision: Precision = "float32", deterministic: bool = False
) -> DecodeBatch:
    """Return the fastest kind of rows for the model's device; a graph cannot wait for offloaded layers."""
    graphed = text_head.embedding.is_cuda and text_head.backbone.source is None
    kind = GraphedDecodeBatch if graphed else DecodeBatch
    return kind(text_head, rows, room, precision, deterministic)
