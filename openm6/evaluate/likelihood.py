"""Likelihoods of test targets, with and without the inputs: how much information the model finds in the inputs.

The information gain of a record is log2 p(y | x) - log2 p(y | null input), the pointwise V-information (Ethayarajh
et al., arXiv 2110.08420, section 2). Training drops the inputs of a tenth of the examples, so one model estimates
both terms. V-information subtracts from the *smallest* cross-entropy that a predictor without inputs reaches, so the
frequencies of the training targets stand in for the model if they predict the test targets better. The mean gain is
then at most the cross-entropy of the test answers under those frequencies, about their entropy, whatever the model.
"""

# Shapes: N examples

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from openm6.data.prepare import example_sequence, null_example
from openm6.evaluate.baselines import AnswerFrequencies, TargetPrior
from openm6.inference.engine import MAX_ROWS, ROW_TOKENS
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import passes_of
from openm6.modalities.batch import PackedExample, collate
from openm6.models.omni import Omni
from openm6.tasks.task import Example


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
