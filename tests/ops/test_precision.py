"""Large products in bf16 on a processor: near those in fp32, in fp32 again outside, and the same when run again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openm6.ops.cross_entropy import grouped_cross_entropy
from openm6.ops.expert_loop import sparse_network_by_expert
from openm6.ops.linear_loss import linear_nats
from openm6.ops.precision import HALF, half_is_fast, precision_now, product_dtype, products_in_half
from openm6.ops.product import ROWS, linear

Leaves = list[Tensor]


def leaves(*shapes: tuple[int, ...]) -> Leaves:
    torch.manual_seed(len(shapes))
    return [(torch.randn(shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]


def one_linear() -> tuple[Callable[[], Tensor], Leaves]:
    x, weight = leaves((2, ROWS, 48), (40, 48))
    return lambda: linear(x, weight), [x, weight]


def experts() -> tuple[Callable[[], Tensor], Leaves]:
    x, gate, up, down = leaves((90, 32), (90, 2), (4, 32, 48), (4, 24, 32))
    chosen = torch.randn(90, 4).topk(2).indices
    return lambda: sparse_network_by_expert(x, gate, chosen, up, down), [x, gate, up, down]


def head() -> tuple[Callable[[], Tensor], Leaves]:
    hidden, weight = leaves((50, 32), (70, 32))
    label, share = torch.randint(0, 70, (50,)), torch.rand(50)
    return lambda: linear_nats(hidden, weight, label, share)[0], [hidden, weight]


def classifiers() -> tuple[Callable[[], Tensor], Leaves]:
    states, weight = leaves((37, 3, 32), (3, 32, 60))
    wanted = torch.randint(0, 60, (37, 3))
    return lambda: grouped_cross_entropy(states, weight, wanted, 0.1), [states, weight]


@pytest.mark.parametrize("case", [one_linear, experts, head, classifiers])
def test_values_and_gradients_are_near_those_in_fp32_and_in_fp32_themselves(case):
    call, inputs = case()
    exact = call()
    slope = torch.randn_like(exact)
    wanted = [exact, *torch.autograd.grad(exact, inputs, slope)]
    with products_in_half():
        rounded = call()
    found = [rounded, *torch.autograd.grad(rounded, inputs, slope)]  # outside: it follows its forward pass
    for half, full in zip(found, wanted, strict=True):
        error = float(((half - full).norm() / full.norm()).detach())
        assert half.dtype == torch.float32 and error < 0.02
        assert error > 1e-6  # it was rounded


def test_it_holds_within_and_for_fp32_on_a_processor_alone():
    x = torch.randn(2, 2)
    with products_in_half():
        assert product_dtype(x) == HALF and product_dtype(x.double()) == torch.float64
        with products_in_half(False):
            assert product_dtype(x) == torch.float32
        assert product_dtype(x) == HALF
    assert product_dtype(x) == torch.float32


def test_what_runs_again_runs_in_the_precision_it_had():
    x = torch.ones(2, 2)
    with products_in_half():
        halved = precision_now("cpu")
    with torch.autocast("cpu", dtype=HALF):
        cast = precision_now("cpu")
    with halved():
        assert product_dtype(x) == HALF and (x @ x).dtype == torch.float32
    with products_in_half(), cast():
        assert product_dtype(x) == torch.float32 and (x @ x).dtype == HALF
    assert (x @ x).dtype == torch.float32


def test_this_processor_is_asked(monkeypatch):
    for answer in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
        half_is_fast.cache_clear()
        assert half_is_fast() == answer
    half_is_fast.cache_clear()
