"""Which experts a token goes to, with what weight, and how rows travel there and back."""

# Letters: N tokens, D width, E experts, K choices per token, Z prototypes, R rows sent to experts

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def choose_top_k(
    logits: Tensor, bias: Tensor | None, top_k: int, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The K experts with the highest logit (plus `bias`, which steers the choice but not the gates).

    Returns gates N K and experts N K, and the probabilities N E; normalised gates sum to one.
    """
    probability = logits.softmax(-1)
    chosen = (logits if bias is None else logits + bias).topk(top_k, dim=-1).indices
    gate = probability.gather(-1, chosen)
    if normalise:
        gate = gate / gate.sum(-1, keepdim=True)
    return gate, chosen, probability


def choose_prototypes(
    logits: Tensor, bias: Tensor | None, num_prototypes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One expert in each of Z groups, weighted by the softmax within its group: "k top-1" (M6-T, 2105.15082, §3.2).

    Returns gates N Z and experts N Z (numbers 0 to E - 1), and the probabilities N E, which sum to Z.
    """
    groups = logits.unflatten(-1, (num_prototypes, -1))  # N E -> N Z E/Z
    probability = groups.softmax(-1)
    steered = groups if bias is None else groups + bias.view(num_prototypes, -1)
    winner = steered.argmax(-1, keepdim=True)  # N Z 1
    gate = probability.gather(-1, winner).squeeze(-1)
    first = torch.arange(num_prototypes, device=logits.device) * groups.shape[-1]
    return gate, winner.squeeze(-1) + first, probability.flatten(-2)


def expert_load(chosen: Tensor, valid: Tensor, num_experts: int) -> Tensor:
    """How many choices of valid tokens fell on each expert: N K, N -> E, fp32.

    No `bincount`: that makes a GPU wait for the host.
    """
    weight = valid.unsqueeze(-1).expand_as(chosen).to(torch.float32)
    load = torch.zeros(num_experts, device=chosen.device)
    return load.scatter_add_(0, chosen.reshape(-1), weight.reshape(-1))


def variation(load: Tensor) -> Tensor:
    """c_v = σ/μ of the tokens per expert: 0 is perfect balance (M6-T, §3.1)."""
    mean = load.mean()
    return load.std(correction=0) / mean.clamp(min=1e-9)


def balance_loss(probability: Tensor, load: Tensor, valid: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of the Switch transformer (2101.03961, eq. 4): 1 where balanced, at most E.

    f_e is the share of choices that fell on expert e, P_e its mean share of probability.
    """
    weight = valid.to(probability.dtype)
    mean = (probability * weight.unsqueeze(-1)).sum(0) / weight.sum().clamp(min=1)
    share = load / load.sum().clamp(min=1)
    return probability.shape[-1] * (share * mean / mean.sum().clamp(min=1e-9)).sum()


def z_loss(logits: Tensor, valid: Tensor, num_groups: int = 1) -> Tensor:
    """Mean of (log Σ exp logits)², which keeps router logits small (ST-MoE, 2202.08906, eq. 5)."""
    square = logits.unflatten(-1, (num_groups, -1)).logsumexp(-1).square().mean(-1)  # N E -> N
    weight = valid.to(square.dtype)
    return (square * weight).sum() / weight.sum().clamp(min=1)


def balanced_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """A step of loss-free balancing (2408.15664): up by `rate` where too few tokens came, down where too many."""
    return bias + rate * torch.sign(load.mean() - load)


@dataclass(frozen=True)
class RowPlan:
    """The journey of rows to their experts.

    source: R, the token that row r is a copy of
    slot:   N K, the row that carries choice k of token n
    kept:   N K bool, or None where nothing is dropped
    counts: E, rows of each expert; rows of one expert lie together
    """

    source: Tensor
    slot: Tensor
    kept: Tensor | None
    counts: Tensor


def plan_dropless(chosen: Tensor, num_experts: int) -> RowPlan:
    """Every choice becomes a row: R = N·K. A stable sort keeps tokens of one expert in their order."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)  # R
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=order.device)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    source = order.div(chosen.shape[-1], rounding_mode="floor")
    return RowPlan(source, slot.view_as(chosen), None, counts)


def plan_capacity(chosen: Tensor, valid: Tensor, num_experts: int, capacity: int) -> RowPlan:
    """Each expert takes its first `capacity` valid choices and drops the rest: R = E·capacity, known beforehand.

    Unused rows copy token 0; nobody reads their answers, so they cost time and change nothing.
    """
    # Padding is sorted behind all experts, so that it never takes a place.
    flat = torch.where(valid.unsqueeze(-1), chosen, num_experts).reshape(-1)
    order = flat.argsort(stable=True)
    total = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    total.scatter_add_(0, flat, torch.ones_like(flat))
    first = total.cumsum(0) - total  # E + 1
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[flat[order]]
    kept = (rank < capacity) & (flat < num_experts)
    slot = torch.where(kept, flat * capacity + rank, 0)
    token = torch.arange(len(flat), device=flat.device).div(chosen.shape[-1], rounding_mode="floor")
    rows = num_experts * capacity
    source = torch.zeros(rows + 1, dtype=torch.int64, device=flat.device)
    source[torch.where(kept, slot, rows)] = token  # the spare last place swallows what is dropped
    counts = torch.full((num_experts,), capacity, dtype=torch.int64, device=flat.device)
    return RowPlan(source[:rows], slot.view_as(chosen), kept.view_as(chosen), counts)


def capacity_of(num_tokens: int, choices: int, num_experts: int, factor: float) -> int:
    """C = k·T/N·γ, rounded up (M6-T, §2), with k choices, T tokens and N experts."""
    return max(1, math.ceil(choices * num_tokens / num_experts * factor))


def send_rows(x: Tensor, plan: RowPlan) -> Tensor:
    """Each row is a copy of its token: N D -> R D."""
    return _SendRows.apply(x, plan.source, plan.slot, plan.kept)


def combine_rows(rows: Tensor, gate: Tensor, plan: RowPlan) -> Tensor:
    """Each token's K answers, weighted by their gates and summed: R D, N K -> N D. Dropped choices add nothing."""
    gate = gate if plan.kept is None else gate * plan.kept
    return _CombineRows.apply(rows, gate.to(rows.dtype), plan.source, plan.slot)


# Autograd does not know that `slot` inverts `source`, and would scatter with atomics. Both adjoints are gathers.
class _SendRows(torch.autograd.Function):
    """x[source]; backwards each token sums the gradients of its own K rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(slot, torch.ones_like(slot) if kept is None else kept)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        slot, kept = ctx.saved_tensors
        return weighted_rows(gradient, kept.to(gradient.dtype), slot), None, None, None


class _CombineRows(torch.autograd.Function):
    """y[n] = Σ_k gate[n, k] · rows[slot[n, k]]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gate, source, slot)
        return weighted_rows(rows, gate, slot)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, gate, source, slot = ctx.saved_tensors
        # A row has one reader, so adding equals writing; a dropped choice adds its gate of 0 to row 0.
        row_gate = gate.new_zeros(rows.shape[0]).scatter_add_(0, slot.reshape(-1), gate.reshape(-1))
        sent = gradient.index_select(0, source)  # N D -> R D
        d_gate = torch.linalg.vecdot(rows, sent)[slot]  # R -> N K
        return sent.mul_(row_gate.unsqueeze(-1)), d_gate, None, None


def weighted_rows(rows: Tensor, weight: Tensor, slot: Tensor) -> Tensor:
    """Σ_k weight[n, k] · rows[slot[n, k]]: R D, N K, N K -> N D; sums in fp32."""
    if rows.is_cpu and rows.dtype == torch.float32:
        return F.embedding_bag(slot, rows, mode="sum", per_sample_weights=weight)
    picked = rows[slot].float()  # N K D
    return (picked * weight.float().unsqueeze(-1)).sum(1).to(rows.dtype)
