"""Penguins, irises and the weather of Seattle."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import sklearn
from sklearn.datasets import load_iris

from embedded_data.tables import Row, split_of
from tools.mini.packages import PACKAGES, Packages

VEGA = PACKAGES["vega"].source
PENGUIN_COLUMNS = {
    "bill_length_mm": "Beak Length (mm)",
    "bill_depth_mm": "Beak Depth (mm)",
    "flipper_length_mm": "Flipper Length (mm)",
    "body_mass_g": "Body Mass (g)",
}
PENGUINS_ZH = {"Adelie": "阿德利企鹅", "Gentoo": "巴布亚企鹅", "Chinstrap": "帽带企鹅"}
SEXES_ZH = {"MALE": "雄性", "FEMALE": "雌性"}
IRIS_NUMBERS = ["sepal_length_cm", "sepal_width_cm", "petal_length_cm", "petal_width_cm"]
IRISES_ZH = {"setosa": "山鸢尾", "versicolor": "变色鸢尾", "virginica": "维吉尼亚鸢尾"}
WEATHER_NUMBERS = ("precipitation", "temp_max", "temp_min", "wind")


def penguins(cache: Path) -> list[Row]:
    """The penguins that were measured and sexed."""
    found = json.loads((Packages(cache).folder("vega") / "data" / "penguins.json").read_text(encoding="utf-8"))
    return [_penguin(number, bird) for number, bird in enumerate(found) if bird["Sex"] in SEXES_ZH]


def _penguin(number: int, bird: Row) -> Row:
    species, sex, island = bird["Species"], bird["Sex"], bird["Island"]
    return {
        "id": f"penguin/{number}",
        "source": f"{VEGA} penguins.json (palmerpenguins)",
        "license": "CC0-1.0",
        "split": split_of(f"p{number}", tenths=2),
        "kind": "text_numbers",
        "text_en": f"A {sex.lower()} {species} penguin on {island} island.",
        "text_zh": f"一只{SEXES_ZH[sex]}{PENGUINS_ZH[species]}。",
        "label": species,
        "label_zh": PENGUINS_ZH[species],
        "num_names": list(PENGUIN_COLUMNS),
        "num_values": [float(bird[column]) for column in PENGUIN_COLUMNS.values()],
        "extra": json.dumps({"island": island, "sex": sex}),
    }


def iris(cache: Path) -> list[Row]:
    """Fisher's irises."""
    data = load_iris()
    return [
        {
            "id": f"iris/{number}",
            "source": f"pypi:scikit-learn@{sklearn.__version__} load_iris (UCI)",
            "license": "CC-BY-4.0 (UCI) / BSD-3-Clause (scikit-learn)",
            "split": split_of(f"i{number}", tenths=2),
            "kind": "text_numbers",
            "text_en": f"An iris flower of the kind {data.target_names[kind]}.",
            "text_zh": f"一朵{IRISES_ZH[data.target_names[kind]]}。",
            "label": f"iris {data.target_names[kind]}",
            "label_zh": IRISES_ZH[data.target_names[kind]],
            "label_id": int(kind),
            "num_names": IRIS_NUMBERS,
            "num_values": [float(value) for value in values],
        }
        for number, (values, kind) in enumerate(zip(data.data, data.target, strict=True))
    ]


def seattle_weather_daily(cache: Path) -> pa.Table:
    """Four years of daily weather, as a plain table."""
    with (Packages(cache).folder("vega") / "data" / "seattle-weather.csv").open(encoding="utf-8", newline="") as file:
        days = list(csv.DictReader(file))
    columns = {
        "date": pa.array([day["date"] for day in days], pa.large_string()),
        **{name: pa.array([float(day[name]) for day in days], pa.float64()) for name in WEATHER_NUMBERS},
        "weather": pa.array([day["weather"] for day in days], pa.large_string()),
    }
    about = {
        "source": VEGA,
        "license": "Public domain (NOAA) via vega-datasets BSD-3-Clause",
    }
    return pa.table(columns).replace_schema_metadata(about)
