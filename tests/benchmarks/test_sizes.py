"""The sizes of the training benchmark: their totals and operations, counted by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sizes import SIZES, Sizes, choose_sizes, peak_tflops
from openm6.core.errors import ConfigError
from openm6.models.config import count_parameters

TINY = Sizes(
    num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_dim=16,
    num_experts=4, top_k=2, hidden=16, vocabulary=64, rows=2, length=16,
)  # fmt: skip


@pytest.mark.parametrize(("name", "billions"), [("a", 3.44), ("fine", 5.05)])
def test_totals_are_those_of_the_two_configurations(name, billions):
    sizes = SIZES[name]
    total = count_parameters(sizes.backbone).total + 2 * sizes.vocabulary * sizes.width
    assert total / 1e9 == pytest.approx(billions, abs=0.01)


def test_operations_counted_by_hand():
    attention_weights = 32 * 32 + 2 * 32 * 16 + 32 * 32  # query, key and value, output
    expert_weights = 2 * 3 * 32 * 16
    weights = 2 * (attention_weights + expert_weights) + 64 * 32
    scores = 2 * 2 * (16 * 16 / 2) * (2 * 16) * 2  # layers, rows, pairs seen, heads · size, logits and sum
    assert TINY.flops == 6 * weights * 32 + 3 * 2 * scores


def test_sizes_follow_the_device_and_a_wrong_name_is_refused():
    cpu = torch.device("cpu")
    assert choose_sizes(None, cpu) is SIZES["cpu"]
    assert choose_sizes("fine", cpu) is SIZES["fine"]
    assert peak_tflops(cpu) is None
    with pytest.raises(ConfigError, match="did you mean"):
        choose_sizes("fin", cpu)
