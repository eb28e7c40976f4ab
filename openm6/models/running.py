"""How a backbone runs its blocks: as they are, compiled, or with activations made again in the backward pass."""

# Letters: B rows, S tokens, D width

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openm6.core.log import get_log
from openm6.nn.block import Block, Context, LayerParts
from openm6.nn.moe import Experts, RouterStats
from openm6.ops.matmul import capture_precision

Answer = tuple[Tensor, RouterStats | None]


class RunBlock(Protocol):
    """Runs one block for one layer: B S D -> B S D and its router's report."""

    def __call__(
        self, block: Block, parts: LayerParts, x: Tensor, context: Context, layer: int
    ) -> Answer: ...


def run_plainly(block: Block, parts: LayerParts, x: Tensor, context: Context, layer: int) -> Answer:
    """The block as it is."""
    answer: Answer = block(x, parts, context, layer)
    return answer


class CompiledBlocks:
    """One compiled graph for all layers of a kind; what is not training (decoding, evaluation) runs plainly.

    The graph takes a layer's weights and the masks of a batch as inputs, so neither another layer nor another
    packing compiles again; `compilations` counts, so that tests can check this. Experts are compiled in bf16 alone, and
    if the compiler fails, all blocks run plainly from then on: `broken`.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self.compilations = 0
        self.broken = False
        self._run = torch.compile(_without_number, backend=self._compile, fullgraph=True, dynamic=False)

    def __call__(self, block: Block, parts: LayerParts, x: Tensor, context: Context, layer: int) -> Answer:
        if self.broken or not block.training or context.cache is not None or not _compilable(block, x):
            return run_plainly(block, parts, x, context, layer)
        try:
            y, load = self._run(block, parts, x, context)
        except _compiler_failures() as error:
            self.broken = True
            cause = getattr(error, "inner_exception", error)
            reason = str(cause).strip().partition("\n")[0]
            get_log().warning(
                f"the compiler failed ({type(cause).__name__}: {reason}), so the blocks run uncompiled and slower; "
                f"loop.compile=false does not try"
            )
            return run_plainly(block, parts, x, context, layer)
        # The layer's number stays outside: as an input it would be compiled in, once a layer.
        return y, None if load is None else replace(load, layer=layer)

    def _compile(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.compilations += 1
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self.backend)(graph, inputs)
        return compiled


def _compiler_failures() -> tuple[type[Exception], ...]:
    """What torch raises if it cannot compile; what the backend raises comes wrapped in the first."""
    exc = torch._dynamo.exc
    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def _compilable(block: Block, x: Tensor) -> bool:
    """Dense blocks always. With experts in bf16: in any other dtype the grouped product asks for counts on the host."""
    if not isinstance(block.feed_forward, Experts):
        return True
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype == torch.bfloat16


class RecomputedBlocks:
    """The first `num_layers` layers keep only their input and run again in the backward pass."""

    def __init__(self, run: RunBlock, num_layers: int) -> None:
        self.run, self.num_layers = run, num_layers

    def __call__(self, block: Block, parts: LayerParts, x: Tensor, context: Context, layer: int) -> Answer:
        if layer >= self.num_layers or not torch.is_grad_enabled():
            return self.run(block, parts, x, context, layer)
        again = capture_precision(x.device.type)
        answer: Answer = checkpoint(
            self.run, block, parts, x, context, layer,
            use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again()),
        )  # fmt: skip
        return answer


def _without_number(block: Block, parts: LayerParts, x: Tensor, context: Context) -> Answer:
    return run_plainly(block, parts, x, context, 0)
