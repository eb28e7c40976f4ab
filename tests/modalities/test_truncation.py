"""Cutting texts to fit: the longest lose first, prompts nothing, and what stays is what stood there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openm6.modalities.interface import Cuttable, Part, Segment, line
from openm6.modalities.text import MASK_CHARACTER, Text, cuttable_in, fit, join_texts
from openm6.tasks.registry import TASKS
from tests.small_model import modalities

LONG = " ".join(f"word{number}" for number in range(3000))
QUESTION = "How many words are there?"


@pytest.fixture(scope="module")
def text() -> Text:
    found = modalities()["text"]
    assert isinstance(found, Text)
    return found


def segment(lengths: list[int], between: int, keep_end: bool = False) -> Segment:
    """A text of stretches that may be cut, each followed by so many words that may not."""
    cuttable, position = [], 0
    for length in lengths:
        cuttable.append(Cuttable(position, position + length, keep_end))
        position += length + between
    ids = np.arange(position)
    return Segment("text", {"ids": ids}, line(position), position, np.zeros(position, bool), cuttable=tuple(cuttable))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=3),
    st.integers(0, 4),
    st.integers(0, 60),
    st.booleans(),
)
def test_all_stretches_are_cut_to_the_largest_length_that_fits(
    lengths: list[list[int]], between: int, limit: int, keep_end: bool
) -> None:
    segments = [segment(found, between, keep_end) for found in lengths]
    every = [length for found in lengths for length in found]
    fixed = between * len(every)
    fitting = [c for c in range(14) if fixed + sum(min(length, c) for length in every) <= limit]
    cut = fit(segments, limit)
    if not every or not fitting:
        assert cut == segments
        return
    most = max(fitting)
    assert sum(map(len, cut)) == fixed + sum(min(length, most) for length in every) <= limit
    for before, after in zip(segments, cut, strict=True):
        assert after.truncated == any(one.stop - one.start > most for one in before.cuttable)
        kept = []
        for one, left in zip(before.cuttable, after.cuttable, strict=True):
            ids = list(range(one.start, one.stop))
            ids = ids[max(0, len(ids) - most) :] if keep_end else ids[:most]
            assert after.arrays["ids"][left.start : left.stop].tolist() == ids
            kept += [*ids, *range(one.stop, one.stop + between)]
        assert after.arrays["ids"].tolist() == kept
        assert len(after) == after.span == len(after.learn) and np.array_equal(after.grid, line(len(after)))


def test_less_than_the_shortest_is_not_cut() -> None:
    segments = [segment([40], 2), segment([30], 2)]
    assert [len(found) for found in fit(segments, 36, shortest=16)] == [18, 18]
    assert fit(segments, 34, shortest=16) == segments


def test_a_text_that_is_too_long_keeps_the_question(text: Text) -> None:
    record = {"id": "1", "text_en": LONG, "question": QUESTION, "answer": "3000"}
    for rng in (None, np.random.default_rng(0)):
        (part,) = TASKS["question_answering"].example(record, np.random.default_rng(1)).source
        tokens = text.source(part.raw, rng, part.options)
        read = text.decode(tokens.arrays["ids"].tolist())
        assert len(tokens) == text.max_tokens and tokens.truncated
        assert read.startswith("word0 word1 word2") and read.endswith(" " + QUESTION)


def test_a_short_text_is_not_truncated(text: Text) -> None:
    record = {"id": "1", "text_en": "two words", "question": QUESTION, "answer": "2"}
    example = TASKS["question_answering"].example(record, np.random.default_rng(1))
    (part,) = example.source
    tokens = text.source(part.raw, options=part.options)
    assert not tokens.truncated and text.decode(tokens.arrays["ids"].tolist()) == part.raw
    assert not text.target(example.target.raw, options=example.target.options).truncated


@pytest.mark.parametrize("words", ["seven apples", "七个红苹果", "naïve 🙂", f"a {MASK_CHARACTER} c", ""])
@pytest.mark.parametrize("gaps", [False, True])
def test_stretches_of_characters_become_their_tokens(
    text: Text, words: str, gaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "reads_gaps", gaps)
    joined = join_texts(
        join_texts(Part("text", "Before:\n", {"cuttable": ()}), Part("text", words)),
        Part("text", "\nAfter", {"cuttable": ()}),
    )
    assert [joined.raw[one.start : one.stop] for one in cuttable_in(joined.raw, joined.options)] == [words]
    tokens = text.source(joined.raw, options=joined.options)
    assert tokens.arrays["ids"].tolist() == text.encode(joined.raw)
    (one,) = tokens.cuttable
    inside = text.decode(tokens.arrays["ids"][one.start : one.stop].tolist())
    assert inside.strip() == (words.replace(MASK_CHARACTER, "") if gaps else words).strip()


def test_words_of_a_prompt_beyond_the_limit_are_cut_at_the_end(text: Text) -> None:
    short = Text(text.tokenizer, max_tokens=4)
    tokens = short.source("a prompt longer than that", options={"cuttable": ()})
    assert len(tokens) == 4 and tokens.truncated


def test_going_on_with_a_long_text_goes_on_where_the_given_part_ends(text: Text) -> None:
    record = {"id": "1", "text_en": LONG}
    for seed in range(4):
        example = TASKS["text_generation"].example(record, np.random.default_rng(seed), train=True)
        (part,) = example.source
        read = text.source(part.raw, options=part.options)
        written = text.target(example.target.raw, options=example.target.options)
        before = text.decode(read.arrays["ids"].tolist())
        after = text.decode(written.arrays["labels"].tolist())
        assert read.truncated and before + after in LONG
        assert written.truncated and text.end not in written.arrays["labels"]
