"""A backbone's layers with weights that are fetched for each use, forwards and backwards, and updated as soon as their
gradient is known."""

# Dimensions: B rows, S tokens, D width, M micro-batches (parts of the rows), L layers of a group

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from openm6.core.seeds import derive_seed
from openm6.nn.block import Block, Context, LayerParts, MakeContext
from openm6.nn.moe import RouterStats
from openm6.offload.config import OffloadConfig
from openm6.offload.weight_store import Use, WeightStore
from openm6.ops.matmul import capture_precision
from openm6.ops.sequence import SequenceMeta
from openm6.optim.rules import UpdateArgs, UpdateRule
from openm6.parallel.process_group import LayerWeights

LayerOutput = tuple[Tensor, RouterStats | None]
Run = Callable[[Block, dict[str, Tensor], Tensor, LayerParts, Context, int], LayerOutput]


@dataclass(frozen=True)
class Step:
    """What an update needs to know during the backward pass."""

    number: int
    rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class BackwardFacts:
    """Of a backward pass: the norm of all gradients, and how many sets were skipped because theirs was not finite."""

    grad_norm: Tensor
    skipped: Tensor


class ActivationCheckpoint:
    """The input of a group of layers, kept from the forward pass to the backward one, on the device."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()

    def restore(self) -> Tensor:
        """Return the tensor on its device, for the last time."""
        return self._x


class HostCheckpoint(ActivationCheckpoint):
    """One that waits in pinned host memory.

    Both copies go through the current stream: the way out is paid by the forward pass, which has time while weights
    arrive, and the tensor's memory on the GPU is free for the next layer at once.
    """

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        self._x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._x.copy_(x.detach(), non_blocking=True)

    def restore(self) -> Tensor:
        return self._x.to(self._device, non_blocking=True)


def save_input(x: Tensor, where: Literal["device", "host"]) -> ActivationCheckpoint:
    """Keep `x` on the device, or in host memory if the device is a GPU."""
    return HostCheckpoint(x) if where == "host" and x.is_cuda else ActivationCheckpoint(x)


class OffloadedBlocks:
    """A `BlockRunner`: each weight set is fetched once for all micro-batches, and updated at its last use."""

    def __init__(
        self,
        blocks: Sequence[Block],
        weight_sets: Sequence[int],
        store: WeightStore,
        rule: UpdateRule,
        config: OffloadConfig,
        sets: LayerWeights,
    ) -> None:
        """`blocks` bring their structure and routers, not their matrices. `sets` is this rank's shard of them."""
        self.blocks, self.weight_sets = list(blocks), tuple(weight_sets)
        self.store, self.rule, self.config, self.sets = store, rule, config, sets
        self._gathered: tuple[int, dict[str, Tensor]] | None = None  # the set that was gathered last
        device = store.device
        compiled = config.compile and not sets.sharded  # a compiler does not trace collectives
        self._run_block = _compiled_run() if compiled else run_block
        self._step: Step | None = None
        self._updated: set[int] = set()
        self._gradients: dict[int, dict[str, Tensor]] = {}
        self._squares = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        size, layers = config.activation_checkpointing_every, range(len(self.weight_sets))
        self._groups = [tuple(layers[first : first + size]) for first in range(0, len(layers), size)]

    def begin_step(self, step: Step) -> None:
        """Call it before the forward pass of a training step, whose backward pass will move the weights."""
        self._step, self._updated, self._gradients = step, set(), {}
        self._squares, self._skipped = torch.zeros_like(self._squares), torch.zeros_like(self._skipped)

    def end_step(self) -> BackwardFacts:
        """Call it after the backward pass."""
        self._step = None
        return BackwardFacts(self._squares.sqrt(), self._skipped)

    def run(
        self, x: Tensor, meta: SequenceMeta, layers: Sequence[LayerParts], make_context: MakeContext
    ) -> tuple[Tensor, list[RouterStats]]:
        learning = torch.is_grad_enabled()
        parts = _row_parts(meta, x, self.config.gradient_accumulation_steps if learning else 1)
        contexts = [make_context(x[rows], part) for rows, part in parts]
        batch = _Batch(contexts, [rows for rows, _ in parts], _shares(contexts))
        if learning and self._step is None:
            raise RuntimeError("begin_step must be called before a forward pass that is to learn")
        self._gathered = None
        self.store.plan(self.uses(learning))
        # Without an argument that wants a gradient, autograd would keep no trace of the first group.
        anchor = torch.zeros((), device=x.device, requires_grad=learning)
        loads: list[RouterStats] = []
        for group in self._groups:
            edges = self._edges(group, layers)
            x, *reports = _Group.apply(self, batch, group, layers, anchor, x, *edges)
            loads += _reports(reports, [layer for layer in group if self._is_sparse(layer)])
        return x, loads

    def uses(self, learning: bool) -> list[Use]:
        """The sets that a pass will open, in order; the backward pass goes over each group forward once more."""
        sets = self.weight_sets
        found = [Use(index, whole=False) for index in sets]
        if learning:
            for group in reversed(self._groups):
                found += [Use(sets[layer], whole=False) for layer in group[:-1]]
                found += [Use(sets[layer], self._is_last_use(layer)) for layer in reversed(group)]
        return found

    def forward_group(
        self, batch: _Batch, group: Sequence[int], layers: Sequence[LayerParts], x: Tensor
    ) -> Any:
        """B S D -> B S D and the reports of the group's sparse layers, without a graph."""
        reports: list[RouterStats] = []
        for layer in group:
            x, report = self._forward_layer(batch, layer, layers[layer], x)
            reports += [] if report is None else [report]
        return x, reports

    def backward_group(
        self,
        batch: _Batch,
        group: Sequence[int],
        layers: Sequence[LayerParts],
        x: Tensor,
        gradient: Tensor,
        sides: list[Tensor | None],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return gradients of the group's input and, by identity, of its edges; update sets whose last use this was."""
        inputs = [x]
        for layer in group[:-1]:
            inputs.append(self._forward_layer(batch, layer, layers[layer], inputs[-1])[0])
        edges: dict[int, Tensor] = {}
        for layer in reversed(group):
            side = sides.pop() if self._is_sparse(layer) else None
            gradient = self._backward_layer(batch, layer, layers[layer], inputs.pop(), gradient, side, edges)
        return gradient, edges

    def _forward_layer(
        self, batch: _Batch, layer: int, parts: LayerParts, x: Tensor
    ) -> tuple[Tensor, RouterStats | None]:
        index = self.weight_sets[layer]
        block, weights = self.blocks[index], self._open(index, x)
        outputs = [
            self._run_block(block, weights, x[rows], parts, context, _number_for(context, layer))
            for rows, context in zip(batch.rows, batch.contexts, strict=True)
        ]
        self.store.close(index)
        reports = [report for _, report in outputs if report is not None]
        y = outputs[0][0] if len(outputs) == 1 else torch.cat([output for output, _ in outputs])
        return y, _blend(reports, batch.shares, layer) if reports else None

    def _backward_layer(
        self,
        batch: _Batch,
        layer: int,
        parts: LayerParts,
        x: Tensor,
        gradient: Tensor,
        side: Tensor | None,
        edges: dict[int, Tensor],
    ) -> Tensor:
        """Run the layer again with a graph, part by part, and add up gradients of weights and edges."""
        index = self.weight_sets[layer]
        if index in self._updated or self._step is None:
            raise RuntimeError(
                f"weight set {index} was updated in this step: run backward once for each forward"
            )
        weights = {name: weight.detach().requires_grad_() for name, weight in self._open(index, x).items()}
        own = self._layer_edges(layer, parts)
        wanted = [*weights.values(), *own]
        gradients: list[Tensor] = []
        for rows, context, share in zip(batch.rows, batch.contexts, batch.shares, strict=True):
            part = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                y, report = self._run_block(self.blocks[index], weights, part, parts, context, 0)
            results, slopes = [y], [gradient[rows].to(y.dtype)]
            if report is not None and side is not None and report.side_loss.requires_grad:
                results, slopes = [y, report.side_loss], [*slopes, side * share]
            found = torch.autograd.grad(results, [part, *wanted], slopes, allow_unused=True)
            gradients.append(found[0])
            self._add(index, dict(zip(weights, found[1 : 1 + len(weights)], strict=True)))
            _add_edges(edges, own, found[1 + len(weights) :])
        changed = self._is_last_use(layer)
        if changed:
            self._update(index)
        self.store.close(index, changed)
        return gradients[0] if len(gradients) == 1 else torch.cat(gradients)

    def _open(self, index: int, x: Tensor) -> dict[str, Tensor]:
        """The set's weights in the dtype of computation."""
        kind = x.device.type
        half = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else torch.float32
        self._opened = self.store.open(index)
        sharded = {n: stored for n, stored in self._opened.items() if self.sets.is_sharded(index, n)}
        if self._gathered is None or self._gathered[0] != index:  # layers that share a set gather it once
            self._gathered = None  # free it before the next one is gathered
            parts = {name: self.rule.read(stored, dtype) for name, stored in sharded.items()}
            self._gathered = index, self.sets.gather(index, parts) if parts else {}
        gathered = self._gathered[1]
        return {
            name: gathered[name] if name in gathered else self.rule.read(stored, dtype)
            for name, stored in self._opened.items()
        }

    def _add(self, index: int, found: dict[str, Tensor | None]) -> None:
        total = self._gradients.setdefault(index, {})
        for name, gradient in found.items():
            if gradient is not None:
                total[name] = gradient if name not in total else total[name].add_(gradient)

    def _update(self, index: int) -> None:
        """Update the set that is open, unless its gradient is not finite."""
        step, gradients = self._step, self._gradients.pop(index)
        assert step is not None
        self._gathered = None
        with self.store.timer.span("update"):
            gradients = self.sets.reduce(index, gradients)
            norms = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients.values()]
            square = self.sets.all_reduce(torch.stack(norms).square().sum())
            allowed = torch.isfinite(square)
            for name, gradient in gradients.items():
                key = derive_seed(step.seed, "round", step.number, index, name)
                spec = self.sets.shard_spec(index, name)
                args = UpdateArgs(step.rate, step.weight_decay, key, allowed, spec)
                self.rule.update(self._opened[name], gradient, args)
        self._squares += square
        self._skipped += ~allowed
        self._updated.add(index)

    def _is_last_use(self, layer: int) -> bool:
        """Whether the backward pass, from the last layer to the first, needs the layer's set no more after it."""
        return self.weight_sets.index(self.weight_sets[layer]) == layer

    def _is_sparse(self, layer: int) -> bool:
        return self.blocks[self.weight_sets[layer]].sparse

    def _layer_edges(self, layer: int, parts: LayerParts) -> list[nn.Parameter]:
        """What a layer uses besides its set's matrices: norms and the router, which stay on the device."""
        router = self.blocks[self.weight_sets[layer]].router
        own = [*parts.parameters(), *(router.parameters() if router is not None else ())]
        return [parameter for parameter in own if parameter.requires_grad]

    def _edges(self, group: Sequence[int], layers: Sequence[LayerParts]) -> list[nn.Parameter]:
        """The edges of a group, each once."""
        found = {id(edge): edge for layer in group for edge in self._layer_edges(layer, layers[layer])}
        return list(found.values())


