"""Parquet files, the embedded data and data sets of the `datasets` library."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openm6.core.config import build
from openm6.core.errors import ConfigError, DataError
from openm6.data.media import load_table
from openm6.data.parquet import (
    EMBEDDED,
    DatasetsConfig,
    DatasetsTable,
    EmbeddedConfig,
    ParquetConfig,
    ParquetTable,
    embedded_path,
)
from openm6.data.records import Fields
from openm6.data.sources import open_sources
from openm6.evaluate.run import source_configs
from tests.data.sample_images import png

LENGTHS = {
    "avatars": (768, 96),
    "emoji": (1468, 181),
    "countries": (225, 24),
    "digits": (1618, 179),
    "espeak_digits": (530, 60),
    "poems_zh": (284, 36),
    "wordnet_en": (1014, 110),
    "penguins": (261, 72),
    "iris": (124, 26),
    "questions": (705, 72),
    "shop": (714, 86),
    "machines": (910, 90),
    "audio_events": (86, 14),
}

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def embedded(name: str, split: str):
    return open_sources({name: EmbeddedConfig(name=name)}, split)[name]


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_are_whole_and_apart(name):
    train, test = embedded(name, "train"), embedded(name, "test")
    assert (len(train), len(test)) == LENGTHS[name]
    assert not set(train.values("id")) & set(test.values("id"))
    for source in (train, test):
        for index in range(0, len(source), 29):
            record = source[index]
            assert record["source"] and record["license"]
            assert {"image", "audio", "text_en", "text_zh"} & set(record)


def test_embedded_records_have_what_the_tasks_need():
    assert embedded("espeak_digits", "test")[0]["extra"]["spoken_language"] == "en"
    assert set(embedded("penguins", "train")[0]["numbers"]) > {"body_mass_g"}
    digit = embedded("digits", "test")[5]
    assert digit["numbers"] == {"digit": float(DIGITS.index(digit["label"]))}
    assert PIL.Image.open(io.BytesIO(digit["image"])).size == (32, 32)


def test_digits_of_the_test_split_are_a_tenth_of_each():
    labels = embedded("digits", "test").values("label")
    assert {labels.count(digit) for digit in set(labels)} <= {17, 18}


def test_embedded_tables_and_names():
    assert all(pq.ParquetFile(embedded_path(name)).metadata.num_rows > 0 for name in ("seattle_weather_daily",))
    with pytest.raises(ConfigError, match="did you mean 'emoji'"):
        build(EmbeddedConfig, {"name": "emojy"}, "r.yaml")
    with pytest.raises(DataError, match="no embedded table"):
        embedded_path("../../core/config")


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "1.png").write_bytes(png())
    rows = {
        "photo": ["1.png", "2.png", "../1.png", None] * 10,
        "title": [f"thing {number}" for number in range(40)],
        "price": [1.5, float("nan"), float("inf"), None] * 10,
    }
    pq.write_table(pa.table(rows), tmp_path / "shop.parquet")
    return tmp_path / "shop.parquet"


FIELDS = Fields(image="photo", text_en="title", numbers=["price"])


def test_times_of_an_unknown_zone_are_read_in_utc(tmp_path):
    moments = pa.array([0, 3_600_000_000], pa.timestamp("us", "Mars/Olympus"))
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"at": moments, "text_en": ["a", "b"]}), path)
    table = load_table(path)
    assert [cell.isoformat() for cell in table.column("at")] == [f"1970-01-01T0{hour}:00:00+00:00" for hour in (0, 1)]


def test_a_table_of_test_rows_needs_no_column_of_the_split(tmp_path):
    (tmp_path / "train.csv").write_text("text_en,who\n" + "".join(f"t{n},w{n % 5}\n" for n in range(40)))
    (tmp_path / "test.csv").write_text("text_en\nu\nv\n")
    values = {"kind": "csv", "path": str(tmp_path / "train.csv"), "test_path": str(tmp_path / "test.csv")}
    configs = source_configs({"t": {**values, "test_by": "who", "validation_fraction": 0.3}}, "recipe")
    texts = {split: open_sources(configs, split)["t"].values("text_en") for split in ("train", "validation", "test")}
    assert texts["test"] == ["u", "v"] and len(texts["train"]) + len(texts["validation"]) == 40
    assert {int(text[1:]) % 5 for text in texts["train"]}.isdisjoint(int(text[1:]) % 5 for text in texts["validation"])


def test_rows_and_broken_rows(shop):
    source = open_sources({"shop": ParquetConfig(path=str(shop), fields=FIELDS, test_fraction=0.0)}, "train")["shop"]
    assert source[0] == {"id": "shop/0", "image": png(), "text_en": "thing 0", "numbers": {"price": 1.5}}
    assert source[3] == {"id": "shop/3", "text_en": "thing 3", "numbers": {"price": None}}
    with pytest.raises(DataError, match=r"shop, row 1 of .*no file '2\.png'"):
        source[1]
    with pytest.raises(DataError, match="leads out"):
        source[2]
    with pytest.raises(IndexError):
        source[40]
    assert source.values("text_en")[39] == "thing 39"


def test_files_that_a_folder_of_tables_names_are_in_it(shop):
    config = ParquetConfig(path=str(shop.parent), fields=FIELDS, test_fraction=0.0)
    source = open_sources({"shop": config}, "train")["shop"]
    assert source[0]["image"] == png()
    with pytest.raises(DataError, match="leads out"):
        source[2]


def test_only_needed_columns_are_held(shop):
    table = load_table(str(shop), ["title"])
    assert isinstance(table, ParquetTable) and table.arrow.column_names == ["title"]


def test_memory_is_bounded(shop):
    with pytest.raises(DataError, match="max_gib"):
        open_sources({"shop": ParquetConfig(path=str(shop), fields=FIELDS, max_gib=1e-9)}, "train")


def test_many_files_and_files_of_unlike_columns(tmp_path):
    for number in range(3):
        pq.write_table(pa.table({"id": [f"{number}"], "text_en": ["a"]}), tmp_path / f"{number}.parquet")
    config = ParquetConfig(path=str(tmp_path), test_fraction=0.0)
    assert open_sources({"x": config}, "train")["x"].values("id") == ["0", "1", "2"]
    pq.write_table(pa.table({"id": ["3"]}), tmp_path / "3.parquet")
    with pytest.raises(DataError, match=r"3\.parquet has no column 'text_en'"):
        open_sources({"x": config}, "train")


def test_not_parquet_and_cut_off(tmp_path, shop):
    (tmp_path / "x.parquet").write_text("not parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(shop.read_bytes()[:-100])
    for path, sentence in ((tmp_path / "x.parquet", "is not Parquet"), (cut, "cannot be read as Parquet")):
        with pytest.raises(DataError, match=sentence):
            open_sources({"x": ParquetConfig(path=str(path))}, "train")


def test_text_that_is_not_utf8_breaks_its_row_only(tmp_path):
    column = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.utf8())
    pq.write_table(pa.table({"text_en": column}), tmp_path / "t.parquet")
    source = open_sources({"t": ParquetConfig(path=str(tmp_path / "t.parquet"), test_fraction=0.0)}, "train")["t"]
    assert source[0]["text_en"] == "good" and source[2]["text_en"] == "fine"
    with pytest.raises(DataError, match="row 1"):
        source[1]
    assert source.values("text_en") == ["good", None, "fine"]


def test_split_by_column_by_file_and_by_group(tmp_path):
    people = [number // 4 for number in range(200)]
    rows = {"text_en": [str(n) for n in range(200)], "who": people, "part": ["train", "test"] * 100}
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table(rows), path)
    fields = Fields(text_en="text_en")

    def texts(side: str, **settings: object) -> list[str]:
        return open_sources({"t": ParquetConfig(path=path, fields=fields, **settings)}, side)["t"].values("text_en")

    assert texts("test", split="part") == rows["text_en"][1::2]
    assert texts("train", test_path=path) == texts("test", test_path=path) == rows["text_en"]
    held = {int(text) // 4 for text in texts("test", test_by="who")}
    assert held and not held & {int(text) // 4 for text in texts("train", test_by="who")}
    assert texts("train", split="part", limit=3) == ["0", "2", "4"]


def test_extra_survives_as_json(tmp_path):
    pq.write_table(pa.table({"text_en": ["a"], "extra": [json.dumps({"voice": "x"})]}), tmp_path / "t.parquet")
    source = open_sources({"t": ParquetConfig(path=str(tmp_path / "t.parquet"), test_fraction=0.0)}, "train")["t"]
    assert source[0]["extra"] == {"voice": "x"}


class ClassLabel:
    names = ("cat", "dog")


class FakeDataset:
    """As much of `datasets.Dataset` as is used: the types of its columns, and its rows in Arrow memory."""

    features = {"photo": object(), "kind": ClassLabel(), "title": object()}

    def with_format(self, kind: str) -> FakeDataset:
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        photos = [{"bytes": png(), "path": None}] * 3
        titles = pa.array([b"a", b"b", b"\xff\xfe"], pa.binary()).view(pa.utf8())
        return pa.table({"photo": photos, "kind": [0, 1, -1], "title": titles})[rows]


def test_images_stay_bytes_and_classes_get_names():
    table = DatasetsTable(FakeDataset(), "pets")
    table.read(["photo", "kind", "title"])
    assert table.row(1, ["photo", "kind"]) == {"photo": {"bytes": png(), "path": None}, "kind": "dog"}
    assert table.column("kind") == ["cat", "dog", None], "-1 is no label"
    with pytest.raises(DataError, match="a cell cannot be read"):
        table.row(2, ["title"])


def test_without_the_extra_the_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install '.\[hf\]'"):
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
    rows = {"photo": [{"bytes": png(), "path": None}] * 40, "kind": [0, 1] * 20, "title": [f"t{n}" for n in range(40)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole, "validation": whole.select(range(5))}).save_to_disk(str(tmp_path / "pets"))
    return str(tmp_path / "pets")


DATASETS_LIBRARY_FIELDS = Fields(image="photo", label="kind", text_en="title")


def test_a_saved_data_set(saved):
    train = open_sources({"x": DatasetsConfig(path=saved, fields=DATASETS_LIBRARY_FIELDS)}, "train")["x"]
    assert train[0] == {"id": "x/0", "image": png(), "label": "cat", "text_en": "t0"}
    assert train.values("label")[:2] == ["cat", "dog"]
    config = DatasetsConfig(path=saved, fields=DATASETS_LIBRARY_FIELDS, test_split="validation")
    assert [len(open_sources({"x": config}, split)["x"]) for split in ("train", "test")] == [40, 5]
    with pytest.raises(DataError, match="did you mean 'train'"):
        open_sources({"x": DatasetsConfig(path=saved, fields=DATASETS_LIBRARY_FIELDS, train_split="trian")}, "train")
    with pytest.raises(DataError, match="no split 'valid'; known: train, validation"):
        open_sources({"x": config.model_copy(update={"test_split": "valid"})}, "train")
    alone = config.model_copy(update={"path": str(Path(saved) / "train")})
    with pytest.raises(DataError, match="no split 'validation'; leave test_split out"):
        open_sources({"x": alone}, "train")
