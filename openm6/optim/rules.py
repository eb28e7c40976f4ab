"""Update rules by the bytes that a weight and all that is kept with it may take: 16, 4, 2 or 1."""

# Letters: E matrices (experts; 1 for a plain matrix), R rows, C columns, b weights of a block that share a scale

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from openm6.optim import factored_fused as fused
from openm6.optim.blocks import LEVELS, block_length, fit_exponent, from_levels, refit, to_levels
from openm6.optim.config import OptimizerConfig
from openm6.optim.factored import TINY, follow_moments, scaled_update
from openm6.optim.pieces import WHOLE, Piece
from openm6.optim.rounding import random_bits, round_to_bf16, round_to_integer

Shape = tuple[int, ...]
Stored = dict[str, Tensor]  # the slots of one parameter
WEIGHT = "weight"
AT_ONCE = 2**26  # values that an update takes at a time: what it computes with in fp32 stays under a gigabyte
MOMENTUM_KEY = 0x5BD1E995  # tells the bits that round the momentum from those that round the weight


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
class Move:
    """One update: the rate, the decay, the key of its random bits, and whether the gradient may be used at all.

    `allowed` is a bool on the device, so that nobody waits for it; where it is False nothing changes. `piece` says
    what of the parameter lies here: statistics are those of whole matrices, and random bits follow the place in them.
    """

    rate: float
    weight_decay: float
    key: int
    allowed: Tensor
    piece: Piece = WHOLE


@dataclass(frozen=True)
class Memory:
    """A parameter and what its rule remembers, in fp32 and whole, as conversions between rules see it."""

    values: Tensor
    first: Tensor | None  # running mean of the gradient
    second: Tensor | None  # running mean of its square
    count: Tensor  # updates so far: E, or a scalar


class UpdateRule(ABC):
    """How one parameter is kept, read and moved."""

    bytes_per_parameter: int
    read_slots: tuple[str, ...] = (WEIGHT,)  # those that `read` needs

    @abstractmethod
    def slots(self, shape: Shape) -> list[Slot]:
        """What is kept for a parameter, `read_slots` first."""

    @abstractmethod
    def read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """The weights to compute with; the stored tensor itself where it has that dtype."""

    @abstractmethod
    def update(self, stored: Stored, gradient: Tensor, move: Move) -> None:
        """Moves the weights, in place."""

    @abstractmethod
    def remember(self, stored: Stored) -> Memory:
        """What is kept, in full."""

    @abstractmethod
    def take_over(self, stored: Stored, memory: Memory, key: int) -> None:
        """Fills the slots; `key` seeds the rounding where there is less room than in fp32."""

    @abstractmethod
    def write(self, stored: Stored, values: Tensor, key: int, piece: Piece = WHOLE) -> None:
        """New weights; what is remembered stays. `key` seeds the rounding, as in `take_over`."""

    def fill(self, stored: Stored, values: Tensor, key: int, piece: Piece = WHOLE) -> None:
        """First values, nothing remembered."""
        self.write(stored, values, key, piece)
        for name, tensor in stored.items():
            if name not in self.read_slots:
                tensor.zero_()

    def num_bytes(self, shape: Shape) -> int:
        return sum(slot.num_bytes for slot in self.slots(shape))


class AdamRule(UpdateRule):
    """16 bytes: weights and both moments in fp32 (with the gradient, while there is one), by torch's fused AdamW."""

    bytes_per_parameter = 16

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    def slots(self, shape: Shape) -> list[Slot]:
        moments = [Slot(name, shape, torch.float32) for name in (WEIGHT, "exp_avg", "exp_avg_sq")]
        return [*moments, Slot("step", (), torch.float32)]

    def read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return stored[WEIGHT].to(dtype)

    def update(self, stored: Stored, gradient: Tensor, move: Move) -> None:
        adamw(
            [stored[WEIGHT]],
            [gradient.to(torch.float32).contiguous()],
            [stored["exp_avg"]],
            [stored["exp_avg_sq"]],
            [],
            [stored["step"]],
            fused=True,
            found_inf=(~move.allowed).to(torch.float32),
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=move.rate,
            weight_decay=move.weight_decay,
            eps=self.config.epsilon,
            maximize=False,
        )

    def remember(self, stored: Stored) -> Memory:
        return Memory(stored[WEIGHT], stored["exp_avg"], stored["exp_avg_sq"], stored["step"])

    def write(self, stored: Stored, values: Tensor, key: int, piece: Piece = WHOLE) -> None:
        stored[WEIGHT].copy_(values)

    def take_over(self, stored: Stored, memory: Memory, key: int) -> None:
        self.write(stored, memory.values, key)
        for name, moment in (("exp_avg", memory.first), ("exp_avg_sq", memory.second)):
            stored[name].copy_(moment) if moment is not None else stored[name].zero_()
        stored["step"].copy_(memory.count.max())


