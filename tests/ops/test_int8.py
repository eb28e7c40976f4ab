"""Int8 weights stand for what they say, and a row multiplied by them does not depend on the others."""

from __future__ import annotations

import pytest
import torch

from openm6.ops import int8
from openm6.ops.int8 import Int8Weight
from openm6.ops.matmul import grouped_mm, linear


@pytest.fixture(params=[True, False], ids=["by int8", "converted"])
def vnni(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of a CPU."""
    if request.param and not int8.has_vnni():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(int8, "has_vnni", lambda: request.param)
    return bool(request.param)


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(3, 64, 32)
    weight[1] *= 100  # one expert of large weights must not blur the others
    error = (Int8Weight.of(weight).plain(torch.float32) - weight).abs().amax(-1)
    assert bool((error <= weight.abs().amax(-1) / 254 + 1e-6).all())
    assert Int8Weight.of(weight).bytes == weight.numel() + 4 * 3 * 64


def test_products(vnni: bool) -> None:
    torch.manual_seed(0)
    weight, x = Int8Weight.of(torch.randn(64, 32)), torch.randn(2, 5, 32)
    found, expected = linear(x, weight), x @ weight.plain(torch.float32).t()
    assert found.shape == (2, 5, 64)
    assert float((found - expected).norm() / expected.norm()) < (0.02 if vnni else 1e-6)


def test_products_of_experts(vnni: bool) -> None:
    torch.manual_seed(0)
    stack, rows = Int8Weight.of(torch.randn(3, 64, 32)), torch.randn(5, 32)
    plain = stack.plain(torch.float32)
    expected = torch.cat([rows[:2] @ plain[0].t(), rows[2:] @ plain[2].t()])
    found = grouped_mm(rows, stack, torch.tensor([2, 0, 3]))
    assert float((found - expected).norm() / expected.norm()) < (0.02 if vnni else 1e-6)
    assert grouped_mm(rows[:0], stack, torch.tensor([0, 0, 0])).shape == (0, 64)


@pytest.mark.skipif(not int8.has_vnni(), reason="this processor has no VNNI")
def test_bits_of_a_row_do_not_depend_on_the_others() -> None:
    weight, x = Int8Weight.of(torch.randn(64, 32)), torch.randn(40, 32)
    x[7] = 0
    x[8] *= 1e6
    together = weight.linear(x)
    assert torch.equal(together, torch.cat([weight.linear(row[None]) for row in x]))
    assert not together[7].any() and bool(together.isfinite().all())


def test_bf16_without_instructions_is_a_product_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.ops.matmul.has_bf16", lambda: False)
    weight = torch.randn(16, 32).bfloat16()
    with torch.inference_mode():
        for rows in (1, 4, 9):
            x = torch.randn(rows, 32).bfloat16()
            expected = x.float() @ weight.float().t()
            torch.testing.assert_close(linear(x, weight).float(), expected, rtol=0.02, atol=0.05)
