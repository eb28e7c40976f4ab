"""The bytes of a run by place, told before it starts; one that will not fit is refused with the nearest that would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from openm6.base.errors import ConfigError
from openm6.base.log import get_log
from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig, matrices_of
from openm6.parallel.record import RecordLayout
from openm6.parallel.streaming_config import StreamingConfig, spread

GIB = 2**30
EDGE_BYTES = (
    20  # a weight, both moments, its gradient, and its copy in half precision, four bytes each at most
)
HALF = 2  # bytes of an activation or a gradient on a GPU
TOLD = 0.02  # share of a place's bytes below which a line is left out of the log
HOST_SHARE = 0.9  # of the free host memory; the rest is for everybody else


@dataclass(frozen=True)
class Line:
    """So many bytes for one thing in one place: `device` or `host`."""

    place: str
    what: str
    num_bytes: int


@dataclass(frozen=True)
class Budget:
    """What training a backbone takes, from its sizes alone.

    edges: parameters outside the sets; tokens: of one step
    """

    config: BackboneConfig
    layouts: Sequence[RecordLayout]
    edges: int
    tokens: int
    streaming: StreamingConfig

    @property
    def parameters(self) -> int:
        return self.edges + sum(layout.num_parameters for layout in self.layouts)

    @property
    def bytes_per_parameter(self) -> float:
        """Of all that is kept between steps."""
        kept = sum(layout.num_bytes for layout in self.layouts) + 12 * self.edges
        return kept / max(1, self.parameters)

    def lines(self, resident: Sequence[int]) -> list[Line]:
        """Every byte, with these sets on the device."""
        sizes = [layout.num_bytes for layout in self.layouts]
        held = sum(sizes[number] for number in resident)
        streamed = [size for number, size in enumerate(sizes) if number not in set(resident)]
        lines = [
            Line("device", "resident weight sets and their moments", held),
            Line("device", "buffers for streamed sets", self.streaming.buffers * max(streamed, default=0)),
            Line("device", "embeddings, heads, norms, routers", EDGE_BYTES * self.edges),
            Line("device", "gradient and weights of the set in use", self._in_use),
            Line("device", "activations of one layer", self._activations),
            Line("host", "streamed weight sets and their moments", sum(streamed)),
        ]
        place = "host" if self.streaming.boundaries == "host" else "device"
        lines.append(Line(place, "inputs of layers, kept for the backward pass", self._boundaries))
        return lines

    def total(self, place: str, resident: Sequence[int]) -> int:
        """Bytes in one place."""
        return sum(line.num_bytes for line in self.lines(resident) if line.place == place)

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint on the disk."""
        return sum(layout.num_bytes for layout in self.layouts) + 12 * self.edges

    @property
    def _in_use(self) -> int:
        """Gradients of the largest set in half precision, and its weights where they are kept in another form."""
        largest = max(layout.num_parameters for layout in self.layouts)
        shared = len(self.config.weight_sets) - len(set(self.config.weight_sets)) > 0
        open_sets = (
            self.config.num_sets if shared else 1
        )  # gradients of shared sets add up until their last use
        return HALF * largest * (open_sets + 1)

    @property
    def _boundaries(self) -> int:
        groups = -(-self.config.num_layers // self.streaming.recompute_every)
        return HALF * self.tokens * self.config.width * groups

    @property
    def _activations(self) -> int:
        """What one layer keeps for its own backward pass, for one micro-batch; a rough count of its products."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        rows = max(_row_width(config, layer) for layer in range(config.num_layers))
        tokens = -(-self.tokens // self.streaming.micro_batches)
        return HALF * tokens * (8 * config.width + 3 * heads + rows)


def _row_width(config: BackboneConfig, layer: int) -> int:
    """Values that one token's rows keep in the feed-forward part."""
    part = config.feed_forward(layer)
    rows = part.choices + part.num_shared if isinstance(part, ExpertsConfig) else 1
    return rows * (2 * config.width + matrices_of(part.ffn) * part.hidden + part.hidden)


def choose_resident(budget: Budget, device: torch.device, streaming: StreamingConfig) -> tuple[int, ...]:
    """The sets that stay on the device; on a processor `auto` keeps all, as there is no other place.

    Raises:
        ConfigError: a set is named that does not exist.
    """
    num_sets = len(budget.layouts)
    if isinstance(streaming.resident, tuple):
        if wrong := [number for number in streaming.resident if number >= num_sets]:
            raise ConfigError(f"streaming.resident names set {wrong[0]}: there are only 0 to {num_sets - 1}")
        return streaming.resident
    if streaming.resident != "auto":
        return spread(streaming.resident, num_sets)
    if device.type != "cuda":
        return tuple(range(num_sets))
    free = torch.cuda.mem_get_info(device)[0] - streaming.margin_gib * GIB
    return spread(most_resident(budget, free), num_sets)


def most_resident(budget: Budget, free: float) -> int:
    """How many sets fit `free` bytes of a device beside everything else that has to be there."""
    num_sets = len(budget.layouts)
    if budget.total("device", range(num_sets)) <= free:
        return num_sets
    room = free - budget.total("device", ())
    return max(0, min(num_sets - 1, int(room // max(layout.num_bytes for layout in budget.layouts))))


def check_budget(budget: Budget, device: torch.device, streaming: StreamingConfig) -> None:
    """Logs the budget, and refuses what does not fit.

    Raises:
        ConfigError: a place is too small; the sentence names the largest number of layers that would fit, and which
            setting frees most.
    """
    room = available(device, streaming)
    resident = choose_resident(budget, device, streaming)
    for place, limit in room.items():
        needed = _needed(budget, place, resident, device)
        parts = [
            f"{line.what} {line.num_bytes / GIB:.2f}"
            for line in budget.lines(resident)
            if line.num_bytes >= TOLD * needed and (line.place == place or device.type != "cuda")
        ]
        get_log().info(f"{place}: {needed / GIB:.2f} of {limit / GIB:.1f} GiB; {', '.join(parts)}")
    short = [place for place, limit in room.items() if _needed(budget, place, resident, device) > limit]
    if short:
        raise ConfigError(refusal(budget, short[0], room, resident, device))


def available(device: torch.device, streaming: StreamingConfig) -> dict[str, float]:
    """Free bytes by place; a processor has one place only."""
    host = HOST_SHARE * free_host_bytes()
    if streaming.host_gib is not None:
        host = min(host, streaming.host_gib * GIB)
    if device.type != "cuda":
        return {"host": host}
    return {"device": float(torch.cuda.mem_get_info(device)[0]), "host": host}


def refusal(
    budget: Budget, place: str, room: dict[str, float], resident: Sequence[int], device: torch.device
) -> str:
    """One sentence: what is short, how many layers would fit, what frees most."""
    needed, limit = _needed(budget, place, resident, device), room[place]
    layers = largest_fit(budget, room, device)
    mend = f"model.overrides.num_layers={layers} would fit" if layers else "not even one layer would fit"
    return (
        f"{budget.parameters / 1e9:.3g}B parameters need {needed / GIB:.2f} GiB of {place} memory, and "
        f"{limit / GIB:.2f} are free: {mend}; {_what_frees_most(budget, place)}"
    )


def largest_fit(budget: Budget, room: dict[str, float], device: torch.device) -> int:
    """The most layers of this model that would fit everywhere, with as many of them resident as can be."""
    for layers in range(budget.config.num_layers - 1, 0, -1):
        smaller = _with_layers(budget, layers)
        count = len(smaller.layouts)
        fits = most_resident(smaller, room["device"]) if "device" in room else count
        if all(_needed(smaller, p, spread(fits, count), device) <= limit for p, limit in room.items()):
            return layers
    return 0


def free_host_bytes() -> float:
    """What may still be claimed of the host's memory: by the system's count, and by the limit of the control group."""
    found = [float("inf")]
    memory = _read("/proc/meminfo")
    for line in memory.splitlines():
        if line.startswith("MemAvailable:"):
            found.append(float(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(float(limit) - float(used))
    return min(found)


def show_budget(budget: Budget, resident: Sequence[int], room: dict[str, float]) -> Table:
    """The budget as a table."""
    table = Table("place", "what", "GiB", box=None)
    for line in budget.lines(resident):
        table.add_row(line.place, line.what, f"{line.num_bytes / GIB:.2f}")
    table.add_row("disk", "one checkpoint", f"{budget.checkpoint_bytes() / GIB:.2f}")
    for place, limit in room.items():
        table.add_row(place, "free", f"{limit / GIB:.2f}")
    return table


def _needed(budget: Budget, place: str, resident: Sequence[int], device: torch.device) -> int:
    """Bytes in one place; on a processor all is the host's."""
    if device.type != "cuda":
        return budget.total("device", resident) + budget.total("host", resident)
    return budget.total(place, resident)


def _with_layers(budget: Budget, layers: int) -> Budget:
    sets = budget.config.weight_sets[:layers]
    config = budget.config.model_copy(update={"num_layers": layers, "sharing": sets})
    return Budget(config, budget.layouts[: len(set(sets))], budget.edges, budget.tokens, budget.streaming)


def _what_frees_most(budget: Budget, place: str) -> str:
    """The setting with the largest effect on this place."""
    kept = sum(layout.num_bytes for layout in budget.layouts)
    weights = sum(layout.num_parameters for layout in budget.layouts)
    smaller = next((bytes_ for bytes_ in (4, 2, 1) if bytes_ * weights * 1.5 < kept), None)
    if smaller is not None:
        return f"loop.optimizer.bytes_per_parameter={smaller} frees most"
    if place == "device":
        return "more loop.streaming.micro_batches, or boundaries: host, free most"
    return "fewer layers or experts free most"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
