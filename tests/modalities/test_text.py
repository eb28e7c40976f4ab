"""Text: nothing is unknown, nothing a user writes is a mark, all comes back as it was."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from openm6.core.errors import ConfigError, DataError
from openm6.modalities.text import MASK_CHARACTER, ImportedText, Text, read_tokenizer, train_tokenizer

LESSON = ["draw the digit seven", "画数字七", "what is this", "这是什么"] * 4


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(train_tokenizer(LESSON, 340))


def test_a_candidate_after_raw_text_has_no_end(text: Text) -> None:
    imported = Text(text.tokenizer, imported=ImportedText(vocab_size=400))
    target, candidate = imported.target("seven"), imported.candidate("seven")
    assert candidate.arrays["labels"].tolist() == target.arrays["labels"].tolist()[:-1] and not candidate.truncated
    own = text.candidate("seven").arrays["labels"].tolist()
    assert own == text.target("seven").arrays["labels"].tolist() and own[-1] == text.end


@settings(max_examples=200, deadline=None)
@given(words=st.text(max_size=60))
def test_any_text_comes_back(text: Text, words: str) -> None:
    ids = text.encode(words)
    assert text.decode(ids) == words
    assert all(0 <= token < text.first_special for token in ids)


@pytest.mark.parametrize(
    "words",
    [
        "",
        " two  spaces ",
        "naïve façade",
        "七个红苹果。",
        "👩‍🚀🙂",
        "a\x00b\x07\n\t\r",
        "<end>",
        "[MASK] </s> <|endoftext|>",
        "\uffff",
        f"a {MASK_CHARACTER} c",
    ],
)
def test_what_looks_like_a_mark_is_only_text(text: Text, words: str) -> None:
    ids = text.source(words).arrays["ids"]
    assert (ids < text.first_special).all()
    assert text.decode(ids.tolist()) == words


def test_marks_lie_above_every_id_of_the_tokenizer(text: Text) -> None:
    assert text.start > max(text.tokenizer.get_vocab().values())
    assert text.mask < text.vocab_size and text.vocab_size % 64 == 0


def test_a_tokenizer_with_unused_ids_does_not_run_into_the_marks() -> None:
    spec = train_tokenizer(LESSON, 300).to_str()
    last = max(Tokenizer.from_str(spec).get_vocab().values())
    # The last entry moves 40 ids up, as where a maker reserves room.
    token = Tokenizer.from_str(spec).id_to_token(last)
    moved = Tokenizer.from_str(spec.replace(f'"{token}":{last}', f'"{token}":{last + 40}'))
    assert max(moved.get_vocab().values()) == last + 40, "the test did not move an id"
    text = Text(moved)
    assert text.start == last + 41 and text.vocab_size > last + 40


def test_training_is_repeatable() -> None:
    assert train_tokenizer(LESSON, 340).to_str() == train_tokenizer(LESSON, 340).to_str()


def test_no_token_holds_two_chinese_characters() -> None:
    tokenizer = train_tokenizer(["什么数字什么数字 the digit the digit", "数字"] * 50, 400)
    tokens = [tokenizer.decode([one]) for one in range(tokenizer.get_vocab_size())]
    assert {"什", "么", "数", "字"} <= set(tokens) and any(len(token) > 4 for token in tokens)
    assert all(sum("\u4e00" <= letter <= "\u9fff" for letter in token) <= 1 for token in tokens)


def test_a_gap_is_a_hole_to_read_and_a_character_to_write(text: Text) -> None:
    words = f"a {MASK_CHARACTER} c"
    gapped = Text(text.tokenizer)
    gapped.reads_gaps = True
    for read in (text.source(words, options={"gaps": True}), gapped.source(words)):
        ids = read.arrays["ids"]
        assert (ids == text.mask).sum() == 1 and (ids >= text.first_special).sum() == 1
    assert text.mask not in text.encode(words) and gapped.encode(words) == ids.tolist()
    written = text.target(words).arrays["labels"]
    assert (written[:-1] < text.first_special).all() and text.decode(written.tolist()) == words


def test_each_token_of_a_target_is_asked_for_the_next(text: Text) -> None:
    tokens = text.target("digit seven")
    ids, labels = tokens.arrays["ids"], tokens.arrays["labels"]
    assert ids[0] == text.start and labels[-1] == text.end
    assert (ids[1:] == labels[:-1]).all() and tokens.placement == "causal"


def test_an_empty_answer_is_just_the_end(text: Text) -> None:
    assert text.target("").arrays["labels"].tolist() == [text.end]


def test_lengths_are_bounded(text: Text) -> None:
    short = Text(text.tokenizer, max_tokens=5)
    assert len(short.source("x" * 100)) == 5
    assert len(text.target("x" * 100, options={"max_tokens": 7})) == 7
    assert len(short.target("x" * 100)) == 5


@pytest.mark.parametrize("most", [1, 7, 11, 12, 40])
def test_a_target_has_an_end_exactly_if_it_is_whole(text: Text, most: int) -> None:
    """A text that was cut and then closed would teach to stop amid a sentence."""
    words = "the cat sat"
    ids = text.encode(words)
    assert 7 < len(ids) <= 12
    tokens = text.target(words, options={"max_tokens": most})
    labels = tokens.arrays["labels"].tolist()
    assert labels == ([*ids, text.end] if len(ids) <= most else ids[:most])
    assert tokens.arrays["ids"].tolist() == [text.start, *labels[:-1]]
    assert tokens.truncated == (len(ids) > most) and tokens.learn.all()


def test_half_a_surrogate_pair_is_refused(text: Text) -> None:
    for method in (text.source, text.target):
        with pytest.raises(DataError, match="not Unicode at character 2"):
            method("ab\ud800")


def test_half_a_surrogate_pair_does_not_stop_a_tokenizer_from_being_learned() -> None:
    assert train_tokenizer([*LESSON, "ab\ud83d"], 340).to_str() == train_tokenizer([*LESSON, "ab?"], 340).to_str()


def test_a_file_that_is_no_tokenizer_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"there/tokenizer.json is not a tokenizer.json"):
        read_tokenizer('{"model": 3}', "there/tokenizer.json")


def test_limits_in_a_tokenizer_file_have_no_effect(text: Text) -> None:
    tokenizer = Tokenizer.from_str(text.tokenizer.to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    words = "one two three four five six seven"
    assert read_tokenizer(tokenizer.to_str(), "it").encode(words).ids == text.tokenizer.encode(words).ids


def test_bytes_of_tokens_join_to_the_text(text: Text) -> None:
    for words in ("画数字七", "a \U0001f600 b", "é à"):
        ids = text.encode(words)
        assert b"".join(map(text.bytes_of, ids)).decode() == words
    assert len(text.encode("\U0001f600")) == 4 and text.bytes_of(text.encode("\U0001f600")[0]) == b"\xf0"
    assert text.bytes_of(text.end) == b""


def test_bytes_of_tokens_of_sentencepiece_join_to_the_text() -> None:
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"draw", "dr", "▁dr"]
    merges = [("d", "r"), ("▁", "dr")]
    tokenizer = Tokenizer(models.BPE({one: n for n, one in enumerate(pieces)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>"])
    text, words = Text(tokenizer), "draw  é\n画 draw"
    ids = text.encode(words)
    assert text.decode(ids) == words and len(ids) < len(words.encode())
    assert b"".join(map(text.bytes_of, ids)).decode() == f" {words}", "the space that it puts before a text"
    assert [text.bytes_of(token) for token in (0, text.start, text.end)] == [b""] * 3
