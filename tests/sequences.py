"""Parts of packed rows for tests: padding, and some tokens of each row."""

from __future__ import annotations

import torch

from openm6.modalities.batch import PackedExample, collate
from openm6.ops.sequence import PADDING, SequenceMeta


def padding_meta(batch: int, length: int) -> SequenceMeta:
    """Return tokens that belong to no example: visible to other padding only."""
    zero = torch.zeros(batch, length, dtype=torch.int32)
    return SequenceMeta(torch.full_like(zero, PADDING), zero, zero.clone(), zero.unsqueeze(-1).expand(batch, length, 3))


def narrow(meta: SequenceMeta, start: int, stop: int) -> SequenceMeta:
    """Return tokens start to stop - 1 of each row, as views."""
    return SequenceMeta(*(part[:, start:stop] for part in meta.parts()))


def meta_of(example: PackedExample) -> SequenceMeta:
    """Return the sequence rule of an example alone in a row."""
    return collate([[example]], len(example)).meta
