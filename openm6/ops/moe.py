"""Mixture of experts: choice of experts, permutation of rows, and the experts' MLPs, each with its adjoint.

The MLPs have three implementations, of which `choose_backend` selects one:

- `permute`, grouped products, `unpermute`: any activation, capacity, and experts on other ranks; the reference.
- `moe_mlp_fused`: one step of Triton kernels and grouped products, on a GPU.
- `moe_mlp_per_expert`: one expert after the other, on a CPU, with its rows in the cache from end to end.

The latter two multiply by the router's gate between the products (the rest is linear), so the outputs of the second
product need not be kept for its gradient, and both adjoints of the permutation are plain gathers.
"""

# Shapes: N tokens, D hidden size, F intermediate size, E experts, K choices per token, Z prototypes, R rows sent to
# experts (N·K if nothing is dropped), P ≥ R rows with padding

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6 import kernels
from openm6.ops.matmul import ROWS, autocast_dtype, check_experts, idle, matmul, matmul_dtype, matmul_into, pad_rows

Backend = Literal["permute", "fused", "per_expert"]


def choose_backend(x: Tensor, num_choices: int, num_experts: int, simple: bool) -> Backend:
    """Return the implementation for N tokens x; `simple`: SwiGLU experts, all on this device, that drop nothing.

    On a GPU the fused one needs bf16; on a CPU one expert at a time needs fp32, and many rows, as it pads them.
    """
    if not simple:
        return "permute"
    if x.is_cpu:
        many = len(x) * num_choices >= 2 * ROWS * num_experts
        plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return "per_expert" if many and plain and not torch.compiler.is_compiling() else "permute"
    return "fused" if x.is_cuda and autocast_dtype(x) == torch.bfloat16 else "permute"


