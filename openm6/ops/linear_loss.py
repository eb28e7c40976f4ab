"""Cross-entropy behind a linear head, chunk by chunk: the logits of all tokens never exist at once.

The gradient is made in the forward pass, while a chunk's logits are there, so each weight of a token must be known
then; after that the upstream gradient can only be one factor for all tokens.
"""

# Letters: M tokens, D width, V vocabulary, C tokens of a chunk

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6 import kernels
from openm6.ops.grouped import cast_alike
from openm6.ops.precision import product_dtype
from openm6.ops.product import add_product, filled_up, product, product_into

LOGITS = (
    2**27
)  # of a chunk at most; each chunk reads and writes the weight's gradient once more: few and large


def linear_nats(
    hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor, most: int = LOGITS
) -> tuple[Tensor, Tensor]:
    """Σ token_weight · nats with its gradient, and the nats M (fp32, without a gradient).

    hidden: M D; weight of the head: V D; label: M, 0 to V - 1; token_weight: M, part of the loss and not learned;
    most: logits that may exist at once.
    """
    rows, head = cast_alike(hidden, weight)
    chunks = -(-len(rows) * len(head) // most)
    whole = filled_up(len(rows), product_dtype(rows)) if rows.is_cpu else len(rows)
    extra = whole - len(rows)  # tokens without weight, see `product`
    rows, label, token_weight = (_lengthened(part, extra) for part in (rows, label, token_weight))
    nats, total = _LinearNats.apply(rows, head, label, token_weight, chunks)
    return total, nats[: len(hidden)]


def linear_nats_reference(
    hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The naive twin of `linear_nats`: all logits at once."""
    nats = F.cross_entropy(F.linear(hidden, weight).float(), label, reduction="none")
    return (nats * token_weight).sum(), nats.detach()


def nats_and_gradient(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Nats C (fp32) of logits C V, which are overwritten by the gradient of Σ weight · nats."""
    if kernels.available(logits.device):
        # Triton is optional.
        from openm6.kernels import cross_entropy  # noqa: PLC0415

        return cross_entropy.cross_entropy_with_gradient(logits, label, weight)
    return nats_and_gradient_reference(logits, label, weight)


def nats_and_gradient_reference(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """The naive twin of `nats_and_gradient`."""
    log_probability = logits.float().log_softmax(-1)
    nats = -log_probability.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    gradient = log_probability.exp_()
    gradient.scatter_add_(-1, label.unsqueeze(-1), torch.full_like(nats, -1.0).unsqueeze(-1))
    logits.copy_(gradient.mul_(weight.float().unsqueeze(-1)))
    return nats


def _lengthened(part: Tensor, extra: int) -> Tensor:
    """M … -> M + extra … with zeros at the end."""
    return torch.cat([part, part.new_zeros(extra, *part.shape[1:])]) if extra else part


class _LinearNats(torch.autograd.Function):
    """With G = weight · (softmax − one at the label): d_hidden = G·W, d_W = Gᵀ·hidden, both times one factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor, chunks: int
    ) -> tuple[Tensor, Tensor]:
        needed = any(ctx.needs_input_grad[:2])
        size = max(1, -(-len(hidden) // max(1, chunks)))
        d_hidden = torch.empty_like(hidden) if needed else hidden
        d_weight = torch.zeros_like(weight) if needed else weight
        hidden, weight = (part.to(product_dtype(part)) for part in (hidden, weight))
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = product(hidden[part], weight)  # C D -> C V
            nats[part] = nats_and_gradient(logits, label[part], token_weight[part])
            if needed:
                product_into(d_hidden[part], logits, weight.t())  # C V -> C D
                add_product(d_weight, logits.t(), hidden[part].t())
        ctx.save_for_backward(*((d_hidden, d_weight) if needed else ()))
        ctx.mark_non_differentiable(nats)
        return nats, (nats * token_weight).sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(factor), d_weight.mul_(factor), None, None, None
