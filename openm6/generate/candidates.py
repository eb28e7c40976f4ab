"""Candidate texts judged after one reading of the prompt: private blocks of one row, so that none sees another."""

# Letters: N candidates, S tokens of a pass, D width

from __future__ import annotations

from collections.abc import Iterator

import torch

from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni
from openm6.nn.slots import SlotCache
from openm6.ops.sequence import SequenceMeta

ROW = 512  # tokens of a pass, unless one candidate alone has more


@torch.inference_mode()
def candidate_nats(
    omni: Omni, cache: SlotCache, slot: int, place: int, candidates: list[Segment]
) -> list[float]:
    """Negative log-likelihood, in nats, of each wanted text after the prompt in a slot, which stays as it is.  # N

    `place` is the position that follows the prompt.
    """
    found: list[float] = []
    for few in _passes(candidates):
        sequences = [build_sequence([tokens], place=place) for tokens in few]
        batch = collate([sequences], sum(map(len, few))).to(omni.device)
        number = batch.layout.example_id
        # All belong to the prompt's example, and each to a block of its own.
        layout = SequenceMeta(
            torch.zeros_like(number), batch.layout.attn_order, number + 1, batch.layout.positions
        )
        hidden, _ = omni(batch.kinds, layout, cache.reader([slot]))  # 1 S D
        kind = batch.kinds["text"]
        nats = omni.text.nll(hidden[0, kind.index], kind.arrays).float()
        found += nats.new_zeros(len(few)).index_add_(0, kind.example, nats).tolist()
    return found


def _passes(candidates: list[Segment]) -> Iterator[list[Segment]]:
    """Whole candidates in their order, up to `ROW` tokens at once."""
    few: list[Segment] = []
    for tokens in candidates:
        if few and sum(map(len, few)) + len(tokens) > ROW:
            yield few
            few = []
        few.append(tokens)
    if few:
        yield few
