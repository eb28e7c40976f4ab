"""Cross-entropy of several small classifiers at once, without copies of the logits on a CPU."""

# Letters: N places, G classifiers, B width, C classes

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.ops.precision import product_dtype
from openm6.ops.product import filled_up, product


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

    dstates = g · (Q − U) Wᵀ and dW = (g · states)ᵀ (Q − U), where U is a mean and costs next to nothing. One
    classifier after the other, each with a few places too many (see `product`), which have no gradient. Factors of
    products are in `product_dtype`, all else is in fp32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
        dtype = product_dtype(states)
        extra = filled_up(len(states), dtype) - len(states)
        states = F.pad(states.transpose(0, 1), (0, 0, 0, extra)).to(dtype)  # G N B
        weight = weight.to(dtype)
        hits = F.pad(wanted.t(), (0, extra)).unsqueeze(-1)  # G N 1
        nats, rests = [], []
        for own, matrix, hit in zip(states, weight, hits, strict=True):
            nat, rest = _one_classifier(own, matrix, hit, smoothing, any(ctx.needs_input_grad))
            nats.append(nat)
            rests.append(rest)
        ctx.smoothing = smoothing
        ctx.save_for_backward(states, weight, *rests)
        return torch.cat(nats, dim=1)[: len(wanted)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states, weight, *rests = ctx.saved_tensors
        scales = F.pad(gradient.t(), (0, states.shape[1] - len(gradient))).unsqueeze(-1)  # G N 1
        uniform = weight.mean(-1, dtype=gradient.dtype).mul_(ctx.smoothing)  # ε·mean of W: G B
        d_states, d_weight = (torch.empty_like(part, dtype=gradient.dtype) for part in (states, weight))
        for g, (rest, scale) in enumerate(zip(rests, scales, strict=True)):
            torch.mul(product(rest, weight[g]) - uniform[g], scale, out=d_states[g])
            scaled = states[g] * scale
            d_weight[g] = product(scaled.to(rest.dtype).t(), rest.t())
            d_weight[g].sub_((ctx.smoothing / weight.shape[-1]) * scaled.sum(0).unsqueeze(-1))
        return d_states[:, : len(gradient)].transpose(0, 1), d_weight, None, None


def _one_classifier(
    states: Tensor, weight: Tensor, hit: Tensor, smoothing: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Nats and, to keep, Q: N B, B C, N 1 -> N 1, N C."""
    logits = product(states, weight.t()).float()  # N C
    level = logits.mean(-1, keepdim=True)
    hit_logit = logits.gather(-1, hit)
    log_share = logits.log_softmax(-1)
    hit_share = log_share.gather(-1, hit)
    total = hit_logit - hit_share  # log Σ exp
    nats = (smoothing - 1) * hit_share + smoothing * (total - level)
    if not keep:
        return nats, nats
    rest = log_share.exp_().scatter_add_(-1, hit, torch.full_like(hit_share, smoothing - 1))
    return nats, rest.to(states.dtype)
