from __future__ import annotations

import builtins

import pytest

from openm6.base.errors import DataError
from openm6.data.parquet import DatasetsConfig, DatasetsTable
from openm6.data.records import Fields
from openm6.data.sources import open_sources
from tests.data.pictures import png


class ClassLabel:
    names = ("cat", "dog")


class Image:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class FakeDataset:
    """As much of `datasets.Dataset` as is used; pictures come as bytes once decoding is off."""

    def __init__(self, features: dict[str, object]) -> None:
        self.features = features
        self.column_names = list(features)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: int) -> dict[str, object]:
        if key == 2:
            raise ValueError("bad page")
        return {
            "photo": {"bytes": png(), "path": None} if not self.features["photo"].decode else object(),
            "kind": key,
        }

    def cast_column(self, column: str, feature: object) -> FakeDataset:
        return FakeDataset({**self.features, column: feature})


def test_pictures_stay_bytes_and_classes_get_names():
    table = DatasetsTable(FakeDataset({"photo": Image(), "kind": ClassLabel()}), "pets")
    assert table.row(1, ["photo", "kind"]) == {"photo": {"bytes": png(), "path": None}, "kind": "dog"}
    with pytest.raises(DataError, match="bad page"):
        table.row(2, ["kind"])


def test_without_the_extra_the_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'openm6\[hf\]'"):
        open_sources({"x": DatasetsConfig(path="some/name")}, "train")


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "title": datasets.Value("string"),
        }
    )
    rows = {
        "photo": [{"bytes": png(), "path": None}] * 40,
        "kind": [0, 1] * 20,
        "title": [f"t{n}" for n in range(40)],
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole, "validation": whole.select(range(5))}).save_to_disk(
        str(tmp_path / "pets")
    )
    return str(tmp_path / "pets")


FIELDS = Fields(image="photo", label="kind", text_en="title")


def test_a_saved_data_set(saved):
    train = open_sources({"x": DatasetsConfig(path=saved, fields=FIELDS)}, "train")["x"]
    assert train[0] == {"id": "x/0", "image": png(), "label": "cat", "text_en": "t0"}
    assert train.values("label")[:2] == ["cat", "dog"]
    config = DatasetsConfig(path=saved, fields=FIELDS, test_split="validation")
    assert [len(open_sources({"x": config}, split)["x"]) for split in ("train", "test")] == [40, 5]
    with pytest.raises(DataError, match="did you mean 'train'"):
        open_sources({"x": DatasetsConfig(path=saved, fields=FIELDS, train_split="trian")}, "train")
