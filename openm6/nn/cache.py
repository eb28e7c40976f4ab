"""The key-value cache: sequences of different lengths, each in a slot of its own."""

# Dimensions: L layers, B slots of C tokens, S new tokens, T tokens so far, G key-value heads, d size of a head

import torch
from torch import Tensor

from openm6.core.errors import ConfigError
from openm6.ops.sequence import PADDING, SequenceMeta, join


class SlotCache:
    """B slots of C tokens in each of L layers; later tokens of a slot see everything in it.

    A slot is filled, and continued at its `length`, through a `SlotWriter` or `PackedWriter`, and read, without being
    changed, through a `SlotReader`. Addresses never move, so a captured CUDA graph may hold them.
    """

    def __init__(
        self, num_layers: int, slots: int, capacity: int, num_kv_heads: int, head_dim: int, like: Tensor
    ) -> None:
        """`like` has the device and the dtype."""
        shape = (num_layers, slots, capacity, num_kv_heads, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in range(2))
        self.slots, self.capacity, self.lengths = slots, capacity, [0] * slots

    def check_capacity(self, length: int) -> None:
        if length > self.capacity:
            raise ConfigError(f"{length} tokens do not fit a slot of {self.capacity}: make slots larger")

    def move(self, source: int, target: int) -> None:
        length = self.lengths[source]
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target] = length

    def clear(self, slots: list[int]) -> None:
        """Empty slots; keys and values become zero, because masks do not hide NaN."""
        for slot in slots:
            self.lengths[slot] = 0
            self.keys[:, slot].zero_()
            self.values[:, slot].zero_()

    def take(self, slot: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return a copy of a slot's keys and values from `start` on.  # -> twice L T G d"""
        length = self.lengths[slot]
        return self.keys[:, slot, start:length].clone(), self.values[:, slot, start:length].clone()

    def put(self, slot: int, kept: tuple[Tensor, Tensor], start: int = 0) -> None:
        """Fill a slot, from `start` on, with what `take` returned; raise ConfigError if it does not fit."""
        keys, values = kept
        end = start + keys.shape[1]
        self.check_capacity(end)
        self.keys[:, slot, start:end] = keys
        self.values[:, slot, start:end] = values
        self.lengths[slot] = end


class SlotWriter:
    """One row that continues a slot after its first `start` tokens."""

    def __init__(self, cache: SlotCache, slot: int, start: int = 0) -> None:
        self.cache, self.slot, self.start, self.end = cache, slot, start, start

    def extend(self, meta: SequenceMeta) -> SequenceMeta:
        self.end = self.start + meta.length
        self.cache.check_capacity(self.end)
        self.cache.lengths[self.slot] = self.end
        if not self.start:
            return meta
        known = torch.zeros(1, self.start, dtype=torch.int32, device=meta.example_id.device)
        return join([_open_meta(known), meta])

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        row = slice(self.slot, self.slot + 1)
        keys, values = self.cache.keys[layer, row], self.cache.values[layer, row]
        keys[:, self.start : self.end] = key.detach()
        values[:, self.start : self.end] = value.detach()
        return keys[:, : self.end], values[:, : self.end]


class PackedWriter:
    """One packed row whose n-th example fills the n-th of these slots from its start, and sees nothing of before."""

    index: tuple[Tensor, Tensor]  # slot and position of each token

    def __init__(self, cache: SlotCache, slots: list[int]) -> None:
        self.cache, self.slots = cache, slots

    def extend(self, meta: SequenceMeta) -> SequenceMeta:
        sample = meta.example_id[0].long()  # S, without padding
        lengths = torch.bincount(sample, minlength=len(self.slots))
        starts = lengths.cumsum(0) - lengths
        slots = torch.tensor(self.slots, device=sample.device)
        self.index = slots[sample], torch.arange(len(sample), device=sample.device) - starts[sample]
        for slot, length in zip(self.slots, lengths.tolist(), strict=True):
            self.cache.check_capacity(length)
            self.cache.lengths[slot] = length
        return meta

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_put_(self.index, key[0].detach().to(keys.dtype))
        values.index_put_(self.index, value[0].detach().to(values.dtype))
        return key, value


class SlotReader:
    """Rows that see one slot each (None: nothing), and themselves, and store nothing: masked blocks, candidates."""

    def __init__(self, cache: SlotCache, slots: list[int | None]) -> None:
        device = cache.keys.device
        lengths = [0 if slot is None else cache.lengths[slot] for slot in slots]
        self.cache = cache
        self.longest = max(lengths)
        self.index = torch.tensor([slot or 0 for slot in slots], device=device)
        position = torch.arange(self.longest, device=device)
        known = position < torch.tensor(lengths, device=device)[:, None]  # B T
        self.sample = torch.where(known, 0, PADDING).to(torch.int32)

    def extend(self, meta: SequenceMeta) -> SequenceMeta:
        return join([_open_meta(self.sample), meta])

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.cache.keys[layer, self.index, : self.longest]
        values = self.cache.values[layer, self.index, : self.longest]
        return torch.cat([keys.to(key.dtype), key], 1), torch.cat([values.to(value.dtype), value], 1)


# What a forward pass needs of a cache. `extend`, called once before the layers `write`, takes the metadata of the new
# tokens and returns that of all keys; `write` takes their keys and values and returns all: B S G d -> B T G d.
TokenCache = SlotWriter | PackedWriter | SlotReader


def _open_meta(sample: Tensor) -> SequenceMeta:
    """Tokens of order 0 in no block: all later ones of their sample see them.  # B T"""
    zero = torch.zeros_like(sample)
    return SequenceMeta(sample, zero, zero, zero.unsqueeze(-1).expand(*sample.shape, 3))
