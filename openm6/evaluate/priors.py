"""What the training targets alone say about a test target: predictors that see no input.

They serve twice: as baselines of tasks whose targets are codes, and as a null predictor of the information gain.
"""

# Shapes: M training targets, N test targets, P positions of a target, G codes per position, C codebook size, B bins

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict

import numpy as np

from openm6.modalities.interface import Segment
from openm6.modalities.numbers import BINS, LIMIT
from openm6.tasks.task import Example

POSITION_WEIGHTS = (
    0.0,
    0.25,
    0.5,
    0.75,
    0.9,
)  # of a position's own frequencies beside those of all positions
HELD_OUT = 4  # every fourth training target chooses among them
PSEUDO_COUNT = 0.5


class TargetPrior(ABC):
    """p(y) from the targets of the training split."""

    @abstractmethod
    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        """-log2 p(y) of each target in bits; infinite for a target it gives no probability.  # N"""


class NoPrior(TargetPrior):
    """Without training records nothing is known of the targets."""

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        return np.full(len(examples), np.inf)


class AnswerFrequencies(TargetPrior):
    """Text: how often each answer occurs in the language of the prompt, add-half smoothed."""

    def __init__(self, examples: list[Example], targets: list[Segment]) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        for example in examples:
            self.counts[example.language][example.answer] += 1

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        return np.asarray([self._bits(example) for example in examples])

    def _bits(self, example: Example) -> float:
        counts = self.counts[example.language]
        if example.answer not in counts:
            return np.inf
        # One class more than was seen: a new answer keeps its share.
        total = counts.total() + PSEUDO_COUNT * (len(counts) + 1)
        return float(-np.log2((counts[example.answer] + PSEUDO_COUNT) / total))

    def most_frequent(self, language: str) -> str:
        """The commonest answer in a language; empty if there is none."""
        return next((answer for answer, _ in self.counts[language].most_common(1)), "")

    def knows(self, examples: list[Example]) -> bool:
        """Whether every answer occurred in training: the task chooses from a closed set."""
        return all(example.answer in self.counts[example.language] for example in examples)


class ValueFrequencies(TargetPrior):
    """Numbers: a histogram of each column's training values over the bins of the number head."""

    def __init__(self, examples: list[Example], targets: list[Segment]) -> None:
        self.counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(BINS))
        for example, target in zip(examples, targets, strict=True):
            self.counts[target_column(example)] += np.bincount(_bins(target), minlength=BINS)

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        return np.asarray([self._bits(*pair) for pair in zip(examples, targets, strict=True)])

    def _bits(self, example: Example, target: Segment) -> float:
        smoothed = self.counts[target_column(example)] + PSEUDO_COUNT / 4  # 160 bins would drown few values
        return float(-np.log2(smoothed[_bins(target)] / smoothed.sum()).sum())


class CodeFrequencies(TargetPrior):
    """Image and audio codes: frequencies by position and group, mixed with those of all positions.

    The weight of the position's own frequencies is the one that predicts a held-out quarter of the training targets
    best.
    """

    def __init__(self, examples: list[Example], targets: list[Segment], codebook_size: int) -> None:
        codes = np.stack([target.arrays["codes"] for target in targets])  # M P G
        held_out = np.arange(len(codes)) % HELD_OUT == HELD_OUT - 1
        weight = 0.0
        if held_out.any():
            tables = {w: _code_bits(codes[~held_out], codebook_size, w) for w in POSITION_WEIGHTS}
            weight = min(tables, key=lambda w: _lookup(tables[w], codes[held_out]).mean())
        self.table = _code_bits(codes, codebook_size, weight)  # P G C

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        return np.asarray(
            [_lookup(self.table, target.arrays["codes"])[target.learn].sum() for target in targets]
        )


def _code_bits(codes: np.ndarray, codebook_size: int, weight: float) -> np.ndarray:
    """Bits of every code at every position.  # M P G -> P G C"""
    _, positions, groups = codes.shape
    own = np.zeros((positions, groups, codebook_size))
    np.add.at(own, (np.arange(positions)[:, None], np.arange(groups), codes), 1)
    pooled = own.sum(0) + PSEUDO_COUNT  # G C
    pooled /= pooled.sum(-1, keepdims=True)
    return -np.log2(weight * own / len(codes) + (1 - weight) * pooled)


def _lookup(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Bits of codes.  # P G C, … P G -> … P G"""
    positions, groups, _ = table.shape
    return table[np.arange(positions)[:, None], np.arange(groups), codes]


def _bins(target: Segment) -> np.ndarray:
    """Bin of each observed value."""
    values = target.arrays["values"][target.arrays["observed"]]
    return ((values + LIMIT) * (BINS / (2 * LIMIT))).astype(int).clip(0, BINS - 1)


def target_column(example: Example) -> str:
    """The column that a numbers example predicts."""
    return next(iter(example.answer)) if isinstance(example.answer, dict) else example.answer.name
