"""Likelihoods of test targets, with and without the inputs: how much information the model finds in the inputs.

The information gain of a record is log2 p(y | x) - log2 p(y | null input), the pointwise V-information (Ethayarajh
et al., arXiv 2110.08420, section 2). Training drops the inputs of a tenth of the examples, so one model estimates
both terms. V-information subtracts from the *smallest* cross-entropy that a predictor without inputs reaches, so the
frequencies of the training targets stand in for the model if they predict the test targets better. The mean gain is
then at most the cross-entropy of the test answers under those frequencies, about their entropy, whatever the model.

The same frequencies are baselines of text and codes; those of numbers are naive rules.
"""

# Shapes: M training targets, N test examples, P positions of a target, G codes per position, C codebook size

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from openm6.data.prepare import example_sequence, null_example
from openm6.data.source import Source
from openm6.evaluate.answers import build_examples
from openm6.evaluate.formatting import words
from openm6.evaluate.metrics import Scored, known_metrics, truths
from openm6.evaluate.results import true_values
from openm6.inference.engine import MAX_ROWS, ROW_TOKENS
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import passes_of
from openm6.modalities.batch import PackedExample, collate
from openm6.modalities.histogram import BINS, LIMIT
from openm6.modalities.interface import Segment
from openm6.modalities.numbers import Numbers
from openm6.modalities.registry import Modalities, target_segment
from openm6.modalities.series import squashed
from openm6.models.omni import Omni
from openm6.tasks.task import Example, Task

MAX_TRAINING_EXAMPLES = 400
# Candidate weights of a position's own frequencies, against those of all positions.
POSITION_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 0.9)
PSEUDO_COUNT = 0.5


class TargetPrior:
    """p(y) from the targets of the training split; in this class, without any, no target has a probability."""

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        """-log2 p(y) of each target in bits; infinite for a target without probability.  # N"""
        return np.full(len(examples), np.inf)

    def new_bits(self, examples: list[Example]) -> np.ndarray:
        """-log2 of the probability that an answer is none of those seen in training; infinite if unknown.  # N"""
        return np.full(len(examples), np.inf)


class AnswerFrequencies(TargetPrior):
    """Text: how often each answer occurs in the language of the prompt and for its column, add-half smoothed."""

    def __init__(self, examples: list[Example]) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for example in examples:
            self.counts[example.language, example.column][example.answer] += 1

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        found = np.full(len(examples), np.inf)
        for row, example in enumerate(examples):
            answer, counts = example.answer, self.counts[example.language, example.column]
            if answer in counts:
                # One class more than was seen: the probability of a new answer.
                total = counts.total() + PSEUDO_COUNT * (len(counts) + 1)
                found[row] = -np.log2((counts[answer] + PSEUDO_COUNT) / total)
        return found

    def new_bits(self, examples: list[Example]) -> np.ndarray:
        counts = [self.counts[example.language, example.column] for example in examples]
        totals = np.asarray([own.total() + PSEUDO_COUNT * (len(own) + 1) for own in counts])
        return np.where([bool(own) for own in counts], np.log2(totals / PSEUDO_COUNT), np.inf)

    def covers(self, examples: list[Example]) -> bool:
        """Whether every answer occurred in training: the task has a closed set of answers."""
        return all(example.answer in self.counts[example.language, example.column] for example in examples)


