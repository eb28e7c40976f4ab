"""The train step with offloaded weights: fetched for each use, updated as soon as their gradient is known."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openm6.checkpoint.folder import EXPONENT, SEPARATOR
from openm6.checkpoint.load import check_names, load_optimizer, load_parts, read_weight
from openm6.checkpoint.optimizer import Moments, moment_factor
from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import Shard, named_tensors
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.core.seeds import derive_seed
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.block import build_block
from openm6.nn.config import ExpertsConfig
from openm6.nn.executor import LayerExecutor
from openm6.nn.moe import MoE
from openm6.offload.config import OffloadConfig
from openm6.offload.executor import OffloadedExecutor
from openm6.offload.weight_store import RecordLayout, WeightStore, matrix_shapes, open_streams
from openm6.optim.rules import WEIGHT, update_rule
from openm6.plan.memory import FULL, HALF
from openm6.train.budget import Budget, available, check_budget
from openm6.train.config import LoopConfig
from openm6.train.step import StepReport, TrainStep, matrix_noise, resolve_precision, seed_everything
from openm6.train.training_task import Batch, StepResult, TrainingTask


def open_train_step(training: TrainingTask, config: LoopConfig, checkpoints: Path | None = None) -> TrainStep:
    return OffloadedTrainStep(training, config, checkpoints) if config.offloaded else TrainStep(training, config)


class OffloadedTrainStep(TrainStep):
    """Update the matrices of each group of layers during the backward pass, and all other parameters after it.

    The others are embeddings, heads, norms, routers and low-rank updates: they stay on the device in fp32 under AdamW,
    whatever `precision` states, since they are few and sensitive. `max_grad_norm` bounds the norm of their gradient
    alone, because the norm of all gradients is not yet there when matrices are updated. At `precision: fp32` it also
    bounds that of each group of layers; at others, matrices are clipped by their rule.
    Frozen matrices are only read: the store holds no optimizer state of them, and does not write them back.
    """

    def __init__(self, training: TrainingTask, config: LoopConfig, checkpoints: Path | None = None) -> None:
        """Raise ConfigError if there are no blocks, or memory or the disk of `checkpoints` (None: unsaved) run out."""
        if training.backbone is None:
            raise ConfigError(
                "this kind of training has no blocks to offload: leave loop.offload and loop.optimizer.precision out"
            )
        if training.backbone.config.modality_experts:
            raise ConfigError(
                "modality experts are trained without offloading: leave loop.offload and loop.optimizer.precision out"
            )
        self.training, self.config, self.ranks = training, config, training.ranks
        self.backbone: Backbone = training.backbone
        self.offload = config.offload or OffloadConfig()
        self.rule = update_rule(config.optimizer)
        self._checkpoints = checkpoints
        self.device = next(parameter.device for parameter in training.model.parameters() if not parameter.is_meta)
        self._streams = open_streams(self.device)
        self._open_store()
        self._fill()
        super().__init__(training, config)

    def update(self, batch: Batch, step: int, total: int | None) -> StepReport:
        report = super().update(batch, step, total)
        if not report.applied and (moved := len(self.executor.updated) - int(self._skipped)):
            get_log().warning(
                f"step {step}: the weights of {int(self._skipped)} layers had no finite gradient and stayed; "
                f"{moved} were updated"
            )
        return report

    def _backward(self, batch: Batch, step: int, rate: float) -> tuple[StepResult, Tensor]:
        self.executor.begin_step(step, rate, self.config.optimizer.weight_decay, self.config.seed)
        result, norm = super()._backward(batch, step, rate)
        grad_norm, self._skipped = self.executor.end_step()
        return result, torch.hypot(norm, grad_norm)

    def delink(self, moments: Moments, noise: float = 0.0) -> None:
        groups, before, seed = self.backbone.config.layer_groups, self.store, self.config.seed
        before.synchronize()
        super().delink(moments, noise)
        torch.cuda.empty_cache()
        self._open_store(sum(one.nbytes for state in self.optimizer.state.values() for one in state.values()))
        uses = Counter(groups)
        for layer, group in enumerate(groups):
            self.store.storage[layer].copy_(before.storage[group])
            if uses[group] == 1:
                continue
            for name, stored in self.store.stored(layer).items():
                for slot in stored.keys() - set(self.rule.read_slots):  # what layers shared is divided among them
                    kept = stored[slot]
                    kept.zero_() if moments == "reset" else kept.mul_(moment_factor(slot, uses[group], moments))
                if noise:
                    spec, values = self.weights.shard_spec(layer, name), self.rule.read(stored, torch.float32)
                    draw = matrix_noise(values, noise, derive_seed(seed, "delink", f"{layer}.{name}"), spec, spec.first)
                    self.rule.write(stored, values + draw, derive_seed(seed, "delink round", layer, name), spec)
        before.free()

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
        """From one file of a checkpoint, or from those of any number of ranks, what this rank keeps."""
        model = self.training.model
        others = {name: tensor for name, tensor in named_tensors(model).items() if not tensor.is_meta}
        reader = CheckpointReader(folder, "all")
        check_names(reader, set(), {name for name, _ in model.named_parameters()} | set(others))
        load_parts(reader, others)
        load_optimizer(folder, self.optimizer, model, self.training.ranks.layout)
        self._read(reader, state=True)

    def close(self) -> None:
        self.store.free()
        self.backbone.executor = LayerExecutor(self.executor.dispatcher)

    def _open_store(self, moments: int = 0) -> None:
        """`moments`: bytes of those that the optimizer of other parameters holds already."""
        config = self.backbone.config
        blocks = self.backbone.group_blocks
        self.weights = self.training.ranks.layer_weights([matrix_shapes(block) for block in blocks])
        frozen = [[name for name, one in block.matrices().items() if not one.requires_grad] for block in blocks]
        layouts = [
            RecordLayout(self.weights.local_shapes(group), self.rule, frozen[group]) for group in range(len(blocks))
        ]
        self.num_shards = len(layouts)
        budget = self.budget(layouts, moments)
        if self.config.stages is not None and config.stage == "pseudo":
            # The real stage, while layers get their copies of the shared weights.
            copies, beside = [layouts[group] for group in config.layer_groups], sum(one.num_bytes for one in layouts)
            real = config.model_copy(update={"sharing": None})
            check_budget(replace(budget, config=real, layouts=copies, beside=beside), self.rule)
        check_budget(budget, self.rule)
        self.store = WeightStore(
            layouts, budget.on_device, self.device, self._streams, self.offload.buffers, self.offload.pin
        )
        dispatcher = self.backbone.executor.dispatcher
        self.executor = self.backbone.executor = OffloadedExecutor(
            self.backbone.blocks, config.layer_groups, self.store, self.rule, self.offload, self.weights, dispatcher
        )
        self.executor.max_grad_norm = None if self.rule.clips else self.config.max_grad_norm

    def budget(self, layouts: list[RecordLayout], moments: int = 0) -> Budget:
        matrices = {id(one) for block in self.backbone.group_blocks for one in block.matrices().values()}
        others = [one for one in self.training.model.parameters() if id(one) not in matrices]
        kept = self.config.keep_last + 1 + self.config.load_best_model_at_end
        held = sum(one.nbytes for one in others) + moments
        ranks, free = self.training.ranks, available(self.device, self.offload, self._checkpoints, held)
        ranks.gather(None)  # nobody allocates before all have seen what is free
        half = resolve_precision(self.config.precision, self.device) == "bf16"
        tokens = -(-self.training.tokens_per_step // ranks.size)
        return Budget(
            self.backbone.config, layouts, sum(one.numel() for one in others), tokens, self.offload, free,
            frozen=sum(one.numel() for one in others if not one.requires_grad),
            value_bytes=HALF if half else FULL, checkpoints=0 if self._checkpoints is None else kept,
            stem_elements=self.training.stem_elements,
            gathered=max(self.weights.gathered(group) for group in range(len(layouts))),
            shards=1 if ranks.layout is None else ranks.layout.dense.size(),
        )  # fmt: skip

    def _fill(self) -> None:
        """Weights of the start or of the model, or first values drawn, into the store; the model keeps their shapes."""
        config, seed, start = self.backbone.config, self.config.seed, self.training.start_weights
        quantized = start is not None and any(name.endswith(f"{SEPARATOR}{EXPONENT}") for name in start.names)
        if start is not None and quantized == (EXPONENT in self.rule.read_slots):
            self._read(start, state=False)
            return
        for group, block in enumerate(self.backbone.group_blocks):
            values = {name: matrix.detach() for name, matrix in block.matrices().items()}
            own = None
            if start is not None:
                values = {name: torch.empty_like(value, device="cpu") for name, value in values.items()}
                for name, value in values.items():
                    read_weight(start, f"{self._prefix(group)}.{name}", value)
            elif any(value.is_meta for value in values.values()):
                # Of experts those that this rank holds.
                up, own = "mlp.experts.up", range(0)
                if up in values:
                    first = self.weights.shard_spec(group, up).first
                    own = range(first, first + self.weights.local_shapes(group)[up][0])
                values = first_values(config, group, seed, self.store.device, own)
            for name, stored in self.store.stored(group).items():
                part = self.weights.part(group, name, values[name], local_experts=own is not None)
                key = None if start is not None else derive_seed(seed, "fill", group, name)
                self.rule.fill(stored, part.float(), key, self.weights.shard_spec(group, name))
            block.place_matrices("meta")
        self.store.invalidate()

    def _read(self, reader: CheckpointReader, state: bool) -> None:
        """Fill the store from a checkpoint, `state` too; both have int8 weights or neither. CheckpointError: no fit."""
        for group, shard in enumerate(self.shards()):
            targets = {**shard.model, **(shard.optimizer if state else {})}
            load_parts(reader, targets)
            # A shard on the host was read where it is stored, a copy of one on a GPU was not.
            for own, _, _, tensor in self._stored(group):
                if own in targets and not tensor.is_cpu:
                    tensor.copy_(self.weights.to_local(targets[own]))
        self.store.invalidate()

    def _prefix(self, group: int) -> str:
        block = self.backbone.group_blocks[group]
        return next(name for name, module in self.training.model.named_modules() if module is block)

    def _stored(self, group: int) -> Iterator[tuple[str, str, str, Tensor]]:
        """Each tensor in the store: its name in a checkpoint, that of its matrix in the block, its slot, and itself."""
        prefix = self._prefix(group)
        for name, stored in self.store.stored(group).items():
            for slot, tensor in stored.items():
                yield full_name(f"{prefix}.{name}", slot), name, slot, tensor


@torch.no_grad()
def first_values(config: BackboneConfig, group: int, seed: int, device: torch.device, own: range) -> dict[str, Tensor]:
    """First weights of one group of layers, of its experts those in `own`, by (seed, group, expert) alone."""
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
    return parameter if slot == WEIGHT else f"{parameter}{SEPARATOR}{slot}"
