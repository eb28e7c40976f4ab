"""Keys and values of many sequences of different lengths, each in a slot of its own."""

# Letters: L layers, B slots, C room of a slot, S new tokens, T tokens so far, G key-value heads, d size of a head

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.base.errors import ConfigError
from openm6.ops.sequence import PADDING, SequenceMeta, join


class SlotCache:
    """B slots of C tokens in each of L layers; what stands in a slot is seen by every later token of that slot.

    A slot is filled through a `writer`, continued by whoever writes at its `length`, and read, without being changed,
    through a `reader`. Addresses never move, so a captured CUDA graph may hold them.
    """

    def __init__(
        self,
        num_layers: int,
        slots: int,
        room: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, slots, room, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * slots

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    @property
    def room(self) -> int:
        return self.keys.shape[2]

    def writer(self, slot: int, start: int = 0) -> SlotWriter:
        """A cache for one row that goes on in a slot after its first `start` tokens."""
        return SlotWriter(self, slot, start)

    def packed_writer(self, slots: list[int]) -> PackedWriter:
        """A cache for one packed row whose n-th example fills the n-th of these slots, from their beginning."""
        return PackedWriter(self, slots)

    def reader(self, slots: list[int | None]) -> SlotReader:
        """A cache for rows that see a slot each (None: nothing) and leave no trace."""
        return SlotReader(self, slots)

    def move(self, source: int, target: int) -> None:
        """Copies what stands in one slot to another."""
        length = self.lengths[source]
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target] = length

    def take(self, slot: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """A copy of a slot's keys and values from `start` on.  # -> twice L T G d"""
        length = self.lengths[slot]
        return self.keys[:, slot, start:length].clone(), self.values[:, slot, start:length].clone()

    def put(self, slot: int, kept: tuple[Tensor, Tensor], start: int = 0) -> None:
        """Fills a slot, from `start` on, with what `take` gave.

        Raises:
            ConfigError: the slot has too little room.
        """
        keys, values = kept
        end = start + keys.shape[1]
        if end > self.room:
            raise ConfigError(f"{end} tokens do not fit a slot of {self.room}: make slots larger")
        self.keys[:, slot, start:end] = keys
        self.values[:, slot, start:end] = values
        self.lengths[slot] = end


@dataclass
class SlotWriter:
    """One row whose new tokens stay in a slot."""

    cache: SlotCache
    slot: int
    start: int
    end: int = 0

    def extend(self, layout: SequenceMeta) -> SequenceMeta:
        """Raises ConfigError where the slot has too little room."""
        self.end = self.start + layout.length
        if self.end > self.cache.room:
            raise ConfigError(f"{self.end} tokens do not fit a slot of {self.cache.room}: make slots larger")
        self.cache.lengths[self.slot] = self.end
        if not self.start:
            return layout
        known = torch.zeros(1, self.start, dtype=torch.int32, device=layout.example_id.device)
        return join([_open_meta(known), layout])

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        row = slice(self.slot, self.slot + 1)
        keys, values = self.cache.keys[layer, row], self.cache.values[layer, row]
        keys[:, self.start : self.end] = key.detach()
        values[:, self.start : self.end] = value.detach()
        return keys[:, : self.end], values[:, : self.end]


class PackedWriter:
    """One packed row whose examples stay in a slot each, and see nothing that was there before."""

    def __init__(self, cache: SlotCache, slots: list[int]) -> None:
        self.cache, self.slots = cache, slots
        self.index: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))  # slot and place of each token

    def extend(self, layout: SequenceMeta) -> SequenceMeta:
        """Raises ConfigError where a slot has too little room."""
        example = layout.example_id[0].long()  # S, without padding
        lengths = torch.bincount(example, minlength=len(self.slots))
        starts = lengths.cumsum(0) - lengths
        slots = torch.tensor(self.slots, device=example.device)
        self.index = slots[example], torch.arange(len(example), device=example.device) - starts[example]
        for slot, length in zip(self.slots, lengths.tolist(), strict=True):
            if length > self.cache.room:
                raise ConfigError(
                    f"{length} tokens do not fit a slot of {self.cache.room}: make slots larger"
                )
            self.cache.lengths[slot] = length
        return layout

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_put_(self.index, key[0].detach().to(keys.dtype))
        values.index_put_(self.index, value[0].detach().to(values.dtype))
        return key, value


class SlotReader:
    """Rows that see what stands in slots, and themselves; for masked-parallel blocks, judged candidates, queries."""

    def __init__(self, cache: SlotCache, slots: list[int | None]) -> None:
        device = cache.keys.device
        lengths = [0 if slot is None else cache.lengths[slot] for slot in slots]
        self.cache = cache
        self.longest = max(lengths)
        self.index = torch.tensor([slot or 0 for slot in slots], device=device)
        place = torch.arange(self.longest, device=device)
        known = place < torch.tensor(lengths, device=device)[:, None]  # B T
        self.example_id = torch.where(known, 0, PADDING).to(torch.int32)

    def extend(self, layout: SequenceMeta) -> SequenceMeta:
        return join([_open_meta(self.example_id), layout])

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.cache.keys[layer, self.index, : self.longest]
        values = self.cache.values[layer, self.index, : self.longest]
        return torch.cat([keys.to(key.dtype), key], 1), torch.cat([values.to(value.dtype), value], 1)


def _open_meta(example_id: Tensor) -> SequenceMeta:
    """Tokens of order 0 that are in no block: all later ones of their example see them.  # B T"""
    zero = torch.zeros_like(example_id)
    return SequenceMeta(example_id, zero, zero, zero.unsqueeze(-1).expand(*example_id.shape, 3))
