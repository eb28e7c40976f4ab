"""The memory budget of a run by place, from its sizes; a run that does not fit is refused with what would."""

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
EDGE_BYTES = (
    20  # a weight, both moments, its gradient, and its copy in half precision, four bytes each at most
)
FULL = 4  # bytes of an activation or a gradient in fp32
LOGGED = 0.02  # fraction of a place's bytes below which a line is left out of the log
HOST_SHARE = 0.9  # of the free host memory; the rest is for other programs
UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
NAMES = {"device": "device memory", "host": "host memory", "disk": "disk"}
FreeBytes = dict[str, float]


@dataclass(frozen=True)
class Line:
    """The bytes of one thing in one place: `device`, `host` or `disk`."""

    place: str
    what: str
    num_bytes: int


@dataclass(frozen=True)
class Budget:
    """What training a backbone takes, from its sizes alone.

    edges: parameters outside the sets; tokens: of one step
    value_bytes: of an activation or a gradient; checkpoints: on the disk at a time
    beside: bytes of host memory that the sets of the stage before take while layers get weights of their own
    gathered: parameters of the largest set that is computed with, where only a part of it lies in the store
    """

    config: BackboneConfig
    layouts: Sequence[RecordLayout]
    edges: int
    tokens: int
    offload: OffloadConfig
    value_bytes: int = HALF
    checkpoints: int = 0
    beside: int = 0
    gathered: int = 0

    @property
    def parameters(self) -> int:
        return self.edges + sum(layout.num_parameters for layout in self.layouts)

    @property
    def bytes_per_parameter(self) -> float:
        """Of all that is kept between steps."""
        return self.checkpoint_bytes / max(1, self.parameters)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint on the disk."""
        return sum(layout.num_bytes for layout in self.layouts) + 12 * self.edges

    def lines(self, on_device: Sequence[int]) -> list[Line]:
        """Every byte, with these sets on the device."""
        held = [layout for index, layout in enumerate(self.layouts) if index in set(on_device)]
        offloaded = [layout for index, layout in enumerate(self.layouts) if index not in set(on_device)]
        largest = max((layout.num_bytes for layout in offloaded), default=0)
        inputs = "host" if self.offload.activation_storage == "host" else "device"
        return [
            Line("device", "weights on the device", _weights(held)),
            Line("device", "optimizer state on the device", _state(held)),
            Line("device", "buffers for offloaded sets", self.offload.buffers * largest),
            Line("device", "embeddings, heads, norms, routers", EDGE_BYTES * self.edges),
            Line("device", "gradient and weights of the set in use", self._in_use),
            Line("device", "activations of one layer", self._activations),
            Line(inputs, "inputs of layers, kept for the backward pass", self._boundaries),
            Line("host", "offloaded weights", _weights(offloaded)),
            Line("host", "state of offloaded weights", _state(offloaded)),
            Line("host", "sets of the shared stage, at the switch", self.beside),
            Line("disk", "checkpoints", self.checkpoints * self.checkpoint_bytes),
        ]

    def total(self, place: str, on_device: Sequence[int]) -> int:
        """Bytes in one place."""
        return sum(line.num_bytes for line in self.lines(on_device) if line.place == place)

    def with_layers(self, layers: int) -> Budget:
        """Of the first so many layers."""
        sets = self.config.weight_sets[:layers]
        config = self.config.model_copy(update={"num_layers": layers, "sharing": sets})
        return replace(self, config=config, layouts=self.layouts[: len(set(sets))])

    def with_rule(self, rule: UpdateRule) -> Budget:
        """With as many bytes a parameter as this rule keeps."""
        return replace(self, layouts=[RecordLayout(layout.shapes, rule) for layout in self.layouts])

    def with_offload(self, name: str, value: object) -> Budget:
        """With another value of a setting in the section `loop.offload`."""
        return replace(self, offload=self.offload.model_copy(update={name: value}))

    @property
    def _in_use(self) -> int:
        """Gradients of the largest set, and its weights as they are computed with."""
        largest = max(self.gathered, *(layout.num_parameters for layout in self.layouts))
        shared = len(self.config.weight_sets) > len(set(self.config.weight_sets))
        # Gradients of shared sets add up until their last use.
        open_sets = self.config.num_sets if shared else 1
        return self.value_bytes * largest * (open_sets + 1)

    @property
    def _boundaries(self) -> int:
        inputs = kept_inputs(self.config.num_layers, self.offload.activation_checkpointing_every)
        return self.value_bytes * self.tokens * self.config.hidden_size * inputs

    @property
    def _activations(self) -> int:
        """What one layer keeps for its own backward pass, for one micro-batch."""
        tokens = -(-self.tokens // self.offload.gradient_accumulation_steps)
        return math.ceil(tokens * max_activation_bytes(self.config, self.value_bytes))


def max_on_device(budget: Budget, free: float) -> int:
    """How many sets fit `free` bytes of a device beside everything else that has to be there."""
    num_sets = len(budget.layouts)
    if budget.total("device", range(num_sets)) <= free:
        return num_sets
    free_bytes = free - budget.total("device", ())
    return max(0, min(num_sets - 1, int(free_bytes // max(layout.num_bytes for layout in budget.layouts))))


def on_device_sets(budget: Budget, free_bytes: dict[str, float]) -> tuple[int, ...]:
    """The sets that stay on the device, within `free_bytes` bytes by place.

    `auto` keeps all where there is no place `device`, as on a processor; else as many as fit beside the margin.
    """
    num_sets, wanted = len(budget.layouts), budget.offload.num_gpu_layers
    if isinstance(wanted, tuple):
        return tuple(index for index in wanted if index < num_sets)
    if wanted != "auto":
        return evenly_spaced(wanted, num_sets)
    if "device" not in free_bytes:
        return tuple(range(num_sets))
    return evenly_spaced(
        max_on_device(budget, free_bytes["device"] - budget.offload.margin_gib * GIB), num_sets
    )


def needed_bytes(budget: Budget, place: str, free_bytes: dict[str, float]) -> int:
    """In one place; on a processor the host's memory is the device's, too."""
    on_device = on_device_sets(budget, free_bytes)
    if place == "host" and "device" not in free_bytes:
        return budget.total("device", on_device) + budget.total("host", on_device)
    return budget.total(place, on_device)


def _weights(layouts: Sequence[RecordLayout]) -> int:
    return sum(layout.read_bytes for layout in layouts)


def _state(layouts: Sequence[RecordLayout]) -> int:
    return sum(layout.num_bytes - layout.read_bytes for layout in layouts)


def check_budget(budget: Budget, free_bytes: FreeBytes, rule: UpdateRule) -> None:
    """Log the budget, and refuse what does not fit.

    Raises:
        ConfigError: a set is named that does not exist; or a place is too small: the sentence names the largest number
            of layers that would fit, else the largest preset, and which setting frees most.
    """
    wanted, num_sets = budget.offload.num_gpu_layers, len(budget.layouts)
    if isinstance(wanted, tuple) and (wrong := [index for index in wanted if index >= num_sets]):
        raise ConfigError(
            f"loop.offload.num_gpu_layers names set {wrong[0]}: there are only 0 to {num_sets - 1}"
        )
    for place, limit in free_bytes.items():
        get_log().info(_describe(budget, place, limit, free_bytes))
    short = [place for place, limit in free_bytes.items() if needed_bytes(budget, place, free_bytes) > limit]
    if short:
        raise ConfigError(refusal(budget, short[0], free_bytes, rule))


def available(device: torch.device, offload: OffloadConfig, checkpoints: Path | None = None) -> FreeBytes:
    """Free bytes by place; a processor has no place of its own, and without a folder the disk does not matter."""
    host = HOST_SHARE * free_host_bytes()
    if offload.host_gib is not None:
        host = min(host, offload.host_gib * GIB)
    free_bytes: FreeBytes = {}
    if device.type == "cuda":
        free_bytes["device"] = float(torch.cuda.mem_get_info(device)[0])
    free_bytes["host"] = host
    if checkpoints is not None:
        free_bytes["disk"] = float(free_disk_bytes(checkpoints))
    return free_bytes


def refusal(budget: Budget, place: str, free_bytes: FreeBytes, rule: UpdateRule) -> str:
    """One sentence: what is short, what would fit, what frees most."""
    needed, limit = needed_bytes(budget, place, free_bytes), free_bytes[place]
    return (
        f"{budget.parameters / 1e9:.3g}B parameters need {_size(needed)} of {NAMES[place]}, and "
        f"{_size(limit)} are free: {_what_would_fit(budget, free_bytes, rule)}; "
        f"{_what_frees_most(budget, place, free_bytes)}"
    )


def fits(budget: Budget, free_bytes: FreeBytes) -> bool:
    """Whether there is enough of every place."""
    return all(needed_bytes(budget, place, free_bytes) <= limit for place, limit in free_bytes.items())


def max_fit(budget: Budget, free_bytes: FreeBytes) -> int:
    """The most layers of this model that would fit everywhere; 0: not even one."""
    counts = range(budget.config.num_layers - 1, 0, -1)
    return next((layers for layers in counts if fits(budget.with_layers(layers), free_bytes)), 0)


def max_preset(budget: Budget, free_bytes: FreeBytes, rule: UpdateRule) -> str | None:
    """The largest preset that would fit, trained in the same way."""
    by_size = sorted(PRESETS.values(), key=lambda preset: -preset.parameters.total)
    for preset in by_size:
        layouts = layouts_of(preset.backbone, rule)
        edges = preset.parameters.total - sum(layout.num_parameters for layout in layouts)
        if fits(replace(budget, config=preset.backbone, layouts=layouts, edges=edges, beside=0), free_bytes):
            return preset.name
    return None


def layouts_of(config: BackboneConfig, rule: UpdateRule) -> list[RecordLayout]:
    """Records of a backbone's weight sets, which takes no memory."""
    with torch.device("meta"):
        sets = Backbone(config).sets
    return [RecordLayout(set_shapes(cast(Block, block)), rule) for block in sets]


