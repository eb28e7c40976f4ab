"""Slots that ask about numbers: a question about a row with its answer, a series with a step that is out of line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries, fit_scale
from openm6.tasks.slots import YES_NO, Columns, Past, observed
from openm6.tasks.task import Record, Scene, Slot

ASK_ABOVE = {"en": "Is the {column} above {bound}?", "zh": "{column}大于{bound}吗？"}
PLACE = {"en": "step {place}", "zh": "第{place}步"}
NOWHERE = {"en": "none", "zh": "无"}
SPIKE = 6.0  # spreads of the series by which the step out of line is moved
MARGIN = (0.1, 0.5)  # a bound is off the value by this share of its column's largest number


@dataclass(frozen=True)
class RowAnswer(Slot):
    """Yes or no: whether a drawn column lies above a drawn bound."""

    def present(self, record: Record, language: str) -> bool:
        return bool(observed(record))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        if "bound" not in scene.shared:
            seen, rng = observed(record), scene.rng
            name = sorted(seen)[int(rng.integers(len(seen)))]
            above = bool(rng.random() < 0.5)
            size = max(abs(seen[name]), 1.0) * float(rng.uniform(*MARGIN))
            bound = float(f"{seen[name] + (-size if above else size):.3g}")
            scene.shared.update({"column": name, "bound": bound, "above": above})
        return [Part("text", YES_NO[scene.language][int(scene.shared["above"])])]

    def key(self, record: Record, scene: Scene) -> str:
        return str(scene.shared["above"])


@dataclass(frozen=True)
class RowQuestion(Slot):
    """The question that `RowAnswer` answers."""

    def present(self, record: Record, language: str) -> bool:
        return True

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        column, bound = scene.shared["column"].replace("_", " "), scene.shared["bound"]
        return [Part("text", ASK_ABOVE[scene.language].format(column=column, bound=f"{bound:g}"))]


@dataclass(frozen=True)
class WholeRow(Columns):
    """All columns of the record: nothing is held back."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("numbers", dict(record["numbers"]))]


@dataclass(frozen=True)
class SpikePlace(Slot):
    """The step of the series that is out of line, counted from 1, or none; drawn, half of the time each."""

    def present(self, record: Record, language: str) -> bool:
        return any(len(values) >= 8 for values in (record.get("series") or {}).values())

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        place = spiked(record, scene)[1]
        words = NOWHERE if place is None else PLACE
        return [Part("text", words[scene.language].format(place=place))]

    def key(self, record: Record, scene: Scene) -> str:
        return str(spiked(record, scene)[1])


@dataclass(frozen=True)
class SpikedSeries(Past):
    """The series with that step moved out of line."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("numbers", spiked(record, scene)[0])]


def spiked(record: Record, scene: Scene) -> tuple[NumberSeries, int | None]:
    """The series of an example and its step out of line, drawn once."""
    if "spiked" not in scene.shared:
        long = {name: values for name, values in record["series"].items() if len(values) >= 8}
        name = sorted(long)[int(scene.rng.integers(len(long)))]
        values = list(long[name])
        place = None
        if scene.rng.random() < 0.5:
            place = int(scene.rng.integers(len(values)))
            seen = np.asarray([np.nan if value is None else value for value in values], float)
            centre, spread = fit_scale(seen)
            sign = 1 if scene.rng.random() < 0.5 else -1
            old = values[place]
            values[place] = (centre if old is None else old) + sign * SPIKE * spread
            place += 1
        scene.shared["spiked"] = NumberSeries(name, values), place
    return scene.shared["spiked"]
