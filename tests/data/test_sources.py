"""The contract of every kind of source, and opening them together."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openm6.base.config import Config, build
from openm6.base.errors import ConfigError, DataError, OpenM6Error
from openm6.data.records import CANONICAL_KEYS
from openm6.data.sources import SOURCES, AnySourceConfig, open_sources
from tests.data.pictures import png

ROWS = [{"id": str(number), "text_en": f"thing {number}", "label": "ab"[number % 2]} for number in range(60)]


class Recipe(Config):
    sources: dict[str, AnySourceConfig]


def settings(kind: str, folder: Path) -> dict[str, dict[str, object]]:
    """A source called `x` of each kind, with whatever it needs."""
    path = str(folder / "x")
    if kind == "csv":
        Path(path).write_text(
            "id,text_en,label\n" + "".join(f"{r['id']},{r['text_en']},{r['label']}\n" for r in ROWS)
        )
    if kind == "jsonl":
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    if kind == "windows":
        path = "embedded:seattle_weather_daily"
        return {"x": {"kind": kind, "path": path, "columns": ["wind"], "time": "date"}}
    if kind == "folder":
        for row in ROWS:
            Path(path, row["label"]).mkdir(parents=True, exist_ok=True)
            Path(path, row["label"], f"{row['id']}.png").write_bytes(png())
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for row in ROWS:
                member = tarfile.TarInfo(f"{row['id']}.txt")
                member.size = len(row["text_en"])
                tar.addfile(member, io.BytesIO(row["text_en"].encode()))
    if kind == "datasets":
        pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(path)
    if kind == "embedded":
        return {"x": {"kind": kind, "name": "iris"}}
    if kind == "pairs":
        embedded = {name: {"kind": "embedded", "name": name} for name in ("digits", "espeak_digits")}
        return {**embedded, "x": {"kind": kind, "left": "digits", "right": "espeak_digits"}}
    return {"x": {"kind": kind, "path": path}}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_keeps_the_contract(kind, tmp_path):
    recipe = build(Recipe, {"sources": settings(kind, tmp_path)}, "r.yaml")
    train, test = (open_sources(recipe.sources, split)["x"] for split in ("train", "test"))
    assert train.name == test.name == "x"
    assert len(train) > len(test) > 0
    for source in (train, test):
        record = source[0]
        assert set(record) <= set(CANONICAL_KEYS) and isinstance(record["id"], str)
        assert source[0] == record and source.at(0, 3) == source.at(0, 3)
        assert source[-1] == source[len(source) - 1]
        with pytest.raises(IndexError):
            source[len(source)]
        assert source.values("id")[:3] == [source[index]["id"] for index in range(3)]
    validation = open_sources(recipe.sources, "validation")["x"]
    assert len(validation) == 0, "nobody has set any apart"
    ids = [set(source.values("id")) for source in (train, test)]
    assert len(ids[0]) == len(train) and not ids[0] & ids[1]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_config_survives_its_own_dump(kind, tmp_path):
    recipe = build(Recipe, {"sources": settings(kind, tmp_path)}, "r.yaml")
    assert build(Recipe, json.loads(recipe.model_dump_json()), "r.yaml") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301 - our own bytes


@pytest.mark.parametrize("kind", sorted(set(SOURCES) - {"embedded", "pairs", "datasets"}))
def test_nothing_at_the_path(kind, tmp_path):
    given = {
        "kind": kind,
        "path": str(tmp_path / "none"),
        **({"columns": ["a"]} if kind == "windows" else {}),
    }
    with pytest.raises(OpenM6Error, match="none"):
        open_sources(build(Recipe, {"sources": {"x": given}}, "r.yaml").sources, "train")


@pytest.mark.parametrize(
    "sources, reason",
    [
        ({"a": {"kind": "pairs", "left": "a", "right": "a"}}, "circle: a → a"),
        (
            {
                "emoji": {"kind": "embedded", "name": "emoji"},
                "p": {"kind": "pairs", "left": "emoij", "right": "emoji"},
            },
            "'emoji'",
        ),
    ],
)
def test_sources_that_refer_wrongly(sources, reason):
    with pytest.raises(DataError, match=reason):
        open_sources(build(Recipe, {"sources": sources}, "r.yaml").sources, "train")


def test_unknown_kind():
    with pytest.raises(ConfigError, match="parquet"):
        build(Recipe, {"sources": {"x": {"kind": "parket", "path": "x"}}}, "r.yaml")


def test_a_source_is_opened_once(tmp_path):
    recipe = build(Recipe, {"sources": settings("pairs", tmp_path)}, "r.yaml")
    opened = open_sources(recipe.sources, "train")
    assert list(opened) == ["digits", "espeak_digits", "x"]
    assert opened["x"]._left is opened["digits"]


def test_training_without_records_is_refused(tmp_path):
    given = settings("jsonl", tmp_path)["x"]
    Path(given["path"]).write_text('{"text_en": "a", "split": "test"}\n')
    recipe = build(Recipe, {"sources": {"x": given}}, "r.yaml")
    assert len(open_sources(recipe.sources, "test")["x"]) == 1
    with pytest.raises(DataError, match="'x' has no training records"):
        open_sources(recipe.sources, "train")
