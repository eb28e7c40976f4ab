"""The order in which a run sees its data: one seeded sequence of samples, divided among data shards, with a cursor.

Sample s of the sequence belongs to shard s mod n. Each shard packs rows of its own and takes its samples at its own
pace; its samples do not depend on the rank that holds it. So the position in the data is one small cursor per shard,
and no record is lost or seen twice when a run resumes on another number of ranks.
"""

from bisect import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from openm6.core.errors import DataError
from openm6.core.seeds import mix, permutation, text_hash, uniform
from openm6.data.records import Record
from openm6.data.source import Source

Cursor = dict[str, Any]


@dataclass(frozen=True)
class SampleIndex:
    """Sample number `global_index` of the sequence: record `index` of `component` in its `epoch`."""

    component: int
    epoch: int
    index: int
    global_index: int


@dataclass(frozen=True, kw_only=True)
class Component:
    """A source read through a task, with its weight in the mixture."""

    source: Source
    task: str
    weight: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.source.name}/{self.task}"


@dataclass
class DataShard:
    """One shard: the global index of its next sample, and the samples drawn that did not fit a row yet."""

    index: int
    next: int
    buffer: list[SampleIndex] = field(default_factory=list)


class MixtureSampler:
    """Draws components by weight, and each component's records shuffled without replacement per epoch.

    Every sample is a pure function of the seed, its global index and the component's own count, so the sequence is
    the same for any number of workers or ranks. One rank holds the data shards `shards`, at first the only one.
    """

    def __init__(self, components: Sequence[Component], seed: int) -> None:
        for component in components:
            if len(component.source) == 0:
                raise DataError(f"{component.key} has no records to draw: check its path and split")
        self.components = tuple(components)
        self.seed = seed
        self._bounds = np.cumsum([component.weight for component in components]).tolist()
        self._drawn = [0] * len(components)  # records of each component, in all epochs
        self._orders: dict[int, np.ndarray] = {}  # of the current epoch, by component
        self.global_index = 0  # of the next sample
        self.set_shards(1)

    def set_shards(self, count: int, rank: int = 0, size: int = 1) -> None:
        """Divide the sequence, from its beginning, among `count` shards: neighbours belong to one of `size` ranks."""
        self.num_shards = count
        self.shards = [DataShard(n, n) for n in range(rank * count // size, (rank + 1) * count // size)]
        self._ahead: deque[SampleIndex] = deque()  # samples of all shards from the slowest own one on

    def draw(self) -> SampleIndex:
        point = uniform(self.seed, self.global_index) * self._bounds[-1]
        index = bisect(self._bounds, point)
        component = self.components[index]
        length = len(component.source)
        epoch, offset = divmod(self._drawn[index], length)
        if offset == 0 or index not in self._orders:
            self._orders[index] = permutation(length, mix(self.seed, text_hash(component.key)), epoch)
        sample = SampleIndex(index, epoch, int(self._orders[index][offset]), self.global_index)
        self._drawn[index] += 1
        self.global_index += 1
        return sample

    def take(self, shard: DataShard) -> SampleIndex:
        while not self._ahead or self._ahead[-1].global_index < shard.next:
            self._ahead.append(self.draw())
        sample = self._ahead[shard.next - self._ahead[0].global_index]
        shard.next += self.num_shards
        slowest = min(other.next for other in self.shards)
        while self._ahead and self._ahead[0].global_index < slowest:
            self._ahead.popleft()
        return sample

    def record(self, sample: SampleIndex) -> Record:
        """The record of a sample; DataError if its row is broken."""
        return self.components[sample.component].source.at(sample.index, sample.epoch)

    def state(self) -> Cursor:
        """JSON-able: the position of the sequence at the slowest own shard, and that of each own shard."""
        cursors = {}
        for index, component in enumerate(self.components):
            length = len(component.source)
            drawn = self._drawn[index] - sum(sample.component == index for sample in self._ahead)
            cursors[component.key] = {"epoch": drawn // length, "offset": drawn % length, "length": length}
        global_index = self.global_index - len(self._ahead)
        shards = {
            str(shard.index): {"next": shard.next, "buffer": [list(astuple(one)) for one in shard.buffer]}
            for shard in self.shards
        }
        mixture = {"seed": self.seed, "global_index": global_index, "components": cursors}
        return {"mixture": mixture, "num_shards": self.num_shards, "shards": shards}

    def restore(self, state: Cursor) -> None:
        """Continue from a position of `merge`, divided again among other shards; DataError if the data changed."""
        self._ahead.clear()
        self._orders.clear()
        mixture, cursors = state["mixture"], state["mixture"]["components"]
        if mixture["seed"] != self.seed or set(cursors) != {component.key for component in self.components}:
            raise DataError("the data of this run has changed (seed or sources): resume with the recipe it began with")
        for index, component in enumerate(self.components):
            key, now = component.key, len(component.source)
            cursor, was = cursors[key], cursors[key]["length"]
            if was != now:
                raise DataError(f"{key} had {was} records and has {now} now: restore the data, or start again")
            self._drawn[index] = cursor["epoch"] * now + cursor["offset"]
        self.global_index = mixture["global_index"]
        if state["num_shards"] == self.num_shards:
            for shard in self.shards:
                found = state["shards"][str(shard.index)]
                shard.next, shard.buffer = found["next"], [SampleIndex(*one) for one in found["buffer"]]
            slowest = min(shard.next for shard in self.shards)
            while self.global_index < slowest:
                self.draw()
        else:
            self._divide_again(state)

    def _divide_again(self, state: Cursor) -> None:
        """Divide first the samples drawn but not used among the new shards, then the rest of the sequence."""
        shards, old = state["shards"], state["num_shards"]
        begun = [SampleIndex(*one) for shard in shards.values() for one in shard["buffer"]]
        end = max(shard["next"] for shard in shards.values())
        while self.global_index < end:
            sample = self.draw()
            if sample.global_index >= shards[str(sample.global_index % old)]["next"]:
                begun.append(sample)
        begun.sort(key=lambda sample: sample.global_index)
        start = self.global_index
        for shard in self.shards:
            shard.buffer = begun[shard.index :: self.num_shards]
            shard.next = start + (shard.index - start) % self.num_shards


def epochs_seen(state: Mapping[str, Any]) -> dict[str, float]:
    """How often all records of each component were drawn, by its key, from the state of a mixture."""
    cursors = state["components"].items()
    return {key: cursor["epoch"] + cursor["offset"] / cursor["length"] for key, cursor in cursors}


def merge(states: Sequence[Cursor]) -> Cursor:
    slowest = min(states, key=lambda state: state["mixture"]["global_index"])
    shards = {index: shard for state in states for index, shard in state["shards"].items()}
    return {**slowest, "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}
