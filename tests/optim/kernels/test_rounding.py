"""One rule for random bits in three languages: Triton, torch and plain Python; and rounding that keeps its mean."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

from openm6.optim.kernels.rounding import bits_at, round_bf16  # noqa: E402
from openm6.optim.rounding import (  # noqa: E402
    BF16_LARGEST,
    matrix_keys,
    random_bits,
    random_bits_reference,
    round_to_bf16,
)


@triton.jit
def bits_kernel(key, out, BLOCK: tl.constexpr) -> None:  # noqa: N803
    place = tl.arange(0, BLOCK)
    tl.store(out + place, bits_at(place, tl.load(key).to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True))


@triton.jit
def rounding_kernel(value, bits, out, BLOCK: tl.constexpr) -> None:  # noqa: N803
    place = tl.arange(0, BLOCK)
    noise = tl.load(bits + place).to(tl.uint32, bitcast=True)
    tl.store(out + place, round_bf16(tl.load(value + place), noise))


@pytest.mark.parametrize("key", [0, 7, 2**31 - 5])
def test_bits_agree_in_all_languages(device, key):
    out = torch.empty(64, dtype=torch.int32, device=device)
    bits_kernel[(1,)](matrix_keys(1, key, 0, device), out, BLOCK=64)
    assert out.tolist() == random_bits(1, 64, key)[0].tolist() == random_bits_reference(1, 64, key)[0]


@pytest.mark.parametrize("pushed", [0, 0xFFFF])
def test_rounding_agrees_with_its_reference_also_at_the_largest_values(device, pushed):
    largest = torch.finfo(torch.float32).max  # lies above the largest bf16
    odd = [largest, -largest, BF16_LARGEST, -BF16_LARGEST, float("inf"), -float("inf"), float("nan"), 0.0]
    value = torch.cat([torch.tensor(odd), torch.randn(56)]).to(device)
    bits = torch.full((64,), pushed, dtype=torch.int32, device=device)
    out = torch.empty(64, dtype=torch.bfloat16, device=device)
    rounding_kernel[(1,)](value, bits, out, BLOCK=64)
    assert torch.equal(out.isnan(), value.isnan())
    assert torch.equal(out.nan_to_num(), round_to_bf16(value, bits).nan_to_num())
    assert out[:4].isfinite().all()
