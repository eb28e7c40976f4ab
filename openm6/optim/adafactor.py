"""Adafactor, whose second moment is a number for each row and column, also over tensors that are cut over ranks."""

# Letters: E matrices (experts; 1 for a plain tensor), R rows, R' of them here, C columns

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openm6.optim.pieces import COLUMN_MEANS, ROW_MEANS, Piece, Pieces, whole

AT_ONCE = 2**25  # values whose updates wait together for the sums of other ranks


class Adafactor(torch.optim.Optimizer):
    """Scales gradients by factored second moments (arXiv 1804.04235) and steps to the size of the weights.

    For plain parameters the rule is that of `torch.optim.Adafactor`. A 3-D parameter of a group with `muon: True` is a
    stack of matrices (experts), each of which is scaled and clipped for itself, so that experts on other ranks need
    not be asked. Where a matrix's rows lie on several ranks, sums go over them: twice a step, many tensors at once.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        pieces: Pieces = whole,
        beta2_decay: float = -0.8,
        smallest_scale: float = 1e-3,
        clip: float = 1.0,
    ) -> None:
        """`pieces` says how a parameter lies here; `clip` bounds the root mean square of an update."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.pieces, self.beta2_decay = pieces, beta2_decay
        self.smallest_scale, self.clip = smallest_scale, clip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; `closure` may recompute the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for bucket in self._buckets():
            sums = [self._follow(one) for one in bucket]
            _total(bucket, sums)
            updates = [self._scale(one, values) for one, values in zip(bucket, sums, strict=True)]
            sizes = [[_squares(update, one.stacked)] for one, update in zip(bucket, updates, strict=True)]
            _total(bucket, sizes)
            for one, values, update, (size,) in zip(bucket, sums, updates, sizes, strict=True):
                self._apply(one, values[0], update, size)
        return loss

    def _buckets(self) -> Iterator[list[_Moving]]:
        """Neighbours that are cut over the same ranks together; what lies here whole waits for nobody."""
        bucket: list[_Moving] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moving = _Moving(parameter, self.pieces(parameter), group)
                if bucket and (_is_full(bucket) or not _same_ranks(moving, bucket[-1])):
                    yield bucket
                    bucket = []
                bucket.append(moving)
        if bucket:
            yield bucket

    def _follow(self, one: _Moving) -> list[Tensor]:
        """Takes the gradient into the moments; the sums that the rest of the step needs of all parts.

        Σ w² of each matrix; where rows are cut also Σ g² of each column and the sum of the row means.
        """
        state, gradient = self._state(one), one.gradient
        state["step"] += 1
        share = float(state["step"]) ** self.beta2_decay
        sums = [_squares(one.weight, one.stacked)]
        if gradient.ndim < 2:
            variance = one.piece.local(state["variance"])
            variance.lerp_(gradient.square(), share)
            return sums
        rows = one.piece.local(state[ROW_MEANS])  # E R' 1
        rows.lerp_(gradient.square().mean(-1, keepdim=True), share)
        return [*sums, gradient.square().sum(-2, keepdim=True), rows.sum(-2, keepdim=True)]

    def _scale(self, one: _Moving, sums: list[Tensor]) -> Tensor:
        """g / √v with v[r, c] = row[r] · column[c] / mean(row)."""
        state, smallest = self.state[one.parameter], torch.finfo(one.weight.dtype).eps
        share = float(state["step"]) ** self.beta2_decay
        if one.gradient.ndim < 2:
            variance = one.piece.local(state["variance"]).clone()
        else:
            num_rows = one.parameter.shape[-2]
            columns = one.piece.local(state[COLUMN_MEANS])  # E 1 C
            columns.lerp_(sums[1] / num_rows, share)
            mean = (sums[2] / num_rows).clamp(min=smallest)
            variance = one.piece.local(state[ROW_MEANS]) @ columns / mean
        return variance.clamp_(min=smallest * smallest).rsqrt_().mul_(one.gradient)

    def _apply(self, one: _Moving, weight_squares: Tensor, update: Tensor, update_squares: Tensor) -> None:
        count = one.parameter[0].numel() if one.stacked else one.parameter.numel()
        step, rate = float(self.state[one.parameter]["step"]), one.settings["lr"]
        scale = (weight_squares / count).sqrt().clamp(min=self.smallest_scale)
        size = (update_squares / count).sqrt() / self.clip
        rate_now = scale * min(rate, 1 / math.sqrt(step)) / size.clamp(min=1.0)
        one.weight.mul_(1 - rate * one.settings["weight_decay"])
        one.weight.sub_((update * rate_now).to(one.weight.dtype))

    def _state(self, one: _Moving) -> dict[str, Any]:
        state, gradient = self.state[one.parameter], one.gradient
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            slots = {"variance": gradient.shape}
            if gradient.ndim > 1:
                outer = gradient.shape[:-2]
                slots = {
                    ROW_MEANS: torch.Size([*outer, gradient.shape[-2], 1]),
                    COLUMN_MEANS: torch.Size([*outer, 1, gradient.shape[-1]]),
                }
            for key, shape in slots.items():
                state[key] = one.piece.slot(key, gradient.new_zeros(shape))
        return state


@dataclass(frozen=True)
class _Moving:
    """A parameter about to move."""

    parameter: Tensor
    piece: Piece
    settings: dict[str, Any]  # of its group

    @property
    def weight(self) -> Tensor:
        return self.piece.local(self.parameter)

    @property
    def gradient(self) -> Tensor:
        """In fp32 at least, and what lies here of it."""
        assert self.parameter.grad is not None
        gradient = self.piece.local(self.parameter.grad)
        return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices, each moved for itself."""
        return self.parameter.ndim == 3 and self.settings.get("muon", False)


def _is_full(bucket: list[_Moving]) -> bool:
    """By whole tensors, which are alike on all ranks."""
    group = bucket[0].piece.group
    return group is not None and sum(one.parameter.numel() for one in bucket) > AT_ONCE * group.size


def _same_ranks(one: _Moving, other: _Moving) -> bool:
    return one.piece.group is not None and one.piece.group is other.piece.group


def _squares(tensor: Tensor, stacked: bool) -> Tensor:
    """Σ x² of each matrix of a stack (E 1 1), or of the whole."""
    square = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square()
    return square.sum((-2, -1), keepdim=True) if stacked else square.sum()


def _total(bucket: list[_Moving], sums: list[list[Tensor]]) -> None:
    """Adds up, over the ranks, those sums of a bucket that go over parts of one matrix or tensor; in one exchange."""
    if bucket[0].piece.group is None:
        return
    parts = []
    for one, values in zip(bucket, sums, strict=True):
        cut = one.piece.cuts_rows(one.parameter.ndim)
        parts += values[:1] if not one.stacked or cut else []
        parts += values[1:] if cut else []
    flat = bucket[0].piece.total(torch.cat([part.reshape(-1) for part in parts]))
    for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view_as(part))
