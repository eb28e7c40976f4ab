"""Draws dealt out to lanes: nothing is lost or met twice, whoever holds a lane and however many go on."""

from __future__ import annotations

import json
import random

import pytest

from openm6.data.mixture import Component, Lanes, Mixture, merge, own_lanes
from tests.data.lists import ListSource


def mixture() -> Mixture:
    sources = [ListSource(str(size), [{"id": str(number)} for number in range(size)]) for size in (7, 11)]
    return Mixture([Component(source=source, task="x") for source in sources], seed=3)


def open_lanes(count: int, size: int) -> list[Lanes]:
    return [Lanes(mixture(), count, own_lanes(count, rank, size)) for rank in range(size)]


def take_some(ranks: list[Lanes], dice: random.Random) -> list[int]:
    """Serials used up: every lane takes a random number of draws and leaves a few of them waiting."""
    used = []
    for rank in ranks:
        for lane in rank.own:
            ready = lane.waiting + [rank.take(lane) for _ in range(dice.randrange(6))]
            keep = dice.randrange(len(ready) + 1) if ready else 0
            lane.waiting = ready[:keep]
            used += [draw.serial for draw in ready[keep:]]
    return used


@pytest.mark.parametrize(
    "plan", [[(1, 1), (4, 2), (1, 1)], [(4, 4), (4, 2), (4, 4)], [(3, 3), (4, 4), (2, 1)]]
)
def test_nothing_is_lost_or_met_twice(plan: list[tuple[int, int]]) -> None:
    dice = random.Random(5)
    used: list[int] = []
    ranks = open_lanes(*plan[0])
    for count, size in plan:
        fresh = open_lanes(count, size)
        state = json.loads(json.dumps(merge([rank.state() for rank in ranks])))
        for rank in fresh:
            rank.restore(state)
        ranks = fresh
        for _ in range(20):
            used += take_some(ranks, dice)
    waiting = [draw.serial for rank in ranks for lane in rank.own for draw in lane.waiting]
    everything = sorted(used + waiting)
    assert len(set(everything)) == len(everything)
    first_open = min(lane.next for rank in ranks for lane in rank.own)
    assert set(range(first_open)) <= set(everything)


def test_a_lane_gives_the_same_draws_whoever_holds_it() -> None:
    alone, shared = open_lanes(4, 1), open_lanes(4, 2)
    ours = {lane.number: [alone[0].take(lane) for _ in range(9)] for lane in alone[0].own}
    theirs = {lane.number: [rank.take(lane) for _ in range(9)] for rank in shared for lane in rank.own}
    assert ours == theirs
    assert merge([rank.state() for rank in shared])["lanes"] == alone[0].state()["lanes"]


def test_lanes_are_shared_evenly() -> None:
    assert [list(own_lanes(6, rank, 4)) for rank in range(4)] == [[0], [1, 2], [3], [4, 5]]
