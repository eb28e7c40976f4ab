"""Retrieval with embeddings: the image or audio of a text among all test records, and the other way."""

# Shapes: Q queries, G gallery, E embedding size

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from openm6.data.source import Source
from openm6.evaluate.answers import build_examples
from openm6.evaluate.results import TaskResult, bootstrap_interval
from openm6.inference.engine import embed
from openm6.inference.load import LoadedModel
from openm6.modalities.registry import source_segments
from openm6.models.description import TrainedTask
from openm6.tasks.task import LANGUAGES, Example, Task

RANKS = (1, 5)
MAX_GALLERY = 1000


@dataclass(frozen=True)
class Search:
    """Similarities of queries to a gallery, and the matches of each query: Q G float, Q G bool."""

    name: str
    similarity: np.ndarray
    matches: np.ndarray

    def hits(self, k: int) -> np.ndarray:
        """Whether a match is among the `k` most similar of each query.  # Q"""
        nearest = np.argsort(-self.similarity, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(self.matches, nearest, axis=1).any(1).astype(float)

    def chance_hits(self, k: int) -> np.ndarray:
        """Its probability for a gallery in random order: 1 − C(misses, k)/C(all, k).  # Q"""
        size = self.matches.shape[1]
        k = min(k, size)
        misses = [math.comb(size - int(count), k) / math.comb(size, k) for count in self.matches.sum(1)]
        return 1 - np.asarray(misses)

    def recalls(self) -> dict[str, float]:
        """Mean recall at each rank, and that of a gallery in random order."""
        recall = {f"recall_at_{k}": float(self.hits(k).mean()) for k in RANKS}
        return recall | {f"chance_at_{k}": float(self.chance_hits(k).mean()) for k in RANKS}

    def bits(self, scale: float) -> np.ndarray:
        """log2 of the softmax probability of the matches, relative to a uniform one.  # Q"""
        scores = scale * (self.similarity - self.similarity.max(1, keepdims=True))
        probability = (np.exp(scores) * self.matches).sum(1) / np.exp(scores).sum(1)
        return np.log2(np.maximum(probability, 1e-12)) - np.log2(self.matches.mean(1))


def evaluate_retrieval(loaded: LoadedModel, trained_task: TrainedTask, test: Source, seed: int) -> TaskResult | None:
    """Recall of a contrastive task over directions and languages, each among the metrics; None if no record fits."""
    task = loaded.task(trained_task.task)
    modalities, searches, records, left_out = loaded.modalities, [], 0, 0
    for language in LANGUAGES:
        examples, _, _ = build_examples(
            task, test, MAX_GALLERY, (seed, task.name), lambda x: source_segments([x.target], modalities), language
        )
        if len({example.key for example in examples}) > 1:
            searches += both_directions(loaded, task, examples, language)
            records += len(examples)
            left_out += max(0, len(test) - MAX_GALLERY)
    if not searches:
        return None
    recalls = {search.name: search.recalls() for search in searches}
    keys = next(iter(recalls.values()))
    metrics = {key: float(np.mean([each[key] for each in recalls.values()])) for key in keys}
    metrics |= {f"{name}_{key}": value for name, each in recalls.items() for key, value in each.items()}
    scale = float(loaded.pool.scale.detach())
    bits, hits, chance_hits = (
        np.concatenate(values)
        for values in zip(*((s.bits(scale), s.hits(1), s.chance_hits(1)) for s in searches), strict=True)
    )
    return TaskResult(
        task=task.name,
        source=trained_task.source,
        input_modality=task.input_modality,
        output_modality=task.output_modality,
        metric="recall_at_1",
        value=metrics["recall_at_1"],
        value_interval=bootstrap_interval(hits, seed),
        baseline=metrics["chance_at_1"],
        better="higher",
        advantage_interval=bootstrap_interval(hits - chance_hits, seed),
        baseline_name=task.baseline,
        information_gain=float(bits.mean()),
        information_interval=bootstrap_interval(bits, seed),
        null_predictor="any test record alike",
        records=records,
        answered=records,
        left_out=left_out,
        summary=task.summary,
        metrics=metrics,
    )


def both_directions(loaded: LoadedModel, task: Task, examples: list[Example], language: str) -> list[Search]:
    """Searches with inputs among targets and the other way; equal texts count once."""
    unique = list({example.key: example for example in examples}.values())
    inputs = embed(loaded, [example.source for example in unique])
    targets = embed(loaded, [[example.target] for example in examples])
    similarity = inputs @ targets.T  # Q E, G E -> Q G
    matches = np.asarray([[x.key == y.key for y in examples] for x in unique])
    forward = f"{task.input_modality}_to_{task.output_modality}_{language}"
    backward = f"{task.output_modality}_to_{task.input_modality}_{language}"
    return [Search(forward, similarity, matches), Search(backward, similarity.T, matches.T)]
