"""The bytes of a run by place, from its sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig, matrices_of
from openm6.offload.config import StreamingConfig, spread
from openm6.offload.weight_store import RecordLayout
from openm6.optim.rules import UpdateRule

GIB = 2**30
EDGE_BYTES = (
    20  # a weight, both moments, its gradient, and its copy in half precision, four bytes each at most
)
FULL, HALF = 4, 2  # bytes of an activation or a gradient


@dataclass(frozen=True)
class Line:
    """So many bytes for one thing in one place: `device`, `host` or `disk`."""

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
    streaming: StreamingConfig
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

    def lines(self, resident: Sequence[int]) -> list[Line]:
        """Every byte, with these sets on the device."""
        held = [layout for number, layout in enumerate(self.layouts) if number in set(resident)]
        streamed = [layout for number, layout in enumerate(self.layouts) if number not in set(resident)]
        largest = max((layout.num_bytes for layout in streamed), default=0)
        inputs = "host" if self.streaming.boundaries == "host" else "device"
        return [
            Line("device", "resident weights", _weights(held)),
            Line("device", "state of resident weights", _state(held)),
            Line("device", "buffers for streamed sets", self.streaming.buffers * largest),
            Line("device", "embeddings, heads, norms, routers", EDGE_BYTES * self.edges),
            Line("device", "gradient and weights of the set in use", self._in_use),
            Line("device", "activations of one layer", self._activations),
            Line(inputs, "inputs of layers, kept for the backward pass", self._boundaries),
            Line("host", "streamed weights", _weights(streamed)),
            Line("host", "state of streamed weights", _state(streamed)),
            Line("host", "sets of the shared stage, at the switch", self.beside),
            Line("disk", "checkpoints", self.checkpoints * self.checkpoint_bytes),
        ]

    def total(self, place: str, resident: Sequence[int]) -> int:
        """Bytes in one place."""
        return sum(line.num_bytes for line in self.lines(resident) if line.place == place)

    def with_layers(self, layers: int) -> Budget:
        """Of the first so many layers."""
        sets = self.config.weight_sets[:layers]
        config = self.config.model_copy(update={"num_layers": layers, "sharing": sets})
        return replace(self, config=config, layouts=self.layouts[: len(set(sets))])

    def with_rule(self, rule: UpdateRule) -> Budget:
        """With as many bytes a parameter as this rule keeps."""
        return replace(self, layouts=[RecordLayout(layout.shapes, rule) for layout in self.layouts])

    def with_streaming(self, name: str, value: object) -> Budget:
        """With another value of a setting in the section `loop.streaming`."""
        return replace(self, streaming=self.streaming.model_copy(update={name: value}))

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
        groups = -(-self.config.num_layers // self.streaming.recompute_every)
        return self.value_bytes * self.tokens * self.config.width * groups

    @property
    def _activations(self) -> int:
        """What one layer keeps for its own backward pass, for one micro-batch; a rough count of its products."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        rows = max(_row_width(config, layer) for layer in range(config.num_layers))
        tokens = -(-self.tokens // self.streaming.micro_batches)
        return self.value_bytes * tokens * (8 * config.width + 3 * heads + rows)


def most_resident(budget: Budget, free: float) -> int:
    """How many sets fit `free` bytes of a device beside everything else that has to be there."""
    num_sets = len(budget.layouts)
    if budget.total("device", range(num_sets)) <= free:
        return num_sets
    room = free - budget.total("device", ())
    return max(0, min(num_sets - 1, int(room // max(layout.num_bytes for layout in budget.layouts))))


def resident_sets(budget: Budget, room: dict[str, float]) -> tuple[int, ...]:
    """The sets that stay on the device, within `room` bytes by place.

    `auto` keeps all where there is no place `device`, as on a processor; else as many as fit beside the margin.
    """
    num_sets, wanted = len(budget.layouts), budget.streaming.resident
    if isinstance(wanted, tuple):
        return tuple(number for number in wanted if number < num_sets)
    if wanted != "auto":
        return spread(wanted, num_sets)
    if "device" not in room:
        return tuple(range(num_sets))
    return spread(most_resident(budget, room["device"] - budget.streaming.margin_gib * GIB), num_sets)


def needed_bytes(budget: Budget, place: str, room: dict[str, float]) -> int:
    """In one place; on a processor the host's memory is the device's, too."""
    resident = resident_sets(budget, room)
    if place == "host" and "device" not in room:
        return budget.total("device", resident) + budget.total("host", resident)
    return budget.total(place, resident)


def _weights(layouts: Sequence[RecordLayout]) -> int:
    return sum(layout.read_bytes for layout in layouts)


def _state(layouts: Sequence[RecordLayout]) -> int:
    return sum(layout.num_bytes - layout.read_bytes for layout in layouts)


def _row_width(config: BackboneConfig, layer: int) -> int:
    """Values that one token's rows keep in the feed-forward part."""
    part = config.feed_forward(layer)
    rows = part.choices + part.num_shared if isinstance(part, ExpertsConfig) else 1
    return rows * (2 * config.width + matrices_of(part.ffn) * part.hidden + part.hidden)
