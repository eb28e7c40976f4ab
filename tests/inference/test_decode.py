"""The decoder step computes what the backbone computes; int8 weights are close to those that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openm6.inference import decode
from openm6.inference.decode import DecodeStep, TextHead, meets_all_experts, reads_chosen_experts
from openm6.inference.load import Precision, quantize
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
    text_head = TextHead(backbone, embedding, embedding, frozenset())
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


def decoded(config: BackboneConfig, precision: Precision | None, fixed: bool, rows: int) -> Tensor:
    """Logits of first tokens, the same weights in each precision."""
    torch.manual_seed(1)
    backbone = Backbone(config).eval().requires_grad_(False)
    embedding = torch.randn(50, 32)
    if precision == "int8":
        quantize(backbone)
    step = DecodeStep(TextHead(backbone, embedding, embedding, frozenset({1})), backbone.new_cache(rows, 16), fixed)
    start = torch.zeros(rows, dtype=torch.int64)
    with torch.inference_mode():
        return step(torch.arange(rows) % 50, start, start, 8)


def config_of(experts: int) -> BackboneConfig:
    shape = {"experts": ExpertsConfig(intermediate_size=32, num_experts=experts, top_k=2)}
    return BackboneConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, **shape)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("experts", [4, 16])
def test_int8_is_close_to_fp32_and_chooses_the_same_tokens(experts: int, rows: int, fixed: bool) -> None:
    plain = decoded(config_of(experts), None, fixed, rows)
    found = decoded(config_of(experts), "int8", fixed, rows)
    assert float((found - plain).norm() / plain.norm()) < 0.05
    assert found.argmax(-1).tolist() == plain.argmax(-1).tolist()


@pytest.mark.parametrize("precision", [None, "int8"])
def test_fixed_shapes_have_the_bits_of_a_row_among_any_others(precision: Precision | None) -> None:
    """Experts that only other rows have chosen add an exact zero."""
    few = decoded(config_of(16), precision, True, 16)
    many = decoded(config_of(16), precision, True, 32)
    assert torch.equal(few, many[:16])


@pytest.mark.parametrize("quantized", [False, True])
def test_all_ways_through_the_experts_agree(quantized: bool) -> None:
    """Those of a GPU, which run on any device, and those of a CPU."""
    torch.manual_seed(0)
    experts = Experts(32, ExpertsConfig(intermediate_size=48, num_experts=8, top_k=2)).requires_grad_(False)
    experts.reset_parameters(0.2, 0.2)
    x, gate = torch.randn(3, 32), torch.rand(3, 2)
    chosen = torch.tensor([[0, 3], [3, 7], [1, 0]])
    if quantized:
        quantize(experts)
    expected = decode._one_by_one(x, experts, gate, chosen)
    for way in (decode._gathered, decode._by_all):
        found = way(x, experts, gate, chosen)
        assert float((found - expected).norm() / expected.norm()) < (0.02 if quantized else 1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_only_chosen_experts_are_read(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, top-2 of 16 experts, two layers."""
    torch.manual_seed(0)
    backbone = Backbone(config_of(16)).eval().requires_grad_(False)
    embedding, start = torch.randn(50, 32), torch.zeros(1, dtype=torch.int64)
    read: list[int] = []
    matrix = decode._matrix
    monkeypatch.setattr(decode, "_matrix", lambda stack, expert: (read.append(expert), matrix(stack, expert))[1])
    with torch.inference_mode():
        step = DecodeStep(TextHead(backbone, embedding, embedding, frozenset({1})), backbone.new_cache(1, 16), fixed)
        step(start, start, start, 8)
    assert len(read) == 8, "two matrices of two experts per layer"


def test_on_a_gpu_a_pass_never_waits_for_a_count() -> None:
    """In float32 and int8 rows are not sorted, however many: that would need the counts on the host."""
    assert all(meets_all_experts(rows, False) for rows in (1, 170, 171, 1024))
    assert meets_all_experts(170, True) and not meets_all_experts(171, True)


def test_a_gpu_gathers_chosen_experts_while_that_takes_fewer_bytes() -> None:
    assert reads_chosen_experts(1, 64, 4) and reads_chosen_experts(5, 64, 4)
    assert not reads_chosen_experts(6, 64, 4) and not reads_chosen_experts(1, 4, 2)
