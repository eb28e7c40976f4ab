"""Seeds are a pure function of their purpose, the same everywhere."""

from __future__ import annotations

from openm6.core.seeds import derive_seed, numpy_generator


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
