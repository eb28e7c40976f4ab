"""English and Chinese names of things, mostly of Unicode's CLDR."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.mini.corpus import Part, Row, identity, split_of
from tools.mini.packages import Packages

CLDR = Path("usr", "share", "unicode", "cldr", "common")
# Group of names: the files below the CLDR and the element that holds them.
GROUPS = {
    "country": ("main", "territory"),
    "language": ("main", "language"),
    "script": ("main", "script"),
    "province": ("subdivisions", "subdivision"),
}
# Names in the atlas -> names of the CLDR.
ATLAS = {
    "United States of America": "United States", "Dem. Rep. Congo": "Congo - Kinshasa", "Congo": "Congo - Brazzaville",
    "Dominican Rep.": "Dominican Republic", "Central African Rep.": "Central African Republic", "Turkey": "Türkiye",
    "Eq. Guinea": "Equatorial Guinea", "S. Sudan": "South Sudan", "Czechia": "Czechia", "Macedonia": "North Macedonia",
    "Bosnia and Herz.": "Bosnia & Herzegovina", "Myanmar": "Myanmar (Burma)", "Solomon Is.": "Solomon Islands",
    "W. Sahara": "Western Sahara", "eSwatini": "Eswatini", "Trinidad and Tobago": "Trinidad & Tobago",
    "Antigua and Barb.": "Antigua & Barbuda", "St. Kitts and Nevis": "St. Kitts & Nevis",
    "Côte d'Ivoire": "Côte d’Ivoire", "St. Vin. and Gren.": "St. Vincent & Grenadines", "Macao": "Macao SAR China",
    "Palestine": "Palestinian Territories",
    "São Tomé and Principe": "São Tomé & Príncipe", "Hong Kong": "Hong Kong SAR China", "Cayman Is.": "Cayman Islands",
    "Faeroe Is.": "Faroe Islands", "Fr. Polynesia": "French Polynesia", "Falkland Is.": "Falkland Islands",
    "Turks and Caicos Is.": "Turks & Caicos Islands", "British Virgin Is.": "British Virgin Islands",
    "U.S. Virgin Is.": "U.S. Virgin Islands", "Cook Is.": "Cook Islands", "Marshall Is.": "Marshall Islands",
    "N. Mariana Is.": "Northern Mariana Islands", "Wallis and Futuna Is.": "Wallis & Futuna",
    "St. Pierre and Miquelon": "St. Pierre & Miquelon", "Vatican": "Vatican City",
}  # fmt: skip
NUMBERS = frozenset(("one", "two", "three", "four", "five", "six", "seven"))
SHOWING = frozenset(("number", "numeric", "dice", "key", "level", "hour", "hours", "clock", "rating", "grid"))
WORD = re.compile(r"[^\W_]+(?:'[a-z]+)?")


def plain_words(text: str) -> list[str]:
    """Words in lower case, without accents and marks."""
    letters = unicodedata.normalize("NFKD", text.replace("’", "'"))
    return WORD.findall("".join(letter for letter in letters if not unicodedata.combining(letter)).lower())


def english_name(slug: str, numbered: bool = False) -> str:
    """The name of an icon: its words, without a number of the drawing at the end or an article before them.

    A set that is `numbered` writes such numbers as words, too. What shows a number keeps it.
    """
    words = [word for word in re.split(r"[-_ ]+", slug.lower()) if word]
    while len(words) > 1 and (words[-1].isdigit() or (numbered and words[-1] in NUMBERS)):
        if SHOWING & set(words):
            break
        words.pop()
    return " ".join(words[1:] if len(words) > 1 and words[0] == "a" and len(words[1]) > 1 else words)


def single_nouns(packages: Packages) -> frozenset[str]:
    """The nouns of WordNet of three or more letters that are one word."""
    file = packages.folder("wordnet") / "usr" / "share" / "wordnet" / "index.noun"
    lines = file.read_text(encoding="latin-1").splitlines()
    words = (line.split(" ", 1)[0] for line in lines if not line.startswith(" "))
    return frozenset(word for word in words if len(word) > 2 and "_" not in word)


def emoji_data(packages: Packages) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The emoji with their names and keywords in English, and in Chinese."""
    root = packages.folder("emojibase")
    english, chinese = (json.loads((root / name / "data.json").read_text(encoding="utf-8")) for name in ("en", "zh"))
    return english, chinese


