"""The decoder step computes what the backbone computes; int8 weights are close to those that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openm6.inference.decode import (
    DecodeStep,
    QuantizedMatrix,
    QuantizedStack,
    TextHead,
    meets_all_experts,
)
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.cache import SlotWriter
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.moe import Experts
from openm6.ops.sequence import causal_meta

SHAPES = {
    "experts": {"experts": ExpertsConfig(intermediate_size=32, num_experts=4, top_k=2)},
    "many experts": {"experts": ExpertsConfig(intermediate_size=32, num_experts=16, top_k=2)},
    "prototypes": {"experts": ExpertsConfig(intermediate_size=32, num_experts=8, num_prototypes=2, hidden_act="gelu")},
    "shared": {"experts": ExpertsConfig(intermediate_size=32, num_experts=4, top_k=1, num_shared=1)},
    "dense": {"dense": DenseConfig(intermediate_size=64), "qk_norm": False},
    "shared layers": {
        "experts": ExpertsConfig(intermediate_size=32, num_experts=4, top_k=2),
        "sharing": "all",
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fixed", [False, True])
@torch.inference_mode()
def test_the_step_is_the_backbone(shape: dict, fixed: bool) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, **shape)
    backbone = Backbone(config).requires_grad_(False)
    embedding = torch.randn(50, 64)
    text_head = TextHead(backbone, embedding, embedding, None)
    ids, lengths = torch.randint(0, 50, (3, 9)), (8, 3, 5)
    cache = backbone.new_cache(4, 32)
    for row, length in enumerate(lengths):
        backbone(embedding[ids[row : row + 1, :length]], causal_meta(1, length), SlotWriter(cache, row))
    positions = torch.tensor(lengths)
    token = ids[torch.arange(3), positions]
    found = DecodeStep(text_head, cache, fixed=fixed)(token, positions, positions, 16)
    for row, length in enumerate(lengths):
        hidden, _ = backbone(embedding[ids[row : row + 1, : length + 1]], causal_meta(1, length + 1))
        torch.testing.assert_close(found[row], embedding @ hidden[0, -1], rtol=1e-4, atol=1e-4)


def plain(matrix: QuantizedMatrix) -> Tensor:
    """The weight that the matrix stands for.  # O I"""
    return matrix.rows.to(matrix.scale.dtype) * matrix.scale[:, None]


def test_int8_weights_stand_for_what_they_say() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 32), torch.randn(5, 32)
    matrix = QuantizedMatrix(weight)
    assert float((plain(matrix) - weight).abs().max()) <= float(weight.abs().max()) / 254 + 1e-6
    torch.testing.assert_close(matrix(x), x @ plain(matrix).t(), rtol=1e-4, atol=1e-4)


def test_int8_experts_stand_for_what_they_say() -> None:
    """A scale for each output of each expert, in both ways of multiplying."""
    torch.manual_seed(0)
    weight, x = torch.randn(3, 32, 64), torch.randn(3, 5, 32)
    weight[1] *= 100  # one loud expert must not blur the others
    stack, counts = QuantizedStack(weight), torch.tensor([2, 0, 3])
    assert isinstance(stack, QuantizedStack)
    for expert, matrix in enumerate(stack.matrices):
        error = (plain(matrix).t() - weight[expert]).abs().amax(0)
        assert bool((error <= weight[expert].abs().amax(0) / 254 + 1e-6).all())
    weights = torch.stack([plain(matrix).t() for matrix in stack.matrices])
    torch.testing.assert_close(stack.each(x), torch.bmm(x, weights), rtol=1e-4, atol=1e-3)
    rows = torch.randn(5, 32)
    expected = torch.cat([rows[:2] @ weights[0], rows[2:] @ weights[2]])
    torch.testing.assert_close(stack.grouped(rows, counts), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("experts", [4, 16])  # all rows by all experts, and rows sorted by their own
def test_int8_decoding_reads_no_expert_in_full(experts: int) -> None:
    """The answer of int8 weights is close to that of the weights, and the experts are among them."""
    shape = {"experts": ExpertsConfig(intermediate_size=32, num_experts=experts, top_k=2)}
    torch.manual_seed(1)
    backbone = Backbone(BackboneConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, **shape))
    embedding = torch.randn(50, 32)
    text_head = TextHead(backbone.eval(), embedding, embedding, 1)
    arguments = (
        torch.tensor([3, 4, 5]),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
        8,
    )
    with torch.inference_mode():
        plain = DecodeStep(text_head, backbone.new_cache(3, 16))(*arguments)
        step = DecodeStep(text_head, backbone.new_cache(3, 16), "int8")
        step(*arguments)
        for part in backbone.modules():
            if isinstance(part, Experts):
                part.up.zero_()
                part.down.zero_()
        found = step(*arguments)
    assert float((found - plain).norm() / plain.norm()) < 0.05


def test_on_a_gpu_a_pass_never_waits_for_a_count() -> None:
    """In float32 and int8 rows are not sorted, however many: that would need the counts on the host."""
    assert all(meets_all_experts(rows, True, False, 64, 2) for rows in (1, 170, 171, 1024))
    assert meets_all_experts(170, True, True, 64, 2) and not meets_all_experts(171, True, True, 64, 2)
    assert meets_all_experts(500, False, False, 4, 2) and not meets_all_experts(1, False, True, 5, 2)
