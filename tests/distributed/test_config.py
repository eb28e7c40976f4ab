"""The axes of a run: filled in, multiplied out, refused."""

from __future__ import annotations

import pytest

from openm6.core.errors import ConfigError
from openm6.distributed.config import MeshShape, ParallelConfig


@pytest.mark.parametrize(
    ("given", "size", "accelerated", "expected"),
    [
        ({}, 4, False, (4, 1, 1)),
        ({}, 4, True, (1, 1, 4)),
        ({}, 5, True, (1, 5, 1)),  # eight experts are not dealt out to five
        ({"ep": 2}, 4, False, (2, 1, 2)),
        ({"ep": 2}, 4, True, (1, 2, 2)),
        ({"dp_shard": 2, "dp_replicate": 2}, 8, False, (2, 2, 2)),
        ({"dp_replicate": 1, "dp_shard": 1, "ep": 4}, 4, False, (1, 1, 4)),
    ],
)
def test_automatic_axes_take_what_is_left(
    given: dict[str, int], size: int, accelerated: bool, expected: tuple[int, int, int]
) -> None:
    assert ParallelConfig(**given).resolve(size, 8, accelerated) == MeshShape(*expected)


def test_axes_must_multiply_out_to_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"dp_replicate=2 × dp_shard=1 × ep=1 is 2 ranks, but 4 run: change an axis"):
        ParallelConfig(dp_replicate=2, dp_shard=1, ep=1).resolve(4, 8, False)
    with pytest.raises(ConfigError, match="is 3 ranks, but 4 run"):
        ParallelConfig(dp_shard=3).resolve(4, 8, False)


@pytest.mark.parametrize("num_experts", [6, None])
def test_experts_must_be_dealt_out_evenly(num_experts: int | None) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep=4 cannot distribute .* experts evenly"):
        ParallelConfig(ep=4).resolve(4, num_experts, False)


def test_an_axis_has_at_least_one_rank() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.dp_replicate must be at least 1, or auto"):
        ParallelConfig(dp_replicate=0).resolve(4, 8, False)
