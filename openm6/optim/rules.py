"""Update rules of offloaded training: how a weight and its optimizer state are stored, read and updated."""

# Shapes: E matrices (experts; 1 for a plain matrix), R rows, C columns

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6 import kernels
from openm6.optim import adafactor, low_precision
from openm6.optim.adafactor import TINY, Moments, RankSums, advance
from openm6.optim.adamw import adamw_update
from openm6.optim.config import OptimizerConfig, WeightPrecision
from openm6.optim.low_precision import block_length, matrix_keys, random_bits, round_to_bf16
from openm6.optim.sharding import COLUMN_MEANS, COUNT, REPLICATED, ROW_MEANS, ShardSpec

Shape = tuple[int, ...]
Slots = dict[str, Tensor]  # the slots of one parameter
WEIGHT, EXPONENT, MOMENTUM = "weight", "exponent", "momentum"
AT_ONCE = 2**26  # values that are updated at a time: what is computed in fp32 stays under a gigabyte
MOMENTUM_KEY = 0x5BD1E995  # the momentum is rounded by other bits than the weight


@dataclass(frozen=True)
class Slot:
    """One tensor that is kept for a parameter."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class UpdateArgs:
    """Arguments of one update: learning rate, weight decay, the key of its random bits, and whether to apply it.

    `allowed` is a bool on the device, so that the host need not wait for it; if it is False nothing changes. `spec`
    is the sharding: statistics are those of whole matrices, and random bits depend on the position in them.
    """

    lr: float
    weight_decay: float
    key: int
    allowed: Tensor
    spec: ShardSpec = REPLICATED


@dataclass(frozen=True)
class OptimizerState:
    """A parameter and its optimizer state in fp32, for conversions between rules."""

    values: Tensor
    first: Tensor | None  # running mean of the gradient
    second: Tensor | None  # running mean of its square
    count: Tensor  # updates so far: E, or a scalar


class UpdateRule(ABC):
    """How one parameter is stored, read and updated. A `key` seeds the rounding to fewer bits; None: to nearest."""

    read_slots: tuple[str, ...] = (WEIGHT,)  # those that `read` needs
    clips: bool = True  # whether it bounds its updates by itself

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    @abstractmethod
    def slots(self, shape: Shape) -> list[Slot]:
        """Return what is kept for a parameter, `read_slots` first."""

    def read(self, stored: Slots, dtype: torch.dtype) -> Tensor:
        """Return the weights to compute with; the stored tensor itself if it has that dtype."""
        return stored[WEIGHT].to(dtype)

    @abstractmethod
    def write(self, stored: Slots, values: Tensor, key: int | None, spec: ShardSpec = REPLICATED) -> None:
        """Replace the weights and keep the rest."""

    @abstractmethod
    def update(self, stored: Slots, gradient: Tensor, args: UpdateArgs) -> None:
        """Update the weights, in place."""

    @abstractmethod
    def export_state(self, stored: Slots) -> OptimizerState:
        """Return all that is kept."""

    @abstractmethod
    def import_state(self, stored: Slots, state: OptimizerState, key: int) -> None:
        """Fill the slots."""

    def fill(self, stored: Slots, values: Tensor, key: int | None, spec: ShardSpec = REPLICATED) -> None:
        """Store first values, and zeros for the rest."""
        self.write(stored, values, key, spec)
        for name, tensor in stored.items():
            if name not in self.read_slots:
                tensor.zero_()


class AdamRule(UpdateRule):
    """16 bytes: weights and both moments in fp32 (and the gradient, while there is one), by AdamW."""

    clips = False

    def slots(self, shape: Shape) -> list[Slot]:
        values = [Slot(name, shape, torch.float32) for name in (WEIGHT, "exp_avg", "exp_avg_sq")]
        return [*values, Slot("step", (), torch.float32)]

    def write(self, stored: Slots, values: Tensor, key: int | None, spec: ShardSpec = REPLICATED) -> None:
        stored[WEIGHT].copy_(values)

    def update(self, stored: Slots, gradient: Tensor, args: UpdateArgs) -> None:
        config = self.config
        group = {"betas": config.betas, "eps": config.epsilon, "lr": args.lr, "weight_decay": args.weight_decay}
        skip = (~args.allowed).to(torch.float32)
        adamw_update([stored[WEIGHT]], [gradient.float().contiguous()], [stored], group, skip)

    def export_state(self, stored: Slots) -> OptimizerState:
        return OptimizerState(stored[WEIGHT], stored["exp_avg"], stored["exp_avg_sq"], stored["step"])

    def import_state(self, stored: Slots, state: OptimizerState, key: int) -> None:
        self.write(stored, state.values, key)
        _copy_or_zero(stored["exp_avg"], state.first)
        _copy_or_zero(stored["exp_avg_sq"], state.second)
        stored["step"].copy_(state.count.max())


class FactoredRule(UpdateRule):
    """2 bytes: bf16 weights, updated by Adafactor for each expert by itself, with stochastic rounding."""

    def slots(self, shape: Shape) -> list[Slot]:
        return [
            Slot(WEIGHT, shape, torch.bfloat16),
            Slot(ROW_MEANS, shape[:-1], torch.float32),
            Slot(COLUMN_MEANS, (*shape[:-2], shape[-1]), torch.float32),
            Slot(COUNT, shape[:-2], torch.float32),
        ]

    def encode(self, stored: Slots, values: Tensor, bits: Tensor) -> None:
        """Store fp32 matrices E R C as weights, rounded by `bits`."""
        stored[WEIGHT].copy_(round_to_bf16(values, bits))

    def subtract(self, stored: Slots, decay: Tensor, update: Tensor, bits: Tensor) -> None:
        """Store weight · decay - update, rounded by `bits`."""
        self.encode(stored, stored[WEIGHT].float() * decay - update, bits)

    def write(self, stored: Slots, values: Tensor, key: int | None, spec: ShardSpec = REPLICATED) -> None:
        weights = {name: _as_matrices(stored[name], name) for name in self.read_slots}
        values = _as_matrices(values, WEIGHT)
        for first, last in _chunks(values):
            part = {name: tensor[first:last] for name, tensor in weights.items()}
            self.encode(part, values[first:last].float(), _bits(values[first:last], key, first, spec))

    def update(self, stored: Slots, gradient: Tensor, args: UpdateArgs) -> None:
        views = {name: _as_matrices(tensor, name) for name, tensor in stored.items()}
        matrices = _as_matrices(gradient, WEIGHT).contiguous()  # E R C; the kernels support no strides
        # All ranks alike, as without kernels sums are exchanged in other portions: if one has no rows, none uses them.
        everywhere = args.spec.group is None or all(args.spec.lengths)
        if everywhere and matrices.numel() and kernels.available(matrices.device):
            advance([self._update_in_kernels(views, matrices, args)], args.spec)
            return
        for first, last in _chunks(matrices, args.spec):
            part = {name: view[first:last] for name, view in views.items()}
            advance([self._update_part(part, matrices[first:last], args, first)], args.spec)

    def _update_in_kernels(self, stored: Slots, gradient: Tensor, args: UpdateArgs) -> RankSums[None]:
        """`_update_part` of all matrices E R C at once, by kernels, which keep nothing of the gradient's size."""
        # Triton is optional.
        from openm6.kernels import optimizers  # noqa: PLC0415

        moments, spec, usable = _moments(stored), args.spec, args.allowed.to(torch.int32)
        matrices, rows, columns = gradient.shape
        first_row, num_rows = spec.rows(rows)
        row_sum, column_sum, largest = optimizers.adafactor_sums(gradient, usable)
        active = (largest > 0).float()
        yield [column_sum, active]
        active = active > 0
        adafactor.update_means(moments, row_sum / columns + TINY, column_sum / num_rows + TINY, active)
        inverse_row, inverse_column = yield from adafactor.inverse_roots(moments, spec)
        momentum = None
        if MOMENTUM in stored:
            beta = self.config.betas[0]
            inverse_row = inverse_row / _bias_correction(beta, stored[COUNT]).unsqueeze(-1)
            bits = matrix_keys(matrices, args.key ^ MOMENTUM_KEY, spec.first, gradient.device)
            momentum = optimizers.Momentum(stored[MOMENTUM], torch.where(active, 1 - beta, 0.0), bits)
        squares = optimizers.adafactor_squares(gradient, usable, inverse_row, inverse_column, momentum)
        yield [squares]
        size = (squares / (num_rows * columns)).sqrt().clamp(min=1.0)
        rates = torch.where(active, args.lr / size, 0.0)
        decay = torch.where(active, 1 - args.lr * args.weight_decay, 1.0)
        keys = matrix_keys(matrices, args.key, spec.first, gradient.device)
        numbers = (usable, inverse_row, inverse_column, rates, decay, keys)
        blocks = (block_length(columns), low_precision.LEVELS, low_precision.SPARSE, low_precision.STEPS)
        optimizers.adafactor_update(
            stored[WEIGHT], stored.get(EXPONENT), gradient, numbers, blocks, first_row, momentum
        )  # fmt: skip

    def _update_part(self, stored: Slots, gradient: Tensor, args: UpdateArgs, first: int) -> RankSums[None]:
        """Update matrices E R C, which have index `first` and following in the parameter."""
        usable = torch.where(args.allowed, gradient.float(), 0.0)
        active = yield from adafactor.update_moments(_moments(stored), usable, args.spec)
        direction = self.direction(stored, usable, active[:, None, None], args, first)
        update = yield from adafactor.normalized(direction, _moments(stored), args.spec)
        update = torch.where(active[:, None, None], args.lr * update, 0.0)
        decay = torch.where(active, 1 - args.lr * args.weight_decay, 1.0)[:, None, None]
        self.subtract(stored, decay, update, _bits(gradient, args.key, first, args.spec))

    def direction(self, stored: Slots, gradient: Tensor, active: Tensor, args: UpdateArgs, first: int) -> Tensor:
        """Return the direction of descent, before it is normalized; `active` is E 1 1."""
        return gradient

    def export_state(self, stored: Slots) -> OptimizerState:
        row, column = stored[ROW_MEANS], stored[COLUMN_MEANS]
        mean = row.mean(-1, keepdim=True).clamp(min=TINY)
        second = (row / mean).unsqueeze(-1) * column.unsqueeze(-2)
        first = stored[MOMENTUM].float() if MOMENTUM in stored else None
        return OptimizerState(self.read(stored, torch.float32), first, second, stored[COUNT])

    def import_state(self, stored: Slots, state: OptimizerState, key: int) -> None:
        self.write(stored, state.values, key)
        second = state.second
        _copy_or_zero(stored[ROW_MEANS], None if second is None else second.mean(-1))
        _copy_or_zero(stored[COLUMN_MEANS], None if second is None else second.mean(-2))
        stored[COUNT].copy_(state.count)
        if MOMENTUM in stored:
            _copy_or_zero(stored[MOMENTUM], state.first)


