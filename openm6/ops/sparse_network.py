"""Rows to experts, through their two products, and home again as one step with a hand-written adjoint.

The router's gate is multiplied in between the products (it is linear there as well), so the answers of the second
product need not be kept for its gradient, and both adjoints of the journey are plain gathers.
"""

# Letters: N tokens, D width, F hidden, E experts, K choices per token, R = N·K rows

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6 import kernels
from openm6.ops.grouped import check_experts, idle


def _triton() -> Any:
    # Triton is optional.
    from openm6.kernels import moe  # noqa: PLC0415

    return moe


@torch.library.custom_op("openm6::plan_rows", mutates_args=())
def plan_rows(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each choice goes: N K -> choice R, slot N K, ends E.

    choice: the flat number n·K + k of the choice that row r carries; slot: its inverse; ends: last row of each expert,
    plus one, int32. Rows of one expert lie together, in the order of their tokens.
    """
    if kernels.available(chosen.device):
        return _triton().plan_rows(chosen, num_experts)
    return plan_rows_reference(chosen, num_experts)


@plan_rows.register_fake
def _(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    choice = chosen.new_empty(chosen.numel(), dtype=torch.int64)
    slot = chosen.new_empty(chosen.shape, dtype=torch.int64)
    return choice, slot, chosen.new_empty(num_experts, dtype=torch.int32)


def plan_rows_reference(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The naive twin of `plan_rows`: a stable sort."""
    flat = chosen.reshape(-1)
    choice = flat.argsort(stable=True)
    slot = torch.empty_like(choice)
    slot[choice] = torch.arange(len(choice), device=flat.device)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return choice, slot.view(chosen.shape), counts.cumsum(0, dtype=torch.int32)


@torch.library.custom_op("openm6::gather_rows", mutates_args=())
def gather_rows(x: Tensor, source: Tensor) -> Tensor:
    """x[source]: N D, R -> R D."""
    if kernels.available(x.device):
        return _triton().gather_rows(x, source)
    return x.index_select(0, source)


@gather_rows.register_fake
def _(x: Tensor, source: Tensor) -> Tensor:
    return x.new_empty(source.shape[0], x.shape[1])


@torch.library.custom_op("openm6::sum_rows", mutates_args=())
def sum_rows(rows: Tensor, slot: Tensor) -> Tensor:
    """Σ_k rows[slot[n, k]], in fp32: R D, N K -> N D."""
    if kernels.available(rows.device):
        return _triton().sum_rows(rows, slot)
    return sum_rows_reference(rows, slot)


@sum_rows.register_fake
def _(rows: Tensor, slot: Tensor) -> Tensor:
    return rows.new_empty(slot.shape[0], rows.shape[1])


def sum_rows_reference(rows: Tensor, slot: Tensor) -> Tensor:
    """The naive twin of `sum_rows`."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows[slot].to(wide).sum(1).to(rows.dtype)


@torch.library.custom_op("openm6::swiglu_gate", mutates_args=())
def swiglu_gate(product: Tensor, gate: Tensor) -> Tensor:
    """silu(a) · b · gate of product = [a | b]: R 2F, R -> R F."""
    if kernels.available(product.device):
        return _triton().swiglu_gate(product, gate)
    return swiglu_gate_reference(product, gate)


@swiglu_gate.register_fake
def _(product: Tensor, gate: Tensor) -> Tensor:
    return product.new_empty(product.shape[0], product.shape[1] // 2)


def swiglu_gate_reference(product: Tensor, gate: Tensor) -> Tensor:
    """The naive twin of `swiglu_gate`."""
    wide = torch.promote_types(product.dtype, torch.float32)
    first, second = product.to(wide).chunk(2, dim=-1)
    return (F.silu(first) * second * gate.to(wide).unsqueeze(-1)).to(product.dtype)


@torch.library.custom_op("openm6::swiglu_gate_backward", mutates_args=())
def swiglu_gate_backward(product: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu_gate`: R 2F, R, R F -> R 2F, and R in fp32 or wider."""
    if kernels.available(product.device):
        return _triton().swiglu_gate_backward(product, gate, gradient)
    return swiglu_gate_backward_reference(product, gate, gradient)


@swiglu_gate_backward.register_fake
def _(product: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(product.dtype, torch.float32)
    return torch.empty_like(product), product.new_empty(product.shape[0], dtype=wide)


def swiglu_gate_backward_reference(product: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The naive twin of `swiglu_gate_backward`."""
    wide = torch.promote_types(product.dtype, torch.float32)
    first, second = product.to(wide).chunk(2, dim=-1)
    upstream, scale = gradient.to(wide), gate.to(wide).unsqueeze(-1)
    sigmoid = first.sigmoid()
    d_gate = (upstream * first * sigmoid * second).sum(-1)
    d_first = upstream * scale * second * sigmoid * (1 + first * (1 - sigmoid))
    d_second = upstream * scale * first * sigmoid
    return torch.cat([d_first, d_second], dim=-1).to(product.dtype), d_gate


def sparse_network(
    x: Tensor, gate: Tensor, chosen: Tensor, up: Tensor, down: Tensor, keep: bool = True
) -> Tensor:
    """Σ_k gate[n, k] · E_chosen[n, k](x[n]) for SwiGLU experts that drop nothing: N D, N K, N K -> N D.

    up is E D 2F ([gate | up]) and down E F D, of x's dtype. Without `keep` the gathered rows and the hidden values
    are made again in the backward pass: two cheap passes for R·(D + F) numbers less.
    """
    check_experts(len(up), x.device)
    choice, slot, ends = plan_rows(chosen, up.shape[0])
    return _SparseNetwork.apply(x, gate, up, down, choice, slot, ends, keep)


class _SparseNetwork(torch.autograd.Function):
    """y = S·(swiglu(G·x · up) ∘ gate · down), with G the gather of rows and S = Gᵀ the sum of each token's rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor,
        choice: Tensor, slot: Tensor, ends: Tensor, keep: bool,
    ) -> Tensor:  # fmt: skip
        source = choice.div(slot.shape[1], rounding_mode="floor")  # R
        rows = gather_rows(x, source)  # N D -> R D
        row_gate = gate.reshape(-1).index_select(0, choice)  # N K -> R
        product = F.grouped_mm(rows, up, offs=ends)  # R D -> R 2F
        hidden = swiglu_gate(product, row_gate)  # R 2F -> R F
        answers = F.grouped_mm(hidden, down, offs=ends)  # R F -> R D
        kept = (rows, hidden) if keep else (x, x)
        ctx.save_for_backward(*kept, product, row_gate, up, down, source, slot, ends)
        ctx.keep, ctx.gate_dtype = keep, gate.dtype
        return sum_rows(answers, slot)  # R D -> N D

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, product, row_gate, up, down, source, slot, ends = ctx.saved_tensors
        if not ctx.keep:
            rows, hidden = gather_rows(rows, source), swiglu_gate(product, row_gate)
        without_rows = idle(ends.diff(prepend=ends.new_zeros(1)))
        d_answers = gather_rows(gradient.contiguous(), source)  # N D -> R D
        d_hidden = F.grouped_mm(d_answers, down.transpose(1, 2), offs=ends)  # R D -> R F
        d_down = F.grouped_mm(hidden.t(), d_answers, offs=ends).masked_fill_(without_rows, 0.0)  # E F D
        d_product, d_row_gate = swiglu_gate_backward(product, row_gate, d_hidden)
        d_rows = F.grouped_mm(d_product, up.transpose(1, 2), offs=ends)  # R 2F -> R D
        d_up = F.grouped_mm(rows.t(), d_product, offs=ends).masked_fill_(without_rows, 0.0)  # E D 2F
        d_gate = d_row_gate.index_select(0, slot.reshape(-1)).view(slot.shape).to(ctx.gate_dtype)
        return sum_rows(d_rows, slot), d_gate, d_up, d_down, None, None, None, None
