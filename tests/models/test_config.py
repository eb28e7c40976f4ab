"""What a backbone's config refuses, and what it works out."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from openm6.models.config import BackboneConfig

GOOD: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "dense": {"intermediate_size": 48},
}
EXPERTS = {"intermediate_size": 24, "num_experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("wrong", "mend"),
    [
        ({"dense": None}, "set experts"),
        ({"experts": EXPERTS, "dense": None, "moe_layer_freq": 2}, r"set dense\.intermediate_size"),
        ({"experts": EXPERTS, "dense_layers": (4,)}, "layers are 0 to 3"),
        ({"rope_sections": (8, 8, 8)}, "half of head_dim=64"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"sharing": (0, 0, 0)}, "num_layers=4"),
        ({"sharing": (0, 0, 2, 2)}, "without a gap"),
        (
            {"experts": EXPERTS, "moe_layer_freq": 2, "sharing": (0, 0, 0, 0)},
            "only one of them holds experts",
        ),
        ({"widht": 3}, "unknown key .widht."),
    ],
)
def test_config_names_the_mend(wrong, mend):
    with pytest.raises(ValidationError, match=mend):
        BackboneConfig(**{**GOOD, **wrong})


def test_sections_share_the_frequencies():
    assert BackboneConfig(**GOOD).sections == (12, 10, 10)
    assert BackboneConfig(**{**GOOD, "head_dim": 128}).sections == (24, 20, 20)


def test_experts_every_and_dense_layers():
    config = BackboneConfig(**GOOD, experts=EXPERTS, moe_layer_freq=2, dense_layers=(3,))
    assert [config.has_experts(layer) for layer in range(4)] == [False, True, False, False]
    assert not BackboneConfig(**GOOD).has_experts(0)


def test_sharing_all_makes_a_group_of_each_kind():
    config = BackboneConfig(**GOOD, experts=EXPERTS, moe_layer_freq=2, sharing="all")
    assert config.layer_groups == (0, 1, 0, 1)
    assert config.group_layers == (0, 1)
    assert BackboneConfig(**GOOD, sharing="all").shared_with == (0, 0, 0, 0)