class ValueFrequencies(TargetPrior):
    """Numbers: a histogram of each column's training values over the bins of the number head."""

    def __init__(self, examples: list[Example], numbers: Numbers) -> None:
        self.numbers = numbers
        self.counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(BINS))
        for example in examples:
            for name, bins in self._bins(example):
                self.counts[name] += np.bincount(bins, minlength=BINS)

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        found = []
        for example in examples:
            bits = 0.0
            for name, bins in self._bins(example):
                smoothed = self.counts[name] + PSEUDO_COUNT / 4  # 160 bins would swamp few values
                bits -= float(np.log2(smoothed[bins] / smoothed.sum()).sum())
            found.append(bits)
        return np.asarray(found)

    def _bins(self, example: Example) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each column with the bins of its observed values, on the scale of the column."""
        names, values = np.array(target_columns(example)), truths(example)
        for name in dict.fromkeys(names.tolist()):
            loc, scale = self.numbers.scale(name)
            found = squashed((values[names == name] - loc) / scale)
            yield name, ((found + LIMIT) * (BINS / (2 * LIMIT))).astype(int).clip(0, BINS - 1)


class CodeFrequencies(TargetPrior):
    """Image and audio codes: frequencies by position and group, mixed with those of all positions.

    The weight of the position's own frequencies is the one that predicts a held-out quarter of the training targets
    best.
    """

    def __init__(self, targets: list[Segment], codebook_size: int) -> None:
        codes = np.stack([target.arrays["codes"] for target in targets])  # M P G
        held_out = np.arange(len(codes)) % 4 == 3
        weight = 0.0
        if held_out.any():
            tables = {w: _code_bits(codes[~held_out], codebook_size, w) for w in POSITION_WEIGHTS}
            weight = min(tables, key=lambda w: _lookup(tables[w], codes[held_out]).mean())
        self.table = _code_bits(codes, codebook_size, weight)  # P G C

    def bits(self, examples: list[Example], targets: list[Segment]) -> np.ndarray:
        return np.asarray([_lookup(self.table, target.arrays["codes"])[target.learn].sum() for target in targets])


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


def target_columns(example: Example) -> list[str]:
    """The column of each observed truth."""
    return [name for name, value in zip(*true_values(example.answer), strict=True) if math.isfinite(value)]


def training_examples(
    task: Task, source: Source, seed: int, modalities: Modalities
) -> tuple[list[Example], list[Segment]]:
    """Some training records of a source as examples of a task, with their targets; broken ones are left out."""
    return build_examples(
        task, source, MAX_TRAINING_EXAMPLES, (seed, "baseline"), lambda one: target_segment(one.target, modalities)
    )[:2]


def fit_prior(task: Task, examples: list[Example], targets: list[Segment], loaded: LoadedModel) -> TargetPrior:
    """The input-free predictor of a task's targets, from training examples."""
    if not examples:
        return TargetPrior()
    if task.output_modality == "text":
        return AnswerFrequencies(examples)
    if task.output_modality == "numbers":
        return ValueFrequencies(examples, loaded.numbers)
    modality = loaded.image if task.output_modality == "image" else loaded.audio
    return CodeFrequencies(targets, modality.codec.config.codebook_size)


def baseline_values(metric: str, scored: Scored, prior: TargetPrior) -> np.ndarray | None:
    """A metric of the baseline for each record; None if the task has no baseline.  # N

    Text: the most frequent training answer of the language. Codes: their training frequencies by position. Numbers:
    the error of the reference predictions, `mae`, which is the unit of `relative_crps`.
    """
    compute = known_metrics()[metric].values
    if isinstance(prior, AnswerFrequencies) and compute is not None:
        counts = [prior.counts[example.language, example.column] for example in scored.examples]
        answers = [max(found, key=found.__getitem__, default="") for found in counts]
        return compute(dataclasses.replace(scored, answers=list(answers)))
    if metric == "mae":
        return scored.reference_errors()
    if metric == "relative_crps":
        errors = scored.reference_errors()
        return errors / max(float(errors.mean()), 1e-9)
    if metric == "bits_per_code" and scored.prior_bits_per_code is not None:
        return scored.prior_bits_per_code
    return None


def numbers_references(
    task: Task, examples: list[Example], train: list[Example], loaded: LoadedModel
) -> dict[str, list[np.ndarray]]:
    """Predictions by the names of naive rules: the column's median; of a forecast, last value and seasonal naive."""
    if task.baseline != "last_value":
        return {words(task.baseline): column_medians(examples, train, loaded)}
    references = {"last value": [_repeated(example, 1) for example in examples]}
    by_column: dict[str, list[Example]] = defaultdict(list)
    for example in train:
        by_column[example.answer.name].append(example)
    found = {name: season for name, own in by_column.items() if (season := find_season(own)) > 1}
    if found:
        named = " to ".join(map(str, dict.fromkeys((min(found.values()), max(found.values())))))
        seasonal = [_repeated(example, found.get(example.answer.name, 1)) for example in examples]
        references[f"seasonal naive, period {named}"] = seasonal
    return references


def column_medians(examples: list[Example], train: list[Example], loaded: LoadedModel) -> list[np.ndarray]:
    """The median of training records in the column of each observed truth; the model's location if none has a value."""
    values: dict[str, list[float]] = defaultdict(list)
    for example in train:
        for name, value in zip(target_columns(example), truths(example).tolist(), strict=True):
            values[name].append(value)
        # If the column is drawn, each record shows values of the others.
        for name, value in example.target.options.get("given", {}).items():
            if isinstance(value, float | int) and math.isfinite(value):
                values[name].append(value)
    named = {name for example in examples for name in target_columns(example)}
    median = {name: float(np.median(values[name] or loaded.numbers.scale(name)[0])) for name in named}
    return [np.array([median[name] for name in target_columns(example)]) for example in examples]


