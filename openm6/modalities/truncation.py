"""Texts cut where they may be cut, so that an example fits: long inputs lose, words of a prompt do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from openm6.modalities.interface import Cuttable, Part, Segment, line


def join_texts(first: Part, second: Part) -> Part:
    """Two texts as one, which may be cut where each of them may be."""
    moved = (
        Cuttable(one.start + len(first.raw), one.stop + len(first.raw), one.keep_end)
        for one in cuttable_in(second)
    )
    return Part("text", first.raw + second.raw, {"cuttable": (*cuttable_in(first), *moved)})


def cuttable_in(part: Part) -> tuple[Cuttable, ...]:
    """Where a text may be cut, in characters: anywhere unless its options set it."""
    whole = Cuttable(0, len(part.raw))
    return tuple(part.options.get("cuttable", (whole,)))


def fit(segments: Sequence[Segment], limit: int, shortest: int = 0) -> list[Segment]:
    """The segments with at most `limit` tokens together; unchanged if less than `shortest` of a text would be left.

    All texts are cut to one length, the largest that fits, so the longest lose first and short ones nothing.
    """
    lengths = [one.stop - one.start for segment in segments for one in segment.cuttable]
    excess = sum(map(len, segments)) - limit
    room = sum(lengths) - excess
    if excess <= 0 or room < 0 or not lengths:
        return list(segments)
    longest = _longest_allowed(lengths, room)
    if longest < shortest:
        return list(segments)
    return [_cut(segment, longest) for segment in segments]


def _longest_allowed(lengths: list[int], room: int) -> int:
    """The largest c for which Σ min(length, c) is at most `room`."""
    for index, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - index)
        if length > share:
            return share
        room -= length
    return max(lengths)


def _cut(segment: Segment, longest: int) -> Segment:
    """The segment with at most `longest` tokens of each stretch that may be cut."""
    kept = np.ones(len(segment), bool)
    left: list[Cuttable] = []
    lost = 0
    for one in segment.cuttable:
        over = max(0, one.stop - one.start - longest)
        gone = slice(one.start, one.start + over) if one.keep_end else slice(one.stop - over, one.stop)
        kept[gone] = False
        left.append(Cuttable(one.start - lost, one.stop - lost - over, one.keep_end))
        lost += over
    return select_tokens(segment, kept, tuple(left)) if lost else segment


def select_tokens(segment: Segment, kept: np.ndarray, cuttable: tuple[Cuttable, ...] = ()) -> Segment:
    """A text of those of its tokens that are kept, marked as truncated.  # N bool"""
    count = int(kept.sum())
    return replace(
        segment,
        arrays={name: array[kept] for name, array in segment.arrays.items()},
        grid=line(count),
        span=count,
        learn=segment.learn[kept],
        truncated=True,
        cuttable=cuttable,
    )
