"""FSQ: cells, codes, the straight-through gradient, and the entropy of channels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from openm6.codecs.base import bits_per_channel, cell_values, pack, quantize, unpack

LEVELS = torch.tensor([8, 5, 3])


def cells_of(y: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Cells of values that are within -1 and 1 already."""
    return quantize(torch.logit((y + 1) / 2) / 1.6, levels)[1]


def test_pack_numbers_every_combination_once_and_unpack_undoes_it() -> None:
    every = torch.tensor(list(itertools.product(range(8), range(5), range(3))))
    codes = pack(every, LEVELS)
    assert sorted(codes.tolist()) == list(range(120))
    assert torch.equal(unpack(codes, LEVELS), every)


def test_the_first_channel_varies_fastest() -> None:
    assert pack(torch.tensor([1, 0, 0]), LEVELS) == 1
    assert pack(torch.tensor([0, 1, 0]), LEVELS) == 8
    assert pack(torch.tensor([0, 0, 1]), LEVELS) == 40


@pytest.mark.parametrize("levels", [2, 3, 5, 8])
def test_values_span_minus_one_to_one_evenly_and_stay_in_their_cell(levels: int) -> None:
    count = torch.tensor([levels])
    values = cell_values(torch.arange(levels)[:, None], count)
    assert values[0] == -1 and values[-1] == 1
    assert torch.allclose(values.diff(dim=0), torch.tensor(2.0 / (levels - 1)))
    assert torch.equal(cells_of(values, count)[:, 0], torch.arange(levels))


def test_cells_have_equal_widths_so_that_uniform_input_uses_all_codes_alike() -> None:
    y = torch.linspace(-1, 1, 8 * 5 * 3 * 100 + 1)[:-1, None].expand(-1, 3)
    bits = bits_per_channel(cells_of(y, LEVELS), LEVELS)
    assert torch.allclose(bits, LEVELS.float().log2(), atol=1e-3)


def test_out_of_range_input_falls_into_the_outer_cells() -> None:
    assert quantize(torch.tensor([[-99.0, 99.0, 99.0]]), LEVELS)[1].tolist() == [[0, 4, 2]]


def test_the_gradient_passes_as_if_nothing_had_been_rounded() -> None:
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantize(z, LEVELS)[0].sum().backward()
    twin = z.detach().clone().requires_grad_()
    (2 * torch.sigmoid(1.6 * twin)).sum().backward()
    assert torch.allclose(z.grad, twin.grad)
    assert z.grad.abs().min() > 0


def test_quantized_values_are_those_of_the_cells() -> None:
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    values, cells = quantize(z, LEVELS)
    assert torch.allclose(values, cell_values(cells, LEVELS), atol=1e-6)


def test_half_precision_input_is_rounded_in_full_precision() -> None:
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(2)).bfloat16()
    values, cells = quantize(z, LEVELS)
    assert values.dtype == torch.float32
    assert torch.equal(cells, quantize(z.float(), LEVELS)[1])


def test_unit_gaussian_input_uses_nearly_all_bits_and_a_constant_none() -> None:
    z = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(3))
    bits = bits_per_channel(quantize(z, LEVELS)[1], LEVELS)
    assert (bits > 0.97 * LEVELS.float().log2()).all()
    assert bits_per_channel(torch.zeros(10, 3, dtype=torch.long), LEVELS).abs().max() < 1e-6
    half = torch.tensor([[0, 0, 0], [7, 0, 0]])
    assert math.isclose(float(bits_per_channel(half, LEVELS)[0]), 1.0, rel_tol=1e-5)
