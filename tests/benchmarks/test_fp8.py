"""Eight-bit expert products: rounding as in the reference, their gradients; the report without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import fp8
from benchmarks.fp8 import (
    EightBitExperts,
    bench_fp8,
    eight_bit_product,
    product_errors,
    rounded,
    scaled_product,
    scaled_product_reference,
)
from benchmarks.sizes import SIZES, Sizes
from openm6.nn.config import ExpertsConfig
from openm6.nn.moe import Experts, MoE, Router, TokenDispatcher
from openm6.ops.matmul import grouped_mm
from tests.benchmarks.test_sizes import TINY


def test_rounding_keeps_three_bits_and_the_scale_of_each_row() -> None:
    row = torch.tensor([448.0, 1.0, 1.0625, 0.0])
    # Between 1 and 2 there are eight steps: 1.0625 is half of one, and goes to the even side.
    assert rounded(row).tolist() == [448.0, 1.0, 1.0, 0.0]
    rows = torch.stack([row, 1e-3 * row])
    torch.testing.assert_close(rounded(rows)[1], 1e-3 * rounded(row))
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e5  # spoils the whole row's scale, but only its own block's
    spoilt, kept = (rounded(x, block)[:, 128:] - x[:, 128:] for block in (None, 128))
    assert kept.norm() < 0.05 * x[:, 128:].norm() < spoilt.norm()


def test_products_and_gradients_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(10, 16, requires_grad=True), torch.randn(3, 16, 32, requires_grad=True)
    counts, upstream = torch.tensor([4, 0, 6]), torch.randn(10, 32)
    exact = grouped_mm(rows, weight, counts)
    small = eight_bit_product(rows, weight, counts)
    wanted = torch.autograd.grad(exact, [rows, weight], upstream)
    found = torch.autograd.grad(small, [rows, weight], upstream)
    for one, other in ((small, exact), (found[0], wanted[0])):
        assert 0.001 < (one - other).norm() / other.norm() < 0.06
    torch.testing.assert_close(found[1], wanted[1])  # is not rounded


def test_a_layer_in_eight_bits_is_near_the_layer_it_was_made_of() -> None:
    torch.manual_seed(0)
    config = ExpertsConfig(intermediate_size=32, num_experts=4, top_k=2)
    plain, router = Experts(32, config), Router(32, config)
    plain.reset_parameters(0.2, 0.2)
    router.reset_parameters(0.2)
    eight = EightBitExperts(32, config)
    eight.load_state_dict(plain.state_dict())
    x, valid = torch.randn(2, 8, 32), torch.ones(2, 8, dtype=torch.bool)
    (expected, stats), (found, own) = (
        MoE(router, experts, None)(x, valid, TokenDispatcher(), 0) for experts in (plain, eight)
    )
    assert 0.001 < (found - expected).norm() / expected.norm() < 0.1
    assert torch.equal(own.load, stats.load)


def test_errors_are_those_of_three_bits_for_any_size() -> None:
    for way in product_errors(SIZES["cpu"]).values():
        assert all(0.005 < error < 0.06 for error in way.values())
    assert list(product_errors(TINY)) == ["a scale per row"]  # no block of 128 fits


def test_without_a_gpu_it_says_so_and_tells_errors_and_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = Sizes(**{**TINY.model_dump(), "vocabulary": 256})
    monkeypatch.setitem(fp8.LOSS_SIZES, "cpu", small)
    monkeypatch.setitem(fp8.LOSS_STEPS, "cpu", 12)
    found = bench_fp8("cpu", 60, tmp_path / "fp8.json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "fp8.json").read_text()) == found
    assert found["speed"] is None and "Hopper" in found["speed_note"]
    assert found["loss"]["steps"] == 12
    assert 0 < abs(found["loss"]["relative_difference"]) < 0.02
    assert 3 < found["loss"]["plain"] < 5.5  # log 256 is 5.55


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_equals_the_reference() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.manual_seed(0)
    rows = torch.randn(48, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(3, 64, 32, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([16, 0, 32], device="cuda")
    fast = scaled_product(rows, weight, counts)
    slow = scaled_product_reference(rows.float(), weight.float(), counts)
    torch.testing.assert_close(fast.float(), slow, rtol=2e-2, atol=2e-1)
