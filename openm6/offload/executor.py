"""A backbone's layers with weights that are fetched for each use, forwards and backwards, and updated as soon as their
gradient is known."""

# Dimensions: B rows, S tokens, D width, M micro-batches (parts of the rows), L layers of a span

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from openm6.core.seeds import derive_seed
from openm6.distributed.process_group import LayerWeights
from openm6.nn.block import BlockOutput, Context, TransformerBlock
from openm6.nn.executor import LayerExecutor, MakeContext, warn_of_failed_compiler
from openm6.nn.moe import RouterStats, TokenDispatcher
from openm6.offload.config import OffloadConfig
from openm6.offload.weight_store import Use, WeightStore
from openm6.ops.matmul import autocast_dtype, capture_precision
from openm6.ops.sequence import SequenceMeta
from openm6.optim.rules import UpdateArgs, UpdateRule

Key = TypeVar("Key", str, int)
Result = TypeVar("Result")
Gradients = dict[int, Tensor]  # of parameters, by their id
RunBlock = Callable[[TransformerBlock, dict[str, Tensor], Tensor, Context, int], BlockOutput]
Part = tuple[slice, Context, Tensor]  # of a batch: its rows, their context, their fraction of the valid tokens


class OffloadedExecutor(LayerExecutor):
    """Fetches the weights of each group of layers once for all micro-batches, and updates them at their last use."""

    offloaded = True

    def __init__(
        self, blocks: Sequence[TransformerBlock], layer_groups: Sequence[int], store: WeightStore, rule: UpdateRule,
        config: OffloadConfig, weights: LayerWeights, dispatcher: TokenDispatcher,
    ) -> None:  # fmt: skip
        """`blocks` contribute all but their matrices, of which `weights` is this rank's shard."""
        super().__init__(dispatcher)
        self.blocks, self.layer_groups = list(blocks), tuple(layer_groups)
        self.store, self.rule, self.config, self.weights = store, rule, config, weights
        self.max_grad_norm: float | None = None  # of each group of layers, as that of all is not there in time
        self._gathered: tuple[int, dict[str, Tensor]] | None = None  # the group that was gathered last
        self._compiled = config.compile and not weights.sharded  # a compiler does not trace collectives
        # Compiled as a function of (weights, tokens): weights in another buffer do not compile it again.
        self._run_block: RunBlock = torch.compile(run_block) if self._compiled else run_block
        self._step: tuple[int, float, float, int] | None = None  # number, learning rate, weight decay, seed
        size, layers = config.activation_checkpointing_every, range(len(self.blocks))
        self._spans = [tuple(layers[first : first + size]) for first in range(0, len(layers), size)]

    def begin_step(self, number: int, lr: float, weight_decay: float, seed: int) -> None:
        """Call it before the forward pass of a training step, whose backward pass will update the weights."""
        self._step = number, lr, weight_decay, seed
        self.updated: set[int] = set()
        self._gradients: dict[int, dict[str, Tensor]] = {}
        self._squares, self._skipped = (torch.zeros((), device=self.store.device) for _ in range(2))

    def end_step(self) -> tuple[Tensor, Tensor]:
        """Call it after the backward pass: the norm of all gradients, and how many groups had none that was finite."""
        self._step = None
        return self._squares.sqrt(), self._skipped

    def run(
        self, blocks: Sequence[TransformerBlock], x: Tensor, meta: SequenceMeta, make_context: MakeContext
    ) -> tuple[Tensor, list[RouterStats]]:
        learning = torch.is_grad_enabled()
        if learning and self._step is None:
            raise RuntimeError("begin_step must be called before a forward pass that is to learn")
        rows = _row_parts(meta, self.config.gradient_accumulation_steps if learning else 1)
        contexts = [make_context(x[one], part) for one, part in rows]
        counts = torch.stack([context.valid.sum() for context in contexts]).float()
        fractions = counts / counts.sum().clamp(min=1)
        parts = list(zip([one for one, _ in rows], contexts, fractions.unbind(), strict=True))
        self._gathered = None
        self.store.plan(self.uses(learning))
        found: list[RouterStats] = []
        for span in self._spans:
            # Without an argument that requires a gradient, autograd would keep no trace of the first trained span.
            # Ranks must gather the same weights, whichever adapters their rows use.
            trained = self.weights.sharded or any(self.store.layouts[self.layer_groups[one]].trained for one in span)
            requires_graph = torch.zeros((), device=x.device, requires_grad=learning and trained)
            own = {id(one): one for layer in span if learning for one in self._own_parameters(layer)}
            stats: list[RouterStats] = []
            x, *side_losses = _Span.apply(self, parts, span, stats, requires_graph, x, *own.values())
            found += [replace(one, side_loss=loss) for one, loss in zip(stats, side_losses, strict=True)]
        return x, found

    def uses(self, learning: bool) -> list[Use]:
        """The groups that a pass will open, in order; the backward pass goes over each span forward once more.

        It ends early if all that is left, from the first span on, is frozen.
        """
        groups = self.layer_groups
        found = [Use(group, whole=False) for group in groups]
        if learning:
            for span in reversed(self._spans):
                found += [Use(groups[layer], whole=False) for layer in span[:-1]]
                found += [Use(groups[layer], self._is_updated_after(layer)) for layer in reversed(span)]
        return found

    def forward_layer(self, parts: list[Part], layer: int, x: Tensor) -> BlockOutput:
        """B S D -> B S D and, of a sparse layer, the router's statistics; without a graph."""
        group = self.layer_groups[layer]
        block, weights = self.blocks[layer], self._open(group, x)

        def forward(rows: slice, context: Context, _: Tensor, run: RunBlock) -> BlockOutput:
            # Only a cache needs the layer's index; otherwise it is 0, so that one compiled block serves all layers.
            return run(block, weights, x[rows], context, 0 if context.cache is None else layer)

        outputs = [self._attempt(partial(forward, *part)) for part in parts]
        self.store.close(group)
        stats = [(one, fraction) for (_, one), (_, _, fraction) in zip(outputs, parts, strict=True) if one is not None]
        y = outputs[0][0] if len(outputs) == 1 else torch.cat([output for output, _ in outputs])
        return y, _blend(stats, layer) if stats else None

    def backward_layer(
        self, parts: list[Part], layer: int, x: Tensor, gradient: Tensor, side: Tensor | None, own_gradients: Gradients
    ) -> Tensor:
        """Run a layer again with a graph; return the gradient of x, add own ones by id, update at the last use.

        Frozen weights have no gradient.
        """
        group = self.layer_groups[layer]
        if self._step is None or group in self.updated:
            raise RuntimeError(
                f"the weights of layer {layer} were updated in this step: run backward once for each forward"
            )
        weights, own = self._open(group, x), self._own_parameters(layer)
        trained = {name: weights[name].detach().requires_grad_() for name in self.store.layouts[group].trained}
        weights |= trained

        def backward(rows: slice, context: Context, fraction: Tensor, run: RunBlock) -> tuple[Tensor, ...]:
            part = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                y, stats = run(self.blocks[layer], weights, part, context, 0)
            results, slopes = [y], [gradient[rows].to(y.dtype)]
            if stats is not None and side is not None and stats.side_loss.requires_grad:
                results, slopes = [y, stats.side_loss], [*slopes, side * fraction]
            return torch.autograd.grad(results, [part, *trained.values(), *own], slopes, allow_unused=True)

        gradients: list[Tensor] = []
        for one in parts:
            found = self._attempt(partial(backward, *one))
            gradients.append(found[0])
            _add(self._gradients.setdefault(group, {}), trained, found[1 : 1 + len(trained)])
            _add(own_gradients, map(id, own), found[1 + len(trained) :])
        changed = self._is_updated_after(layer)
        if changed:
            self._update(group)
        self.store.close(group, changed)
        return gradients[0] if len(gradients) == 1 else torch.cat(gradients)

    def _attempt(self, work: Callable[[RunBlock], Result]) -> Result:
        """Return `work` with compiled blocks or, from their first failure on, with plain ones; it may run twice."""
        try:
            return work(self._run_block)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if not self._compiled:
                raise
            warn_of_failed_compiler(error, "loop.offload.compile=false")
        self._compiled, self._run_block = False, run_block
        return work(run_block)

    def _open(self, group: int, x: Tensor) -> dict[str, Tensor]:
        """The group's weights in the dtype of computation."""
        dtype = autocast_dtype(x)
        self._opened = self.store.open(group)
        if self._gathered is None or self._gathered[0] != group:  # layers that share weights gather them once
            self._gathered = None  # free it before the next one is gathered
            sharded = {name: one for name, one in self._opened.items() if self.weights.is_sharded(group, name)}
            parts = {name: self.rule.read(stored, dtype) for name, stored in sharded.items()}
            self._gathered = group, self.weights.gather(group, parts) if parts else {}
        gathered = self._gathered[1]
        return {
            name: gathered[name] if name in gathered else self.rule.read(stored, dtype)
            for name, stored in self._opened.items()
        }

    def _update(self, group: int) -> None:
        """Update the group that is open, unless its gradient is not finite."""
        assert self._step is not None
        (number, lr, weight_decay, seed), gradients = self._step, self._gradients.pop(group)
        self._gathered = None
        with self.store.span("update"):
            gradients = self.weights.reduce(group, gradients)
            norms = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients.values()]
            square = self.weights.all_reduce(torch.stack(norms).square().sum())
            allowed = torch.isfinite(square)
            bound = self.max_grad_norm
            scale = None if bound is None else (bound / (square.sqrt() + 1e-6)).clamp(max=1.0)
            for name, gradient in gradients.items():
                # One at a time: the gradients of a group twice would not fit.
                gradient = gradient if scale is None else gradient * scale
                key = derive_seed(seed, "round", number, group, name)
                args = UpdateArgs(lr, weight_decay, key, allowed, self.weights.shard_spec(group, name))
                self.rule.update(self._opened[name], gradient, args)
        self._squares += square
        self._skipped += ~allowed
        self.updated.add(group)

    def _is_updated_after(self, layer: int) -> bool:
        """Whether the backward pass, from the last layer to the first, uses the layer's trained weights last here."""
        group = self.layer_groups[layer]
        return bool(self.store.layouts[group].trained) and self.layer_groups.index(group) == layer

    def _own_parameters(self, layer: int) -> list[nn.Parameter]:
        """What a layer trains besides its group's matrices and stays on the device: norms, router, low-rank updates."""
        matrices = {id(one) for one in self.blocks[layer].matrices().values()}
        return [one for one in self.blocks[layer].parameters() if one.requires_grad and id(one) not in matrices]


