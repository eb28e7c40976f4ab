"""The train step with offloaded weights: fetched for each use, updated as soon as their gradient is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

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
from openm6.nn.block import build_block
from openm6.nn.config import ExpertsConfig
from openm6.nn.executor import LayerExecutor
from openm6.nn.moe import MoE
from openm6.offload.config import OffloadConfig
from openm6.offload.executor import OffloadedExecutor, Step
from openm6.offload.streams import Streams, open_streams
from openm6.offload.weight_store import RecordLayout, WeightStore, matrix_shapes
from openm6.optim.rules import WEIGHT, Slots, update_rule
from openm6.plan.memory import HALF
from openm6.train.budget import FULL, Budget, available, check_budget, on_device_groups
from openm6.train.config import LoopConfig
from openm6.train.pseudo_to_real import matrix_noise
from openm6.train.step import (
    StepReport,
    TrainStep,
    device_failures,
    resolve_precision,
    seed_everything,
)
from openm6.train.training_task import Batch, StepResult, TrainingTask


def open_train_step(training: TrainingTask, config: LoopConfig, checkpoints: Path | None = None) -> TrainStep:
    """The train_step that `config` asks for, of a run that is saved in `checkpoints`."""
    if config.offloaded:
        return OffloadedTrainStep(training, config, checkpoints=checkpoints)
    return TrainStep(training, config)


class OffloadedTrainStep(TrainStep):
    """Update the matrices of each group of layers during the backward pass, and all other parameters after it.

    The others are embeddings, heads, norms and routers: they stay on the device in fp32 under AdamW, whatever
    `precision` states, since they are few and sensitive. `max_grad_norm` bounds the norm of their gradient alone;
    matrices are clipped by their rule, because the norm of all gradients is not yet there when they are updated.
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
                "this kind of training has no blocks to offload: leave loop.offload and loop.optimizer.precision out"
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
        report = super().update(batch, step, total)
        moved = self.num_shards - int(self._skipped) if not report.applied else 0
        if moved:
            get_log().warning(
                f"step {step}: the weights of {self.num_shards - moved} layers had no finite gradient and stayed; "
                f"{moved} were updated"
            )
        return report

    def _backward(self, batch: Batch, step: int, rate: float) -> tuple[StepResult, Tensor]:
        self.executor.begin_step(Step(step, rate, self.config.optimizer.weight_decay, self.config.seed))
        with device_failures(lambda: step):
            with self.autocast():
                result = self.training.loss(batch)
            result.loss.backward()
            grad_norm, self._skipped = self.executor.end_step()
        self.ranks.sum_gradients(self.parameters)
        return result, torch.hypot(self._clip(), grad_norm)

    def delink(self, moments: Moments, noise: float = 0.0) -> None:
        groups, before = self.backbone.config.layer_groups, self.store
        before.synchronize()
        super().delink(moments)
        self._open_store(self.device)
        uses = Counter(groups)
        for layer, group in enumerate(groups):
            self.store.storage[layer].copy_(before.storage[group])
            if uses[group] > 1:
                for name, stored in self.store.stored(layer).items():
                    self._inherit(stored, moments, uses[group])
                    if noise:
                        self._add_noise(layer, name, stored, noise)
        before.free()

    @property
    def num_shards(self) -> int:
        return len(self.store.layouts)

    def shards(self) -> Iterator[Shard]:
        self.store.synchronize()
        for group in range(self.num_shards):
            shard = Shard({}, {})
            for own, name, slot, tensor in self._stored(group):
                part = self.weights.to_global(group, name, slot, tensor)
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
        others = self._on_device_tensors()
        for name, tensor in others.items():
            weights.read_into(name, tensor)
        pairs = ((name, kept.read(name)) for name in kept.names if name.partition(SEPARATOR)[0] in others)
        load_optimizer_state(pairs, self.optimizer, self.training.model, str(kept.folder))
        for group in range(self.num_shards):
            for own, _, slot, tensor in self._stored(group):
                (weights if slot in self.rule.read_slots else kept).read_into(own, tensor)
        self.store.invalidate()

    def _load_parts(self, folder: Path) -> None:
        """From the files of any number of ranks, what this one keeps."""
        others = self._on_device_tensors()
        known = {name for name, _ in self.training.model.named_parameters()} | set(others)
        reader = CheckpointReader(folder, "all")
        check_known(reader, known)
        load_parts(reader, others)
        load_optimizer(folder, self.optimizer, self.training.model, self.training.ranks.layout)
        for group, shard in enumerate(self.shards()):
            targets = {**shard.model, **shard.optimizer}
            load_parts(reader, targets)
            # A shard on the host was read where it is stored, a copy of one on a GPU was not.
            for own, _, _, tensor in self._stored(group):
                if not tensor.is_cpu:
                    tensor.copy_(self.weights.to_local(targets[own]))
        self.store.invalidate()

    def close(self) -> None:
        self.store.free()
        self.backbone.executor = LayerExecutor(self.executor.dispatcher)

    def _open_store(self, device: torch.device) -> None:
        """Open the store of all groups of layers, and the executor that uses it."""
        shapes = [matrix_shapes(block) for block in self.backbone.group_blocks]
        self.weights = self.training.ranks.layer_weights(shapes)
        layouts = [RecordLayout(self.weights.local_shapes(group), self.rule) for group in range(len(shapes))]
        budget = self.budget(layouts)
        free = available(device, self.offload, self._checkpoints)
        if self.config.stages is not None and self.backbone.config.stage == "pseudo":
            check_budget(self._later(budget), free, self.rule)
        check_budget(budget, free, self.rule)
        on_device = on_device_groups(budget, free)
        self.store = WeightStore(layouts, on_device, device, self._streams, self.offload.buffers, self.offload.pin)
        self.executor = self.backbone.executor = OffloadedExecutor(
            self.backbone.blocks,
            self.backbone.config.layer_groups,
            self.store,
            self.rule,
            self.offload,
            self.weights,
            self.backbone.executor.dispatcher,
        )

    def budget(self, layouts: list[RecordLayout]) -> Budget:
        """What the run will take on the device, in host memory and on the disk."""
        others = sum(parameter.numel() for parameter in self.training.model.parameters())
        others -= sum(torch.Size(shape).numel() for one in self.weights.shapes for shape in one.values())
        half = resolve_precision(self.config.precision, self.device) == "bf16"
        return Budget(
            self.backbone.config,
            layouts,
            others,
            -(-self.training.tokens_per_step // self.training.ranks.size),
            self.offload,
            value_bytes=HALF if half else FULL,
            checkpoints=0 if self._checkpoints is None else self.config.keep_last + 1,
            gathered=max(self.weights.gathered(group) for group in range(len(layouts))),
        )

    def _later(self, budget: Budget) -> Budget:
        """Of the real stage, while layers get their copies of the shared weights."""
        layouts = [budget.layouts[group] for group in self.backbone.config.layer_groups]
        real = self.backbone.config.model_copy(update={"sharing": None})
        beside = sum(layout.num_bytes for layout in budget.layouts)
        return replace(budget, config=real, layouts=layouts, beside=beside)

    def _fill(self) -> None:
        """The model's weights into the store, or first values drawn group by group; the model keeps their shapes."""
        config, seed = self.backbone.config, self.config.seed
        for group, block in enumerate(self.backbone.group_blocks):
            values = {name: matrix.detach() for name, matrix in block.matrices().items()}
            own = None
            if any(value.is_meta for value in values.values()):
                own = self._own_experts(group)
                values = first_values(config, group, seed, self.store.device, own)
            for name, stored in self.store.stored(group).items():
                part = self.weights.part(group, name, values[name], local_experts=own is not None)
                key = derive_seed(seed, "fill", group, name)
                self.rule.fill(stored, part.float(), key, self.weights.shard_spec(group, name))
            for module in block.shareable().values():
                module.to("meta").requires_grad_(False)
        self.store.invalidate()

    def _own_experts(self, group: int) -> range:
        """The indices of the experts of a group that this rank holds."""
        shape = self.weights.local_shapes(group).get("mlp.experts.up")
        if shape is None:
            return range(0)
        first = self.weights.shard_spec(group, "mlp.experts.up").first
        return range(first, first + shape[0])

    def _inherit(self, stored: Slots, moments: Moments, uses: int) -> None:
        """Divide the optimizer state that layers shared among them."""
        for slot, tensor in stored.items():
            if slot not in self.rule.read_slots:
                tensor.zero_() if moments == "reset" else tensor.mul_(moment_factor(slot, uses, moments))

    def _add_noise(self, layer: int, name: str, stored: Slots, noise: float) -> None:
        spec, seed = self.weights.shard_spec(layer, name), self.config.seed
        values = self.rule.read(stored, torch.float32)
        draw = matrix_noise(values, noise, derive_seed(seed, "delink", f"{layer}.{name}"), spec, spec.first)
        self.rule.write(stored, values + draw, derive_seed(seed, "delink round", layer, name), spec)

    def _on_device_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that are not offloaded."""
        named = named_tensors(self.training.model)
        return {name: tensor for name, tensor in named.items() if not tensor.is_meta}

    def _stored(self, group: int) -> Iterator[tuple[str, str, str, Tensor]]:
        """Each tensor in the store: its name in a checkpoint, that of its matrix in the block, its slot, and itself."""
        block = self.backbone.group_blocks[group]
        prefix = next(name for name, module in self.training.model.named_modules() if module is block)
        for name, stored in self.store.stored(group).items():
            for slot, tensor in stored.items():
                yield full_name(f"{prefix}.{name}", slot), name, slot, tensor


@torch.no_grad()
def first_values(config: BackboneConfig, group: int, seed: int, device: torch.device, own: range) -> dict[str, Tensor]:
    """First weights of one group of layers, of its experts those with an index in `own`.

    They depend on (seed, group) alone, those of an expert on (seed, group, expert): no two groups, and on several
    ranks no whole group, need to be in memory.
    """
    mlp = config.feed_forward(config.group_layers[group])
    single = mlp.model_copy(update={"num_experts": 1} if isinstance(mlp, ExpertsConfig) else {})
    seed_everything(seed, "weight set", group)
    with torch.device(device):
        block = build_block(config.attention, single)
    block.reset_matrices(config.deviation, config.output_deviation)
    values = {name: matrix.detach() for name, matrix in block.matrices().items()}
    if isinstance(block.mlp, MoE):
        expert = block.mlp.experts
        ups, downs = [], []
        for index in own:
            seed_everything(seed, "weight set", group, "expert", index)
            expert.reset_parameters(config.deviation, config.output_deviation)
            ups.append(expert.up.detach().clone())
            downs.append(expert.down.detach().clone())
        values |= {"mlp.experts.up": torch.cat(ups), "mlp.experts.down": torch.cat(downs)}
    return values


def full_name(parameter: str, slot: str) -> str:
    """The name of a slot in a checkpoint."""
    return parameter if slot == WEIGHT else f"{parameter}{SEPARATOR}{slot}"
