"""Likelihoods of test targets, and the bits a model gains from the source it is given."""

# Letters: N examples

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from openm6.data.prepare import example_sequence
from openm6.generate.load import Loaded
from openm6.modalities.interface import Part
from openm6.modalities.sequence import Sequence, collate
from openm6.models.omni import Omni
from openm6.tasks.task import Example

ROW = 512
BATCH_ROWS = 4
RESAMPLES = 2000
SMALL = 100  # records; a set up to this size is held against
STRANGERS = 4  # others for each of its records, since their choice would decide too much
BITS = 1 / np.log(2)


@torch.inference_mode()
def sequence_nats(omni: Omni, sequences: list[Sequence]) -> np.ndarray:
    """Negative log-likelihood of the learned tokens of each sequence, in nats.  # N"""
    length = max(ROW, *(len(sequence) for sequence in sequences), 0)
    found: list[float] = []
    rows: list[list[Sequence]] = [[]]
    for sequence in sequences:
        if sum(map(len, rows[-1])) + len(sequence) > length:
            if len(rows) == BATCH_ROWS:
                found.extend(_nats(omni, rows, length))
                rows = []
            rows.append([])
        rows[-1].append(sequence)
    found.extend(_nats(omni, rows, length))
    return np.asarray(found)


def _nats(omni: Omni, rows: list[list[Sequence]], length: int) -> list[float]:
    batch = collate(rows, length).to(omni.device)
    total = torch.zeros(batch.num_examples, device=omni.device)
    judged, _ = omni.judge(batch)
    for part in judged.values():
        total.index_add_(0, part.example, part.nats)
    return total.tolist()


def strangers(examples: list[Example], most: int = 1) -> list[list[int]]:
    """For each example, up to `most` others of the same language whose answers differ from its own."""
    count = len(examples)
    found: list[list[int]] = []
    for row, example in enumerate(examples):
        others = ((row + step) % count for step in range(1 + count // 2, count + 1 + count // 2))
        fits = (
            o for o in others if examples[o].language == example.language and examples[o].key != example.key
        )
        found.append(list(islice(fits, most)))
    return found


def gained_bits(loaded: Loaded, examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each target given its own source, and the bits lost when others' sources stand there.  # N, M

    A picture or sound is judged with all its codes hidden, also where only a hole is wanted: shown codes would tell
    what the source tells, and hide whether the model reads it.
    """
    other = strangers(examples, STRANGERS if len(examples) <= SMALL else 1)
    examples = [replace(example, target=all_hidden(example.target)) for example in examples]
    own = [example_sequence(example, loaded.modalities) for example in examples]
    swaps = [(row, stranger) for row, chosen in enumerate(other) for stranger in chosen]
    swapped = [_with_source(loaded, examples[row], examples[stranger].source) for row, stranger in swaps]
    nats = sequence_nats(loaded.omni, [*own, *swapped])
    lost = np.zeros(len(own))
    np.add.at(lost, [row for row, _ in swaps], nats[len(own) :])
    rows = [row for row, chosen in enumerate(other) if chosen]
    counts = np.asarray([len(other[row]) for row in rows])
    return nats[: len(own)], (lost[rows] / counts - nats[: len(own)][rows]) * BITS


def all_hidden(target: Part) -> Part:
    """The target without its hole or gap."""
    return replace(
        target, options={name: v for name, v in target.options.items() if name not in ("hole", "gap")}
    )


def _with_source(loaded: Loaded, example: Example, source: list[Part]) -> Sequence:
    return example_sequence(example, loaded.modalities, source=source)


def bootstrap_interval(values: np.ndarray, seed: int, share: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean, by percentiles.  # N -> low, high"""
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)
