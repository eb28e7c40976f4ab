"""Data made by formula: repeatable, split apart, readable by every modality, true to its own rules."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image
from pydantic import ValidationError

from openm6.data.made import MADE, MadeConfig, made_record
from openm6.data.made_machines import HOT, IDLE, SHAKEN
from openm6.data.records import CANONICAL_KEYS
from openm6.data.source import Source, Split


def opened(name: str, split: Split = "train", records: int = 60) -> Source:
    return MadeConfig(name=name, records=records).open(name, split, lambda other: NotImplemented)


@pytest.mark.parametrize("name", MADE)
def test_records_repeat_and_are_told_apart(name: str) -> None:
    first, second = opened(name)[3], opened(name)[3]
    assert first == second and first != opened(name)[4]
    assert set(first) <= set(CANONICAL_KEYS) and first["license"] == "CC0-1.0"


@pytest.mark.parametrize("name", MADE)
def test_splits_share_no_record(name: str) -> None:
    train, test = opened(name, records=200), opened(name, "test", records=200)
    ids = [{source[row]["id"] for row in range(len(source))} for source in (train, test)]
    assert len(ids[0]) + len(ids[1]) == 200 and not ids[0] & ids[1] and 8 < len(ids[1]) < 40


def test_more_records_move_none() -> None:
    assert made_record(MadeConfig(name="shop", records=5), 3) == made_record(MadeConfig(name="shop"), 3)


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(ValidationError, match="did you mean 'shop'"):
        MadeConfig(name="shopp")


def test_a_product_says_the_same_in_both_languages_and_shows_it() -> None:
    shop, seen = opened("shop"), set()
    for row in range(len(shop)):
        record = shop[row]
        assert Image.open(io.BytesIO(record["image"])).size == (64, 64)
        for language, index in (("en", 0), ("zh", 1)):
            colour, _, name, _ = record[f"tags_{language}"]
            extra = record["extra"]
            assert colour in record[f"text_{language}"] and name in record[f"text_{language}"]
            assert extra[f"sentiment_{language}"] in (("positive", "negative"), ("好评", "差评"))[index]
            assert extra[f"buyer_answer_{language}"] in extra[f"attributes_{language}"]
            assert "{" not in "".join(str(value) for value in extra.values())
        seen.add(record["extra"]["sentiment_en"])
        assert len(record["series"]["weekly_sales"]) == 48 and record["numbers"]["price"] > 0
    assert seen == {"positive", "negative"}


def test_price_follows_material_and_grade() -> None:
    shop = opened("shop", records=400)
    prices: dict[tuple[str, str, str], list[float]] = {}
    for row in range(len(shop)):
        record = shop[row]
        _, material, name, grade = record["tags_en"]
        prices.setdefault((name, material, grade), []).append(record["numbers"]["price"])
    spreads = [np.ptp(np.log(values)) for values in prices.values() if len(values) > 1]
    assert len(spreads) > 20 and max(spreads) < 0.6


def test_a_machine_state_follows_from_its_readings() -> None:
    machines = opened("machines")
    for row in range(len(machines)):
        record = machines[row]
        numbers = record["numbers"]
        worn, hot = numbers["vibration_mm_s"] > SHAKEN, numbers["temperature_c"] > HOT
        idle = numbers["load_percent"] < IDLE
        expected = {
            "worn bearing": worn,
            "overheated": hot,
            "idle": idle,
            "normal": not (worn or hot or idle),
        }
        assert expected[record["label"]] and sum(expected.values()) == 1


def test_sounds_are_heard() -> None:
    sounds, labels = opened("sounds"), set()
    for row in range(len(sounds)):
        record = sounds[row]
        samples, rate = soundfile.read(io.BytesIO(record["audio"]))
        assert rate == 16_000 and len(samples) == 16_000 and 0.01 < np.abs(samples).max() <= 1
        labels.add(record["label"])
    assert len(labels) == 7
