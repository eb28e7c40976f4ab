"""Samples dealt to data shards: none is lost or seen twice, whichever rank holds a shard and however many resume."""

from __future__ import annotations

import json
import random

import pytest

from openm6.data.mixture import Component, MixtureSampler, merge, own_shards
from tests.data.lists import ListSource


def sampler() -> MixtureSampler:
    sources = [ListSource(str(size), [{"id": str(number)} for number in range(size)]) for size in (7, 11)]
    return MixtureSampler([Component(source=source, task="x") for source in sources], seed=3)


def open_shards(count: int, size: int) -> list[MixtureSampler]:
    ranks = [sampler() for _ in range(size)]
    for rank, one in enumerate(ranks):
        one.set_shards(count, own_shards(count, rank, size))
    return ranks


def take_some(ranks: list[MixtureSampler], rng: random.Random) -> list[int]:
    """Global indices used up: every shard takes a random number of samples and leaves a few of them waiting."""
    used = []
    for rank in ranks:
        for shard in rank.shards:
            ready = shard.waiting + [rank.take(shard) for _ in range(rng.randrange(6))]
            keep = rng.randrange(len(ready) + 1) if ready else 0
            shard.waiting = ready[:keep]
            used += [sample.global_index for sample in ready[keep:]]
    return used


@pytest.mark.parametrize(
    "plan", [[(1, 1), (4, 2), (1, 1)], [(4, 4), (4, 2), (4, 4)], [(3, 3), (4, 4), (2, 1)]]
)
def test_nothing_is_lost_or_met_twice(plan: list[tuple[int, int]]) -> None:
    rng = random.Random(5)
    used: list[int] = []
    ranks = open_shards(*plan[0])
    for count, size in plan:
        fresh = open_shards(count, size)
        state = json.loads(json.dumps(merge([rank.state() for rank in ranks])))
        for rank in fresh:
            rank.restore(state)
        ranks = fresh
        for _ in range(20):
            used += take_some(ranks, rng)
    waiting = [sample.global_index for rank in ranks for shard in rank.shards for sample in shard.waiting]
    everything = sorted(used + waiting)
    assert len(set(everything)) == len(everything)
    first_open = min(shard.next for rank in ranks for shard in rank.shards)
    assert set(range(first_open)) <= set(everything)


def test_a_shard_has_the_same_samples_whichever_rank_holds_it() -> None:
    alone, shared = open_shards(4, 1), open_shards(4, 2)
    ours = {shard.number: [alone[0].take(shard) for _ in range(9)] for shard in alone[0].shards}
    theirs = {shard.number: [rank.take(shard) for _ in range(9)] for rank in shared for shard in rank.shards}
    assert ours == theirs
    assert merge([rank.state() for rank in shared])["lanes"] == alone[0].state()["lanes"]


def test_shards_are_shared_evenly() -> None:
    assert [list(own_shards(6, rank, 4)) for rank in range(4)] == [[0], [1, 2], [3], [4, 5]]
