"""Attention for packed rows on a CPU: pieces of a row meet only the keys that some query of theirs can see."""

# Letters: B rows, S queries, T keys, H query heads, G key-value heads, M = H/G, d size of a head, P queries of a piece

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openm6.ops.sequence import Layout, additive_mask, visible

PIECE = (
    128  # queries of a piece at most: more waste work above the diagonal, fewer waste it on small products
)


@dataclass(frozen=True)
class Piece:
    """Queries `start` to `stop` of a row, and the keys from `first` to `last` that hold all they can see."""

    row: int
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class PieceMask:
    """The sequence rule as an additive mask B 1 S S, and the pieces in which it is not wholly -inf."""

    bias: Tensor
    pieces: tuple[Piece, ...]


def piece_mask(layout: Layout, dtype: torch.dtype) -> PieceMask:
    """Cuts rows where one example ends and another begins, and after each 128 tokens."""
    mask = visible(layout, layout)
    pieces = []
    for row, sample in enumerate(layout.sample):
        lengths = torch.unique_consecutive(sample, return_counts=True)[1].tolist()
        start = 0
        for length in lengths:
            end = start + length
            for begin in range(start, end, PIECE):
                stop = min(end, begin + PIECE)
                seen = mask[row, 0, begin:stop].any(0).nonzero()
                pieces.append(Piece(row, begin, stop, int(seen[0]), int(seen[-1]) + 1))
            start = end
    return PieceMask(additive_mask(mask, dtype), tuple(pieces))


def attend_pieces(query: Tensor, key: Tensor, value: Tensor, mask: PieceMask) -> Tensor:
    """Softmax attention under a `PieceMask`: B S H d, B S G d twice -> B S H d."""
    return _AttendPieces.apply(query, key, value, mask)


class _AttendPieces(torch.autograd.Function):
    """Keeps each piece's weights, which are few where rows hold several examples.

    The M query heads that share a key head are one taller matrix: its rows are (query, head) pairs.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: PieceMask) -> Tensor:
        answer = torch.empty_like(query)
        kept = []
        for piece, head, shared in _walk(mask, query, key):
            q = _rows(query, piece, head)
            logits = (q @ key[piece.row, piece.first : piece.last, shared].t()).unflatten(
                0, (-1, _share(head))
            )
            bias = mask.bias[piece.row, 0, piece.start : piece.stop, piece.first : piece.last].unsqueeze(1)
            weight = torch.add(bias, logits, alpha=query.shape[-1] ** -0.5).softmax(-1)
            weight = weight.flatten(0, 1).to(value.dtype)
            result = weight @ value[piece.row, piece.first : piece.last, shared]
            answer[piece.row, piece.start : piece.stop, head] = result.unflatten(0, (-1, _share(head)))
            kept.append(weight)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.mask = mask
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (piece, head, shared), weight in zip(_walk(ctx.mask, query, key), kept, strict=True):
            q, g = _rows(query, piece, head), _rows(gradient, piece, head)
            keys = piece.row, slice(piece.first, piece.last), shared
            d_value[keys].addmm_(weight.t(), g)
            d_weight = g @ value[keys].t()
            # softmax: d_logit = weight · (d_weight − Σ weight · d_weight)
            d_logit = torch._softmax_backward_data(d_weight.float(), weight.float(), -1, torch.float32)
            d_logit = d_logit.to(query.dtype)
            d_key[keys].addmm_(d_logit.t(), q, alpha=scale)
            d_q = (d_logit @ key[keys]).mul_(scale)
            d_query[piece.row, piece.start : piece.stop, head] = d_q.unflatten(0, (-1, _share(head)))
        return d_query, d_key, d_value, None


def _walk(mask: PieceMask, query: Tensor, key: Tensor) -> list[tuple[Piece, slice, int]]:
    """Each piece with each group of query heads and the key head that they share."""
    share = query.shape[2] // key.shape[2]
    groups = [(slice(g * share, (g + 1) * share), g) for g in range(key.shape[2])]
    return [(piece, head, shared) for piece in mask.pieces for head, shared in groups]


def _rows(x: Tensor, piece: Piece, head: slice) -> Tensor:
    """The piece's queries of one group as a matrix: P·M d."""
    return x[piece.row, piece.start : piece.stop, head].flatten(0, 1)


def _share(head: slice) -> int:
    """M: query heads of a group."""
    return int(head.stop - head.start)
