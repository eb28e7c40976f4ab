"""Fields kept beside the known ones are found in their language."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.modalities.text import GAP
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import TextWithHoles, localised
from openm6.tasks.task import Scene

RECORD = {
    "id": "1",
    "label": "cup",
    "extra": {"review_en": "good", "review_zh": "好", "note": "fine", "备": "好"},
}


@pytest.mark.parametrize(
    ("name", "language", "found"),
    [
        ("review", "en", "good"),
        ("review", "zh", "好"),
        ("note", "en", "fine"),
        ("note", "zh", None),
        ("备", "zh", "好"),
        ("备", "en", None),
        ("absent", "en", None),
        ("label", "en", "cup"),
        ("label", "zh", None),
    ],
)
def test_a_field_is_found_in_its_language(name: str, language: str, found: str | None) -> None:
    assert localised(RECORD, name, language) == found


def test_a_plain_table_in_one_language_can_pose_a_shop_task() -> None:
    table = {"id": "1", "extra": {"review": "The seams are loose.", "sentiment": "negative"}}
    task = TASKS["judge_review"]
    assert task.languages(table) == ["en"]
    assert task.example(table, np.random.default_rng(0)).answer == "negative"


def test_a_spoken_word_fits_the_picture_exactly_where_the_answer_says_so() -> None:
    record = {"id": "1", "image": b"picture", "audio": b"own", "label": "one"}
    others = [{"audio": b"twin", "label": "one"}, {"audio": b"other", "label": "two"}]
    seen = set()
    for seed in range(30):
        example = TASKS["match_spoken"].example({**record, "others": others}, np.random.default_rng(seed))
        sound = next(part.raw for part in example.source if part.modality == "sound")
        assert sound == (b"own" if example.answer in ("yes", "是") else b"other")
        seen.add(example.answer)
    assert len(seen) == 4


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("count", [1, 2, 7, 20, 100, 400])
def test_a_text_with_holes_lacks_a_share_of_its_words_in_short_runs(language: str, count: int) -> None:
    words = [f"w{n}" if language == "en" else chr(0x4E00 + n) for n in range(count)]
    joint = " " if language == "en" else ""
    first_runs = set()
    for seed in range(20):
        scene = Scene(language, np.random.default_rng(seed), train=True)
        (part,) = TextWithHoles("text").parts({f"text_{language}": joint.join(words)}, scene)
        pieces = part.raw.split(GAP)
        kept = [piece.split() if language == "en" else list(piece) for piece in pieces]
        assert len(pieces) - 1 == max(1, round(0.05 * count)), "runs of about three words"
        assert sum(map(len, kept)) == count - max(1, round(0.15 * count))
        assert all(kept[1:-1]), "two gaps side by side would be one run"
        places = [words.index(word) for piece in kept for word in piece]
        assert places == sorted(places), "what stays is the text, in its order"
        first_runs.add(len(kept[0]))
    assert count < 7 or len(first_runs) > 3