class _Span(torch.autograd.Function):
    """A few layers; forward keeps only their input, backward runs them again."""

    @staticmethod
    def forward(
        ctx: Any, executor: OffloadedExecutor, parts: list[Part], span: Sequence[int], stats: list[RouterStats],
        requires_graph: Tensor, x: Tensor, *own: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return the output and the side loss of each sparse layer, whose statistics are appended to `stats`."""
        if any(ctx.needs_input_grad):
            ctx.x = x.detach()
            if executor.config.activation_storage == "host" and x.is_cuda:
                # Both copies go through the current stream: the way out is paid by the forward pass, which has time
                # while weights arrive, and the tensor's memory on the GPU is free for the next layer at once.
                ctx.x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(ctx.x, non_blocking=True)
            ctx.arguments = (executor, parts, span, [id(one) for one in own])
            ctx.precision = capture_precision(x.device.type)
        for layer in span:
            x, one = executor.forward_layer(parts, layer, x)
            if one is not None:
                stats.append(one)
        ctx.set_materialize_grads(False)
        return (x, *(one.side_loss for one in stats))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *side_losses: Tensor | None) -> tuple[Tensor | None, ...]:
        executor, parts, span, own = ctx.arguments
        inputs, sides = [ctx.x.to(executor.store.device, non_blocking=True)], list(side_losses)
        found: Gradients = {}
        with ctx.precision():
            for layer in span[:-1]:
                inputs.append(executor.forward_layer(parts, layer, inputs[-1])[0])
            for layer in reversed(span):
                side = None if executor.blocks[layer].router is None else sides.pop()
                gradient = executor.backward_layer(parts, layer, inputs.pop(), gradient, side, found)
        return (None, None, None, None, None, gradient, *(found.get(one) for one in own))


def run_block(
    block: TransformerBlock, weights: dict[str, Tensor], x: Tensor, context: Context, layer: int
) -> BlockOutput:
    return functional_call(block, weights, (x, context, layer))


def _row_parts(meta: SequenceMeta, parts: int) -> list[tuple[slice, SequenceMeta]]:
    """Up to `parts` parts of the rows, as even as can be."""
    count = max(1, min(parts, meta.batch))
    borders = [round(part * meta.batch / count) for part in range(count + 1)]
    rows = [slice(first, last) for first, last in itertools.pairwise(borders)]
    return [(one, SequenceMeta(*(part[one] for part in meta.parts()))) for one in rows]


def _blend(stats: list[tuple[RouterStats, Tensor]], layer: int) -> RouterStats:
    """The statistics of all parts, each with its fraction: loads add up, the rest is a mean by valid tokens."""
    if len(stats) == 1:
        return replace(stats[0][0], layer=layer)
    load, none = torch.stack([one.load for one, _ in stats]).sum(0), torch.zeros_like(stats[0][1])
    dropped = sum((one.dropped * fraction for one, fraction in stats), none)
    return RouterStats(layer, load, dropped, sum((one.side_loss * fraction for one, fraction in stats), none))


def _add(total: dict[Key, Tensor], keys: Iterable[Key], found: Sequence[Tensor | None]) -> None:
    """Add gradients to those of the same key, in place."""
    for key, gradient in zip(keys, found, strict=True):
        if gradient is not None:
            total[key] = gradient if key not in total else total[key].add_(gradient)