class FactoredRule(UpdateRule):
    """2 bytes: bf16 weights, moved by Adafactor's rule for each expert by itself and rounded by chance."""

    bytes_per_parameter = 2

    def slots(self, shape: Shape) -> list[Slot]:
        moments = [
            Slot("row_var", shape[:-1], torch.float32),
            Slot("col_var", (*shape[:-2], shape[-1]), torch.float32),
            Slot("count", shape[:-2], torch.float32),
        ]
        return [*self.weight_slots(shape), *moments]

    def weight_slots(self, shape: Shape) -> list[Slot]:
        """The weight, and what else `read` needs."""
        return [Slot(WEIGHT, shape, torch.bfloat16)]

    def read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return stored[WEIGHT].to(dtype)

    def update(self, stored: Stored, gradient: Tensor, move: Move) -> None:
        views = {name: _as_matrices(tensor, name) for name, tensor in stored.items()}
        matrices = _as_matrices(gradient, WEIGHT).contiguous()  # E R C; the kernels know no strides
        if self.update_fused(views, matrices, move):
            return
        for first, last in _chunks(matrices, move.piece):
            part = {name: view[first:last] for name, view in views.items()}
            self.update_part(part, matrices[first:last], move, first)

    def update_fused(self, stored: Stored, gradient: Tensor, move: Move) -> bool:
        """The same in a few kernels that keep nothing between them; False where they cannot run."""
        if not fused.available(gradient, move.piece):
            return False
        fused.update_bf16(stored, gradient, move.rate, move.weight_decay, move.key, move.allowed, move.piece)
        return True

    def update_part(self, stored: Stored, gradient: Tensor, move: Move, first: int) -> None:
        """Moves matrices E R C, which are number `first` and following of the parameter."""
        usable = torch.where(move.allowed, gradient.float(), 0.0)
        active = follow_moments(usable, stored["row_var"], stored["col_var"], stored["count"], move.piece)
        update = self.direction(stored, usable, active, move, first)
        update = torch.where(active[:, None, None], move.rate * update, 0.0)
        kept = torch.where(active, 1 - move.rate * move.weight_decay, 1.0)[:, None, None]
        self.store(stored, kept, update, _bits(gradient, move.key, first, move.piece))

    def direction(self, stored: Stored, gradient: Tensor, active: Tensor, move: Move, first: int) -> Tensor:
        """What the weights move against, at a rate of 1."""
        return scaled_update(gradient, stored["row_var"], stored["col_var"], move.piece)

    def store(self, stored: Stored, kept: Tensor, update: Tensor, bits: Tensor) -> None:
        """weight · kept - update, rounded with the help of `bits`."""
        stored[WEIGHT].copy_(round_to_bf16(stored[WEIGHT].float() * kept - update, bits))

    def remember(self, stored: Stored) -> Memory:
        row, column = stored["row_var"], stored["col_var"]
        mean = row.mean(-1, keepdim=True).clamp(min=TINY)
        second = (row / mean).unsqueeze(-1) * column.unsqueeze(-2)
        return Memory(self.read(stored, torch.float32), self.first_moment(stored), second, stored["count"])

    def first_moment(self, stored: Stored) -> Tensor | None:
        return None

    def write(self, stored: Stored, values: Tensor, key: int, piece: Piece = WHOLE) -> None:
        weights = {name: _as_matrices(stored[name], name) for name in self.read_slots}
        values = _as_matrices(values, WEIGHT)
        for first, last in _chunks(values):
            part = {name: tensor[first:last] for name, tensor in weights.items()}
            self.encode(part, values[first:last].float(), _bits(values[first:last], key, first, piece))

    def take_over(self, stored: Stored, memory: Memory, key: int) -> None:
        self.write(stored, memory.values, key)
        for name, axis in (("row_var", -1), ("col_var", -2)):
            stored[name].copy_(memory.second.mean(axis)) if memory.second is not None else stored[
                name
            ].zero_()
        stored["count"].copy_(memory.count)

    def encode(self, stored: Stored, values: Tensor, bits: Tensor) -> None:
        """Writes fp32 matrices E R C as weights, rounded with the help of `bits`."""
        stored[WEIGHT].copy_(round_to_bf16(values.contiguous(), bits))


