"""Prefill: prompts into slots of the key-value cache, each by itself or several packed in one row, and a prefix cache.

What is computed in one pass and cached is a unit of a prompt: all of it if its tokens attend to one another
(`prompt_attention: bidirectional`), else one part, which depends only on the parts before it.
"""

# Shapes: B rows, T tokens, D hidden size, L layers, G key-value heads, d size of a head

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from openm6.core.lru_cache import LRUCache
from openm6.modalities.batch import TokenGroup, build_sequence, collate
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni
from openm6.nn.cache import PackedWriter, SlotCache, SlotReader, SlotWriter, TokenCache
from openm6.ops.sequence import SequenceMeta

T = TypeVar("T")
Prompt = list[Segment]
# Keys and values of units.
PrefixCache = LRUCache[tuple[Tensor, Tensor]]
# Tokens of one packed pass.
PACKED_TOKENS = 2048
# Size of the prefix cache of `prefill_all`.
PREFIX_BYTES = 256 << 20


@dataclass(frozen=True)
class Unit:
    """Segments of a prompt that run in one pass, and a digest of them and of everything before them."""

    segments: list[Segment]
    key: bytes

    def __len__(self) -> int:
        return sum(map(len, self.segments))


def units_of(prompt: Prompt) -> list[Unit]:
    """Split a prompt into what runs in one pass each: a part by itself, segments that attend to one another together.

    A separate pass for each part makes its bits the same whether or not the parts before it came from the cache.
    """
    units: list[Unit] = []
    for segment in prompt:
        # Of what was before, and of all that the tokens hold: kinds, shapes and bytes of all arrays.
        digest = hashlib.sha256(units[-1].key if units else b"")
        digest.update(f"{segment.kind} {segment.span} {segment.placement} {segment.moves} {len(segment)}".encode())
        for name, array in sorted([*segment.arrays.items(), ("grid", segment.grid)]):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        joined = units.pop().segments if units and segment.placement == "source" else []
        units.append(Unit([*joined, segment], digest.digest()))
    return units


def _run_units(
    omni: Omni, units: list[Unit], cache: SlotCache, slots: list[int], writer: TokenCache, position: int = 0
) -> None:
    """Run units, packed in one row, through the model; if that fails, their slots are left empty."""
    sequences = [build_sequence(unit.segments, position=position) for unit in units]
    batch = collate([sequences], sum(map(len, sequences))).to(omni.device)
    try:
        omni(batch.groups, batch.meta, writer)
    except BaseException:
        cache.clear(slots)
        raise


@torch.inference_mode()
def prefill(
    omni: Omni, prompt: Prompt, cache: SlotCache, slot: int, prefix_cache: PrefixCache | None = None
) -> tuple[int, int]:
    """Run a prompt into a slot; return the next position, and the number of tokens that came from the prefix cache."""
    prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
    position = start = cached = 0
    cache.lengths[slot] = 0
    found = [unit for unit in units_of(prompt) if len(unit)]
    for unit in found:
        kept = prefix_cache.get(unit.key)
        if kept is not None:
            cache.put(slot, kept, start)
            cached += cache.lengths[slot] - start
        else:
            _run_units(omni, [unit], cache, [slot], SlotWriter(cache, slot, start), position)
            prefix_cache.put(unit.key, cache.take(slot, start))
        position += sum(segment.span for segment in unit.segments)
        start = cache.lengths[slot]
    # Prefixes serve more prompts than ends: they are dropped last.
    for unit in reversed(found):
        prefix_cache.get(unit.key)
    return position, cached


@torch.inference_mode()
def prefill_packed(
    omni: Omni, prompts: list[Prompt], cache: SlotCache, slots: list[int], prefix_cache: PrefixCache
) -> list[tuple[int, int]]:
    """As `prefill` of prompts; single uncached units share a pass, packed in a row, and differ within rounding."""
    # Of equal prompts the first, and its slot.
    firsts: dict[bytes, tuple[Unit, int]] = {}
    for prompt, slot in zip(prompts, slots, strict=True):
        found = units_of(prompt)
        if len(found) == 1 and len(found[0]) and found[0].key not in prefix_cache.entries:
            firsts.setdefault(found[0].key, (found[0], slot))
    packed = [slot for _, slot in firsts.values()] if len(firsts) > 1 else []
    if packed:
        units = [unit for unit, _ in firsts.values()]
        _run_units(omni, units, cache, packed, PackedWriter(cache, packed))
        for unit, slot in zip(units, packed, strict=True):
            prefix_cache.put(unit.key, cache.take(slot))
    return [
        (sum(segment.span for segment in prompt), 0)
        if slot in packed
        else prefill(omni, prompt, cache, slot, prefix_cache)
        for prompt, slot in zip(prompts, slots, strict=True)
    ]


def prefill_all(omni: Omni, prompts: list[Prompt], cache: SlotCache, first: int = 0) -> list[int]:
    """Run prompts into consecutive slots, packed in passes of bounded length; return the next position of each."""
    prefix_cache = PrefixCache(PREFIX_BYTES)
    positions: list[int] = []
    for few in passes_of(prompts, prompt_length, PACKED_TOKENS):
        slots = list(range(first + len(positions), first + len(positions) + len(few)))
        positions += [position for position, _ in prefill_packed(omni, few, cache, slots, prefix_cache)]
    return positions


def passes_of(items: Sequence[T], length_of: Callable[[T], int], limit: int) -> list[list[T]]:
    """Split items, in order, into passes of up to `limit` tokens, unless one alone has more."""
    passes: list[list[T]] = []
    for item in items:
        if not passes or sum(map(length_of, passes[-1])) + length_of(item) > limit:
            passes.append([])
        passes[-1].append(item)
    return passes


def prompt_length(prompt: Prompt) -> int:
    return sum(map(len, prompt))


def run_block(
    omni: Omni, cache: SlotCache, slots: list[int | None], starts: list[int], like: Segment, arrays: dict[str, Tensor]
) -> Tensor:
    """Hidden states of one private block of tokens per row, after the prompt in a slot, which stays as it is.

    All blocks have the kind and grid of `like`; `arrays` hold the tokens of all rows, `starts` are the positions
    after the prompts.  # -> B T D
    """
    device = omni.device
    start = torch.tensor(starts, device=device)[:, None, None]
    moves = torch.tensor(like.moves, device=device)
    positions = torch.from_numpy(like.grid).to(device) + start * moves  # B T 3
    zero = torch.zeros(positions.shape[:2], dtype=torch.int32, device=device)
    meta = SequenceMeta(zero, zero + 1, zero + 1, positions.to(torch.int32))
    index = torch.arange(zero.numel(), device=device)
    groups = {like.kind: TokenGroup(index, arrays, index, index.float(), index[:0])}
    return omni(groups, meta, SlotReader(cache, slots))[0]
