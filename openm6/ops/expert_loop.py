"""The sparse network on a processor: expert after expert, each with its rows in the cache from end to end.

A twin of `sparse_network` in another order of work. Each expert's rows are padded to a few lengths that come back
(see `product`); padding repeats token 0 with a gate of 0, so it adds nothing to any sum.
"""

# Letters: N tokens, D width, F hidden, E experts, K choices per token, R = N·K rows, P ≥ R rows with padding

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.ops.precision import product_dtype
from openm6.ops.product import filled_up, product
from openm6.ops.sparse_network import plan_rows_reference


def sparse_network_by_expert(x: Tensor, gate: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Σ_k gate[n, k] · E_chosen[n, k](x[n]) for SwiGLU experts that drop nothing: N D, N K, N K -> N D.

    up is E D 2F ([gate | up]) and down E F D, all in fp32.
    """
    return _ExpertLoop.apply(x, gate, up, down, _plan(chosen, up.shape[0], product_dtype(x)))


@dataclass(frozen=True)
class _Plan:
    """source: P, the token of each row; slot: N K, the row of each choice; rows: for each expert, where its rows lie"""

    source: Tensor
    slot: Tensor
    rows: list[slice]


def _plan(chosen: Tensor, num_experts: int, dtype: torch.dtype) -> _Plan:
    choice, slot, last = plan_rows_reference(chosen, num_experts)
    begins = [0, *last.tolist()]  # without padding
    sizes = [filled_up(stop - start, dtype) for start, stop in pairwise(begins)]
    edges = [0, *accumulate(sizes)]
    moved = torch.tensor([edge - begin for edge, begin in zip(edges, begins, strict=True)])
    expert = chosen.reshape(-1)
    slot = slot + moved[expert].view_as(slot)  # padding before moves a row on
    source = choice.new_zeros(edges[-1])
    source[slot.reshape(-1)] = torch.arange(len(expert)).div(chosen.shape[1], rounding_mode="floor")
    return _Plan(source, slot, [slice(*ends) for ends in pairwise(edges)])


class _ExpertLoop(torch.autograd.Function):
    """As `_SparseNetwork`, whose letters it uses: the gate is multiplied between the products.

    Factors of products are in `product_dtype`; what lies between the products is in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, plan: _Plan) -> Tensor:
        dtype = product_dtype(x)
        up, down = up.to(dtype), down.to(dtype)
        rows = x.to(dtype).index_select(0, plan.source)  # N D -> P D
        row_gate = x.new_zeros(len(rows), 1)
        row_gate[plan.slot.reshape(-1), 0] = gate.reshape(-1)
        answers, products = [], []
        for own, first, second in zip(plan.rows, up.unbind(), down.unbind(), strict=True):
            both = product(rows[own], first.t()).to(x.dtype)  # P_e D -> P_e 2F
            a, b = both.chunk(2, dim=-1)
            hidden = F.silu(a).mul_(b).mul_(row_gate[own])
            answers.append(product(hidden.to(dtype), second.t()))  # P_e F -> P_e D
            products.append(both)
        ctx.save_for_backward(rows, row_gate, up, down, *products)
        ctx.plan = plan
        return sum_choices(torch.cat(answers).to(x.dtype), plan.slot)  # P D -> N D

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_gate, up, down, *products = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dtype, full = rows.dtype, gradient.dtype
        sent = gradient.to(dtype).index_select(0, plan.source)  # N D -> P D
        d_up, d_down = torch.empty_like(up, dtype=full), torch.empty_like(down, dtype=full)
        d_gate = torch.empty_like(row_gate[:, 0])
        d_rows = []
        for e, (own, both) in enumerate(zip(plan.rows, products, strict=True)):
            a, b = both.chunk(2, dim=-1)
            silu = F.silu(a)
            d_hidden = product(sent[own], down[e]).to(full)  # P_e D -> P_e F
            part = d_hidden * silu
            torch.linalg.vecdot(part, b, out=d_gate[own])
            d_both = torch.empty_like(both)
            d_a, d_b = d_both.chunk(2, dim=-1)
            torch.mul(part, row_gate[own], out=d_b)
            d_hidden.mul_(row_gate[own])
            hidden = silu.mul_(b).mul_(row_gate[own])
            d_down[e] = product(hidden.to(dtype).t(), sent[own].t())  # F D
            torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(b), a, grad_input=d_a)
            d_both = d_both.to(dtype)
            d_up[e] = product(rows[own].t(), d_both.t())  # D 2F
            d_rows.append(product(d_both, up[e]))  # P_e 2F -> P_e D
        return sum_choices(torch.cat(d_rows).to(full), plan.slot), d_gate[plan.slot], d_up, d_down, None


def sum_choices(rows: Tensor, slot: Tensor) -> Tensor:
    """Σ_k rows[slot[n, k]]: P D, N K -> N D."""
    return F.embedding_bag(slot, rows, mode="sum")
