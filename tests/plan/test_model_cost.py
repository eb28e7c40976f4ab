"""Parameters and operations against hand-computed cases, and against models that are really built."""

from __future__ import annotations

import pytest
import torch

from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.presets import preset
from openm6.nn.config import DenseConfig, ExpertsConfig, ModalityExpertsConfig
from openm6.plan.plan import (
    attention_operations,
    max_layer_parameters,
    operations_per_token,
    stored_parameters,
    weights_per_token,
)
from tests.small_model import modalities

SPARSE = BackboneConfig(
    hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32,
    experts=ExpertsConfig(intermediate_size=128, num_experts=4, top_k=2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trillions"),
    [
        ("m6-base", 24 * (4 * 1024**2 + 2 * 1024 * 4096) / 1e12),
        ("m6-10b", 50 * (4 * 4096**2 + 2 * 4096 * 16384) / 1e12),
        ("m6-100b", (12 * 1024 * 2 * 1024 * 4096 + 12 * 2 * 1024 * 4096 + 24 * 4 * 1024**2) / 1e12),
        ("m6t-1t", 24 * 960 * 2 * 1024 * 21248 / 1e12),
        ("m6-10t", 48 * 10240 * 2 * 1024 * 9984 / 1e12),
    ],
)
def test_totals_of_the_papers_presets(name: str, trillions: float) -> None:
    chosen = preset(name)
    # The rest is embedding, norms, routers and, where experts dominate, attention.
    assert stored_parameters(chosen.backbone, chosen.vocab_size).total == pytest.approx(trillions * 1e12, rel=0.08)


def test_ten_trillion_by_hand() -> None:
    chosen = preset("m6-10t")
    experts = 48 * 10_240 * 2 * 1024 * 9984
    others = 48 * (4 * 1024**2 + 10_240 * 1024 + 2 * 1024) + 1024 + 21_128 * 1024
    stored = stored_parameters(chosen.backbone, chosen.vocab_size)
    assert (stored.experts, stored.others) == (experts, others)


def test_sharing_stores_a_set_once() -> None:
    shared = SPARSE.model_copy(update={"sharing": "all"})
    assert stored_parameters(shared, 100).experts * 2 == stored_parameters(SPARSE, 100).experts
    assert weights_per_token(shared, 100) == weights_per_token(SPARSE, 100)


def test_stored_is_what_a_model_has() -> None:
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in Backbone(SPARSE).parameters())
    assert stored_parameters(SPARSE, 100).total == built + 100 * 64


def test_experts_for_images_count_as_the_largest_that_a_token_passes() -> None:
    for_images = ModalityExpertsConfig(modalities=("image",), intermediate_size=48, num_experts=4, top_k=2)
    config = SPARSE.model_copy(update={"modality_experts": [for_images]})
    router, network = 4 * 64, 3 * 64 * 48
    more = weights_per_token(config, 100).others - weights_per_token(SPARSE, 100).others
    assert more == 2 * (router + for_images.experts_per_token * network)
    assert stored_parameters(config, 100).total - stored_parameters(SPARSE, 100).total == 2 * (router + 4 * network)


@pytest.mark.parametrize("width", [64, 192])
def test_adapters_are_what_the_modalities_have(width: int) -> None:
    every = modalities()
    with torch.device("meta"):
        built = sum(
            parameter.numel()
            for modality in every.values()
            for name, adapter in modality.adapters(width).items()
            for parameter in adapter.parameters()
            if name != "text"
        )
    config = SPARSE.model_copy(update={"hidden_size": width})
    with_them, without = (stored_parameters(config, 100, adapters).others for adapters in (True, False))
    assert with_them - without == built


def test_weights_a_token_by_hand() -> None:
    weights = weights_per_token(SPARSE, 100)
    attention, router, network = 64 * 2 * (2 + 1) * 32, 64 * 4, 3 * 64 * 128
    assert weights.experts == 2 * 2 * network and weights.others == 2 * (attention + router) + 100 * 64


def test_capacity_pads_and_dense_layers_count() -> None:
    config = BackboneConfig(
        hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, moe_layer_freq=2,
        dense=DenseConfig(intermediate_size=256, hidden_act="gelu"),
        experts=ExpertsConfig(
            intermediate_size=128, num_experts=4, num_prototypes=2, num_shared=1, hidden_act="gelu",
            capacity_factor=1.25,
        ),
    )  # fmt: skip
    weights = weights_per_token(config, 100)
    assert weights.experts == 1.25 * 2 * 2 * 64 * 128
    attention, router = 64 * 2 * (2 + 2) * 32, 64 * 4
    assert weights.others == 2 * attention + router + 2 * 64 * 256 + 2 * 64 * 128 + 100 * 64


def test_operations_are_six_for_each_weight_and_attention() -> None:
    weights = weights_per_token(SPARSE, 100).total
    assert attention_operations(SPARSE, 10) == 4 * 10 * 64 * 2
    assert operations_per_token(SPARSE, 100, 10) == 3 * (2 * weights + 4 * 10 * 64 * 2)


def test_the_largest_layer_is_the_sparse_one() -> None:
    config = preset("m6-100b").backbone
    assert max_layer_parameters(config) == pytest.approx(1024 * 2 * 1024 * 4096 + 4 * 1024**2 + 1024 * 1024, rel=1e-4)