@dataclass(frozen=True)
class _Batch:
    """The parts of a batch: what layers must know of each, its rows, and its share of the valid tokens."""

    contexts: list[Context]
    rows: list[slice]
    shares: list[Tensor]


class _Group(torch.autograd.Function):
    """A few layers; forward keeps only their input, backward runs them again."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: OffloadedBlocks,
        batch: _Batch,
        group: Sequence[int],
        layers: Sequence[LayerParts],
        anchor: Tensor,
        x: Tensor,
        *edges: Tensor,
    ) -> tuple[Tensor, ...]:
        y, reports = blocks.forward_group(batch, group, layers, x)
        if ctx.needs_input_grad[4]:
            ctx.checkpoint = save_input(x, blocks.config.activation_storage)
            ctx.given = (blocks, batch, group, layers, [id(edge) for edge in edges])
            ctx.precision = capture_precision(x.device.type)
        flat = [part for report in reports for part in _tensors_of(report)]
        ctx.mark_non_differentiable(*(part for index, part in enumerate(flat) if index % 5 != 4))
        ctx.set_materialize_grads(False)
        return (y, *flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *of_reports: Tensor | None) -> tuple[Tensor | None, ...]:
        blocks, batch, group, layers, names = ctx.given
        checkpoint: ActivationCheckpoint = ctx.checkpoint
        x = checkpoint.restore()
        with ctx.precision():
            sides = list(of_reports[4::5])
            found, edges = blocks.backward_group(batch, group, layers, x, gradient, sides)
        return (None, None, None, None, None, found, *(edges.get(name) for name in names))


def run_block(
    block: Block, weights: dict[str, Tensor], x: Tensor, parts: LayerParts, context: Context, layer: int
) -> tuple[Tensor, RouterStats | None]:
    """One layer with these weights in place of its own."""
    return functional_call(block, weights, (x, parts, context, layer))


def _number_for(context: Context, layer: int) -> int:
    """Only a cache asks for the layer's index; otherwise it is 0, so that one compiled block serves all layers."""
    return layer if context.cache is not None else 0


