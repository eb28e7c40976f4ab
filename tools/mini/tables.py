"""Tables with numbers to predict, and monthly and daily series to forecast."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from tools.mini.corpus import Part, Row, identity, split_of
from tools.mini.packages import Packages

# From this year on, countries and homes are only tested.
TEST_YEAR = {"gapminder": 2008, "homes": 2014}
MISSING = ("", "NA", "nan", "None")
Line = dict[str, str]


def _read(file: Path) -> list[Line]:
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def _plotnine(packages: Packages, name: str) -> list[Line]:
    return _read(packages.folder("plotnine") / "plotnine" / "data" / f"{name}.csv")


def _vega(packages: Packages, name: str) -> list[Line]:
    return _read(packages.folder("vega") / "data" / f"{name}.csv")


def _bokeh(packages: Packages, name: str) -> list[Line]:
    return _read(next(packages.folder("bokeh").rglob(f"_data/{name}")))


def _numbers(line: Line, names: dict[str, str]) -> dict[str, float]:
    """The numbers of a line, by their names in the corpus; those that are missing are absent."""
    return {ours: float(line[theirs]) for theirs, ours in names.items() if line[theirs] not in MISSING}


def _words(line: Line, names: dict[str, str]) -> dict[str, str]:
    return {ours: line[theirs] for theirs, ours in names.items() if line[theirs] not in MISSING}


def diamonds(packages: Packages) -> Iterator[Row]:
    """Diamonds with price, weight, size and grades; a tenth is tested."""
    names = {name: name for name in ("price", "carat", "depth", "table")} | {"x": "length", "y": "width", "z": "height"}
    for index, line in enumerate(_plotnine(packages, "diamonds")):
        yield {
            "id": f"diamond/{index}",
            **identity("plotnine"),
            "split": split_of("diamond", index),
            "numbers": _numbers(line, names),
            "categories": _words(line, {name: name for name in ("cut", "color", "clarity")}),
        }


def cars(packages: Packages) -> Iterator[Row]:
    """Cars with engine and consumption; those of a tenth of the models are tested."""
    numbers = {"displ": "displacement", "cyl": "cylinders", "year": "year", "cty": "city mpg", "hwy": "highway mpg"}
    words = {"manufacturer": "manufacturer", "class": "class", "drv": "drive", "trans": "transmission"}
    for index, line in enumerate(_plotnine(packages, "mpg")):
        yield {
            "id": f"car/{index}",
            **identity("plotnine"),
            "split": split_of("car", line["model"]),
            "text_en": f"{line['manufacturer']} {line['model']}",
            "numbers": _numbers(line, numbers),
            "categories": _words(line, words),
        }


def mammals(packages: Packages) -> Iterator[Row]:
    """Mammals with sleep, brain and body; a tenth is tested."""
    numbers = {"sleep_total": "hours of sleep", "brainwt": "brain in kg", "bodywt": "body in kg"}
    for line in _plotnine(packages, "msleep"):
        yield {
            "id": f"mammal/{line['name']}",
            **identity("plotnine"),
            "split": split_of("mammal", line["name"]),
            "text_en": line["name"].lower(),
            "numbers": _numbers(line, numbers),
            "categories": _words(line, {"order": "order", "vore": "food"}),
        }


def penguins(packages: Packages) -> Iterator[Row]:
    """Penguins with their measures; a tenth is tested."""
    file = packages.folder("vega") / "data" / "penguins.json"
    names = {"Beak Length (mm)": "beak length", "Beak Depth (mm)": "beak depth",
             "Flipper Length (mm)": "flipper length", "Body Mass (g)": "body mass"}  # fmt: skip
    for index, entry in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        numbers = {ours: float(entry[theirs]) for theirs, ours in names.items() if entry[theirs] is not None}
        if numbers:
            yield {
                "id": f"penguin/{index}",
                **identity("vega"),
                "split": split_of("penguin", index),
                "label": entry["Species"],
                "numbers": numbers,
                "categories": {"species": entry["Species"], "island": entry["Island"]}
                | ({"sex": entry["Sex"].lower()} if entry["Sex"] in ("MALE", "FEMALE") else {}),
            }


def homes(packages: Packages) -> Iterator[Row]:
    """Sales of homes in Texas by city and month; a tenth of the cities and all later years are tested."""
    names = {name: name for name in ("year", "month", "sales", "volume", "median", "listings", "inventory")}
    for line in _plotnine(packages, "txhousing"):
        later = int(line["year"]) >= TEST_YEAR["homes"]
        numbers = _numbers(line, names)
        if "median" in numbers:
            yield {
                "id": f"homes/{line['city']}/{line['year']}/{line['month']}",
                **identity("plotnine"),
                "split": "test" if later else split_of("homes", line["city"]),
                "text_en": f"homes in {line['city']}",
                "numbers": numbers,
            }


def lives(packages: Packages) -> Iterator[Row]:
    """Fertility, life expectancy and people of countries by year; later years are only tested."""
    names = {
        "year": "year",
        "fertility": "children per woman",
        "life_expectancy": "life expectancy",
        "population": "people",
    }
    for line in _bokeh(packages, "gapminder.csv.gz"):
        later = int(line["year"]) >= TEST_YEAR["gapminder"]
        numbers = _numbers(line, names)
        if len(numbers) == len(names):
            yield {
                "id": f"life/{line['country']}/{line['year']}",
                **identity("bokeh"),
                "split": "test" if later else split_of("life", line["country"], line["year"], test=0.0),
                "text_en": line["country"],
                "numbers": numbers,
            }


def _series(column: str, package: str, name: str, points: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """A row for each time of a series; the source of kind `windows` tests the last ones.

    Monthly and daily values have columns of their own, as what a column has in common is its season.
    """
    for time, value in points:
        if value not in MISSING:
            yield {"id": f"{name}/{time}", **identity(package), "split": "train", "name": name, "time": time,
                   column: float(value)}  # fmt: skip


def monthly(packages: Packages) -> Iterator[Row]:
    """Monthly series: the economy and employment of the United States, meat, homes of Texas, CO2, unemployment."""
    series = partial(_series, "monthly")
    for file, prefix in (("economics", "economy"), ("meat", "meat")):
        lines = _plotnine(packages, file)
        for column in list(lines[0])[1:]:
            yield from series("plotnine", f"{prefix}/{column}", ((line["date"], line[column]) for line in lines))
    lines = _vega(packages, "us-employment")
    for column in list(lines[0])[1:]:
        if not column.endswith("_change"):
            yield from series("vega", f"employment/{column}", ((line["month"], line[column]) for line in lines))
    yield from series("vega", "co2", ((line["Date"], line["CO2"]) for line in _vega(packages, "co2-concentration")))
    lines = _bokeh(packages, "unemployment1948.csv")
    months = list(lines[0])[1:13]
    points = ((f"{line['Year']}-{months.index(month) + 1:02}-01", line[month]) for line in lines for month in months)
    yield from series("bokeh", "unemployment", points)
    lines = _plotnine(packages, "txhousing")
    for city in sorted({line["city"] for line in lines}):
        rows = [line for line in lines if line["city"] == city]
        for column in ("sales", "median", "listings"):
            points = ((f"{line['year']}-{int(line['month']):02}-01", line[column]) for line in rows)
            yield from series("plotnine", f"homes/{city}/{column}", points)


def daily(packages: Packages) -> Iterator[Row]:
    """Daily series: the weather of Seattle, New York and Lincoln."""
    series = partial(_series, "daily")
    lines = _vega(packages, "weather")
    for city in sorted({line["location"] for line in lines}):
        for column in ("temp_max", "temp_min", "wind"):
            points = ((line["date"], line[column]) for line in lines if line["location"] == city)
            yield from series("vega", f"{city}/{column}", points)
    lines = _bokeh(packages, "lincoln_weather.csv")
    for column in ("TMAX", "TMIN"):
        yield from series("bokeh", f"Lincoln/{column}", ((line["DATE"], line[column]) for line in lines))


PARTS = {
    "diamonds": Part(diamonds, ("plotnine",)),
    "cars": Part(cars, ("plotnine",)),
    "mammals": Part(mammals, ("plotnine",)),
    "penguins": Part(penguins, ("vega",)),
    "homes": Part(homes, ("plotnine",)),
    "lives": Part(lives, ("bokeh",)),
    "monthly": Part(monthly, ("plotnine", "vega", "bokeh")),
    "daily": Part(daily, ("vega", "bokeh")),
}
