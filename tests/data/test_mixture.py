"""The sequence of samples and its data shards: resumed exactly, nothing lost or seen twice."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openm6.core.errors import DataError
from openm6.data.mixture import Component, MixtureSampler, SampleIndex, merge
from tests.data.lists import ListSource


def components(lengths: list[int], weights: list[float] | None = None) -> list[Component]:
    sources = [ListSource(f"s{n}", [{"id": f"{n}/{i}"} for i in range(length)]) for n, length in enumerate(lengths)]
    return [
        Component(source=source, task="t", weight=weight)
        for source, weight in zip(sources, weights or [1.0] * len(lengths), strict=True)
    ]


def draws(mixture: MixtureSampler, count: int) -> list[SampleIndex]:
    return [mixture.draw() for _ in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 2**63), st.integers(0, 60))
def test_resuming_anywhere_goes_on_exactly(lengths, seed, before):
    unbroken = MixtureSampler(components(lengths), seed)
    draws(unbroken, before)
    state = json.loads(json.dumps(unbroken.state()))
    resumed = MixtureSampler(components(lengths), seed)
    resumed.restore(state)
    assert draws(resumed, 50) == draws(unbroken, 50)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 2**32))
def test_each_epoch_holds_each_record_once(lengths, seed):
    seen: Counter[tuple[int, int, int]] = Counter()
    found = draws(MixtureSampler(components(lengths), seed), 200)
    for draw in found:
        seen[draw.component, draw.epoch, draw.index] += 1
        assert 0 <= draw.index < lengths[draw.component]
    assert max(seen.values()) == 1
    assert [draw.global_index for draw in found] == list(range(200))
    for number, length in enumerate(lengths):
        finished = max((draw.epoch for draw in found if draw.component == number), default=0)
        for epoch in range(finished):
            assert sum((number, epoch, index) in seen for index in range(length)) == length


def test_weights_are_kept():
    counts = Counter(draw.component for draw in draws(MixtureSampler(components([5, 5, 5], [1.0, 2.0, 5.0]), 3), 8000))
    assert [counts[n] / 8000 for n in range(3)] == pytest.approx([0.125, 0.25, 0.625], abs=0.02)


def test_epochs_are_shuffled_anew_and_seeds_differ():
    orders = [[draw.index for draw in draws(MixtureSampler(components([30]), seed), 60)] for seed in (1, 2)]
    assert orders[0][:30] != orders[0][30:] and orders[0] != orders[1]
    assert orders[0][:30] != sorted(orders[0][:30])


def test_an_unrelated_component_does_not_reorder_the_others():
    alone = [draw.index for draw in draws(MixtureSampler(components([20]), 5), 20)]
    together = [draw.index for draw in draws(MixtureSampler(components([20, 7]), 5), 80) if draw.component == 0]
    assert together[:20] == alone


def test_a_draw_gives_its_record():
    mixture = MixtureSampler(components([4, 3]), 0)
    for draw in draws(mixture, 20):
        assert mixture.record(draw)["id"] == f"{draw.component}/{draw.index}"


def test_a_broken_record_is_an_error_and_the_sequence_goes_on():
    mixture = MixtureSampler([Component(source=ListSource("x", [None]), task="t")], 0)
    with pytest.raises(DataError, match="x, row 0"):
        mixture.record(mixture.draw())
    assert mixture.draw() == SampleIndex(0, 1, 0, 1)


@pytest.mark.parametrize("change", ["seed", "length", "name"])
def test_changed_data_is_noticed(change):
    state = MixtureSampler(components([4, 3]), 0).state()
    other = {"seed": MixtureSampler(components([4, 3]), 1), "length": MixtureSampler(components([4, 2]), 0)}
    renamed = [Component(source=part.source, task="other") for part in components([4, 3])]
    mixture = other.get(change) or MixtureSampler(renamed, 0)
    with pytest.raises(DataError, match="restore the data|resume with the recipe"):
        mixture.restore(state)


def test_a_source_without_records_is_refused():
    with pytest.raises(DataError, match="s0/t has no records"):
        MixtureSampler(components([0]), 0)


def sampler() -> MixtureSampler:
    sources = [ListSource(str(size), [{"id": str(number)} for number in range(size)]) for size in (7, 11)]
    return MixtureSampler([Component(source=source, task="x") for source in sources], seed=3)


def open_shards(count: int, size: int) -> list[MixtureSampler]:
    ranks = [sampler() for _ in range(size)]
    for rank, one in enumerate(ranks):
        one.set_shards(count, rank, size)
    return ranks


def take_some(ranks: list[MixtureSampler], rng: random.Random) -> list[int]:
    """Global indices used up: every shard takes a random number of samples and leaves a few of them waiting."""
    used = []
    for rank in ranks:
        for shard in rank.shards:
            ready = shard.buffer + [rank.take(shard) for _ in range(rng.randrange(6))]
            keep = rng.randrange(len(ready) + 1) if ready else 0
            shard.buffer = ready[:keep]
            used += [sample.global_index for sample in ready[keep:]]
    return used


@pytest.mark.parametrize("plan", [[(1, 1), (4, 2), (1, 1)], [(4, 4), (4, 2), (4, 4)], [(3, 3), (4, 4), (2, 1)]])
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
    waiting = [sample.global_index for rank in ranks for shard in rank.shards for sample in shard.buffer]
    everything = sorted(used + waiting)
    assert len(set(everything)) == len(everything)
    first_open = min(shard.next for rank in ranks for shard in rank.shards)
    assert set(range(first_open)) <= set(everything)


def test_a_shard_has_the_same_samples_whichever_rank_holds_it() -> None:
    alone, shared = open_shards(4, 1), open_shards(4, 2)
    ours = {shard.index: [alone[0].take(shard) for _ in range(9)] for shard in alone[0].shards}
    theirs = {shard.index: [rank.take(shard) for _ in range(9)] for rank in shared for shard in rank.shards}
    assert ours == theirs
    assert merge([rank.state() for rank in shared])["shards"] == alone[0].state()["shards"]


def test_shards_are_shared_evenly() -> None:
    shards = [[shard.index for shard in rank.shards] for rank in open_shards(6, 4)]
    assert shards == [[0], [1, 2], [3], [4, 5]]
