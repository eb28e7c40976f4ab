"""Bad data of a training: one sentence, and nothing half trained is left behind.

Calls in Python are in test_model and test_frames, estimators in test_estimators, chats in tests/data/test_chat.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from openm6.core.errors import OpenM6Error
from openm6.train.run import train_recipe
from tests.data.sample_images import png
from tests.train.tiny_recipe import tiny_recipe, write_recipe

GOODS = pd.DataFrame({"photo": ["a.png"] * 20, "title": [f"toy {row}" for row in range(20)], "price": 3.0})
DAYS = pd.DataFrame({"day": pd.date_range("2024-01-01", periods=60).astype(str), "sales": np.arange(60.0) % 7})
OWN = {"price_of": {"inputs": {"title": "text"}, "target": {"number": "price"}, "prompts": {"en": "{title} Price?"}}}
WINDOWS = {"kind": "windows", "columns": ["sales"], "time": "day", "context": 12, "horizon": 4}


def chats(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": role, "content": content} for role, content in turns]}] * 20


BAD: dict[str, tuple[str, Any, str]] = {
    "column missing": ("image_captioning", GOODS.drop(columns="photo"), "t.csv has no column 'photo'"),
    "all-missing target": ("price_of", GOODS.assign(price=np.nan), "price"),
    "no such file": ("image_captioning", GOODS.assign(photo="gone.png"), "there is no file 'gone.png' beside"),
    "image of zero bytes": ("image_captioning", GOODS.assign(photo="empty.png"), "'photo' holds an empty file"),
    "one row": ("time_series_forecasting", DAYS.iloc[:1], "fewer than 16 rows to train on"),
    "series without values": ("time_series_forecasting", DAYS.assign(sales=np.nan), "fewer than 16 rows to train on"),
    "repeated times": ("time_series_forecasting", pd.concat([DAYS, DAYS]), "occur more than once"),
    "no answer": ("chat", chats(("user", "Hi")), "no turn of the assistant follows another"),
    "unknown role": ("chat", chats(("wizard", "Hi"), ("assistant", "Hello")), "message 1 has the role 'wizard'"),
    "mark without an image": (
        "chat", chats(("user", "<image>Hi"), ("assistant", "Hello")), "more marks <image> than images has files"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_training_on_bad_data_is_one_sentence(case: str, tmp_path: Path) -> None:
    task, data, sentence = BAD[case]
    (tmp_path / "a.png").write_bytes(png("red", 32))
    (tmp_path / "empty.png").write_bytes(b"")
    if isinstance(data, list):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, data)))
        source: dict[str, Any] = {"kind": "chat", "path": str(tmp_path / "t.jsonl")}
    else:
        data.to_csv(tmp_path / "t.csv", index=False)
        settings = WINDOWS if task == "time_series_forecasting" else {"kind": "csv"}
        source = {**settings, "path": str(tmp_path / "t.csv")}
        if task == "image_captioning":
            source["fields"] = {"image": "photo", "text_en": "title"}
    recipe = tiny_recipe(2) | {"sources": {"s": source}, "mixture": [{"source": "s", "task": task}], "tasks": OWN}
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "config.yaml").exists()