@functools.cache
def _compiled_run() -> Run:
    """Compile a function of (weights, tokens): buffers that change places do not recompile it."""
    return torch.compile(run_block)


def _row_parts(meta: SequenceMeta, x: Tensor, wanted: int) -> list[tuple[slice, SequenceMeta]]:
    """Up to `wanted` parts of the rows, as even as can be."""
    count = max(1, min(wanted, meta.batch))
    if count == 1:
        return [(slice(None), meta)]
    borders = [round(part * meta.batch / count) for part in range(count + 1)]
    rows = [slice(first, last) for first, last in itertools.pairwise(borders)]
    return [(one, SequenceMeta(*(part[one] for part in meta.parts()), causal=meta.causal)) for one in rows]


def _shares(contexts: list[Context]) -> list[Tensor]:
    """Each part's share of the valid tokens; exactly 1 for a single part."""
    if len(contexts) == 1:
        return [torch.ones((), device=contexts[0].valid.device)]
    counts = torch.stack([context.valid.sum() for context in contexts]).float()
    return list((counts / counts.sum().clamp(min=1)).unbind())


def _blend(reports: list[RouterStats], shares: list[Tensor], layer: int) -> RouterStats:
    """One report of all parts: loads add up, the rest is a mean by valid tokens."""
    if len(reports) == 1:
        return replace(reports[0], layer=layer)
    columns = list(zip(*(_tensors_of(report) for report in reports), strict=True))
    means = [sum(part * share for part, share in zip(column, shares, strict=True)) for column in columns[1:]]
    return RouterStats(layer, torch.stack(columns[0]).sum(0), *means)


def _tensors_of(report: RouterStats) -> tuple[Tensor, ...]:
    """Return the tensors of a report, the one with a gradient last."""
    return report.load, report.aux_loss, report.z_loss, report.dropped, report.side_loss


def _reports(flat: list[Tensor], layers: list[int]) -> list[RouterStats]:
    return [RouterStats(layer, *flat[5 * place : 5 * place + 5]) for place, layer in enumerate(layers)]


def _add_edges(edges: dict[int, Tensor], own: list[nn.Parameter], found: Sequence[Tensor | None]) -> None:
    for edge, gradient in zip(own, found, strict=True):
        if gradient is not None:
            edges[id(edge)] = gradient if id(edge) not in edges else edges[id(edge)] + gradient
