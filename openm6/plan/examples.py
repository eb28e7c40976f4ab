"""What the examples of a recipe bring to a step, on average, as they were counted on real batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from openm6.base.config import Config

Lesson = tuple[str, str, float]  # source, task, weight


class Remembered(Config):
    """What the `files` (pictures or sounds) of a source leave in a memory of codes. variants: arrays of each of them,
    as training shows it in so many ways; bytes: of an array; origin: the source, or another that shows the same files.
    """

    origin: str
    files: int
    variants: float
    bytes: float


class ExampleFacts(Config):
    """One example of a task over a source. read, learned: its tokens by kind; pairs, pieces: as `attention_causes`
    counts them; seconds: of a processor, to make it; remembered: by memory.
    """

    source: str
    task: str
    tokens: float
    read: dict[str, float]
    learned: dict[str, float]
    pairs: float
    pieces: float
    seconds: float
    remembered: dict[str, Remembered] = {}


@dataclass(frozen=True)
class Load:
    """What one step, or one process of several that share it, works on: the sums of `ExampleFacts`."""

    tokens: float = 0.0
    examples: float = 0.0
    pairs: float = 0.0
    pieces: float = 0.0
    seconds: float = 0.0
    read: dict[str, float] = field(default_factory=dict)
    learned: dict[str, float] = field(default_factory=dict)

    def times(self, factor: float) -> Load:
        """So many times as much."""
        read, learned = (
            {kind: factor * count for kind, count in counts.items()} for counts in (self.read, self.learned)
        )
        tokens, examples, pairs, pieces, seconds = (
            factor * part for part in (self.tokens, self.examples, self.pairs, self.pieces, self.seconds)
        )
        return Load(tokens, examples, pairs, pieces, seconds, read, learned)

    @property
    def words(self) -> float:
        """Learned tokens of text, which go through the output layer."""
        return self.learned.get("text", 0.0)

    @property
    def codes(self) -> float:
        """Learned tokens of all other kinds."""
        return sum(self.learned.values()) - self.words


def step_load(lessons: Sequence[Lesson], facts: Sequence[ExampleFacts], tokens: float) -> Load:
    """A step of so many tokens drawn from a mixture."""
    total = Load()
    for source, task, weight in lessons or [(one.source, one.task, 1.0) for one in facts]:
        found = facts_of(source, task, facts)
        total = _sum(total, (_load(one).times(weight / len(found)) for one in found))
    return total.times(tokens / total.tokens)


def facts_of(source: str, task: str, facts: Sequence[ExampleFacts]) -> list[ExampleFacts]:
    """Those whose mean a lesson is taken for: its own, or else its task's over other sources, or all that there are."""
    return (
        [one for one in facts if (one.source, one.task) == (source, task)]
        or [one for one in facts if one.task == task]
        or list(facts)
    )


def _load(one: ExampleFacts) -> Load:
    return Load(one.tokens, 1.0, one.pairs, one.pieces, one.seconds, one.read, one.learned)


def _sum(total: Load, loads: Iterable[Load]) -> Load:
    for load in loads:
        total = Load(
            total.tokens + load.tokens,
            total.examples + load.examples,
            total.pairs + load.pairs,
            total.pieces + load.pieces,
            total.seconds + load.seconds,
            _added(total.read, load.read),
            _added(total.learned, load.learned),
        )
    return total


def _added(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {kind: left.get(kind, 0.0) + right.get(kind, 0.0) for kind in sorted(left.keys() | right.keys())}
