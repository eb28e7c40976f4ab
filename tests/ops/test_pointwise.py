"""SwiGLU, RMSNorm and the rotary embedding against their references."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

from openm6.ops.pointwise import rms_norm, rotary_table, rotate, swiglu


def plain(function: Callable[..., torch.Tensor], *inputs: object) -> torch.Tensor:
    """What the function computes under torch.compile: plain operations, whose gradients are autograd's."""
    with patch("torch.compiler.is_compiling", return_value=True):
        return function(*inputs)


def test_swiglu_equals_its_reference():
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(swiglu(x), plain(swiglu, x))


def test_swiglu_gradient_is_exact():
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))


@pytest.mark.parametrize("weight_shape", [(16,), (3, 16)])
def test_values_and_gradients_equal_the_reference(weight_shape):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16, requires_grad=True)
    weight = (1 + 0.3 * torch.randn(weight_shape)).requires_grad_()
    upstream = torch.randn_like(x)
    ours, reference = rms_norm(x, weight, 1e-3), plain(rms_norm, x, weight, 1e-3)
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (x, weight), upstream),
        torch.autograd.grad(reference, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_slices_need_no_copies():
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, 16)
    torch.testing.assert_close(rms_norm(x[:, :, 1:3], torch.ones(16), 0.0), rms_norm(x, torch.ones(16), 0.0)[:, :, 1:3])


def test_output_has_unit_mean_square_in_any_dtype():
    x = 37 * torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(rms_norm(x, torch.ones(256), 1e-6).square().mean(-1), torch.ones(8), atol=1e-5)
    half = rms_norm(x.bfloat16(), torch.ones(256), 1e-6)
    assert half.dtype == torch.bfloat16


SECTIONS = (4, 2, 2)


def test_axes_are_taken_in_turn():
    for sections, axes in (((4, 2, 2), [0, 1, 2, 0, 1, 2, 0, 0]), ((1, 0, 3), [0, 2, 2, 2])):
        _, sine = rotary_table(torch.tensor([[[0.0, 0.1, 0.2]]]), 1.0, sections)
        assert torch.allclose(sine.asin().flatten(), torch.tensor(axes) / 10)


def test_rotate_is_a_product_of_complex_numbers_and_so_is_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16, requires_grad=True)
    cosine, sine = table = rotary_table(torch.randint(0, 900, (2, 5, 3)), 10_000.0, SECTIONS)
    product = torch.complex(*x.double().chunk(2, dim=-1)) * torch.complex(cosine.double(), sine.double())
    expected, upstream = torch.cat([product.real, product.imag], dim=-1).float(), torch.randn_like(x)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    for rotated in (rotate(x, *table), plain(rotate, x, *table)):
        torch.testing.assert_close(rotated, expected)
        torch.testing.assert_close(torch.autograd.grad(rotated, x, upstream)[0], gradient)


def test_equal_axes_are_one_dimensional_rotary():
    positions = torch.arange(7)[None, :, None].expand(1, 7, 3)
    ours = rotary_table(positions, 500.0, SECTIONS)
    one_axis = rotary_table(positions, 500.0, (8, 0, 0))
    angle = torch.arange(7)[:, None] / 500.0 ** (torch.arange(8) / 8)
    torch.testing.assert_close(ours[0][0, :, 0], angle.cos())
    torch.testing.assert_close(ours[1], one_axis[1])


def test_products_depend_on_the_difference_of_positions():
    torch.manual_seed(2)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    where = torch.tensor([[[3, 10, 7]]]), torch.tensor([[[1, 4, 9]]])

    def product(shift: torch.Tensor) -> torch.Tensor:
        tables = [rotary_table(position + shift, 100.0, SECTIONS) for position in where]
        return (rotate(query, *tables[0]) * rotate(key, *tables[1])).sum()

    torch.testing.assert_close(product(torch.tensor([0, 0, 0])), product(torch.tensor([5, 2, 40])))
    apart = rotary_table(where[0] + torch.tensor([0, 3, 0]), 100.0, SECTIONS)
    moved = (rotate(query, *apart) * rotate(key, *rotary_table(where[1], 100.0, SECTIONS))).sum()
    assert not torch.allclose(product(torch.tensor([0, 0, 0])), moved)


def test_half_precision_is_rounded_once():
    torch.manual_seed(3)
    x = torch.randn(1, 4, 2, 16, dtype=torch.bfloat16)
    table = rotary_table(torch.randint(0, 90, (1, 4, 3)), 10_000.0, SECTIONS)
    assert torch.equal(rotate(x, *table), rotate(x.float(), *table).bfloat16())
