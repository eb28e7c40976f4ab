"""Targets and inputs that follow from one random decision agree."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.data.records import Fields, RowReader
from openm6.modalities.interface import Part
from openm6.modalities.series import fit_scale
from openm6.modalities.text import MASK_CHARACTER
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import PINNED, Context, couplets, hold_out_category, hold_out_number, mask_words, states
from tests.small_model import demo_sources

POEM = "《江雪》 柳宗元\n千山鸟飞绝，万径人踪灭。\n孤舟蓑笠翁，独钓寒江雪。"


def test_the_answer_says_which_side_of_the_bound_the_value_lies() -> None:
    record, seen = demo_sources()["penguins"][7], set()
    for seed in range(40):
        example = TASKS["table_question_answering"].example(record, np.random.default_rng(seed), language="en")
        words = example.source[-1].raw.strip()
        column, bound = words.removeprefix("Is the ").removesuffix("?").split(" above ")
        value = record["numbers"][column.replace(" ", "_")]
        assert (value > float(bound)) == (example.answer == "yes")
        seen.add(example.answer)
    assert seen == {"yes", "no"}


def test_the_step_named_is_the_one_that_was_moved() -> None:
    record, places = demo_sources()["weather"][4], []
    for seed in range(30):
        example = TASKS["anomaly_detection"].example(record, np.random.default_rng(seed), language="en")
        shown = next(part.raw for part in example.source if part.modality == "numbers").values
        true = record["series"]["temp_max"]
        moved = [place for place, pair in enumerate(zip(shown, true, strict=True), 1) if pair[0] != pair[1]]
        if example.answer == "none":
            assert moved == []
        else:
            assert [f"step {place}" for place in moved] == [example.answer]
            spread = fit_scale(np.asarray(true, float))[1]
            assert abs(shown[moved[0] - 1] - true[moved[0] - 1]) > 5 * spread
        places += moved
    assert 8 <= len(places) <= 22 and len(set(places)) > 5


def test_a_record_is_left_as_it_was() -> None:
    record = demo_sources()["weather"][4]
    before = list(record["series"]["temp_max"])
    for seed in range(5):
        TASKS["anomaly_detection"].example(record, np.random.default_rng(seed))
    assert record["series"]["temp_max"] == before


def test_halves_of_equal_length_are_a_couplet() -> None:
    assert couplets(POEM) == [("千山鸟飞绝", "万径人踪灭"), ("孤舟蓑笠翁", "独钓寒江雪")]
    assert couplets("a b, c d. One, two and three. No comma here.") == [("a b", "c d")]
    assert couplets("夫如何？齐鲁青未了。") == []


def test_both_lines_are_of_one_couplet() -> None:
    record = {"id": "x", "text_zh": POEM}
    seen = set()
    for seed in range(20):
        example = TASKS["couplet_completion"].example(record, np.random.default_rng(seed))
        seen.add((example.source[0].raw.strip().removeprefix("对下联："), example.answer))
    assert seen == set(couplets(POEM))


def test_title_and_poem_make_the_whole() -> None:
    example = TASKS["poem_generation"].example({"id": "x", "text_zh": POEM}, np.random.default_rng(0))
    assert example.source[0].raw == "作诗：《江雪》 柳宗元\n"
    assert POEM == "《江雪》 柳宗元\n" + example.answer


def test_most_poems_hold_a_couplet() -> None:
    poems = demo_sources()["poems"]
    found = [bool(TASKS["couplet_completion"].languages(poems[row])) for row in range(60)]
    assert sum(found) > 40


@pytest.mark.parametrize("labels", [True, False])
def test_a_spoken_word_fits_the_image_exactly_where_the_answer_says_so(labels: bool) -> None:
    record = {"id": "1", "image": b"image", "audio": b"own"} | ({"label": "one"} if labels else {})
    others = [{"audio": b"twin", "label": "one"}, {"audio": b"other", "label": "two"}]
    if not labels:
        others = [{"audio": b"own"}, {"audio": b"other"}]
    seen = set()
    for seed in range(30):
        example = TASKS["image_audio_matching"].example({**record, "others": others}, np.random.default_rng(seed))
        audio = next(part.raw for part in example.source if part.modality == "audio")
        assert audio == (b"own" if example.answer in ("yes", "是") else b"other")
        seen.add(example.answer)
    assert len(seen) == 4


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("count", [1, 2, 7, 20, 100, 400])
def test_a_text_with_holes_lacks_a_share_of_its_words_in_short_runs(language: str, count: int) -> None:
    words = [f"w{n}" if language == "en" else chr(0x4E00 + n) for n in range(count)]
    joint = " " if language == "en" else ""
    first_runs = set()
    for seed in range(20):
        record = {f"text_{language}": joint.join(words)}
        built = mask_words(record, Context(language, np.random.default_rng(seed), train=True))
        segments = built.inputs["text"].raw.split(MASK_CHARACTER)
        kept = [segment.split() if language == "en" else list(segment) for segment in segments]
        assert len(segments) - 1 == max(1, round(0.05 * count)), "runs of about three words"
        assert sum(map(len, kept)) == count - max(1, round(0.15 * count))
        assert all(kept[1:-1]), "two gaps side by side would be one run"
        places = [words.index(word) for segment in kept for word in segment]
        assert places == sorted(places), "what stays is the text, in its order"
        first_runs.add(len(kept[0]))
    assert count < 7 or len(first_runs) > 3


RECORD = {
    "id": "r",
    "text_en": "a red cup",
    "numbers": {"price": 4.0, "weight": 2.0, "rating": None},
    "categories": {"colour": "red", "size": "big", "shop": None},
}


def test_any_column_is_predicted_from_all_else() -> None:
    task = TASKS["record_regression"]
    example = task.example(RECORD, np.random.default_rng(0))
    (column,) = example.target.raw
    shown = " ".join(str(part.raw) for part in example.source)
    other = {"price": "weight", "weight": "price"}[column]
    assert f"'{other}'" in shown and f"'{column}'" not in shown and "rating" not in shown
    assert "a red cup" in shown and "colour: red; size: big" in shown and f"What is its {column}?" in shown
    assert all("  " not in part.raw for part in example.source if part.modality == "text")


def test_a_text_that_holds_the_answer_is_left_out() -> None:
    colour = hold_out_category(RECORD, Context("en", np.random.default_rng(0)), "colour")
    assert set(colour.inputs) == {"numbers", "categories"} and colour.inputs["categories"].raw == "size: big"
    size = hold_out_category(RECORD, Context("en", np.random.default_rng(0)), "size")
    assert set(size.inputs) == {"numbers", "categories", "text"} and size.target.raw == "big"
    assert size.words == {"column": "size"} and size.key == "size=big"


@pytest.mark.parametrize(
    ("text", "answer", "stated"),
    [
        ("a red cup", "red", True),
        ("A RED cup", "red", True),
        ("scared of cups", "red", False),
        ("nothing to say", "no", False),
        ("no, thanks", "no", False),
        ("size M", "M", False),
        ("一个红色的杯子", "红色", True),
        ("是不是", "是", False),
        ("M", "m", True),
        (" 是", "是", True),
    ],
)
def test_a_text_states_an_answer_as_a_word_that_is_not_short(text: str, answer: str, stated: bool) -> None:
    assert states(text, answer) is stated
    record = {"id": "r", "numbers": {"price": 3.0}, "categories": {"kind": answer}, "text_en": text, "text_zh": text}
    built = hold_out_category(record, Context("en", np.random.default_rng(0)), "kind")
    assert ("text" in built.inputs) is not stated


@pytest.mark.parametrize("rating", ["good", "M", "好", "good|new"])
def test_an_answer_is_not_shown_through_another_key(rating: str) -> None:
    texts = ("text_en", "text_zh", "tags_en", "tags_zh", "label", "label_zh")
    fields = Fields(**dict.fromkeys(texts, "rating"), numbers=["price", "weight"], categories=["rating", "size"])
    row = {"rating": rating, "size": "big", "price": 3.5, "weight": 2.0}
    record = RowReader(list(row), fields, lambda name, limit: b"", "t").read(row)
    for task, column in (("record_classification", "rating"), ("record_regression", "price")):
        one = record | {"extra": record["extra"] | {PINNED: column}}
        for language in ("en", "zh"):
            example = TASKS[task].example(one, np.random.default_rng(0), language=language)
            shown = [str(part.raw) for part in example.source]
            assert not any(answer in part for part in shown for answer in str(row[column]).split("|"))
            assert "'weight': 2.0" in shown[0 if column == "rating" else 1] and any("big" in part for part in shown)


def test_in_training_columns_are_missing_in_half_of_the_examples() -> None:
    many = {"id": "r", "numbers": {f"n{index}": float(index) for index in range(20)}}
    rng = np.random.default_rng(0)
    counts = [
        len(hold_out_number(many, Context("en", rng, train=True)).inputs.get("numbers", Part("numbers", {})).raw)
        for _ in range(400)
    ]
    assert 0.4 < np.mean(np.array(counts) == 19) < 0.65 and np.mean(np.array(counts) < 12) > 0.15
    assert len(hold_out_number(many, Context("en", rng)).inputs["numbers"].raw) == 19


def test_a_record_needs_more_than_the_answer() -> None:
    for alone in ({"numbers": {"a": 1.0}}, {"categories": {"a": "x"}}, {"text_en": "x"}):
        assert not TASKS["record_regression"].languages(alone) and not TASKS["record_classification"].languages(alone)
    chinese = {"categories": {"a": "红", "b": "大"}}
    assert TASKS["record_classification"].languages(chinese) == ["zh"]
