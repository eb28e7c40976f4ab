"""The train step with offloaded weights: fetched for each use, updated as soon as their gradient is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import SEPARATOR
from openm6.checkpoint.load import check_known, is_sharded, load_optimizer, load_parts, open_reader
from openm6.checkpoint.optimizer import Moments, load_optimizer_state, moment_factor
from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import Shard, named_tensors
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.log import get_log
from openm6.core.seeds import derive_seed
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.block import Block
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.moe import Experts
from openm6.offload.blocks import OffloadedBlocks, Step
from openm6.offload.config import OffloadConfig
from openm6.offload.streams import Streams, open_streams
from openm6.offload.weight_store import RecordLayout, WeightStore, set_shapes
from openm6.optim.registry import set_lr
from openm6.optim.rules import WEIGHT, Slots, update_rule
from openm6.optim.schedule import lr_multiplier
from openm6.plan.memory import HALF
from openm6.train.budget import FULL, Budget, available, check_budget, on_device_groups
from openm6.train.config import LoopConfig
from openm6.train.pseudo_to_real import matrix_noise
from openm6.train.step import (
    StepReport,
    TrainStep,
    device_failures,
    make_report,
    resolve_precision,
    seed_everything,
    sum_over_ranks,
)
from openm6.train.training_task import Batch, TrainingTask


def open_train_step(training: TrainingTask, config: LoopConfig, checkpoints: Path | None = None) -> TrainStep:
    """The train_step that `config` asks for, of a run that is saved in `checkpoints`."""
    if config.offloaded:
        return OffloadedTrainStep(training, config, checkpoints=checkpoints)
    return TrainStep(training, config)


class OffloadedTrainStep(TrainStep):
    """Update weight sets layer by layer during the backward pass, and everything else (the edges) after it.

    The edges are embeddings, heads, norms and routers: they stay on the device in fp32 under AdamW, whatever
    `bytes_per_parameter` states, since they are few and sensitive. `clip` bounds their gradient's norm alone; sets are
    clipped by their rule, because the norm of all gradients is not known while they are used up.
    """

    def __init__(
        self,
        training: TrainingTask,
        config: LoopConfig,
        streams: Streams | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """`streams` stand in for those of the device, in tests; `checkpoints` is where the run is saved, if it is.

        Raises:
            ConfigError: the training task has no blocks to offload, or memory or disk do not suffice.
        """
        if training.backbone is None:
            raise ConfigError(
                "this kind of training has no blocks to offload: leave loop.offload and "
                "loop.optimizer.bytes_per_parameter out"
            )
        self.training, self.config, self.ranks = training, config, training.ranks
        self.backbone: Backbone = training.backbone
        self.offload = config.offload or OffloadConfig()
        self.rule = update_rule(config.optimizer)
        self._checkpoints = checkpoints
        placed = next(parameter for parameter in training.model.parameters() if not parameter.is_meta)
        self.device = placed.device
        self._streams = streams or open_streams(self.device)
        self._open_store(self.device)
        self._fill()
        super().__init__(training, config)

    def update(self, batch: Batch, step: int, total: int | None) -> StepReport:
        optimizer = self.config.optimizer
        rate = optimizer.learning_rate * lr_multiplier(step, total, self.config.schedule) * self.lr_scale
        set_lr(self.optimizer, rate)
        seed_everything(self.config.seed, "step", step)
        self.blocks.begin_step(Step(step, rate, optimizer.weight_decay, self.config.seed))
        with device_failures(lambda: step):
            with self.autocast():
                result = self.training.loss(batch)
            result.loss.backward()
            facts = self.blocks.end_step()
        self.training.ranks.sum_gradients(self.parameters)
        norm = torch.hypot(self._clip(), facts.grad_norm)
        result, tokens = sum_over_ranks(result, batch.tokens, self.training.ranks)
        report = make_report(step, tokens, rate, result, norm)
        if report.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if report.applied:
            self.training.after_step(result)
        else:
            self._warn_skipped(step, int(facts.skipped))
        return report

    def delink(self, moments: Moments, noise: float = 0.0) -> None:
        numbers, before = self.backbone.config.weight_sets, self.store
        before.synchronize()
        super().delink(moments)
        self._open_store(self.device)
        uses = Counter(numbers)
        for layer, index in enumerate(numbers):
            self.store.storage[layer].copy_(before.storage[index])
            if uses[index] > 1:
                for name, stored in self.store.stored(layer).items():
                    self._inherit(stored, moments, uses[index])
                    if noise:
                        self._add_noise(layer, name, stored, noise)
        before.free()

    @property
    def num_shards(self) -> int:
        return len(self.store.layouts)

    def shards(self) -> Iterator[Shard]:
        self.store.synchronize()
        for index in range(self.num_shards):
            shard = Shard({}, {})
            for name, stored in self.store.stored(index).items():
                for slot, tensor in stored.items():
                    own = full_name(self._prefix(index) + name, slot)
                    part = self.sets.to_global(index, name, slot, tensor)
                    (shard.model if slot in self.rule.read_slots else shard.optimizer)[own] = part
            yield shard

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        if self.training.ranks.layout is not None or is_sharded(folder):
            self._load_parts(folder)
            return
        weights, kept = open_reader(folder), open_reader(folder, "optimizer")
        expected = {name for name, _ in self.training.model.named_parameters()}
        if unknown := {name for name in weights.names if name.partition(SEPARATOR)[0] not in expected} - {
            name for name, _ in self.training.model.named_buffers()
        }:
            raise CheckpointError(
                f"{folder} has {min(unknown)!r}, unknown to this model: "
                "convert it with openm6 convert, or load it with the config that it was saved with"
            )
        self._load_edges(weights, kept)
        for index in range(self.num_shards):
            for name, stored in self.store.stored(index).items():
                for slot, tensor in stored.items():
                    source = weights if slot in self.rule.read_slots else kept
                    source.read_into(full_name(self._prefix(index) + name, slot), tensor)
        self.store.invalidate()

    def _load_parts(self, folder: Path) -> None:
        """From the files of any number of ranks, what this one keeps."""
        edges = {
            name: tensor for name, tensor in named_tensors(self.training.model).items() if not tensor.is_meta
        }
        known = {name for name, _ in self.training.model.named_parameters()} | set(edges)
        reader = CheckpointReader(folder, "all")
        check_known(reader, known)
        load_parts(reader, edges)
        load_optimizer(folder, self.optimizer, self.training.model, self.training.ranks.layout)
        for index, shard in enumerate(self.shards()):
            targets = {**shard.model, **shard.optimizer}
            load_parts(reader, targets)
            self._to_device(index, targets)
        self.store.invalidate()

    def _to_device(self, index: int, read: dict[str, Tensor]) -> None:
        """Parts that were read on the host, for a set that stays on a GPU; others were read where they are stored."""
        for name, stored in self.store.stored(index).items():
            for slot, tensor in stored.items():
                if not tensor.is_cpu:
                    tensor.copy_(self.sets.to_local(read[full_name(self._prefix(index) + name, slot)]))

    def close(self) -> None:
        self.store.free()
        self.backbone.runner = None

    def _open_store(self, device: torch.device) -> None:
        """Open the store of all weight sets, and the runner that uses them."""
        self.sets = self.training.ranks.layer_weights(
            [set_shapes(cast(Block, block)) for block in self.backbone.sets]
        )
        layouts = [
            RecordLayout(self.sets.local_shapes(index), self.rule) for index in range(len(self.backbone.sets))
        ]
        budget = self.budget(layouts)
        free = available(device, self.offload, self._checkpoints)
        if self.config.stages is not None and self.backbone.config.stage == "pseudo":
            check_budget(self._later(budget), free, self.rule)
        check_budget(budget, free, self.rule)
        on_device = on_device_groups(budget, free)
        self.store = WeightStore(
            layouts, on_device, device, self._streams, self.offload.buffers, self.offload.pin
        )
        self.blocks = OffloadedBlocks(
            [cast(Block, block) for block in self.backbone.sets],
            self.backbone.config.weight_sets,
            self.store,
            self.rule,
            self.offload,
            self.sets,
        )
        self.backbone.runner = self.blocks

    def budget(self, layouts: list[RecordLayout]) -> Budget:
        """What the run will take, by place."""
        edges = sum(parameter.numel() for parameter in self.training.model.parameters())
        edges -= sum(torch.Size(shape).numel() for one in self.sets.shapes for shape in one.values())
        half = resolve_precision(self.config.precision, self.device) == "bf16"
        return Budget(
            self.backbone.config,
            layouts,
            edges,
            -(-self.training.tokens_per_step // self.training.ranks.size),
            self.offload,
            value_bytes=HALF if half else FULL,
            checkpoints=0 if self._checkpoints is None else self.config.keep_last + 1,
            gathered=max(self.sets.gathered(index) for index in range(len(layouts))),
        )

    def _later(self, budget: Budget) -> Budget:
        """Of the real stage, while layers get their copies of the shared sets."""
        layouts = [budget.layouts[index] for index in self.backbone.config.weight_sets]
        real = self.backbone.config.model_copy(update={"sharing": None})
        beside = sum(layout.num_bytes for layout in budget.layouts)
        return replace(budget, config=real, layouts=layouts, beside=beside)

    def _fill(self) -> None:
        """The model's weights into the store, or first values drawn set by set; the model keeps their shapes."""
        config = self.backbone.config
        for index, layout in enumerate(self.store.layouts):
            block = cast(Block, self.backbone.sets[index])
            values = {name: block.get_parameter(name).detach() for name in layout.shapes}
            own = None
            if any(value.is_meta for value in values.values()):
                own = self._own_experts(index)
                values = first_values(config, index, self.config.seed, self.store.device, own)
            for name, stored in self.store.stored(index).items():
                seed = self.config.seed
                part = self.sets.part(index, name, values[name], local_experts=own is not None)
                key = derive_seed(seed, "fill", index, name)
                self.rule.fill(stored, part.float(), key, self.sets.shard_spec(index, name))
                _empty_out(block, name)
        self.store.invalidate()

    def _own_experts(self, index: int) -> range:
        """The numbers of the experts of a set that this rank holds."""
        shape = self.sets.local_shapes(index).get("feed_forward.up", ())
        if len(shape) < 3:
            return range(0)
        first = self.sets.shard_spec(index, "feed_forward.up").first
        return range(first, first + shape[0])

    def _inherit(self, stored: Slots, moments: Moments, uses: int) -> None:
        """What a layer gets of a shared set's memory."""
        for slot, tensor in stored.items():
            if slot not in self.rule.read_slots:
                tensor.zero_() if moments == "reset" else tensor.mul_(moment_factor(slot, uses, moments))

    def _add_noise(self, layer: int, name: str, stored: Slots, noise: float) -> None:
        spec, seed = self.sets.shard_spec(layer, name), self.config.seed
        values = self.rule.read(stored, torch.float32)
        draw = matrix_noise(values, noise, derive_seed(seed, "delink", f"{layer}.{name}"), spec, spec.first)
        self.rule.write(stored, values + draw, derive_seed(seed, "delink round", layer, name), spec)

    def _load_edges(self, weights: CheckpointReader, kept: CheckpointReader) -> None:
        tensors = self.training.model.state_dict(keep_vars=True)
        edges = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
        for name, tensor in edges.items():
            if name in weights or not _is_alias(name, tensor, edges):
                weights.read_into(name, tensor.detach())
        names = {name for name, tensor in edges.items() if isinstance(tensor, nn.Parameter)}
        pairs = ((name, kept.read(name)) for name in kept.names if name.partition(SEPARATOR)[0] in names)
        load_optimizer_state(pairs, self.optimizer, self.training.model, str(kept.folder))

    def _prefix(self, index: int) -> str:
        """The name of a set within the whole model, up to its parameters."""
        block = self.backbone.sets[index]
        return next(f"{name}." for name, module in self.training.model.named_modules() if module is block)

    def _warn_skipped(self, step: int, skipped: int) -> None:
        moved = self.num_shards - skipped
        if moved:
            get_log().warning(
                f"step {step}: {skipped} weight sets had no finite gradient and stayed; {moved} had moved"
            )