def free_host_bytes() -> float:
    """What may still be claimed of the host's memory: by the system's count, and by the limit of the control group."""
    found = [float("inf")]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(float(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(float(limit) - float(used))
    return min(found)


def free_disk_bytes(checkpoints: Path) -> int:
    """What checkpoints in this folder may take: free space, and what older ones leave when they go."""
    there = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
    older = sum(path.stat().st_size for folder in list_checkpoints(checkpoints) for path in folder.iterdir())
    return shutil.disk_usage(there).free + older


def _describe(budget: Budget, place: str, limit: float, free_bytes: FreeBytes) -> str:
    """`host: 1.2 GiB of 20.1 GiB; offloaded weights 921 MiB, …`."""
    needed = needed_bytes(budget, place, free_bytes)
    here = {place, "device"} if place == "host" and "device" not in free_bytes else {place}
    parts = [
        f"{line.what} {_size(line.num_bytes)}"
        for line in budget.lines(on_device_sets(budget, free_bytes))
        if line.place in here and line.num_bytes >= max(1, LOGGED * needed)
    ]
    return f"{place}: {_size(needed)} of {_size(limit)}; {', '.join(parts)}"


def _what_would_fit(budget: Budget, free_bytes: FreeBytes, rule: UpdateRule) -> str:
    if layers := max_fit(budget, free_bytes):
        return f"model.overrides.num_layers={layers} would fit"
    if preset := max_preset(budget, free_bytes, rule):
        return f"model.preset={preset} would fit"
    return "not even the smallest preset would fit"


def _what_frees_most(budget: Budget, place: str, free_bytes: FreeBytes) -> str:
    """The setting with the largest effect on this place, and the mildest that would be enough; both tried out."""
    before = needed_bytes(budget, place, free_bytes)
    changes = dict(_changes(budget))
    freed = {words: before - needed_bytes(other, place, free_bytes) for words, other in changes.items()}
    most = max(freed, key=lambda words: freed[words])
    if freed[most] <= 0:
        return "no setting frees any"
    enough = next((words for words, other in changes.items() if fits(other, free_bytes)), None)
    return f"{most} frees most, {_size(freed[most])}" + (f", and {enough} would do" if enough else "")


def _changes(budget: Budget) -> Iterator[tuple[str, Budget]]:
    """Settings that leave the model as it is, and what they would make of the budget; the mildest first."""
    offload = budget.offload
    if budget.checkpoints > 2:
        yield "loop.keep_last=1", replace(budget, checkpoints=2)
    for where in ("device", "host"):
        yield f"loop.offload.activation_storage={where}", budget.with_offload("activation_storage", where)
    yield "loop.offload.num_gpu_layers=auto", budget.with_offload("num_gpu_layers", "auto")
    yield "loop.offload.num_gpu_layers=0", budget.with_offload("num_gpu_layers", 0)
    for count in (2, 4, 8):
        if count > offload.gradient_accumulation_steps:
            yield (
                f"loop.offload.gradient_accumulation_steps={count}",
                budget.with_offload("gradient_accumulation_steps", count),
            )
        if count > offload.activation_checkpointing_every:
            yield (
                f"loop.offload.activation_checkpointing_every={count}",
                budget.with_offload("activation_checkpointing_every", count),
            )
    for precision in PRECISIONS[1:]:
        rule = update_rule(OptimizerConfig(precision=precision))
        yield f"loop.optimizer.precision={precision}", budget.with_rule(rule)


def _size(num_bytes: float) -> str:
    """Format a number of bytes."""
    unit, name = next((pair for pair in UNITS if num_bytes >= pair[0]), UNITS[-1])
    return f"{num_bytes / unit:.3g} {name}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
