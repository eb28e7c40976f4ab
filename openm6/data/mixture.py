"""The order in which a run sees its data: one seeded sequence of samples, dealt to data shards, with a small cursor."""

# Letters: L lanes, s serial number of a draw

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openm6.base.errors import DataError
from openm6.base.seeds import mix, permutation, text_hash, uniform
from openm6.data.records import Record
from openm6.data.source import Source


@dataclass(frozen=True)
class Draw:
    """One place in the sequence: the `serial`-th draw takes record `index` of `component` in its `epoch`."""

    component: int
    epoch: int
    index: int
    serial: int


@dataclass(frozen=True, kw_only=True)
class Component:
    """A source read through a task, with its weight in the mixture."""

    source: Source
    task: str
    weight: float = 1.0

    @property
    def key(self) -> str:
        """The name by which the mixture's state knows the component."""
        return f"{self.source.name}/{self.task}"


class Mixture:
    """Draws components by weight, and each component's records shuffled without replacement per epoch.

    Every draw is a pure function of the seed, its serial and the component's own count, so the sequence is the same
    for any number of workers or ranks, and any of them may jump to a place of it by `restore`.
    """

    def __init__(self, components: Sequence[Component], seed: int) -> None:
        _check(components)
        self.components = tuple(components)
        self._seed = seed
        self._bounds = np.cumsum([component.weight for component in components]).tolist()
        self._names = [text_hash(component.key) for component in components]
        self._serial = 0
        self._cursor = [(0, 0) for _ in components]  # epoch, offset
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # component -> the epoch shuffled last

    def draw(self) -> Draw:
        """The next draw of the sequence."""
        place = uniform(self._seed, self._serial) * self._bounds[-1]
        component = next(number for number, bound in enumerate(self._bounds) if place < bound)
        epoch, offset = self._cursor[component]
        index = int(self._order(component, epoch)[offset])
        draw = Draw(component, epoch, index, self._serial)
        last = offset + 1 == len(self.components[component].source)
        self._cursor[component] = (epoch + 1, 0) if last else (epoch, offset + 1)
        self._serial += 1
        return draw

    def record(self, draw: Draw) -> Record:
        """The record of a draw; DataError where its row is broken."""
        return self.components[draw.component].source.at(draw.index, draw.epoch)

    @property
    def serial(self) -> int:
        """The number of the next draw."""
        return self._serial

    def state(self, undo: Sequence[Draw] = ()) -> dict[str, Any]:
        """The place in the sequence, as JSON-able values; before the last draws where those are given in `undo`."""
        cursors = {}
        for number, (component, (epoch, offset)) in enumerate(
            zip(self.components, self._cursor, strict=True)
        ):
            length = len(component.source)
            taken = epoch * length + offset - sum(draw.component == number for draw in undo)
            cursors[component.key] = {"epoch": taken // length, "offset": taken % length, "length": length}
        return {"seed": self._seed, "serial": self._serial - len(undo), "components": cursors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a place that `state` gave; the draws after it are exactly those that followed then.

        Raises:
            DataError: the state is of another seed, of other components, or a source has another length now.
        """
        cursors = state["components"]
        names = {component.key for component in self.components}
        if state["seed"] != self._seed or set(cursors) != names:
            raise DataError(
                "the data of this run has changed (seed or sources): resume with the recipe it began with"
            )
        for component in self.components:
            was, now = cursors[component.key]["length"], len(component.source)
            if was != now:
                raise DataError(
                    f"{component.key} had {was} records and has {now} now: restore the data, or begin anew"
                )
        self._cursor = [
            (int(c["epoch"]), int(c["offset"])) for c in (cursors[x.key] for x in self.components)
        ]
        self._serial = int(state["serial"])

    def _order(self, component: int, epoch: int) -> np.ndarray:
        known = self._orders.get(component)
        if known is None or known[0] != epoch:
            length = len(self.components[component].source)
            known = (epoch, permutation(length, mix(self._seed, self._names[component]), epoch))
            self._orders[component] = known
        return known[1]


def epochs_seen(state: Mapping[str, Any]) -> dict[str, float]:
    """How often all records of each component were drawn, by its key, from the state of a mixture."""
    cursors = state["components"].items()
    return {key: cursor["epoch"] + cursor["offset"] / cursor["length"] for key, cursor in cursors}


def _check(components: Sequence[Component]) -> None:
    if not components:
        raise DataError("the mixture is empty: add at least one source with a task")
    keys = [component.key for component in components]
    for component in components:
        if len(component.source) == 0:
            raise DataError(f"{component.key} has no records to draw: check its path and split")
        if not component.weight > 0 or component.weight == float("inf"):
            raise DataError(
                f"{component.key} has weight {component.weight}: give a number above 0 or leave it out"
            )
        if keys.count(component.key) > 1:
            raise DataError(f"the mixture holds {component.key} twice: add up the weights")


Cursor = dict[str, Any]


@dataclass
class Lane:
    """One lane: the serial of its next draw, and the draws it took that wait for room in a row."""

    number: int
    next: int
    waiting: list[Draw] = field(default_factory=list)


class Lanes:
    """The lanes that one rank works on, fed from the mixture's one sequence."""

    def __init__(self, mixture: Mixture, count: int, own: Sequence[int]) -> None:
        self.mixture = mixture
        self.count = count
        self.own = [Lane(number, number) for number in own]
        self._front: deque[Draw] = deque()  # draws of all lanes from the slowest own one on

    def take(self, lane: Lane) -> Draw:
        """The lane's next draw."""
        while not self._front or self._front[-1].serial < lane.next:
            self._front.append(self.mixture.draw())
        draw = self._front[lane.next - self._front[0].serial]
        lane.next += self.count
        slowest = min(other.next for other in self.own)
        while self._front and self._front[0].serial < slowest:
            self._front.popleft()
        return draw

    def state(self) -> Cursor:
        """JSON-able: the mixture's place at the slowest own lane, and each own lane's."""
        lanes = {
            str(lane.number): {"next": lane.next, "waiting": [_as_list(draw) for draw in lane.waiting]}
            for lane in self.own
        }
        return {"mixture": self.mixture.state(list(self._front)), "count": self.count, "lanes": lanes}

    def restore(self, state: Cursor) -> None:
        """Goes to a place that `merge` put together; with another number of lanes it deals anew."""
        self._front.clear()
        self.mixture.restore(state["mixture"])
        if state["count"] == self.count:
            for lane in self.own:
                found = state["lanes"][str(lane.number)]
                lane.next, lane.waiting = found["next"], [Draw(*draw) for draw in found["waiting"]]
            slowest = min(lane.next for lane in self.own)
            while self.mixture.serial < slowest:
                self.mixture.draw()
        else:
            self._deal_anew(state)

    def _deal_anew(self, state: Cursor) -> None:
        """All draws begun but not used up go round the new lanes first; then the sequence goes on."""
        lanes, old = state["lanes"], state["count"]
        begun = [Draw(*draw) for lane in lanes.values() for draw in lane["waiting"]]
        end = max(lane["next"] for lane in lanes.values())
        while self.mixture.serial < end:
            draw = self.mixture.draw()
            if draw.serial >= lanes[str(draw.serial % old)]["next"]:
                begun.append(draw)
        begun.sort(key=lambda draw: draw.serial)
        start = self.mixture.serial
        for lane in self.own:
            lane.waiting = begun[lane.number :: self.count]
            lane.next = start + (lane.number - start) % self.count


def merge(states: Sequence[Cursor]) -> Cursor:
    """The place of the whole run from those of its ranks."""
    slowest = min(states, key=lambda state: state["mixture"]["serial"])
    lanes = {number: lane for state in states for number, lane in state["lanes"].items()}
    return {**slowest, "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def own_lanes(count: int, rank: int, size: int) -> range:
    """The lanes of one of `size` ranks: neighbours, as even as can be."""
    return range(rank * count // size, (rank + 1) * count // size)


def _as_list(draw: Draw) -> list[int]:
    return [draw.component, draw.epoch, draw.index, draw.serial]