def column_scales(examples: list[Example], loaded: LoadedModel) -> list[np.ndarray]:
    """The scale of the column of each observed truth, in whose units errors are averaged."""
    return [np.array([loaded.numbers.scale(name)[1] for name in target_columns(example)]) for example in examples]


def find_season(train: list[Example]) -> int:
    """The period of at least two steps with the best seasonal naive forecast of training windows; 1 if none fits."""
    periods = np.arange(2, min((len(_past(example)) for example in train), default=1) + 1)
    if not len(periods):
        return 1
    errors = sum(np.abs(_repeated(example, periods[:, None]) - truths(example)).mean(1) for example in train)
    return int(periods[np.argmin(errors)])


def _past(example: Example) -> list[float | None]:
    return [v for part in example.source if part.modality == "numbers" for v in part.raw.values]


def _repeated(example: Example, period: int | np.ndarray) -> np.ndarray:
    """The last `period` values repeated over the horizon, at the observed steps; missing values are forward-filled.

    Of several periods, as a column, a row for each.
    """
    past = np.asarray(_past(example), float)
    if not np.isfinite(past).any():
        past = np.zeros(1)
    seen = np.maximum.accumulate(np.where(np.isfinite(past), np.arange(len(past)), -1))
    past = past[np.where(seen >= 0, seen, np.flatnonzero(np.isfinite(past))[0])]
    steps = np.flatnonzero(np.isfinite(np.asarray(example.answer.values, float)))
    period = np.minimum(period, len(past))
    return past[len(past) - period + steps % period]


@dataclass(frozen=True)
class Likelihoods:
    """-log2 p(y | x) and -log2 p(y | null input) of each target, in bits, and the predictor of the latter.  # N, N"""

    bits: np.ndarray
    null_bits: np.ndarray
    null_predictor: str

    @property
    def gain(self) -> np.ndarray:
        """Information gain of each record in bits.  # N"""
        return self.null_bits - self.bits


def likelihoods(
    loaded: LoadedModel,
    examples: list[Example],
    sequences: list[PackedExample],
    source_name: str,
    prior: TargetPrior,
) -> Likelihoods:
    """Likelihoods of the examples' targets; `sequences` are the examples as tokens."""
    null = [example_sequence(null_example(example, source_name), loaded.modalities) for example in examples]
    nll = sequence_nll(loaded.omni, [*sequences, *null])
    bits, model_bits = np.split(nll * (1 / np.log(2)), 2)
    prior_bits = prior.bits(examples, [sequence.segments[-1] for sequence in sequences])
    # What a new answer is, the model says.
    prior_bits = np.where(np.isinf(prior_bits), prior.new_bits(examples) + model_bits, prior_bits)
    if prior_bits.mean() < model_bits.mean():
        return Likelihoods(bits, prior_bits, "training frequencies")
    return Likelihoods(bits, model_bits, "model without inputs")


@torch.inference_mode()
def sequence_nll(omni: Omni, sequences: list[PackedExample]) -> np.ndarray:
    """Negative log-likelihood of the learned tokens of each sequence, in nats.  # N"""
    length = max(ROW_TOKENS, *map(len, sequences))
    found: list[float] = []
    rows = passes_of(sequences, len, length)
    for start in range(0, len(rows), MAX_ROWS):
        batch = collate(rows[start : start + MAX_ROWS], length).to(omni.device)
        total = torch.zeros(batch.num_examples, device=omni.device)
        losses, _ = omni.compute_loss(batch)
        for part in losses.values():
            total.index_add_(0, part.example, part.nll)
        found += total.tolist()
    return np.asarray(found)


def answer_entropy(examples: list[Example], prior: TargetPrior) -> float | None:
    """Entropy in bits of the answers given language and column; None unless training has seen all of them.

    Counts underestimate it: (distinct answers - 1) / 2N nats are added for each language (Miller 1955), up to the
    entropy of equally frequent training answers.
    """
    if not isinstance(prior, AnswerFrequencies) or not prior.covers(examples):
        return None
    total = 0.0
    for group in {(example.language, example.column) for example in examples}:
        answers = Counter(example.answer for example in examples if (example.language, example.column) == group)
        size = answers.total()
        counted = -sum(n / size * math.log2(n / size) for n in answers.values())
        missing = (len(answers) - 1) / (2 * size * math.log(2))
        total += size * min(counted + missing, math.log2(len(prior.counts[group])))
    return total / len(examples)
