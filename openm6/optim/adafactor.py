"""Adafactor (arXiv 1804.04235): the second moment of a matrix is one number per row and one per column.

The rule is a generator that yields where it needs sums over the ranks that hold other rows of the same matrices. So
many tensors advance together with one exchange for all of them, and the rules of fewer bytes (rules.py) use the same.
"""

# Shapes: E matrices (experts; 1 for a plain matrix), R rows, R' of them on this rank, C columns

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from openm6.optim.sharding import COLUMN_MEANS, COUNT, REPLICATED, ROW_MEANS, ShardSpec, ShardSpecOf, replicated

Result = TypeVar("Result")
RankSums = Generator[list[Tensor], None, Result]  # yields tensors that are to be summed over ranks, in place
Group = dict[str, Any]

TINY = 1e-30  # added to squares, as in the paper
TORCH_MIN = torch.finfo(torch.float32).eps  # minimum of √v and of the mean of the row means in `torch.optim.Adafactor`
MIN_SIZE = 1e-3  # of the weights to step in proportion to
AT_ONCE = 2**25  # values per rank whose updates wait together for the sums of other ranks


class Moments(NamedTuple):
    """Running means of squared gradients, updated in place."""

    row: Tensor  # E R', means over columns
    column: Tensor  # E C, means over rows
    updates: Tensor  # E, how many so far


def update_moments(
    moments: Moments, gradient: Tensor, spec: ShardSpec = REPLICATED, active: Tensor | None = None
) -> RankSums[Tensor]:
    """Update the moments by a gradient E R' C; return which matrices were active, by default those with a gradient: E.

    Of an expert without tokens nothing decays; otherwise its next gradient would be scaled up.
    """
    square = gradient.square() + TINY
    sums = square.sum(-2)  # E C
    active = ((gradient != 0).flatten(1).any(-1) if active is None else active).to(sums.dtype)
    yield _if_sharded(spec, sums, active)
    _, num_rows = spec.rows(gradient.shape[-2])
    update_means(moments, square.mean(-1), sums / num_rows, active > 0)
    return active > 0


def update_means(moments: Moments, row_mean: Tensor, column_mean: Tensor, active: Tensor) -> None:
    """Update the moments by the means of a gradient's squares. The decay is 1 - t^-0.8 (section 7.2)."""
    moments.updates.add_(active)
    decay = torch.where(active, 1 - moments.updates.clamp(min=1).pow(-0.8), 1.0).unsqueeze(-1)
    moments.row.lerp_(row_mean, 1 - decay)
    moments.column.lerp_(column_mean, 1 - decay)


def inverse_roots(
    moments: Moments, spec: ShardSpec = REPLICATED, min_mean: float = TINY
) -> RankSums[tuple[Tensor, Tensor]]:
    """Return the factors E R' and E C of 1/√v, where v[r, c] = row[r] · column[c] / mean(row) (algorithm 4)."""
    mean = moments.row.sum(-1, keepdim=True)  # E 1
    yield _if_sharded(spec, mean)
    _, num_rows = spec.rows(moments.row.shape[-1])
    mean = (mean / num_rows).clamp(min=min_mean)
    return (moments.row / mean).clamp(min=TINY).rsqrt(), moments.column.clamp(min=TINY).rsqrt()


def normalized(gradient: Tensor, moments: Moments, spec: ShardSpec = REPLICATED) -> RankSums[Tensor]:
    """Return g / √v, clipped to a root mean square of 1 per matrix (section 6), not by the norm of all: E R' C."""
    row, column = yield from inverse_roots(moments, spec)
    update = gradient * row.unsqueeze(-1) * column.unsqueeze(-2)
    size = yield from root_mean_square(update, spec)
    return update / size.clamp(min=1.0)


def root_mean_square(matrices: Tensor, spec: ShardSpec, pooled: int = 0) -> RankSums[Tensor]:
    """Return the root mean square of each matrix, E 1 1, or of all values, whose number is then `pooled`."""
    squares = matrices.square().sum((-2, -1), keepdim=True)
    if pooled:
        squares = squares.sum(0, keepdim=True)
        yield [squares]
        return (squares / pooled).sqrt()
    yield _if_sharded(spec, squares)
    return (squares / (spec.rows(matrices.shape[-2])[1] * matrices.shape[-1])).sqrt()


def _if_sharded(spec: ShardSpec, *sums: Tensor) -> list[Tensor]:
    return [] if spec.group is None else list(sums)


