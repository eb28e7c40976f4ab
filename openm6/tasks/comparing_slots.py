"""Slots of tasks that compare: a text or a sound that may be another record's, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from openm6.modalities.interface import Part
from openm6.tasks.slots import YES_NO, Sound, Text, as_text, localised
from openm6.tasks.task import Record, Scene, Slot


@dataclass(frozen=True)
class MaybeText(Text):
    """The record's own text or, half the time, another one of `others`: the pair to match."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language))
        others = [
            other for other in record.get("others", ()) if other.get(scene.language) not in (None, text)
        ]
        fits = not others or bool(scene.rng.random() < 0.5)
        scene.shared["fits"] = fits
        if not fits:
            text = others[int(scene.rng.integers(len(others)))][scene.language]
        return [Part("text", text)]


@dataclass(frozen=True)
class MaybeSound(Sound):
    """The record's own sound or, half the time, that of another one with another label."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        others = [
            other["audio"]
            for other in record.get("others", ())
            if other.get("audio") and other.get("label") != record.get("label")
        ]
        fits = not others or bool(scene.rng.random() < 0.5)
        scene.shared["fits"] = fits
        chosen = record["audio"] if fits else others[int(scene.rng.integers(len(others)))]
        return [Part("sound", chosen)]


@dataclass(frozen=True)
class Fits(Slot):
    """Yes or no, in the example's language: whether what a `MaybeText` or `MaybeSound` shows is the record's own."""

    shown: Slot

    def present(self, record: Record, language: str) -> bool:
        return self.shown.present(record, language)

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        if "shown" not in scene.shared:
            scene.shared["shown"] = self.shown.parts(record, scene)
        return [Part("text", YES_NO[scene.language][int(scene.shared["fits"])])]

    def key(self, record: Record, scene: Scene) -> str:
        return str(scene.shared["fits"])


@dataclass(frozen=True)
class Shown(Slot):
    """What the wanted `Fits` has drawn."""

    def present(self, record: Record, language: str) -> bool:
        return True

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return scene.shared["shown"]
