"""The memory budget of a run by tier (device, host, disk), from its sizes; an error names what would fit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openm6.checkpoint.folder import list_checkpoints
from openm6.core.device import free_host_bytes
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.presets import PRESETS
from openm6.offload.config import OffloadConfig, evenly_spaced
from openm6.offload.weight_store import RecordLayout, matrix_shapes
from openm6.optim.config import PRECISIONS, OptimizerConfig
from openm6.optim.rules import UpdateRule, update_rule
from openm6.plan.memory import HALF, kept_inputs, max_activation_bytes

GIB = 2**30
# Per parameter outside the blocks: weight, both moments, gradient, half-precision copy, at most four bytes each.
OTHER_BYTES = 20
FULL = 4  # bytes of an activation or a gradient in fp32
LOGGED = 0.02  # fraction of a tier's bytes below which an entry is left out of the log
HOST_FRACTION = 0.9  # of the free host memory; the rest is for other programs
UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
NAMES = {"device": "device memory", "host": "host memory", "disk": "disk"}
FreeBytes = dict[str, float]  # by tier: `device`, `host`, `disk`


@dataclass(frozen=True)
class Entry:
    """One item of a budget."""

    tier: str
    what: str
    num_bytes: int


@dataclass(frozen=True)
class Budget:
    """The memory that training a backbone needs, from its sizes alone.

    others: parameters outside the layers' matrices; tokens: of one step
    value_bytes: of an activation or a gradient; checkpoints: on the disk at a time
    beside: bytes of host memory that the weights of the stage before take while layers get weights of their own
    gathered: parameters of the largest group that is computed with, if the store holds only a shard of it
    """

    config: BackboneConfig
    layouts: Sequence[RecordLayout]
    others: int
    tokens: int
    offload: OffloadConfig
    value_bytes: int = HALF
    checkpoints: int = 0
    beside: int = 0
    gathered: int = 0

    @property
    def parameters(self) -> int:
        return self.others + sum(layout.num_parameters for layout in self.layouts)

    @property
    def checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint on the disk, which holds all that is kept between steps."""
        return sum(layout.num_bytes for layout in self.layouts) + 12 * self.others

    @property
    def bytes_per_parameter(self) -> float:
        return self.checkpoint_bytes / max(1, self.parameters)

    def entries(self, on_device: Sequence[int]) -> list[Entry]:
        """Return all entries, with these groups of layers on the device."""
        config, offload = self.config, self.offload
        held, offloaded = (
            [layout for index, layout in enumerate(self.layouts) if (index in on_device) == there]
            for there in (True, False)
        )
        read, read_offloaded = (sum(layout.read_bytes for layout in part) for part in (held, offloaded))
        kept, kept_offloaded = (sum(layout.num_bytes for layout in part) for part in (held, offloaded))
        buffer = max((layout.num_bytes for layout in offloaded), default=0)
        # Gradients of shared weights add up until their last use; the weights of one group are computed with.
        in_use = (len(config.group_layers) if config.stage == "pseudo" else 1) + 1
        largest = max(self.gathered, *(layout.num_parameters for layout in self.layouts))
        inputs = kept_inputs(config.num_layers, offload.activation_checkpointing_every)
        # Of one micro-batch.
        activations = max_activation_bytes(config, self.value_bytes) * (
            -(-self.tokens // offload.gradient_accumulation_steps)
        )
        return [
            Entry("device", "weights on the device", read),
            Entry("device", "optimizer state on the device", kept - read),
            Entry("device", "buffers for offloaded layers", offload.buffers * buffer),
            Entry("device", "embeddings, heads, norms, routers", OTHER_BYTES * self.others),
            Entry("device", "gradient and weights of the layer in use", self.value_bytes * largest * in_use),
            Entry("device", "activations of one layer", math.ceil(activations)),
            Entry(
                offload.activation_storage,
                "inputs of layers, kept for the backward pass",
                self.value_bytes * self.tokens * config.hidden_size * inputs,
            ),
            Entry("host", "offloaded weights", read_offloaded),
            Entry("host", "state of offloaded weights", kept_offloaded - read_offloaded),
            Entry("host", "weights of the shared stage, at the switch", self.beside),
            Entry("disk", "checkpoints", self.checkpoints * self.checkpoint_bytes),
        ]

    def total(self, tier: str, on_device: Sequence[int]) -> int:
        """Return the bytes of one tier."""
        return sum(entry.num_bytes for entry in self.entries(on_device) if entry.tier == tier)

    def with_layers(self, layers: int) -> Budget:
        """Return the budget of the first `layers` layers."""
        groups = self.config.layer_groups[:layers]
        config = self.config.model_copy(update={"num_layers": layers, "sharing": groups})
        return replace(self, config=config, layouts=self.layouts[: len(set(groups))])

    def with_offload(self, name: str, value: object) -> Budget:
        """Return the budget with another value of a setting in the section `loop.offload`."""
        return replace(self, offload=self.offload.model_copy(update={name: value}))


def max_on_device(budget: Budget, free: float) -> int:
    """Return how many groups fit `free` bytes of a device beside everything else that must be there."""
    num_groups = len(budget.layouts)
    if budget.total("device", range(num_groups)) <= free:
        return num_groups
    free_bytes = free - budget.total("device", ())
    return max(0, min(num_groups - 1, int(free_bytes // max(layout.num_bytes for layout in budget.layouts))))


def on_device_groups(budget: Budget, free_bytes: FreeBytes) -> tuple[int, ...]:
    """Return the groups of layers that stay on the device.

    `auto` keeps all if there is no tier `device`, as on a CPU; else as many as fit beside the margin.
    """
    num_groups, configured = len(budget.layouts), budget.offload.num_gpu_layers
    if isinstance(configured, tuple):
        return tuple(index for index in configured if index < num_groups)
    if configured != "auto":
        return evenly_spaced(configured, num_groups)
    if "device" not in free_bytes:
        return tuple(range(num_groups))
    free = free_bytes["device"] - budget.offload.margin_gib * GIB
    return evenly_spaced(max_on_device(budget, free), num_groups)


def needed_bytes(budget: Budget, tier: str, free_bytes: FreeBytes) -> int:
    """Return the bytes of one tier; on a CPU the host's memory is also the device's."""
    return sum(entry.num_bytes for entry in _entries(budget, tier, free_bytes))


def _entries(budget: Budget, tier: str, free_bytes: FreeBytes) -> list[Entry]:
    tiers = {tier, "device"} if tier == "host" and "device" not in free_bytes else {tier}
    entries = budget.entries(on_device_groups(budget, free_bytes))
    return [entry for entry in entries if entry.tier in tiers]


def fits(budget: Budget, free_bytes: FreeBytes) -> bool:
    """Return whether every tier has enough memory."""
    return all(needed_bytes(budget, tier, free_bytes) <= limit for tier, limit in free_bytes.items())


def check_budget(budget: Budget, free_bytes: FreeBytes, rule: UpdateRule) -> None:
    """Log the budget, and refuse what does not fit.

    Raises:
        ConfigError: a group is named that does not exist; or a tier is too small: the sentence names the largest number
            of layers that would fit, else the largest preset, and which setting frees most.
    """
    configured, num_groups = budget.offload.num_gpu_layers, len(budget.layouts)
    if isinstance(configured, tuple) and (wrong := [index for index in configured if index >= num_groups]):
        raise ConfigError(f"loop.offload.num_gpu_layers lists {wrong[0]}: there are only 0 to {num_groups - 1}")
    for tier, limit in free_bytes.items():
        # `host: 1.2 GiB of 20.1 GiB; offloaded weights 921 MiB, …`
        needed = needed_bytes(budget, tier, free_bytes)
        entries = ", ".join(
            f"{entry.what} {_size(entry.num_bytes)}"
            for entry in _entries(budget, tier, free_bytes)
            if entry.num_bytes >= max(1, LOGGED * needed)
        )
        get_log().info(f"{tier}: {_size(needed)} of {_size(limit)}; {entries}")
    short = [tier for tier, limit in free_bytes.items() if needed_bytes(budget, tier, free_bytes) > limit]
    if short:
        raise ConfigError(refusal(budget, short[0], free_bytes, rule))


def available(device: torch.device, offload: OffloadConfig, checkpoints: Path | None = None) -> FreeBytes:
    """Return the free bytes by tier; a CPU has no tier of its own, and without a folder the disk does not matter."""
    host = HOST_FRACTION * free_host_bytes()
    if offload.host_gib is not None:
        host = min(host, offload.host_gib * GIB)
    free_bytes: FreeBytes = {}
    if device.type == "cuda":
        free_bytes["device"] = float(torch.cuda.mem_get_info(device)[0])
    free_bytes["host"] = host
    if checkpoints is not None:
        free_bytes["disk"] = float(free_disk_bytes(checkpoints))
    return free_bytes


def refusal(budget: Budget, tier: str, free_bytes: FreeBytes, rule: UpdateRule) -> str:
    """Return one sentence: what is short, what would fit, what frees most."""
    if layers := max_fit(budget, free_bytes):
        smaller = f"model.overrides.num_layers={layers} would fit"
    elif preset := max_preset(budget, free_bytes, rule):
        smaller = f"model.preset={preset} would fit"
    else:
        smaller = "not even the smallest preset would fit"
    return (
        f"{budget.parameters / 1e9:.3g}B parameters need {_size(needed_bytes(budget, tier, free_bytes))} of "
        f"{NAMES[tier]}, and {_size(free_bytes[tier])} are free: {smaller}; "
        f"{_what_frees_most(budget, tier, free_bytes)}"
    )


def max_fit(budget: Budget, free_bytes: FreeBytes) -> int:
    """Return the most layers of this model that would fit everywhere; 0: not even one."""
    counts = range(budget.config.num_layers - 1, 0, -1)
    return next((layers for layers in counts if fits(budget.with_layers(layers), free_bytes)), 0)


def max_preset(budget: Budget, free_bytes: FreeBytes, rule: UpdateRule) -> str | None:
    """Return the largest preset that would fit, trained in the same way."""
    for preset in sorted(PRESETS.values(), key=lambda preset: -preset.parameters.total):
        layouts = layouts_of(preset.backbone, rule)
        others = preset.parameters.total - sum(layout.num_parameters for layout in layouts)
        other = replace(budget, config=preset.backbone, layouts=layouts, others=others, beside=0)
        if fits(other, free_bytes):
            return preset.name
    return None


def layouts_of(config: BackboneConfig, rule: UpdateRule) -> list[RecordLayout]:
    """Return the record layouts of a backbone's groups of layers, without allocating them."""
    with torch.device("meta"):
        blocks = Backbone(config).group_blocks
    return [RecordLayout(matrix_shapes(block), rule) for block in blocks]


def free_disk_bytes(checkpoints: Path) -> int:
    """Return what checkpoints in this folder may take: free space, and that of older ones, which are deleted."""
    there = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
    older = sum(path.stat().st_size for folder in list_checkpoints(checkpoints) for path in folder.iterdir())
    return shutil.disk_usage(there).free + older


def _what_frees_most(budget: Budget, tier: str, free_bytes: FreeBytes) -> str:
    """Name the setting with the largest effect on this tier, and the mildest that would be enough; both tried out."""
    before, changes = needed_bytes(budget, tier, free_bytes), dict(_changes(budget))
    freed = {words: before - needed_bytes(other, tier, free_bytes) for words, other in changes.items()}
    most = max(freed, key=lambda words: freed[words])
    if freed[most] <= 0:
        return "no setting frees any"
    enough = next((words for words, other in changes.items() if fits(other, free_bytes)), None)
    return f"{most} frees most, {_size(freed[most])}" + (f", and {enough} would do" if enough else "")


def _changes(budget: Budget) -> Iterator[tuple[str, Budget]]:
    """Yield settings that leave the model as it is, with the budget under them; the mildest first."""
    if budget.checkpoints > 2:
        yield "loop.keep_last=1", replace(budget, checkpoints=2)
    settings: list[tuple[str, str | int]] = [("activation_storage", where) for where in ("device", "host")]
    settings += [("num_gpu_layers", "auto"), ("num_gpu_layers", 0)]
    for count in (2, 4, 8):
        for name in ("gradient_accumulation_steps", "activation_checkpointing_every"):
            if count > getattr(budget.offload, name):
                settings.append((name, count))
    for name, value in settings:
        yield f"loop.offload.{name}={value}", budget.with_offload(name, value)
    for precision in PRECISIONS[1:]:
        rule = update_rule(OptimizerConfig(precision=precision))
        layouts = [RecordLayout(layout.shapes, rule) for layout in budget.layouts]
        yield f"loop.optimizer.precision={precision}", replace(budget, layouts=layouts)


def _size(num_bytes: float) -> str:
    """Format a number of bytes."""
    unit, name = next((pair for pair in UNITS if num_bytes >= pair[0]), UNITS[-1])
    return f"{num_bytes / unit:.3g} {name}"
