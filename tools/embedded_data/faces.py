"""Faces in pixel art by DiceBear: what draws one is its caption. No test combination of hair and colours is trained."""

from __future__ import annotations

import json
from pathlib import Path

from embedded_data.tables import Row
from tools.mini.avatars import FAMILIES, WHITE, caption
from tools.mini.corpus import split_of
from tools.mini.images import exported
from tools.mini.packages import PACKAGES, Packages
from tools.mini.raster import SIDE, png, svg_image

FAMILY, COUNT = "pixel-art", 9000  # draws, of which all 864 faces come out
SHAPES = {
    "hair": ["short17", "long13"], "mouth": ["happy09", "sad01"], "eyes": ["variant09"], "clothing": ["variant03"],
    "glasses": ["light05"], "glassesColor": ["323232"], "glassesProbability": 50, "eyesColor": ["5b7c8b"],
    "mouthColor": ["de0f0d"],
    "hatProbability": 0, "beardProbability": 0, "accessoriesProbability": 0,
}  # fmt: skip


def avatars(cache: Path) -> list[Row]:
    """One shape for each word, so that a caption says all that there is to draw."""
    packages = Packages(cache)
    packages.import_requirements()
    family = FAMILIES[FAMILY]
    colours = {name: family.options[name] for name in ("hairColor", "skinColor", "clothingColor")}
    options = json.dumps({**WHITE, **colours, **SHAPES})
    rows: dict[str, Row] = {}
    for drawn in exported(packages, ["dicebear", *FAMILIES], "avatars", FAMILY, str(COUNT), options):
        words = family.attributes(drawn["options"])
        english, chinese = map(str.removesuffix, caption(family, words), (f", {family.name[0]}", f"，{family.name[1]}"))
        if english not in rows:
            rows[english] = {
                "id": f"avatar/{drawn['index']}",
                "source": PACKAGES[FAMILY].source,
                "license": PACKAGES[FAMILY].license,
                "split": split_of(FAMILY, *(words[name][0] for name in family.combined), validation=0.0),
                "kind": "image_text",
                "image": png(svg_image(drawn["svg"])),
                "image_w": SIDE,
                "image_h": SIDE,
                "text_en": english,
                "text_zh": chinese,
            }
    return list(rows.values())
