"""Embeddings judged by finding: a text's picture among all test pictures, a picture's text among all test texts."""

# Letters: Q queries, G gallery, E size of an embedding

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from openm6.base.errors import DataError
from openm6.base.seeds import numpy_generator
from openm6.data.source import Source
from openm6.evaluate.config import JudgeConfig
from openm6.evaluate.intervals import bootstrap_interval
from openm6.evaluate.results import TaskResult
from openm6.inference.engine import embed, taught_pool
from openm6.inference.load import Loaded
from openm6.modalities.registry import source_segments
from openm6.models.description import Lesson
from openm6.tasks.registry import task_named
from openm6.tasks.task import LANGUAGES, Example, Task

RANKS = (1, 5)
RETRIEVED = 1000  # test records of a gallery at most


@dataclass(frozen=True)
class Search:
    """Similarities of queries to a gallery, and which of it is right for each: Q G float, Q G bool."""

    name: str
    similar: np.ndarray
    right: np.ndarray

    def found(self, rank: int) -> np.ndarray:
        """Whether something right is among the `rank` most similar of each query.  # Q"""
        nearest = np.argsort(-self.similar, axis=1, kind="stable")[:, :rank]
        return np.take_along_axis(self.right, nearest, axis=1).any(1).astype(float)

    def by_chance(self, rank: int) -> np.ndarray:
        """Its probability for a gallery in random order: 1 − C(wrong, k)/C(all, k).  # Q"""
        size = self.right.shape[1]
        rank = min(rank, size)
        misses = [math.comb(size - int(count), rank) / math.comb(size, rank) for count in self.right.sum(1)]
        return 1 - np.asarray(misses)

    def recall(self, rank: int) -> float:
        """Mean of `found` over queries."""
        return float(self.found(rank).mean())

    def chance(self, rank: int) -> float:
        """Mean of `by_chance` over queries."""
        return float(self.by_chance(rank).mean())

    def bits(self, scale: float) -> np.ndarray:
        """How many times likelier than by chance the right ones are, as the logarithm to base 2.  # Q"""
        scores = scale * (self.similar - self.similar.max(1, keepdims=True))
        share = (np.exp(scores) * self.right).sum(1) / np.exp(scores).sum(1)
        return np.log2(np.maximum(share, 1e-12)) - np.log2(self.right.mean(1))


def judge_retrieval(loaded: Loaded, lesson: Lesson, test: Source, config: JudgeConfig) -> TaskResult | None:
    """Recall of a contrastive task in both directions and both languages; None where no test record fits."""
    task = task_named(lesson.task)
    searches, judged = [], 0
    for language in LANGUAGES:
        examples = examples_in(task, test, language, config, loaded)
        if len({example.key for example in examples}) > 1:
            searches += both_directions(loaded, task, examples, language)
            judged += len(examples)
    return summary_of(loaded, lesson, searches, judged, config.seed) if searches else None


def examples_in(
    task: Task, source: Source, language: str, config: JudgeConfig, loaded: Loaded
) -> list[Example]:
    """Test records that can be posed in a language and opened."""
    found = []
    for index in np.linspace(0, len(source) - 1, min(len(source), RETRIEVED)).astype(int):
        rng = numpy_generator(config.seed, task.name, int(index))
        try:
            example = task.example(source[int(index)], rng, language=language)
            source_segments([example.target], loaded.modalities)
            found.append(example)
        except DataError:
            continue
    return found


def both_directions(loaded: Loaded, task: Task, examples: list[Example], language: str) -> list[Search]:
    """Searches with the given sides among the wanted ones and the other way; equal texts count once."""
    once = list({example.key: example for example in examples}.values())
    given = embed(loaded, [example.source for example in once])
    wanted = embed(loaded, [[example.target] for example in examples])
    similar = given @ wanted.T  # Q E, G E -> Q G
    right = np.asarray([[x.key == y.key for y in examples] for x in once])
    there, back = f"{task.reads}_to_{task.gives}_{language}", f"{task.gives}_to_{task.reads}_{language}"
    return [Search(there, similar, right), Search(back, similar.T, right.T)]


def summary_of(loaded: Loaded, lesson: Lesson, searches: list[Search], judged: int, seed: int) -> TaskResult:
    """One result: the mean over directions and languages, and each of them among the metrics."""
    task = task_named(lesson.task)
    metrics = {f"recall_at_{k}": float(np.mean([s.recall(k) for s in searches])) for k in RANKS}
    metrics |= {f"chance_at_{k}": float(np.mean([s.chance(k) for s in searches])) for k in RANKS}
    for search in searches:
        metrics |= {f"{search.name}_recall_at_{k}": search.recall(k) for k in RANKS}
        metrics |= {f"{search.name}_chance_at_{k}": search.chance(k) for k in RANKS}
    scale = float(taught_pool(loaded).scale.detach())
    bits, found, by_chance = (
        np.concatenate(values)
        for values in zip(*((s.bits(scale), s.found(1), s.by_chance(1)) for s in searches), strict=True)
    )
    return TaskResult(
        task=task.name,
        source=lesson.source,
        reads=task.reads,
        gives=task.gives,
        metric="recall_at_1",
        value=metrics["recall_at_1"],
        value_interval=bootstrap_interval(found, seed),
        baseline=metrics["chance_at_1"],
        better="higher",
        advantage_interval=bootstrap_interval(found - by_chance, seed),
        baseline_name=task.baseline,
        information_gain=float(bits.mean()),
        information_interval=bootstrap_interval(bits, seed),
        null_predictor="any test record alike",
        records=judged,
        answered=judged,
        metrics=metrics,
    )
