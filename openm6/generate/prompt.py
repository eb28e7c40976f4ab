"""Prompts read once: their keys and values are kept, and every wanted token is then run against them."""

# Letters: B prompts, S tokens of the longest prompt, T wanted tokens a row, D width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.modalities.batch import TokenGroup, build_sequence, collate
from openm6.modalities.interface import ALONG, Moves, Segment
from openm6.models.omni import Omni
from openm6.nn.cache import KVCache
from openm6.ops.sequence import SequenceMeta

Prompt = list[Segment]


@dataclass
class Reading:
    """Prompts in the cache, and where each row goes on: `place` B is the next position."""

    omni: Omni
    cache: KVCache
    place: Tensor
    read: int  # tokens of the cache that are prompts
    last: int = 0  # the highest order of a prompt's tokens

    @property
    def batch(self) -> int:
        return len(self.place)

    def layout(self, attn_order: int, grid: Tensor, block_id: int = 0, moves: Moves = ALONG) -> SequenceMeta:
        """The layout of T wanted tokens in every row, `attn_order` (from 1) after the prompts.

        `grid` T 3 counts from each row's place on the axes that move.
        """
        shape = (self.batch, len(grid))
        zeros = torch.zeros(shape, dtype=torch.int32, device=self.place.device)
        along = torch.tensor(moves, device=self.place.device)
        positions = grid + self.place[:, None, None] * along  # T 3 -> B T 3
        return SequenceMeta(
            zeros, zeros + self.last + attn_order, zeros + block_id, positions.to(torch.int32)
        )

    def run(self, kind: str, arrays: dict[str, Tensor], layout: SequenceMeta) -> Tensor:
        """Hidden states of wanted tokens, which stay in the cache; arrays hold B*T rows.  # -> B T D"""
        count = layout.batch * layout.length
        index = torch.arange(count, device=self.place.device)
        kinds = {kind: TokenGroup(index, arrays, index, index.float(), index[:0])}
        return self.omni(kinds, layout, self.cache)[0]

    def forget(self) -> None:
        """Takes back all that came after the prompts."""
        self.cache.truncate(self.read)


def read_prompts(omni: Omni, prompts: list[Prompt], room: int) -> Reading:
    """Runs prompts (source pieces; an empty list is the empty prompt) into a cache with room for `room` more tokens."""
    sequences = [build_sequence(pieces) if pieces else None for pieces in prompts]
    longest = max(1, *(len(sequence) if sequence else 0 for sequence in sequences), 0)
    batch = collate([[sequence] if sequence else [] for sequence in sequences], longest).to(omni.device)
    cache = omni.backbone.new_cache(len(prompts), longest + room)
    if batch.kinds:
        omni(batch.kinds, batch.layout, cache)
    else:  # nothing but empty prompts: the cache holds padding alone
        cache.extend(batch.layout)
    place = [sum(piece.span for piece in pieces) for pieces in prompts]
    last = max((int(sequence.attn_order.max()) for sequence in sequences if sequence is not None), default=0)
    return Reading(omni, cache, torch.tensor(place, device=omni.device), longest, last)
