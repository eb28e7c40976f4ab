"""One sequence of draws dealt out to lanes, so that ranks share a run's data and another number of them can go on.

Draw number s belongs to lane s mod L. Each lane packs rows of its own and takes its draws at its own pace; which rank
works on a lane is of no matter to what the lane gives. So the data's place is one small cursor for each lane, whoever
held it, and no record is lost or met twice when a run goes on with more ranks or fewer.
"""

# Letters: L lanes, s serial number of a draw

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openm6.data.mixture import Draw, Mixture

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
