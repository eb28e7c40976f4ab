"""The embedded data is what tools/embedded_data makes of the packages, as far as that needs no network."""

from __future__ import annotations

import importlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from openm6.core.errors import DataError

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "openm6" / "data" / "embedded"


@pytest.fixture
def builders(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return {
        name: importlib.import_module(f"embedded_data.{name}") for name in ("images", "numbers", "synthetic", "tables")
    }


@pytest.mark.parametrize("name, module", [("digits", "images"), ("iris", "numbers")])
def test_what_comes_from_pypi_is_rebuilt_exactly(builders, name, module, tmp_path):
    rows = getattr(builders[module], name)(tmp_path)
    for split in ("train", "test"):
        known = pq.read_table(EMBEDDED / f"{name}-{split}.parquet")
        made = [{**row, "source": ""} for row in rows if row["split"] == split]  # it names the version installed
        column = known.column_names.index("source")
        blank = known.set_column(column, "source", [[""] * known.num_rows])
        path = tmp_path / f"{name}-{split}.parquet"
        builders["tables"].write(blank, path)
        assert builders["tables"].differences(builders["tables"].table_of(made), path) == []


def test_a_package_of_another_content_is_refused(builders, tmp_path):
    (tmp_path / "vega-datasets-3.2.1").mkdir()
    (tmp_path / "vega-datasets-3.2.1" / "vega-datasets-3.2.1.tgz").write_bytes(b"another")
    with pytest.raises(DataError, match=r"not that of vega-datasets 3\.2\.1"):
        builders["numbers"].penguins(tmp_path)


@pytest.mark.parametrize("name, function", [("audio_events", "events"), ("machines", "machines")])
def test_synthetic_records_are_rebuilt_exactly(builders, name, function, tmp_path):
    synthetic, tables = builders["synthetic"], builders["tables"]
    rows = getattr(synthetic, function)(tmp_path)
    for split in ("train", "test"):
        made = [row for row in rows if row["split"] == split]
        built = tables.table_of(made, synthetic.SYNTHETIC_SCHEMA)
        assert tables.differences(built, EMBEDDED / f"{name}-{split}.parquet") == []


def test_a_difference_is_found(builders, tmp_path):
    tables = builders["tables"]
    known = pq.read_table(EMBEDDED / "digits-test.parquet").slice(0, 2)
    tables.write(known, tmp_path / "x.parquet")
    rows = known.to_pylist()
    assert tables.differences(tables.table_of(rows), tmp_path / "x.parquet") == []
    rows[0]["image"], rows[1]["label"] = rows[1]["image"], "eleven"
    found = tables.differences(tables.table_of(rows), tmp_path / "x.parquet")
    assert found == ["x.parquet row 0: image", "x.parquet row 1: label"]
    assert "rows" in tables.differences(tables.table_of(rows[:1]), tmp_path / "x.parquet")[0]


def test_splits_never_change(builders):
    split_of = builders["tables"].split_of
    assert [split_of(key) for key in ("1F600", "1F601", "BEN", "ABW")] == ["train", "test", "test", "train"]
    assert split_of("i10", tenths=2) == "test"
