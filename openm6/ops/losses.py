"""Losses: cross-entropy behind a linear head without all logits, of several small classifiers at once, InfoNCE.

The gradient of the linear head is computed in the forward pass, while the logits of a chunk exist. So the weight of
each token must be known then; after that the upstream gradient can only be one factor for all tokens.
"""

# Letters: M tokens, D width, V vocabulary, C tokens of a chunk; of classifiers: N positions, G classifiers, B width,
# C classes; of InfoNCE: Q queries, G gallery, E size of an embedding

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6 import kernels
from openm6.ops.matmul import cast_alike, matmul, matmul_add, matmul_dtype, matmul_into, pad_rows

# Of a chunk at most. Each chunk reads and writes the weight's gradient once more, so they should be few and large.
LOGITS = 2**27


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor, max_logits: int = LOGITS
) -> tuple[Tensor, Tensor]:
    """Σ token_weight · nll with its gradient, and the nll M (fp32, without a gradient).

    hidden: M D; weight of the head: V D; label: M, 0 to V - 1; token_weight: M, part of the loss and not learned;
    max_logits: logits that may exist at once.
    """
    rows, head = cast_alike(hidden, weight)
    chunks = -(-len(rows) * len(head) // max_logits)
    whole = pad_rows(len(rows), matmul_dtype(rows)) if rows.is_cpu else len(rows)
    extra = whole - len(rows)  # tokens without weight, see `pad_rows`
    rows, label, token_weight = (_lengthened(part, extra) for part in (rows, label, token_weight))
    nll, total = _LinearCrossEntropy.apply(rows, head, label, token_weight, chunks)
    return total, nll[: len(hidden)]


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference of `linear_cross_entropy`: all logits at once."""
    nll = F.cross_entropy(F.linear(hidden, weight).float(), label, reduction="none")
    return (nll * token_weight).sum(), nll.detach()


def cross_entropy_with_gradient(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """NLL C (fp32) of logits C V, which are overwritten by the gradient of Σ weight · nll."""
    if kernels.available(logits.device):
        # Triton is optional.
        from openm6.kernels import cross_entropy  # noqa: PLC0415

        return cross_entropy.cross_entropy_with_gradient(logits, label, weight)
    return cross_entropy_with_gradient_reference(logits, label, weight)


def cross_entropy_with_gradient_reference(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """The reference of `cross_entropy_with_gradient`."""
    log_probability = logits.float().log_softmax(-1)
    nll = -log_probability.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    gradient = log_probability.exp_()
    gradient.scatter_add_(-1, label.unsqueeze(-1), torch.full_like(nll, -1.0).unsqueeze(-1))
    logits.copy_(gradient.mul_(weight.float().unsqueeze(-1)))
    return nll


def _lengthened(part: Tensor, extra: int) -> Tensor:
    """M … -> M + extra … with zeros at the end."""
    return torch.cat([part, part.new_zeros(extra, *part.shape[1:])]) if extra else part


class _LinearCrossEntropy(torch.autograd.Function):
    """With G = weight · (softmax − one at the label): d_hidden = G·W, d_W = Gᵀ·hidden, both times one factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor, chunks: int
    ) -> tuple[Tensor, Tensor]:
        needed = any(ctx.needs_input_grad[:2])
        size = max(1, -(-len(hidden) // max(1, chunks)))
        d_hidden = torch.empty_like(hidden) if needed else hidden
        d_weight = torch.zeros_like(weight) if needed else weight
        hidden, weight = (part.to(matmul_dtype(part)) for part in (hidden, weight))
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = matmul(hidden[part], weight)  # C D -> C V
            nll[part] = cross_entropy_with_gradient(logits, label[part], token_weight[part])
            if needed:
                matmul_into(d_hidden[part], logits, weight.t())  # C V -> C D
                matmul_add(d_weight, logits.t(), hidden[part].t())
        ctx.save_for_backward(*((d_hidden, d_weight) if needed else ()))
        ctx.mark_non_differentiable(nll)
        return nll, (nll * token_weight).sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(factor), d_weight.mul_(factor), None, None, None


def grouped_cross_entropy(states: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """NLL of class target[n, g] among the logits states[n, g] · weight[g], in fp32: N G B, G B C, N G -> N G.

    With smoothing ε the target class counts 1 − ε, and all classes share ε evenly.
    """
    if states.is_cpu and states.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _GroupedCrossEntropy.apply(states, weight, target, smoothing)
    return grouped_cross_entropy_reference(states, weight, target, smoothing)


def grouped_cross_entropy_reference(
    states: Tensor, weight: Tensor, target: Tensor, smoothing: float
) -> Tensor:
    """The reference of `grouped_cross_entropy`."""
    logits = torch.einsum("ngb,gbc->ngc", states, weight).float().flatten(0, 1)  # N·G C
    nll = F.cross_entropy(logits, target.flatten(), reduction="none", label_smoothing=smoothing)
    return nll.view(target.shape)


class _GroupedCrossEntropy(torch.autograd.Function):
    """Keeps Q = P − (1 − ε)·[target] in place of the logits. With g the gradient of the nll, U = ε/C everywhere:

    dstates = g · (Q − U) Wᵀ and dW = (g · states)ᵀ (Q − U), where U is a mean and costs next to nothing. One
    classifier after the other, each with a few positions too many (see `pad_rows`), which have no gradient. Factors of
    products are in `matmul_dtype`, all else is in fp32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
        dtype = matmul_dtype(states)
        extra = pad_rows(len(states), dtype) - len(states)
        states = F.pad(states.transpose(0, 1), (0, 0, 0, extra)).to(dtype)  # G N B
        weight = weight.to(dtype)
        hits = F.pad(target.t(), (0, extra)).unsqueeze(-1)  # G N 1
        nll, rests = [], []
        for own, matrix, hit in zip(states, weight, hits, strict=True):
            one, rest = _one_classifier(own, matrix, hit, smoothing, any(ctx.needs_input_grad))
            nll.append(one)
            rests.append(rest)
        ctx.smoothing = smoothing
        ctx.save_for_backward(states, weight, *rests)
        return torch.cat(nll, dim=1)[: len(target)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states, weight, *rests = ctx.saved_tensors
        scales = F.pad(gradient.t(), (0, states.shape[1] - len(gradient))).unsqueeze(-1)  # G N 1
        uniform = weight.mean(-1, dtype=gradient.dtype).mul_(ctx.smoothing)  # ε·mean of W: G B
        d_states, d_weight = (torch.empty_like(part, dtype=gradient.dtype) for part in (states, weight))
        for g, (rest, scale) in enumerate(zip(rests, scales, strict=True)):
            torch.mul(matmul(rest, weight[g]) - uniform[g], scale, out=d_states[g])
            scaled = states[g] * scale
            d_weight[g] = matmul(scaled.to(rest.dtype).t(), rest.t())
            d_weight[g].sub_((ctx.smoothing / weight.shape[-1]) * scaled.sum(0).unsqueeze(-1))
        return d_states[:, : len(gradient)].transpose(0, 1), d_weight, None, None


def _one_classifier(
    states: Tensor, weight: Tensor, hit: Tensor, smoothing: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """NLL and, to keep, Q: N B, B C, N 1 -> N 1, N C."""
    logits = matmul(states, weight.t()).float()  # N C
    level = logits.mean(-1, keepdim=True)
    hit_logit = logits.gather(-1, hit)
    log_share = logits.log_softmax(-1)
    hit_share = log_share.gather(-1, hit)
    total = hit_logit - hit_share  # log Σ exp
    nll = (smoothing - 1) * hit_share + smoothing * (total - level)
    if not keep:
        return nll, nll
    rest = log_share.exp_().scatter_add_(-1, hit, torch.full_like(hit_share, smoothing - 1))
    return nll, rest.to(states.dtype)


def info_nce(query: Tensor, gallery: Tensor, same: Tensor, partner: Tensor, scale: Tensor | float) -> Tensor:
    """−log softmax of each query's partner among the gallery (arXiv 2103.00020, figure 3).  # Q E, G E -> Q

    query, gallery: unit vectors
    same:    Q G bool, what equals the query or is not to be compared with it; left out but for the partner
    partner: Q, the row of the gallery that belongs to the query
    """
    scores = scale * (query @ gallery.t())  # Q G
    alike = same.scatter(1, partner[:, None], False)  # an equal record is no wrong answer
    return F.cross_entropy(scores.masked_fill(alike, float("-inf")), partner, reduction="none")
