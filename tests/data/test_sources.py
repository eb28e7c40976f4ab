"""Every kind of source keeps the contract; pairs of two sources."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openm6.core.config import Config, build
from openm6.core.errors import ConfigError, DataError, OpenM6Error
from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import CANONICAL_KEYS
from openm6.data.sources import AnySourceConfig, PairsConfig, open_sources
from tests.data.lists import KINDS, ListConfig
from tests.data.sample_images import png

ROWS = [{"id": str(number), "text_en": f"thing {number}", "label": "ab"[number % 2]} for number in range(60)]


class Recipe(Config):
    sources: dict[str, AnySourceConfig]


def settings(kind: str, folder: Path) -> dict[str, dict[str, object]]:
    """A source called `x` of each kind, with whatever it needs."""
    path = str(folder / "x")
    if kind == "csv":
        Path(path).write_text("id,text_en,label\n" + "".join(f"{r['id']},{r['text_en']},{r['label']}\n" for r in ROWS))
    if kind == "jsonl":
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if kind == "chat":
        turns = [[("user", row["text_en"]), ("assistant", row["label"])] for row in ROWS]
        chats = [[{"role": role, "content": text} for role, text in said] for said in turns]
        rows = [{"id": row["id"], "messages": chat} for row, chat in zip(ROWS, chats, strict=True)]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    if kind == "synthetic_series":
        return {"x": {"kind": kind, "count": 60, "test_count": 20}}
    if kind == "embedded":
        return {"x": {"kind": kind, "name": "iris"}}
    if kind == "pairs":
        embedded = {name: {"kind": "embedded", "name": name} for name in ("digits", "espeak_digits")}
        return {**embedded, "x": {"kind": kind, "left": "digits", "right": "espeak_digits"}}
    return {"x": {"kind": kind, "path": path}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kind, tmp_path):
    recipe = build(Recipe, {"sources": settings(kind, tmp_path)}, "r.yaml")
    train, test = (open_sources(recipe.sources, split)["x"] for split in ("train", "test"))
    assert train.name == test.name == "x"
    assert len(train) > len(test) > 0
    for source in (train, test):
        record = source[0]
        assert set(record) <= {*CANONICAL_KEYS, "messages"} and isinstance(record["id"], str)
        assert source[0] == record and source.at(0, 3) == source.at(0, 3)
        assert source[-1] == source[len(source) - 1]
        with pytest.raises(IndexError):
            source[len(source)]
        assert source.values("id")[:3] == [source[index]["id"] for index in range(3)]
    validation = open_sources(recipe.sources, "validation")["x"]
    assert len(validation) == 0, "nobody has set any apart"
    ids = [set(source.values("id")) for source in (train, test)]
    assert len(ids[0]) == len(train) and not ids[0] & ids[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_config_survives_its_own_dump(kind, tmp_path):
    recipe = build(Recipe, {"sources": settings(kind, tmp_path)}, "r.yaml")
    assert build(Recipe, json.loads(recipe.model_dump_json()), "r.yaml") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301 - our own bytes


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"embedded", "pairs", "datasets", "synthetic_series"}))
def test_nothing_at_the_path(kind, tmp_path):
    given = {"kind": kind, "path": str(tmp_path / "none"), **({"columns": ["a"]} if kind == "windows" else {})}
    with pytest.raises(OpenM6Error, match="none"):
        open_sources(build(Recipe, {"sources": {"x": given}}, "r.yaml").sources, "train")


@pytest.mark.parametrize(
    "sources, reason",
    [
        ({"a": {"kind": "pairs", "left": "a", "right": "a"}}, "circle: a → a"),
        (
            {"emoji": {"kind": "embedded", "name": "emoji"}, "p": {"kind": "pairs", "left": "emoij", "right": "emoji"}},
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


DIGITS = {
    "digits": EmbeddedConfig(name="digits"),
    "spoken": EmbeddedConfig(name="espeak_digits"),
    "pairs": PairsConfig(left="digits", right="spoken"),
}


def test_a_written_digit_meets_a_spoken_one():
    pairs = open_sources(DIGITS, "train")["pairs"]
    assert len(pairs) == 1618
    for index in range(0, 1618, 97):
        record = pairs[index]
        assert record["image"] and record["audio"]
        written, spoken = record["id"].split(" + ")
        assert written.startswith("digits/") and float(spoken.rsplit("_", 1)[1]) == record["numbers"]["digit"]
        assert record["extra"]["spoken_language"] in ("en", "zh")
        assert "Debian" not in record["license"] and "CC-BY" in record["license"] and "CC0" in record["license"]


def test_pairs_without_partners_are_refused_for_training_alone(tmp_path):
    for name, labels in (("left", {"train": "a", "validation": "b"}), ("right", {"train": "a", "validation": "c"})):
        rows = [{"id": f"{name}/{split}", "label": label, "split": split} for split, label in labels.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    sources = {name: {"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")} for name in ("left", "right")}
    recipe = build(
        Recipe, {"sources": {**sources, "both": {"kind": "pairs", "left": "left", "right": "right"}}}, "r.yaml"
    )
    assert [len(open_sources(recipe.sources, split)["both"]) for split in ("train", "validation")] == [1, 0]
    (tmp_path / "right.jsonl").write_text(json.dumps({"id": "x", "label": "d"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no 'label' of 'left' is found in 'right'"):
        open_sources(recipe.sources, "train")


def test_partners_change_with_the_epoch_and_nothing_else():
    pairs = open_sources(DIGITS, "train")["pairs"]
    again = open_sources(DIGITS, "train")["pairs"]
    partners = [[pairs.at(index, epoch)["id"] for index in range(40)] for epoch in range(3)]
    assert partners[1] == [again.at(index, 1)["id"] for index in reversed(range(40))][::-1]
    assert partners[0] == [pairs[index]["id"] for index in range(40)]
    assert len({tuple(names) for names in partners}) == 3


def test_test_pairs_hold_test_records_only():
    train, test = open_sources(DIGITS, "train"), open_sources(DIGITS, "test")
    spoken = set(test["spoken"].values("id"))
    written = set(test["digits"].values("id"))
    for index in range(len(test["pairs"])):
        left, right = test["pairs"][index]["id"].split(" + ")
        assert left in written and right in spoken
    assert not spoken & set(train["spoken"].values("id"))


def sources(left: list[dict], right: list[dict], **settings: object):
    configs = {
        "left": ListConfig(records=left),
        "right": ListConfig(records=right),
        "pairs": PairsConfig(left="left", right="right", **settings),
    }
    return open_sources(configs, "train")["pairs"]


LEFT = [{"id": "1", "label": "cat", "image": b"c", "text_en": "left"}, {"id": "2", "label": "cow"}]
RIGHT = [{"id": "3", "label": "cat", "audio": b"m", "text_en": "right", "text_zh": "喵"}]


def test_left_wins_and_records_without_partner_are_left_out():
    pairs = sources(LEFT, RIGHT)
    assert len(pairs) == 1
    assert pairs[0]["text_en"] == "left" and pairs[0]["text_zh"] == "喵" and pairs[0]["id"] == "1 + 3"


def test_keys_can_be_chosen():
    pairs = sources(LEFT, RIGHT, left_keys=["image", "label"], right_keys=["audio", "text_en"])
    assert set(pairs[0]) == {"id", "image", "label", "audio", "text_en"}
    assert pairs[0]["text_en"] == "right"
    assert pairs.values("label") == ["cat"] and pairs.values("text_en") == ["right"]


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"key": "labl"}, "no record key; did you mean 'label'"),
        ({"left_keys": ["imag"]}, "no record key; did you mean 'image'"),
        ({"key": "tags_en"}, "key 'tags_en' holds no single text, so records cannot be joined by it: use one of"),
        ({"key": "numbers"}, "key 'numbers' holds no single text"),
        ({"key": "image"}, "key 'image' holds no single text"),
        ({"key": "answer"}, "no 'answer' of 'left' is found"),
    ],
)
def test_keys_that_join_nothing(settings, reason):
    with pytest.raises(DataError, match=reason):
        sources(LEFT, RIGHT, **settings)


def test_a_broken_partner_is_no_value_and_stops_nothing():
    """Whoever asks for a column must not fall over one broken record; drawing it still tells of it."""
    left = ListConfig(records=[{"id": "a", "label": "x"}, None, {"id": "b", "label": "y"}])
    right = ListConfig(records=[{"id": "c", "label": "x"}, {"id": "d", "label": "y"}])
    configs = {"left": left, "right": right, "pairs": PairsConfig(left="left", right="right", right_keys=["id"])}
    sources = open_sources(configs, "train")
    assert sources["left"].values("label") == ["x", None, "y"]
    assert sources["pairs"].values("label") == ["x", "y"]
    with pytest.raises(DataError, match="row 1: broken"):
        sources["left"][1]