@torch.no_grad()
def first_values(
    config: BackboneConfig, index: int, seed: int, device: torch.device, own: range
) -> dict[str, Tensor]:
    """First weights of one set, of its experts those numbered `own`.

    From (seed, set) alone, and for an expert (seed, set, expert): no two sets, and on several ranks no whole set, need
    to stand in memory.
    """
    part = config.feed_forward(config.weight_sets.index(index))
    seed_everything(seed, "weight set", index)
    with torch.device(device):
        block = Block(config.attention, _with_one_expert(part), None)
    block.reset_parameters(config.deviation, config.output_deviation)
    values = {name: parameter.detach() for name, parameter in block.named_parameters()}
    if isinstance(part, ExpertsConfig):
        drawn = [
            _first_expert(config, part, (seed, "weight set", index, "expert", one), device) for one in own
        ]
        values["feed_forward.up"] = torch.cat([up for up, _ in drawn])
        values["feed_forward.down"] = torch.cat([down for _, down in drawn])
    return values


def _first_expert(
    config: BackboneConfig, part: ExpertsConfig, words: tuple[Any, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    seed_everything(*words)
    alone = part.model_copy(update={"num_experts": 1, "top_k": 1, "num_prototypes": None, "num_shared": 0})
    with torch.device(device):
        expert = Experts(config.hidden_size, alone)
    expert.reset_parameters(config.deviation, config.output_deviation)
    return expert.up.detach(), expert.down.detach()


def _with_one_expert(part: DenseConfig | ExpertsConfig) -> DenseConfig | ExpertsConfig:
    return part if isinstance(part, DenseConfig) else part.model_copy(update={"num_experts": 1})


def _empty_out(block: Block, name: str) -> None:
    """Leaves the shape of a parameter and lets go of its memory."""
    path, _, leaf = name.rpartition(".")
    shape = block.get_parameter(name).shape
    empty = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    setattr(block.get_submodule(path), leaf, empty)


def _is_alias(name: str, tensor: Tensor, edges: dict[str, Tensor]) -> bool:
    """Whether a shared tensor was saved under an earlier name."""
    return next(first for first, other in edges.items() if other is tensor) != name


def full_name(parameter: str, slot: str) -> str:
    """The name of a slot in a checkpoint."""
    return parameter if slot == WEIGHT else f"{parameter}{SEPARATOR}{slot}"
