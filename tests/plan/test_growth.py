"""What a run comes to take as it goes on, by hand."""

from __future__ import annotations

import pytest

from openm6.plan.examples import ExampleFacts, Load, Remembered
from openm6.plan.growth import (
    ENTRY,
    FIRST_STEPS,
    VARIETY,
    Growth,
    remembered_bytes,
    saving_bytes,
    varied_bytes,
)

MIB = 2**20
HEARD = {"heard": 64.0 * MIB}


def lesson(
    source: str, task: str, variants: float = 1.0, origin: str = "spoken", files: int = 100
) -> ExampleFacts:
    """An example whose sound is remembered by 10,000 bytes."""
    left = Remembered(origin=origin, files=files, variants=variants, bytes=10_000.0 - ENTRY)
    return ExampleFacts(
        source=source, task=task, tokens=10.0, read={}, learned={}, pairs=0.0, pieces=0.0, seconds=0.0,
        remembered={"heard": left},
    )  # fmt: skip


def test_every_file_is_remembered_once_and_counts_once() -> None:
    facts = [lesson("spoken", "transcribe"), lesson("pairs", "draw_sound")]
    both = [("spoken", "transcribe", 1.0), ("pairs", "draw_sound", 3.0)]
    assert remembered_bytes(both, facts, HEARD, 0.0) == 0.0
    assert remembered_bytes(both, facts, HEARD, 80.0) == pytest.approx(80 * 10_000)
    assert remembered_bytes(both, facts, HEARD, 1e6) == pytest.approx(100 * 10_000)


def test_variants_are_met_one_an_epoch() -> None:
    facts = [lesson("spoken", "speak", variants=4.0)]
    taught = [("spoken", "speak", 1.0)]
    assert remembered_bytes(taught, facts, HEARD, 100.0) == pytest.approx(100 * 10_000)
    assert remembered_bytes(taught, facts, HEARD, 200.0) == pytest.approx(
        175 * 10_000
    )  # 4 (1 - (3/4)^2) a file
    assert remembered_bytes(taught, facts, HEARD, 1e6) == pytest.approx(400 * 10_000)


def test_a_memory_is_bounded_and_what_takes_the_place_of_others_leaves_gaps() -> None:
    taught = [("mine", "speak", 1.0)]  # was not counted: every draw is new
    facts = [lesson("spoken", "speak")]
    assert remembered_bytes(taught, facts, HEARD, 6000.0) == pytest.approx(6000 * 10_000)
    full = HEARD["heard"] / 10_000
    assert remembered_bytes(taught, facts, HEARD, full + 1000) == pytest.approx(64 * MIB + 1000 * 10_000)
    assert remembered_bytes(taught, facts, HEARD, 1e9) == 96 * MIB
    assert remembered_bytes([("iris", "classify", 1.0)], [], HEARD, 1e9) == 0.0


def test_saving_takes_what_other_processes_hold() -> None:
    assert [saving_bytes(40.0, 2, saves) for saves in (0, 1, 2, 9)] == [0.0, 30.0, 50.0, 50.0]
    assert saving_bytes(40.0, 1, 9) == 0.0


def test_rows_of_text_are_all_alike() -> None:
    codes, words = Load(learned={"image_out": 30.0, "text": 10.0}), Load(learned={"text": 40.0})
    assert varied_bytes(100.0, words, 1e6) == 0.0 == varied_bytes(100.0, codes, FIRST_STEPS / 2)
    assert varied_bytes(100.0, codes, FIRST_STEPS * 2.718281828) == pytest.approx(VARIETY * 75.0)


def test_a_sentence() -> None:
    growth = Growth(3359, 95.2 * MIB, 0.0, 51.4 * MIB)
    words = "147 MiB come in 3,359 steps: 95 MiB for remembered codes, 51 MiB by saving"
    assert str(growth) == words and str(Growth(10)) == ""
