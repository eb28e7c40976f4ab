"""How the processes of a run divide a model: the section `parallel:` of a recipe; without torch."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from pydantic import Field

from openm6.core.config import Config
from openm6.core.errors import ConfigError

Axis = int | Literal["auto"]


class ParallelConfig(Config):
    """Sizes of the three axes; their product is the number of ranks. Every rank trains on rows of its own.

    dp_replicate: replicas of the model
    dp_shard: ranks over which weights, gradients and moments are sharded
    ep: ranks over which the experts of each layer are distributed
    ep_overlap_chunks: chunks in which tokens are sent to experts, so that one is sent while another is computed
    timeout_seconds: how long a rank waits for the others before the run is given up

    `auto` takes what the other axes leave (one automatic axis), or,
    with all three automatic, experts if there are any and a GPU each, else replicas.
    """

    dp_replicate: Axis = "auto"
    dp_shard: Axis = "auto"
    ep: Axis = "auto"
    ep_overlap_chunks: int = Field(default=1, ge=1)
    timeout_seconds: float = Field(default=600.0, gt=0)

    def resolve(self, size: int, num_experts: int | None, accelerated: bool) -> MeshShape:
        """The axes for `size` ranks and a model of so many experts (None: none); ConfigError if they do not fit."""
        sizes = {axis: value for axis in MeshShape._fields if (value := getattr(self, axis)) != "auto"}
        if wrong := [axis for axis, value in sizes.items() if value < 1]:
            raise ConfigError(f"parallel.{wrong[0]} must be at least 1, or auto")
        if free := [axis for axis in MeshShape._fields if axis not in sizes]:
            left = max(1, size // math.prod(sizes.values()))
            # The one that takes what is left; on processors the exchange costs more than the experts' memory is worth.
            order = ["dp_shard", "dp_replicate", "ep"] if accelerated else ["dp_replicate", "dp_shard", "ep"]
            if num_experts is not None and num_experts % left == 0 and (accelerated or free == ["ep"]):
                order.insert(0, "ep")
            sizes |= dict.fromkeys(free, 1)
            sizes[next(axis for axis in order if axis in free)] = left
        shape = MeshShape(**sizes)
        if shape.size != size:
            axes = " × ".join(f"{axis}={value}" for axis, value in shape._asdict().items())
            raise ConfigError(
                f"parallel: {axes} is {shape.size} ranks, but {size} run: change an axis or the number of processes"
            )
        if shape.ep > 1 and (num_experts is None or num_experts % shape.ep):
            raise ConfigError(
                f"parallel.ep={shape.ep} cannot distribute {num_experts or 'no'} experts evenly: "
                "choose a divisor of num_experts"
            )
        return shape


class MeshShape(NamedTuple):
    dp_replicate: int
    dp_shard: int
    ep: int

    @property
    def size(self) -> int:
        return math.prod(self)

    @property
    def copies_only(self) -> bool:
        return self.dp_shard == self.ep == 1
