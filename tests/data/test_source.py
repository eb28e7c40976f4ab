from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openm6.core.errors import DataError
from openm6.data.source import hash_fraction, rows_by_hash, rows_by_word


def test_the_hash_never_changes():
    # Written down once: another value would move records from training into tests of runs that exist.
    assert hash_fraction("emoji/1F600") == pytest.approx(0.66021, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=5), max_size=20), st.floats(0, 0.9))
def test_every_row_is_on_one_side_and_equal_keys_together(keys, fraction):
    train, test = rows_by_hash(keys, fraction, "train"), rows_by_hash(keys, fraction, "test")
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(keys)))
    assert not {keys[row] for row in train} & {keys[row] for row in test}


def test_the_share_is_kept():
    assert 0.08 < len(rows_by_hash(range(5000), 0.1, "test")) / 5000 < 0.12


def test_validation_stands_in_for_a_missing_test_part():
    words = ["train", "val", "train", "dev"]
    assert rows_by_word(words, "test", "t.csv").tolist() == [1, 3]
    # A model chosen by them would look too good on them.
    assert rows_by_word(words, "validation", "t.csv").tolist() == []
    assert rows_by_word(["train"], "test", "t.csv").tolist() == []


def test_a_hash_leaves_nothing_for_validation():
    assert len(rows_by_hash(range(100), 0.5, "validation")) == 0


def test_adding_rows_moves_none():
    few, many = rows_by_hash(range(100), 0.2, "test"), rows_by_hash(range(200), 0.2, "test")
    assert few.tolist() == many[many < 100].tolist()


def test_words():
    words = ["train", "Test", None, "validation", "TRAINING", ""]
    assert rows_by_word(words, "train", "t.csv").tolist() == [0, 2, 4, 5]
    assert rows_by_word(words, "test", "t.csv").tolist() == [1]
    assert rows_by_word(words, "validation", "t.csv").tolist() == [3]
    with pytest.raises(DataError, match=r"t\.csv: the split column holds \"\['train'\]\""):
        rows_by_word([["train"]], "train", "t.csv")
    with pytest.raises(DataError, match=r"t\.csv: the split column holds 'maybe'"):
        rows_by_word(["train", "maybe"], "train", "t.csv")
