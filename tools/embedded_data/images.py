"""Emoji, flags of countries and handwritten digits."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.own_data.packages import Package
from embedded_data.tables import Row, split_of
from tools.mini.packages import PACKAGES, Packages

NOTO, EMOJIBASE = (PACKAGES[key].source for key in ("noto", "emojibase"))
COUNTRIES = Package(
    "npm", "world-countries", "5.1.0", "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495"
)
LEFT_OUT = ("BES",)  # its Chinese name is given in traditional characters only
COUNTRY_NUMBERS = ["latitude", "longitude", "area_km2", "land_neighbours", "languages"]
DIGITS_EN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS_ZH = "零一二三四五六七八九"
DIGIT_SIDE = 32


def emoji(cache: Path) -> list[Row]:
    """Emoji with English and Chinese names and keywords; flags of countries are a set of their own."""
    images = {_bare(path.stem): path for path in _noto(cache).iterdir()}
    words = Packages(cache).folder("emojibase")
    chinese = {entry["hexcode"]: entry for entry in _json(words / "zh" / "data.json")}
    headings = _json(words / "en" / "messages.json")
    groups = {group["order"]: group["key"] for group in headings["groups"]}
    flags = {part["order"] for part in headings["subgroups"] if part["key"] in ("country-flag", "subdivision-flag")}
    rows = []
    for entry in sorted(_json(words / "en" / "data.json"), key=lambda entry: entry.get("order", 0)):
        code = entry["hexcode"]
        image = images.get(_bare(code))
        if "group" not in entry or entry["subgroup"] in flags or code not in chinese or image is None:
            continue
        rows.append(
            {
                "id": f"emoji/{code}",
                "source": f"{NOTO}+{EMOJIBASE.removeprefix('npm:')}",
                "license": "Apache-2.0 (Noto Emoji images); MIT (emojibase-data text; CLDR: Unicode-3.0)",
                "split": split_of(code),
                "kind": "image_text",
                **_image(on_white(image)),
                "text_en": entry["label"],
                "text_zh": chinese[code]["label"],
                "tags_en": entry.get("tags"),
                "tags_zh": chinese[code].get("tags"),
                "label": groups[entry["group"]],
                "extra": json.dumps({"emoji": entry["emoji"]}, ensure_ascii=False),
            }
        )
    return rows


def countries(cache: Path) -> list[Row]:
    """Countries: flag, names, capital, region and five numbers."""
    images = _noto(cache)
    rows = []
    for country in _json(Packages(cache).folder(COUNTRIES) / "countries.json"):
        letters = "-".join(f"{0x1F1E6 + ord(letter) - ord('A'):x}" for letter in country["cca2"])
        if (images / f"{letters}.png").is_file() and country["cca3"] not in LEFT_OUT:
            rows.append(_country(country, images / f"{letters}.png"))
    return rows


def _country(country: dict[str, Any], image: Path) -> Row:
    name, chinese = country["name"]["common"], country["translations"]["zho"]["common"]
    capital = ", ".join(country["capital"]) or "none"
    region = country["subregion"] or country["region"]
    numbers = [*country["latlng"], country["area"], len(country["borders"]), len(country["languages"])]
    return {
        "id": f"country/{country['cca3']}",
        "source": f"npm:{COUNTRIES.name}@{COUNTRIES.version}+{NOTO}",
        "license": "ODbL-1.0 (facts); Apache-2.0 (Noto flag images)",
        "split": split_of(country["cca3"]),
        "kind": "image_text_numbers",
        **_image(on_white(image)),
        "text_en": f"The flag of {name}. Capital: {capital}. Region: {region}.",
        "text_zh": f"{chinese}的国旗。",
        "tags_en": [part for part in (country["region"], country["subregion"]) if part],
        "label": name,
        "label_zh": chinese,
        "num_names": COUNTRY_NUMBERS,
        "num_values": [float(number) for number in numbers],
    }


def digits(cache: Path) -> list[Row]:
    """Handwritten digits of scikit-learn, 8×8 grey levels enlarged to 32×32, white on black; a tenth for tests."""
    data = load_digits()
    rows = [
        _digit(number, grey, int(digit))
        for number, (grey, digit) in enumerate(zip(data.images, data.target, strict=True))
    ]
    for digit in range(10):
        alike = sorted((row for row in rows if row["label_id"] == digit), key=lambda row: _hash(row["id"]))
        for index, row in enumerate(alike):
            row["split"] = "test" if index < round(len(alike) * 0.1) else "train"
    return rows


def _digit(number: int, grey: np.ndarray, digit: int) -> Row:
    image = Image.fromarray(np.round(grey * 255 / 16).astype(np.uint8))
    return {
        "id": f"digits/{number}",
        "source": f"pypi:scikit-learn@{sklearn.__version__} load_digits (UCI)",
        "license": "CC-BY-4.0 (UCI) / BSD-3-Clause (scikit-learn)",
        "kind": "image_text_numbers",
        **_image(image.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.LANCZOS)),
        "text_en": f"the digit {DIGITS_EN[digit]}",
        "text_zh": f"数字{DIGITS_ZH[digit]}",
        "label": DIGITS_EN[digit],
        "label_zh": DIGITS_ZH[digit],
        "label_id": digit,
        "num_names": ["digit"],
        "num_values": [float(digit)],
    }


def _noto(cache: Path) -> Path:
    return Packages(cache).folder("noto") / "img" / "google" / "64"


def _bare(code: str) -> str:
    """A code without the marks that only ask for a coloured image; the two packages differ in them."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def on_white(path: Path) -> Image.Image:
    """An image over white, reduced to 256 colours: a quarter of the bytes and no difference to the eye."""
    image = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").quantize(256)


def _image(image: Image.Image) -> Row:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return {"image": file.getvalue(), "image_w": image.width, "image_h": image.height}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode()).digest()


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
