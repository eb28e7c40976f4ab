"""Seeds are a pure function of their purpose, and so is every order made from them, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm6.core.seeds import GOLDEN, derive_seed, mix, numpy_generator, permutation, text_hash, uniform


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "step", 1) == 3286008240592085899
    assert derive_seed(7) == 8333924190356522945


def test_no_two_purposes_share_a_seed() -> None:
    purposes = [
        (),
        (1,),
        ("1",),
        (1, 1),
        (11,),
        ("a", "b"),
        ("ab",),
        ("a\x1fb",),
        *(("step", n) for n in range(2000)),
    ]
    seeds = {derive_seed(0, *purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds.isdisjoint({derive_seed(1, *purpose) for purpose in purposes})


def test_generators_repeat() -> None:
    assert numpy_generator(3, "x").integers(1 << 40) == numpy_generator(3, "x").integers(1 << 40)
    assert numpy_generator(3, "x").integers(1 << 40) != numpy_generator(3, "y").integers(1 << 40)


def test_the_order_never_changes():
    # Written down once: a run begun with an earlier version must see the same data when it goes on.
    assert mix(1, 2, 3) == 15020427595393229491
    assert permutation(8, 5, 0).tolist() == [0, 3, 5, 6, 1, 7, 2, 4]
    assert text_hash("emoji/draw") == 18073145619407595505


def test_arrays_and_single_numbers_are_mixed_alike():
    """A permutation sorts what `mix` gives each index, from a start that is `mix` of its parts."""
    start = mix(5, 0)
    single = [mix((start + number * GOLDEN - GOLDEN) % 2**64) for number in range(200)]
    assert permutation(200, 5, 0).tolist() == sorted(range(200), key=single.__getitem__)


@given(st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_a_permutation_holds_each_index_once(length, seed, epoch):
    assert sorted(permutation(length, seed, epoch).tolist()) == list(range(length))


def test_epochs_and_seeds_differ():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_no_place_is_favoured():
    counts = np.zeros((10, 10))
    for seed in range(2000):
        counts[np.arange(10), permutation(10, seed, 0)] += 1
    assert abs(counts - 200).max() < 75  # five deviations of a fair draw


def test_uniform_is_even_and_inside():
    values = np.array([uniform(7, number) for number in range(4000)])
    assert 0 <= values.min() and values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert np.histogram(values, bins=10, range=(0, 1))[0].min() > 320
