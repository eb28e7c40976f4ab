"""Avatars of three families of DiceBear: the options that draw them are their captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tools.mini.corpus import Part, Row, identity, split_of
from tools.mini.images import exported
from tools.mini.packages import Packages
from tools.mini.raster import png, svg_image

COUNT = 6000  # of each family
Words = tuple[str, str]
Options = dict[str, Any]
Attributes = dict[str, Words]
"""Attribute -> its English and its Chinese word; one that an avatar lacks is absent."""

# Colour codes of an option -> word. Few and far apart: a caption must be right to the eye.
HAIR_COLOURS = {
    "cab188": ("blond", "金色"), "6f4420": ("brown", "棕色"), "28150a": ("black", "黑色"), "009bbd": ("blue", "蓝色"),
    "bd1700": ("red", "红色"), "91cb15": ("green", "绿色"),
}  # fmt: skip
SKINS = {"ffdbac": ("light", "浅色"), "cb9e6e": ("tan", "棕褐色"), "8d5524": ("dark", "深色")}
SHIRTS = {
    "428bca": ("blue", "蓝色"), "44c585": ("green", "绿色"), "d11141": ("red", "红色"), "ffd969": ("yellow", "黄色"),
    "f79ac0": ("pink", "粉色"), "8a8f98": ("grey", "灰色"),
}  # fmt: skip
HATS = {
    "2663a3": ("blue", "蓝色"), "3d8a6b": ("green", "绿色"), "a62116": ("red", "红色"), "614f8a": ("purple", "紫色"),
}  # fmt: skip
WHITE = {"backgroundColor": ["ffffff"]}

LORELEI_HAIR = {
    ("short", "短发"): (1, 2, 3, 6, 7, 8, 11, 12, 28, 37, 43, 47),
    ("spiky", "刺猬头"): (4, 20, 27),
    ("curly", "卷发"): (5, 9, 22, 24, 39),
    ("chin-length", "齐肩发"): (10, 13, 17, 18, 19, 29, 30, 32, 48),
    ("long", "长发"): (15, 16, 21, 23, 35, 40, 41),
    ("pinned-up", "盘发"): (14, 26, 36, 38, 46),
    ("ponytail", "马尾"): (31, 33, 42),
}
# Of 23 and 27 mouths, those whose mood can be seen at 64 pixels.
PIXEL_MOUTHS = ["happy06", "happy09", "happy12", "sad01", "sad08", "sad09"]
LORELEI_MOUTHS = ["happy05", "happy07", "happy12", "sad01", "sad05", "sad06"]
PEEPS_HEADS: dict[Words, tuple[str, ...]] = {
    ("an afro", "爆炸头"): ("afro", "longAfro"),
    ("braids", "辫子"): ("cornrows", "cornrows2"),
    ("a bun", "发髻"): ("bun", "bun2"),
    ("dreadlocks", "脏辫"): ("dreads1", "dreads2"),
    ("a flat top", "平头"): ("flatTop", "flatTopLong"),
    ("a beanie", "毛线帽"): ("hatBeanie",),
    ("a hat", "礼帽"): ("hatHip",),
    ("a headscarf", "头巾"): ("hijab",),
    ("a turban", "缠头巾"): ("turban",),
    ("long hair", "长发"): ("long", "longBangs", "longCurly"),
    ("shoulder-length hair", "齐肩发"): ("medium2", "medium3", "mediumBangs", "mediumBangs3", "mediumStraight"),
    ("short hair", "短发"): ("short1", "short2", "short3", "short5", "pomp", "shaved2"),
    ("a bald head", "光头"): ("noHair1", "noHair2"),
}
PEEPS_FACES: dict[Words, tuple[str, ...]] = {
    ("happy", "开心"): ("smile", "smileBig", "smileLOL", "smileTeethGap", "cute", "lovingGrin1"),
    ("calm", "平静"): ("calm", "blank", "serious"),
    ("angry", "生气"): ("rage", "veryAngry", "angryWithFang"),
    ("worried", "担心"): ("concerned", "concernedFear", "fear"),
    ("surprised", "惊讶"): ("awe",),
}
PEEPS_SHIRTS = {
    "e78276": ("red", "红色"), "fdea6b": ("yellow", "黄色"), "78e185": ("green", "绿色"), "8fa7df": ("blue", "蓝色"),
    "e279c7": ("pink", "粉色"),
}  # fmt: skip
PEEPS_SKINS = {"ffdbb4": ("light", "浅色"), "d08b5b": ("tan", "棕褐色"), "694d3d": ("dark", "深色")}
PEEPS_BEARDS: dict[Words, tuple[str, ...]] = {
    ("a beard", "络腮胡"): ("full", "full2", "full3", "full4"),
    ("a moustache", "小胡子"): ("moustache1", "moustache2", "moustache3", "moustache4", "moustache5"),
}
PEEPS_GLASSES: dict[Words, tuple[str, ...]] = {
    ("glasses", "眼镜"): ("glasses", "glasses2", "glasses3", "glasses4", "glasses5"),
    ("sunglasses", "墨镜"): ("sunglasses", "sunglasses2"),
    ("an eyepatch", "眼罩"): ("eyepatch",),
}


@dataclass(frozen=True)
class Family:
    """A family of avatars: options to draw from, attributes of those that were drawn, and the words of a caption."""

    name: Words
    options: Options
    attributes: Callable[[Options], Attributes]
    # No combination of these that is tested is trained.
    combined: tuple[str, ...]


def _group(groups: dict[Words, tuple[str, ...]], option: str) -> Words:
    return next(words for words, options in groups.items() if option in options)


def _all(groups: dict[Words, tuple[str, ...]]) -> list[str]:
    return [option for options in groups.values() for option in options]


def _colour(colours: dict[str, Words], code: str) -> Words:
    return colours[code.removeprefix("#")]


def _mood(mouth: str) -> Words:
    return ("happy", "开心") if mouth.startswith("happy") else ("sad", "难过")


def _pixel_art(options: Options) -> Attributes:
    long = options["hair"].startswith("long")
    found = {
        "mood": _mood(options["mouth"]),
        "hair": ("long", "长发") if long else ("short", "短发"),
        "hair colour": _colour(HAIR_COLOURS, options["hairColor"]),
        "skin": _colour(SKINS, options["skinColor"]),
        "shirt": _colour(SHIRTS, options["clothingColor"]),
    }
    if options.get("glasses"):
        found["glasses"] = ("dark glasses", "墨镜") if options["glasses"].startswith("dark") else ("glasses", "眼镜")
    if options.get("hat"):
        english, chinese = _colour(HATS, options["hatColor"])
        found["hat"] = (f"a {english} hat", f"{chinese}帽子")
    if options.get("beard"):
        found["beard"] = ("a beard", "胡子")
    return found


def _lorelei(options: Options) -> Attributes:
    found = {
        "mood": _mood(options["mouth"]),
        "hair": next(words for words, kinds in LORELEI_HAIR.items() if int(options["hair"][-2:]) in kinds),
        "hair colour": _colour(HAIR_COLOURS, options["hairColor"]),
        "skin": _colour(SKINS, options["skinColor"]),
    }
    present = {
        "glasses": ("glasses", "眼镜"), "beard": ("a beard", "胡子"), "earrings": ("earrings", "耳环"),
        "hairAccessories": ("flowers", "花朵"),
    }  # fmt: skip
    return found | {name: words for name, words in present.items() if options.get(name)}


def _open_peeps(options: Options) -> Attributes:
    found = {
        "mood": _group(PEEPS_FACES, options["face"]),
        "head": _group(PEEPS_HEADS, options["head"]),
        "skin": _colour(PEEPS_SKINS, options["skinColor"]),
        "shirt": _colour(PEEPS_SHIRTS, options["clothingColor"]),
    }
    if options.get("facialHair"):
        found["beard"] = _group(PEEPS_BEARDS, options["facialHair"])
    if options.get("accessories"):
        found["glasses"] = _group(PEEPS_GLASSES, options["accessories"])
    return found


FAMILIES = {
    "pixel-art": Family(
        ("pixel art", "像素画"),
        {
            **WHITE, "mouth": PIXEL_MOUTHS, "hairColor": list(HAIR_COLOURS), "skinColor": list(SKINS),
            "clothingColor": list(SHIRTS), "hatColor": list(HATS), "glassesProbability": 40, "hatProbability": 25,
            "beardProbability": 25,
        },
        _pixel_art,
        ("hair", "hair colour", "shirt"),
    ),
    "lorelei": Family(
        ("sketch", "手绘"),
        {
            **WHITE, "mouth": LORELEI_MOUTHS,
            "hair": [f"variant{kind:02}" for kinds in LORELEI_HAIR.values() for kind in kinds],
            "hairColor": list(HAIR_COLOURS), "skinColor": list(SKINS), "hairAccessoriesColor": ["e8508c"],
            "earringsColor": ["d19a00"], "glassesProbability": 30, "beardProbability": 20, "earringsProbability": 25,
            "hairAccessoriesProbability": 20, "frecklesProbability": 0,
        },
        _lorelei,
        ("hair", "hair colour", "skin"),
    ),
    "open-peeps": Family(
        ("cartoon", "卡通"),
        {
            **WHITE, "head": _all(PEEPS_HEADS), "face": _all(PEEPS_FACES), "skinColor": list(PEEPS_SKINS),
            "clothingColor": list(PEEPS_SHIRTS), "facialHair": _all(PEEPS_BEARDS), "facialHairProbability": 25,
            "accessories": _all(PEEPS_GLASSES), "accessoriesProbability": 35, "maskProbability": 0,
            "headContrastColor": ["2c1b18"],
        },
        _open_peeps,
        ("head", "shirt", "skin"),
    ),
}  # fmt: skip


def caption(family: Family, attributes: Attributes) -> Words:
    """The attributes as a sentence in English and in Chinese."""
    english, chinese = ({name: words[side] for name, words in attributes.items()} for side in (0, 1))
    article = "an" if english["mood"][0] == "a" else "a"
    with_, has = [f"{english['skin']} skin"], [f"{chinese['skin']}皮肤"]
    if "head" in english:
        with_.append(english["head"])
        has.append(chinese["head"])
    else:
        hair = english["hair"] if english["hair"] == "ponytail" else f"{english['hair']} hair"
        colour = english["hair colour"]
        with_.append(f"a {colour} ponytail" if hair == "ponytail" else hair.replace(" hair", f" {colour} hair"))
        has.append(f"{chinese['hair colour']}{chinese['hair']}")
    if "shirt" in english:
        with_.append(f"a {english['shirt']} shirt")
        has.append(f"{chinese['shirt']}上衣")
    rest = [name for name in ("glasses", "hat", "beard", "earrings", "hairAccessories") if name in english]
    with_ += [english[name] for name in rest]
    has += [chinese[name] for name in rest]
    listed = f"{', '.join(with_[:-1])} and {with_[-1]}"
    return (
        f"{article} {english['mood']} face with {listed}, {family.name[0]}",
        f"{chinese['mood']}的脸，{'，'.join(has)}，{family.name[1]}",
    )


def avatars(packages: Packages) -> Iterator[Row]:
    """Avatars of all families; a tenth of the combinations of hair, colours and skin are only tested."""
    for key, family in FAMILIES.items():
        keys, options = ["dicebear", *FAMILIES], json.dumps(family.options)
        for drawn in exported(packages, keys, "avatars", key, str(COUNT), options):
            attributes = family.attributes(drawn["options"])
            english, chinese = caption(family, attributes)
            yield {
                "id": f"avatar/{key}/{drawn['index']}",
                **identity(key),
                "split": split_of(key, *(attributes[name][0] for name in family.combined)),
                "image": png(svg_image(drawn["svg"])),
                "text_en": english,
                "text_zh": chinese,
                "categories": {"style": family.name[0]} | {name: words[0] for name, words in attributes.items()},
            }


PARTS = {"avatars": Part(avatars, ("dicebear", *FAMILIES))}
