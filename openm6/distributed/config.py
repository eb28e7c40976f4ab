"""How the processes of a run divide a model: the section `parallel:` of a recipe; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        """The axes for `size` ranks; `num_experts` is that of the model's sparse layers, None without any.

        Raises:
            ConfigError: the axes do not multiply out to the ranks, or the experts cannot be distributed evenly.
        """
        dp_replicate, dp_shard, ep = self._fill(size, num_experts, accelerated)
        if dp_replicate * dp_shard * ep != size:
            raise ConfigError(
                f"parallel: dp_replicate={dp_replicate} × dp_shard={dp_shard} × ep={ep} is "
                f"{dp_replicate * dp_shard * ep} ranks, but "
                f"{size} run: change an axis or the number of processes"
            )
        if ep > 1 and (num_experts is None or num_experts % ep):
            raise ConfigError(
                f"parallel.ep={ep} cannot distribute {num_experts or 'no'} experts evenly: "
                "choose a divisor of num_experts"
            )
        return MeshShape(dp_replicate, dp_shard, ep)

    def _fill(self, size: int, num_experts: int | None, accelerated: bool) -> tuple[int, int, int]:
        given = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "ep": self.ep}
        fixed = {name: int(value) for name, value in given.items() if value != "auto"}
        if wrong := [name for name, value in fixed.items() if value < 1]:
            raise ConfigError(f"parallel.{wrong[0]} must be at least 1, or auto")
        left = size
        for value in fixed.values():
            left //= value
        sizes = dict.fromkeys(given, 1) | fixed
        free = [name for name in given if name not in fixed]
        if free:
            sizes[_widest(free, left, num_experts, accelerated)] = max(1, left)
        return sizes["dp_replicate"], sizes["dp_shard"], sizes["ep"]


def _widest(free: list[str], left: int, num_experts: int | None, accelerated: bool) -> str:
    """The automatic axis that takes the ranks which the fixed ones leave."""
    divides = num_experts is not None and num_experts % max(1, left) == 0
    # On processors the exchange costs more than the experts' memory is worth.
    if "ep" in free and divides and (accelerated or free == ["ep"]):
        return "ep"
    order = ["dp_shard", "dp_replicate", "ep"] if accelerated else ["dp_replicate", "dp_shard", "ep"]
    return next(name for name in order if name in free)


@dataclass(frozen=True)
class MeshShape:
    """The three axes of a run as numbers."""

    dp_replicate: int
    dp_shard: int
    ep: int

    @property
    def size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.ep

    @property
    def copies_only(self) -> bool:
        """Whether each rank holds the whole model."""
        return self.dp_shard == self.ep == 1
