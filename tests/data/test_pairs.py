from __future__ import annotations

import pytest

from openm6.base.errors import DataError
from openm6.data.parquet import EmbeddedConfig
from openm6.data.sources import PairsConfig, open_sources
from tests.data.lists import ListConfig

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
        assert (
            "Debian" not in record["license"] and "CC-BY" in record["license"] and "CC0" in record["license"]
        )


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
        (
            {"key": "tags_en"},
            "key 'tags_en' holds no single text, so records cannot be joined by it: use one of",
        ),
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
    configs = {
        "left": left,
        "right": right,
        "pairs": PairsConfig(left="left", right="right", right_keys=["id"]),
    }
    sources = open_sources(configs, "train")
    assert sources["left"].values("label") == ["x", None, "y"]
    assert sources["pairs"].values("label") == ["x", "y"]
    with pytest.raises(DataError, match="row 1: broken"):
        sources["left"][1]
