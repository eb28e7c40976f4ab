"""Fine-tuning from Python: data of every kind, what is left on the disk, and bad input in one sentence."""

from __future__ import annotations

import doctest
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import openm6
from openm6.core.errors import OpenM6Error
from openm6.core.run_folder import RunFolder
from tests.api.test_frames import shop
from tests.data.sample_images import png


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with images, and one for temporary folders; no time for trees."""
    for index, colour in enumerate(("red", "blue")):
        (tmp_path / f"{index}.png").write_bytes(png(colour, 32))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("openm6.train.multimodal_data.DEFAULT_MINUTES", 0.01)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples_of_docstrings_run(run: Path, folder: Path) -> None:
    penguins = pd.DataFrame({"flipper_length_mm": [190.0, 210.0] * 8, "body_mass_g": [4000.0, 5000.0] * 8})
    known = {"run": run, "penguins": penguins}
    results = [
        doctest.DocTestRunner().run(one) for one in doctest.DocTestFinder().find(openm6.finetune, extraglobs=known)
    ]
    assert sum(one.attempted for one in results) == 2 and not any(one.failed for one in results)
    assert not any((folder / "temporary").iterdir())


def test_a_frame_with_photos_is_kept_in_a_run_that_knows_both(run: Path, folder: Path) -> None:
    frame = shop(16)
    model = openm6.finetune(run, frame, "colour", steps=1, out=folder / "tuned", replay=0.1, freeze=["backbone"])
    settings = yaml.safe_load((folder / "tuned" / "config.yaml").read_text(encoding="utf-8"))
    source = settings["sources"]["data"]
    assert source["target"] == "colour" and source["fields"]["image"] == "photo"
    assert settings["mixture"][0] == {"source": "data", "task": "record_classification"}
    assert len(settings["mixture"]) == 8 and settings["model"]["freeze"] == ["backbone"]
    found = model.predict(frame.drop(columns="colour"), target="colour", classes=["red", "blue"])
    assert found["red"].to_numpy() + found["blue"].to_numpy() == pytest.approx(1)
    old = pd.DataFrame({"bill_length_mm": [40.0], "flipper_length_mm": [190.0]})
    assert openm6.load(folder / "tuned").predict(old, target="body_mass_g")["predictions"].notna().all()


def test_files_of_several_columns_are_kept(run: Path, folder: Path) -> None:
    frame = shop(16).assign(back=lambda table: table["photo"])
    openm6.finetune(run, frame, "price", steps=1, out=folder / "tuned")
    kept = pd.read_parquet(folder / "tuned" / "data.parquet")
    assert kept["photo"][0] == kept["back"][0] == (folder / "0.png").read_bytes()


def test_a_column_of_both_is_predicted_from_the_columns_of_the_new_data(run: Path, folder: Path) -> None:
    """A task of the start has more inputs, and its table more columns."""
    loop = {"steps": 1, "tensorboard": False}
    for name, columns in (("full", ["weight", "price", "title"]), ("small", ["weight", "price"])):
        shop(16)[columns].to_csv(f"{name}.csv", index=False)
    texts = {"kind": "csv", "path": "full.csv", "fields": {"numbers": ["weight", "price"], "text_en": "title"}}
    numbers = {"kind": "csv", "path": "small.csv", "fields": {"numbers": ["weight", "price"]}}
    first = {"sources": {"full": texts}, "mixture": [{"source": "full", "task": "record_regression"}], "loop": loop}
    then = {"sources": {"small": numbers}, "mixture": [{"source": "small", "task": "tabular_regression"}], "loop": loop}
    openm6.finetune(run, first, out="first")
    for replay in (0.5, 0.0):
        model = openm6.finetune("first", then, replay=replay)
        assert model.predict(pd.DataFrame({"weight": [1.0]}), "price")["predictions"].notna().all()
    with pytest.raises(OpenM6Error, match="no column 'weight'"):
        model.predict(pd.DataFrame({"width": [1.0]}), "price")


def test_a_recipe_keeps_what_it_sets(run: Path) -> None:
    fields = {"numbers": ["weight", "price"]}
    shop(16).to_parquet("shop.parquet")
    recipe = {
        "sources": {"shop": {"kind": "parquet", "path": "shop.parquet", "fields": fields}},
        "mixture": [{"source": "shop", "task": "tabular_regression"}],
        "loop": {"steps": 1, "tensorboard": False},
    }
    Path("shop.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    model = openm6.finetune(run, "shop.yaml", out="tuned")
    assert model.loaded.checkpoint.name == "step-1"
    with pytest.raises(OpenM6Error, match="the recipe starts from other, and not from"):
        openm6.finetune(run, recipe | {"model": {"start": "other"}})
    adapters = openm6.finetune(run, recipe | {"model": {"start": f"{run}/", "lora": {"r": 8}}})
    assert adapters.loaded.description.backbone.lora.r == 8
    with pytest.raises(OpenM6Error, match="has a shape of its own: leave preset out"):
        openm6.finetune(run, recipe | {"model": {"preset": "nano"}})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no start": ({"start": "/none"}, "there is no run or checkpoint at /none"),
    "no model of this name": ({"start": "mega"}, "no model of this name in"),
    "no data": ({"data": "none.csv"}, "there is nothing at none.csv"),
    "no column": ({"target": "prise"}, "the data have no column 'prise'; did you mean 'price'"),
    "no column of this number": ({"target": 9}, "the data have no column '9'"),
    "no task": ({"target": "photo", "data": shop(16)[["photo", "weight"]]}, "can be trained on as it is"),
    "no rows": ({"data": shop(16).iloc[:0]}, "a DataFrame with at least one row"),
    "empty target": ({"data": shop(16).assign(price=None)}, "can be trained on as it is"),
    "no image": ({"data": shop(16).assign(photo="x.png")}, "x.png cannot be read"),
    "no steps": ({"steps": 0}, "loop.steps: must be at least 1"),
    "no time": ({"time_limit": -1.0}, "loop.minutes: Input should be greater than 0"),
    "no part": ({"freeze": ["eyes"]}, "model.freeze names 'eyes'"),
    "all replay": ({"replay": 1.0}, "replay: Input should be less than 1"),
    "not empty": ({"out": "."}, r"\. is not empty"),
    "no mapping": ({"data": {"sources": {}, "loop": 3}, "target": None}, "model, loop and eval .* are mappings"),
    "two targets": ({"data": {"sources": {}}}, "a recipe names its targets itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(case: str, run: Path, folder: Path) -> None:
    changes, sentence = BAD[case]
    given = {"start": run, "data": shop(16), "target": "price", "out": folder / "tuned", **changes}
    if "time_limit" not in changes:
        given = {"steps": 1, **given}
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        openm6.finetune(**given)
    assert "\n" not in str(caught.value) and not (folder / "tuned").exists()
    assert not any((folder / "temporary").iterdir())


def test_a_folder_in_which_another_process_trains_is_left_as_it_is(folder: Path) -> None:
    with RunFolder.open(folder / "tuned").lock(), pytest.raises(OpenM6Error, match="is being trained"):
        openm6.finetune("/none", shop(16), "price", out=folder / "tuned")
    assert (folder / "tuned").is_dir()
