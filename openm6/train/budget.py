"""The memory budget of a run by tier (device, host, disk), from its sizes; an error names what would fit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from openm6.checkpoint.folder import list_checkpoints
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.presets import PRESETS
from openm6.nn.block import Block
from openm6.offload.config import OffloadConfig, evenly_spaced
from openm6.offload.weight_store import RecordLayout, set_shapes
from openm6.optim.config import PRECISIONS, OptimizerConfig
from openm6.optim.rules import UpdateRule, update_rule
from openm6.plan.memory import HALF, kept_inputs, max_activation_bytes

GIB = 2**30
# Per parameter outside the blocks: weight, both moments, gradient, half-precision copy, at most four bytes each.
NON_BLOCK_BYTES = 20
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

    non_block: parameters outside the sets; tokens: of one step
    value_bytes: of an activation or a gradient; checkpoints: on the disk at a time
    beside: bytes of host memory that the sets of the stage before take while layers get weights of their own
    gathered: parameters of the largest set that is computed with, if the store holds only a shard of it
    """

    config: BackboneConfig
    layouts: Sequence[RecordLayout]
    non_block: int
    tokens: int
    offload: OffloadConfig
    value_bytes: int = HALF
    checkpoints: int = 0
    beside: int = 0
    gathered: int = 0

    @property
    def parameters(self) -> int:
        return self.non_block + sum(layout.num_parameters for layout in self.layouts)

    @property
    def bytes_per_parameter(self) -> float:
        """Return the bytes kept between steps."""
        return self.checkpoint_bytes / max(1, self.parameters)

    @property
    def checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint on the disk."""
        return sum(layout.num_bytes for layout in self.layouts) + 12 * self.non_block

    def entries(self, on_device: Sequence[int]) -> list[Entry]:
        """Return all entries, with these sets on the device."""
        held = [layout for index, layout in enumerate(self.layouts) if index in set(on_device)]
        offloaded = [layout for index, layout in enumerate(self.layouts) if index not in set(on_device)]
        largest = max((layout.num_bytes for layout in offloaded), default=0)
        inputs = "host" if self.offload.activation_storage == "host" else "device"
        weights, state = (
            [sum(layout.read_bytes for layout in layouts) for layouts in (held, offloaded)],
            [
                sum(layout.num_bytes - layout.read_bytes for layout in layouts)
                for layouts in (held, offloaded)
            ],
        )
        return [
            Entry("device", "weights on the device", weights[0]),
            Entry("device", "optimizer state on the device", state[0]),
            Entry("device", "buffers for offloaded sets", self.offload.buffers * largest),
            Entry("device", "embeddings, heads, norms, routers", NON_BLOCK_BYTES * self.non_block),
            Entry("device", "gradient and weights of the set in use", self._in_use),
            Entry("device", "activations of one layer", self._activations),
            Entry(inputs, "inputs of layers, kept for the backward pass", self._block_inputs),
            Entry("host", "offloaded weights", weights[1]),
            Entry("host", "state of offloaded weights", state[1]),
            Entry("host", "sets of the shared stage, at the switch", self.beside),
            Entry("disk", "checkpoints", self.checkpoints * self.checkpoint_bytes),
        ]

    def total(self, tier: str, on_device: Sequence[int]) -> int:
        """Return the bytes of one tier."""
        return sum(entry.num_bytes for entry in self.entries(on_device) if entry.tier == tier)

    def with_layers(self, layers: int) -> Budget:
        """Return the budget of the first `layers` layers."""
        sets = self.config.weight_sets[:layers]
        config = self.config.model_copy(update={"num_layers": layers, "sharing": sets})
        return replace(self, config=config, layouts=self.layouts[: len(set(sets))])

    def with_offload(self, name: str, value: object) -> Budget:
        """Return the budget with another value of a setting in the section `loop.offload`."""
        return replace(self, offload=self.offload.model_copy(update={name: value}))

    @property
    def _in_use(self) -> int:
        """Return the bytes of the largest set's gradients, and of its weights as they are computed with."""
        largest = max(self.gathered, *(layout.num_parameters for layout in self.layouts))
        shared = len(self.config.weight_sets) > len(set(self.config.weight_sets))
        # Gradients of shared sets add up until their last use.
        in_use = self.config.num_sets if shared else 1
        return self.value_bytes * largest * (in_use + 1)

    @property
    def _block_inputs(self) -> int:
        inputs = kept_inputs(self.config.num_layers, self.offload.activation_checkpointing_every)
        return self.value_bytes * self.tokens * self.config.hidden_size * inputs

    @property
    def _activations(self) -> int:
        """Return the bytes that one layer keeps for its own backward pass, for one micro-batch."""
        tokens = -(-self.tokens // self.offload.gradient_accumulation_steps)
        return math.ceil(tokens * max_activation_bytes(self.config, self.value_bytes))


def max_on_device(budget: Budget, free: float) -> int:
    """Return how many sets fit `free` bytes of a device beside everything else that must be there."""
    num_sets = len(budget.layouts)
    if budget.total("device", range(num_sets)) <= free:
        return num_sets
    free_bytes = free - budget.total("device", ())
    return max(0, min(num_sets - 1, int(free_bytes // max(layout.num_bytes for layout in budget.layouts))))


def on_device_layers(budget: Budget, free_bytes: FreeBytes) -> tuple[int, ...]:
    """Return the sets that stay on the device.

    `auto` keeps all if there is no tier `device`, as on a CPU; else as many as fit beside the margin.
    """
    num_sets, configured = len(budget.layouts), budget.offload.num_gpu_layers
    if isinstance(configured, tuple):
        return tuple(index for index in configured if index < num_sets)
    if configured != "auto":
        return evenly_spaced(configured, num_sets)
    if "device" not in free_bytes:
        return tuple(range(num_sets))
    free = free_bytes["device"] - budget.offload.margin_gib * GIB
    return evenly_spaced(max_on_device(budget, free), num_sets)


def needed_bytes(budget: Budget, tier: str, free_bytes: FreeBytes) -> int:
    """Return the bytes of one tier; on a CPU the host's memory is also the device's."""
    return sum(entry.num_bytes for entry in _entries(budget, tier, free_bytes))


def _entries(budget: Budget, tier: str, free_bytes: FreeBytes) -> list[Entry]:
    tiers = {tier, "device"} if tier == "host" and "device" not in free_bytes else {tier}
    entries = budget.entries(on_device_layers(budget, free_bytes))
    return [entry for entry in entries if entry.tier in tiers]


def fits(budget: Budget, free_bytes: FreeBytes) -> bool:
    """Return whether every tier has enough memory."""
    return all(needed_bytes(budget, tier, free_bytes) <= limit for tier, limit in free_bytes.items())


def check_budget(budget: Budget, free_bytes: FreeBytes, rule: UpdateRule) -> None:
    """Log the budget, and refuse what does not fit.

    Raises:
        ConfigError: a set is named that does not exist; or a tier is too small: the sentence names the largest number
            of layers that would fit, else the largest preset, and which setting frees most.
    """
    configured, num_sets = budget.offload.num_gpu_layers, len(budget.layouts)
    if isinstance(configured, tuple) and (wrong := [index for index in configured if index >= num_sets]):
        raise ConfigError(
            f"loop.offload.num_gpu_layers names set {wrong[0]}: there are only 0 to {num_sets - 1}"
        )
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
        non_block = preset.parameters.total - sum(layout.num_parameters for layout in layouts)
        other = replace(budget, config=preset.backbone, layouts=layouts, non_block=non_block, beside=0)
        if fits(other, free_bytes):
            return preset.name
    return None


def layouts_of(config: BackboneConfig, rule: UpdateRule) -> list[RecordLayout]:
    """Return the record layouts of a backbone's weight sets, without allocating them."""
    with torch.device("meta"):
        sets = Backbone(config).sets
    return [RecordLayout(set_shapes(cast(Block, block)), rule) for block in sets]


def free_host_bytes() -> float:
    """Return what may still be allocated on the host: by the system's count, and by the limit of the control group."""
    found = [float("inf")]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(float(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(float(limit) - float(used))
    return min(found)


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


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
