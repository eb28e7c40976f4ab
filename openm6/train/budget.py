"""The memory budget of a run by tier (device, host, disk), from its sizes; an error names what would fit."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from openm6.checkpoint.folder import leftovers, list_checkpoints, step_of
from openm6.core.device import free_host_bytes
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.presets import PRESETS, Preset
from openm6.offload.config import OffloadConfig
from openm6.offload.weight_store import RecordLayout, matrix_shapes
from openm6.optim.config import PRECISIONS, OptimizerConfig
from openm6.optim.rules import UpdateRule, update_rule
from openm6.plan.hardware import GIB
from openm6.plan.memory import HALF, OTHERS, RESTING, in_bytes, layerwise_step

LOGGED = 0.02  # fraction of a tier's bytes below which an entry is left out of the log
HOST_FRACTION = 0.9  # of the free host memory; the rest is for other programs
FreeBytes = dict[str, float]  # by tier: `device`, `host`, `disk`


@dataclass(frozen=True)
class Budget:
    """The memory that training a backbone needs, from its sizes alone, and what is free.

    others: parameters outside the layers' matrices, `frozen` of them; tokens: of one step
    value_bytes: of an activation or a gradient; checkpoints: on the disk at a time
    beside: bytes of host memory that the weights of the stage before take while layers get weights of their own
    stem_elements: kept of a patch of an image before the first layer; every token counts as one
    gathered: parameters of the largest group that is computed with, if the store holds only a shard of it
    shards: ranks that hold a shard each, of which the layouts are one; a checkpoint on the disk holds all
    """

    config: BackboneConfig
    layouts: Sequence[RecordLayout]
    others: int
    tokens: int
    offload: OffloadConfig
    free: FreeBytes
    value_bytes: int = HALF
    checkpoints: int = 0
    beside: int = 0
    stem_elements: int = 0
    gathered: int = 0
    frozen: int = 0
    shards: int = 1

    @property
    def parameters(self) -> int:
        return self.others + self.shards * sum(layout.num_parameters for layout in self.layouts)

    @property
    def checkpoint_bytes(self) -> float:
        """Return the size of one checkpoint on the disk, which holds all that is kept between steps."""
        kept = self.shards * sum(layout.num_bytes for layout in self.layouts)
        return kept + OTHERS.weights * self.others + OTHERS.moments * (self.others - self.frozen)

    @property
    def on_device(self) -> tuple[int, ...]:
        """Return the groups of layers that stay on the device, evenly between others, whose transfers they hide.

        `auto` keeps all if there is no tier `device`, as on a CPU; else as many as fit beside the margin.
        """
        num_groups, configured = len(self.layouts), self.offload.num_gpu_layers
        if isinstance(configured, tuple):
            return tuple(index for index in configured if index < num_groups)
        free = self.free.get("device", math.inf) - self.offload.margin_gib * GIB
        if configured != "auto":
            count = min(configured, num_groups)
        elif self.total("device", range(num_groups)) <= free:
            count = num_groups
        else:
            left = free - self.total("device", ())
            count = max(0, min(num_groups - 1, int(left // max(layout.num_bytes for layout in self.layouts))))
        return tuple(int((index + 0.5) * num_groups / count) for index in range(count))

    def entries(self, on_device: Sequence[int]) -> dict[tuple[str, str], float]:
        """Return bytes by tier and what they are for, with these groups of layers on the device."""
        config, offload = self.config, self.offload
        held, offloaded = (
            [layout for index, layout in enumerate(self.layouts) if (index in on_device) == there]
            for there in (True, False)
        )
        read, read_offloaded = (sum(layout.read_bytes for layout in part) for part in (held, offloaded))
        kept, kept_offloaded = (sum(layout.num_bytes for layout in part) for part in (held, offloaded))
        micro_batch = -(-self.tokens // offload.gradient_accumulation_steps)
        largest = max(self.gathered, *(layout.num_parameters for layout in self.layouts))
        every = offload.activation_checkpointing_every
        inputs, activations, layer = layerwise_step(config, self.tokens, micro_batch, largest, self.value_bytes, every)
        # Gradients of shared weights add up until their last use; the weights of one group are computed with.
        trained = sum(bool(layout.trained) for layout in self.layouts)
        in_use = (trained if config.stage == "pseudo" else min(1, trained)) + 1
        changing = OTHERS.gradients + OTHERS.moments
        buffer = max((layout.num_bytes for layout in offloaded), default=0)
        return {
            ("device", "weights on the device"): read,
            ("device", "optimizer state on the device"): kept - read,
            ("device", "buffers for offloaded layers"): offload.buffers * buffer,
            # Beside what is kept, a copy in the dtype of computation.
            ("device", "embeddings, heads, norms, routers"): RESTING * self.others - changing * self.frozen,
            ("device", "gradient and weights of the layer in use"): in_use * layer,
            ("device", "activations of one layer"): activations,
            ("device", "activations of the image stem"): float(self.value_bytes * self.tokens * self.stem_elements),
            (offload.activation_storage, "inputs of layers, kept for the backward pass"): inputs,
            ("host", "offloaded weights"): read_offloaded,
            ("host", "state of offloaded weights"): kept_offloaded - read_offloaded,
            ("host", "weights of the shared stage, at the switch"): self.beside,
            ("disk", "checkpoints"): self.checkpoints * self.checkpoint_bytes,
        }

    def of_tier(self, tier: str, on_device: Sequence[int] | None = None) -> dict[str, float]:
        """Return the entries of one tier; on a CPU the host's memory is also the device's."""
        tiers = (tier, "device") if tier == "host" and "device" not in self.free else (tier,)
        entries = self.entries(self.on_device if on_device is None else on_device)
        return {what: size for (own, what), size in entries.items() if own in tiers}

    def total(self, tier: str, on_device: Sequence[int] | None = None) -> float:
        return sum(self.of_tier(tier, on_device).values())

    @property
    def fits(self) -> bool:
        return all(self.total(tier) <= limit for tier, limit in self.free.items())

    def with_layers(self, layers: int) -> Self:
        groups = self.config.layer_groups[:layers]
        config = self.config.model_copy(update={"num_layers": layers, "sharing": groups})
        return replace(self, config=config, layouts=self.layouts[: len(set(groups))])

    def of_preset(self, preset: Preset, rule: UpdateRule) -> Self:
        with torch.device("meta"):
            blocks = Backbone(preset.backbone).group_blocks
        layouts = [RecordLayout(matrix_shapes(block), rule) for block in blocks]
        others = preset.parameters.total - sum(layout.num_parameters for layout in layouts)
        return replace(self, config=preset.backbone, layouts=layouts, others=others, beside=0, frozen=0, shards=1)


def check_budget(budget: Budget, rule: UpdateRule) -> None:
    """Log the budget; ConfigError for a group that does not exist, or a tier that is too small, see `refusal`."""
    configured, num_groups = budget.offload.num_gpu_layers, len(budget.layouts)
    if isinstance(configured, tuple) and (wrong := [index for index in configured if index >= num_groups]):
        raise ConfigError(f"loop.offload.num_gpu_layers lists {wrong[0]}: there are only 0 to {num_groups - 1}")
    for tier, limit in budget.free.items():
        # `host: 1.2 GiB of 20.1 GiB; offloaded weights 921 MiB, …`
        needed = budget.total(tier)
        shown = {what: size for what, size in budget.of_tier(tier).items() if size >= max(1, LOGGED * needed)}
        entries = ", ".join(f"{what} {in_bytes(size)}" for what, size in shown.items())
        get_log().info(f"{tier}: {in_bytes(needed)} of {in_bytes(limit)}; {entries}")
    for tier, limit in budget.free.items():
        if budget.total(tier) > limit:
            raise ConfigError(refusal(budget, tier, rule))


def available(
    device: torch.device, offload: OffloadConfig, checkpoints: Path | None = None, held: int = 0
) -> FreeBytes:
    """Return the free bytes by tier, for one of the processes of this machine, which divide the host's.

    A CPU has no tier `device`. `held`: bytes on the device that a budget counts and the run has allocated already.
    On the disk, which holds the checkpoints of all, older ones and what killed saves left count, as they will go.
    """
    free: FreeBytes = {}
    host = HOST_FRACTION * free_host_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free["device"] = float(torch.cuda.mem_get_info(device)[0] + cached + held)
    else:
        host += held
    free["host"] = min(host, (offload.host_gib or math.inf) * GIB)
    if checkpoints is not None:
        there = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
        done = list_checkpoints(checkpoints)
        going = [*done, *leftovers(checkpoints, step_of(done[-1]) if done else 0)]
        older = sum(path.stat().st_size for folder in going for path in folder.iterdir())
        free["disk"] = float(shutil.disk_usage(there).free + older)
    return free


def refusal(budget: Budget, tier: str, rule: UpdateRule) -> str:
    """Return one sentence: what is short, what would fit, and the settings (tried out) that free most or would do."""
    counts = range(budget.config.num_layers - 1, 0, -1)
    presets = sorted(PRESETS.values(), key=lambda preset: -preset.parameters.total)
    if layers := next((count for count in counts if budget.with_layers(count).fits), 0):
        smaller = f"model.overrides.num_layers={layers} would fit"
    elif name := next((preset.name for preset in presets if budget.of_preset(preset, rule).fits), None):
        smaller = f"model.preset={name} would fit"
    else:
        smaller = "not even the smallest preset would fit"
    before, changes = budget.total(tier), _changes(budget)
    freed = {words: before - other.total(tier) for words, other in changes.items()}
    most = max(freed, key=lambda words: freed[words])
    enough = next((words for words, other in changes.items() if other.fits), None)
    setting = f"{most} frees most, {in_bytes(freed[most])}" + (f", and {enough} would do" if enough else "")
    where = "disk" if tier == "disk" else f"{tier} memory"
    return (
        f"{budget.parameters / 1e9:.3g}B parameters need {in_bytes(before)} of {where}, and "
        f"{in_bytes(budget.free[tier])} are free: {smaller}; {setting if freed[most] > 0 else 'no setting frees any'}"
    )


def _changes(budget: Budget) -> dict[str, Budget]:
    """Settings that leave the model as it is, with the budget under them; the mildest first."""
    settings: list[tuple[str, str | int]] = [("activation_storage", where) for where in ("device", "host")]
    settings += [("num_gpu_layers", "auto"), ("num_gpu_layers", 0)]
    names = ("gradient_accumulation_steps", "activation_checkpointing_every")
    settings += [(name, count) for count in (2, 4, 8) for name in names if count > getattr(budget.offload, name)]
    found = {"loop.keep_last=1": replace(budget, checkpoints=2)} if budget.checkpoints > 2 else {}
    for name, value in settings:
        offload = budget.offload.model_copy(update={name: value})
        found[f"loop.offload.{name}={value}"] = replace(budget, offload=offload)
    for precision in PRECISIONS[1:]:
        rule = update_rule(OptimizerConfig(precision=precision))
        layouts = [RecordLayout(layout.shapes, rule, layout.frozen) for layout in budget.layouts]
        found[f"loop.optimizer.precision={precision}"] = replace(budget, layouts=layouts)
    return found
