"""Batches made ahead come in order, and the thread ends with the reader."""

from __future__ import annotations

import itertools
import threading

import pytest

from openm6.core.errors import DataError, TrainingError
from openm6.train.data_loader import Prefetch


def test_the_order_is_that_of_the_source() -> None:
    with Prefetch(itertools.count(), 3) as batches:
        assert list(itertools.islice(batches, 200)) == list(range(200))


def test_no_more_is_made_than_asked_for_and_some_ahead() -> None:
    made: list[int] = []
    with Prefetch((made.append(index) or index for index in itertools.count()), 2) as batches:  # type: ignore[func-returns-value]
        assert next(batches) == 0
    assert len(made) <= 1 + 2 + 1  # used, waiting, and the one in the thread's hand


def test_the_thread_ends_with_the_reader() -> None:
    before = threading.active_count()
    with Prefetch(itertools.count(), 1) as batches:
        next(batches)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def broken() -> itertools.chain[int]:
    def tail():
        raise DataError("row 7 is broken")
        yield 0

    return itertools.chain([1, 2], tail())


def test_a_failure_comes_after_the_good_items_and_stays() -> None:
    with Prefetch(broken(), 5) as batches:
        assert [next(batches), next(batches)] == [1, 2]
        for _ in range(2):
            with pytest.raises(DataError, match="row 7"):
                next(batches)


def test_a_source_that_ends_is_an_error() -> None:
    with Prefetch(iter([1]), 2) as batches:
        next(batches)
        with pytest.raises(TrainingError, match="the data ended"):
            next(batches)
