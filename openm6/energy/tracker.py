"""Where a run's joules went: by source, stage, modality and task, and what belongs to no step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from pydantic import TypeAdapter


class WorkCount(NamedTuple):
    """The part of one modality or task in a step: its tokens, and the floating-point operations that they took."""

    tokens: int
    operations: float


Work = Mapping[str, Mapping[str, WorkCount]]
"""`modality` or `task` -> its name -> its part of a step."""


@dataclass
class EnergyUse:
    joules: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, joules: float, tokens: int, seconds: float) -> None:
        self.joules += joules
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class EnergyTracker:
    """The energy use of a run.

    A step's joules go to its stage as a whole, and to modalities and tasks in proportion to the operations that their
    tokens took in it (`WorkCount.operations`). `between`: joules while no step ran (waiting, evaluating, saving).
    `repeated`: joules of steps that a crash lost and that were repeated. All add up to `joules`.
    """

    by_source: dict[str, float] = field(default_factory=dict)
    stages: dict[str, EnergyUse] = field(default_factory=dict)
    modalities: dict[str, EnergyUse] = field(default_factory=dict)
    tasks: dict[str, EnergyUse] = field(default_factory=dict)
    between: float = 0.0
    repeated: float = 0.0

    @property
    def joules(self) -> float:
        return sum(self.by_source.values())

    @property
    def source(self) -> str:
        """The sources joined by `+`, from the best to the least."""
        return "+".join(self.by_source)

    @property
    def in_steps(self) -> float:
        return sum(use.joules for use in self.stages.values())

    @property
    def tokens(self) -> int:
        return sum(use.tokens for use in self.stages.values())

    def add_step(self, stage: str, joules: float, tokens: int, seconds: float, work: Work) -> None:
        """Add one step; names of `work` without tokens are left out."""
        self.stages.setdefault(stage, EnergyUse()).add(joules, tokens, seconds)
        for kind, uses in (("modality", self.modalities), ("task", self.tasks)):
            counts = {name: count for name, count in work.get(kind, {}).items() if count.tokens}
            total = sum(count.operations for count in counts.values())
            for name, count in counts.items():
                part = count.operations / total if total > 0 else 0.0
                uses.setdefault(name, EnergyUse()).add(joules * part, count.tokens, seconds * part)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EnergyTracker:
        return TypeAdapter(cls).validate_python(values)
