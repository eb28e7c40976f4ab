"""The simulation of a large run: ranks' shares add up, and the all-to-all is as large as the formula says."""

from __future__ import annotations

import pytest

from benchmarks.simulate import simulate
from openm6.core.errors import ConfigError
from openm6.models.config import BackboneConfig, count_parameters
from openm6.models.presets import preset
from openm6.nn.config import ExpertsConfig

SMALL = BackboneConfig(
    hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32, qk_norm=False,
    experts=ExpertsConfig(
        intermediate_size=64, num_experts=16, num_prototypes=4, hidden_act="gelu", balance="none", capacity_factor=1.25
    ),
)  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2])
def test_shares_add_up(shards: int) -> None:
    found = [simulate(SMALL, 4, rank, shards, rows=1, length=32) for rank in range(4)]
    assert sum(rank["parameters_per_rank"] for rank in found) == count_parameters(SMALL).total
    assert len({rank["expert_parameters_per_rank"] for rank in found}) == 1
    for rank in found:
        exchanged = rank["collectives"]["all_to_all"]
        assert exchanged["bytes"] == rank["expected_exchange_bytes"]
        assert exchanged["calls"] == 2 * 2  # each way, forwards and backwards


def test_ten_trillion_parameters_on_512_ranks() -> None:
    """Two of the 48 layers, as the last rank sees them."""
    config = preset("m6-10t").backbone.model_copy(update={"num_layers": 2})
    found = simulate(config, 512, 511, 1, rows=1, length=64)
    assert found["expert_parameters_per_rank"] == 2 * 20 * 2 * 1024 * 9984
    assert found["collectives"]["all_to_all"]["bytes"] == found["expected_exchange_bytes"]


def test_ranks_that_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 ranks in 1 shards cannot share the model's experts evenly"):
        simulate(SMALL, 7, 0, 1, rows=1, length=32)
