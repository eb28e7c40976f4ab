"""Slots that make the pair to learn from one picture: its outline, its style after a reference, its background."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image as Pillow

from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.tasks.picture_styles import BACKGROUNDS, STYLES, blended, on_background, outlined
from openm6.tasks.slots import Picture
from openm6.tasks.task import Record, Scene, Slot

SIDE = 256  # larger pictures are shrunk before anything is done to them


def _small(raw: bytes) -> Pillow.Image:
    picture = read_image(raw)
    picture.thumbnail((SIDE, SIDE))
    return picture


def _file(picture: Pillow.Image) -> bytes:
    """As a file: what is remembered by its bytes is coded once."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _styles(scene: Scene) -> tuple[str, str]:
    """Two styles, drawn once for all slots of an example."""
    if "styles" not in scene.shared:
        names = sorted(STYLES)
        first, second = scene.rng.permutation(len(names))[:2]
        scene.shared["styles"] = names[int(first)], names[int(second)]
    return scene.shared["styles"]


def _reference(record: Record, number: int) -> bytes:
    """The picture of another record, or, where none came along, the record's own."""
    found = [other["image"] for other in record.get("others", ()) if other.get("image")]
    return found[number % len(found)] if found else record["image"]


class _Made(Picture):
    """A picture made from the record's; no two records make the same."""

    def key(self, record: Record, scene: Scene) -> str:
        return str(record.get("id"))


@dataclass(frozen=True)
class Outline(_Made):
    """The record's picture as lines."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("image", _file(outlined(_small(record["image"]))))]


@dataclass(frozen=True)
class Restyled(_Made):
    """The record's picture in the style of the `Reference`."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("image", _file(STYLES[_styles(scene)[0]](_small(record["image"]))))]


@dataclass(frozen=True)
class Reference(_Made):
    """Another record's picture in one of the example's two styles."""

    number: int = 0

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        style = STYLES[_styles(scene)[self.number]]
        return [Part("image", _file(style(_small(_reference(record, self.number)))))]


@dataclass(frozen=True)
class Mixed(_Made):
    """The record's picture half in the one, half in the other style."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        picture = _small(record["image"])
        first, second = (STYLES[name](picture) for name in _styles(scene))
        return [Part("image", _file(blended(first, second)))]


@dataclass(frozen=True)
class OnBackground(_Made):
    """The record's picture before a colour that is drawn."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        names = sorted(BACKGROUNDS)
        name = scene.shared.setdefault("background", names[int(scene.rng.integers(len(names)))])
        return [Part("image", _file(on_background(_small(record["image"]), BACKGROUNDS[name][1])))]


@dataclass(frozen=True)
class BackgroundName(Slot):
    """The colour that `OnBackground` has drawn, in the example's language."""

    def present(self, record: Record, language: str) -> bool:
        return True

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        name = scene.shared["background"]
        return [Part("text", name if scene.language == "en" else BACKGROUNDS[name][0])]