class MomentumRule(FactoredRule):
    """4 bytes: the same with a first moment in bf16, also with stochastic rounding."""

    def slots(self, shape: Shape) -> list[Slot]:
        return [*super().slots(shape), Slot(MOMENTUM, shape, torch.bfloat16)]

    def direction(self, stored: Slots, gradient: Tensor, active: Tensor, args: UpdateArgs, first: int) -> Tensor:
        before, beta = stored[MOMENTUM].float(), self.config.betas[0]
        mean = torch.where(active, before.lerp(gradient, 1 - beta), before)
        bits = _bits(gradient, args.key ^ MOMENTUM_KEY, first, args.spec)
        stored[MOMENTUM].copy_(round_to_bf16(mean, bits))
        return mean / _bias_correction(beta, stored[COUNT])[:, None, None]


class BlockRule(FactoredRule):
    """1 byte: int8 weights in blocks of 64 with a scale (one more byte per block), updated like those of 2 bytes."""

    read_slots = (WEIGHT, EXPONENT)

    def slots(self, shape: Shape) -> list[Slot]:
        exponent = Slot(EXPONENT, (*shape[:-1], shape[-1] // block_length(shape[-1])), torch.int8)
        return [Slot(WEIGHT, shape, torch.int8), exponent, *super().slots(shape)[1:]]

    def read(self, stored: Slots, dtype: torch.dtype) -> Tensor:
        if kernels.available(stored[WEIGHT].device):
            # Triton is optional.
            from openm6.kernels import optimizers  # noqa: PLC0415

            return optimizers.dequantize(stored[WEIGHT], stored[EXPONENT], dtype, low_precision.STEPS)
        levels, exponent = (_as_matrices(stored[name], name) for name in self.read_slots)
        weights = torch.empty(levels.shape, dtype=dtype, device=levels.device)
        for first, last in _chunks(levels):  # because products are in fp32 before they are rounded
            weights[first:last] = low_precision.from_levels(levels[first:last], exponent[first:last], dtype)
        return weights.view(stored[WEIGHT].shape)

    def encode(self, stored: Slots, values: Tensor, bits: Tensor) -> None:
        exponent = low_precision.fit_exponent(values)  # where the values are: the record may be on the host
        stored[EXPONENT].copy_(exponent)
        stored[WEIGHT].copy_(low_precision.round_to_levels(low_precision.to_levels(values, exponent), bits))

    def subtract(self, stored: Slots, decay: Tensor, update: Tensor, bits: Tensor) -> None:
        # In units of the scale: without an update a level stays exact.
        levels = stored[WEIGHT].float() * decay - low_precision.to_levels(update, stored[EXPONENT])
        levels, exponent = low_precision.refit(levels, stored[EXPONENT])
        stored[WEIGHT].copy_(low_precision.round_to_levels(levels, bits))
        stored[EXPONENT].copy_(exponent)


RULES: dict[WeightPrecision, Callable[[OptimizerConfig], UpdateRule]] = {
    "fp32": AdamRule,
    "bf16-adafactor-momentum": MomentumRule,
    "bf16-adafactor": FactoredRule,
    "int8-adafactor": BlockRule,
}


def update_rule(config: OptimizerConfig) -> UpdateRule:
    return RULES[config.precision](config)


def _bias_correction(beta: float, count: Tensor) -> Tensor:
    """Return what a running mean that began at zero lacks of a mean, after `count` updates."""
    return 1 - beta ** count.clamp(min=1)


def _copy_or_zero(slot: Tensor, values: Tensor | None) -> None:
    slot.zero_() if values is None else slot.copy_(values)


def _moments(stored: Slots) -> Moments:
    return Moments(stored[ROW_MEANS], stored[COLUMN_MEANS], stored[COUNT])


def _as_matrices(tensor: Tensor, slot: str) -> Tensor:
    """Return a slot with a leading axis for the experts, which a plain matrix lacks: E, E n or E R C."""
    own = {COUNT: 0, ROW_MEANS: 1, COLUMN_MEANS: 1}.get(slot, 2)
    outer, inner = tensor.shape[: tensor.ndim - own], tensor.shape[tensor.ndim - own :]
    return tensor.reshape(math.prod(outer), *inner)  # not -1: a shard may be empty


def _chunks(matrices: Tensor, spec: ShardSpec = REPLICATED) -> Iterator[tuple[int, int]]:
    """Return ranges of about AT_ONCE values on each rank, by whole rows: all must exchange sums equally often."""
    _, rows = spec.rows(matrices.shape[1])
    ranks = 1 if spec.group is None else spec.group.size()
    size = max(1, AT_ONCE * ranks // max(1, rows * matrices.shape[2]))
    for first in range(0, len(matrices), size):
        yield first, min(first + size, len(matrices))


def _bits(matrices: Tensor, key: int | None, first: int, spec: ShardSpec) -> Tensor:
    """Return random bits of matrices E R C, with index `first` and following of those on this rank."""
    if key is None:
        return torch.full(matrices.shape, low_precision.NEAREST, dtype=torch.int32, device=matrices.device)
    _, rows, columns = matrices.shape
    start = spec.rows(rows)[0] * columns
    bits = random_bits(len(matrices), rows * columns, key, spec.first + first, matrices.device, start)
    return bits.view(matrices.shape)
