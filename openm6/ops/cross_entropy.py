"""Cross-entropy of several small classifiers at once, without copies of the logits on a CPU."""

# Letters: N places, G classifiers, B width, C classes

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_cross_entropy(states: Tensor, weight: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
    """Nats of class wanted[n, g] among the logits states[n, g] · weight[g], in fp32: N G B, G B C, N G -> N G.

    With smoothing ε the wanted class counts 1 − ε, and all classes share ε evenly.
    """
    if states.is_cpu and states.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _GroupedCrossEntropy.apply(states, weight, wanted, smoothing)
    return grouped_cross_entropy_reference(states, weight, wanted, smoothing)


def grouped_cross_entropy_reference(
    states: Tensor, weight: Tensor, wanted: Tensor, smoothing: float
) -> Tensor:
    """The naive twin of `grouped_cross_entropy`."""
    logits = torch.einsum("ngb,gbc->ngc", states, weight).float().flatten(0, 1)  # N·G C
    nats = F.cross_entropy(logits, wanted.flatten(), reduction="none", label_smoothing=smoothing)
    return nats.view(wanted.shape)


class _GroupedCrossEntropy(torch.autograd.Function):
    """Keeps Q = P − (1 − ε)·[wanted] in place of the logits. With g the gradient of the nats, U = ε/C everywhere:

    dstates = g · (Q − U) Wᵀ and dW = (g · states)ᵀ (Q − U), where U is a mean and costs next to nothing.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
        states = states.transpose(0, 1)  # G N B
        hit = wanted.t().unsqueeze(-1)  # G N 1
        logits = torch.bmm(states, weight)  # G N C
        level = torch.bmm(states, weight.mean(-1, keepdim=True))  # mean logit: G N 1
        hit_logit = logits.gather(-1, hit)
        log_share = logits.log_softmax(-1)
        hit_share = log_share.gather(-1, hit)
        total = hit_logit - hit_share  # log Σ exp
        nats = (smoothing - 1) * hit_share + smoothing * (total - level)
        ctx.smoothing = smoothing
        if any(ctx.needs_input_grad):
            rest = log_share.exp_()
            rest.scatter_add_(-1, hit, torch.full_like(hit_share, smoothing - 1))
            ctx.save_for_backward(states, weight, rest)
        return nats.squeeze(-1).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states, weight, rest = ctx.saved_tensors
        scale = gradient.t().unsqueeze(-1)  # G N 1
        uniform = weight.mean(-1).unsqueeze(1).mul_(ctx.smoothing)  # ε·mean of W: G 1 B
        d_states = torch.bmm(rest, weight.mT).sub_(uniform).mul_(scale)
        scaled = states * scale
        d_weight = torch.bmm(scaled.mT, rest)
        d_weight.sub_((ctx.smoothing / weight.shape[-1]) * scaled.sum(1).unsqueeze(-1))
        return d_states.transpose(0, 1), d_weight, None, None