@functools.lru_cache(2)
def _annotations(root: Path, language: str) -> dict[str, str]:
    names = {}
    for folder in ("annotations", "annotationsDerived"):
        for element in _elements(root / folder / f"{language}.xml", "annotation"):
            if element.get("type") == "tts" and element.text:
                names[element.get("cp", "")] = element.text
    return names


def _elements(file: Path, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.parse(file).getroot().iter(tag)) if file.is_file() else []


class Names:
    """Chinese names of English ones."""

    def __init__(self, packages: Packages) -> None:
        self.root = packages.folder("cldr") / CLDR
        self.territories = dict(self.pairs("country"))
        self._chinese = self._emoji(packages)

    def _emoji(self, packages: Packages) -> dict[str, str]:
        """Names of emoji."""
        english, chinese = emoji_data(packages)
        labels = {entry["hexcode"]: entry["label"] for entry in chinese}
        return {
            " ".join(plain_words(entry["label"])): labels[entry["hexcode"]]
            for entry in english
            if entry["hexcode"] in labels and ":" not in entry["label"]
        }

    def chinese(self, name: str) -> str | None:
        """The Chinese name of a thing, such as an icon shows."""
        key = " ".join(plain_words(name))
        return self._chinese.get(key)

    def territory(self, name: str) -> tuple[str, str] | None:
        """The English and the Chinese name of a country of the atlas."""
        english = ATLAS.get(name, name)
        return (english, self.territories[english]) if english in self.territories else None

    def pairs(self, group: str) -> Iterator[tuple[str, str]]:
        """English and Chinese names of a group, of everything that has both."""
        folder, tag = GROUPS[group]
        english, chinese = (self._codes(folder, tag, language) for language in ("en", "zh"))
        for code, name in english.items():
            if code in chinese and code not in ("ZZ", "QO", "001") and chinese[code] != name:
                yield name, chinese[code]

    def _codes(self, folder: str, tag: str, language: str) -> dict[str, str]:
        elements = _elements(self.root / folder / f"{language}.xml", tag)
        plain = (element for element in elements if not element.get("alt"))
        return {element.get("type", ""): element.text for element in plain if element.text}

    def cities(self) -> dict[str, str]:
        """Chinese names of the cities of the time zones."""
        found: dict[str, dict[str, str]] = {"en": {}, "zh": {}}
        for language, names in found.items():
            for zone in _elements(self.root / "main" / f"{language}.xml", "zone"):
                city = zone.find("exemplarCity")
                if city is not None and city.text:
                    names[zone.get("type", "")] = city.text
        # A zone without an English name has that of its code.
        codes = {zone: zone.rsplit("/", 1)[-1].replace("_", " ") for zone in found["zh"] if "Unknown" not in zone}
        return {found["en"].get(zone, name): found["zh"][zone] for zone, name in codes.items()}

    def currencies(self) -> dict[str, tuple[str, str]]:
        """Code -> English and Chinese name of a currency."""
        names = []
        for language in ("en", "zh"):
            elements = _elements(self.root / "main" / f"{language}.xml", "currency")
            found = {element.get("type", ""): element.find("displayName") for element in elements}
            names.append({code: name.text for code, name in found.items() if name is not None and name.text})
        return {code: (names[0][code], names[1][code]) for code in names[0] if code in names[1]}


def dictionary(packages: Packages) -> Iterator[Row]:
    """Names in both languages: of emoji and of countries, languages, scripts, provinces, cities and currencies."""
    names = Names(packages)
    groups: list[tuple[str, list[tuple[str, str]]]] = [(group, sorted(names.pairs(group))) for group in GROUPS]
    groups += [("city", sorted(names.cities().items())), ("currency", sorted(names.currencies().values()))]
    symbols = [_annotations(names.root, language) for language in ("en", "zh")]
    groups.append(("symbol", sorted((symbols[0][mark], symbols[1][mark]) for mark in symbols[0] if mark in symbols[1])))
    done = set()
    for group, pairs in groups:
        for english, chinese in pairs:
            if english == chinese or (group, english) in done or len(english) > 60:
                continue
            done.add((group, english))
            yield {
                "id": f"name/{group}/{english}",
                **identity("cldr"),
                "split": split_of("name", english, test=0.05, validation=0.01),
                "label": english,
                "label_zh": chinese,
                "text_en": english,
                "text_zh": chinese,
                "categories": {"group": group},
            }


PARTS = {"dictionary": Part(dictionary, ("cldr", "emojibase"))}
