"""The calls of docs/examples.md run as they stand, with a model of a few steps as `runs/mine`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import openm6
from openm6.train.run import train_recipe
from tests.data.sample_images import png
from tests.train.tiny_recipe import tiny_recipe, write_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "examples.md").read_text(encoding="utf-8")
DAYS = 60


def goods() -> pd.DataFrame:
    """Sixty rows that are both goods with a price and days of two series."""
    days = np.arange(DAYS)
    return pd.DataFrame({
        "photo": [f"{day % 2}.png" for day in days],
        "title": [f"a {['red', 'blue'][day % 2]} apple" for day in days],
        "weight": 1.0 + days % 5,
        "price": 3.0 * (1 + days % 5),
        "item_id": [["a", "b"][day // 30] for day in days],
        "timestamp": [pd.Timestamp("2024-01-01") + pd.Timedelta(days=int(day % 30)) for day in days],
        "target": 10.0 + days % 7,
    })  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files, and with `runs/mine`, a model of all four modalities that also embeds."""
    folder = tmp_path_factory.mktemp("home")
    for index, colour in enumerate(("red", "blue")):
        (folder / f"{index}.png").write_bytes(png(colour, 32))
    goods().to_csv(folder / "shop.csv", index=False)
    recipe = tiny_recipe(2, save_every=2)
    recipe["embedding"] = {"size": 16}
    fields = {"image": "photo", "text_en": "title", "numbers": ["weight", "price"]}
    windows = {"columns": ["target"], "time": "timestamp", "group": "item_id", "context": 12, "horizon": 4}
    path = str(folder / "shop.csv")
    recipe["sources"] |= {
        "shop": {"kind": "csv", "path": path, "fields": fields},
        "series": {"kind": "windows", "path": path, **windows},
    }
    recipe["mixture"] += [
        {"source": "digits", "task": "image_text_retrieval"},
        {"source": "shop", "task": "record_regression"},
        {"source": "series", "task": "time_series_forecasting"},
    ]
    train_recipe(write_recipe(folder, recipe), out=folder / "runs" / "mine")
    return folder


def test_every_call_runs_as_it_stands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    # A second of training instead of minutes, and none for trees.
    start = openm6.OpenM6Regressor.__init__
    monkeypatch.setattr(start, "__defaults__", (None, 1.0, *start.__defaults__[2:]))
    finetune = openm6.finetune
    monkeypatch.setattr(openm6, "finetune", lambda *given, **named: finetune(*given, **named | {"time_limit": 1.0}))
    monkeypatch.setattr("openm6.train.multimodal_data.DEFAULT_MINUTES", 0.01)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    known = {"df": goods(), "X": goods()[["weight", "title"]], "y": goods()["price"], "candidates": ["apple", "plum"]}
    known["results"] = results = []
    for node in ast.parse(block).body:
        line = ast.get_source_segment(block, node)
        exec(f"results.append({line})" if isinstance(node, ast.Expr) else line, known)
    _, text, _, said, predicted, forecast, embedded, ranked, quantiles = results
    assert (home / "apple.png").stat().st_size and (home / "seven.wav").stat().st_size
    assert isinstance(text, str) and isinstance(said, str)
    assert predicted.shape == (DAYS, 4) and forecast.shape == (48, 13)
    assert embedded.shape == (16,) and ranked[0].candidate in known["candidates"]
    assert quantiles.shape == (DAYS, 9)
    assert known["model"].predict(goods(), target="price")["predictions"].notna().all()
