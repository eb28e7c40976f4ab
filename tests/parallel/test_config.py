"""The axes of a run: filled in, multiplied out, refused."""

from __future__ import annotations

import pytest

from openm6.core.errors import ConfigError
from openm6.parallel.config import MeshShape, ParallelConfig


@pytest.mark.parametrize(
    ("given", "size", "accelerated", "expected"),
    [
        ({}, 4, False, (4, 1, 1)),
        ({}, 4, True, (1, 1, 4)),
        ({}, 5, True, (1, 5, 1)),  # eight experts are not dealt out to five
        ({"experts": 2}, 4, False, (2, 1, 2)),
        ({"experts": 2}, 4, True, (1, 2, 2)),
        ({"shard": 2, "data": 2}, 8, False, (2, 2, 2)),
        ({"data": 1, "shard": 1, "experts": 4}, 4, False, (1, 1, 4)),
    ],
)
def test_automatic_axes_take_what_is_left(
    given: dict[str, int], size: int, accelerated: bool, expected: tuple[int, int, int]
) -> None:
    assert ParallelConfig(**given).resolve(size, 8, accelerated) == MeshShape(*expected)


def test_axes_must_multiply_out_to_the_ranks() -> None:
    with pytest.raises(
        ConfigError, match=r"data=2 × shard=1 × experts=1 is 2 ranks, but 4 run: change an axis"
    ):
        ParallelConfig(data=2, shard=1, experts=1).resolve(4, 8, False)
    with pytest.raises(ConfigError, match="is 3 ranks, but 4 run"):
        ParallelConfig(shard=3).resolve(4, 8, False)


@pytest.mark.parametrize("num_experts", [6, None])
def test_experts_must_be_dealt_out_evenly(num_experts: int | None) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.experts=4 cannot distribute .* experts evenly"):
        ParallelConfig(experts=4).resolve(4, num_experts, False)


def test_an_axis_has_at_least_one_rank() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.data must be at least 1, or auto"):
        ParallelConfig(data=0).resolve(4, 8, False)
