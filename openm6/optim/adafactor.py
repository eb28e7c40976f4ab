"""Adafactor (arXiv 1804.04235): the second moment of a matrix is one number per row and one per column.

The rule is a generator that stops where it needs sums over the ranks that hold other rows of the same matrices. So
many tensors advance together with one exchange for all of them, and the rules of fewer bytes (rules.py) use the same.
"""

# Dimensions: E matrices (experts; 1 for a plain matrix), R rows, R' of them on this rank, C columns

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from openm6.optim.adamw import recompute
from openm6.optim.sharding import (
    COLUMN_MEANS,
    COUNT,
    REPLICATED,
    ROW_MEANS,
    ShardSpec,
    ShardSpecOf,
    all_reduce_coalesced,
    replicated,
)

Result = TypeVar("Result")
RankSums = Generator[list[Tensor], None, Result]  # yields tensors that are to be summed over ranks, in place

TINY = 1e-30  # added to squares, as in the paper
TORCH_FLOOR = torch.finfo(
    torch.float32
).eps  # of √v and of the mean of the row means in `torch.optim.Adafactor`
AT_ONCE = 2**25  # values per rank whose updates wait together for the sums of other ranks


class Moments(NamedTuple):
    """Running means of squared gradients, updated in place."""

    row: Tensor  # E R', means over columns
    column: Tensor  # E C, means over rows
    updates: Tensor  # E, how many so far


def follow(
    moments: Moments, gradient: Tensor, spec: ShardSpec = REPLICATED, active: Tensor | None = None
) -> RankSums[Tensor]:
    """Take the squares of a gradient E R' C into its moments, and return which matrices were active: E.

    Without `active` these are all with a gradient: if an expert got no token, and has a gradient of exactly 0,
    nothing decays, or else its first gradient after a pause would be scaled up.
    """
    square = gradient.square() + TINY
    sums = square.sum(-2)  # E C
    active = ((gradient != 0).flatten(1).any(-1) if active is None else active).to(sums.dtype)
    yield _if_cut(spec, sums, active)
    _, num_rows = spec.rows(gradient.shape[-2])
    follow_means(moments, square.mean(-1), sums / num_rows, active > 0)
    return active > 0


def follow_means(moments: Moments, row_mean: Tensor, column_mean: Tensor, active: Tensor) -> None:
    """The same, from the means of a gradient's squares. The decay is 1 - t^-0.8 (section 7.2)."""
    moments.updates.add_(active)
    decay = torch.where(active, 1 - moments.updates.clamp(min=1).pow(-0.8), 1.0).unsqueeze(-1)
    moments.row.lerp_(row_mean, 1 - decay)
    moments.column.lerp_(column_mean, 1 - decay)


def inverse_roots(
    moments: Moments, spec: ShardSpec = REPLICATED, floor: float = TINY
) -> RankSums[tuple[Tensor, Tensor]]:
    """Return the factors E R' and E C of 1/√v, where v[r, c] = row[r] · column[c] / mean(row) (algorithm 4).

    `floor` bounds the mean from below.
    """
    mean = moments.row.sum(-1, keepdim=True)  # E 1
    yield _if_cut(spec, mean)
    _, num_rows = spec.rows(moments.row.shape[-1])
    mean = (mean / num_rows).clamp(min=floor)
    return (moments.row / mean).clamp(min=TINY).rsqrt(), moments.column.clamp(min=TINY).rsqrt()


def normalized(gradient: Tensor, moments: Moments, spec: ShardSpec = REPLICATED) -> RankSums[Tensor]:
    """Return g / √v, clipped to a root mean square of 1 per matrix (section 6): E R' C.

    In offloaded training this clip replaces one by the norm of all gradients, which is not known while gradients are
    used layer by layer.
    """
    row, column = yield from inverse_roots(moments, spec)
    update = gradient * row.unsqueeze(-1) * column.unsqueeze(-2)
    size = yield from root_mean_square(update, spec)
    return update / size.clamp(min=1.0)


def root_mean_square(matrices: Tensor, spec: ShardSpec, pooled: int = 0) -> RankSums[Tensor]:
    """Return the size of each matrix, E 1 1, or of all values together if `pooled` is their number in the whole."""
    squares = matrices.square().sum((-2, -1), keepdim=True)
    if pooled:
        squares = squares.sum(0, keepdim=True)
        yield [squares]
        return (squares / pooled).sqrt()
    yield _if_cut(spec, squares)
    return (squares / (spec.rows(matrices.shape[-2])[1] * matrices.shape[-1])).sqrt()


def _if_cut(spec: ShardSpec, *sums: Tensor) -> list[Tensor]:
    return [] if spec.group is None else list(sums)


def advance(updates: Sequence[RankSums[Result]], spec: ShardSpec) -> list[Result]:
    """Run updates that stop equally often side by side, with one exchange over the ranks of `spec` for each stop."""
    results: list[Result] = []
    while len(results) < len(updates):
        sums: list[Tensor] = []
        for update in updates:
            try:
                sums += next(update)
            except StopIteration as end:
                results.append(end.value)
        all_reduce_coalesced(sums, spec)
    return results


