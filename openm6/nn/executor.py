"""How a backbone runs its layers: as they are, compiled, or with activations computed again in the backward pass."""

# Dimensions: B rows, S tokens, D width

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import _StopRecomputationError, checkpoint

from openm6.core.errors import first_line
from openm6.core.log import get_log
from openm6.nn.block import BlockOutput, Context, TransformerBlock
from openm6.nn.moe import MoE, RouterStats, TokenDispatcher
from openm6.ops.matmul import autocast_dtype, capture_precision
from openm6.ops.sequence import SequenceMeta

MakeContext = Callable[[Tensor, SequenceMeta], Context]


class LayerExecutor:
    """Runs layers one after the other, as they are; base class. `dispatcher` sends tokens to experts on other ranks."""

    offloaded = False  # whether some blocks are on the device only while they are used

    def __init__(self, dispatcher: TokenDispatcher | None = None) -> None:
        self.dispatcher: TokenDispatcher = dispatcher or TokenDispatcher()

    def block(self, blocks: Sequence[TransformerBlock], layer: int) -> TransformerBlock:
        """Return the block of a layer, ready on the device until another one is asked for."""
        return blocks[layer]

    def run_block(self, block: TransformerBlock, x: Tensor, context: Context, layer: int) -> BlockOutput:
        """Run one block for one layer: B S D -> B S D and its router's statistics."""
        return block(x, context, layer)

    def run(
        self, blocks: Sequence[TransformerBlock], x: Tensor, meta: SequenceMeta, make_context: MakeContext
    ) -> tuple[Tensor, list[RouterStats]]:
        """Embedded tokens B S D -> states before the final norm, statistics; `make_context` is for some rows."""
        context = make_context(x, meta)
        found: list[RouterStats] = []
        for layer in range(len(blocks)):
            x, stats = self.run_block(self.block(blocks, layer), x, context, layer)
            found += [] if stats is None else [stats]
        return x, found


class CompiledExecutor(LayerExecutor):
    """One compiled graph for all layers of a kind; what is not training (decoding, evaluation) runs uncompiled.

    The graph takes a layer's weights and the masks of a batch as inputs, so neither another layer nor another
    packing compiles again; `compilations` counts, so that tests can check this. Experts are compiled in bf16 alone.

    Each kind of layer, shape and dtype first runs forwards and backwards for itself, because torch compiles a backward
    pass when it first runs, where a failure would end the step. Where that fails for any reason, and for all that comes
    new afterwards, blocks run uncompiled: `broken`. What `works` stays so, as a recomputed layer must run as before.
    """

    def __init__(self, dispatcher: TokenDispatcher | None = None, backend: str = "inductor") -> None:
        super().__init__(dispatcher)
        self.backend = backend
        self.compilations = 0
        self.broken = False
        self.works: dict[tuple[object, ...], bool] = {}
        # The layer's index stays outside: as an input it would be compiled in, once per layer.
        self._run = torch.compile(
            lambda block, x, context: block(x, context, 0), backend=self._compile, fullgraph=True, dynamic=False
        )

    def run_block(self, block: TransformerBlock, x: Tensor, context: Context, layer: int) -> BlockOutput:
        # Except in bf16, products of experts ask for counts on the host; numbers of tokens of a kind differ by batch.
        waits = isinstance(block.mlp, MoE) and autocast_dtype(x) != torch.bfloat16
        if not block.training or context.cache is not None or context.others or waits:
            return super().run_block(block, x, context, layer)
        key = type(block.mlp), x.shape, x.dtype, x.requires_grad, autocast_dtype(x), type(context.mask)
        try:
            if key not in self.works and not self.broken:
                self._prove(block, x, context)
            if self.works.setdefault(key, not self.broken):
                y, stats = self._run(block, x, context)
                return y, None if stats is None else replace(stats, layer=layer)
        except (torch.OutOfMemoryError, torch.AcceleratorError, _StopRecomputationError):
            raise
        except Exception as error:
            self.works[key], self.broken = False, True
            warn_of_failed_compiler(error, "loop.compile=false")
        return super().run_block(block, x, context, layer)

    def _prove(self, block: TransformerBlock, x: Tensor, context: Context) -> None:
        x = x.detach().requires_grad_(x.requires_grad)
        # Recomputation counts the tensors that a layer keeps; these are not its own.
        with saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            y, stats = self._run(block, x, context)
        outputs = [output for output in (y, stats and stats.side_loss) if output is not None and output.requires_grad]
        inputs = [leaf for leaf in (x, *block.parameters()) if leaf.requires_grad]
        slopes = [torch.zeros_like(output) for output in outputs]
        with torch.autocast(x.device.type, enabled=False):  # a step's backward pass runs outside of autocast
            if outputs:
                torch.autograd.grad(outputs, inputs, slopes, allow_unused=True)

    def _compile(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.compilations += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def warn_of_failed_compiler(error: Exception, setting: str) -> None:
    """Name a failure of compiled blocks in one sentence; with `setting` they are not tried."""
    cause = getattr(error, "inner_exception", error)  # what the backend raised comes wrapped
    get_log().warning(
        f"the compiler failed ({type(cause).__name__}: {first_line(cause)}), so the blocks run uncompiled and slower; "
        f"{setting} does not try"
    )


class CheckpointedExecutor(LayerExecutor):
    """Activation checkpointing: the first `num_layers` layers keep only their input, and run again backwards."""

    def __init__(self, inner: LayerExecutor, num_layers: int) -> None:
        super().__init__(inner.dispatcher)
        self.inner, self.num_layers = inner, num_layers

    def run_block(self, block: TransformerBlock, x: Tensor, context: Context, layer: int) -> BlockOutput:
        if layer >= self.num_layers or not torch.is_grad_enabled():
            return self.inner.run_block(block, x, context, layer)
        again = capture_precision(x.device.type)
        return checkpoint(
            self.inner.run_block, block, x, context, layer,
            use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again()),
        )  # fmt: skip
