"""What a run comes to take as it goes on: codes that it remembers, batches that differ, and saving."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from openm6.plan.examples import ExampleFacts, Lesson, Load, facts_of

# As they were found in the demo's run and in shorter ones of other sizes; a test run tells more than these can.
FIRST_STEPS = 16  # of a run that anchors a plan: what those take is in its sums
VARIETY = 0.10  # of a step's bytes, where it learns codes, for each time that a run is e times as long
ENTRY = 350  # bytes that a remembered array takes beside its own: its key, its object, its place in the order
GAPS = (
    0.5  # of a full memory at most: arrays of unlike lengths leave room that those in their place do not fill
)
SAVED = (
    0.0,
    1.5,
    2.5,
)  # copies of what other processes hold of the moments: before, at the first and at later saves


@dataclass(frozen=True)
class Growth:
    """Bytes that come within so many `steps`, by what brings them."""

    steps: float = 0.0
    remembered: float = 0.0
    varied: float = 0.0
    saving: float = 0.0

    @property
    def bytes(self) -> float:
        return self.remembered + self.varied + self.saving

    def __str__(self) -> str:
        parts = (
            (self.remembered, "for remembered codes"),
            (self.varied, "as batches differ"),
            (self.saving, "by saving"),
        )
        words = ", ".join(f"{bytes_ / 2**20:,.0f} MiB {cause}" for bytes_, cause in parts if bytes_ >= 2**19)
        return f"{self.bytes / 2**20:,.0f} MiB come in {self.steps:,.0f} steps: {words}" if words else ""


def remembered_bytes(
    lessons: Sequence[Lesson], facts: Sequence[ExampleFacts], memories: dict[str, float], draws: float
) -> float:
    """Of all memories after so many draws. memories: bytes that each holds at most."""
    wanted = dict.fromkeys(memories, 0.0)
    if draws <= 0:
        return 0.0
    for pool, filling in _fillings(lessons, facts, draws).items():
        share = pool.met(filling.visits, filling.files) / filling.visits
        wanted[pool.memory] += share * filling.bytes
    return sum(_held(bytes_, memories[name]) for name, bytes_ in wanted.items())


def saving_bytes(moments: float, processes: int, saves: float) -> float:
    """Of a checkpoint: the first process gathers the moments (bytes of all) that others hold, which they pack."""
    return SAVED[min(int(saves), 2)] * moments * (processes - 1) / processes


def varied_bytes(step: float, load: Load, steps: float) -> float:
    """Of steps of which each brings other shapes than the last; rows of text alone are all alike."""
    share = load.codes / max(1.0, load.codes + load.words)
    return VARIETY * step * share * math.log(max(1.0, steps / FIRST_STEPS))


@dataclass(frozen=True)
class _Pool:
    """What one source can leave in a memory: each of its files so many variants."""

    origin: str
    memory: str
    variants: int

    def met(self, visits: float, files: float) -> float:
        """Different arrays after so many visits: every file is met once an epoch, in one of its variants."""
        epochs = visits / files
        if epochs <= 1:
            return visits
        return files * self.variants * (1 - (1 - 1 / self.variants) ** epochs)


@dataclass
class _Filling:
    """How a pool was drawn from: visits, files that there are, and bytes of all arrays together."""

    visits: float = 0.0
    files: float = 0.0
    bytes: float = 0.0


def _fillings(
    lessons: Sequence[Lesson], facts: Sequence[ExampleFacts], draws: float
) -> dict[_Pool, _Filling]:
    """How each pool is drawn from. Of a lesson that was not counted every draw is taken for a new file."""
    found: dict[_Pool, _Filling] = defaultdict(_Filling)
    total = sum(weight for _, _, weight in lessons)
    for source, task, weight in lessons:
        alike = facts_of(source, task, facts)
        for one in alike:
            counted = (one.source, one.task) == (source, task)
            visits = draws * weight / total / len(alike)
            for memory, left in one.remembered.items():
                origin = left.origin if counted else source
                filling = found[_Pool(origin, memory, max(1, round(left.variants)))]
                filling.visits += visits
                filling.files = max(filling.files, left.files if counted else math.inf)
                filling.bytes += visits * (left.bytes + ENTRY)
    return found


def _held(wanted: float, limit: float) -> float:
    """Bytes of a memory to which so many were given."""
    return min(wanted, limit) + min(GAPS * limit, max(0.0, wanted - limit))