def choose_experts(
    logits: Tensor, bias: Tensor | None, choices: int, prototypes: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the K = `choices` experts with the highest logit, or with `prototypes` the best one in each of K groups.

    The latter is "k top-1" (M6-T, 2105.15082, §3.2), weighted by the softmax within each group. `bias` affects the
    choice but not the gates; normalized gates of the former sum to one. Return gates N K and experts N K, and the
    probabilities N E, which sum to one, or with `prototypes` to K.
    """
    biased = logits if bias is None else logits + bias
    if not prototypes:
        probability = logits.softmax(-1)
        chosen = biased.topk(choices, dim=-1).indices
    else:
        probability = logits.unflatten(-1, (choices, -1)).softmax(-1).flatten(-2)  # N K E/K -> N E
        winner = biased.unflatten(-1, (choices, -1)).argmax(-1)  # N K
        chosen = winner + torch.arange(choices, device=logits.device) * (logits.shape[-1] // choices)
    gate = probability.gather(-1, chosen)
    if normalize and not prototypes:
        gate = gate / gate.sum(-1, keepdim=True)
    return gate, chosen, probability


def tokens_per_expert(chosen: Tensor, valid: Tensor, num_experts: int) -> Tensor:
    """Count the choices of valid tokens for each expert: N K, N -> E, fp32; `bincount` would make a GPU wait."""
    weight = valid.unsqueeze(-1).expand_as(chosen).to(torch.float32)
    load = torch.zeros(num_experts, device=chosen.device)
    return load.scatter_add_(0, chosen.reshape(-1), weight.reshape(-1))


def balance_loss(probability: Tensor, load: Tensor, valid: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of the Switch transformer (2101.03961, eq. 4), fraction of choices times mean probability."""
    weight = valid.to(probability.dtype)
    mean = (probability * weight.unsqueeze(-1)).sum(0) / weight.sum().clamp(min=1)
    fraction = load / load.sum().clamp(min=1)
    return probability.shape[-1] * (fraction * mean / mean.sum().clamp(min=1e-9)).sum()


def z_loss(logits: Tensor, valid: Tensor, num_groups: int = 1) -> Tensor:
    """Mean of (log Σ exp logits)², which keeps router logits small (ST-MoE, 2202.08906, eq. 5)."""
    square = logits.unflatten(-1, (num_groups, -1)).logsumexp(-1).square().mean(-1)  # N E -> N
    weight = valid.to(square.dtype)
    return (square * weight).sum() / weight.sum().clamp(min=1)


@dataclass(frozen=True)
class TokenPermutation:
    """Which row of which expert holds each choice of each token; an expert's rows are adjacent, in the order of tokens.

    source: R, the token that row r is a copy of; slot: N K, the row of choice k of token n
    kept: N K bool, or None if nothing is dropped; counts: E, rows of each expert
    """

    source: Tensor
    slot: Tensor
    kept: Tensor | None
    counts: Tensor


def dropless_permutation(chosen: Tensor, num_experts: int) -> TokenPermutation:
    """Every choice becomes a row: R = N·K."""
    choice, slot, counts = _sorted_by_expert(chosen, num_experts)
    source = choice.div(chosen.shape[-1], rounding_mode="floor")
    return TokenPermutation(source, slot, None, counts)


def capacity_permutation(chosen: Tensor, valid: Tensor, num_experts: int, capacity: int) -> TokenPermutation:
    """Each expert takes its first `capacity` valid choices: R = E·capacity, fixed; unused rows copy token 0, unread."""
    # Padding is sorted behind all experts, so that it never takes a row.
    chosen = torch.where(valid.unsqueeze(-1), chosen, num_experts)
    _, slot, total = _sorted_by_expert(chosen, num_experts + 1)
    rank = slot - (total.cumsum(0) - total)[chosen]  # N K
    kept = (rank < capacity) & (chosen < num_experts)
    slot = torch.where(kept, chosen * capacity + rank, 0)
    rows = num_experts * capacity
    source = torch.zeros(rows + 1, dtype=torch.int64, device=chosen.device)
    # The spare last element takes what is dropped.
    source[torch.where(kept, slot, rows)] = torch.arange(len(chosen), device=chosen.device).unsqueeze(-1)
    counts = torch.full((num_experts,), capacity, dtype=torch.int64, device=chosen.device)
    return TokenPermutation(source[:rows], slot, kept, counts)


def _sorted_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """N K -> choice R (flat index n·K + k of the choice in each row), slot N K, counts E; a stable sort."""
    flat = chosen.reshape(-1)
    choice = flat.argsort(stable=True)
    slot = torch.empty_like(choice)
    slot[choice] = torch.arange(len(choice), device=flat.device)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    return choice, slot.view(chosen.shape), counts


def permute(x: Tensor, permutation: TokenPermutation) -> Tensor:
    """Each row is a copy of its token: N D -> R D."""
    return _Permute.apply(x, permutation.source, permutation.slot, permutation.kept)


def unpermute(rows: Tensor, gate: Tensor, permutation: TokenPermutation) -> Tensor:
    """Each token's K outputs, weighted by their gates and summed: R D, N K -> N D. Dropped choices add nothing."""
    gate = gate if permutation.kept is None else gate * permutation.kept
    return _Unpermute.apply(rows, gate.to(rows.dtype), permutation.source, permutation.slot)


# Autograd cannot use that `slot` inverts `source`, and would scatter with atomics. Both adjoints are gathers.
class _Permute(torch.autograd.Function):
    """x[source]; backwards each token sums the gradients of its own K rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(slot, kept)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        slot, kept = ctx.saved_tensors
        weight = None if kept is None else kept.to(gradient.dtype)
        return sum_rows_reference(gradient, slot, weight), None, None, None


class _Unpermute(torch.autograd.Function):
    """y[n] = Σ_k gate[n, k] · rows[slot[n, k]]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gate, source, slot)
        return sum_rows_reference(rows, slot, gate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, gate, source, slot = ctx.saved_tensors
        # A row has one reader, so adding equals writing; a dropped choice adds its gate of 0 to row 0.
        row_gate = gate.new_zeros(rows.shape[0]).scatter_add_(0, slot.reshape(-1), gate.reshape(-1))
        sent = gradient.index_select(0, source)  # N D -> R D
        d_gate = torch.linalg.vecdot(rows, sent)[slot]  # R -> N K
        return sent.mul_(row_gate.unsqueeze(-1)), d_gate, None, None


def _kernels(device: torch.device) -> Any:
    """Return the module of Triton kernels, or None if they do not run on this device: then plain torch is used."""
    if not kernels.available(device):
        return None
    # Triton is optional.
    from openm6.kernels import moe  # noqa: PLC0415

    return moe


@torch.library.custom_op("openm6::sort_by_expert", mutates_args=())
def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort choices by expert, stably: N K -> choice R, slot N K, ends E.

    choice: the flat index n·K + k of the choice in row r; slot: its inverse; ends: last row of each expert, plus one,
    int32.
    """
    if triton := _kernels(chosen.device):
        return triton.sort_by_expert(chosen, num_experts)
    choice, slot, counts = _sorted_by_expert(chosen, num_experts)
    return choice, slot, counts.cumsum(0, dtype=torch.int32)


sort_by_expert.register_fake(
    lambda chosen, num_experts: (
        chosen.new_empty(chosen.numel(), dtype=torch.int64),
        chosen.new_empty(chosen.shape, dtype=torch.int64),
        chosen.new_empty(num_experts, dtype=torch.int32),
    )
)


@torch.library.custom_op("openm6::gather_rows", mutates_args=())
def gather_rows(x: Tensor, source: Tensor) -> Tensor:
    """x[source]: N D, R -> R D."""
    triton = _kernels(x.device)
    return triton.gather_rows(x, source) if triton else x.index_select(0, source)


gather_rows.register_fake(lambda x, source: x.new_empty(source.shape[0], x.shape[1]))


@torch.library.custom_op("openm6::sum_rows", mutates_args=())
def sum_rows(rows: Tensor, slot: Tensor) -> Tensor:
    """Σ_k rows[slot[n, k]], in fp32: R D, N K -> N D."""
    triton = _kernels(rows.device)
    return triton.sum_rows(rows, slot) if triton else sum_rows_reference(rows, slot)


sum_rows.register_fake(lambda rows, slot: rows.new_empty(slot.shape[0], rows.shape[1]))


def sum_rows_reference(rows: Tensor, slot: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ_k weight[n, k] · rows[slot[n, k]], in fp32 or wider: R D, N K, N K -> N D."""
    if rows.is_cpu and rows.dtype == torch.float32:
        return F.embedding_bag(slot, rows, mode="sum", per_sample_weights=weight)
    wide = torch.promote_types(rows.dtype, torch.float32)
    picked = rows[slot].to(wide)  # N K D
    if weight is not None:
        picked = picked * weight.to(wide).unsqueeze(-1)
    return picked.sum(1).to(rows.dtype)


@torch.library.custom_op("openm6::swiglu_gate", mutates_args=())
def swiglu_gate(product: Tensor, gate: Tensor) -> Tensor:
    """silu(a) · b · gate of product = [a | b]: R 2F, R -> R F."""
    if triton := _kernels(product.device):
        return triton.swiglu_gate(product, gate)
    wide = torch.promote_types(product.dtype, torch.float32)
    first, second = product.to(wide).chunk(2, dim=-1)
    return (F.silu(first) * second * gate.to(wide).unsqueeze(-1)).to(product.dtype)


swiglu_gate.register_fake(lambda product, gate: product.new_empty(product.shape[0], product.shape[1] // 2))


@torch.library.custom_op("openm6::swiglu_gate_backward", mutates_args=())
def swiglu_gate_backward(product: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu_gate`: R 2F, R, R F -> R 2F, and R in fp32 or wider."""
    if triton := _kernels(product.device):
        return triton.swiglu_gate_backward(product, gate, gradient)
    wide = torch.promote_types(product.dtype, torch.float32)
    first, second = product.to(wide).chunk(2, dim=-1)
    upstream, scale = gradient.to(wide), gate.to(wide).unsqueeze(-1)
    sigmoid = first.sigmoid()
    d_gate = (upstream * first * sigmoid * second).sum(-1)
    d_first = upstream * scale * second * sigmoid * (1 + first * (1 - sigmoid))
    d_second = upstream * scale * first * sigmoid
    return torch.cat([d_first, d_second], dim=-1).to(product.dtype), d_gate


@swiglu_gate_backward.register_fake
def _(product: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(product.dtype, torch.float32)
    return torch.empty_like(product), product.new_empty(product.shape[0], dtype=wide)


def moe_mlp_fused(x: Tensor, gate: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `moe_mlp_per_expert`, with all of x's dtype, by kernels and grouped products: N D, N K, N K -> N D."""
    check_experts(len(up), x.device)
    choice, slot, ends = sort_by_expert(chosen, up.shape[0])
    return _FusedMlp.apply(x, gate, up, down, choice, slot, ends)


class _FusedMlp(torch.autograd.Function):
    """y = S·(swiglu(G·x · up) ∘ gate · down), with G the gather of rows and S = Gᵀ the sum of each token's rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor,
        choice: Tensor, slot: Tensor, ends: Tensor,
    ) -> Tensor:  # fmt: skip
        source = choice.div(slot.shape[1], rounding_mode="floor")  # R
        rows = gather_rows(x, source)  # N D -> R D
        row_gate = gate.reshape(-1).index_select(0, choice)  # N K -> R
        product = F.grouped_mm(rows, up, offs=ends)  # R D -> R 2F
        hidden = swiglu_gate(product, row_gate)  # R 2F -> R F
        outputs = F.grouped_mm(hidden, down, offs=ends)  # R F -> R D
        ctx.save_for_backward(rows, hidden, product, row_gate, up, down, source, slot, ends)
        ctx.gate_dtype = gate.dtype
        return sum_rows(outputs, slot)  # R D -> N D

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, product, row_gate, up, down, source, slot, ends = ctx.saved_tensors
        without_rows = idle(ends.diff(prepend=ends.new_zeros(1)))
        d_outputs = gather_rows(gradient.contiguous(), source)  # N D -> R D
        d_hidden = F.grouped_mm(d_outputs, down.transpose(1, 2), offs=ends)  # R D -> R F
        d_down = F.grouped_mm(hidden.t(), d_outputs, offs=ends).masked_fill_(without_rows, 0.0)  # E F D
        d_product, d_row_gate = swiglu_gate_backward(product, row_gate, d_hidden)
        d_rows = F.grouped_mm(d_product, up.transpose(1, 2), offs=ends)  # R 2F -> R D
        d_up = F.grouped_mm(rows.t(), d_product, offs=ends).masked_fill_(without_rows, 0.0)  # E D 2F
        d_gate = d_row_gate.index_select(0, slot.reshape(-1)).view(slot.shape).to(ctx.gate_dtype)
        return sum_rows(d_rows, slot), d_gate, d_up, d_down, None, None, None


def moe_mlp_per_expert(x: Tensor, gate: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Σ_k gate[n, k] · E_chosen[n, k](x[n]) for SwiGLU experts that drop nothing: N D, N K, N K -> N D.

    up is E D 2F ([gate | up]) and down E F D, all in fp32. Each expert's rows are padded to one of a few lengths (see
    `pad_rows`); padding repeats token 0 with a gate of 0, so it adds nothing to any sum.
    """
    return _PerExpertMlp.apply(x, gate, up, down, *_padded_permutation(chosen, up.shape[0], matmul_dtype(x)))


def _padded_permutation(chosen: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[slice]]:
    """N K -> source P (the token of each row), slot N K (the row of each choice), and the rows of each expert."""
    _, slot, counts = _sorted_by_expert(chosen, num_experts)
    padded = [pad_rows(count, dtype) for count in counts.tolist()]
    padding = torch.tensor(padded) - counts
    slot = slot + (padding.cumsum(0) - padding)[chosen]  # rows move by the padding of the experts before
    source = slot.new_zeros(sum(padded))
    source[slot] = torch.arange(len(chosen)).unsqueeze(-1)
    return source, slot, [slice(*ends) for ends in pairwise([0, *accumulate(padded)])]


class _PerExpertMlp(torch.autograd.Function):
    """As `_FusedMlp` in another order of work. Factors of products are in `matmul_dtype`; the rest is in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor,
        source: Tensor, slot: Tensor, rows_of: list[slice],
    ) -> Tensor:  # fmt: skip
        dtype = matmul_dtype(x)
        up, down = up.to(dtype), down.to(dtype)
        rows = x.to(dtype).index_select(0, source)  # N D -> P D
        row_gate = x.new_zeros(len(rows), 1)
        row_gate[slot, 0] = gate
        outputs = x.new_empty(rows.shape)
        products = x.new_empty(len(rows), up.shape[2])
        for own, first, second in zip(rows_of, up.unbind(), down.unbind(), strict=True):
            matmul_into(products[own], rows[own], first.t())  # P_e D -> P_e 2F
            a, b = products[own].chunk(2, dim=-1)
            hidden = F.silu(a).mul_(b).mul_(row_gate[own])
            matmul_into(outputs[own], hidden.to(dtype), second.t())  # P_e F -> P_e D
        ctx.save_for_backward(rows, row_gate, up, down, source, slot, products)
        ctx.rows_of = rows_of
        return sum_rows_reference(outputs, slot)  # P D -> N D

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_gate, up, down, source, slot, products = ctx.saved_tensors
        dtype, full = rows.dtype, gradient.dtype
        sent = gradient.to(dtype).index_select(0, source)  # N D -> P D
        d_up, d_down = torch.empty_like(up, dtype=full), torch.empty_like(down, dtype=full)
        d_gate = torch.empty_like(row_gate[:, 0])
        d_rows = torch.empty_like(rows, dtype=full)
        for e, own in enumerate(ctx.rows_of):
            a, b = products[own].chunk(2, dim=-1)
            silu = F.silu(a)
            d_hidden = matmul(sent[own], down[e]).to(full)  # P_e D -> P_e F
            part = d_hidden * silu
            torch.linalg.vecdot(part, b, out=d_gate[own])
            d_both = torch.empty_like(products[own])
            d_a, d_b = d_both.chunk(2, dim=-1)
            torch.mul(part, row_gate[own], out=d_b)
            d_hidden.mul_(row_gate[own])
            hidden = silu.mul_(b).mul_(row_gate[own])
            matmul_into(d_down[e], hidden.to(dtype).t(), sent[own].t())  # F D
            torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(b), a, grad_input=d_a)
            d_both = d_both.to(dtype)
            matmul_into(d_up[e], rows[own].t(), d_both.t())  # D 2F
            matmul_into(d_rows[own], d_both, up[e])  # P_e 2F -> P_e D
        d_x = sum_rows_reference(d_rows, slot)
        return d_x, d_gate[slot], d_up, d_down, None, None, None
