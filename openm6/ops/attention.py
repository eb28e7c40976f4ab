"""Attention for packed rows on a CPU: pieces of a row meet only the keys that some query of theirs can see."""

# Letters: B rows, S tokens of a row, N = B·S, H query heads, G key-value heads, M = H/G, d size of a head,
# Q queries and K keys of a piece

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openm6.ops.sequence import SequenceMeta, additive_mask, visible

PIECE = (
    128  # queries of a piece at most: more waste work above the diagonal, fewer waste it on small products
)


@dataclass(frozen=True)
class Piece:
    """Queries `start` to `stop` of the flattened rows, and the keys from `first` to `last` that hold all they see.

    bias: Q K, 0 where a query sees a key, else -inf
    """

    start: int
    stop: int
    first: int
    last: int
    bias: Tensor


@dataclass(frozen=True)
class PieceMask:
    """The sequence rule as the pieces, in order, in which it is not wholly -inf."""

    pieces: tuple[Piece, ...]


def piece_mask(layout: SequenceMeta, dtype: torch.dtype) -> PieceMask:
    """Cuts rows where one example ends and another begins, and after each 128 tokens."""
    mask = visible(layout, layout)[:, 0]  # B S S
    pieces = []
    for row, example in enumerate(layout.example_id):
        lengths = torch.unique_consecutive(example, return_counts=True)[1].tolist()
        start, base = 0, row * layout.length
        for length in lengths:
            end = start + length
            for begin in range(start, end, PIECE):
                stop = min(end, begin + PIECE)
                last = int(mask[row, begin:stop, start:end].any(0).nonzero()[-1]) + start + 1
                bias = additive_mask(mask[row, begin:stop, start:last], dtype)
                pieces.append(Piece(base + begin, base + stop, base + start, base + last, bias))
            start = end
    return PieceMask(tuple(pieces))


def attend_pieces(query: Tensor, key: Tensor, value: Tensor, mask: PieceMask) -> Tensor:
    """Softmax attention under a `PieceMask`: B S H d, B S G d twice -> B S H d."""
    return _AttendPieces.apply(query, key, value, mask)


class _AttendPieces(torch.autograd.Function):
    """Keeps each piece's weights, which are few where rows hold several examples.

    The M query heads that share a key head are one taller matrix: its rows are (query, head) pairs. Pieces are many
    and small, so each takes as few calls as can be: three forwards, five backwards.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: PieceMask) -> Tensor:
        share, scale = query.shape[2] // key.shape[2], query.shape[-1] ** -0.5
        biases = [piece.bias.to(query.dtype).repeat_interleave(share, 0) for piece in mask.pieces]  # Q·M K
        answer = torch.empty_like(query, memory_format=torch.contiguous_format)
        queries, keys, values = _by_head(query, share), _by_head(key, 1), _by_head(value, 1)
        answers = answer.view(-1, len(keys), share, query.shape[-1])  # N G M d
        kept = []
        for head, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            for piece, bias in zip(mask.pieces, biases, strict=True):
                seen = slice(piece.first, piece.last)
                rows = q[piece.start * share : piece.stop * share]
                logits = torch.addmm(bias, rows, k[seen].t(), alpha=scale)
                weight = logits.softmax(-1).to(v.dtype)
                answers[piece.start : piece.stop, head] = (weight @ v[seen]).view(-1, share, q.shape[-1])
                kept.append(weight)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.mask = mask
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        share, scale = query.shape[2] // key.shape[2], query.shape[-1] ** -0.5
        queries, keys, values = _by_head(query, share), _by_head(key, 1), _by_head(value, 1)
        d_query, d_key, d_value = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        weights = iter(kept)
        for q, k, v, g, dq, dk, dv in zip(
            queries, keys, values, _by_head(gradient, share), d_query, d_key, d_value, strict=True
        ):
            for piece in ctx.mask.pieces:
                seen, rows = slice(piece.first, piece.last), slice(piece.start * share, piece.stop * share)
                weight, upstream = next(weights), g[rows]
                dv[seen].addmm_(weight.t(), upstream)
                # softmax: d_logit = weight · (d_weight − Σ weight · d_weight)
                d_weight = (upstream @ v[seen].t()).float()
                d_logit = torch._softmax_backward_data(d_weight, weight.float(), -1, torch.float32)
                d_logit = d_logit.to(q.dtype)
                dk[seen].addmm_(d_logit.t(), q[rows], alpha=scale)
                torch.mm(d_logit, k[seen], out=dq[rows])
        d_query.mul_(scale)
        return _home(d_query, query), _home(d_key, key), _home(d_value, value), None


def _by_head(x: Tensor, share: int) -> Tensor:
    """B S G·M d -> G N·M d, for each key head the rows of the query heads that read it."""
    grouped = x.reshape(-1, x.shape[2] // share, share, x.shape[3])  # N G M d
    return grouped.transpose(0, 1).reshape(x.shape[2] // share, -1, x.shape[3])


def _home(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_by_head`."""
    grouped = x.view(x.shape[0], like.shape[0] * like.shape[1], -1, x.shape[2])  # G N M d
    return grouped.transpose(0, 1).reshape(like.shape)