class Adafactor(torch.optim.Optimizer):
    """Scale gradients by factored second moments, and step in proportion to the size of the weights (section 8).

    The rule is that of `torch.optim.Adafactor`; vectors count as matrices of one column. A 3-D parameter of a group
    with `muon: True` is a stack of matrices (experts), each of which is updated by itself, so that ranks with other
    experts need not be asked.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        spec_of: ShardSpecOf = replicated,
        smallest_scale: float = 1e-3,
    ) -> None:
        """`spec_of` returns how a parameter is sharded; `smallest_scale` is the least size of weights to step by."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.spec_of, self.smallest_scale = spec_of, smallest_scale

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; `closure` may recompute the loss first."""
        loss = recompute(closure)
        for bucket in self._buckets():
            advance([self._update(one) for one in bucket], bucket[0].sums)
        return loss

    def _buckets(self) -> Iterator[list[_Shard]]:
        """Neighbours whose sums go over the same ranks together; one without such sums is by itself.

        Buckets end by the size of whole tensors, which all ranks know.
        """
        bucket: list[_Shard] = []
        size = 0
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                one = _shard_of(parameter, self.spec_of(parameter), group)
                ranks = bucket[0].sums.group if bucket else None
                if bucket and (ranks is None or one.sums.group is not ranks or size > AT_ONCE * ranks.size):
                    yield bucket
                    bucket, size = [], 0
                bucket.append(one)
                size += parameter.numel()
        if bucket:
            yield bucket

    def _update(self, one: _Shard) -> RankSums[None]:
        moments, lr = self._moments(one), one.group["lr"]
        size = yield from root_mean_square(one.weight.float(), one.spec, one.pooled)
        yield from follow(moments, one.gradient, one.spec, torch.ones_like(moments.updates))
        floor = TINY if one.parameter.ndim < 2 else TORCH_FLOOR  # a vector's v is its rows' alone
        row, column = yield from inverse_roots(moments, one.spec, floor)
        scale = (row.unsqueeze(-1) * column.unsqueeze(-2)).clamp_(max=1 / TORCH_FLOOR)  # 1/√v, E R' C
        update = scale.mul_(one.gradient)
        clip = (yield from root_mean_square(update, one.spec, one.pooled)).clamp(min=1.0)
        rate = (
            size.clamp(min=self.smallest_scale) * moments.updates.rsqrt().clamp(max=lr).view(-1, 1, 1) / clip
        )
        one.weight.mul_(1 - lr * one.group["weight_decay"])
        one.weight.sub_((update * rate).to(one.weight.dtype))

    def _moments(self, one: _Shard) -> Moments:
        state = self.state[one.parameter]
        local = one.slots.local(one.parameter)
        matrices, rows, columns = one.weight.shape
        if not state:
            outer = local.shape[:-2]
            vector = local.ndim < 2
            shapes = {
                ROW_MEANS: [rows] if vector else [*outer, rows, 1],
                COLUMN_MEANS: [1] if vector else [*outer, 1, columns],
                COUNT: [1] if vector else [*outer, 1, 1],
            }
            for key, shape in shapes.items():
                state[key] = one.slots.slot(key, torch.zeros(shape, device=local.device))
        row, column, count = (one.slots.local(state[key]) for key in (ROW_MEANS, COLUMN_MEANS, COUNT))
        return Moments(row.view(matrices, rows), column.view(matrices, columns), count.view(matrices))


@dataclass(frozen=True)
class _Shard:
    """This rank's part of a parameter, as matrices E R' C."""

    parameter: Tensor
    weight: Tensor
    gradient: Tensor  # in fp32
    slots: ShardSpec  # how the parameter and its moments are sharded
    spec: ShardSpec  # the same if rows of one matrix are on several ranks, else REPLICATED
    sums: ShardSpec  # the same if any sum goes over ranks, else REPLICATED
    pooled: (
        int  # number of values of a parameter that is scaled and clipped as one, 0 for matrices by themselves
    )
    group: dict[str, Any]


def _shard_of(parameter: Tensor, slots: ShardSpec, group: dict[str, Any]) -> _Shard:
    assert parameter.grad is not None
    weight, gradient = slots.local(parameter), slots.local(parameter.grad).float()
    rows, columns = (weight.numel(), 1) if weight.ndim < 2 else weight.shape[-2:]
    shape = (math.prod(weight.shape[:-2]), rows, columns)
    spec = slots if slots.shards_rows(parameter.ndim) else REPLICATED
    stacked = parameter.ndim == 3 and group.get("muon", False)
    pooled = 0 if stacked or parameter.ndim < 3 else parameter.numel()
    sums = slots if pooled else spec
    return _Shard(parameter, weight.view(shape), gradient.reshape(shape), slots, spec, sums, pooled, group)
