"""Prompts into slots, and remembered: each alone, so that what it becomes never depends on others, or packed."""

# Letters: L layers, T tokens, G key-value heads, d size of a head

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.generate.prompt import Prompt
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni
from openm6.nn.slots import SlotCache


@dataclass(frozen=True)
class Unit:
    """Pieces of a prompt that are read in one pass, and a digest of them and of all that stands before them."""

    pieces: list[Segment]
    key: bytes

    @property
    def span(self) -> int:
        """How far the next unit moves on."""
        return sum(piece.span for piece in self.pieces)


class PromptMemory:
    """Keys and values of what was read last, up to a number of bytes, for those who ask about the same thing again.

    What is kept is a unit of a prompt: the whole of it where all its tokens see one another, else a part, which
    depends only on the parts before it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, key: bytes) -> tuple[Tensor, Tensor] | None:
        """Keys and values under `key`, or None."""
        self.touch(key)
        return self.kept.get(key)

    def touch(self, key: bytes) -> None:
        """Notes that `key` was used now."""
        if key in self.kept:
            self.kept.move_to_end(key)

    def put(self, key: bytes, found: tuple[Tensor, Tensor]) -> None:
        """Keeps them, and forgets what was not used for longest."""
        size = sum(part.nbytes for part in found)
        if key in self.kept or size > self.max_bytes:
            return
        self.kept[key] = found
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self.kept.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in old)


def units(prompt: Prompt) -> list[Unit]:
    """What is read in one pass each: a part by itself, pieces that see one another together.

    A pass of its own for each part makes its bits the same whether the parts before it were read now or earlier.
    """
    groups: list[list[Segment]] = []
    for piece in prompt:
        if piece.placement == "part" or not groups:
            groups.append([piece])
        else:
            groups[-1].append(piece)
    found, key = [], b""
    for pieces in groups:
        key = _digest(pieces, key)
        found.append(Unit(pieces, key))
    return found


def _digest(pieces: list[Segment], before: bytes) -> bytes:
    """A digest of everything that the tokens hold (kinds, shapes and bytes of all arrays) and of what was before."""
    digest = hashlib.sha256(before)
    for piece in pieces:
        digest.update(f"{piece.kind} {piece.span} {piece.placement} {piece.moves} {len(piece)}".encode())
        for name, array in sorted([*piece.arrays.items(), ("grid", piece.grid)]):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.digest()


@contextmanager
def _whole_or_nothing(cache: SlotCache, slots: list[int]) -> Iterator[None]:
    """Empties the slots where reading into them fails: what it left may hold no numbers, which masks do not hide."""
    try:
        yield
    except BaseException:
        for slot in slots:
            cache.lengths[slot] = 0
            cache.keys[:, slot].zero_()
            cache.values[:, slot].zero_()
        raise


@torch.inference_mode()
def read_into(
    omni: Omni, prompt: Prompt, cache: SlotCache, slot: int, memory: PromptMemory | None = None
) -> tuple[int, int]:
    """Reads a prompt (not empty) into a slot; gives the next position, and how many tokens the memory spared."""
    place = start = known = 0
    read = units(prompt)
    for unit in read:
        kept = None if memory is None else memory.get(unit.key)
        if kept is not None:
            cache.put(slot, kept, start)
            known += cache.lengths[slot] - start
        else:
            sequence = build_sequence(unit.pieces, place=place)
            batch = collate([[sequence]], len(sequence)).to(omni.device)
            with _whole_or_nothing(cache, [slot]):
                omni(batch.kinds, batch.layout, cache.writer(slot, start))
            if memory is not None:
                memory.put(unit.key, cache.take(slot, start))
        place, start = place + unit.span, cache.lengths[slot]
    if memory is not None:  # beginnings serve more prompts than ends: they are the last to be forgotten
        for unit in reversed(read):
            memory.touch(unit.key)
    return place, known


@torch.inference_mode()
def read_together(
    omni: Omni, prompts: list[Prompt], cache: SlotCache, slots: list[int], memory: PromptMemory
) -> list[tuple[int, int]]:
    """As `read_into` for several prompts; those of one unit that nobody has read yet share a pass, packed in one row.

    A prompt's keys then depend on its neighbours within rounding.
    """
    firsts: dict[bytes, tuple[Unit, int]] = {}  # the first prompt of each kind, and its slot
    for prompt, slot in zip(prompts, slots, strict=True):
        read = units(prompt)
        if len(read) == 1 and read[0].key not in memory.kept:
            firsts.setdefault(read[0].key, (read[0], slot))
    if len(firsts) > 1:
        _read_packed(omni, list(firsts.values()), cache, memory)
    packed = {slot for _, slot in firsts.values()} if len(firsts) > 1 else set()
    return [
        (sum(piece.span for piece in prompt), 0)
        if slot in packed
        else read_into(omni, prompt, cache, slot, memory)
        for prompt, slot in zip(prompts, slots, strict=True)
    ]


def _read_packed(omni: Omni, firsts: list[tuple[Unit, int]], cache: SlotCache, memory: PromptMemory) -> None:
    sequences = [build_sequence(unit.pieces) for unit, _ in firsts]
    batch = collate([sequences], sum(map(len, sequences))).to(omni.device)
    slots = [slot for _, slot in firsts]
    with _whole_or_nothing(cache, slots):
        omni(batch.kinds, batch.layout, cache.packed_writer(slots))
    for unit, slot in firsts:
        memory.put(unit.key, cache.take(slot))
