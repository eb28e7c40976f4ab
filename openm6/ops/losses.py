"""Losses: cross-entropy of a linear head in chunks of logits, of several small classifiers at once, InfoNCE.

The gradient of the linear head is computed in the forward pass, while the logits of a chunk exist. Token weights are
therefore inputs of the forward pass, and the upstream gradient is one factor for all tokens.
"""

# Shapes: M tokens, D hidden size, V vocabulary, C tokens of a chunk; of classifiers: N positions, G classifiers,
# B bottleneck, C classes; of InfoNCE: Q queries, G gallery, E embedding size

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6 import kernels
from openm6.ops.matmul import cast_alike, matmul, matmul_add, matmul_dtype, pad_rows

MAX_LOGITS = 2**27  # of a chunk, each of which reads and writes the weight's gradient once more
CPU_ROWS, CPU_LOGITS = 256, 2**20  # on a CPU the passes over a chunk should find it in the cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, Tensor]:
    """Return Σ token_weight · nll with its gradient, and the nll M (fp32, without a gradient).

    hidden: M D; weight of the head: V D; label: M; token_weight: M, constants; max_logits: that may exist at once
    """
    rows, head = cast_alike(hidden, weight if torch.is_grad_enabled() else weight.detach())
    if rows.is_cpu:
        max_logits = min(max_logits, max(CPU_LOGITS, CPU_ROWS * len(head)))
    chunks = -(-len(rows) * len(head) // max_logits)
    if rows.is_cpu and (extra := pad_rows(len(rows), matmul_dtype(rows)) - len(rows)):
        # Tokens without weight.
        rows, label, token_weight = (
            torch.cat([part, part.new_zeros(extra, *part.shape[1:])]) for part in (rows, label, token_weight)
        )
    nll, total = _LinearCrossEntropy.apply(rows, head, label, token_weight, chunks)
    return total, nll[: len(hidden)]


def cross_entropy_with_gradient(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the NLL C (fp32) of logits C V, and overwrite these by the gradient of Σ weight · nll."""
    if kernels.available(logits.device):
        # Triton is optional.
        from openm6.kernels import cross_entropy  # noqa: PLC0415

        return cross_entropy.cross_entropy_with_gradient(logits, label, weight)
    log_probability = logits.float().log_softmax(-1)
    nll = -log_probability.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    gradient = torch.exp(log_probability, out=logits if logits.dtype == log_probability.dtype else log_probability)
    gradient.scatter_add_(-1, label.unsqueeze(-1), torch.full_like(nll, -1.0).unsqueeze(-1))
    gradient.mul_(weight.float().unsqueeze(-1))
    if gradient is not logits:
        logits.copy_(gradient)
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    """With G = weight · (softmax − one at the label): d_hidden = G·W, d_W = Gᵀ·hidden, both times one factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor, chunks: int
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        size = max(1, -(-len(hidden) // max(1, chunks)))
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weight = torch.zeros_like(weight) if of_weight else None  # a frozen head has none
        hidden, weight = (part.to(matmul_dtype(part)) for part in (hidden, weight))
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = matmul(hidden[part], weight)  # C D -> C V
            nll[part] = cross_entropy_with_gradient(logits, label[part], token_weight[part])
            if d_hidden is not None:
                d_hidden[part] = matmul(logits, weight.t())  # C V -> C D
            if d_weight is not None:
                matmul_add(d_weight, logits.t(), hidden[part].t())
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(nll)
        return nll, (nll * token_weight).sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor, factor: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = (None if part is None else part.mul_(factor) for part in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None


def grouped_cross_entropy(states: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """NLL of class target[n, g] of logits states[n, g] · weight[g], in fp32: N G B, G B C, N G -> N G.

    Label smoothing ε: the target class has weight 1 − ε, and ε is spread evenly over all classes.
    """
    if states.is_cpu and states.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        weight = weight if torch.is_grad_enabled() else weight.detach()
        return _GroupedCrossEntropy.apply(states, weight, target, smoothing)
    logits = torch.einsum("ngb,gbc->ngc", states, weight).float().flatten(0, 1)  # N·G C
    nll = F.cross_entropy(logits, target.flatten(), reduction="none", label_smoothing=smoothing)
    return nll.view(target.shape)


class _GroupedCrossEntropy(torch.autograd.Function):
    """Keep Q = P − (1 − ε)·[target] in place of the logits. With g the gradient of the nll, U = ε/C everywhere:

    dstates = g · (Q − U) Wᵀ and dW = (g · states)ᵀ (Q − U), where products with U are means. One classifier after the
    other, with padded positions (see `pad_rows`), which have no gradient. Factors of products are in `matmul_dtype`,
    the rest is in fp32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
        dtype = matmul_dtype(states)
        extra = pad_rows(len(states), dtype) - len(states)
        states = F.pad(states.transpose(0, 1), (0, 0, 0, extra)).to(dtype)  # G N B
        weight = weight.to(dtype)
        labels = F.pad(target.t(), (0, extra)).unsqueeze(-1)  # G N 1
        nll, rests = [], []
        for own, matrix, label in zip(states, weight, labels, strict=True):
            logits = matmul(own, matrix.t()).float()  # N C
            mean = logits.mean(-1, keepdim=True)
            log_probability = logits.log_softmax(-1)
            at_label = log_probability.gather(-1, label)  # N 1
            log_sum = logits.gather(-1, label) - at_label  # log Σ exp
            nll.append((smoothing - 1) * at_label + smoothing * (log_sum - mean))
            if any(ctx.needs_input_grad):
                rest = log_probability.exp_().scatter_add_(-1, label, torch.full_like(at_label, smoothing - 1))
                rests.append(rest.to(dtype))
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


def info_nce(query: Tensor, gallery: Tensor, same: Tensor, partner: Tensor, scale: Tensor | float) -> Tensor:
    """−log softmax of each query's partner among the gallery (arXiv 2103.00020, figure 3).  # Q E, G E -> Q

    query, gallery: unit vectors
    same:    Q G bool, what equals the query or must not be compared with it: no negatives
    partner: Q, the row of the gallery that belongs to the query
    """
    with torch.autocast(query.device.type, enabled=False):  # the scale makes much of what bf16 would round away
        scores = scale * (query.float() @ gallery.float().t())  # Q G
        ignored = same.scatter(1, partner[:, None], False)
        return F.cross_entropy(scores.masked_fill(ignored, float("-inf")), partner, reduction="none")
