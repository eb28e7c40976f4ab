"""Prefill: prompts into slots of the key-value cache, each by itself or several packed in one row, and a prefix cache.

What is computed in one pass and cached is a unit of a prompt: the whole of it if its tokens all see one another, else
one part, which depends only on the parts before it.
"""

# Shapes: B rows, T tokens, D width, L layers, G key-value heads, d size of a head

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.modalities.batch import TokenGroup, build_sequence, collate
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni
from openm6.nn.cache import SlotCache
from openm6.ops.sequence import SequenceMeta

Prompt = list[Segment]
PACKED_TOKENS = 2048  # tokens of one packed pass
PREFIX_BYTES = 256 << 20  # prefixes kept by `prefill_all`


@dataclass(frozen=True)
class Unit:
    """Segments of a prompt that run in one pass, and a digest of them and of everything before them."""

    segments: list[Segment]
    key: bytes

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def span(self) -> int:
        """Positions from this unit to the next."""
        return sum(segment.span for segment in self.segments)


class PrefixCache:
    """LRU cache of the keys and values of units, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, key: bytes) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values of a unit, or None."""
        self.touch(key)
        return self.kept.get(key)

    def touch(self, key: bytes) -> None:
        """Mark a unit as used now."""
        if key in self.kept:
            self.kept.move_to_end(key)

    def put(self, key: bytes, found: tuple[Tensor, Tensor]) -> None:
        """Keep them; drop the least recently used units beyond the bound."""
        size = sum(part.nbytes for part in found)
        if key in self.kept or size > self.max_bytes:
            return
        self.kept[key] = found
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self.kept.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in old)


def units(prompt: Prompt) -> list[Unit]:
    """Split a prompt into what runs in one pass each: a part by itself, segments that see one another together.

    A separate pass for each part makes its bits the same whether or not the parts before it came from the cache.
    """
    groups: list[list[Segment]] = []
    for segment in prompt:
        if segment.placement == "part" or not groups:
            groups.append([segment])
        else:
            groups[-1].append(segment)
    found, key = [], b""
    for segments in groups:
        key = _digest(segments, key)
        found.append(Unit(segments, key))
    return found


def _digest(segments: list[Segment], before: bytes) -> bytes:
    """A digest of everything that the tokens hold (kinds, shapes and bytes of all arrays) and of what was before."""
    digest = hashlib.sha256(before)
    for segment in segments:
        about = f"{segment.kind} {segment.span} {segment.placement} {segment.moves} {len(segment)}"
        digest.update(about.encode())
        for name, array in sorted([*segment.arrays.items(), ("grid", segment.grid)]):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.digest()