class MomentumRule(FactoredRule):
    """4 bytes: the same with a first moment in bf16, rounded by chance as well."""

    bytes_per_parameter = 4

    def __init__(self, config: OptimizerConfig) -> None:
        self.beta = config.betas[0]

    def slots(self, shape: Shape) -> list[Slot]:
        return [*super().slots(shape), Slot("momentum", shape, torch.bfloat16)]

    def update_fused(self, stored: Stored, gradient: Tensor, move: Move) -> bool:
        return False

    def direction(self, stored: Stored, gradient: Tensor, active: Tensor, move: Move, first: int) -> Tensor:
        before = stored["momentum"].float()
        mean = torch.where(active[:, None, None], before.lerp(gradient, 1 - self.beta), before)
        bits = _bits(gradient, move.key ^ MOMENTUM_KEY, first, move.piece)
        stored["momentum"].copy_(round_to_bf16(mean, bits))
        correction = 1 - self.beta ** stored["count"].clamp(min=1)
        mean = mean / correction[:, None, None]
        return scaled_update(mean, stored["row_var"], stored["col_var"], move.piece)

    def first_moment(self, stored: Stored) -> Tensor | None:
        return stored["momentum"].float()

    def take_over(self, stored: Stored, memory: Memory, key: int) -> None:
        super().take_over(stored, memory, key)
        if memory.first is None:
            stored["momentum"].zero_()
        else:
            stored["momentum"].copy_(memory.first)


class BlockRule(FactoredRule):
    """1 byte: int8 weights, 64 of which share a scale (one more byte for them all), moved like those of 2 bytes."""

    bytes_per_parameter = 1
    read_slots = (WEIGHT, "exponent")

    def weight_slots(self, shape: Shape) -> list[Slot]:
        blocks = shape[-1] // block_length(shape[-1])
        return [Slot(WEIGHT, shape, torch.int8), Slot("exponent", (*shape[:-1], blocks), torch.int8)]

    def read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        levels, exponent = (_as_matrices(stored[name], name) for name in self.read_slots)
        weights = torch.empty(levels.shape, dtype=dtype, device=levels.device)
        for first, last in _chunks(levels):  # in parts, as the products are in fp32 on their way
            weights[first:last] = from_levels(levels[first:last], exponent[first:last], dtype)
        return weights.view(stored[WEIGHT].shape)

    def update_fused(self, stored: Stored, gradient: Tensor, move: Move) -> bool:
        if not fused.available(gradient, move.piece):
            return False
        fused.update_int8(stored, gradient, move.rate, move.weight_decay, move.key, move.allowed, move.piece)
        return True

    def store(self, stored: Stored, kept: Tensor, update: Tensor, bits: Tensor) -> None:
        # In units of the scale, so that a weight that is not to move lies on its level to the last bit.
        levels = stored[WEIGHT].float() * kept - to_levels(update, stored["exponent"])
        levels, exponent = refit(levels, stored["exponent"])
        stored[WEIGHT].copy_(round_to_integer(levels, bits).clamp(-LEVELS, LEVELS))
        stored["exponent"].copy_(exponent)

    def encode(self, stored: Stored, values: Tensor, bits: Tensor) -> None:
        exponent = fit_exponent(values)
        stored[WEIGHT].copy_(round_to_integer(to_levels(values, exponent), bits).clamp(-LEVELS, LEVELS))
        stored["exponent"].copy_(exponent)


def update_rule(config: OptimizerConfig) -> UpdateRule:
    """The rule of `config.bytes_per_parameter`."""
    if config.bytes_per_parameter == 16:
        return AdamRule(config)
    if config.bytes_per_parameter == 4:
        return MomentumRule(config)
    return FactoredRule() if config.bytes_per_parameter == 2 else BlockRule()


def _as_matrices(tensor: Tensor, slot: str) -> Tensor:
    """A slot with a leading axis for the experts, which a plain matrix lacks: E, E n (rows, columns) or E R C."""
    own = {"count": 0, "row_var": 1, "col_var": 1}.get(slot, 2)
    outer, inner = tensor.shape[: tensor.ndim - own], tensor.shape[tensor.ndim - own :]
    return tensor.reshape(math.prod(outer), *inner)  # not -1: of a part nothing may lie here


def _chunks(matrices: Tensor, piece: Piece = WHOLE) -> Iterator[tuple[int, int]]:
    """Ranges of matrices that hold about AT_ONCE values on each rank.

    By the rows of whole matrices, since all ranks of a piece must add up their sums equally often, however many rows
    each has.
    """
    _, rows = piece.rows(matrices.shape[1])
    ranks = 1 if piece.group is None else piece.group.size
    size = max(1, AT_ONCE * ranks // max(1, rows * matrices.shape[2]))
    for first in range(0, len(matrices), size):
        yield first, min(first + size, len(matrices))


def _bits(matrices: Tensor, key: int, first: int, piece: Piece) -> Tensor:
    """Of matrices E R C, number `first` and following of those here."""
    _, rows, columns = matrices.shape
    start = piece.rows(rows)[0] * columns
    bits = random_bits(len(matrices), rows * columns, key, piece.first + first, matrices.device, start)
    return bits.view(matrices.shape)
