"""What a layer keeps, counted by hand, and as few layers computed again as the memory asks for."""

from __future__ import annotations

import pytest

from openm6.models.activations import MARGIN, layer_bytes, layers_to_recompute
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig

CONFIG = BackboneConfig(
    width=32, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16, experts_every=2,
    dense=DenseConfig(hidden=64, ffn="gelu"),
    experts=ExpertsConfig(hidden=16, num_experts=4, top_k=2, num_shared=1),
)  # fmt: skip


def test_bytes_counted_by_hand():
    stream, attention = 4 * 32, (2 * 2 + 2 * 1) * 16
    assert layer_bytes(CONFIG, 0, 10, 2) == pytest.approx(MARGIN * 20 * (stream + attention + 2 * 64))
    sparse = 3 * 16 + 2 * (32 + 3 * 16)
    assert layer_bytes(CONFIG, 1, 10, 4) == pytest.approx(MARGIN * 40 * (stream + attention + sparse))


def test_nothing_is_computed_again_where_all_fits():
    total = sum(layer_bytes(CONFIG, layer, 100, 2) for layer in range(4))
    assert layers_to_recompute(CONFIG, 100, 2, total) == 0
    assert layers_to_recompute(CONFIG, 100, 2, total - 1) == 1
    assert layers_to_recompute(CONFIG, 100, 2, 0.0) == 4


def test_less_memory_never_asks_for_fewer_layers():
    total = sum(layer_bytes(CONFIG, layer, 100, 2) for layer in range(4))
    numbers = [layers_to_recompute(CONFIG, 100, 2, total * share / 10) for share in range(11)]
    assert numbers == sorted(numbers, reverse=True)