def advance(updates: Sequence[RankSums[Result]], spec: ShardSpec) -> list[Result]:
    """Run updates that yield equally often side by side, with one exchange over the ranks of `spec` per yield."""
    results: list[Result] = []
    while len(results) < len(updates):
        sums: list[Tensor] = []
        for update in updates:
            try:
                sums += next(update)
            except StopIteration as end:
                results.append(end.value)
        if sums and spec.group is not None:
            flat = spec.all_reduce(torch.cat([one.reshape(-1) for one in sums]))
            for one, summed in zip(sums, flat.split([one.numel() for one in sums]), strict=True):
                one.copy_(summed.view_as(one))
    return results


class Adafactor(torch.optim.Optimizer):
    """Scale gradients by factored second moments, and step in proportion to the size of the weights (section 8).

    The rule is that of `torch.optim.Adafactor`; vectors count as matrices of one column. A 3-D parameter of a group
    with `muon: True` is a stack of matrices (experts), each of which is updated by itself, without sums over ranks
    with other experts. Other parameters of more than two dimensions are pooled: scaled and clipped as one.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, spec_of: ShardSpecOf = replicated
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.spec_of = spec_of

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        for spec, bucket in self._buckets():
            advance([self._update(parameter, group) for parameter, group in bucket], spec)

    def _buckets(self) -> Iterator[tuple[ShardSpec, list[tuple[Tensor, Group]]]]:
        """Neighbours whose sums are over the same ranks, and their spec, by whole sizes; others by themselves."""
        bucket: list[tuple[Tensor, Group]] = []
        size, shared = 0, REPLICATED
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                spec = self.spec_of(parameter)
                if not (spec.shards_rows(parameter.ndim) or _num_pooled(parameter, group)):
                    spec = REPLICATED
                ranks = shared.group
                if bucket and (ranks is None or spec.group is not ranks or size > AT_ONCE * ranks.size()):
                    yield shared, bucket
                    bucket, size = [], 0
                shared = spec
                bucket.append((parameter, group))
                size += parameter.numel()
        if bucket:
            yield shared, bucket

    def _update(self, parameter: Tensor, group: Group) -> RankSums[None]:
        slots, lr, pooled = self.spec_of(parameter), group["lr"], _num_pooled(parameter, group)
        spec = slots if slots.shards_rows(parameter.ndim) else REPLICATED
        assert parameter.grad is not None
        moments = self._moments(parameter, slots)
        weight = slots.local(parameter).view(*moments.row.shape, moments.column.shape[-1])  # E R' C
        gradient = slots.local(parameter.grad).float().reshape(weight.shape)
        size = yield from root_mean_square(weight.float(), spec, pooled)
        yield from update_moments(moments, gradient, spec, torch.ones_like(moments.updates))
        min_mean = TINY if parameter.ndim < 2 else TORCH_MIN  # a vector's v is its rows' alone
        row, column = yield from inverse_roots(moments, spec, min_mean)
        scale = (row.unsqueeze(-1) * column.unsqueeze(-2)).clamp_(max=1 / TORCH_MIN)  # 1/√v, E R' C
        update = scale.mul_(gradient)
        clip = (yield from root_mean_square(update, spec, pooled)).clamp(min=1.0)
        rate = size.clamp(min=MIN_SIZE) * moments.updates.rsqrt().clamp(max=lr).view(-1, 1, 1) / clip
        weight.mul_(1 - lr * group["weight_decay"])
        weight.sub_((update * rate).to(weight.dtype))

    def _moments(self, parameter: Tensor, slots: ShardSpec) -> Moments:
        """Return this rank's moments of a parameter; those of a vector are saved as vectors."""
        state, local = self.state[parameter], slots.local(parameter)
        rows, columns = (local.numel(), 1) if local.ndim < 2 else local.shape[-2:]
        if not state:
            for key, shape in ((ROW_MEANS, (rows, 1)), (COLUMN_MEANS, (1, columns)), (COUNT, (1, 1))):
                saved = shape[:1] if local.ndim < 2 else (*local.shape[:-2], *shape)
                state[key] = slots.slot(key, torch.zeros(saved, device=local.device))
        row, column, count = (slots.local(state[key]) for key in (ROW_MEANS, COLUMN_MEANS, COUNT))
        matrices = math.prod(local.shape[:-2])
        return Moments(row.view(matrices, rows), column.view(matrices, columns), count.view(matrices))


def _num_pooled(parameter: Tensor, group: Group) -> int:
    """Return the number of values of a parameter that is scaled and clipped as one, else 0."""
    stacked = parameter.ndim == 3 and group.get("muon", False)
    return 0 if stacked or parameter.ndim < 3 else parameter.numel()