@contextmanager
def _cleared_on_failure(cache: SlotCache, slots: list[int]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        cache.clear(slots)
        raise


@torch.inference_mode()
def prefill(
    omni: Omni, prompt: Prompt, cache: SlotCache, slot: int, prefix_cache: PrefixCache | None = None
) -> tuple[int, int]:
    """Run a prompt into a slot; return the next position, and the number of tokens that came from the cache."""
    position = start = known = 0
    cache.lengths[slot] = 0
    found = [unit for unit in units(prompt) if len(unit)]
    for unit in found:
        kept = None if prefix_cache is None else prefix_cache.get(unit.key)
        if kept is not None:
            cache.put(slot, kept, start)
            known += cache.lengths[slot] - start
        else:
            sequence = build_sequence(unit.segments, position=position)
            batch = collate([[sequence]], len(sequence)).to(omni.device)
            with _cleared_on_failure(cache, [slot]):
                omni(batch.groups, batch.meta, cache.writer(slot, start))
            if prefix_cache is not None:
                prefix_cache.put(unit.key, cache.take(slot, start))
        position, start = position + unit.span, cache.lengths[slot]
    if prefix_cache is not None:  # prefixes serve more prompts than ends: they are dropped last
        for unit in reversed(found):
            prefix_cache.touch(unit.key)
    return position, known


@torch.inference_mode()
def prefill_packed(
    omni: Omni, prompts: list[Prompt], cache: SlotCache, slots: list[int], prefix_cache: PrefixCache
) -> list[tuple[int, int]]:
    """As `prefill` for several prompts; those of a single unit that is not cached share a pass, packed in one row.

    A prompt's keys then depend on the other prompts within rounding.
    """
    firsts: dict[bytes, tuple[Unit, int]] = {}  # of equal prompts the first, and its slot
    for prompt, slot in zip(prompts, slots, strict=True):
        found = units(prompt)
        if len(found) == 1 and len(found[0]) and found[0].key not in prefix_cache.kept:
            firsts.setdefault(found[0].key, (found[0], slot))
    if len(firsts) > 1:
        _prefill_single_units(omni, list(firsts.values()), cache, prefix_cache)
    packed = {slot for _, slot in firsts.values()} if len(firsts) > 1 else set()
    return [
        (sum(segment.span for segment in prompt), 0)
        if slot in packed
        else prefill(omni, prompt, cache, slot, prefix_cache)
        for prompt, slot in zip(prompts, slots, strict=True)
    ]


def _prefill_single_units(
    omni: Omni, firsts: list[tuple[Unit, int]], cache: SlotCache, prefix_cache: PrefixCache
) -> None:
    sequences = [build_sequence(unit.segments) for unit, _ in firsts]
    batch = collate([sequences], sum(map(len, sequences))).to(omni.device)
    slots = [slot for _, slot in firsts]
    with _cleared_on_failure(cache, slots):
        omni(batch.groups, batch.meta, cache.packed_writer(slots))
    for unit, slot in firsts:
        prefix_cache.put(unit.key, cache.take(slot))


def prefill_all(
    omni: Omni,
    prompts: list[Prompt],
    cache: SlotCache,
    first: int = 0,
    prefix_cache: PrefixCache | None = None,
) -> list[int]:
    """Run prompts into consecutive slots, packed in passes of bounded length; return the next position of each."""
    prefix_cache = prefix_cache or PrefixCache(PREFIX_BYTES)
    positions: list[int] = []
    for few in _passes(prompts):
        slots = list(range(first + len(positions), first + len(positions) + len(few)))
        positions += [position for position, _ in prefill_packed(omni, few, cache, slots, prefix_cache)]
    return positions


def _passes(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Split prompts, in order, into passes of up to `PACKED_TOKENS` tokens, unless one alone has more."""
    few: list[Prompt] = []
    for prompt in prompts:
        if few and sum(map(prompt_length, [*few, prompt])) > PACKED_TOKENS:
            yield few
            few = []
        few.append(prompt)
    if few:
        yield few


def prompt_length(prompt: Prompt) -> int:
    """Return the number of tokens of a prompt."""
    return sum(map(len, prompt))


def run_block(
    omni: Omni,
    cache: SlotCache,
    slots: list[int | None],
    starts: list[int],
    like: Segment,
    arrays: dict[str, Tensor],
) -> Tensor:
    """Hidden states of one private block of tokens per row, after the prompt in a slot, which stays as it is.

    All blocks are of the kind and grid of `like`; `arrays` hold the tokens of all rows, `starts` are the positions
    that follow the prompts.  # -> B T D
    """
    device = omni.device
    start = torch.tensor(starts, device=device)[:, None, None]
    along = torch.tensor(like.moves, device=device)
    positions = torch.from_numpy(like.grid).to(device) + start * along  # B T 3
    sample = torch.zeros(positions.shape[:2], dtype=torch.int32, device=device)
    meta = SequenceMeta(sample, sample + 1, sample + 1, positions.to(torch.int32))
    index = torch.arange(sample.numel(), device=device)
    groups = {like.kind: TokenGroup(index, arrays, index, index.float(), index[:0])}
    return omni(groups, meta, cache.reader(slots))[0]
