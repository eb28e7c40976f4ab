"""The synthetic data that comes with the package: split apart, readable by every modality, true to its own rules."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import CANONICAL_KEYS
from openm6.data.source import Source, Split

# What tools/embedded_data/synthetic.py takes as limits of a normal machine.
HOT, SHAKEN, IDLE = 90.0, 7.0, 15.0


def opened(name: str, split: Split = "train") -> Source:
    return EmbeddedConfig(name=name).open(name, split, lambda other: NotImplemented)


@pytest.mark.parametrize(("name", "records"), [("shop", 800), ("machines", 1000), ("audio_events", 100)])
def test_splits_share_no_record(name: str, records: int) -> None:
    train, test = opened(name), opened(name, "test")
    ids = [set(source.values("id")) for source in (train, test)]
    assert ids[0] | ids[1] == {f"{name}/{number}" for number in range(records)} and not ids[0] & ids[1]
    assert 0.08 < len(ids[1]) / records < 0.2
    assert set(train[3]) <= set(CANONICAL_KEYS) and train[3]["license"].startswith("CC0-1.0")


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
    shop = opened("shop")
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
        expected = {"worn bearing": worn, "overheated": hot, "idle": idle, "normal": not (worn or hot or idle)}
        assert expected[record["label"]] and sum(expected.values()) == 1


def test_audio_can_be_decoded() -> None:
    events, labels = opened("audio_events"), set()
    for row in range(len(events)):
        record = events[row]
        samples, rate = soundfile.read(io.BytesIO(record["audio"]))
        assert rate == 16_000 and len(samples) == 16_000 and 0.01 < np.abs(samples).max() <= 1
        labels.add(record["label"])
    assert len(labels) == 7
